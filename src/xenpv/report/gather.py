"""gather_facts(): read all that a report shows of a domain.

The HTML page and the JSON are made from it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from xenpv.errors import GuestError
from xenpv.findings import Findings
from xenpv.frames import U64
from xenpv.io.progress import Progress, ProgressCallback
from xenpv.memory.p2m_survey import EntryKind, Survey, survey
from xenpv.memory.registers import Registers
from xenpv.report.content import ContentStats, analyse_content
from xenpv.report.identity import Identity, NotablePage, find_notable_pages, identify
from xenpv.report.p2m_trees import P2MTree, describe_p2m_trees, leaf_ranges
from xenpv.report.page_tables import PageTableStats, count_page_tables
from xenpv.report.pfn_map import Layer, PfnMap, build_map, collect_extents
from xenpv.report.pfn_ranges import NO_RANGES, PfnRanges
from xenpv.source.domain import Domain

_ENTRY_KEYS = {
    EntryKind.LOCAL: "own",
    EntryKind.INVALID: "invalid",
    EntryKind.FOREIGN: "foreign",
    EntryKind.IDENTITY: "identity",
    EntryKind.HOLE: "hole",
}  # in the JSON


@dataclass(frozen=True, slots=True)
class VcpuState:
    """A vcpu. A member is None if it is not known; ``problem`` says why."""

    vcpu: int
    registers: Registers | None
    cr3: int | None = None
    user_cr3: int | None = None
    kernel_sp: int | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class P2MState:
    """The p2m.

    Attributes:
        trees: One for each of its forms, the best first.
        leaves: How many different leaves there are.
        places: How many places those leaves fill.
        shared: How many leaves fill several places.
        entry_survey: How many entries of each kind it has.
        problem: Why the p2m is not known, or None.
    """

    trees: list[P2MTree] = field(default_factory=list)
    leaves: int = 0
    places: int = 0
    shared: int = 0
    entry_survey: Survey | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of checking a domain.

    Attributes:
        sentence: The verdict in a sentence.
        ok: Whether there is no error.
        findings: The findings.
    """

    sentence: str
    ok: bool
    findings: Findings


@dataclass
class ReportFacts:
    """All that a report shows.

    A member is None if it does not apply or was not requested.
    """

    identity: Identity
    start_info: dict[str, str]
    notable_pages: list[NotablePage]
    map: PfnMap
    p2m: P2MState | None
    tables: PageTableStats | None
    content: ContentStats | None
    vcpus: list[VcpuState]
    checked: CheckResult | None

    def to_json(self) -> dict[str, Any]:
        """Return plain values for --json."""
        pfns = {"end": self.map.end, "layers": [_layer_to_json(layer) for layer in self.map.layers]}
        p2m = self.p2m and _p2m_to_json(self.p2m)
        content = None
        if self.content is not None:
            content = asdict(replace(self.content, zero_at=NO_RANGES, duplicate_at=NO_RANGES))  # those are in the map
            content |= {"saving": self.content.saving}
            del content["zero_at"], content["duplicate_at"]
        return {
            "identity": asdict(self.identity),
            "start_info": self.start_info,
            "places": [asdict(page) for page in self.notable_pages],
            "map": pfns,
            "p2m": p2m,
            "page_tables": self.tables and asdict(self.tables),
            "content": content,
            "vcpus": [_vcpu_to_json(vcpu) for vcpu in self.vcpus],
            "verify": self.checked and _check_result_to_json(self.checked),
        }


def _vcpu_to_json(vcpu: VcpuState) -> dict[str, Any]:
    out = asdict(vcpu)
    if vcpu.registers is not None:  # the key is older than the attribute's name
        out["registers"]["other_gs_base"] = out["registers"].pop("inactive_gs_base")
    return out


def gather_facts(
    domain: Domain, checked: CheckResult | None, *, content_pages: int, progress: ProgressCallback | None = None
) -> ReportFacts:
    """Read all that a report shows of a domain.

    Args:
        domain: The domain.
        checked: The result of checking it.
        content_pages: How many pages to search for zero and duplicate pages; 0 for none.
        progress: Called after each step.

    Raises:
        HostError: A running domain has gone meanwhile.
    """
    report = progress or (lambda _: None)
    identity = identify(domain)
    try:
        extents, by_type = collect_extents(domain.extents())
    except GuestError:  # its p2m is damaged: the section of the p2m says so
        extents, by_type = collect_extents([])
    p2m, p2m_parts = _read_p2m(domain, report)
    notable_pages, start_info = find_notable_pages(domain)
    tables = None
    if not domain.hvm:
        tables = count_page_tables(
            domain.frames,
            extents,
            lambda count, total: report(Progress(count, total, "page tables", "tables")),
            pins=domain.knows_pins,
        )
    content = None
    if content_pages:
        total = min(content_pages, int(extents.pages.sum()))
        content = analyse_content(
            domain.frames,
            extents,
            content_pages,
            lambda count: report(Progress(count, total, "content", "pages")),
            has_content=domain.has_content,
        )
    extra_layers = [("p2m", "leaf", "leaves of the p2m", p2m_parts)] if p2m_parts is not None else []
    if content is not None:
        extra_layers.append(("content", "zero", "hold nothing but zeroes", content.zero_at))
        extra_layers.append(("content", "twin", "hold what others hold, too", content.duplicate_at))
    named = [page.pfn for page in notable_pages]
    named += [finding.pfn for finding in checked.findings if finding.pfn is not None] if checked else []
    entries = p2m.entry_survey.cell_pfns * len(p2m.entry_survey.local_pages) if p2m and p2m.entry_survey else 0
    entries = p2m.trees[0].entries if p2m and p2m.trees else entries
    pfn_map = build_map(by_type, extra_layers, _valid_pfns(named), min(entries, _PFN_END))
    vcpus = [_read_vcpu(domain, vcpu) for vcpu in domain.vcpus]
    return ReportFacts(identity, start_info, notable_pages, pfn_map, p2m, tables, content, vcpus, checked)


_PFN_END = 1 << 52  # a page-table entry holds no higher frame number


def _valid_pfns(pfns: list[int]) -> U64:
    """Return those numbers that can be a pfn."""
    return np.array([pfn for pfn in pfns if 0 <= pfn < _PFN_END], np.uint64)


def _read_p2m(domain: Domain, report: ProgressCallback) -> tuple[P2MState | None, PfnRanges | None]:
    if domain.hvm:
        return None, None
    try:
        if not domain.has_p2m:
            return P2MState(problem="it exposes no p2m"), None
        p2m = domain.p2m
        report(Progress(0, 1, "p2m"))
        entry_survey = survey(p2m)
    except GuestError as e:
        return P2MState(problem=str(e)), None
    problem, trees = None, []
    try:
        anchors = domain.anchors
        trees = [] if anchors is None else describe_p2m_trees(domain, replace(anchors, max_pfn=p2m.entries))
    except GuestError as e:  # of the trees: the survey counts
        problem = str(e)
    report(Progress(1, 1, "p2m"))
    distinct = p2m.distinct_leaves
    several = int(np.count_nonzero(distinct.count > 1))
    state = P2MState(trees, len(distinct), int(distinct.count.sum()), several, entry_survey, problem)
    return state, leaf_ranges(p2m, mfns=domain.p2m_names_mfns)


def _read_vcpu(domain: Domain, vcpu: int) -> VcpuState:
    problem, cr3, user, kernel_sp = None, None, None, None
    registers = domain.registers(vcpu)
    if registers is None:
        return VcpuState(vcpu, None, problem="its registers are not known")
    try:
        cr3, user = domain.cr3(vcpu), domain.cr3(vcpu, user=True)
    except GuestError as e:
        problem = str(e)
    context = domain.vcpu_context(vcpu)
    kernel_sp = None if context is None else int(context["kernel_sp"])
    return VcpuState(vcpu, registers, cr3, user, kernel_sp, problem)


def _check_result_to_json(checked: CheckResult) -> dict[str, Any]:
    findings = checked.findings
    return {
        "verdict": checked.sentence,
        "ok": checked.ok,
        "errors": findings.errors,
        "warnings": findings.warnings,
        "notes": findings.notes,
        "findings": [finding.to_json() for finding in findings],
        "left_out": {rule.name: n for rule, n in findings.omitted().items()},
    }


def _layer_to_json(layer: Layer) -> dict[str, Any]:
    return {
        "lane": layer.lane,
        "kind": layer.kind,
        "what": layer.what,
        "pages": layer.pages,
        "rows": layer.parts.rows(),
    }


def _p2m_to_json(state: P2MState) -> dict[str, Any]:
    out = {"shapes": [asdict(tree) for tree in state.trees], "leaves": state.leaves, "places": state.places}
    out |= {"shared": state.shared, "problem": state.problem}
    return out | {
        "entries": {_ENTRY_KEYS[kind]: n for kind, n in state.entry_survey.pages.items()}
        if state.entry_survey
        else None
    }
