"""The p2m of a running domain, in whatever form the guest shows it, and whether Xen's m2p agrees.

Everything here is mfns of the host that runs the domain; who can read them is handed in (radix.Read).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import LEVELS, PTE_P
from xenpv.abi.xen import INVALID_MFN, SHARED_INFO
from xenpv.errors import GuestError
from xenpv.frames import I64, NO_FRAME, PAGE_SHIFT, PAGE_SIZE, U8, U64
from xenpv.memory.p2m import Anchors, mfns_in
from xenpv.memory.pagetables import as_entries, cr3_frame, frames
from xenpv.memory.radix import Read, Runs, Unreadable, walk

MARK = 1 << 61  # of the marked tree (proposed in 2014, never merged)
DEPTHS = range(2, 9)  # levels that a rooted tree may have (docs/abi-p2m-root.md)
FOREIGN = np.uint64(1 << 63)
IDENTITY = np.uint64(1 << 62)
_LEAVES_AT_ONCE = 1024
_PLACES = 1 << 36  # pages of a 48-bit address space


@dataclass(frozen=True, slots=True)
class Way:
    """One way to the p2m that a guest's anchors open: its name, top frame, tables above the leaves, the first place."""

    name: str
    root: int
    tables: int
    first: int = 0
    of_page_tables: bool = False


def ways(anchors: Anchors, shared_info: bytes) -> list[Way]:
    """The ways that are valid at once, best first: linear list, rooted tree, marked tree, tree.

    The rooted tree is a proposal that was never merged: p2m_levels and p2m_root behind the merged fields of
    arch_shared_info (64-bit arch+48 and +56, 32-bit arch+28 and +32), valid if p2m_levels is not 0 and
    pfn_to_mfn_frame_list_list is INVALID_MFN. So is the marked tree: bit 61 in the anchor, four levels.
    """
    width, anchor = anchors.width, anchors.frame_list_list
    found = []
    if anchors.p2m_cr3:
        first = anchors.p2m_vaddr >> PAGE_SHIFT & _PLACES - 1
        found.append(Way("linear virtual list", cr3_frame(anchors.p2m_cr3, width), LEVELS[width], first, True))
    levels, root = proposed(shared_info, width)
    if anchor == INVALID_MFN[width]:
        if levels:
            found.append(Way(f"rooted tree of {levels} levels (proposed)", root, levels - 1))
    elif width == 8 and anchor & MARK:
        found.append(Way("marked tree of 4 levels (proposed)", anchor & ~MARK, 3))
    elif anchor:
        found.append(Way("three-level tree", anchor, 2))
    return found


def proposed(shared_info: bytes, width: Width) -> tuple[int, int]:
    """p2m_levels and p2m_root, where the proposal puts them."""
    at = SHARED_INFO.offset(width, "arch") + (48 if width == 8 else 28)
    return tuple(int.from_bytes(shared_info[at + i * width : at + (i + 1) * width], "little") for i in (0, 1))  # type: ignore[return-value]


@dataclass(frozen=True)
class Physmap:
    """A running domain's p2m by one way: runs of leaves, their mfns by place (entry n is in place n // per_leaf)."""

    way: Way
    width: Width
    entries: int
    leaves: Runs
    unreadable: list[Unreadable]
    _read: Read

    @property
    def per_leaf(self) -> int:
        return PAGE_SIZE // self.width

    @classmethod
    def walk(cls, way: Way, anchors: Anchors, read: Read) -> Physmap:
        """Follow one way. Raises GuestError, in words, when the anchors cannot be right or do not reach far enough."""
        width = anchors.width
        per_leaf = PAGE_SIZE // width
        count = -(-anchors.max_pfn // per_leaf)
        if way.of_page_tables:
            anchors.list_at(count)
        elif way.tables + 1 not in DEPTHS:
            raise GuestError(f"p2m_levels {way.tables + 1} is not a depth: {DEPTHS.start} to {DEPTHS.stop - 1} are")
        elif anchors.max_pfn > per_leaf ** (way.tables + 1):
            reach = per_leaf ** (way.tables + 1)
            raise GuestError(
                f"the guest exposes {way.tables + 1} levels of its p2m, which reach pfn {reach - 1:#x}; its max_pfn is "
                f"{anchors.max_pfn:#x}: publish the linear list (p2m_cr3), which has no such limit"
            )
        decode = _pte_frames if way.of_page_tables else partial(_tree_frames, width=width)
        leaves, unreadable = walk(read, way.root, way.tables, range(way.first, way.first + count), decode)
        return cls(
            way, width, anchors.max_pfn, Runs(leaves.first - way.first, leaves.count, leaves.frame), unreadable, read
        )

    def distinct(self) -> tuple[U64, I64, I64]:
        """Each leaf frame once: the frame, the first place that it stands in, and in how many it does."""
        frame, first, back = np.unique(self.leaves.frame, return_index=True, return_inverse=True)
        places = np.bincount(back, weights=self.leaves.count, minlength=len(frame)).astype(np.int64)
        return frame, self.leaves.first[first], places

    def content(self) -> Iterator[tuple[I64, I64, U64]]:
        """The leaves, each frame read once, some at a time: first places, numbers of places, mfns (n, per_leaf).

        All ones for INVALID_MFN. Leaves that cannot be read are left out.
        """
        frame, first, places = self.distinct()
        order = np.argsort(first)
        for i in range(0, len(order), _LEAVES_AT_ONCE):
            some = order[i : i + _LEAVES_AT_ONCE]
            pages, readable = self._read(frame[some])
            table = mfns_in(pages, self.width)[readable]
            yield first[some][readable], places[some][readable], table

    def lookup(self, pfns: list[int]) -> list[int | None]:
        """The entry of each pfn as it stands there, None for INVALID_MFN or where there is no leaf."""
        places = np.array([min(pfn // self.per_leaf, _PLACES) for pfn in pfns], np.int64)
        out: list[int | None] = []
        for pfn, frame in zip(pfns, self.leaves.frame_of(places), strict=True):
            if frame == NO_FRAME or pfn >= self.entries:
                out.append(None)
                continue
            pages, readable = self._read(np.array([frame], np.uint64))
            mfn = int(mfns_in(pages, self.width)[0, pfn % self.per_leaf])
            out.append(None if mfn == int(NO_FRAME) or not readable[0] else mfn)
        return out


def is_own(mfns: U64) -> np.ndarray:
    """Entries that claim a frame.

    Neither INVALID_MFN nor marked FOREIGN or IDENTITY. Whether they are right, m2p says.
    """
    return np.asarray((mfns != NO_FRAME) & (mfns & (FOREIGN | IDENTITY) == 0))


def _pte_frames(pages: U8) -> U64:
    ptes = as_entries(pages)
    return np.where(ptes & np.uint64(PTE_P) != 0, frames(ptes), NO_FRAME)


def _tree_frames(pages: U8, width: Width) -> U64:
    """The frames that pages above the leaves name: there 0 is none, in a leaf it is frame 0."""
    table = mfns_in(pages, width)
    return np.where(table == 0, NO_FRAME, table)
