"""Checks of a saved PV domain's p2m: its frames, its extent, the guest's own anchors, and the pages that it maps."""

from __future__ import annotations

import numpy as np

from xenpv.domain import rules
from xenpv.domain.config import Config
from xenpv.domain.source import SavedDomain
from xenpv.errors import Fault, GuestError
from xenpv.findings import Findings, Rule
from xenpv.frames import ABSENT, I64, IS_POPULATED, U64, PageType, type_name
from xenpv.memory.p2m import NO_FRAME, Anchors, frames_by_list, frames_by_tree

_FOREIGN = np.uint64(1 << 63)
_IDENTITY = np.uint64(1 << 62)
_MAXMEM_SLACK = 256  # pages: libxl lets a domain have 1 MiB above its maxmem (LIBXL_MAXMEM_CONSTANT)


def check_p2m(saved: SavedDomain, findings: Findings, config: Config | None) -> None:
    """Everything that is wrong with the p2m and with which pages there are."""
    _frames(saved, findings)
    if saved.anchors is not None:
        _extent(saved, saved.anchors, findings)
        _anchors(saved, saved.anchors, findings)
    _pages(saved, findings)
    _limit(saved, findings, config)


def _frames(saved: SavedDomain, findings: Findings) -> None:
    """What update_guest_p2m() demands of every frame, and that no frame is there twice."""
    frames = saved.contents.p2m_frames
    record = saved.contents.p2m_record
    if record is None:
        return
    types = saved.frames.types(frames)
    beyond = frames > np.uint64(saved.contents.end_pfn)
    wrong = beyond | (types != PageType.NOTAB)
    first = _first_of_record(saved)

    def add(i: int, message: str, rule: Rule = rules.P2M_FRAME) -> None:
        at = i - first
        offset = record.offset + 16 + at * 8 if 0 <= at < len(record.p2m_pfns) else None
        findings.add(rule, message, offset=offset, record=record.name, pfn=int(frames[i]), entry=i)

    bad = np.flatnonzero(wrong)
    for i in bad[: findings.room(rules.P2M_FRAME)].tolist():
        pfn = int(frames[i])
        if frames[i] == NO_FRAME:
            add(i, f"p2m_frame_list[{i}] was never sent")
        elif beyond[i]:
            add(i, f"pfn ({pfn:#x}) for p2m_frame_list[{i}] out of range (last pfn {saved.contents.end_pfn:#x})")
        elif IS_POPULATED[types[i]]:
            add(i, f"pfn ({pfn:#x}) for p2m_frame_list[{i}] has bad type {type_name(int(types[i]))}")
        else:
            add(i, f"p2m_frame_list[{i}] (pfn {pfn:#x}) has bad mfn: the stream has no such page")
    for i, other in _shared(saved, findings):
        what = f"p2m_frame_list[{i}] and [{other}] are both pfn {int(frames[i]):#x}, and hold pages of the domain"
        add(i, what, rules.P2M_REPEATED)


def _shared(saved: SavedDomain, findings: Findings) -> list[tuple[int, int]]:
    """Places of the p2m whose frame stands in an earlier place, too, and that place.

    Kernels share one frame among the parts where nothing is, and that does no harm: the restorer writes the same
    nothing there again and again. Only where a part with pages shares its frame will one overwrite the other.
    """
    frames = saved.contents.p2m_frames
    first = saved.p2m.distinct
    if len(first) == np.count_nonzero(frames != NO_FRAME):
        return []
    first = first[np.argsort(frames[first])]
    at = np.minimum(np.searchsorted(frames[first], frames), len(first) - 1)  # which frame stands in each place
    parts = _parts_with_pages(saved)
    used = np.zeros(len(first), np.bool_)
    used[at[parts]] = True
    again = np.ones(len(frames), np.bool_)
    again[first] = False
    wrong = np.flatnonzero(again & used[at] & (frames != NO_FRAME))
    room = findings.room(rules.P2M_REPEATED)
    findings.more(rules.P2M_REPEATED, max(0, len(wrong) - room))
    return [(i, int(first[at[i]])) for i in wrong[:room].tolist()]


def _parts_with_pages(saved: SavedDomain) -> I64:
    """The numbers of the p2m frames, ascending, whose part of the domain has populated pages."""
    per_frame, frames = saved.p2m.entries_per_frame, len(saved.contents.p2m_frames)
    start, pages, kind = saved.contents.index.extents
    mine = IS_POPULATED[kind]
    first = (start[mine] // np.uint64(per_frame)).astype(np.int64)
    last = ((start[mine] + pages[mine].astype(np.uint64) - np.uint64(1)) // np.uint64(per_frame)).astype(np.int64)
    depth = np.zeros(frames + 1, np.int64)
    np.add.at(depth, np.minimum(first, frames), 1)
    np.add.at(depth, np.minimum(last + 1, frames), -1)
    return np.flatnonzero(np.cumsum(depth[:frames]) > 0)


def _first_of_record(saved: SavedDomain) -> int:
    record = saved.contents.p2m_record
    return 0 if record is None else record.start_pfn // (4096 // saved.contents.width)


def _extent(saved: SavedDomain, anchors: Anchors, findings: Findings) -> None:
    """The saver starts from max_pfn - 1, max_pfn being a count, and may drop identical entries at the top."""
    shared = saved.contents.shared_info
    assert shared is not None
    place = {"offset": shared.offset, "record": shared.name}
    if saved.contents.end_pfn > anchors.max_pfn - 1:
        what = f"the p2m goes to pfn {saved.contents.end_pfn:#x}, shared info's max_pfn is {anchors.max_pfn:#x}"
        findings.add(rules.P2M_EXTENT, what, **place)
    if anchors.p2m_cr3 and anchors.p2m_generation & 1:
        what = f"p2m_generation {anchors.p2m_generation:#x} is odd: the p2m was being changed"
        findings.add(rules.P2M_GENERATION, what, **place)


def _anchors(saved: SavedDomain, anchors: Anchors, findings: Findings) -> None:
    """Walk the p2m as the saver did, from the anchors that it left in shared info, and compare."""
    shared, p2m = saved.contents.shared_info, saved.p2m
    assert shared is not None
    if not len(p2m.frames):
        return
    ways = []
    if anchors.p2m_cr3:
        ways.append(("linear list", frames_by_list))
    if "tree" in anchors.form:
        ways.append(("three-level tree", frames_by_tree))
    if not ways:
        what = f"neither p2m_cr3 nor pfn_to_mfn_frame_list_list ({anchors.frame_list_list:#x}) leads to a p2m"
        findings.add(rules.P2M_ANCHOR, what, offset=shared.offset, record=shared.name)
    for name, way in ways:
        try:
            found = way(p2m, anchors)
        except GuestError as e:
            rule = rules.P2M_ANCHOR if saved.seekable or not isinstance(e, Fault) else rules.NOT_CHECKED
            findings.add(rule, f"{name}: {e}", offset=shared.offset, record=shared.name)
            continue
        differ = np.flatnonzero(found != p2m.frames)
        for i in differ[: findings.room(rules.P2M_ANCHOR)].tolist():
            by_guest = "a hole" if found[i] == NO_FRAME else f"pfn {int(found[i]):#x}"
            what = f"{name}: entry {i} is {by_guest}, the stream's p2m frame is pfn {int(p2m.frames[i]):#x}"
            findings.add(rules.P2M_ANCHOR, what, offset=shared.offset, record=shared.name, entry=i)
        findings.more(rules.P2M_ANCHOR, max(0, len(differ) - findings.room(rules.P2M_ANCHOR)))


def _pages(saved: SavedDomain, findings: Findings) -> None:
    """Each pfn that the p2m maps is in the stream, and the other way round."""
    for first, mfns in saved.p2m.content(np.union1d(saved.p2m.distinct, _parts_with_pages(saved))):
        pfns = np.arange(first, first + len(mfns), dtype=np.uint64)
        types = saved.frames.types(pfns)
        own = (mfns != NO_FRAME) & (mfns & (_FOREIGN | _IDENTITY) == 0)
        there = IS_POPULATED[types]
        _missing(findings, pfns[own & ~there & (types != PageType.BROKEN)], types, mfns, first)
        for pfn in pfns[~own & there][: findings.room(rules.PAGE_UNMAPPED)].tolist():
            what = f"pfn {pfn:#x} is in the stream, but the p2m has no frame for it ({int(mfns[pfn - first]):#x})"
            findings.add(rules.PAGE_UNMAPPED, what, pfn=pfn)
    broken = saved.contents.index.count().get(PageType.BROKEN, 0)
    if broken:
        findings.add(rules.PAGE_BROKEN, f"{broken} pages are marked BROKEN: their content was lost to a memory error")


def _missing(findings: Findings, pfns: U64, types: np.ndarray, mfns: U64, first: int) -> None:
    room = findings.room(rules.PAGE_MISSING)
    for pfn in pfns[:room].tolist():
        kind = int(types[pfn - first])
        how = "is not in the stream" if kind == ABSENT else f"is in the stream as {type_name(kind)}"
        what = f"the p2m maps pfn {pfn:#x} (to mfn {int(mfns[pfn - first]):#x} of the old host), which {how}"
        findings.add(rules.PAGE_MISSING, what, pfn=pfn)
    findings.more(rules.PAGE_MISSING, max(0, len(pfns) - room))


def _limit(saved: SavedDomain, findings: Findings, config: Config | None) -> None:
    if config is None or config.max_memkb is None:
        return
    pages = sum(n for kind, n in saved.contents.index.count().items() if IS_POPULATED[kind])
    allowed = config.max_memkb // 4 + _MAXMEM_SLACK
    if pages > allowed:
        what = f"{pages} pages are populated, the configuration's maxmem of {config.max_memkb} KiB allows {allowed}"
        findings.add(rules.MEMORY_LIMIT, what)
