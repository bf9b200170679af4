"""The p2m of a saved domain: in which form it was published, and which frames hold it.

A stream names the p2m's frames (X86_PV_P2M_FRAMES) but leaves the guest's own anchors in shared info as they were:
machine frames of the host that saved. The p2m's content, mfns of that host too, is what translates them back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.xen import INVALID_MFN, SHARED_INFO
from xenpv.errors import Fault, GuestError
from xenpv.frames import I64, NO_FRAME, PAGE_SIZE, U8, U64, Frames, Pfn, Vaddr
from xenpv.memory.pagetables import canonical, cr3_frame, in_xen, mapped_frames

_FRAMES_AT_ONCE = 1024  # p2m pages read at once: 4 MiB


class Form(StrEnum):
    """How a guest shows its p2m to the outside (docs/design.md section 4)."""

    NONE = "none"
    TREE = "three-level tree"
    LINEAR = "linear virtual list"
    BOTH = "linear virtual list and three-level tree"


@dataclass(frozen=True, slots=True)
class Anchors:
    """The p2m fields of arch_shared_info. ``max_pfn`` is the number of entries; frames are mfns of the guest's host."""

    width: Width
    max_pfn: int
    frame_list_list: int
    p2m_cr3: int
    p2m_vaddr: int
    p2m_generation: int

    @classmethod
    def of(cls, shared_info: bytes, width: Width) -> Anchors:
        """From the bytes of a shared info page."""
        arch = SHARED_INFO.read(shared_info, width)["arch"]
        names = ("max_pfn", "pfn_to_mfn_frame_list_list", "p2m_cr3", "p2m_vaddr", "p2m_generation")
        return cls(width, *(int(arch[name]) for name in names))

    @property
    def form(self) -> Form:
        """Valid iff p2m_cr3 is not 0.

        The list. 0 in the tree's anchor is "not set up yet", all ones "look elsewhere".
        """
        tree = self.frame_list_list not in {0, INVALID_MFN[self.width]}
        return (Form.BOTH if tree else Form.LINEAR) if self.p2m_cr3 else (Form.TREE if tree else Form.NONE)

    def list_at(self, frames: int) -> Vaddr:
        """p2m_vaddr, where a list of so many frames may lie.

        Aligned, canonical, not in Xen's hole. Raises GuestError.
        """
        first, last = self.p2m_vaddr, self.p2m_vaddr + frames * PAGE_SIZE - 1
        outside = last >> 64 or not (canonical(first) and canonical(last)) if self.width == 8 else last >> 32
        if outside or in_xen(first, self.width) or in_xen(last, self.width) or first % PAGE_SIZE:
            raise GuestError(f"Bad virtual p2m address range {first:#x}-{last:#x}")
        return Vaddr(first)


@dataclass(frozen=True)
class P2M:
    """A p2m by its frames.

    Entry n stands in frame n // entries_per_frame. ``frames``: pfns, uint64, NO_FRAME for a gap. One frame may stand in
    many places: kernels share it among all parts of the table where nothing is.
    """

    memory: Frames
    frames: U64
    entries: int  # of the table: one more than the last pfn
    width: Width

    @property
    def entries_per_frame(self) -> int:
        return PAGE_SIZE // self.width

    @cached_property
    def distinct(self) -> I64:
        """The number of each frame's first place, ascending, gaps left out: every frame once, however shared."""
        if not len(self.frames):
            return np.empty(0, np.int64)
        runs = np.flatnonzero(np.append(True, self.frames[1:] != self.frames[:-1]))
        _, first = np.unique(self.frames[runs], return_index=True)
        numbers: I64 = np.sort(runs[first])
        there: I64 = numbers[self.frames[numbers] != NO_FRAME]
        return there

    def content(self, places: I64 | None = None) -> Iterator[tuple[int, U64]]:
        """The table piece by piece: the first pfn of each piece and its mfns, all ones (64 bits) for INVALID_MFN.

        Of the frames at ``places``, or of each frame at its first place. Frames without content are left out.
        """
        there = self.distinct if places is None else places[self.frames[places] != NO_FRAME]
        for i in range(0, len(there), _FRAMES_AT_ONCE):
            numbers = there[i : i + _FRAMES_AT_ONCE]
            try:
                pages = self.memory.pages(self.frames[numbers])
            except Fault:
                numbers, pages = self._one_by_one(numbers)
            table = mfns_in(pages, self.width)
            for number, row in zip(numbers.tolist(), table, strict=True):
                first = number * self.entries_per_frame
                yield first, row[: max(0, self.entries - first)]

    def _one_by_one(self, numbers: I64) -> tuple[I64, U8]:
        good, pages = [], []
        for number in numbers.tolist():
            try:
                pages.append(self.memory.pages(self.frames[number : number + 1])[0])
            except Fault:
                continue
            good.append(number)
        return np.array(good, np.int64), np.array(pages, np.uint8).reshape(-1, PAGE_SIZE)

    def lookup(self, pfns: list[int]) -> list[int | None]:
        """The mfn of each pfn, None for INVALID_MFN, a pfn beyond the table, or a frame that is not there."""
        out: list[int | None] = []
        for pfn in pfns:
            number, at = divmod(pfn, self.entries_per_frame)
            if pfn >= self.entries or number >= len(self.frames) or self.frames[number] == NO_FRAME:
                out.append(None)
                continue
            try:
                page = self.memory.pages(self.frames[number : number + 1])
            except Fault:
                out.append(None)
                continue
            mfn = int(page.view(f"<u{self.width}")[0, at])
            out.append(None if mfn == INVALID_MFN[self.width] else mfn)
        return out

    def pfns_of(self, mfns: U64) -> U64:
        """The pfn of each mfn by searching the table, NO_FRAME for one that it does not hold. One pass for all.

        Of an mfn that stands in the table more than once, the last pfn.
        """
        if not len(mfns):
            return mfns
        wanted, back = np.unique(mfns, return_inverse=True)
        found = np.full(len(wanted), NO_FRAME)
        for first, row in self.content():
            at = np.minimum(np.searchsorted(wanted, row), len(wanted) - 1)
            hit = np.flatnonzero(wanted[at] == row)
            found[at[hit]] = (hit + first).astype(np.uint64)
        found[wanted == NO_FRAME] = NO_FRAME
        return found[back]


def frames_by_list(p2m: P2M, anchors: Anchors) -> U64:
    """The frames of the linear virtual list as the guest's own page tables have it, from p2m_cr3 and p2m_vaddr.

    Raises GuestError when the anchors cannot be right.
    """
    first = anchors.list_at(len(p2m.frames))
    mfn = cr3_frame(anchors.p2m_cr3, p2m.width)
    top = p2m.pfns_of(np.array([mfn], np.uint64))[0]
    if top == NO_FRAME:
        raise GuestError(f"Bad p2m_cr3 value {anchors.p2m_cr3:#x}: no pfn has mfn {mfn:#x}")
    return mapped_frames(p2m.memory, Pfn(int(top)), first, len(p2m.frames), p2m.width)


def frames_by_tree(p2m: P2M, anchors: Anchors) -> U64:
    """The frames of the three-level tree: frame list list, frame lists, leaves. Raises GuestError on a bad anchor."""
    per_frame = p2m.entries_per_frame
    if len(p2m.frames) > per_frame * per_frame:
        raise GuestError(f"max_pfn {p2m.entries - 1:#x} too large for p2m tree")
    fll = p2m.pfns_of(np.array([anchors.frame_list_list], np.uint64))
    if fll[0] == NO_FRAME:
        raise GuestError(f"Bad mfn {anchors.frame_list_list:#x} for p2m frame list list: no pfn has it")
    lists = -(-len(p2m.frames) // per_frame)
    mids = p2m.pfns_of(mfns_in(p2m.memory.pages(fll), p2m.width).reshape(-1)[:lists])
    if np.any(mids == NO_FRAME):
        at = int(np.argmax(mids == NO_FRAME))
        raise GuestError(f"Bad mfn at index {at} (of {lists}) in p2m frame list list")
    return p2m.pfns_of(mfns_in(p2m.memory.pages(mids), p2m.width).reshape(-1)[: len(p2m.frames)])


def mfns_in(pages: U8, width: Width) -> U64:
    """Pages of mfns of a guest of that width, uint8 (n, 4096), as uint64 (n, entries): NO_FRAME for INVALID_MFN."""
    table: U64 = pages.view(f"<u{width}").reshape(-1, PAGE_SIZE // width).astype(np.uint64)
    if width == 4:
        table[table == INVALID_MFN[4]] = NO_FRAME
    return table
