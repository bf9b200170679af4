"""Checks a saved PV domain's p2m.

It checks its leaves, its end, the guest's own anchors, and the pages that it maps.

A *place* is the index of a leaf in the p2m: place n has the entries from pfn ``n * per_leaf`` on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from xenpv.errors import GuestError
from xenpv.findings import Findings, Rule
from xenpv.frames import ABSENT, HAS_DATA, I64, IS_POPULATED, NO_FRAME, U64, PageType, type_name
from xenpv.host.xenstore_nodes import MAX_MEM_SLACK
from xenpv.memory.p2m_anchors import Anchors
from xenpv.memory.p2m_reader import P2M, names_local_frame
from xenpv.runs import FrameRuns, expand_runs
from xenpv.source.config import Config
from xenpv.source.saved import SavedDomain
from xenpv.stream.records import X86PVP2MFrames
from xenpv.verify import rules

_NO_PLACES = np.empty(0, np.int64)


def check_p2m(saved: SavedDomain, findings: Findings, config: Config | None) -> None:
    """Check the p2m of a domain, and that it maps exactly the stream's pages."""
    suspect = _check_leaves(saved, findings)
    if saved.anchors is not None:
        _check_end(saved, saved.anchors, findings)
        suspect = np.union1d(suspect, _check_anchors(saved, saved.anchors, findings))
    _check_mapped_pages(saved, findings, suspect)
    _check_pages(saved, findings)
    _check_memory_limit(saved, findings, config)


# --- leaves ----------------------------------------------------------------------------------------------------------


def _check_leaves(saved: SavedDomain, findings: Findings) -> I64:
    """Check each leaf as update_guest_p2m() does; return the bad places.

    Also check that no two populated places share a leaf.
    """
    record, p2m = saved.contents.p2m_record, saved.p2m
    if record is None:
        return _NO_PLACES
    if isinstance(record, X86PVP2MFrames) and record.start_pfn % p2m.entries_per_leaf:
        message = f"start pfn {record.start_pfn:#x} is not the first of a leaf"
        findings.add(rules.P2M_START, message, offset=record.offset, record=record.name)
    holes = _places_to_report(saved, p2m.holes)

    def describe_hole(place: np.int64) -> tuple[str, dict[str, Any]]:
        return f"p2m_frame_list[{place}] was never sent", _locate(saved, int(place))

    findings.add_each(rules.P2M_FRAME, holes, describe_hole)
    leaves = p2m.leaves
    types = saved.frames.types(leaves.frame)
    bad = (leaves.frame > np.uint64(saved.contents.end_pfn)) | (types != PageType.NOTAB)
    if not saved.pages_complete:
        bad &= types != ABSENT
    bad_places = _places_to_report(saved, leaves[bad])
    findings.add_each(rules.P2M_FRAME, bad_places, partial(_describe_bad_leaf, saved))
    shared, other_places = _populated_places_with_shared_leaf(saved)
    pairs = np.column_stack([shared, other_places])
    findings.add_each(rules.P2M_REPEATED, pairs, partial(_describe_shared_leaf, saved))
    return np.union1d(np.union1d(holes, bad_places), shared)


def _describe_bad_leaf(saved: SavedDomain, index: np.int64) -> tuple[str, dict[str, Any]]:
    """Describe a leaf that update_guest_p2m() refuses, in its words."""
    place, pfn = int(index), _leaf_at(saved, int(index))
    page_type = int(saved.frames.types(np.array([pfn], np.uint64))[0])
    end = saved.contents.end_pfn
    if pfn > end:
        message = f"pfn ({pfn:#x}) for p2m_frame_list[{place}] out of range (last pfn {end:#x})"
    elif IS_POPULATED[page_type]:
        message = f"pfn ({pfn:#x}) for p2m_frame_list[{place}] has bad type {type_name(page_type)}"
    else:
        message = f"p2m_frame_list[{place}] (pfn {pfn:#x}) has bad mfn: the stream has no such page"
    return message, _locate(saved, place)


def _describe_shared_leaf(saved: SavedDomain, pair: I64) -> tuple[str, dict[str, Any]]:
    place, other = int(pair[0]), int(pair[1])
    pfn = _leaf_at(saved, place)
    message = f"p2m_frame_list[{place}] and [{other}] are both pfn {pfn:#x}, and hold pages of the domain"
    return message, _locate(saved, place)


def _leaf_at(saved: SavedDomain, place: int) -> int:
    """Return the pfn of the leaf at a place."""
    return int(saved.p2m.leaves.frame_of(np.array([place]))[0])


def _places_to_report(saved: SavedDomain, runs: FrameRuns) -> I64:
    """Return the places that get a finding.

    These are all places if the record lists each frame, otherwise the first of each run.
    """
    lists_each_place = isinstance(saved.contents.p2m_record, X86PVP2MFrames)
    return runs.places if lists_each_place else runs.first


def _locate(saved: SavedDomain, place: int) -> dict[str, Any]:
    """Return the fields of a finding that locate a place of the p2m."""
    record = saved.contents.p2m_record
    assert record is not None
    offset = None
    if isinstance(record, X86PVP2MFrames):
        row = place - record.start_pfn // saved.p2m.entries_per_leaf
        offset = record.offset + 16 + row * 8 if 0 <= row < len(record.p2m_pfns) else None
    return {"offset": offset, "record": record.name, "pfn": _leaf_at(saved, place), "entry": place}


def _populated_places_with_shared_leaf(saved: SavedDomain) -> tuple[I64, I64]:
    """Return populated places that share their leaf, each with another such place.

    Kernels share one leaf among all places without pages. This is harmless: the restorer writes the same content each
    time. A populated place must not share its leaf, since the other place's content would overwrite it. Of several
    populated places with one leaf the first is left out.
    """
    leaves, shared = saved.p2m.leaves, saved.p2m.distinct_leaves
    shared = shared[shared.count > 1]
    if not len(shared):
        return _NO_PLACES, _NO_PLACES
    shared = shared[np.argsort(shared.frame)]
    row = np.minimum(np.searchsorted(shared.frame, leaves.frame), len(shared) - 1)
    is_shared = shared.frame[row] == leaves.frame
    last_place = np.zeros(len(shared), np.int64)
    last_place[row[is_shared]] = (leaves.end - 1)[is_shared]
    places = _populated_places(saved)
    frames = leaves.frame_of(places)
    row = np.minimum(np.searchsorted(shared.frame, frames), len(shared) - 1)
    is_shared = shared.frame[row] == frames
    places, row = places[is_shared], row[is_shared]
    _, first, users = np.unique(row, return_index=True, return_counts=True)
    places, row = np.delete(places, first[users > 1]), np.delete(row, first[users > 1])
    first_place = shared.first[row]
    return places, np.where(first_place == places, last_place[row], first_place)


def _populated_places(saved: SavedDomain) -> I64:
    """Return the places, ascending, that have entries of populated pages."""
    per_leaf, places = np.uint64(saved.p2m.entries_per_leaf), saved.p2m.leaf_count
    extents = saved.contents.index.extents
    populated = extents[IS_POPULATED[extents.type]]
    first = (populated.first // per_leaf).astype(np.int64)
    last = ((populated.end - np.uint64(1)) // per_leaf).astype(np.int64)
    first, last = first[first < places], np.minimum(last[first < places], places - 1)
    # Extents ascend, and one may begin at the place where the one before it ends.
    first = np.maximum(first, np.append(-1, np.maximum.accumulate(last))[: len(first)] + 1)
    return expand_runs(first, np.maximum(last - first + 1, 0))


# --- anchors ---------------------------------------------------------------------------------------------------------


def _check_end(saved: SavedDomain, anchors: Anchors, findings: Findings) -> None:
    """Check the end of the p2m against max_pfn, which is a count.

    Savers may drop identical leaves at the end.
    """
    shared_info = saved.contents.shared_info
    assert shared_info is not None
    place = {"offset": shared_info.offset, "record": shared_info.name}
    end_pfn, max_pfn = saved.contents.end_pfn, anchors.max_pfn
    if end_pfn > max_pfn - 1:
        message = f"the p2m ends at pfn {end_pfn:#x}, and shared info's max_pfn is {max_pfn:#x}"
        findings.add(rules.P2M_EXTENT, message, **place)
    elif end_pfn < max_pfn - 1 and (end_pfn + 1) % saved.p2m.entries_per_leaf:
        message = f"the p2m ends within a leaf, at pfn {end_pfn:#x}, and shared info's max_pfn is {max_pfn:#x}"
        findings.add(rules.P2M_EXTENT, message, **place)
    if anchors.p2m_cr3 and anchors.p2m_generation & 1:
        message = f"p2m_generation {anchors.p2m_generation:#x} is odd: the p2m was being changed"
        findings.add(rules.P2M_GENERATION, message, **place)


def _check_anchors(saved: SavedDomain, anchors: Anchors, findings: Findings) -> I64:
    """Walk the p2m from the anchors in shared info; return places that differ."""
    shared_info, p2m = saved.contents.shared_info, saved.p2m
    assert shared_info is not None
    if not len(p2m.leaves):
        return _NO_PLACES
    suspect = _NO_PLACES
    place = {"offset": shared_info.offset, "record": shared_info.name}
    header = saved.contents.domain
    # Savers of the legacy format cleared the tree's anchor. No restorer reads it: the guest sets it when it resumes.
    cleared = header is not None and header.xen_major == 0 and anchors.frame_list_list == 0
    if not anchors.roots and not cleared:
        message = f"neither p2m_cr3 nor pfn_to_mfn_frame_list_list ({anchors.frame_list_list:#x}) leads to a p2m"
        findings.add(rules.P2M_ANCHOR, message, **place)
    for root in anchors.roots:
        try:
            walked = P2M.from_root(replace(anchors, max_pfn=p2m.entries), root, p2m.read, p2m.pfns_of)
        except GuestError as e:
            findings.add(rules.P2M_ANCHOR, f"{root.name}: {e}", **place)
            continue
        if walked.unreadable and not saved.source.seekable:
            pfn = walked.unreadable[0].frame
            message = f"{root.name}: the pipe had passed pfn {pfn:#x} before it proved to be a table of the p2m"
            findings.add(rules.NOT_CHECKED, message, **place)
            continue
        only_sent = p2m.leaves.difference(walked.leaves)
        only_sent = only_sent[walked.leaves.frame_of(only_sent.first) == NO_FRAME]
        changed = walked.leaves.difference(p2m.leaves)
        differing = np.sort(np.append(_places_to_report(saved, changed), _places_to_report(saved, only_sent)))
        findings.add_each(rules.P2M_ANCHOR, differing, partial(_describe_differing_leaf, root.name, walked, p2m, place))
        if len(differing) * 2 < len(_places_to_report(saved, p2m.leaves)):  # otherwise the anchor is wrong
            suspect = np.union1d(suspect, differing)
    return suspect


def _describe_differing_leaf(
    root: str, walked: P2M, sent: P2M, place: Mapping[str, Any], index: np.int64
) -> tuple[str, dict[str, Any]]:
    """Describe a leaf that the guest's own p2m names otherwise than the stream."""
    guest_pfn, sent_pfn = (int(p2m.leaves.frame_of(np.array([index]))[0]) for p2m in (walked, sent))
    guest = "a hole" if guest_pfn == int(NO_FRAME) else f"pfn {guest_pfn:#x}"
    message = f"{root}: entry {index} is {guest}, the stream's p2m frame is pfn {sent_pfn:#x}"
    return message, {**place, "entry": int(index)}


# --- pages -----------------------------------------------------------------------------------------------------------


def _check_mapped_pages(saved: SavedDomain, findings: Findings, suspect: I64) -> None:
    """Check that the p2m maps exactly the pages of the stream.

    Args:
        saved: The domain.
        findings: Gets the findings.
        suspect: Places to skip: their leaf is perhaps none, and would give a finding for each entry.
    """
    places = np.union1d(saved.p2m.distinct_leaves.first, _populated_places(saved))
    places = np.setdiff1d(places, suspect, assume_unique=True)
    leaves = saved.p2m.leaves.frame_of(places)
    if not saved.source.seekable and saved.pages_complete:
        without_content = ~saved.has_content(leaves) & HAS_DATA[saved.frames.types(leaves)]
        if np.any(without_content):
            message = "the pipe had passed leaves of the p2m before a record named them: their entries are not checked"
            offset = saved.contents.p2m_record and saved.contents.p2m_record.offset
            findings.add(rules.NOT_CHECKED, message, offset=offset)
    for batch in saved.p2m.iter_leaves(places):
        pfns, mfns = batch.pfns, batch.mfns
        types = saved.frames.types(pfns)
        mapped, populated = names_local_frame(mfns), IS_POPULATED[types]
        missing = mapped & ~populated & (types != PageType.BROKEN)
        for rule, bad in (
            (rules.PAGE_MISSING, missing if saved.pages_complete else np.zeros_like(missing)),
            (rules.PAGE_UNMAPPED, ~mapped & populated),
        ):
            entries = np.column_stack([pfns[bad], mfns[bad], types[bad].astype(np.uint64)])
            findings.add_each(rule, entries, partial(_describe_entry, saved, rule))


def _describe_entry(saved: SavedDomain, rule: Rule, entry: U64) -> tuple[str, dict[str, Any]]:
    """Describe an entry of the p2m that does not fit the pages of the stream.

    ``entry`` is pfn, mfn and page type.
    """
    pfn, mfn, page_type = (int(n) for n in entry)
    place = {"offset": _entry_offset(saved, pfn), "pfn": pfn}
    if rule is rules.PAGE_UNMAPPED:
        return f"pfn {pfn:#x} is in the stream, but the p2m has no frame for it ({mfn:#x})", place
    problem = "is not in the stream" if page_type == ABSENT else f"is in the stream as {type_name(page_type)}"
    return f"the p2m maps pfn {pfn:#x} (to mfn {mfn:#x} of the old host), which {problem}", place


def _entry_offset(saved: SavedDomain, pfn: int) -> int | None:
    """Return the file offset of a pfn's p2m entry, None if its leaf is not there."""
    place, entry = divmod(pfn, saved.p2m.entries_per_leaf)
    page = int(saved.contents.index.offsets(saved.p2m.leaves.frame_of(np.array([place])))[0])
    return page + entry * saved.contents.width if page >= 0 else None


def _check_pages(saved: SavedDomain, findings: Findings) -> None:
    """Report pfns that one record names twice, and pages that are marked BROKEN."""
    index = saved.contents.index
    for pfn, offset in index.duplicates:
        message = f"pfn {pfn:#x} is in the same PAGE_DATA record twice"
        findings.add(rules.PAGE_REPEATED, message, offset=offset, record="PAGE_DATA", pfn=pfn)
    broken = index.count().get(PageType.BROKEN, 0)
    if broken:
        message = f"{broken} pages are marked BROKEN: their content was lost to a memory error"
        findings.add(rules.PAGE_BROKEN, message, pfn=int(index.pfns(np.arange(256) == PageType.BROKEN)[0]))


def _check_memory_limit(saved: SavedDomain, findings: Findings, config: Config | None) -> None:
    """Check that the configuration allows as many pages as are populated."""
    kib = None if config is None else config.populated_memkb
    if kib is None:
        return
    pages = sum(n for page_type, n in saved.contents.index.count().items() if IS_POPULATED[page_type])
    allowed = kib // 4 + MAX_MEM_SLACK
    if pages > allowed:
        message = f"{pages} pages are populated; the configuration gives it {kib} KiB, which allows {allowed}"
        findings.add(rules.MEMORY_LIMIT, message)
