"""Paging modes of PV and HVM guests.

A PV guest's mode follows from its width, an HVM guest's from its control registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import CR0_PG, CR4_LA57, CR4_PAE, CR4_PSE, PAGE_SHIFT, PAGE_SIZE, PTE_FRAME_MASK, PTE_PSE
from xenpv.frames import I64, U8, U64, Mask

_PSE36 = 0x001F_E000  # bits 39 to 32 of the address in a 4 MiB entry of 32 bits


@dataclass(frozen=True, slots=True)
class Paging:
    """A paging mode: the levels of tables, and how their entries are read.

    Attributes:
        name: for people.
        levels: levels of tables; 0 if addresses are pseudo-physical.
        entry_size: bytes of an entry, 8 or 4.
        superpage_levels: levels whose entries may name memory instead of a table.
        top_table_offset: where the top table begins in its page, in bytes.
        pv: whether Xen has slots of its own in these tables, and superpages are not valid.
    """

    name: str
    levels: int
    entry_size: int = 8
    superpage_levels: tuple[int, ...] = ()
    top_table_offset: int = 0
    pv: bool = False

    @property
    def index_bits(self) -> int:
        """Bits of an address that a level translates."""
        return 9 if self.entry_size == 8 else 10

    @property
    def sign_extended(self) -> bool:
        """Whether addresses have 64 bits.

        They are then sign-extended from the highest bit that is translated.
        """
        return self.levels > 3

    def invalid_reason(self, vaddr: int) -> str | None:
        """Return why no tables can translate an address; None if some can."""
        if not self.levels:
            return None
        if not self.sign_extended:
            return "beyond 4 GiB, in a 32-bit guest" if vaddr >> 32 else None
        top_bit = PAGE_SHIFT + 9 * self.levels - 1
        return None if vaddr >> top_bit in {0, (1 << 64 - top_bit) - 1} else "not a canonical address"

    def pte_index(self, vaddr: int, level: int) -> int:
        """Return the index of the entry that translates an address at that level."""
        return vaddr >> PAGE_SHIFT + self.index_bits * (level - 1) & (1 << self.index_bits) - 1

    def pte_indices(self, vaddrs: U64, level: int) -> I64:
        """Return the index as ``pte_index`` does, for many addresses; int64."""
        shift, last = np.uint64(PAGE_SHIFT + self.index_bits * (level - 1)), np.uint64((1 << self.index_bits) - 1)
        return (vaddrs >> shift & last).astype(np.int64)

    def decode(self, pages: U8, level: int) -> U64:
        """Return the entries of tables of one level; uint64 of shape (n, entries).

        The tables are uint8 of shape (n, 4096).
        """
        table = pages.reshape(-1, PAGE_SIZE)
        if level == self.levels:
            table = table[:, self.top_table_offset :]
        if self.entry_size == 8:
            return np.ascontiguousarray(table).view("<u8")
        return np.ascontiguousarray(table).view("<u4").astype(np.uint64)

    def is_superpage(self, ptes: U64, level: int) -> Mask:
        """Return which present entries of that level name memory."""
        if level not in self.superpage_levels:
            return np.zeros(ptes.shape, np.bool_)
        return np.asarray(ptes & np.uint64(PTE_PSE) != 0)

    def superpage_frame(self, pte: int, level: int) -> int:
        """Return the first frame of the superpage that an entry names."""
        address = pte & PTE_FRAME_MASK
        if self.entry_size == 4:
            address = pte & 0xFFC0_0000 | (pte & _PSE36) << 19
        return address >> PAGE_SHIFT & -(1 << self.index_bits * (level - 1))

    def superpage_offset(self, vaddr: int, level: int) -> int:
        """Return how many frames into a superpage of that level an address lies."""
        return vaddr >> PAGE_SHIFT & (1 << self.index_bits * (level - 1)) - 1


PV_PAGING: dict[Width, Paging] = {8: Paging("4 levels", 4, pv=True), 4: Paging("PAE", 3, pv=True)}
NO_PAGING = Paging("off", 0)


def paging_mode(cr0: int, cr3: int, cr4: int, *, long: bool) -> Paging:
    """Return the paging mode of an HVM guest's vcpu.

    Args:
        cr0: its control register 0.
        cr3: its control register 3.
        cr4: its control register 4.
        long: whether it is in long mode (EFER.LMA).

    Source:
        Intel SDM volume 3 section 4.1.1; AMD64 APM volume 2 section 5.1
    """
    if not cr0 & CR0_PG:
        return NO_PAGING
    if long:
        levels = 5 if cr4 & CR4_LA57 else 4
        return Paging(f"{levels} levels", levels, superpage_levels=(2, 3))
    if cr4 & CR4_PAE:
        return Paging("PAE", 3, superpage_levels=(2,), top_table_offset=cr3 & 0xFE0)
    return Paging("2 levels", 2, entry_size=4, superpage_levels=(2,) if cr4 & CR4_PSE else ())
