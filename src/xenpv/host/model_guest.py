"""What a guest program sees of ModelHost: hypercalls, and its memory through its own page tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import LEVELS, PTE_P, PTE_RW
from xenpv.errors import Fault
from xenpv.frames import ENTRIES, PAGE_SIZE, U64, DomId
from xenpv.memory.pagetables import canonical, entry_index, frame, frames, in_xen

if TYPE_CHECKING:
    from xenpv.host.model import ModelHost


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

    def translate(self, vaddr: int, pages: int = 1, *, write: bool = False) -> U64:
        """The frames behind consecutive virtual pages; with ``write``, only if all may be written."""
        out = np.empty(pages, np.uint64)
        done = 0
        while done < pages:
            at = vaddr + done * PAGE_SIZE
            slot = entry_index(at, 1)
            n = min(ENTRIES - slot, pages - done)
            ptes = self._l1(at, write=write)[slot : slot + n]
            need = np.uint64(PTE_P | (PTE_RW if write else 0))
            bad = (ptes & need) != need
            if bad.any():
                self._fault(at + int(np.argmax(bad)) * PAGE_SIZE, 1, int(ptes[np.argmax(bad)]))
            out[done : done + n] = frames(ptes)
            done += n
        return out

    def _l1(self, vaddr: int, *, write: bool) -> U64:
        """The entries of the L1 table that translates the address."""
        table, levels = self._host.held_by_vcpu(self.domid)[0], LEVELS[self.width]
        beyond = not 0 <= vaddr < 1 << 64 or not canonical(vaddr) if self.width == 8 else not 0 <= vaddr < 1 << 32
        if beyond or in_xen(vaddr, self.width):
            self._fault(vaddr, levels, 0)
        for level in range(levels, 1, -1):
            pte = int(self._host.frames.entries(table)[entry_index(vaddr, level)])
            if not pte & PTE_P or (write and not pte & PTE_RW):
                self._fault(vaddr, level, pte)
            table = int(frame(pte))
        return self._host.frames.entries(table)

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

    def shutdown(self, reason: int) -> NoReturn:
        """sched_op shutdown: the program ends here."""
        self._host.shutdown(self.domid, reason)
        raise Stopped

    # the rest of its world

    @property
    def shared_info(self) -> bytes:
        return self._host.shared_info(self.domid)

    def write_shared_info(self, data: bytes, offset: int = 0) -> None:
        self._host.write_shared_info(self.domid, data, offset)

    def take_event(self, port: int) -> bool:
        """Whether an event came since it was last asked."""
        return self._host.take_event(self.domid, port)

    def store_read(self, path: str) -> bytes | None:
        """A node of its own in xenstore: "control/shutdown"."""
        return self._host.store.read(f"/local/domain/{self.domid}/{path}")

    def store_write(self, path: str, value: bytes) -> None:
        self._host.store.write(f"/local/domain/{self.domid}/{path}", value)
