"""DomainMemory: a domain's memory by pfn and by virtual address, over any Frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from xenpv.abi.declare import Width
from xenpv.errors import Fault
from xenpv.frames import NO_FRAME, PAGE_SHIFT, PAGE_SIZE, U64, Frames, Pfn, Vaddr, first_bad
from xenpv.memory.p2m_reader import frame_reader
from xenpv.memory.page_tables import Walk, translate, walk_vaddr
from xenpv.memory.paging import PV_PAGING, Paging
from xenpv.memory.registers import Registers
from xenpv.runs import Extents


class PagedDomain(Protocol):
    """The part of a Domain that reading all of its memory needs.

    source/domain.py has the whole protocol.
    """

    @property
    def frames(self) -> Frames:
        """Content and types of the pages, by pfn."""

    @property
    def memory(self) -> DomainMemory:
        """Memory as vcpu 0 sees it."""

    def extents(self) -> Iterator[Extents]:
        """Yield the pages as runs of one type, ascending.

        Pages whose type is in HAS_DATA have content.
        """


@dataclass
class DomainMemory:
    """Reads guest memory by pfn, by pseudo-physical address and by virtual address.

    A 64-bit PV guest has two top tables for each vcpu: the kernel's (cr3), which maps everything, and the user half's.

    Attributes:
        frames: the pages by pfn.
        width: bytes of the guest's unsigned long.
        top: the pfn of the top table that translates virtual addresses, None if no vcpu's cr3 is known.
        user_top: the pfn of the user half's top table, None if there is none.
        tables: reads page tables, None if ``frames`` does.
        no_top: why ``top`` is None, for the error of a walk.
        paging: the paging mode of an HVM domain's vcpu; None for a PV domain, whose width decides.
    """

    frames: Frames
    width: Width = 8
    top: Pfn | None = None
    user_top: Pfn | None = None
    tables: Frames | None = None
    paging: Paging | None = None
    no_top: str = "no vcpu's cr3 is known"

    @classmethod
    def for_hvm_vcpu(cls, frames: Frames, registers: Registers | None) -> Self:
        """Return memory of an HVM domain as a vcpu with those registers translates it."""
        if registers is None:
            return cls(frames)
        return cls(frames, registers.width, registers.top, paging=registers.paging)

    def page(self, pfn: int) -> bytes:
        """Return the 4096 bytes of one page.

        Raises:
            Fault: there is no such page, or it has no content.
        """
        return self.frames.pages(np.array([pfn], np.uint64)).tobytes()

    def type(self, pfn: int) -> int:
        """Return the page type of one pfn, frames.ABSENT if there is no such page."""
        return int(self.frames.types(np.array([pfn], np.uint64))[0])

    def walk(self, vaddr: int, *, top: Pfn | None = None) -> Walk:
        """Return the walk of a virtual address: its page-table entries and its end.

        The walk ends with the pfn or with the fault.

        Args:
            vaddr: the virtual address.
            top: the pfn of the top table, if not this memory's own.

        Raises:
            Fault: no top table is known.
        """
        table = self.top if top is None else top
        if table is None:
            raise Fault(self.no_top, space="vaddr", address=vaddr)
        return walk_vaddr(self.tables or self.frames, table, Vaddr(vaddr), self.width, self.paging)

    def read(self, address: int, length: int) -> bytes:
        """Return ``length`` bytes at a pseudo-physical address (pfn << 12 | offset).

        Raises:
            Fault: a page is missing or has no content.
        """
        first, last = address >> PAGE_SHIFT, (address + max(length, 1) - 1) >> PAGE_SHIFT
        pages = self.frames.pages(np.arange(first, last + 1, dtype=np.uint64)).tobytes()
        return pages[address % PAGE_SIZE :][:length]

    def read_virtual(self, vaddr: int, length: int, *, top: Pfn | None = None) -> bytes:
        """Return ``length`` bytes at a virtual address; ``top`` as for ``walk``.

        Raises:
            Fault: a page is not mapped, or has no content; ``address`` is the first such address.
        """
        pages = ((vaddr + max(length, 1) - 1) >> PAGE_SHIFT) - (vaddr >> PAGE_SHIFT) + 1
        pfns = self.translate(vaddr, pages, top=top)
        return self.frames.pages(pfns).tobytes()[vaddr % PAGE_SIZE :][:length]

    def translate(self, vaddr: int, pages: int, *, top: Pfn | None = None) -> U64:
        """Return the pfns that consecutive virtual pages map to; uint64.

        Each page table is read once.

        Args:
            vaddr: an address in the first page.
            pages: how many pages.
            top: as for ``walk``.

        Raises:
            Fault: a page is not mapped; ``address`` is the first such address.
        """
        table, last = self.top if top is None else top, vaddr + (pages - 1) * PAGE_SIZE
        paging = self.paging or PV_PAGING[self.width]
        if table is None or paging.invalid_reason(vaddr) or paging.invalid_reason(last) or vaddr >> 63 != last >> 63:
            raise self._fault(vaddr, top) or self._fault(last, top) or _tables_changed(vaddr)
        vaddrs = np.arange(pages, dtype=np.uint64) * np.uint64(PAGE_SIZE) + np.uint64(vaddr)
        pfns = translate(frame_reader(self.tables or self.frames), table, vaddrs, paging)
        if (row := first_bad(pfns == NO_FRAME)) is not None:
            unmapped_vaddr = vaddr if not row else (vaddr & -PAGE_SIZE) + row * PAGE_SIZE
            raise self._fault(unmapped_vaddr, top) or _tables_changed(unmapped_vaddr)
        return pfns

    def _fault(self, vaddr: int, top: Pfn | None) -> Fault | None:
        return self.walk(vaddr, top=top).fault


def _tables_changed(vaddr: int) -> Fault:
    return Fault(f"{vaddr:#x}: the page tables changed while they were read", space="vaddr", address=vaddr)
