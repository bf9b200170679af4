"""Which page a kernel on ModelHost uses for what, where each is mapped, and how page tables come into being.

All of it is kept by pfn and by address: mfns are asked of the page tables, because a restore changes every one.
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
from xenpv.memory.pagetables import place_of
from xenpv.memory.publish import TABLE_FLAGS, write_page_tables
from xenpv.runs import FrameRuns

# Where things are in the address space. A kernel knows where it was linked to; the others are of whole top entries that
# the builder leaves empty: 64-bit as litmus has them, 32-bit one GiB each.
LINKED_AT: dict[Width, int] = {8: 0xFFFF_FFFF_8000_0000, 4: 0xC000_0000}
MAPPED: dict[Width, range] = {8: range(0xFFFF_8800_0000_0000, 0xFFFF_C800_0000_0000), 4: range(1 << 31, 3 << 30)}
LIST: dict[Width, range] = {8: range(0xFFFF_C800_0000_0000, 0xFFFF_E000_0000_0000), 4: range(1 << 30, 1 << 31)}

READ_ONLY = PTE_P | PTE_A | PTE_D
PAGE = READ_ONLY | PTE_RW


@dataclass(frozen=True, slots=True)
class StartInfo:
    """What a kernel learns at boot: fields of start_info, its address, and where its boot stack ends."""

    address: int
    stack_end: int
    nr_pages: int
    shared_info: int  # a machine address
    mfn_list: int
    first_p2m_pfn: int
    nr_p2m_frames: int

    @classmethod
    def read(cls, view: GuestView) -> StartInfo:
        """By the registers of a vcpu that has just been started. GuestError if they lead to no start info."""
        address = view.register("si")
        data = view.read(address, START_INFO.size(view.width))
        info = START_INFO.read(data, view.width)
        if not bytes(info["magic"]).startswith(START_INFO_MAGIC[view.width]):
            raise GuestError(f"no start info at {address:#x}, to which the registers lead")
        names = ("nr_pages", "shared_info", "mfn_list", "first_p2m_pfn", "nr_p2m_frames")
        return cls(address, view.register("sp"), *(int(info[name]) for name in names))


class KernelPages:
    """The kernel's own pages, and the addresses of all that it has mapped.

    Own are those up to ``end``: what the builder put there, and, from behind the boot stack on, a pool of ``reserve``
    pages for tables. (An initrd that is not mapped is none of them: it is overwritten.) Pages of the pool beyond the
    initial mapping, and any other page that is wanted, are mapped in MAPPED, one behind the other; the first there is
    shared info.
    """

    def __init__(self, view: GuestView, start: StartInfo, base: int, reserve: int) -> None:
        self.width: Width = view.width
        self.base = base
        self._pfns, self._slots = np.empty(0, np.uint64), np.empty(0, np.int64)  # what is mapped where in MAPPED
        self._spare = np.empty(0, np.int64)
        self._tables = np.empty(0, np.uint64)  # L1 tables of MAPPED
        self._upper = np.empty(0, np.uint64)
        stack_end = start.stack_end - base >> PAGE_SHIFT
        self.mapped_by_builder = _end_of_mapping(view, base, stack_end, start.nr_pages)
        inside = range(stack_end, min(self.mapped_by_builder, stack_end + reserve))
        first = max(self.mapped_by_builder, start.first_p2m_pfn + start.nr_p2m_frames)
        outside = range(first, first + reserve - len(inside))
        self.end = outside.stop if outside else first
        if self.end >= start.nr_pages:
            what = f"{start.nr_pages} pages are too few for a kernel with {reserve} for its tables"
            raise RequestError(what, needed=self.end + 1, available=start.nr_pages)
        self._pool = list(inside)[::-1]
        self._extend(view, 1)
        self._write_slots(view, np.zeros(1, np.int64), np.array([start.shared_info >> PAGE_SHIFT], np.uint64))
        self._spare = self._spare[1:]
        more = np.arange(outside.start, outside.stop, dtype=np.uint64)
        data = view.read(start.mfn_list + outside.start * self.width, len(outside) * self.width)
        self.map(view, more, np.frombuffer(data, f"<u{self.width}").astype(np.uint64))
        self._pool = list(outside)[::-1] + self._pool

    # addresses

    def vaddrs(self, pfns: U64) -> U64:
        """The address of each page, all of which are mapped."""
        row = np.searchsorted(self._pfns, pfns)
        low = pfns < np.uint64(self.mapped_by_builder)
        slots = np.append(self._slots, 0)[np.where(low, -1, row)].astype(np.uint64)
        start = np.where(low, np.uint64(self.base), np.uint64(MAPPED[self.width].start))
        at: U64 = start + (np.where(low, pfns, slots) << np.uint64(PAGE_SHIFT))
        return at

    def unmapped(self, pfns: U64) -> U64:
        """Those that are mapped nowhere."""
        return pfns[(pfns >= np.uint64(self.mapped_by_builder)) & ~np.isin(pfns, self._pfns)]

    def map(self, view: GuestView, pfns: U64, mfns: U64) -> None:
        """Map pages that are mapped nowhere yet, writable. RequestError when there is no room."""
        if len(pfns) > len(self._spare):
            self._extend(view, -(-(len(pfns) - len(self._spare)) // ENTRIES))
        slots, self._spare = self._spare[: len(pfns)], self._spare[len(pfns) :]
        self._write_slots(view, slots, mfns)
        self._keep(np.append(self._pfns, pfns), np.append(self._slots, slots))

    def unmap(self, view: GuestView, pfns: U64) -> None:
        """Take away the mappings of pages that are mapped in MAPPED; of others there are none."""
        gone = np.isin(self._pfns, pfns)
        slots = self._slots[gone]
        view.update_va_mapping(self._at(slots), np.zeros(len(slots), np.uint64))
        self._keep(self._pfns[~gone], self._slots[~gone])
        self._spare = np.append(slots, self._spare)

    def renumber(self, pfns: U64, new: U64) -> None:
        """Pages have other pfns now; where they are mapped stays."""
        order = np.argsort(pfns)
        row = np.minimum(np.searchsorted(pfns[order], self._pfns), len(pfns) - 1)
        moved = pfns[order][row] == self._pfns
        self._keep(np.where(moved, new[order][row], self._pfns), self._slots)

    @property
    def shared_info(self) -> int:
        """Its address."""
        return MAPPED[self.width].start

    def map_shared_info(self, view: GuestView, machine: int) -> None:
        """Map shared info, the page at that machine address; 0: take the mapping away."""
        pte = machine | PAGE if machine else 0
        view.update_va_mapping(np.array([self.shared_info], np.uint64), np.array([pte], np.uint64))

    def _keep(self, pfns: U64, slots: I64) -> None:
        order = np.argsort(pfns)
        self._pfns, self._slots = pfns[order], slots[order]

    def _at(self, slots: I64) -> U64:
        return np.uint64(MAPPED[self.width].start) + (slots.astype(np.uint64) << np.uint64(PAGE_SHIFT))

    def _write_slots(self, view: GuestView, slots: I64, mfns: U64) -> None:
        view.update_va_mapping(self._at(slots), mfns << np.uint64(PAGE_SHIFT) | np.uint64(PAGE))

    def _extend(self, view: GuestView, tables: int) -> None:
        """More room in MAPPED: so many empty L1 tables behind those that are there."""
        first = len(self._tables)
        room = len(MAPPED[self.width]) >> PAGE_SHIFT
        if (first + tables) * ENTRIES > room:
            what = f"{(first + tables) * ENTRIES} pages do not fit into the addresses for them"
            raise RequestError(what, needed=(first + tables) * ENTRIES, available=room)
        self._tables = np.append(self._tables, self.put_tables(view, np.zeros((tables, PAGE_SIZE), np.uint8)))
        place = place_of(MAPPED[self.width].start) // ENTRIES
        places = np.arange(place, place + len(self._tables))
        frames = view.translate_pages(self.vaddrs(self._tables))
        old, self._upper = self._upper, self.hook(view, FrameRuns(places, np.ones_like(places), frames))
        self.give(view, old)
        self._spare = np.append(self._spare, np.arange(first * ENTRIES, len(self._tables) * ENTRIES))

    # pages of the pool

    def take(self, n: int) -> U64:
        """Pages of the pool, mapped and writable. RequestError when there are not so many left."""
        if n > len(self._pool):
            what = f"the kernel needs {n} more pages for tables, and has {len(self._pool)} left: reserve more"
            raise RequestError(what, needed=n, available=len(self._pool))
        taken = self._pool[len(self._pool) - n :][::-1]
        del self._pool[len(self._pool) - n :]
        return np.array(taken, np.uint64)

    def give(self, view: GuestView, pfns: U64) -> None:
        """Give pages back; those that were page tables are writable again."""
        self._set_flags(view, pfns, PAGE)
        self._pool += pfns[::-1].tolist()

    def put(self, view: GuestView, pages: U8) -> U64:
        """Write pages into some of the pool; their pfns."""
        pfns = self.take(len(pages))
        view.write_pages(self.vaddrs(pfns), pages)
        return pfns

    def put_tables(self, view: GuestView, pages: U8) -> U64:
        """As put, and make them read-only: Xen takes no page for a page table that can be written."""
        pfns = self.put(view, pages)
        self._set_flags(view, pfns, READ_ONLY)
        return pfns

    def _set_flags(self, view: GuestView, pfns: U64, flags: int) -> None:
        vaddrs = self.vaddrs(pfns)
        view.update_va_mapping(vaddrs, view.translate_pages(vaddrs) << np.uint64(PAGE_SHIFT) | np.uint64(flags))

    # page tables

    def hook(self, view: GuestView, tables: FrameRuns) -> U64:
        """Hang L1 tables into the top table, by new ones between; what hung there goes. The pfns of the new ones.

        Each top entry is replaced by one store, so that an address behind it leads to the old or to the new.
        """
        taken = [np.empty(0, np.uint64)]

        def put(pages: U8) -> U64:
            taken.append(self.put_tables(view, pages))
            return view.translate_pages(self.vaddrs(taken[-1]))

        tops = write_page_tables(tables, LEVELS[self.width] - 2, put, TABLE_FLAGS)
        flags = TABLE_FLAGS if self.width == 8 else PTE_P
        for first, count, frame in zip(tops.first.tolist(), tops.count.tolist(), tops.frame.tolist(), strict=True):
            view.mmu_update(
                [(view.guest_table, slot, frame << PAGE_SHIFT | flags) for slot in range(first, first + count)]
            )
        return np.concatenate(taken)


def _end_of_mapping(view: GuestView, base: int, pages: int, most: int) -> int:
    """Where the initial mapping ends, in pages: at the first that faults, or with the memory."""
    while pages < most:
        step = min(ENTRIES, most - pages)
        try:
            view.translate(base + (pages << PAGE_SHIFT), step)
        except Fault as e:
            return e.address - base >> PAGE_SHIFT
        pages += step
    return pages
