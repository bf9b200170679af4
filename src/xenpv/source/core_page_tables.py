"""Finding the page tables of a PV core.

A core does not record which pages are page tables, so this module walks from the vcpus' top tables.

The walk goes down from each vcpu's top tables, level by level, whole arrays at once. It finds the tables of the kernel
and of the processes that ran. The tables of all other processes are below top tables that no vcpu names. Those are
recognised by the entries that Xen keeps in them. In a 64-bit L4 one entry names the L4 itself: the linear page table.
In a 32-bit guest Xen's entries end the last L2. Xen never allows a writable mapping of a page table. So a page is tried
as a top table only if the known tables map it, and never writable.

A domain that ran while it was dumped has pages of different moments. An entry may name a table that had been freed and
its page reused before that page was written. Two signs show such a stale table. It has entries that Xen does not
allow, or another table maps it writable.

Source: xen.git:xen/arch/x86/mm.c get_page_type(), init_xen_l4_slots(), init_xen_pae_l2_slots(), get_page_from_l1e() to
get_page_from_l4e().
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import LEVELS, PAE_L3_ENTRIES, PTE_FRAME_MASK, PTE_P, PTE_PSE, PTE_RW, XEN_PAE_L2_FIRST
from xenpv.frames import NO_FRAME, PAGES_PER_BATCH, U8, U64, Frames, Mask
from xenpv.memory.page_tables import NO_PFN, Translate, allowed_flags, as_ptes, is_xen_slot, pte_frames
from xenpv.runs import Runs

LINEAR_PT_SLOT = 258  # of an L4: xen.git:xen/arch/x86/include/asm/config.h
_MFN_END = 1 << 35  # 128 TiB: Xen knows no memory beyond (xen/arch/x86/include/asm/config.h, with CONFIG_BIGMEM)
_FORBIDDEN_IN_PAE_L3 = ~np.uint64(PTE_FRAME_MASK | allowed_flags(3, 4) & ~PTE_P)
_P, _RW, _PSE = np.uint64(PTE_P), np.uint64(PTE_RW), np.uint64(PTE_PSE)


class PageTables(NamedTuple):
    """Page tables by pfn.

    Attributes:
        pfns: The pfns, ascending.
        levels: The level of each, uint8 of the same shape.
        stale: How many pages are named as page tables without being any.
    """

    pfns: U64
    levels: U8
    stale: int = 0

    @classmethod
    def empty(cls) -> Self:
        """No page tables."""
        return cls(np.empty(0, np.uint64), np.empty(0, np.uint8))

    def level_of(self, pfns: U64) -> U8:
        """Return the level of each page, 0 for other pages; uint8 of the same shape."""
        if not len(self.pfns):
            return np.zeros(pfns.shape, np.uint8)
        row = np.minimum(np.searchsorted(self.pfns, pfns), len(self.pfns) - 1)
        return np.where(self.pfns[row] == pfns, self.levels[row], np.uint8(0))

    def with_tables(self, pfns: U64, level: int, stale: int) -> PageTables:
        """Return these and further tables of one level, and count stale ones.

        No pfn may be among these already.
        """
        joined = np.concatenate([self.pfns, pfns])
        order = np.argsort(joined)
        levels = np.concatenate([self.levels, np.full(len(pfns), level, np.uint8)])
        return PageTables(joined[order], levels[order], self.stale + stale)


@dataclass(frozen=True, slots=True)
class PageTableSearch:
    """The search for all page tables of one core.

    Attributes:
        raw: The pages as they are in the core, with mfns in page tables.
        width: Bytes of the guest's unsigned long.
        pfns_of: Translates mfns to pfns, NO_FRAME for those that are not in the core.
        mfns_of: The inverse.
        runs: The pfns in the core.
    """

    raw: Frames
    width: Width
    pfns_of: Translate
    mfns_of: Translate
    runs: Runs

    def find(self, top_pfns: U64) -> PageTables:
        """Return all page tables. ``top_pfns`` are the vcpus' top tables."""
        page_tables = self._walk(top_pfns, PageTables.empty(), None)
        mapped, writable = self._mapped_pages(page_tables.pfns[page_tables.levels == 1])
        suspect = writable.is_marked(page_tables.pfns)
        if suspect.any():  # entries of a stale table mark pages wrongly: repeat the walk without it
            mapped, writable = self._mapped_pages(page_tables.pfns[~suspect & (page_tables.levels == 1)])
            page_tables = self._walk(top_pfns, PageTables.empty(), writable)
        candidates = mapped.difference(writable)
        candidates = candidates[page_tables.level_of(candidates) == 0]
        other_tops = self._select_l4(candidates) if self.width == 8 else self._select_pae_l3(candidates, page_tables)
        return self._walk(other_tops, page_tables, writable)

    def _walk(self, top_pfns: U64, known: PageTables, writable: _PageMarks | None) -> PageTables:
        """Return the known tables and all that are reached from some top tables.

        Args:
            top_pfns: The pfns of the top tables.
            known: Tables that need not be walked again.
            writable: Pages that some table maps writable: they are no tables.
        """
        page_tables, pfns = known, top_pfns
        for level in range(LEVELS[self.width], 0, -1):
            pfns = np.unique(pfns)
            named = pfns[page_tables.level_of(pfns) == 0]
            read_only = named if writable is None else named[~writable.is_marked(named)]
            tables = [batch[self._look_like_tables(batch, level)] for batch in _batches(read_only)]
            pfns = np.concatenate([read_only[:0], *tables])
            page_tables = page_tables.with_tables(pfns, level, stale=len(named) - len(pfns))
            if level > 1:
                children = [self._children(batch, level) for batch in _batches(pfns)]
                pfns = np.unique(np.concatenate([np.empty(0, np.uint64), *children]))
        return page_tables

    def _look_like_tables(self, pfns: U64, level: int) -> Mask:
        """Return which pages can be page tables of the level.

        Half of the frames in their entries must be the domain's. Not all: an L1 may map shared info, grants and
        devices. A page may also have come while the core was written, and be missing in the core's list.
        """
        entries = as_ptes(self.raw.pages(pfns))
        present = (entries & _P != 0) & ~is_xen_slot(level, self.width, last_pae_l2=True)
        mfns = pte_frames(entries)
        valid = present.copy()
        valid[present] = self.pfns_of(mfns[present]) != NO_FRAME
        if level > 1:
            valid &= entries & ~np.uint64(PTE_FRAME_MASK | allowed_flags(level, self.width)) == 0
        accepted = valid.sum(axis=1) >= (present & ~valid).sum(axis=1)
        accepted &= ~(present & (mfns >= _MFN_END) & (mfns != NO_PFN)).any(axis=1)
        if level == 4:
            accepted &= _has_linear_page_table(entries, self.mfns_of(pfns))
        if level == 3 and self.width == 4:
            accepted &= (entries[:, PAE_L3_ENTRIES:] == 0).all(axis=1)
        return np.asarray(accepted)

    def _children(self, pfns: U64, level: int) -> U64:
        """Return the pfns of the tables that tables of this level name, each once."""
        entries = as_ptes(self.raw.pages(pfns))
        names_table = (entries & (_P | _PSE) == _P) & ~is_xen_slot(level, self.width)
        return self._unique_pfns(pte_frames(entries[names_table]))

    def _unique_pfns(self, mfns: U64) -> U64:
        """Return the pfns of those mfns that are in the core, ascending, each once."""
        pfns = self.pfns_of(np.unique(mfns))
        return np.unique(pfns[pfns != NO_FRAME])

    def _select_l4(self, candidates: U64) -> U64:
        """Return the pages that are L4 tables, by Xen's linear page table in each."""
        tables = [
            batch[_has_linear_page_table(as_ptes(self.raw.pages(batch)), self.mfns_of(batch))]
            for batch in _batches(candidates)
        ]
        return np.concatenate([candidates[:0], *tables])

    def _select_pae_l3(self, candidates: U64, known: PageTables) -> U64:
        """Return the pages that are L3 tables of a 32-bit guest, and those known.

        Xen clears all after their four entries. It demands the last of the four, and ends its L2 with Xen's own
        entries, which are the same in all (xen.git:xen/arch/x86/mm.c promote_l3_table()).
        """
        selected, xen_entries = [np.empty(0, np.uint64)], None
        for batch in (*_batches(known.pfns[known.levels == 3]), *_batches(candidates)):
            entries = as_ptes(self.raw.pages(batch))
            last = entries[:, PAE_L3_ENTRIES - 1]
            valid = (entries[:, PAE_L3_ENTRIES:] == 0).all(axis=1) & (last & _FORBIDDEN_IN_PAE_L3 == _P)
            l2_pfns = self.pfns_of(pte_frames(last))
            rows = np.flatnonzero(valid & (l2_pfns != NO_FRAME))
            l2_ends = as_ptes(self.raw.pages(l2_pfns[rows]))[:, XEN_PAE_L2_FIRST:]
            if xen_entries is None and len(l2_ends):
                xen_entries = l2_ends[:1]
            if xen_entries is not None:
                selected.append(batch[rows[(l2_ends == xen_entries).all(axis=1)]])
        return np.concatenate(selected)

    def _mapped_pages(self, l1_pfns: U64) -> tuple[_PageMarks, _PageMarks]:
        """Return the pages that L1 tables map, and those that they map writable."""
        mapped, writable = _PageMarks(self.runs), _PageMarks(self.runs)
        for batch in _batches(l1_pfns):
            entries = as_ptes(self.raw.pages(batch))
            mapped.mark(self._unique_pfns(pte_frames(entries[entries & _P != 0])))
            writable.mark(self._unique_pfns(pte_frames(entries[entries & (_P | _RW) == _P | _RW])))
        return mapped, writable


class _PageMarks:
    """A set of pages of the core: one byte for each page that it has."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._marked = np.zeros(runs.total, np.bool_)

    def mark(self, pfns: U64) -> None:
        """Add pages of the core."""
        self._marked[self._runs.positions(pfns)] = True

    def is_marked(self, pfns: U64) -> Mask:
        """Return which pages of the core are in the set."""
        return np.asarray(self._marked[self._runs.positions(pfns)])

    def difference(self, other: _PageMarks) -> U64:
        """Return the pfns that are in this set and not in the other, ascending."""
        return self._runs.pfns_at(np.flatnonzero(self._marked & ~other._marked))


def _has_linear_page_table(entries: U64, mfns: U64) -> Mask:
    """Return which tables have the entry of an L4 that names the table itself."""
    slot = entries[:, LINEAR_PT_SLOT]
    return np.asarray((slot & _P != 0) & (pte_frames(slot) == mfns))


def _batches(pfns: U64) -> Iterator[U64]:
    for start in range(0, len(pfns), PAGES_PER_BATCH):
        yield pfns[start : start + PAGES_PER_BATCH]
