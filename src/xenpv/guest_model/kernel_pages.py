"""The pages of the model's kernel: pool, mappings, and page tables.

It keeps pfns and addresses, and looks up mfns in the page tables, because a restore changes every mfn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import ENTRIES, LEVELS, PAGE_SHIFT, PAGE_SIZE, PTE_A, PTE_D, PTE_P, PTE_RW
from xenpv.abi.xen import START_INFO, START_INFO_MAGIC
from xenpv.errors import Fault, GuestError, RequestError
from xenpv.frames import I64, U8, U64
from xenpv.host.model.guest_view import GuestView
from xenpv.memory.p2m_writer import TABLE_FLAGS, write_page_tables
from xenpv.memory.page_tables import page_number
from xenpv.runs import FrameRuns

# The address space. A kernel knows where it was linked. The other ranges consist of whole top-level entries that the
# builder leaves empty: 64-bit as litmus has them, 32-bit one GiB each.
LINKED_AT: dict[Width, int] = {8: 0xFFFF_FFFF_8000_0000, 4: 0xC000_0000}
VMAP_RANGE: dict[Width, range] = {8: range(0xFFFF_8800_0000_0000, 0xFFFF_C800_0000_0000), 4: range(1 << 31, 3 << 30)}
P2M_LIST_RANGE: dict[Width, range] = {
    8: range(0xFFFF_C800_0000_0000, 0xFFFF_E000_0000_0000),
    4: range(1 << 30, 1 << 31),
}

READ_ONLY = PTE_P | PTE_A | PTE_D
PAGE = READ_ONLY | PTE_RW


@dataclass(frozen=True, slots=True)
class StartInfo:
    """The facts that a kernel gets at boot: start info and its boot stack's end."""

    address: int
    stack_end: int
    nr_pages: int
    shared_info: int  # a machine address
    mfn_list: int
    first_p2m_pfn: int
    nr_p2m_frames: int

    @classmethod
    def read(cls, view: GuestView) -> StartInfo:
        """Read start info by the registers of a vcpu that just started.

        GuestError if they do not lead to one.
        """
        address = view.register("si")
        data = view.read(address, START_INFO.size(view.width))
        info = START_INFO.read(data, view.width)
        if not bytes(info["magic"]).startswith(START_INFO_MAGIC[view.width]):
            raise GuestError(f"there is no start info at {address:#x}, where the registers point")
        names = ("nr_pages", "shared_info", "mfn_list", "first_p2m_pfn", "nr_p2m_frames")
        return cls(address, view.register("sp"), *(int(info[name]) for name in names))


class KernelPages:
    """The kernel's own pages, and the addresses of all pages that it has mapped.

    Its own pages are those below pfn ``end``: what the builder wrote, and, after the boot stack, a pool of ``reserve``
    pages for tables. (An initrd that is not mapped is not kept: the pool overwrites it.) Pages of the pool beyond the
    initial mapping, and any other page that is needed, are mapped in VMAP_RANGE, in slots of one page each. Slot 0 maps
    shared info.

    Args:
        view: The running guest.
        start: Its start info.
        base: The address of pfn 0 in the initial mapping.
        reserve: Pages of the pool.
    """

    def __init__(self, view: GuestView, start: StartInfo, base: int, reserve: int) -> None:
        self.width: Width = view.width
        self.base = base
        # The pages that are mapped in VMAP_RANGE, ascending by pfn, and their slots.
        self._vmap_pfns, self._vmap_slots = np.empty(0, np.uint64), np.empty(0, np.int64)
        self._free_slots = np.empty(0, np.int64)
        self._l1_tables = np.empty(0, np.uint64)  # of VMAP_RANGE
        self._upper_tables = np.empty(0, np.uint64)
        stack_end = start.stack_end - base >> PAGE_SHIFT
        self.initial_mapping_end = _find_initial_mapping_end(view, base, stack_end, start.nr_pages)
        pool_mapped = range(stack_end, min(self.initial_mapping_end, stack_end + reserve))
        first = max(self.initial_mapping_end, start.first_p2m_pfn + start.nr_p2m_frames)
        pool_unmapped = range(first, first + reserve - len(pool_mapped))
        self.end = pool_unmapped.stop if pool_unmapped else first
        if self.end >= start.nr_pages:
            message = f"{start.nr_pages} pages are too few for a kernel that reserves {reserve} for its tables"
            raise RequestError(message, needed=self.end + 1, available=start.nr_pages)
        self._pool = list(pool_mapped)[::-1]
        self._add_slots(view, 1)
        self._map_slots(view, np.zeros(1, np.int64), np.array([start.shared_info >> PAGE_SHIFT], np.uint64))
        self._free_slots = self._free_slots[1:]
        unmapped = np.arange(pool_unmapped.start, pool_unmapped.stop, dtype=np.uint64)
        data = view.read(start.mfn_list + pool_unmapped.start * self.width, len(pool_unmapped) * self.width)
        self.map(view, unmapped, np.frombuffer(data, f"<u{self.width}").astype(np.uint64))
        self._pool = list(pool_unmapped)[::-1] + self._pool

    # -- addresses

    def vaddrs(self, pfns: U64) -> U64:
        """Return the address of each page. All must be mapped."""
        row = np.searchsorted(self._vmap_pfns, pfns)
        initial = pfns < np.uint64(self.initial_mapping_end)
        slots = np.append(self._vmap_slots, 0)[np.where(initial, -1, row)].astype(np.uint64)
        start = np.where(initial, np.uint64(self.base), np.uint64(VMAP_RANGE[self.width].start))
        vaddrs: U64 = start + (np.where(initial, pfns, slots) << np.uint64(PAGE_SHIFT))
        return vaddrs

    def unmapped(self, pfns: U64) -> U64:
        """Return those pages that are not mapped."""
        return pfns[(pfns >= np.uint64(self.initial_mapping_end)) & ~np.isin(pfns, self._vmap_pfns)]

    def map(self, view: GuestView, pfns: U64, mfns: U64) -> None:
        """Map pages writable in VMAP_RANGE. None may be mapped yet.

        RequestError if the range is full.
        """
        if len(pfns) > len(self._free_slots):
            self._add_slots(view, -(-(len(pfns) - len(self._free_slots)) // ENTRIES))
        slots, self._free_slots = self._free_slots[: len(pfns)], self._free_slots[len(pfns) :]
        self._map_slots(view, slots, mfns)
        self._set_vmap(np.append(self._vmap_pfns, pfns), np.append(self._vmap_slots, slots))

    def unmap(self, view: GuestView, pfns: U64) -> None:
        """Unmap those pages that are mapped in VMAP_RANGE."""
        mask = np.isin(self._vmap_pfns, pfns)
        slots = self._vmap_slots[mask]
        view.update_va_mapping(self._slot_vaddrs(slots), np.zeros(len(slots), np.uint64))
        self._set_vmap(self._vmap_pfns[~mask], self._vmap_slots[~mask])
        self._free_slots = np.append(slots, self._free_slots)

    def renumber(self, pfns: U64, new: U64) -> None:
        """Record that pages have other pfns now. Their mappings stay."""
        order = np.argsort(pfns)
        row = np.minimum(np.searchsorted(pfns[order], self._vmap_pfns), len(pfns) - 1)
        moved = pfns[order][row] == self._vmap_pfns
        self._set_vmap(np.where(moved, new[order][row], self._vmap_pfns), self._vmap_slots)

    @property
    def shared_info(self) -> int:
        """The address of shared info."""
        return VMAP_RANGE[self.width].start

    def map_shared_info(self, view: GuestView, machine: int) -> None:
        """Map shared info, the page at this machine address; 0 unmaps it."""
        pte = machine | PAGE if machine else 0
        view.update_va_mapping(np.array([self.shared_info], np.uint64), np.array([pte], np.uint64))

    def _set_vmap(self, pfns: U64, slots: I64) -> None:
        """Record which pages are mapped in which slots; keep them sorted by pfn."""
        order = np.argsort(pfns)
        self._vmap_pfns, self._vmap_slots = pfns[order], slots[order]

    def _slot_vaddrs(self, slots: I64) -> U64:
        return np.uint64(VMAP_RANGE[self.width].start) + (slots.astype(np.uint64) << np.uint64(PAGE_SHIFT))

    def _map_slots(self, view: GuestView, slots: I64, mfns: U64) -> None:
        view.update_va_mapping(self._slot_vaddrs(slots), mfns << np.uint64(PAGE_SHIFT) | np.uint64(PAGE))

    def _add_slots(self, view: GuestView, tables: int) -> None:
        """Extend VMAP_RANGE by the slots of this many L1 tables.

        RequestError if its addresses are used up.
        """
        first = len(self._l1_tables)
        slots_max = len(VMAP_RANGE[self.width]) >> PAGE_SHIFT
        if (first + tables) * ENTRIES > slots_max:
            message = f"{(first + tables) * ENTRIES} pages do not fit the address range of mapped pages"
            raise RequestError(message, needed=(first + tables) * ENTRIES, available=slots_max)
        self._l1_tables = np.append(self._l1_tables, self.alloc_tables(view, np.zeros((tables, PAGE_SIZE), np.uint8)))
        place = page_number(VMAP_RANGE[self.width].start) // ENTRIES
        places = np.arange(place, place + len(self._l1_tables))
        frames = view.translate_pages(self.vaddrs(self._l1_tables))
        old = self._upper_tables
        self._upper_tables = self.link_tables(view, FrameRuns(places, np.ones_like(places), frames))
        self.free(view, old)
        self._free_slots = np.append(self._free_slots, np.arange(first * ENTRIES, len(self._l1_tables) * ENTRIES))

    # -- the pool

    def alloc(self, n: int) -> U64:
        """Allocate pages of the pool, mapped and writable.

        RequestError if it has too few left.
        """
        if n > len(self._pool):
            message = f"the kernel needs {n} more pages for tables, and has {len(self._pool)} left: reserve more"
            raise RequestError(message, needed=n, available=len(self._pool))
        pfns = self._pool[len(self._pool) - n :][::-1]
        del self._pool[len(self._pool) - n :]
        return np.array(pfns, np.uint64)

    def free(self, view: GuestView, pfns: U64) -> None:
        """Return pages to the pool, and make those that were page tables writable again."""
        self._set_flags(view, pfns, PAGE)
        self._pool += pfns[::-1].tolist()

    def alloc_pages(self, view: GuestView, pages: U8) -> U64:
        """Allocate pages of the pool with this content, uint8 (n, 4096). Their pfns."""
        pfns = self.alloc(len(pages))
        view.write_pages(self.vaddrs(pfns), pages)
        return pfns

    def alloc_tables(self, view: GuestView, pages: U8) -> U64:
        """As alloc_pages, and make the pages read-only, as page tables must be."""
        pfns = self.alloc_pages(view, pages)
        self._set_flags(view, pfns, READ_ONLY)
        return pfns

    def _set_flags(self, view: GuestView, pfns: U64, flags: int) -> None:
        vaddrs = self.vaddrs(pfns)
        view.update_va_mapping(vaddrs, view.translate_pages(vaddrs) << np.uint64(PAGE_SHIFT) | np.uint64(flags))

    # -- page tables

    def link_tables(self, view: GuestView, tables: FrameRuns) -> U64:
        """Link L1 tables into the top-level table, by new tables in between.

        They replace what was linked there.

        One store replaces each top-level entry, so that an address translates either as before or as after.

        Returns:
            The pfns of the new tables.
        """
        allocated = [np.empty(0, np.uint64)]

        def store_tables(pages: U8) -> U64:
            allocated.append(self.alloc_tables(view, pages))
            return view.translate_pages(self.vaddrs(allocated[-1]))

        tops = write_page_tables(tables, LEVELS[self.width] - 2, store_tables, TABLE_FLAGS)
        flags = TABLE_FLAGS if self.width == 8 else PTE_P
        for first, count, frame in zip(tops.first.tolist(), tops.count.tolist(), tops.frame.tolist(), strict=True):
            view.mmu_update(
                [(view.guest_table, slot, frame << PAGE_SHIFT | flags) for slot in range(first, first + count)]
            )
        return np.concatenate(allocated)


def _find_initial_mapping_end(view: GuestView, base: int, pages: int, limit: int) -> int:
    """Return where the initial mapping ends, in pages; at most ``limit``."""
    while pages < limit:
        step = min(ENTRIES, limit - pages)
        try:
            view.translate(base + (pages << PAGE_SHIFT), step)
        except Fault as e:
            return e.address - base >> PAGE_SHIFT
        pages += step
    return pages
