"""What a p2m holds: how many pfns of each kind, and where the frames are, for a drawn map."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from xenpv.frames import FOREIGN, I64, IDENTITY, NO_FRAME, U8, U64, Mask
from xenpv.memory.p2m import P2M, Leaves, names_local_frame
from xenpv.runs import FrameRuns


class Kind(IntEnum):
    """What a pfn's entry says."""

    OWN = 0  # claims a frame of the domain
    INVALID = 1  # INVALID_MFN
    FOREIGN = 2  # marked as a frame of somebody else's
    IDENTITY = 3  # marked as a machine frame that stands for itself
    HOLE = 4  # there is no leaf, or it cannot be read


@dataclass(frozen=True)
class Survey:
    """``pages`` of each kind, and the ``first`` pfn of it; ``cells``: how many pages of the domain's own each part of
    the p2m has, parts of ``cell`` pfns each.
    """

    pages: dict[Kind, int]
    first: dict[Kind, int]
    cell: int
    cells: I64 = field(repr=False)


def kinds(mfns: U64) -> U8:
    """The Kind of each entry, uint8 of the same shape."""
    out = np.where(mfns & FOREIGN != 0, np.uint8(Kind.FOREIGN), np.uint8(Kind.OWN))
    out[mfns & (FOREIGN | IDENTITY) == IDENTITY] = Kind.IDENTITY
    out[mfns == NO_FRAME] = Kind.INVALID
    return out


def survey(p2m: P2M, cells: int = 512) -> Survey:
    """Read the whole p2m once, each leaf once; ``cells``: into how many parts, at most, the map divides it."""
    cell = -(-max(p2m.entries, 1) // cells)
    if cell > p2m.per_leaf:
        cell = -(-cell // p2m.per_leaf) * p2m.per_leaf
    own = np.zeros(-(-p2m.entries // cell), np.int64)
    pages, first = dict.fromkeys(Kind, 0), {}
    end = _shared_at_the_end(p2m)
    unreadable = FrameRuns.from_frames(np.empty(0, np.uint64))

    def lost(leaves: FrameRuns) -> None:
        nonlocal unreadable
        unreadable = unreadable if len(unreadable) else leaves

    for leaves in p2m.content(lost=lost):
        mine = names_local_frame(leaves.mfns)
        count = np.count_nonzero(mine, axis=1)
        pages[Kind.OWN] += _times(count, leaves.times)
        if count.any() and Kind.OWN not in first:
            first[Kind.OWN] = int(leaves.pfns[mine][0])
        _add_to_cells(own, cell, leaves, mine, count)
        for at in np.flatnonzero(leaves.first == end).tolist():
            beyond = p2m.places * p2m.per_leaf - p2m.entries
            for kind in kinds(leaves.mfns[at, p2m.per_leaf - beyond :]).tolist():
                pages[Kind(kind)] -= 1
        if mine.all():
            continue
        kind_of = kinds(leaves.mfns)
        inside = leaves.pfns < np.uint64(p2m.entries)
        for other in (Kind.INVALID, Kind.FOREIGN, Kind.IDENTITY):
            found = (kind_of == other) & inside
            pages[other] += _times(np.count_nonzero(found, axis=1), leaves.times)
            if found.any():
                first.setdefault(other, int(leaves.pfns[found][0]))
    pages[Kind.HOLE] = p2m.entries - sum(pages.values())
    missing = [int(runs.first[0]) for runs in (p2m.holes, unreadable) if len(runs)]
    if missing:
        first[Kind.HOLE] = min(missing) * p2m.per_leaf
    return Survey(pages, first, cell, own)


def _shared_at_the_end(p2m: P2M) -> int:
    """The first place of the leaf at the end, -1 unless the table ends within it and it stands elsewhere, too.

    Then what lies beyond the table's end is counted with it.
    """
    if p2m.entries % p2m.per_leaf == 0:
        return -1
    last = p2m.distinct.frame == p2m.leaves.frame_of(np.array([p2m.places - 1]))
    several = p2m.distinct.first[last & (p2m.distinct.count > 1)].tolist()
    return int(several[0]) if several else -1


def _times(count: I64, times: I64) -> int:
    """The sum of count * times, which may be above 2^63."""
    if int(times.max(initial=0)) < 1 << 40:
        return int((count * times).sum())
    return sum(n * t for n, t in zip(count.tolist(), times.tolist(), strict=True))


def _add_to_cells(own: I64, cell: int, leaves: Leaves, mine: Mask, count: I64) -> None:
    per_leaf = mine.shape[1]
    if cell % per_leaf == 0:
        np.add.at(own, leaves.first // (cell // per_leaf), count)
    else:
        found = (leaves.pfns[mine] // np.uint64(cell)).astype(np.int64)
        own += np.bincount(found, minlength=len(own))
