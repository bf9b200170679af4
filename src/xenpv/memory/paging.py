"""How a processor goes through page tables: of a PV guest by its width, of an HVM guest by its control registers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import CR0_PG, CR4_LA57, CR4_PAE, CR4_PSE, PAGE_SHIFT, PAGE_SIZE, PTE_FRAME_MASK, PTE_PSE
from xenpv.frames import I64, U8, U64, Mask

_PSE36 = 0x001F_E000  # bits 39 to 32 of the address in a 4 MiB entry of 32 bits


@dataclass(frozen=True, slots=True)
class Paging:
    """``levels`` of tables with entries of ``entry`` bytes; none: addresses are pseudo-physical. Entries of the levels
    in ``superpages`` may name memory instead of a table. ``offset``: where in its page the top table begins, in bytes.
    ``pv``: Xen has slots of its own in these tables, and there are no superpages.
    """

    name: str
    levels: int
    entry: int = 8
    superpages: tuple[int, ...] = ()
    offset: int = 0
    pv: bool = False

    @property
    def bits(self) -> int:
        """Bits of an address that a level translates."""
        return 9 if self.entry == 8 else 10

    @property
    def wide(self) -> bool:
        """Whether addresses have 64 bits, sign-extended from the last that is translated."""
        return self.levels > 3

    def refuses(self, vaddr: int) -> str | None:
        """Why no tables can translate an address, whatever is in them; None if they can."""
        if not self.levels:
            return None
        if not self.wide:
            return "beyond 4 GiB, in a 32-bit guest" if vaddr >> 32 else None
        top = PAGE_SHIFT + 9 * self.levels - 1
        return None if vaddr >> top in {0, (1 << 64 - top) - 1} else "not a canonical address"

    def index(self, vaddr: int, level: int) -> int:
        """Which entry of a table of that level translates the address."""
        return vaddr >> PAGE_SHIFT + self.bits * (level - 1) & (1 << self.bits) - 1

    def indices(self, vaddrs: U64, level: int) -> I64:
        """The same of many addresses."""
        shift, last = np.uint64(PAGE_SHIFT + self.bits * (level - 1)), np.uint64((1 << self.bits) - 1)
        return (vaddrs >> shift & last).astype(np.int64)

    def entries(self, pages: U8, level: int) -> U64:
        """Pages of tables of that level, uint8 (n, 4096), as entries, uint64 (n, entries)."""
        table = pages.reshape(-1, PAGE_SIZE)
        if level == self.levels:
            table = table[:, self.offset :]
        if self.entry == 8:
            return np.ascontiguousarray(table).view("<u8")
        return np.ascontiguousarray(table).view("<u4").astype(np.uint64)

    def is_superpage(self, ptes: U64, level: int) -> Mask:
        """Which entries of that level, present ones, name memory."""
        if level not in self.superpages:
            return np.zeros(ptes.shape, np.bool_)
        return np.asarray(ptes & np.uint64(PTE_PSE) != 0)

    def superpage_frame(self, pte: int, level: int) -> int:
        """The first frame of the memory that such an entry names."""
        address = pte & PTE_FRAME_MASK
        if self.entry == 4:
            address = pte & 0xFFC0_0000 | (pte & _PSE36) << 19
        return address >> PAGE_SHIFT & -(1 << self.bits * (level - 1))

    def within(self, vaddr: int, level: int) -> int:
        """How many frames into such memory an address lies."""
        return vaddr >> PAGE_SHIFT & (1 << self.bits * (level - 1)) - 1


PV: dict[Width, Paging] = {8: Paging("4 levels", 4, pv=True), 4: Paging("PAE", 3, pv=True)}
OFF = Paging("off", 0)


def paging_of(cr0: int, cr3: int, cr4: int, *, long: bool) -> Paging:
    """By the registers of a vcpu of an HVM guest; ``long``: it is in long mode, EFER.LMA.

    Intel SDM volume 3 section 4.1.1; AMD64 APM volume 2 section 5.1.
    """
    if not cr0 & CR0_PG:
        return OFF
    if long:
        levels = 5 if cr4 & CR4_LA57 else 4
        return Paging(f"{levels} levels", levels, superpages=(2, 3))
    if cr4 & CR4_PAE:
        return Paging("PAE", 3, superpages=(2,), offset=cr3 & 0xFE0)
    return Paging("2 levels", 2, entry=4, superpages=(2,) if cr4 & CR4_PSE else ())
