"""DomainMemory: a domain's memory by pfn and by virtual address, over any Frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from xenpv.abi.declare import Width
from xenpv.errors import Fault
from xenpv.frames import NO_FRAME, PAGE_SHIFT, PAGE_SIZE, U64, Frames, Pfn, Vaddr, first_bad
from xenpv.memory.p2m import frame_reader
from xenpv.memory.pagetables import Walk, translate, walk
from xenpv.memory.paging import PV, Paging
from xenpv.memory.registers import Registers
from xenpv.runs import Extents


class PagedDomain(Protocol):
    """The part of a Domain that reading all of its memory needs; source/domain.py has the whole of it."""

    @property
    def frames(self) -> Frames:
        """Content and types of the pages, by pfn."""

    @property
    def memory(self) -> DomainMemory:
        """Memory as vcpu 0 sees it."""

    def extents(self) -> Iterator[Extents]:
        """Yield the pages as runs of one type, ascending. Those whose type is in HAS_DATA have content."""


@dataclass
class DomainMemory:
    """Reads guest memory. ``top`` is the pfn of the top table that virtual addresses go through, None where none is
    known.

    A 64-bit PV guest has two tables a vcpu: the kernel's (cr3), which maps all, and the user half's, ``user_top``.
    ``tables`` is what page tables are read by, where that is not ``frames``. ``paging`` is how a vcpu of an HVM domain
    goes through them; a PV domain's follows from its width.
    """

    frames: Frames
    width: Width = 8
    top: Pfn | None = None
    user_top: Pfn | None = None
    tables: Frames | None = None
    paging: Paging | None = None

    @classmethod
    def of_hvm(cls, frames: Frames, registers: Registers | None) -> Self:
        """Memory of an HVM domain as a vcpu with those registers sees it."""
        if registers is None:
            return cls(frames)
        return cls(frames, registers.width, registers.top, paging=registers.paging)

    def page(self, pfn: int) -> bytes:
        """The 4096 bytes of one page. Raises Fault."""
        return self.frames.pages(np.array([pfn], np.uint64)).tobytes()

    def type(self, pfn: int) -> int:
        """The page type of one pfn, frames.ABSENT when there is no such page."""
        return int(self.frames.types(np.array([pfn], np.uint64))[0])

    def walk(self, vaddr: int, *, top: Pfn | None = None) -> Walk:
        """The way of a virtual address through the tables. Raises Fault only when there are no tables to walk."""
        table = self.top if top is None else top
        if table is None:
            raise Fault("no vcpu's cr3 is known", space="vaddr", address=vaddr)
        return walk(self.tables or self.frames, table, Vaddr(vaddr), self.width, self.paging)

    def read(self, address: int, length: int) -> bytes:
        """``length`` bytes from a pseudo-physical address (pfn << 12 | offset) on. Raises Fault."""
        first, last = address >> PAGE_SHIFT, (address + max(length, 1) - 1) >> PAGE_SHIFT
        pages = self.frames.pages(np.arange(first, last + 1, dtype=np.uint64)).tobytes()
        return pages[address % PAGE_SIZE :][:length]

    def read_virtual(self, vaddr: int, length: int, *, top: Pfn | None = None) -> bytes:
        """``length`` bytes from a virtual address on. Raises Fault for the first page that is not mapped."""
        pages = ((vaddr + max(length, 1) - 1) >> PAGE_SHIFT) - (vaddr >> PAGE_SHIFT) + 1
        pfns = self.translate(vaddr, pages, top=top)
        return self.frames.pages(pfns).tobytes()[vaddr % PAGE_SIZE :][:length]

    def translate(self, vaddr: int, pages: int, *, top: Pfn | None = None) -> U64:
        """The pfns behind so many consecutive virtual pages, uint64. Raises Fault for the first that is not mapped.

        Cost follows the tables that are there: each is read once.
        """
        table, last = self.top if top is None else top, vaddr + (pages - 1) * PAGE_SIZE
        paging = self.paging or PV[self.width]
        if table is None or paging.refuses(vaddr) or paging.refuses(last) or vaddr >> 63 != last >> 63:
            raise self._fault(vaddr, top) or self._fault(last, top) or _changed(vaddr)
        vaddrs = np.arange(pages, dtype=np.uint64) * np.uint64(PAGE_SIZE) + np.uint64(vaddr)
        found = translate(frame_reader(self.tables or self.frames), table, vaddrs, paging)
        if (lost := first_bad(found == NO_FRAME)) is not None:
            at = vaddr if not lost else (vaddr & -PAGE_SIZE) + lost * PAGE_SIZE
            raise self._fault(at, top) or _changed(at)
        return found

    def _fault(self, vaddr: int, top: Pfn | None) -> Fault | None:
        return self.walk(vaddr, top=top).fault


def _changed(vaddr: int) -> Fault:
    return Fault(f"{vaddr:#x}: the page tables changed while they were read", space="vaddr", address=vaddr)
