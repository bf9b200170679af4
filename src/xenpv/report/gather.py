"""All that a report shows of a domain, gathered: plain values, which the page and --json are made from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from xenpv.errors import GuestError, HostError
from xenpv.findings import Findings
from xenpv.frames import U64
from xenpv.io.progress import Progress, ProgressCallback
from xenpv.memory.registers import Registers
from xenpv.memory.survey import Survey, survey
from xenpv.report.content import Content, content_of
from xenpv.report.identity import Identity, Place, identity_of, places_of
from xenpv.report.p2mform import Shape, leaves_at, shapes_of
from xenpv.report.parts import NOTHING, Parts
from xenpv.report.pfnmap import Layer, PfnMap, pfn_map, whole
from xenpv.report.tables import TableStats, table_stats
from xenpv.source.domain import Domain


@dataclass(frozen=True, slots=True)
class VcpuState:
    """A vcpu; ``registers`` is None where they are not known, ``problem`` why something is not."""

    vcpu: int
    registers: Registers | None
    cr3: int | None = None
    user_cr3: int | None = None
    kernel_sp: int | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class P2MState:
    """The p2m: by each way, and what it holds; ``problem`` why that is not known."""

    shapes: list[Shape] = field(default_factory=list)
    leaves: int = 0
    places: int = 0
    shared: int = 0
    found: Survey | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Checked:
    """What a verifier found: a sentence, whether it is all right, and the findings."""

    sentence: str
    ok: bool
    findings: Findings


@dataclass
class Facts:
    """All that is shown. What does not apply, or was not asked for, is None."""

    identity: Identity
    start: dict[str, str]
    places: list[Place]
    map: PfnMap
    p2m: P2MState | None
    tables: TableStats | None
    content: Content | None
    vcpus: list[VcpuState]
    checked: Checked | None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for --json."""
        pfns = {"end": self.map.end, "layers": [_layer(layer) for layer in self.map.layers]}
        p2m = self.p2m and _p2m(self.p2m)
        content = None
        if self.content is not None:
            content = asdict(replace(self.content, zero_at=NOTHING, duplicate_at=NOTHING))  # those are in the map
            content |= {"saving": self.content.saving}
            del content["zero_at"], content["duplicate_at"]
        return {
            "identity": asdict(self.identity),
            "start_info": self.start,
            "places": [asdict(place) for place in self.places],
            "map": pfns,
            "p2m": p2m,
            "page_tables": self.tables and asdict(self.tables),
            "content": content,
            "vcpus": [asdict(vcpu) for vcpu in self.vcpus],
            "verify": self.checked and _checked(self.checked),
        }


def gather(
    domain: Domain, checked: Checked | None, *, content_pages: int, progress: ProgressCallback | None = None
) -> Facts:
    """Look at a domain. ``content_pages``: of how many pages, at most, the content is looked at; 0 for none.

    Raises HostError when a running domain goes away meanwhile.
    """
    report = progress or (lambda _: None)
    identity = identity_of(domain)
    try:
        extents, by_type = whole(domain.extents())
    except GuestError:  # what is wrong with its p2m, by which all is found, is said there
        extents, by_type = whole([])
    p2m, p2m_parts = _look_at_p2m(domain, report)
    places, start = places_of(domain)
    tables = None
    if not domain.hvm:
        tables = table_stats(
            domain.frames,
            extents,
            lambda done, of: report(Progress(done, of, "page tables", "tables")),
            pins=domain.knows_pins,
        )
    content = None
    if content_pages:
        total = min(content_pages, int(extents.pages.sum()))
        content = content_of(
            domain.frames,
            extents,
            content_pages,
            lambda done: report(Progress(done, total, "content", "pages")),
            kept=domain.has_content,
        )
    others = [("p2m", "leaf", "leaves of the p2m", p2m_parts)] if p2m_parts is not None else []
    if content is not None:
        others.append(("content", "zero", "hold nothing but zeroes", content.zero_at))
        others.append(("content", "twin", "hold what others hold, too", content.duplicate_at))
    named = [place.pfn for place in places]
    named += [finding.pfn for finding in checked.findings if finding.pfn is not None] if checked else []
    entries = p2m.found.cell_pfns * len(p2m.found.local_pages) if p2m and p2m.found else 0
    entries = p2m.shapes[0].entries if p2m and p2m.shapes else entries
    drawn = pfn_map(by_type, others, _below(named), min(entries, _PFN_MAX))
    vcpus = [_vcpu(domain, vcpu) for vcpu in domain.vcpus]
    return Facts(identity, start, places, drawn, p2m, tables, content, vcpus, checked)


_PFN_MAX = 1 << 52  # of a page-table entry


def _below(pfns: list[int]) -> U64:
    """Those that can be a pfn at all."""
    return np.array([pfn for pfn in pfns if 0 <= pfn < _PFN_MAX], np.uint64)


def _look_at_p2m(domain: Domain, report: ProgressCallback) -> tuple[P2MState | None, Parts | None]:
    if domain.hvm:
        return None, None
    try:
        if not domain.has_p2m:
            return P2MState(problem="it exposes no p2m"), None
        p2m = domain.p2m
        report(Progress(0, 1, "p2m"))
        found = survey(p2m)
        shapes = [] if domain.anchors is None else shapes_of(domain, replace(domain.anchors, max_pfn=p2m.entries))
        report(Progress(1, 1, "p2m"))
    except GuestError as e:
        return P2MState(problem=str(e)), None
    distinct = p2m.distinct_leaves
    several = int(np.count_nonzero(distinct.count > 1))
    state = P2MState(shapes, len(distinct), int(distinct.count.sum()), several, found)
    return state, leaves_at(p2m, mfns=domain.p2m_names_mfns)


def _vcpu(domain: Domain, vcpu: int) -> VcpuState:
    problem, cr3, user, kernel_sp = None, None, None, None
    try:
        registers = domain.registers(vcpu)
    except HostError as e:
        return VcpuState(vcpu, None, problem=str(e))
    if registers is None:
        return VcpuState(vcpu, None, problem="nothing is known of its registers")
    try:
        cr3, user = domain.cr3(vcpu), domain.cr3(vcpu, user=True)
    except GuestError as e:
        problem = str(e)
    context = domain.vcpu_context(vcpu)
    kernel_sp = None if context is None else int(context["kernel_sp"])
    return VcpuState(vcpu, registers, cr3, user, kernel_sp, problem)


def _checked(checked: Checked) -> dict[str, Any]:
    found = checked.findings
    return {
        "verdict": checked.sentence,
        "ok": checked.ok,
        "errors": found.errors,
        "warnings": found.warnings,
        "notes": found.notes,
        "findings": [finding.to_json() for finding in found],
        "left_out": {rule.name: n for rule, n in found.left_out().items()},
    }


def _layer(layer: Layer) -> dict[str, Any]:
    return {
        "lane": layer.lane,
        "kind": layer.kind,
        "what": layer.what,
        "pages": layer.pages,
        "rows": layer.parts.rows(),
    }


def _p2m(state: P2MState) -> dict[str, Any]:
    found = state.found
    out = {"shapes": [asdict(shape) for shape in state.shapes], "leaves": state.leaves, "places": state.places}
    out |= {"shared": state.shared, "problem": state.problem}
    return out | {"entries": {kind.name.lower(): n for kind, n in found.pages.items()} if found else None}
