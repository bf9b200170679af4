"""The view that a guest program has of the model.

Hypercalls, xenstore, and memory through its own page tables.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import NoReturn

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import LEVELS, PTE_P, PTE_RW, VCPU_GUEST_CONTEXT
from xenpv.errors import Fault, HostError
from xenpv.frames import ENTRIES, I64, PAGE_SHIFT, PAGE_SIZE, U8, U64, DomId
from xenpv.host import xenstore_nodes
from xenpv.host.model.hypervisor import Hypervisor
from xenpv.host.model.xenstore import ModelXenStore
from xenpv.memory.page_tables import is_canonical, is_xen_vaddr, pte_frame, pte_frames, pte_index


class GuestShutDown(Exception):
    """The guest shut down: its program ends here."""


class GuestView:
    """A running guest.

    Hypercalls raise HostError; accesses to memory raise Fault, as a guest takes a page fault.
    """

    def __init__(self, hypervisor: Hypervisor, store: ModelXenStore, domid: DomId) -> None:
        self._hypervisor, self._store = hypervisor, store
        self.domid = domid
        self.width: Width = hypervisor.domain("run", domid).width

    # -- memory

    def read(self, vaddr: int, length: int) -> bytes:
        """Read bytes at a virtual address."""
        first, last = vaddr // PAGE_SIZE, (vaddr + max(length, 1) - 1) // PAGE_SIZE
        mfns = self.translate(first * PAGE_SIZE, last - first + 1)
        return self._hypervisor.frames.read(mfns).tobytes()[vaddr % PAGE_SIZE :][:length]

    def write(self, vaddr: int, data: bytes) -> None:
        """Write bytes at a virtual address.

        Writes nothing if one of the pages is not writable.
        """
        if not data:
            return
        first, last = vaddr // PAGE_SIZE, (vaddr + len(data) - 1) // PAGE_SIZE
        mfns = self.translate(first * PAGE_SIZE, last - first + 1, write=True)
        head = min(-vaddr % PAGE_SIZE, len(data))
        tail = (len(data) - head) % PAGE_SIZE
        content = np.frombuffer(data, np.uint8)
        if head:
            self._hypervisor.frames.page(int(mfns[0]))[vaddr % PAGE_SIZE :][:head] = content[:head]
        whole_mfns = mfns[1 if head else 0 : len(mfns) - (1 if tail else 0)]
        self._hypervisor.frames.write(whole_mfns, content[head : len(content) - tail].reshape(-1, PAGE_SIZE))
        if tail:
            self._hypervisor.frames.page(int(mfns[-1]))[:tail] = content[len(content) - tail :]
        self._hypervisor.mark_dirty(self.domid, mfns)

    def read_pages(self, vaddrs: U64) -> U8:
        """Read the pages at page-aligned addresses, in any order: uint8 (n, 4096), a copy."""
        return self._hypervisor.frames.read(self.translate_pages(vaddrs))

    def write_pages(self, vaddrs: U64, pages: U8) -> None:
        """Write whole pages, uint8 (n, 4096).

        Writes nothing if one of them is not writable.
        """
        mfns = self.translate_pages(vaddrs, write=True)
        self._hypervisor.frames.write(mfns, pages)
        self._hypervisor.mark_dirty(self.domid, mfns)

    def translate(self, vaddr: int, pages: int = 1, *, write: bool = False) -> U64:
        """Return the frames of consecutive virtual pages. See translate_pages."""
        if not 0 <= vaddr <= (1 << 64) - pages * PAGE_SIZE:
            self._fault(vaddr, LEVELS[self.width], 0)
        step: U64 = np.arange(pages, dtype=np.uint64) * np.uint64(PAGE_SIZE)
        return self.translate_pages(np.uint64(vaddr) + step, write=write)

    def translate_pages(self, vaddrs: U64, *, write: bool = False) -> U64:
        """Return the frame of each virtual page.

        Fault if one is not present, or with ``write`` not writable.
        """
        out = np.empty(len(vaddrs), np.uint64)
        required = np.uint64(PTE_P | (PTE_RW if write else 0))
        for table, rows, slots in self._by_table(vaddrs, write=write):
            ptes = self._hypervisor.frames.entries(table)[slots]
            bad = np.flatnonzero((ptes & required) != required)
            if len(bad):
                lowest = bad[np.argmin(slots[bad])]
                self._fault(int(vaddrs[rows[lowest]]), 1, int(ptes[lowest]))
            out[rows] = pte_frames(ptes)
        return out

    def _by_table(self, vaddrs: U64, *, write: bool) -> Iterator[tuple[int, I64, I64]]:
        """Yield the L1 tables that map the addresses.

        For each its mfn, the rows of its addresses, and their slots.
        """
        if not len(vaddrs):
            return
        order = np.argsort(vaddrs, kind="stable")
        pages = vaddrs[order] >> np.uint64(PAGE_SHIFT)
        starts = np.flatnonzero(np.diff(pages // np.uint64(ENTRIES), prepend=np.uint64(1 << 63)))
        for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
            rows = order[start:stop]
            slots = (pages[start:stop] % np.uint64(ENTRIES)).astype(np.int64)
            yield self._l1_table(int(vaddrs[rows[0]]), write=write), rows, slots

    def _l1_table(self, vaddr: int, *, write: bool) -> int:
        """Return the mfn of the L1 table that maps the address."""
        table, levels = self.guest_table, LEVELS[self.width]
        beyond = not is_canonical(vaddr) if self.width == 8 else vaddr >= 1 << 32
        if beyond or is_xen_vaddr(vaddr, self.width):
            self._fault(vaddr, levels, 0)
        for level in range(levels, 1, -1):
            pte = int(self._hypervisor.frames.entries(table)[pte_index(vaddr, level)])
            if not pte & PTE_P or (write and not pte & PTE_RW):
                self._fault(vaddr, level, pte)
            table = int(pte_frame(pte))
        return table

    @staticmethod
    def _fault(vaddr: int, level: int, pte: int) -> NoReturn:
        entry = pte_index(vaddr, level)
        reason = "is read-only" if pte & PTE_P else "is not present"
        raise Fault(
            f"{vaddr:#x}: L{level}[{entry}] {reason} ({pte:#x})", space="vaddr", address=vaddr, level=level, entry=entry
        )

    # -- hypercalls

    @property
    def guest_table(self) -> int:
        """The mfn of the top-level page table."""
        return self._hypervisor.vcpu_frames(self.domid)[0]

    def mmu_update(self, updates: Sequence[tuple[int, int, int]]) -> None:
        """Write page table entries, up to the first that Xen refuses.

        Args:
            updates: The mfn of the table, the slot and the entry of each.
        """
        self._hypervisor.mmu_update(self.domid, updates)

    def update_va_mapping(self, vaddrs: U64, ptes: U64) -> None:
        """Write the L1 entries that map addresses, up to the first refused one.

        HostError: EINVAL if there is no L1 table; otherwise as mmu_update.
        """
        try:
            tables = list(self._by_table(vaddrs, write=False))
        except Fault as e:
            message = f"dom{self.domid}: update_va_mapping: {e}"
            raise HostError(message, op="update_va_mapping", domid=self.domid, errno=errno.EINVAL) from None
        for table, rows, slots in tables:
            self._hypervisor.update_l1_entries(self.domid, table, slots, ptes[rows])

    def machphys_update(self, mfns: U64, pfns: U64) -> None:
        """Set the pfn of each frame in the m2p."""
        self._hypervisor.machphys_update(self.domid, mfns, pfns)

    def pin(self, mfn: int, level: int) -> None:
        """Pin a page table of that level."""
        self._hypervisor.pin(self.domid, mfn, level)

    def unpin(self, mfn: int) -> None:
        """Unpin a page table."""
        self._hypervisor.unpin(self.domid, mfn)

    def load_cr3(self, mfn: int, *, user: bool = False) -> None:
        """Load the top-level page table, or that of the user half."""
        self._hypervisor.load_cr3(self.domid, mfn, user=user)

    def populate_physmap(self, pfns: U64, order: int = 0) -> U64:
        """Ask Xen for memory. Fewer mfns than pfns if it has no more."""
        return self._hypervisor.populate_physmap(self.domid, pfns, order)

    def decrease_reservation(self, mfns: U64, order: int = 0) -> int:
        """Return memory to Xen. Return how many extents Xen took."""
        return self._hypervisor.decrease_reservation(self.domid, mfns, order)

    def m2p(self, mfns: U64) -> U64:
        """Return the pfn of each frame. Every guest may read the m2p."""
        return self._hypervisor.m2p(mfns)

    @property
    def memory_map(self) -> int | None:
        """How many pages from pfn 0 on XENMEM_memory_map reports.

        None if the builder set no memory map.
        """
        return self._hypervisor.domain("memory_map", self.domid).memory_map_pages

    def shutdown(self, reason: int, record: int = 0) -> NoReturn:
        """SCHEDOP_shutdown: shut down, which ends the program.

        The call's result, in rax or eax, is 0; a toolstack that cancels a suspend makes it 1.

        Args:
            reason: SHUTDOWN_*.
            record: The third argument, in rdx or edx: a suspending guest passes the mfn of its start info.
        """
        self._set_registers(ax=0, dx=record)
        self._hypervisor.shutdown(self.domid, reason)
        raise GuestShutDown

    # -- registers, shared info, events, xenstore

    def register(self, name: str) -> int:
        """Return a register, by the name that both widths share: "si", "sp"."""
        context = VCPU_GUEST_CONTEXT.read(self._hypervisor.vcpu_context(self.domid, 0), self.width)
        return int(context["user_regs"][self._register_name(name)])

    def _set_registers(self, **values: int) -> None:
        context = np.frombuffer(bytearray(self._hypervisor.vcpu_context(self.domid, 0)), VCPU_GUEST_CONTEXT[self.width])
        for name, value in values.items():
            context["user_regs"][self._register_name(name)] = value
        self._hypervisor.set_vcpu_context(self.domid, 0, context.tobytes())

    def _register_name(self, name: str) -> str:
        return f"{'r' if self.width == 8 else 'e'}{name}"

    @property
    def shared_info(self) -> bytes:
        """The 4096 bytes of the shared info page."""
        return self._hypervisor.shared_info(self.domid)

    def write_shared_info(self, data: bytes, offset: int = 0) -> None:
        """Write into the shared info page."""
        self._hypervisor.write_shared_info(self.domid, data, offset)

    def alloc_event_channel(self) -> int:
        """EVTCHNOP_alloc_unbound: return a new port, to which dom0 may bind."""
        return self._hypervisor.alloc_event_channel(self.domid)

    def consume_event(self, port: int) -> bool:
        """Return whether an event is pending on a port, and clear it."""
        return self._hypervisor.consume_event(self.domid, port)

    def xenstore_read(self, path: str) -> bytes | None:
        """Return one of the domain's own nodes in xenstore, such as "control/shutdown".

        None if it does not exist.
        """
        return self._store.read(f"{xenstore_nodes.home(self.domid)}/{path}")

    def xenstore_write(self, path: str, value: bytes) -> None:
        """Write one of the domain's own nodes."""
        self._store.write(f"{xenstore_nodes.home(self.domid)}/{path}", value)
