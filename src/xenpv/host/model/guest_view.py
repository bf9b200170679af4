"""What a guest program sees of ModelHost: hypercalls, and its memory through its own page tables."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import LEVELS, PTE_P, PTE_RW, VCPU_GUEST_CONTEXT
from xenpv.errors import Fault, HostError
from xenpv.frames import ENTRIES, I64, PAGE_SHIFT, PAGE_SIZE, U8, U64, DomId
from xenpv.memory.pagetables import canonical, entry_index, frame, frames, in_xen

if TYPE_CHECKING:
    from xenpv.host.model.host import ModelHost


class Stopped(Exception):
    """The guest shut down: its program goes no further."""


class GuestView:
    """A running guest. Hypercalls raise HostError, accesses to memory Fault, as a guest would take a page fault."""

    def __init__(self, host: ModelHost, domid: DomId) -> None:
        self._host = host
        self.domid = domid
        self.width: Width = host.info(domid).width

    # memory

    def read(self, vaddr: int, length: int) -> bytes:
        """Bytes at a virtual address."""
        first, last = vaddr // PAGE_SIZE, (vaddr + max(length, 1) - 1) // PAGE_SIZE
        mfns = self.translate(first * PAGE_SIZE, last - first + 1)
        return self._host.frames.read(mfns).tobytes()[vaddr % PAGE_SIZE :][:length]

    def write(self, vaddr: int, data: bytes) -> None:
        """Write bytes at a virtual address. Nothing is written when one of the pages may not be."""
        if not data:
            return
        first, last = vaddr // PAGE_SIZE, (vaddr + len(data) - 1) // PAGE_SIZE
        mfns = self.translate(first * PAGE_SIZE, last - first + 1, write=True)
        head = min(-vaddr % PAGE_SIZE, len(data))
        tail = (len(data) - head) % PAGE_SIZE
        content = np.frombuffer(data, np.uint8)
        if head:
            self._host.frames.page(int(mfns[0]))[vaddr % PAGE_SIZE :][:head] = content[:head]
        whole = mfns[1 if head else 0 : len(mfns) - (1 if tail else 0)]
        self._host.frames.write(whole, content[head : len(content) - tail].reshape(-1, PAGE_SIZE))
        if tail:
            self._host.frames.page(int(mfns[-1]))[:tail] = content[len(content) - tail :]
        self._host.guest_wrote(self.domid, mfns)

    def read_pages(self, vaddrs: U64) -> U8:
        """The pages at addresses that are multiples of a page, in any order: uint8 (n, 4096), a copy."""
        return self._host.frames.read(self.frames_at(vaddrs))

    def write_pages(self, vaddrs: U64, pages: U8) -> None:
        """Write whole pages, uint8 (n, 4096). Nothing is written when one of them may not be."""
        mfns = self.frames_at(vaddrs, write=True)
        self._host.frames.write(mfns, pages)
        self._host.guest_wrote(self.domid, mfns)

    def translate(self, vaddr: int, pages: int = 1, *, write: bool = False) -> U64:
        """The frames behind consecutive virtual pages; with ``write``, only if all may be written."""
        if not 0 <= vaddr <= (1 << 64) - pages * PAGE_SIZE:
            self._fault(vaddr, LEVELS[self.width], 0)
        step: U64 = np.arange(pages, dtype=np.uint64) * np.uint64(PAGE_SIZE)
        return self.frames_at(np.uint64(vaddr) + step, write=write)

    def frames_at(self, vaddrs: U64, *, write: bool = False) -> U64:
        """The frame behind each virtual page; with ``write``, only if all may be written."""
        out = np.empty(len(vaddrs), np.uint64)
        need = np.uint64(PTE_P | (PTE_RW if write else 0))
        for table, rows, slots in self._by_table(vaddrs, write=write):
            ptes = self._host.frames.entries(table)[slots]
            bad = np.flatnonzero((ptes & need) != need)
            if len(bad):
                lowest = bad[np.argmin(slots[bad])]
                self._fault(int(vaddrs[rows[lowest]]), 1, int(ptes[lowest]))
            out[rows] = frames(ptes)
        return out

    def _by_table(self, vaddrs: U64, *, write: bool) -> Iterator[tuple[int, I64, I64]]:
        """The mfn of each L1 table that translates some of the addresses, which of them, and its slots."""
        if not len(vaddrs):
            return
        order = np.argsort(vaddrs, kind="stable")
        pages = vaddrs[order] >> np.uint64(PAGE_SHIFT)
        starts = np.flatnonzero(np.diff(pages // np.uint64(ENTRIES), prepend=np.uint64(1 << 63)))
        for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
            rows = order[start:stop]
            slots = (pages[start:stop] % np.uint64(ENTRIES)).astype(np.int64)
            yield self._l1(int(vaddrs[rows[0]]), write=write), rows, slots

    def _l1(self, vaddr: int, *, write: bool) -> int:
        """The mfn of the L1 table that translates the address."""
        table, levels = self._host.held_by_vcpu(self.domid)[0], LEVELS[self.width]
        beyond = not canonical(vaddr) if self.width == 8 else vaddr >= 1 << 32
        if beyond or in_xen(vaddr, self.width):
            self._fault(vaddr, levels, 0)
        for level in range(levels, 1, -1):
            pte = int(self._host.frames.entries(table)[entry_index(vaddr, level)])
            if not pte & PTE_P or (write and not pte & PTE_RW):
                self._fault(vaddr, level, pte)
            table = int(frame(pte))
        return table

    @staticmethod
    def _fault(vaddr: int, level: int, pte: int) -> NoReturn:
        entry = entry_index(vaddr, level)
        why = "is read-only" if pte & PTE_P else "is not present"
        raise Fault(
            f"{vaddr:#x}: L{level}[{entry}] {why} ({pte:#x})", space="vaddr", address=vaddr, level=level, entry=entry
        )

    # hypercalls

    @property
    def top(self) -> int:
        """The mfn of the top table."""
        return self._host.held_by_vcpu(self.domid)[0]

    def mmu_update(self, updates: Sequence[tuple[int, int, int]]) -> None:
        """(mfn of the table, slot, entry) each."""
        self._host.mmu_update(self.domid, updates)

    def update_va_mapping(self, vaddrs: U64, ptes: U64) -> None:
        """Write the L1 entries that map some addresses, as a multicall does: up to the first that Xen refuses.

        HostError: EINVAL where there is no L1 table, else what mmu_update says.
        """
        try:
            todo = list(self._by_table(vaddrs, write=False))
        except Fault as e:
            what = f"dom{self.domid}: update_va_mapping: {e}"
            raise HostError(what, op="update_va_mapping", domid=self.domid, errno=errno.EINVAL) from None
        for table, rows, slots in todo:
            self._host.update_l1(self.domid, table, slots, ptes[rows])

    def machphys_update(self, mfns: U64, pfns: U64) -> None:
        self._host.machphys_update(self.domid, mfns, pfns)

    def pin(self, mfn: int, level: int) -> None:
        self._host.pin(self.domid, mfn, level)

    def unpin(self, mfn: int) -> None:
        self._host.unpin(self.domid, mfn)

    def load_top(self, mfn: int, *, user: bool = False) -> None:
        self._host.load_top(self.domid, mfn, user=user)

    def populate_physmap(self, pfns: U64, order: int = 0) -> U64:
        return self._host.populate_physmap(self.domid, pfns, order)

    def decrease_reservation(self, mfns: U64, order: int = 0) -> int:
        return self._host.decrease_reservation(self.domid, mfns, order)

    def m2p(self, mfns: U64) -> U64:
        """What the machine-to-phys table says, which every guest may read."""
        return self._host.m2p(mfns)

    @property
    def memory_map(self) -> int | None:
        """How many pages, from pfn 0 on, it is told it has (XENMEM_memory_map); None where the builder told nobody."""
        return self._host.told_memory(self.domid)

    def shutdown(self, reason: int, record: int = 0) -> NoReturn:
        """sched_op shutdown: the program ends here.

        ``record`` is the third argument, which a suspending guest gives for the toolstack: the mfn of its start info,
        found in rdx or edx. The call's result is in rax or eax: 0, unless a toolstack that cancels makes it 1.
        """
        self._set_registers(ax=0, dx=record)
        self._host.shutdown(self.domid, reason)
        raise Stopped

    # the rest of its world

    def register(self, name: str) -> int:
        """A register of its vcpu where it last entered the guest, by the name both widths share: "si", "sp", "ax"."""
        context = VCPU_GUEST_CONTEXT.read(self._host.vcpu_context(self.domid, 0), self.width)
        return int(context["user_regs"][self._name(name)])

    def _set_registers(self, **values: int) -> None:
        context = np.frombuffer(bytearray(self._host.vcpu_context(self.domid, 0)), VCPU_GUEST_CONTEXT[self.width])
        for name, value in values.items():
            context["user_regs"][self._name(name)] = value
        self._host.set_vcpu_context(self.domid, 0, context.tobytes())

    def _name(self, name: str) -> str:
        return f"{'r' if self.width == 8 else 'e'}{name}"

    @property
    def shared_info(self) -> bytes:
        return self._host.shared_info(self.domid)

    def write_shared_info(self, data: bytes, offset: int = 0) -> None:
        self._host.write_shared_info(self.domid, data, offset)

    def alloc_event_channel(self) -> int:
        """A port of its own that others may notify (EVTCHNOP_alloc_unbound)."""
        return self._host.alloc_event_channel(self.domid)

    def take_event(self, port: int) -> bool:
        """Whether an event came since it was last asked."""
        return self._host.take_event(self.domid, port)

    def store_read(self, path: str) -> bytes | None:
        """A node of its own in xenstore: "control/shutdown"."""
        return self._host.store.read(f"/local/domain/{self.domid}/{path}")

    def store_write(self, path: str, value: bytes) -> None:
        self._host.store.write(f"/local/domain/{self.domid}/{path}", value)
