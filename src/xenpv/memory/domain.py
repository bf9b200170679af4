"""DomainMemory: a domain's memory by pfn and by virtual address, over any Frames."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xenpv.abi.declare import Width
from xenpv.errors import Fault
from xenpv.frames import PAGE_SHIFT, PAGE_SIZE, Frames, Pfn, Vaddr
from xenpv.memory.pagetables import Walk, walk


@dataclass
class DomainMemory:
    """Reads guest memory. ``top`` is the pfn of the top table that virtual addresses go through, None where none is
    known.

    A 64-bit PV guest has two tables a vcpu: the kernel's (cr3), which maps all, and the user half's, ``user_top``.
    """

    frames: Frames
    width: Width = 8
    top: Pfn | None = None
    user_top: Pfn | None = None

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
        return walk(self.frames, table, Vaddr(vaddr), self.width)

    def read(self, address: int, length: int) -> bytes:
        """``length`` bytes from a pseudo-physical address (pfn << 12 | offset) on. Raises Fault."""
        first, last = address >> PAGE_SHIFT, (address + max(length, 1) - 1) >> PAGE_SHIFT
        pages = self.frames.pages(np.arange(first, last + 1, dtype=np.uint64)).tobytes()
        return pages[address % PAGE_SIZE :][:length]

    def read_virtual(self, vaddr: int, length: int, *, top: Pfn | None = None) -> bytes:
        """``length`` bytes from a virtual address on. Raises Fault for the first page that is not mapped."""
        out = bytearray()
        while len(out) < length:
            at = vaddr + len(out)
            pfn = self._translate(at, top)
            n = min(PAGE_SIZE - at % PAGE_SIZE, length - len(out))
            out += self.page(pfn)[at % PAGE_SIZE :][:n]
        return bytes(out)

    def _translate(self, vaddr: int, top: Pfn | None) -> Pfn:
        way = self.walk(vaddr, top=top)
        if way.pfn is None:
            assert way.fault is not None
            raise way.fault
        return way.pfn
