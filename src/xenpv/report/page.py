"""render_page(): a report as one HTML file.

Styles, script and data are in it; it may load nothing else.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from typing import Any

from xenpv import __version__
from xenpv.errors import RequestError
from xenpv.findings import Finding, Rule, Severity
from xenpv.frames import PAGE_SIZE
from xenpv.memory.p2m_survey import EntryKind
from xenpv.memory.registers import SEGMENTS, Registers
from xenpv.report.drawing import draw_p2m_tree
from xenpv.report.gather import CheckResult, ReportFacts, VcpuState
from xenpv.report.page_tables import FLAGS
from xenpv.text import printable, size

_CONFIG_MAX = 100_000  # characters
_PLACES_MAX = 100  # pages with a special role in the list
_FINDINGS_OPEN_MAX = 12  # findings visible at once
_P2M_KINDS = {
    EntryKind.LOCAL: ("a frame of the domain", "k-leaf"),
    EntryKind.INVALID: ("INVALID_MFN", "k-zero"),
    EntryKind.FOREIGN: ("foreign", "k-l2"),
    EntryKind.IDENTITY: ("identity", "k-l1"),
    EntryKind.HOLE: ("in no leaf", "k-zero"),
}


def render_page(facts: ReportFacts) -> str:
    """Return the HTML of a report. Raises RequestError if jinja2 is not installed."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415  an extra
        from markupsafe import Markup  # noqa: PLC0415
    except ImportError as e:
        raise RequestError("a report needs jinja2, which is not installed: pip install jinja2") from e
    loader = PackageLoader("xenpv.report")
    # Text of a guest or a configuration is hostile: all of it is escaped, and control characters are replaced.
    env = Environment(
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else printable(value),
        loader=loader,
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    env.filters |= {
        "hex": lambda n: f"{n:#x}",
        "number": lambda n: f"{n:,}",
        "pages": lambda n: size(n * PAGE_SIZE),
        "registers": _registers,
        "share": _share,
    }
    style, script = (loader.get_source(env, name)[0] for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return env.get_template("page.html").render(
        facts=facts,
        checked=facts.checked,
        css=Markup(style),  # noqa: S704  both are files of ours
        js=Markup(script),  # noqa: S704
        policy=policy,
        version=__version__,
        data=_data(facts),
        **_template_values(facts),
    )


def _template_values(facts: ReportFacts) -> dict[str, Any]:
    """Return the values that the template needs besides the facts."""
    p2m, content, config = facts.p2m, facts.content, facts.identity.config or ""
    return {
        "sections": list(_sections(facts)),
        "cards": list(_cards(facts)),
        "fact_rows": [(label, text) for label, text in {**facts.identity.facts, **facts.start_info}.items() if text],
        "groups": _groups(facts.checked) if facts.checked else [],
        "p2m_kinds": [(kind, *label_and_style) for kind, label_and_style in _P2M_KINDS.items()],
        "p2m_total": sum(p2m.entry_survey.pages.values()) if p2m and p2m.entry_survey else 0,
        "pictures": [(tree, draw_p2m_tree(tree)) for tree in p2m.trees] if p2m else [],
        "flag_names": list(FLAGS),
        "content_rows": []
        if content is None
        else [
            ("nothing but zeroes", content.zero, "k-zero"),
            (f"the same as others ({content.contents:,} contents)", content.duplicate, "k-twin"),
            ("could go, were each content kept once", content.saving, "k-data"),
        ],
        "config": config[:_CONFIG_MAX],
        "config_cut": max(0, len(config) - _CONFIG_MAX),
        "places_max": _PLACES_MAX,
    }


def _sections(facts: ReportFacts) -> Iterable[tuple[str, str]]:
    yield "summary", "Summary"
    yield "map", "Map"
    if facts.checked:
        yield "findings", "Findings"
    if facts.p2m:
        yield "p2m", "p2m"
    if facts.tables:
        yield "tables", "Page tables"
    if facts.content:
        yield "content", "Zero and duplicate"
    if facts.vcpus:
        yield "vcpus", "vCPUs"
    yield "more", "More"


def _cards(facts: ReportFacts) -> Iterable[dict[str, str]]:
    def card(to: str, label: str, value: str, note: str = "", tone: str = "") -> dict[str, str]:
        return {"to": to, "label": label, "value": value, "note": note, "tone": tone}

    pages = sum(layer.pages for layer in facts.map.layers if layer.lane in {"pages", "tables"})
    yield card("map", "Memory", size(pages * PAGE_SIZE), f"{pages:,} pages, the last pfn is {facts.map.end - 1:#x}")
    if facts.checked:
        findings = facts.checked.findings
        tone = "bad" if findings.errors else "warn" if findings.warnings else "good"
        counts = [(findings.errors, "error"), (findings.warnings, "warning"), (findings.notes, "note")]
        texts = [_count(n, noun) for n, noun in counts if n] or ["none"]
        yield card("findings", "Findings", texts[0], ", ".join(texts[1:]), tone)
    if facts.p2m:
        forms = [tree.form for tree in facts.p2m.trees]
        value, note = "not known", ""
        if forms:
            leaves = _count(facts.p2m.leaves, "leaf", "leaves")
            value, note = (forms[0], leaves) if len(forms) == 1 else (f"{len(forms)} forms", " and ".join(forms))
        yield card("p2m", "p2m", value, note)
    if facts.tables:
        tables = sum(level.tables for level in facts.tables.levels)
        pins = [level.pinned for level in facts.tables.levels if level.pinned is not None]
        yield card("tables", "Page tables", f"{tables:,}", f"{sum(pins):,} pinned" if pins else "")
    if facts.content and facts.content.looked_at:
        saving = _share(facts.content.saving, facts.content.looked_at)
        yield card(
            "content", "Could go", saving, f"{facts.content.zero:,} zero pages, {facts.content.duplicate:,} alike"
        )
    if facts.vcpus:
        known = [vcpu.registers for vcpu in facts.vcpus if vcpu.registers]
        kernel = sum(registers.in_kernel for registers in known)
        yield card(
            "vcpus", "vCPUs", f"{len(facts.vcpus):,}", f"{kernel} in the kernel, {len(known) - kernel} in user mode"
        )


def _groups(checked: CheckResult) -> list[dict[str, Any]]:
    """Return the findings by rule, the worst first. The first few groups are open."""
    by_rule: dict[Rule, list[Finding]] = {}
    for finding in checked.findings:
        by_rule.setdefault(finding.rule, []).append(finding)
    order = list(Severity)
    rules = sorted(by_rule, key=lambda rule: order.index(rule.severity))
    omitted, shown = checked.findings.omitted(), 0
    out: list[dict[str, Any]] = []
    for rule in rules:
        shown += len(by_rule[rule])
        opened = shown <= _FINDINGS_OPEN_MAX or not out
        out.append({"rule": rule, "findings": by_rule[rule], "count": checked.findings.count[rule],
                    "more": omitted.get(rule, 0), "open": opened})  # fmt: skip
    return out


def _data(facts: ReportFacts) -> dict[str, Any]:
    """Return the data that the script draws."""
    drawn = facts.map
    findings = list(facts.checked.findings) if facts.checked else []
    return {
        "end": drawn.end,
        "axis": drawn.axis,
        "layers": [
            {"lane": layer.lane, "kind": layer.kind, "what": layer.what, "rows": layer.parts.rows()}
            for layer in drawn.layers
        ],
        "findings": [
            {"pfn": finding.pfn, "severity": str(finding.severity), "message": printable(finding.message)}
            for finding in findings
            if finding.pfn is not None and 0 <= finding.pfn < drawn.end
        ],
        "places": [{"pfn": page.pfn, "what": page.what} for page in facts.notable_pages if page.pfn < drawn.end],
    }


def _registers(vcpu: VcpuState) -> list[tuple[str, str]]:
    """Return name and value of each register."""
    registers = vcpu.registers
    assert isinstance(registers, Registers)
    digits = registers.width * 2
    wide = {**registers.general}
    if registers.width == 8:
        bases = (
            ("fs_base", registers.fs_base),
            ("gs_base", registers.gs_base),
            ("other gs_base", registers.inactive_gs_base),
        )
        wide |= dict(bases)
    rows = [(name, f"{value:0{digits}x}") for name, value in {**wide, **registers.control}.items()]
    return rows + [(name, f"{registers.segments[name]:04x}") for name in SEGMENTS]


def _count(n: int, singular: str, plural: str | None = None) -> str:
    """Return a count with its noun: "1 error", "2 errors"."""
    return f"{n:,} {singular if n == 1 else plural or singular + 's'}"


def _share(part: int, total: int) -> str:
    """Return a share in per cent; only 0 is shown as 0."""
    if not total or not part:
        return "0 %"
    share = 100 * part / total
    if share < 0.1:
        return "< 0.1 %"
    if part < total and share > 99.9:
        return "> 99.9 %"
    return f"{share:.0f} %" if share >= 10 else f"{share:.1f} %"


def _hash(text: str) -> str:
    """Return the hash by which a Content-Security-Policy allows a script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
