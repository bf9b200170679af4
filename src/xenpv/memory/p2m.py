"""The p2m of a domain, saved or running, in whatever form the guest shows it.

A running domain's tables are machine frames and hold machine frames. In a save file page tables hold pfns, and the
p2m holds mfns of the host that saved; nothing but that p2m translates them back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.xen import INVALID_MFN
from xenpv.errors import Fault, GuestError
from xenpv.frames import FOREIGN, I64, IDENTITY, NO_FRAME, PAGE_SIZE, PAGES_IN_CACHE, U8, U64, Frames, Mask
from xenpv.memory.anchors import Anchors, P2MForm, P2MRoot
from xenpv.memory.pagetables import frames_of_tables
from xenpv.memory.radix import ReadFrames, UnreadableTable, walk_tree
from xenpv.runs import FrameRuns, expand_runs, group_rows

_MARKS = FOREIGN | IDENTITY


class Leaves(NamedTuple):
    """Some leaves, each read once: the first place of each, in how many it stands, and its entries.

    ``mfns``: uint64 of shape (n, entries a leaf), NO_FRAME for INVALID_MFN and for what lies beyond the table's end. A
    copy: what a running guest does to its p2m meanwhile is not seen in it.
    """

    first: I64
    times: I64
    mfns: U64

    @property
    def pfns(self) -> U64:
        """The pfn of each entry, at the leaf's first place: uint64 of the shape of mfns."""
        per_leaf = self.mfns.shape[1]
        first: U64 = self.first.astype(np.uint64) * np.uint64(per_leaf)
        within: U64 = np.arange(per_leaf, dtype=np.uint64)
        return np.add(first[:, None], within)


@dataclass(frozen=True)
class P2M:
    """A p2m: entry n stands in place n // per_leaf, and ``leaves`` says which frame that is.

    ``entries``: of the table, one more than the last pfn. Frames are whatever ``read`` reads: pfns of a saved domain,
    mfns of a running one. ``unreadable``: tables above the leaves that could not be read.
    """

    width: Width
    entries: int
    leaves: FrameRuns
    read: ReadFrames
    unreadable: list[UnreadableTable] = field(default_factory=list)

    @property
    def per_leaf(self) -> int:
        return PAGE_SIZE // self.width

    @property
    def places(self) -> int:
        """How many leaves the whole table takes, each counted as often as it stands in it."""
        return -(-self.entries // self.per_leaf)

    @classmethod
    def from_root(
        cls, anchors: Anchors, root: P2MRoot, read: ReadFrames, to_pfns: Callable[[U64], U64] | None = None
    ) -> P2M:
        """Walk the tables below a root.

        Args:
            anchors: the fields that ``root`` is one of.
            root: where to begin.
            read: reads frames, by what ``to_pfns`` returns.
            to_pfns: translates the mfns in anchors and trees, NO_FRAME for an unknown one; None if ``read`` takes mfns.

        Raises:
            GuestError: the anchors cannot be right, or do not reach as far as max_pfn.
        """
        places = anchors.leaf_places(root)
        top = root.frame
        if to_pfns is not None:
            top = int(to_pfns(np.array([top], np.uint64))[0])
            if top == int(NO_FRAME):
                raise GuestError(_unknown_root(anchors, root))
        if root.form is P2MForm.LINEAR:
            decode: Callable[[U8, int], U64] = frames_of_tables
        else:
            decode = partial(_frames_of_tree, width=anchors.width, to_pfns=to_pfns)
        found, unreadable = walk_tree(read, top, root.table_levels, places, decode)
        leaves = FrameRuns(found.first - root.first_place, found.count, found.frame)
        return cls(anchors.width, anchors.max_pfn, leaves, read, unreadable)

    @cached_property
    def distinct(self) -> FrameRuns:
        """Each leaf's frame once, ascending by place: its first place, and in how many it stands."""
        if not len(self.leaves):
            return self.leaves
        alike = self.leaves[np.argsort(self.leaves.frame, kind="stable")]
        row, _ = group_rows(alike.frame[1:] != alike.frame[:-1], len(alike))
        once = FrameRuns(alike.first[row], np.add.reduceat(alike.count, row), alike.frame[row])
        return once[np.argsort(once.first)]

    @property
    def used(self) -> int:
        """The entries without those of the leaves at the end that are all one frame, but for the first of them.

        Linux names one "missing" leaf to the end of what its tables reach; libxenguest drops such ends, too.
        """
        leaves, end = self.leaves, self.leaves.first + self.leaves.count
        if not len(leaves) or end[-1] < self.places:
            return self.entries
        breaks = (leaves.frame[:-1] != leaves.frame[1:]) | (end[:-1] != leaves.first[1:])
        first = int(leaves.first[np.flatnonzero(breaks)[-1] + 1 if breaks.any() else 0])
        return min(self.entries, (first + 1) * self.per_leaf)

    @property
    def holes(self) -> FrameRuns:
        """The places without a leaf."""
        return self.leaves.gaps(range(self.places))

    def content(
        self, places: I64 | None = None, *, lost: Callable[[FrameRuns], None] | None = None
    ) -> Iterator[Leaves]:
        """The table piece by piece: each leaf once, at its first place; or the leaves at ``places``.

        Leaves that cannot be read are left out; ``lost`` is told of them.
        """
        which = self.distinct
        if places is not None:
            which = FrameRuns(places, np.ones(len(places), np.int64), self.leaves.frame_of(places))
            which = which[which.frame != NO_FRAME]
        for i in range(0, len(which), PAGES_IN_CACHE):
            some = which[i : i + PAGES_IN_CACHE]
            pages, readable = self.read(some.frame)
            if not readable.all():
                if lost is not None:
                    lost(some[~readable])
                some, pages = some[readable], pages[readable]
            if not len(some):
                continue
            mfns = decode_entries(pages, self.width).copy()
            beyond = (int(some.first[-1]) + 1) * self.per_leaf - self.entries
            if beyond > 0:
                mfns[-1, self.per_leaf - beyond :] = NO_FRAME
            yield Leaves(some.first, some.count, mfns)

    def lookup(self, pfns: U64) -> U64:
        """The entry of each pfn as it stands there.

        NO_FRAME for INVALID_MFN, for a pfn beyond the table, and where there is no leaf or it cannot be read.
        """
        place, at = (n.astype(np.int64) for n in np.divmod(pfns, np.uint64(self.per_leaf)))  # a pfn may be above 2^63
        out = np.full(len(pfns), NO_FRAME)
        # Neighbours are mostly asked for together: what follows is done for runs of pfns of one leaf.
        first, count = group_rows(place[1:] != place[:-1], len(place))
        wanted, back = np.unique(self.leaves.frame_of(place[first]), return_inverse=True)
        wanted = wanted[wanted != NO_FRAME]  # the last, if it is there at all
        order = np.argsort(back, kind="stable")
        bounds = np.searchsorted(back[order], np.arange(len(wanted) + 1))
        for i in range(0, len(wanted), PAGES_IN_CACHE):
            some = wanted[i : i + PAGES_IN_CACHE]
            pages, readable = self.read(some)
            runs = order[bounds[i] : bounds[i + len(some)]]
            mine, row = expand_runs(first[runs], count[runs]), np.repeat(back[runs] - i, count[runs])
            found = decode_entries(pages, self.width)[row, at[mine]]
            out[mine] = np.where(readable[row], found, NO_FRAME)
        out[pfns >= np.uint64(self.entries)] = NO_FRAME
        return out

    def pfns_of(self, mfns: U64) -> U64:
        """The pfn of each mfn by searching the table, NO_FRAME for one that it does not hold. One pass for all.

        Of an mfn that stands in the table more than once, the last pfn.
        """
        if not mfns.size:
            return mfns
        wanted, back = np.unique(mfns, return_inverse=True)
        found = np.full(len(wanted), NO_FRAME)
        for leaves in self.content():
            row = leaves.mfns.reshape(-1)
            at = np.minimum(np.searchsorted(wanted, row), len(wanted) - 1)
            hit = np.flatnonzero(wanted[at] == row)
            found[at[hit]] = leaves.pfns.reshape(-1)[hit]
        found[wanted == NO_FRAME] = NO_FRAME
        return found[back].reshape(mfns.shape)


def names_local_frame(mfns: U64) -> Mask:
    """Entries that claim a frame.

    Neither INVALID_MFN nor marked FOREIGN or IDENTITY. Whether they are right, m2p says.
    """
    return np.asarray(mfns & _MARKS == 0)


def decode_entries(pages: U8, width: Width) -> U64:
    """Leaves of a guest of that width, uint8 (n, 4096), as entries, uint64 (n, entries).

    NO_FRAME for INVALID_MFN; the marks of a 32-bit guest's entries are where those of a 64-bit guest are.
    """
    table: U64 = pages.view(f"<u{width}").reshape(-1, PAGE_SIZE // width)
    if width == 8:
        return table
    table = table.astype(np.uint64)
    marks = (table & (_MARKS >> np.uint64(32))) << np.uint64(32)
    return np.where(table == np.uint64(INVALID_MFN[4]), NO_FRAME, table & ~(_MARKS >> np.uint64(32)) | marks)


def frame_reader(memory: Frames) -> ReadFrames:
    """Read a domain's memory by pfn."""

    def read(pfns: U64) -> tuple[U8, Mask]:
        try:
            return memory.pages(pfns), np.ones(len(pfns), np.bool_)
        except Fault:
            pages, readable = np.zeros((len(pfns), PAGE_SIZE), np.uint8), np.zeros(len(pfns), np.bool_)
        for i in range(len(pfns)):
            try:
                pages[i] = memory.pages(pfns[i : i + 1])[0]
            except Fault:
                continue
            readable[i] = True
        return pages, readable

    return read


def _unknown_root(anchors: Anchors, root: P2MRoot) -> str:
    if root.form is P2MForm.LINEAR:
        return f"Bad p2m_cr3 value {anchors.p2m_cr3:#x}: no pfn has mfn {root.frame:#x}"
    return f"Bad mfn {root.frame:#x} for p2m frame list list: no pfn has it"


def _frames_of_tree(pages: U8, _level: int, width: Width, to_pfns: Callable[[U64], U64] | None) -> U64:
    """The frames that tables above the leaves name: there 0 is none, in a leaf it is frame 0."""
    table = decode_entries(pages, width)
    table = np.where(table == 0, NO_FRAME, table)
    return table if to_pfns is None else to_pfns(table)
