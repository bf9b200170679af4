"""Checks of a saved PV domain's p2m: its frames, its extent, the guest's own anchors, and the pages that it maps."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from xenpv.errors import GuestError
from xenpv.findings import Findings, Rule
from xenpv.frames import ABSENT, HAS_DATA, I64, IS_POPULATED, NO_FRAME, U64, PageType, type_name
from xenpv.host.xenstore_nodes import SLACK
from xenpv.memory.anchors import Anchors, P2MRoot
from xenpv.memory.p2m import P2M, names_local_frame
from xenpv.runs import FrameRuns, expand_runs
from xenpv.source.config import Config
from xenpv.source.saved import SavedDomain
from xenpv.stream.records import X86PVP2MFrames
from xenpv.verify import rules

_NO_PLACES = np.empty(0, np.int64)


def check_p2m(saved: SavedDomain, findings: Findings, config: Config | None) -> None:
    """Everything that is wrong with the p2m and with which pages there are."""
    doubtful = _frames(saved, findings)
    if saved.anchors is not None:
        _extent(saved, saved.anchors, findings)
        doubtful = np.union1d(doubtful, _anchors(saved, saved.anchors, findings))
    _pages(saved, findings, doubtful)
    _limit(saved, findings, config)


def _frames(saved: SavedDomain, findings: Findings) -> I64:
    """What update_guest_p2m() demands of every frame, and that no frame is there twice; gives the places that fail."""
    record, p2m = saved.contents.p2m_record, saved.p2m
    if record is None:
        return _NO_PLACES
    if isinstance(record, X86PVP2MFrames) and record.start_pfn % p2m.per_leaf:
        what = f"start pfn {record.start_pfn:#x} is within a p2m frame"
        findings.add(rules.P2M_START, what, offset=record.offset, record=record.name)
    holes = _places(saved, p2m.holes)
    findings.add_each(rules.P2M_FRAME, holes, lambda i: (f"p2m_frame_list[{i}] was never sent", _place(saved, i)))
    leaves = p2m.leaves
    types = saved.frames.types(leaves.frame)
    beyond = leaves.frame > np.uint64(saved.contents.end_pfn)
    wrong = beyond | (types != PageType.NOTAB)
    if not saved.pages_complete:
        wrong &= types != ABSENT

    def describe_bad(at: np.int64) -> tuple[str, dict[str, Any]]:
        i, row = int(at), int(np.searchsorted(leaves.first, at, "right")) - 1
        pfn = int(leaves.frame[row])
        if beyond[row]:
            end = saved.contents.end_pfn
            return f"pfn ({pfn:#x}) for p2m_frame_list[{i}] out of range (last pfn {end:#x})", _place(saved, i)
        if IS_POPULATED[types[row]]:
            return f"pfn ({pfn:#x}) for p2m_frame_list[{i}] has bad type {type_name(int(types[row]))}", _place(saved, i)
        return f"p2m_frame_list[{i}] (pfn {pfn:#x}) has bad mfn: the stream has no such page", _place(saved, i)

    def describe_again(two: tuple[np.int64, np.int64]) -> tuple[str, dict[str, Any]]:
        i, other = int(two[0]), int(two[1])
        pfn = int(leaves.frame_of(np.array([i]))[0])
        what = f"p2m_frame_list[{i}] and [{other}] are both pfn {pfn:#x}, and hold pages of the domain"
        return what, _place(saved, i)

    bad = _places(saved, leaves[wrong])
    findings.add_each(rules.P2M_FRAME, bad, describe_bad)
    again, first_place = _shared(saved)
    findings.add_each(rules.P2M_REPEATED, np.column_stack([again, first_place]), describe_again)
    return np.union1d(np.union1d(holes, bad), again)


def _places(saved: SavedDomain, runs: FrameRuns) -> I64:
    """The places of some runs of the p2m: all that X86_PV_P2M_FRAMES named, one by one; else the first of each run."""
    each = isinstance(saved.contents.p2m_record, X86PVP2MFrames)
    return expand_runs(runs.first, runs.count) if each else runs.first


def _place(saved: SavedDomain, i: np.int64 | int) -> dict[str, Any]:
    """Where in the last record a place of the p2m is named."""
    record = saved.contents.p2m_record
    assert record is not None
    offset = None
    if isinstance(record, X86PVP2MFrames):
        at = int(i) - record.start_pfn // saved.p2m.per_leaf
        offset = record.offset + 16 + at * 8 if 0 <= at < len(record.p2m_pfns) else None
    pfn = int(saved.p2m.leaves.frame_of(np.array([i]))[0])
    return {"offset": offset, "record": record.name, "pfn": pfn, "entry": int(i)}


def _shared(saved: SavedDomain) -> tuple[I64, I64]:
    """Places of the p2m that have pages and yet share their frame, and for each another place of that frame.

    Kernels share one frame among the parts where nothing is, and that does no harm: the restorer writes the same
    nothing there again and again. Only where a part with pages shares its frame will one overwrite the other. Of
    several such parts with one frame the first is not named.
    """
    leaves, shared = saved.p2m.leaves, saved.p2m.distinct
    shared = shared[shared.count > 1]
    if not len(shared):
        return _NO_PLACES, _NO_PLACES
    shared = shared[np.argsort(shared.frame)]
    last = np.zeros(len(shared), np.int64)
    row = np.minimum(np.searchsorted(shared.frame, leaves.frame), len(shared) - 1)
    mine = shared.frame[row] == leaves.frame
    last[row[mine]] = (leaves.first + leaves.count - 1)[mine]
    parts = _parts_with_pages(saved)
    frames = leaves.frame_of(parts)
    at = np.minimum(np.searchsorted(shared.frame, frames), len(shared) - 1)
    parts, at = parts[shared.frame[at] == frames], at[shared.frame[at] == frames]
    _, first_part, sharing = np.unique(at, return_index=True, return_counts=True)
    of = np.delete(at, first_part[sharing > 1])
    wrong = np.delete(parts, first_part[sharing > 1])
    other = shared.first[of]
    return wrong, np.where(other == wrong, last[of], other)


def _parts_with_pages(saved: SavedDomain) -> I64:
    """The numbers of the p2m frames, ascending, whose part of the domain has populated pages."""
    per_frame, frames = np.uint64(saved.p2m.per_leaf), saved.p2m.places
    extents = saved.contents.index.extents
    populated = extents[IS_POPULATED[extents.type]]
    first = (populated.first // per_frame).astype(np.int64)
    last = ((populated.end - np.uint64(1)) // per_frame).astype(np.int64)
    first, last = first[first < frames], np.minimum(last[first < frames], frames - 1)
    # Extents ascend, and one may begin in the part that the one before it ends in.
    first = np.maximum(first, np.append(-1, np.maximum.accumulate(last))[: len(first)] + 1)
    return expand_runs(first, np.maximum(last - first + 1, 0))


def _extent(saved: SavedDomain, anchors: Anchors, findings: Findings) -> None:
    """The saver starts from max_pfn - 1, max_pfn being a count, and may drop identical entries at the top."""
    shared = saved.contents.shared_info
    assert shared is not None
    place = {"offset": shared.offset, "record": shared.name}
    if saved.contents.end_pfn > anchors.max_pfn - 1:
        what = f"the p2m goes to pfn {saved.contents.end_pfn:#x}, shared info's max_pfn is {anchors.max_pfn:#x}"
        findings.add(rules.P2M_EXTENT, what, **place)
    elif saved.contents.end_pfn < anchors.max_pfn - 1 and (saved.contents.end_pfn + 1) % saved.p2m.per_leaf:
        what = f"the p2m ends within a frame, at pfn {saved.contents.end_pfn:#x}, shared info's max_pfn is "
        findings.add(rules.P2M_EXTENT, what + f"{anchors.max_pfn:#x}", **place)
    if anchors.p2m_cr3 and anchors.p2m_generation & 1:
        what = f"p2m_generation {anchors.p2m_generation:#x} is odd: the p2m was being changed"
        findings.add(rules.P2M_GENERATION, what, **place)


def _anchors(saved: SavedDomain, anchors: Anchors, findings: Findings) -> I64:
    """Walk the p2m as the saver did, from the anchors that it left in shared info; gives the places that differ."""
    shared, p2m = saved.contents.shared_info, saved.p2m
    assert shared is not None
    if not len(p2m.leaves):
        return _NO_PLACES
    doubtful = _NO_PLACES
    place = {"offset": shared.offset, "record": shared.name}
    header = saved.contents.domain
    # Savers of the legacy format cleared it, and no restorer wants it: the guest writes it again when it resumes.
    cleared = header is not None and header.xen_major == 0 and anchors.frame_list_list == 0
    if not anchors.roots and not cleared:
        what = f"neither p2m_cr3 nor pfn_to_mfn_frame_list_list ({anchors.frame_list_list:#x}) leads to a p2m"
        findings.add(rules.P2M_ANCHOR, what, **place)
    reach = replace(anchors, max_pfn=p2m.entries)
    for root in anchors.roots:
        try:
            walked = P2M.from_root(reach, root, p2m.read, p2m.pfns_of)
        except GuestError as e:
            findings.add(rules.P2M_ANCHOR, f"{root.name}: {e}", **place)
            continue
        if walked.unreadable and not saved.source.seekable:
            lost = walked.unreadable[0]
            what = f"{root.name}: its table at pfn {lost.frame:#x} had gone by before it was known to be one"
            findings.add(rules.NOT_CHECKED, what, **place)
            continue
        found, named = walked.leaves, p2m.leaves
        only_named = named.difference(found)
        only_named = only_named[found.frame_of(only_named.first) == NO_FRAME]
        differ = np.append(_places(saved, found.difference(named)), _places(saved, only_named))

        def describe(
            at: np.int64, root: P2MRoot = root, found: FrameRuns = found, named: FrameRuns = named
        ) -> tuple[str, dict[str, Any]]:
            one = np.array([at])
            guests, ours = int(found.frame_of(one)[0]), int(named.frame_of(one)[0])
            by_guest = "a hole" if guests == int(NO_FRAME) else f"pfn {guests:#x}"
            what = f"{root.name}: entry {at} is {by_guest}, the stream's p2m frame is pfn {ours:#x}"
            return what, {**place, "entry": int(at)}

        findings.add_each(rules.P2M_ANCHOR, np.sort(differ), describe)
        if len(differ) * 2 < len(_places(saved, named)):  # else it is the anchor that is to be doubted
            doubtful = np.union1d(doubtful, differ)
    return doubtful


def _pages(saved: SavedDomain, findings: Findings, doubtful: I64) -> None:
    """Each pfn that the p2m maps is in the stream, and the other way round.

    What stands in ``doubtful`` places of the p2m is not the p2m's, perhaps, and would give a finding for each entry.
    """
    places = np.union1d(saved.p2m.distinct.first, _parts_with_pages(saved))
    places = np.setdiff1d(places, doubtful, assume_unique=True)
    frames = saved.p2m.leaves.frame_of(places)
    gone = ~saved.frames.kept(frames) & HAS_DATA[saved.frames.types(frames)]
    if not saved.source.seekable and saved.pages_complete and np.any(gone):
        what = "frames of the p2m had gone by before a record named them: what they map was not compared"
        findings.add(rules.NOT_CHECKED, what, offset=saved.contents.p2m_record and saved.contents.p2m_record.offset)
    for leaves in saved.p2m.content(places):
        pfns, mfns = leaves.pfns, leaves.mfns
        types = saved.frames.types(pfns)
        own = names_local_frame(mfns)
        there = IS_POPULATED[types]
        missing = own & ~there & (types != PageType.BROKEN)
        for rule, wrong in (
            (rules.PAGE_MISSING, missing if saved.pages_complete else np.zeros_like(missing)),
            (rules.PAGE_UNMAPPED, ~own & there),
        ):
            found = np.column_stack([pfns[wrong], mfns[wrong], types[wrong].astype(np.uint64)])
            findings.add_each(rule, found, partial(_describe_entry, saved, rule))
    for pfn, offset in saved.contents.index.duplicates:
        what = f"pfn {pfn:#x} is in the same PAGE_DATA record twice"
        findings.add(rules.PAGE_REPEATED, what, offset=offset, record="PAGE_DATA", pfn=pfn)
    broken = saved.contents.index.count().get(PageType.BROKEN, 0)
    if broken:
        what = f"{broken} pages are marked BROKEN: their content was lost to a memory error"
        pfn = int(saved.contents.index.pfns(np.arange(256) == PageType.BROKEN)[0])
        findings.add(rules.PAGE_BROKEN, what, pfn=pfn)


def _describe_entry(saved: SavedDomain, rule: Rule, entry: U64) -> tuple[str, dict[str, Any]]:
    pfn, mfn, kind = (int(n) for n in entry)
    place = {"offset": _offset_of_entry(saved, pfn), "pfn": pfn}
    if rule is rules.PAGE_UNMAPPED:
        return f"pfn {pfn:#x} is in the stream, but the p2m has no frame for it ({mfn:#x})", place
    how = "is not in the stream" if kind == ABSENT else f"is in the stream as {type_name(kind)}"
    return f"the p2m maps pfn {pfn:#x} (to mfn {mfn:#x} of the old host), which {how}", place


def _offset_of_entry(saved: SavedDomain, pfn: int) -> int | None:
    """The byte offset of a pfn's p2m entry."""
    place, entry = divmod(pfn, saved.p2m.per_leaf)
    frame = int(saved.contents.index.offsets(saved.p2m.leaves.frame_of(np.array([place])))[0])
    return frame + entry * saved.contents.width if frame >= 0 else None


def _limit(saved: SavedDomain, findings: Findings, config: Config | None) -> None:
    if config is None or config.max_memkb is None:
        return
    pages = sum(n for kind, n in saved.contents.index.count().items() if IS_POPULATED[kind])
    allowed = config.max_memkb // 4 + SLACK
    if pages > allowed:
        what = f"{pages} pages are populated, the configuration's maxmem of {config.max_memkb} KiB allows {allowed}"
        findings.add(rules.MEMORY_LIMIT, what)
