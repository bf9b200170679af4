"""The p2m of a saved or running domain, in any form in which guests expose it.

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
from xenpv.memory.frame_tree import ReadFrames, UnreadableTable, walk_tree
from xenpv.memory.p2m_anchors import Anchors, P2MForm, P2MRoot
from xenpv.memory.page_tables import decode_page_tables
from xenpv.runs import FrameRuns, expand_runs, group_rows

_MARKS = FOREIGN | IDENTITY


class Leaves(NamedTuple):
    """The content of some leaves, each read once.

    It is a copy: what a running guest does to its p2m meanwhile is not seen in it.

    Attributes:
        first_place: the first place of each leaf; int64.
        place_count: the number of places that name each leaf; int64.
        mfns: its entries, uint64 of shape (n, entries in a leaf); NO_FRAME for INVALID_MFN and beyond the table's end.
    """

    first_place: I64
    place_count: I64
    mfns: U64

    @property
    def pfns(self) -> U64:
        """The pfn of each entry at the leaf's first place: uint64 of the shape of mfns."""
        entries_per_leaf = self.mfns.shape[1]
        first_pfn: U64 = self.first_place.astype(np.uint64) * np.uint64(entries_per_leaf)
        offset: U64 = np.arange(entries_per_leaf, dtype=np.uint64)
        return np.add(first_pfn[:, None], offset)


@dataclass(frozen=True)
class P2M:
    """A p2m. Entry n is in the leaf at place n // entries_per_leaf.

    Attributes:
        width: bytes of an entry.
        entries: entries of the table, one more than the last pfn.
        leaves: the frame of the leaf at each place: a pfn of a saved domain, an mfn of a running one.
        read: reads those frames.
        unreadable: tables above the leaves that could not be read.
    """

    width: Width
    entries: int
    leaves: FrameRuns
    read: ReadFrames
    unreadable: list[UnreadableTable] = field(default_factory=list)

    @property
    def entries_per_leaf(self) -> int:
        """Entries in a leaf: 512 of a 64-bit guest, 1024 of a 32-bit one."""
        return PAGE_SIZE // self.width

    @property
    def leaf_count(self) -> int:
        """Places for leaves in the whole table."""
        return -(-self.entries // self.entries_per_leaf)

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
            decode: Callable[[U8, int], U64] = decode_page_tables
        else:
            decode = partial(_frames_of_tree, width=anchors.width, to_pfns=to_pfns)
        frame_runs, unreadable = walk_tree(read, top, root.table_levels, places, decode)
        leaves = FrameRuns(frame_runs.first - root.first_place, frame_runs.count, frame_runs.frame)
        return cls(anchors.width, anchors.max_pfn, leaves, read, unreadable)

    @cached_property
    def distinct_leaves(self) -> FrameRuns:
        """Return each leaf once, ascending by its first place.

        ``count`` is the number of places that name the leaf.
        """
        if not len(self.leaves):
            return self.leaves
        by_frame = self.leaves[np.argsort(self.leaves.frame, kind="stable")]
        row, _ = group_rows(by_frame.frame[1:] != by_frame.frame[:-1], len(by_frame))
        distinct = FrameRuns(by_frame.first[row], np.add.reduceat(by_frame.count, row), by_frame.frame[row])
        return distinct[np.argsort(distinct.first)]

    @property
    def used_entries(self) -> int:
        """Count the entries up to the end of the first leaf of a repeated tail.

        The tail is one leaf that all last places name.

        Linux names one "missing" leaf up to the end of what its tables reach; libxenguest drops such a tail, too.
        """
        leaves, end = self.leaves, self.leaves.end
        if not len(leaves) or end[-1] < self.leaf_count:
            return self.entries
        breaks = (leaves.frame[:-1] != leaves.frame[1:]) | (end[:-1] != leaves.first[1:])
        tail = int(leaves.first[np.flatnonzero(breaks)[-1] + 1 if breaks.any() else 0])
        return min(self.entries, (tail + 1) * self.entries_per_leaf)

    @property
    def holes(self) -> FrameRuns:
        """The places without a leaf."""
        return self.leaves.gaps(range(self.leaf_count))

    def iter_leaves(
        self, places: I64 | None = None, *, on_unreadable: Callable[[FrameRuns], None] | None = None
    ) -> Iterator[Leaves]:
        """Iterate over the content of the table, PAGES_IN_CACHE leaves at a time.

        Args:
            places: the places of the leaves to read; None for each leaf once, at its first place.
            on_unreadable: called with leaves that cannot be read, which are left out.
        """
        leaves = self.distinct_leaves
        if places is not None:
            leaves = FrameRuns(places, np.ones(len(places), np.int64), self.leaves.frame_of(places))
            leaves = leaves[leaves.frame != NO_FRAME]
        for i in range(0, len(leaves), PAGES_IN_CACHE):
            batch = leaves[i : i + PAGES_IN_CACHE]
            pages, readable = self.read(batch.frame)
            if not readable.all():
                if on_unreadable is not None:
                    on_unreadable(batch[~readable])
                batch, pages = batch[readable], pages[readable]
            if not len(batch):
                continue
            mfns = decode_entries(pages, self.width).copy()
            beyond_end = (int(batch.first[-1]) + 1) * self.entries_per_leaf - self.entries
            if beyond_end > 0:
                mfns[-1, self.entries_per_leaf - beyond_end :] = NO_FRAME
            yield Leaves(batch.first, batch.count, mfns)

    def lookup(self, pfns: U64) -> U64:
        """Return the entry of each pfn, marks included.

        NO_FRAME stands for INVALID_MFN, a pfn beyond the table, and a leaf that is missing or cannot be read.
        """
        place, entry = (n.astype(np.int64) for n in np.divmod(pfns, np.uint64(self.entries_per_leaf)))  # pfns to 2^64
        out = np.full(len(pfns), NO_FRAME)
        # Callers mostly ask for neighbours together, so this works on groups of pfns of one leaf.
        first, count = group_rows(place[1:] != place[:-1], len(place))
        frames, leaf_of = np.unique(self.leaves.frame_of(place[first]), return_inverse=True)
        frames = frames[frames != NO_FRAME]  # the last, if it is there at all
        by_leaf = np.argsort(leaf_of, kind="stable")
        bounds = np.searchsorted(leaf_of[by_leaf], np.arange(len(frames) + 1))
        for i in range(0, len(frames), PAGES_IN_CACHE):
            batch = frames[i : i + PAGES_IN_CACHE]
            pages, readable = self.read(batch)
            groups = by_leaf[bounds[i] : bounds[i + len(batch)]]
            index, row = expand_runs(first[groups], count[groups]), np.repeat(leaf_of[groups] - i, count[groups])
            entries = decode_entries(pages, self.width)[row, entry[index]]
            out[index] = np.where(readable[row], entries, NO_FRAME)
        out[pfns >= np.uint64(self.entries)] = NO_FRAME
        return out

    def pfns_of(self, mfns: U64) -> U64:
        """Return the pfn of each mfn by searching the whole table once.

        NO_FRAME stands for an mfn that the table does not hold.

        If several entries hold an mfn, the last pfn counts.
        """
        if not mfns.size:
            return mfns
        distinct_mfns, inverse = np.unique(mfns, return_inverse=True)
        pfns = np.full(len(distinct_mfns), NO_FRAME)
        for leaves in self.iter_leaves():
            entries = leaves.mfns.reshape(-1)
            rank = np.minimum(np.searchsorted(distinct_mfns, entries), len(distinct_mfns) - 1)
            hit = np.flatnonzero(distinct_mfns[rank] == entries)
            pfns[rank[hit]] = leaves.pfns.reshape(-1)[hit]
        pfns[distinct_mfns == NO_FRAME] = NO_FRAME
        return pfns[inverse].reshape(mfns.shape)


def names_local_frame(entries: U64) -> Mask:
    """Return which entries claim a frame of the domain.

    These are neither INVALID_MFN nor marked FOREIGN or IDENTITY.

    Only the m2p tells whether the claim is right.
    """
    return np.asarray(entries & _MARKS == 0)


def decode_entries(pages: U8, width: Width) -> U64:
    """Return the entries in leaves; publish.encode_entries is the inverse.

    Args:
        pages: leaves, uint8 of shape (n, 4096).
        width: bytes of the guest's unsigned long.

    Returns:
        uint64 of shape (n, entries in a leaf), NO_FRAME for INVALID_MFN. Marks are bits 63 and 62 for both widths.
    """
    table: U64 = pages.view(f"<u{width}").reshape(-1, PAGE_SIZE // width)
    if width == 8:
        return table
    table = table.astype(np.uint64)
    marks = (table & (_MARKS >> np.uint64(32))) << np.uint64(32)
    return np.where(table == np.uint64(INVALID_MFN[4]), NO_FRAME, table & ~(_MARKS >> np.uint64(32)) | marks)


def frame_reader(memory: Frames) -> ReadFrames:
    """Return a function that reads pages by pfn and tells which could be read."""

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
    """Return the frames that tables above the leaves name.

    In such a table 0 stands for none. In a leaf 0 is frame 0.
    """
    table = decode_entries(pages, width)
    table = np.where(table == 0, NO_FRAME, table)
    return table if to_pfns is None else to_pfns(table)
