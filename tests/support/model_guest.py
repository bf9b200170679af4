"""Domains on the model: memory, page tables that map all of it, and a vcpu."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import (
    ENTRIES,
    PAGE_SIZE,
    PTE_A,
    PTE_D,
    PTE_P,
    PTE_RW,
    PTE_US,
    VCPU_GUEST_CONTEXT,
    VGCF_IN_KERNEL,
    VGCF_ONLINE,
)
from xenpv.abi.xen import SHARED_INFO
from xenpv.frames import U8, U64, DomId
from xenpv.host.model.host import ModelHost

TABLE = PTE_P | PTE_RW | PTE_US | PTE_A | PTE_D
READ_ONLY = PTE_P | PTE_US | PTE_A | PTE_D
BASE: dict[Width, int] = {8: 0xFFFF_FFFF_8000_0000, 4: 0xC000_0000}


def array(*numbers: int) -> U64:
    return np.array(numbers, np.uint64)


def pfns(n: int, first: int = 0) -> U64:
    return np.arange(first, first + n, dtype=np.uint64)


def page(entries: dict[int, int]) -> U8:
    words = np.zeros(ENTRIES, "<u8")
    for at, value in entries.items():
        words[at] = value
    return words.view(np.uint8)[None]


@dataclass
class ModelGuest:
    """A domain and its frames.

    Attributes:
        mfns: The frame of each pfn.
        l1: The L1 tables, which map all pfns from BASE on.
        top: The table for cr3.
    """

    domid: DomId
    width: Width
    mfns: U64
    l1: U64
    l2: int
    l3: int
    top: int

    def vaddr(self, pfn: int) -> int:
        """Return the address of a pfn."""
        return BASE[self.width] + pfn * PAGE_SIZE

    def entry_of(self, pfn: int) -> tuple[int, int]:
        """Return the L1 table and the slot that map a pfn."""
        return int(self.l1[pfn // ENTRIES]), pfn % ENTRIES


def write_page_tables(host: ModelHost, domid: DomId, width: Width, mfns: U64) -> ModelGuest:
    """Write page tables into the domain's last frames. They are not pinned yet."""
    n = -(-len(mfns) // ENTRIES)
    used = n + (3 if width == 8 else 2)
    tables = mfns[len(mfns) - used :]
    flags = np.full(len(mfns), TABLE, np.uint64)
    flags[len(mfns) - used :] = READ_ONLY
    ptes = np.zeros(n * ENTRIES, "<u8")
    ptes[: len(mfns)] = mfns << np.uint64(12) | flags
    l1, l2, l3, l4 = tables[:n], int(tables[n]), int(tables[n + 1]), int(tables[-1])
    host.write_frames(domid, l1, ptes.view(np.uint8).reshape(n, PAGE_SIZE))
    host.write_frames(domid, array(l2), page({i: int(mfn) << 12 | TABLE for i, mfn in enumerate(l1)}))
    if width == 8:
        host.write_frames(domid, array(l3), page({510: l2 << 12 | TABLE}))
        host.write_frames(domid, array(l4), page({511: l3 << 12 | TABLE}))
    else:
        host.write_frames(domid, array(l3), page({3: l2 << 12 | PTE_P}))
    return ModelGuest(domid, width, mfns, l1, l2, l3, l4 if width == 8 else l3)


def context(guest: ModelGuest) -> bytes:
    """Return a vcpu context with the guest's top-level table, and its GDT in pfn 1."""
    data = np.zeros(1, VCPU_GUEST_CONTEXT[guest.width])
    data["flags"] = VGCF_ONLINE | VGCF_IN_KERNEL
    data["ctrlreg"][0, 3] = guest.top << 12 if guest.width == 8 else (guest.top << 12 | guest.top >> 20) & 0xFFFF_FFFF
    data["gdt_frames"][0, 0], data["gdt_ents"] = guest.mfns[1], 16
    return data.tobytes()


def make_guest(
    host: ModelHost, width: Width = 8, pages: int = 1024, *, order: int = 0, name: str | None = None
) -> ModelGuest:
    """Make a running domain with pinned tables. Pfn 1 is its GDT, mapped read-only."""
    domid = host.create(width, max_pages=pages, name=name, uuid=f"00000000-0000-0000-0000-{pages:012}")
    mfns = host.populate_physmap(domid, pfns(pages)[:: 1 << order], order)
    mfns = (mfns[:, None] + pfns(1 << order)).reshape(-1)
    guest = write_page_tables(host, domid, width, mfns)
    at = int(host.frames.entries(guest.entry_of(1)[0])[1])
    host.hypervisor.mmu_update(domid, [(*guest.entry_of(1), at & ~PTE_RW)])
    host.hypervisor.pin(domid, guest.top, 4 if width == 8 else 3)
    host.set_vcpu_context(domid, 0, context(guest))
    shared = np.zeros(1, SHARED_INFO[width])
    shared["arch"]["max_pfn"] = pages
    host.write_shared_info(domid, shared.tobytes())
    host.unpause(domid)
    return guest
