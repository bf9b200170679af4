"""Xen's rules for page types, as the model keeps them.

A frame has one type at a time: a page table of one level, descriptors, or writable. Its type changes only while nothing
uses it as that type. So no guest can write its own page tables. Xen checks every entry when a frame becomes a table
(because it is pinned, loaded as cr3, or named by an entry of another table), and then each change of an entry.

Source: xen.git:xen/arch/x86/mm.c, in the first place its head comment
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import PTE_A, PTE_D, PTE_FRAME_MASK, PTE_NX, PTE_P, PTE_PSE, PTE_RW, PTE_US
from xenpv.cpu.descriptors import describe_refused, refused_descriptors
from xenpv.frames import ENTRIES, I64, U64, Mask, first_bad
from xenpv.host.model.frame_table import (
    PAE_XEN_L2,
    PINNED,
    RESERVED,
    VALIDATED,
    WRITABLE,
    FrameTable,
)
from xenpv.memory.page_tables import allowed_flags, is_xen_slot, pte_frame, pte_frames

DESCRIPTORS = 5
_GLOBAL = 1 << 8
_GUEST_KERNEL = 1 << 52  # _PAGE_GUEST_KERNEL: Xen's mark for pages of a 64-bit kernel, which are mapped with US, too
_INVALID_MFN = PTE_FRAME_MASK >> 12  # as far as an entry can hold it
_MFN_4_GIB = 1 << 20


class HypercallError(Exception):
    """Xen refuses a hypercall: with an errno, and for a reason."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.errno = number


@dataclass(frozen=True, slots=True)
class Owner:
    """A domain as page types know it.

    ``low_l3``: its PAE top-level tables must lie below 4 GiB.
    """

    id: int
    width: Width
    low_l3: bool = False


class PageTypes:
    """Types and references of all frames.

    Args:
        table: The frames.
        mark_dirty: Called with owner and mfn of each table that is promoted, demoted or changed.
    """

    def __init__(self, table: FrameTable, mark_dirty: Callable[[int, int], None]) -> None:
        self._frames = table
        self._rows = table.rows
        self._mark_dirty = mark_dirty
        # Entries that map a table of the same level: > 0 for the table that has them, < 0 for one that they map.
        self._linear_count: Counter[int] = Counter()

    # -- references

    def get_page_type(self, owner: Owner, mfn: int, page_type: int, *, pae_xen_l2: bool = False) -> None:
        """Take a reference to a frame as a page type.

        If that is impossible, HypercallError, and no reference changes; a frame without any has no type then.

        No frame is met again within its own promotion: an entry names a table of the level below, or, read-only, a
        validated table of its own level.
        """
        row = self._frames.row_if_owned(mfn, owner.id)
        if row < 0:
            raise HypercallError(errno.EINVAL, f"mfn {mfn:#x} is not the domain's")
        rows = self._rows
        flag = PAE_XEN_L2 if pae_xen_l2 else 0
        if rows.type_count[row] == 0:
            rows.type[row] = page_type
            rows.flags[row] = int(rows.flags[row]) & ~(VALIDATED | PAE_XEN_L2) | flag
            rows.type_count[row] += 1
            rows.ref_count[row] += 1
            try:
                self._promote(owner, mfn, page_type, pae_xen_l2=pae_xen_l2)
            except HypercallError:
                rows.type_count[row] -= 1
                rows.ref_count[row] -= 1
                raise
            rows.flags[row] |= VALIDATED
            return
        if rows.type[row] != page_type or int(rows.flags[row]) & PAE_XEN_L2 != flag:
            raise HypercallError(errno.EINVAL, f"mfn {mfn:#x} is in use as type {rows.type[row]}, not {page_type}")
        rows.type_count[row] += 1
        rows.ref_count[row] += 1

    def put_page_type(self, owner: Owner, mfn: int) -> None:
        """Drop a reference that get_page_type took."""
        rows = self._rows
        row = self._frames.row_if_owned(mfn, owner.id)
        if rows.type_count[row] == 1 and 1 <= rows.type[row] <= 4:
            rows.flags[row] = int(rows.flags[row]) & ~VALIDATED
            self._demote(owner, mfn, int(rows.type[row]), pae_xen_l2=bool(rows.flags[row] & PAE_XEN_L2))
        rows.type_count[row] -= 1
        self._frames.put_refs(np.array([row]))

    # -- promotion and demotion: a frame becomes a table, or ceases to be one

    def _promote(self, owner: Owner, mfn: int, page_type: int, *, pae_xen_l2: bool) -> None:
        if page_type == DESCRIPTORS:
            page = self._frames.page(mfn)
            if (index := first_bad(refused_descriptors(page[None], owner.width)[0])) is not None:
                raise HypercallError(errno.EINVAL, f"mfn {mfn:#x}: {describe_refused(page, index)}")
        if not 1 <= page_type <= 4:
            return
        self._mark_dirty(owner.id, mfn)
        if page_type == 1:
            self._promote_l1(owner, mfn)
            return
        entries = self._frames.entries(mfn)
        if page_type == 3 and owner.width == 4:
            if owner.low_l3 and mfn >= _MFN_4_GIB:
                raise HypercallError(errno.ERANGE, f"a PAE top table must lie below 4 GiB, not at mfn {mfn:#x}")
            entries[4:] = 0
            if not int(entries[3]) & PTE_P:
                raise HypercallError(errno.EINVAL, f"L3[3] of mfn {mfn:#x} is not present")
        xen = is_xen_slot(page_type, owner.width, last_pae_l2=pae_xen_l2)
        referenced_slots: list[int] = []
        try:
            for slot in np.flatnonzero(((entries & np.uint64(PTE_P)) != 0) & ~xen).tolist():
                self._get_page_from_entry(owner, mfn, page_type, slot, int(entries[slot]))
                referenced_slots.append(slot)
        except HypercallError:
            for slot in referenced_slots:
                self._put_page_from_entry(owner, mfn, page_type, int(entries[slot]))
            raise
        for slot in referenced_slots:
            entries[slot] = _adjust_entry(int(entries[slot]), page_type, owner.width)
        _fill_xen_slots(entries, page_type, xen, mfn)

    def _demote(self, owner: Owner, mfn: int, page_type: int, *, pae_xen_l2: bool) -> None:
        self._mark_dirty(owner.id, mfn)
        entries = self._frames.entries(mfn)
        present = (entries & np.uint64(PTE_P)) != 0
        if page_type == 1:
            self._put_pages_from_l1(entries[present])
            return
        xen = is_xen_slot(page_type, owner.width, last_pae_l2=pae_xen_l2)
        for slot in np.flatnonzero(present & ~xen).tolist():
            self._put_page_from_entry(owner, mfn, page_type, int(entries[slot]))

    def _get_page_from_entry(self, owner: Owner, table: int, level: int, slot: int, pte: int) -> None:
        """Take the references of an entry of an L2, L3 or L4 table."""
        if pte & ~PTE_FRAME_MASK & ~allowed_flags(level, owner.width):
            raise HypercallError(errno.EINVAL, f"L{level}[{slot}] of mfn {table:#x} has forbidden flags ({pte:#x})")
        last = owner.width == 4 and level == 3 and slot == 3
        target = int(pte_frame(pte))
        try:
            self.get_page_type(owner, target, level - 1, pae_xen_l2=last)
        except HypercallError as e:
            pae_l3 = owner.width == 4 and level == 3
            if e.errno != errno.EINVAL or pae_l3 or not self._get_linear_pagetable(owner, table, level, pte):
                raise
            return
        if last and self._rows.type_count[self._frames.row_if_owned(target, owner.id)] != 1:
            self.put_page_type(owner, target)
            raise HypercallError(errno.EINVAL, f"the L2 of L3[3] of mfn {table:#x} is in use elsewhere")

    def _get_linear_pagetable(self, owner: Owner, table: int, level: int, pte: int) -> bool:
        """Take the reference of an entry that maps a table of its own level.

        Return whether that is allowed.

        It must be read-only, and a table that has such entries must not be mapped by one.
        """
        target = int(pte_frame(pte))
        if pte & PTE_RW:
            return False
        if target == table:
            return True
        row = self._frames.row_if_owned(target, owner.id)
        if row < 0 or self._linear_count[table] < 0 or self._linear_count[target] > 0:
            return False
        if self._rows.type[row] != level or not self._rows.flags[row] & VALIDATED:
            return False
        self._linear_count[table] += 1
        self._linear_count[target] -= 1
        self._rows.type_count[row] += 1
        self._rows.ref_count[row] += 1
        return True

    def _put_page_from_entry(self, owner: Owner, table: int, level: int, pte: int) -> None:
        target = int(pte_frame(pte))
        if not pte & PTE_P or target == table:
            return
        if self._rows.type[self._frames.row_if_owned(target, owner.id)] == level:
            self._linear_count[table] -= 1
            self._linear_count[target] += 1
        self.put_page_type(owner, target)

    # -- L1 tables, all entries at once

    def _promote_l1(self, owner: Owner, mfn: int) -> None:
        entries = self._frames.entries(mfn)
        present = (entries & np.uint64(PTE_P)) != 0
        self._get_pages_from_l1(owner, mfn, entries[present], np.flatnonzero(present))
        if owner.width == 8:
            entries[present] = _adjust_l1_entries(entries[present])

    def _get_pages_from_l1(self, owner: Owner, table: int, ptes: U64, slots: I64) -> None:
        """Take the references of entries of an L1 table.

        If one is bad, HypercallError, and nothing changes.
        """
        mfns = pte_frames(ptes)
        writable = (ptes & np.uint64(PTE_RW)) != 0
        errnos = np.zeros(len(ptes), np.int64)
        owned = self._frames.owners(mfns) == owner.id
        rows = self._frames.rows_of(mfns[owned])
        busy = writable.copy()
        busy[owned] &= (self._rows.type_count[rows] > 0) & (self._rows.type[rows] != WRITABLE)
        errnos[busy | ~owned] = errno.EBUSY
        beyond = ~self._frames.valid(mfns)
        errnos[beyond] = np.where(mfns[beyond] == _INVALID_MFN, errno.EINVAL, errno.EPERM)
        disallowed = ~(PTE_FRAME_MASK | allowed_flags(1, owner.width)) & (1 << 64) - 1
        errnos[(ptes & np.uint64(disallowed)) != 0] = errno.EINVAL
        if (first := first_bad(errnos != 0)) is not None:
            reason = f"L1[{slots[first]}] of mfn {table:#x} must not be {int(ptes[first]):#x}"
            raise HypercallError(int(errnos[first]), reason)
        _increment(self._rows.ref_count, rows)
        rows = rows[writable]
        self._rows.type[rows] = WRITABLE
        _increment(self._rows.type_count, rows)

    def _put_pages_from_l1(self, ptes: U64) -> None:
        rows = self._frames.rows_of(pte_frames(ptes))
        written, counts = np.unique(rows[(ptes & np.uint64(PTE_RW)) != 0], return_counts=True)
        self._rows.type_count[written] -= counts.astype(np.uint32)
        self._frames.put_refs(*np.unique(rows, return_counts=True))

    # -- what hypercalls ask for

    def pin(self, owner: Owner, mfn: int, level: int) -> None:
        """MMUEXT_PIN_L1_TABLE to L4. A 32-bit domain has no L4; Xen ignores that one.

        Raises HypercallError.
        """
        if level == 4 and owner.width == 4:
            return
        self.get_page_type(owner, mfn, level)
        row = self._frames.row_if_owned(mfn, owner.id)
        if self._rows.flags[row] & PINNED:
            self.put_page_type(owner, mfn)
            raise HypercallError(errno.EINVAL, f"mfn {mfn:#x} is already pinned")
        self._rows.flags[row] |= PINNED
        self._mark_dirty(owner.id, mfn)

    def unpin(self, owner: Owner, mfn: int) -> None:
        """MMUEXT_UNPIN_TABLE. Raises HypercallError."""
        row = self._frames.row_if_owned(mfn, owner.id)
        if row < 0:
            raise HypercallError(errno.EINVAL, f"mfn {mfn:#x} does not exist, or is not the domain's")
        if not self._rows.flags[row] & PINNED:
            raise HypercallError(errno.EINVAL, f"mfn {mfn:#x} is not pinned")
        self._rows.flags[row] = int(self._rows.flags[row]) & ~PINNED
        self._mark_dirty(owner.id, mfn)
        self.put_page_type(owner, mfn)

    def update_entry(self, owner: Owner, mfn: int, slot: int, pte: int) -> None:
        """MMU_NORMAL_PT_UPDATE: take the new entry's references, drop the old one's.

        Raises HypercallError.
        """
        row = self._frames.row_if_owned(mfn, owner.id)
        if row < 0:
            raise HypercallError(errno.EINVAL, f"mfn {mfn:#x} is not the domain's")
        page_type = int(self._rows.type[row]) if self._rows.type_count[row] else 0
        if page_type == DESCRIPTORS:
            raise HypercallError(errno.EINVAL, f"mfn {mfn:#x} holds descriptors")
        entries = self._frames.entries(mfn)
        old = int(entries[slot])
        if 1 <= page_type <= 4:
            pae_xen_l2 = bool(self._rows.flags[row] & PAE_XEN_L2)
            if page_type == 3 and owner.width == 4 and slot >= 3:
                raise HypercallError(errno.EINVAL, f"L3[{slot}] of mfn {mfn:#x} of a 32-bit domain cannot change")
            if is_xen_slot(page_type, owner.width, last_pae_l2=pae_xen_l2)[slot]:
                number = errno.EPERM if page_type == 2 else errno.EINVAL
                raise HypercallError(number, f"L{page_type}[{slot}] of mfn {mfn:#x} is one of Xen's slots")
            if pte & PTE_P and page_type == 1:
                self._get_pages_from_l1(owner, mfn, np.array([pte], np.uint64), np.array([slot]))
            elif pte & PTE_P:
                self._get_page_from_entry(owner, mfn, page_type, slot, pte)
        entries[slot] = _adjust_entry(pte, page_type, owner.width) if page_type else pte
        self._mark_dirty(owner.id, mfn)
        if page_type == 1 and old & PTE_P:
            self._put_pages_from_l1(np.array([old], np.uint64))
        elif 2 <= page_type <= 4:
            self._put_page_from_entry(owner, mfn, page_type, old)

    def update_l1_entries(self, owner: Owner, mfn: int, slots: I64, ptes: U64) -> None:
        """Update entries of an L1 table, with the result that update_entry has one by one.

        Raises HypercallError.
        """
        row = self._frames.row_if_owned(mfn, owner.id)
        entries = self._frames.entries(mfn)
        old = entries[slots]
        present, was_present = (ptes & np.uint64(PTE_P)) != 0, (old & np.uint64(PTE_P)) != 0
        moved = pte_frames(ptes) != pte_frames(old)
        # If one entry drops the last reference to a frame, a later one cannot take it. All at once would not notice.
        reused = np.isin(pte_frames(ptes[present & moved]), pte_frames(old[was_present & moved])).any()
        if self._rows.type[row] == 1 and not reused and len(np.unique(slots)) == len(slots):
            try:
                self._get_pages_from_l1(owner, mfn, ptes[present], slots[present])
            except HypercallError:
                pass  # the entries before it must be written: one by one below
            else:
                entries[slots] = ptes
                if owner.width == 8:
                    entries[slots[present]] = _adjust_l1_entries(ptes[present])
                self._mark_dirty(owner.id, mfn)
                self._put_pages_from_l1(old[was_present])
                return
        for slot, pte in zip(slots.tolist(), ptes.tolist(), strict=True):
            self.update_entry(owner, mfn, slot, pte)

    def can_map_writable(self, owner: Owner, mfns: U64) -> Mask:
        """Return which frames are the owner's and could be mapped writable now."""
        owned: Mask = self._frames.owners(mfns) == owner.id
        rows = self._frames.rows_of(mfns[owned])
        owned[owned] = (self._rows.type_count[rows] == 0) | (self._rows.type[rows] == WRITABLE)
        return owned

    def get_writable(self, mfns: U64) -> I64:
        """Take a reference to frames as writable, which must be possible.

        Their rows, for put_writable.
        """
        rows = np.unique(self._frames.rows_of(mfns))
        self._rows.type[rows] = WRITABLE
        self._rows.type_count[rows] += np.uint32(1)
        self._rows.ref_count[rows] += np.uint32(1)
        return rows

    def put_writable(self, rows: I64) -> None:
        """Drop the references that get_writable took."""
        self._rows.type_count[rows] -= np.uint32(1)
        self._frames.put_refs(rows)

    def forget_owner(self, owner: int) -> None:
        """Forget the linear page tables of a domain that is being destroyed."""
        for mfn in [mfn for mfn in self._linear_count if self._frames.row_if_owned(mfn, owner) >= 0]:
            del self._linear_count[mfn]


def _increment(column: np.ndarray, rows: I64) -> None:
    """Add 1 for each row, which may appear several times."""
    rows, counts = np.unique(rows, return_counts=True)
    column[rows] += counts.astype(np.uint32)


def _adjust_entry(pte: int, level: int, width: Width) -> int:
    """Return an entry as Xen stores it (adjust_guest_l2e and so on)."""
    if not pte & PTE_P or level > 4:
        return pte
    if width == 4:
        return pte | PTE_US | PTE_RW if level == 3 else pte
    if level > 1:
        return pte | PTE_US
    return int(_adjust_l1_entries(np.array([pte], np.uint64))[0])


def _adjust_l1_entries(ptes: U64) -> U64:
    """Return present L1 entries of a 64-bit guest as Xen stores them.

    They have US, because its kernel runs in ring 3.
    """
    kernel = (ptes & np.uint64(PTE_US)) == 0
    out = ptes | np.uint64(PTE_US)
    out[kernel] |= np.uint64(_GUEST_KERNEL)
    out[(out & np.uint64(_GUEST_KERNEL)) == 0] |= np.uint64(_GLOBAL)
    return out


def _fill_xen_slots(entries: U64, level: int, xen: Mask, mfn: int) -> None:
    """Fill Xen's slots of a validated table. They name no frame of the guest."""
    if level == 3 or not xen.any():
        return
    xen_pte = RESERVED // 2 << 21 | PTE_P | PTE_RW | PTE_A | PTE_D
    entries[xen] = xen_pte | (PTE_PSE if level == 2 else PTE_NX)
    if level == 4:
        slots = np.flatnonzero(xen)
        entries[slots[1]] = 0
        entries[slots[2]] = mfn << 12 | PTE_P | PTE_A | PTE_D | PTE_NX  # its linear page table
        assert len(entries) == ENTRIES
