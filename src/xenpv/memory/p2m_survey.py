"""Statistics of a p2m: pfns of each kind, and the frames' places for a map."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from xenpv.frames import FOREIGN, I64, IDENTITY, NO_FRAME, U8, U64, Mask
from xenpv.memory.p2m_reader import P2M, Leaves, names_local_frame
from xenpv.runs import FrameRuns


class EntryKind(IntEnum):
    """The kind of a p2m entry."""

    LOCAL = 0  # names a frame of the domain
    INVALID = 1  # INVALID_MFN
    FOREIGN = 2  # marked as another domain's frame
    IDENTITY = 3  # marked as an identity-mapped machine frame
    HOLE = 4  # there is no leaf, or it cannot be read


@dataclass(frozen=True)
class Survey:
    """The statistics of a p2m.

    Attributes:
        pages: how many pfns there are of each kind.
        first: the first pfn of each kind that there is.
        cell_pfns: the number of pfns in a cell of the map.
        local_pages: for each cell, how many of its pfns have a frame of the domain; int64.
    """

    pages: dict[EntryKind, int]
    first: dict[EntryKind, int]
    cell_pfns: int
    local_pages: I64 = field(repr=False)


def entry_kinds(mfns: U64) -> U8:
    """Return the EntryKind of each entry, uint8 of the same shape."""
    out = np.where(mfns & FOREIGN != 0, np.uint8(EntryKind.FOREIGN), np.uint8(EntryKind.LOCAL))
    out[mfns & (FOREIGN | IDENTITY) == IDENTITY] = EntryKind.IDENTITY
    out[mfns == NO_FRAME] = EntryKind.INVALID
    return out


def survey(p2m: P2M, cells: int = 512) -> Survey:
    """Read a whole p2m, each leaf once.

    Args:
        p2m: what to read.
        cells: cells of the map, at most.
    """
    cell_pfns = -(-max(p2m.entries, 1) // cells)
    if cell_pfns > p2m.entries_per_leaf:
        cell_pfns = -(-cell_pfns // p2m.entries_per_leaf) * p2m.entries_per_leaf
    local_pages = np.zeros(-(-p2m.entries // cell_pfns), np.int64)
    pages, first = dict.fromkeys(EntryKind, 0), {}
    shared_last_leaf = _shared_last_leaf(p2m)
    first_unreadable = FrameRuns.empty()

    def on_unreadable(leaves: FrameRuns) -> None:
        nonlocal first_unreadable
        first_unreadable = first_unreadable if len(first_unreadable) else leaves

    for leaves in p2m.iter_leaves(on_unreadable=on_unreadable):
        is_local = names_local_frame(leaves.mfns)
        count = np.count_nonzero(is_local, axis=1)
        pages[EntryKind.LOCAL] += _sum_products(count, leaves.place_count)
        if count.any() and EntryKind.LOCAL not in first:
            first[EntryKind.LOCAL] = int(leaves.pfns[is_local][0])
        _add_to_cells(local_pages, cell_pfns, leaves, is_local, count)
        for leaf_row in np.flatnonzero(leaves.first_place == shared_last_leaf).tolist():
            beyond = p2m.leaf_count * p2m.entries_per_leaf - p2m.entries
            for kind in entry_kinds(leaves.mfns[leaf_row, p2m.entries_per_leaf - beyond :]).tolist():
                pages[EntryKind(kind)] -= 1
        if is_local.all():
            continue
        kinds = entry_kinds(leaves.mfns)
        inside = leaves.pfns < np.uint64(p2m.entries)
        for entry_kind in (EntryKind.INVALID, EntryKind.FOREIGN, EntryKind.IDENTITY):
            matches = (kinds == entry_kind) & inside
            pages[entry_kind] += _sum_products(np.count_nonzero(matches, axis=1), leaves.place_count)
            if matches.any():
                first.setdefault(entry_kind, int(leaves.pfns[matches][0]))
    pages[EntryKind.HOLE] = p2m.entries - sum(pages.values())
    missing = [int(runs.first[0]) for runs in (p2m.holes, first_unreadable) if len(runs)]
    if missing:
        first[EntryKind.HOLE] = min(missing) * p2m.entries_per_leaf
    return Survey(pages, first, cell_pfns, local_pages)


def _shared_last_leaf(p2m: P2M) -> int:
    """Return the first place of a shared last leaf in which the table ends.

    Return -1 if the table ends elsewhere, or if no other place names that leaf.

    Its entries beyond the table's end are then counted for each place, and must be subtracted once.
    """
    if p2m.entries % p2m.entries_per_leaf == 0:
        return -1
    leaves = p2m.distinct_leaves
    is_last = leaves.frame == p2m.leaves.frame_of(np.array([p2m.leaf_count - 1]))
    shared = leaves.first[is_last & (leaves.count > 1)].tolist()
    return int(shared[0]) if shared else -1


def _sum_products(count: I64, times: I64) -> int:
    """Return the sum of count * times, which may exceed 64 bits."""
    if int(times.max(initial=0)) < 1 << 40:
        return int((count * times).sum())
    return sum(n * t for n, t in zip(count.tolist(), times.tolist(), strict=True))


def _add_to_cells(local_pages: I64, cell_pfns: int, leaves: Leaves, is_local: Mask, count: I64) -> None:
    entries_per_leaf = is_local.shape[1]
    if cell_pfns % entries_per_leaf == 0:
        np.add.at(local_pages, leaves.first_place // (cell_pfns // entries_per_leaf), count)
    else:
        cells = (leaves.pfns[is_local] // np.uint64(cell_pfns)).astype(np.int64)
        local_pages += np.bincount(cells, minlength=len(local_pages))
