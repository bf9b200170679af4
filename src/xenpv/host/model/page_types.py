"""Xen's rules of page types, as ModelHost keeps them (xen.git:xen/arch/x86/mm.c, its head comment first).

A frame is of one type at a time, and changes it only when nothing uses it as that type: a table of one level,
descriptors, or mapped writable. So no guest can write its own page tables: Xen checks every entry when a frame becomes
a table (pinned, loaded as cr3, or named by an entry of a table), and each change of one after that.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import PTE_A, PTE_D, PTE_FRAME_MASK, PTE_NX, PTE_P, PTE_PSE, PTE_RW, PTE_US
from xenpv.frames import ENTRIES, I64, U64, Mask
from xenpv.host.model.frame_table import (
    PAE_XEN_L2,
    PINNED,
    RESERVED,
    VALIDATED,
    WRITABLE,
    FrameTable,
)
from xenpv.memory.pagetables import allowed_flags, frame, frames, is_xen_slot

DESCRIPTORS = 5
_GLOBAL = 1 << 8
_GUEST_KERNEL = 1 << 52  # how Xen marks a 64-bit kernel's pages, which it maps with US as all others
_NO_MFN = PTE_FRAME_MASK >> 12  # INVALID_MFN as far as an entry can hold it
_LOW_4G = 1 << 20


class Refused(Exception):
    """Xen's answer is no: an errno, and why."""

    def __init__(self, errno_: int, why: str) -> None:
        super().__init__(why)
        self.errno = errno_


@dataclass(frozen=True, slots=True)
class Owner:
    """A domain as page types see it. ``low_l3``: its PAE top tables must lie below 4 GiB."""

    number: int
    width: Width
    low_l3: bool = False


class PageTypes:
    """Types and references of all frames. ``dirtied`` is told of each table that comes, goes or changes."""

    def __init__(self, table: FrameTable, dirtied: Callable[[int, int], None]) -> None:
        self._frames = table
        self._rows = table.rows
        self._dirtied = dirtied
        self._linear: Counter[int] = Counter()  # entries of a table that map tables of its own level; < 0: mapped so

    # references

    def get(self, owner: Owner, mfn: int, kind: int, *, pae_xen_l2: bool = False) -> None:
        """Use a frame as a type, which takes a reference. Raises Refused, and has changed nothing then."""
        row = self._frames.row_of(mfn, owner.number)
        if row < 0:
            raise Refused(errno.EINVAL, f"mfn {mfn:#x} is not the domain's")
        rows = self._rows
        flag = PAE_XEN_L2 if pae_xen_l2 else 0
        if rows.types[row] == 0:
            rows.type[row] = kind
            rows.flags[row] = int(rows.flags[row]) & ~(VALIDATED | PAE_XEN_L2) | flag
            rows.types[row] += 1
            rows.count[row] += 1
            try:
                self._promote(owner, mfn, kind, pae_xen_l2=pae_xen_l2)
            except Refused:
                rows.types[row] -= 1
                rows.count[row] -= 1
                raise
            rows.flags[row] |= VALIDATED
            return
        if rows.type[row] != kind or int(rows.flags[row]) & PAE_XEN_L2 != flag:
            raise Refused(errno.EINVAL, f"mfn {mfn:#x} is used as type {rows.type[row]}, not {kind}")
        rows.types[row] += 1
        rows.count[row] += 1

    def put(self, owner: Owner, mfn: int) -> None:
        """Give back what get took."""
        rows = self._rows
        row = self._frames.row_of(mfn, owner.number)
        if rows.types[row] == 1 and 1 <= rows.type[row] <= 4:
            rows.flags[row] = int(rows.flags[row]) & ~VALIDATED
            self._demote(owner, mfn, int(rows.type[row]), pae_xen_l2=bool(rows.flags[row] & PAE_XEN_L2))
        rows.types[row] -= 1
        self._frames.drop(np.array([row]))

    # a frame becomes a table, or ceases to be one

    def _promote(self, owner: Owner, mfn: int, kind: int, *, pae_xen_l2: bool) -> None:
        if not 1 <= kind <= 4:
            return
        self._dirtied(owner.number, mfn)
        if kind == 1:
            self._promote_l1(owner, mfn)
            return
        entries = self._frames.entries(mfn)
        if kind == 3 and owner.width == 4:
            if owner.low_l3 and mfn >= _LOW_4G:
                raise Refused(errno.ERANGE, f"a PAE top table must lie below 4 GiB, not at mfn {mfn:#x}")
            entries[4:] = 0
            if not int(entries[3]) & PTE_P:
                raise Refused(errno.EINVAL, f"L3[3] of mfn {mfn:#x} is not present")
        xen = is_xen_slot(kind, owner.width, last_pae_l2=pae_xen_l2)
        done: list[int] = []
        try:
            for slot in np.flatnonzero(((entries & np.uint64(PTE_P)) != 0) & ~xen).tolist():
                self._get_entry(owner, mfn, kind, slot, int(entries[slot]))
                done.append(slot)
        except Refused:
            for slot in done:
                self._put_entry(owner, mfn, kind, int(entries[slot]))
            raise
        for slot in done:
            entries[slot] = _adjusted(int(entries[slot]), kind, owner.width)
        _fill_xen_slots(entries, kind, xen, mfn)

    def _demote(self, owner: Owner, mfn: int, kind: int, *, pae_xen_l2: bool) -> None:
        self._dirtied(owner.number, mfn)
        entries = self._frames.entries(mfn)
        present = (entries & np.uint64(PTE_P)) != 0
        if kind == 1:
            self._unmap(entries[present])
            return
        xen = is_xen_slot(kind, owner.width, last_pae_l2=pae_xen_l2)
        for slot in np.flatnonzero(present & ~xen).tolist():
            self._put_entry(owner, mfn, kind, int(entries[slot]))

    def _get_entry(self, owner: Owner, table: int, level: int, slot: int, pte: int) -> None:
        """Take what an entry of an L2, L3 or L4 table needs."""
        if pte & ~PTE_FRAME_MASK & ~allowed_flags(level, owner.width):
            raise Refused(errno.EINVAL, f"L{level}[{slot}] of mfn {table:#x} has flags that may not be ({pte:#x})")
        last = owner.width == 4 and level == 3 and slot == 3
        target = int(frame(pte))
        try:
            self.get(owner, target, level - 1, pae_xen_l2=last)
        except Refused as e:
            pae_l3 = owner.width == 4 and level == 3
            if e.errno != errno.EINVAL or pae_l3 or not self._get_linear(owner, table, level, pte):
                raise
            return
        if last and self._rows.types[self._frames.row_of(target, owner.number)] != 1:
            self.put(owner, target)
            raise Refused(errno.EINVAL, f"the L2 of L3[3] of mfn {table:#x} stands elsewhere too")

    def _get_linear(self, owner: Owner, table: int, level: int, pte: int) -> bool:
        """A table may map tables of its own level, read-only; those that do may not be mapped so themselves."""
        target = int(frame(pte))
        if pte & PTE_RW:
            return False
        if target == table:
            return True
        row = self._frames.row_of(target, owner.number)
        if row < 0 or self._linear[table] < 0 or self._linear[target] > 0:
            return False
        if self._rows.type[row] != level or not self._rows.flags[row] & VALIDATED:
            return False
        self._linear[table] += 1
        self._linear[target] -= 1
        self._rows.types[row] += 1
        self._rows.count[row] += 1
        return True

    def _put_entry(self, owner: Owner, table: int, level: int, pte: int) -> None:
        target = int(frame(pte))
        if not pte & PTE_P or target == table:
            return
        if self._rows.type[self._frames.row_of(target, owner.number)] == level:
            self._linear[table] -= 1
            self._linear[target] += 1
        self.put(owner, target)

    # L1 tables, all entries at once

    def _promote_l1(self, owner: Owner, mfn: int) -> None:
        entries = self._frames.entries(mfn)
        present = (entries & np.uint64(PTE_P)) != 0
        self._map(owner, mfn, entries[present], np.flatnonzero(present))
        if owner.width == 8:
            entries[present] = _adjusted_l1(entries[present])

    def _map(self, owner: Owner, table: int, ptes: U64, slots: I64) -> None:
        """Take what entries of an L1 table need, or refuse for the first that may not be."""
        mfns = frames(ptes)
        writable = (ptes & np.uint64(PTE_RW)) != 0
        answer = np.zeros(len(ptes), np.int64)
        ours = self._frames.owner(mfns) == owner.number
        rows = self._frames.row(mfns[ours])
        busy = writable.copy()
        busy[ours] &= (self._rows.types[rows] > 0) & (self._rows.type[rows] != WRITABLE)
        answer[busy | ~ours] = errno.EBUSY
        beyond = ~self._frames.valid(mfns)
        answer[beyond] = np.where(mfns[beyond] == _NO_MFN, errno.EINVAL, errno.EPERM)
        disallowed = ~(PTE_FRAME_MASK | allowed_flags(1, owner.width)) & (1 << 64) - 1
        answer[(ptes & np.uint64(disallowed)) != 0] = errno.EINVAL
        if answer.any():
            at = int(np.argmax(answer != 0))
            why = f"L1[{slots[at]}] of mfn {table:#x} may not be {int(ptes[at]):#x}"
            raise Refused(int(answer[at]), why)
        _add(self._rows.count, rows)
        rows = rows[writable]
        self._rows.type[rows] = WRITABLE
        _add(self._rows.types, rows)

    def _unmap(self, ptes: U64) -> None:
        rows = self._frames.row(frames(ptes))
        used, times = np.unique(rows[(ptes & np.uint64(PTE_RW)) != 0], return_counts=True)
        self._rows.types[used] -= times.astype(np.uint32)
        self._frames.drop(*np.unique(rows, return_counts=True))

    # what guests and toolstacks ask for

    def pin(self, owner: Owner, mfn: int, level: int) -> None:
        """MMUEXT_PIN_L1_TABLE to L4. A 32-bit domain's L4 is not there, and pinning one is ignored."""
        if level == 4 and owner.width == 4:
            return
        self.get(owner, mfn, level)
        row = self._frames.row_of(mfn, owner.number)
        if self._rows.flags[row] & PINNED:
            self.put(owner, mfn)
            raise Refused(errno.EINVAL, f"mfn {mfn:#x} already pinned")
        self._rows.flags[row] |= PINNED
        self._dirtied(owner.number, mfn)

    def unpin(self, owner: Owner, mfn: int) -> None:
        """MMUEXT_UNPIN_TABLE."""
        row = self._frames.row_of(mfn, owner.number)
        if row < 0:
            raise Refused(errno.EINVAL, f"mfn {mfn:#x} bad, or bad owner")
        if not self._rows.flags[row] & PINNED:
            raise Refused(errno.EINVAL, f"mfn {mfn:#x} not pinned")
        self._rows.flags[row] = int(self._rows.flags[row]) & ~PINNED
        self._dirtied(owner.number, mfn)
        self.put(owner, mfn)

    def update(self, owner: Owner, mfn: int, slot: int, pte: int) -> None:
        """MMU_NORMAL_PT_UPDATE of one entry: the new one is checked, what the old one took is given back."""
        row = self._frames.row_of(mfn, owner.number)
        if row < 0:
            raise Refused(errno.EINVAL, "Could not get page for normal update")
        kind = int(self._rows.type[row]) if self._rows.types[row] else 0
        if kind == DESCRIPTORS:
            raise Refused(errno.EINVAL, f"mfn {mfn:#x} holds descriptors")
        entries = self._frames.entries(mfn)
        old = int(entries[slot])
        if 1 <= kind <= 4:
            pae_xen_l2 = bool(self._rows.flags[row] & PAE_XEN_L2)
            if kind == 3 and owner.width == 4 and slot >= 3:
                raise Refused(errno.EINVAL, f"L3[{slot}] of mfn {mfn:#x} of a 32-bit domain stays as it is")
            if is_xen_slot(kind, owner.width, last_pae_l2=pae_xen_l2)[slot]:
                no = errno.EPERM if kind == 2 else errno.EINVAL
                raise Refused(no, f"L{kind}[{slot}] of mfn {mfn:#x} is Xen's own slot")
            if pte & PTE_P and kind == 1:
                self._map(owner, mfn, np.array([pte], np.uint64), np.array([slot]))
            elif pte & PTE_P:
                self._get_entry(owner, mfn, kind, slot, pte)
        entries[slot] = _adjusted(pte, kind, owner.width) if kind else pte
        self._dirtied(owner.number, mfn)
        if kind == 1 and old & PTE_P:
            self._unmap(np.array([old], np.uint64))
        elif 2 <= kind <= 4:
            self._put_entry(owner, mfn, kind, old)

    def update_l1(self, owner: Owner, mfn: int, slots: I64, ptes: U64) -> None:
        """What update does for one entry after another of an L1 table, at once where the order cannot tell."""
        row = self._frames.row_of(mfn, owner.number)
        entries = self._frames.entries(mfn)
        old = entries[slots]
        present, replaced = (ptes & np.uint64(PTE_P)) != 0, (old & np.uint64(PTE_P)) != 0
        other = frames(ptes) != frames(old)
        # A frame that one entry drops may be gone when the next one takes it: Xen sees that, all at once does not.
        again = np.isin(frames(ptes[present & other]), frames(old[replaced & other])).any()
        if self._rows.type[row] == 1 and not again and len(np.unique(slots)) == len(slots):
            try:
                self._map(owner, mfn, ptes[present], slots[present])
            except Refused:
                pass  # those in front of it are to be written all the same
            else:
                entries[slots] = ptes
                if owner.width == 8:
                    entries[slots[present]] = _adjusted_l1(ptes[present])
                self._dirtied(owner.number, mfn)
                self._unmap(old[replaced])
                return
        for slot, pte in zip(slots.tolist(), ptes.tolist(), strict=True):
            self.update(owner, mfn, slot, pte)

    def writable(self, owner: Owner, mfns: U64) -> Mask:
        """Which of an owner's frames could be mapped writable now."""
        ours: Mask = self._frames.owner(mfns) == owner.number
        rows = self._frames.row(mfns[ours])
        ours[ours] = (self._rows.types[rows] == 0) | (self._rows.type[rows] == WRITABLE)
        return ours

    def hold_writable(self, mfns: U64) -> I64:
        """Use frames that could be mapped writable as such, until let_go of what this gives."""
        rows = np.unique(self._frames.row(mfns))
        self._rows.type[rows] = WRITABLE
        self._rows.types[rows] += np.uint32(1)
        self._rows.count[rows] += np.uint32(1)
        return rows

    def let_go(self, rows: I64) -> None:
        """Give back what hold_writable took."""
        self._rows.types[rows] -= np.uint32(1)
        self._frames.drop(rows)

    def forget(self, owner: int) -> None:
        """A domain goes, and its tables with it."""
        for mfn in [mfn for mfn in self._linear if self._frames.row_of(mfn, owner) >= 0]:
            del self._linear[mfn]


def _add(column: np.ndarray, rows: I64) -> None:
    rows, times = np.unique(rows, return_counts=True)
    column[rows] += times.astype(np.uint32)


def _adjusted(pte: int, level: int, width: Width) -> int:
    """An entry as Xen stores it."""
    if not pte & PTE_P or level > 4:
        return pte
    if width == 4:
        return pte | PTE_US | PTE_RW if level == 3 else pte
    if level > 1:
        return pte | PTE_US
    return int(_adjusted_l1(np.array([pte], np.uint64))[0])


def _adjusted_l1(ptes: U64) -> U64:
    """Present L1 entries of a 64-bit guest: its kernel runs in ring 3 as its processes do, and so needs US."""
    kernel = (ptes & np.uint64(PTE_US)) == 0
    out = ptes | np.uint64(PTE_US)
    out[kernel] |= np.uint64(_GUEST_KERNEL)
    out[(out & np.uint64(_GUEST_KERNEL)) == 0] |= np.uint64(_GLOBAL)
    return out


def _fill_xen_slots(entries: U64, level: int, xen: Mask, mfn: int) -> None:
    """What a validated table has in Xen's slots: entries that are none of the guest's, and name no frame of it."""
    if level == 3 or not xen.any():
        return
    own = RESERVED // 2 << 21 | PTE_P | PTE_RW | PTE_A | PTE_D
    entries[xen] = own | (PTE_PSE if level == 2 else PTE_NX)
    if level == 4:
        slots = np.flatnonzero(xen)
        entries[slots[1]] = 0
        entries[slots[2]] = mfn << 12 | PTE_P | PTE_A | PTE_D | PTE_NX  # its linear page table
        assert len(entries) == ENTRIES
