"""What a p2m holds: how many pfns of each kind, and where the frames are, for a drawn map."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from xenpv.frames import FOREIGN, I64, IDENTITY, NO_FRAME, U8, U64, Mask
from xenpv.memory.p2m import P2M, entries_in, is_own


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
    for leaves in p2m.content():
        mine = is_own(leaves.mfns)
        count = np.count_nonzero(mine, axis=1)
        pages[Kind.OWN] += int((count * leaves.times).sum())
        if count.any() and Kind.OWN not in first:
            first[Kind.OWN] = int(leaves.pfns[mine][0])
        _add_to_cells(own, cell, leaves.pfns, mine, count)
        if mine.all():
            continue
        kind = kinds(leaves.mfns)
        inside = leaves.pfns < np.uint64(p2m.entries)
        for other in (Kind.INVALID, Kind.FOREIGN, Kind.IDENTITY):
            found = (kind == other) & inside
            pages[other] += int((np.count_nonzero(found, axis=1) * leaves.times).sum())
            if found.any():
                first.setdefault(other, int(leaves.pfns[found][0]))
    for kind in kinds(_beyond_the_end(p2m)).tolist():
        pages[Kind(kind)] -= 1
    pages[Kind.HOLE] = p2m.entries - sum(pages.values())
    if len(p2m.holes):
        first[Kind.HOLE] = int(p2m.holes.first[0]) * p2m.per_leaf
    return Survey(pages, first, cell, own)


def _beyond_the_end(p2m: P2M) -> U64:
    """The entries behind the table's end that were counted: a leaf stands there that stands elsewhere, too."""
    beyond = p2m.places * p2m.per_leaf - p2m.entries
    frame = p2m.leaves.frame_of(np.array([p2m.places - 1])) if beyond else np.array([NO_FRAME])
    row = np.flatnonzero(p2m.distinct.frame == frame[0])
    if not len(row) or p2m.distinct.count[row[0]] == 1:
        return np.empty(0, np.uint64)
    pages, readable = p2m.read(frame)
    return entries_in(pages, p2m.width)[0, -beyond:] if readable[0] else np.empty(0, np.uint64)


def _add_to_cells(own: I64, cell: int, pfns: U64, mine: Mask, count: I64) -> None:
    if cell % pfns.shape[1] == 0:
        np.add.at(own, (pfns[:, 0] // np.uint64(cell)).astype(np.int64), count)
    else:
        found = (pfns[mine] // np.uint64(cell)).astype(np.int64)
        own += np.bincount(found, minlength=len(own))
