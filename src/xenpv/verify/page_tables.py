"""Checks every page table of a saved PV domain, a batch of tables at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from xenpv.abi.x86 import LEVELS, PTE_FRAME_MASK, PTE_P, PTE_PSE, PTE_RW
from xenpv.findings import Findings, Rule
from xenpv.frames import (
    I64,
    IS_POPULATED,
    IS_TABLE,
    PAGES_PER_BATCH,
    PINNED,
    U8,
    U64,
    Mask,
    type_name,
)
from xenpv.io.progress import Progress, ProgressCallback
from xenpv.memory.page_tables import (
    allowed_flags,
    as_ptes,
    entries_beyond,
    flag_names,
    is_xen_slot,
    leaks_l1tf,
    pte_frames,
)
from xenpv.source.saved import SavedDomain
from xenpv.verify import rules
from xenpv.verify.heuristics import outliers


@dataclass
class _Entries:
    """Some entries of page tables of one level.

    Attributes:
        level: Level of the tables.
        tables: pfns of the tables, uint64.
        row: Row of each entry's table in ``tables``.
        slot: Number of each entry within its table, 0 to 511.
        pte: The entries themselves, uint64.
        target: The pfn that each entry names, uint64.
        target_type: Page type of each target.
    """

    level: int
    tables: U64
    row: I64
    slot: I64
    pte: U64
    target: U64
    target_type: U8

    def place(self, i: int) -> dict[str, int]:
        """Return the fields of a finding that locate an entry."""
        return {"pfn": int(self.tables[self.row[i]]), "level": self.level, "entry": int(self.slot[i])}

    def describe(self, i: int) -> str:
        """Return an entry's place and value, for a message."""
        pte, place = int(self.pte[i]), self.place(i)
        return f"L{self.level}[{place['entry']}] of pfn {place['pfn']:#x} ({pte:#x}, {flag_names(pte)})"


class PageTableChecks:
    """Checks all page tables of a domain.

    ``gdt_pfns`` are all GDT frames, ascending, uint64.
    """

    def __init__(self, saved: SavedDomain, findings: Findings, gdt_pfns: U64) -> None:
        self.saved = saved
        self.findings = findings
        self.gdt_pfns = gdt_pfns
        self._width = saved.contents.width
        self._referenced: list[U64] = []  # pfns of tables that other tables name
        self._last_pae_l2s: list[int] = []  # pfns of L2 tables at entry 3 of a 32-bit guest's L3
        self._linear: list[tuple[U64, I64, U8, U64]] = []  # pfn, entry and level of linear entries, and their targets

    def run(self, progress: ProgressCallback | None = None) -> None:
        """Check all tables.

        Findings name the table's pfn, level and entry, and the file offset of the entry.
        """
        tables = self.saved.contents.index.pfns(IS_TABLE)
        types = self.saved.frames.types(tables)
        levels = types & 7
        self._check_levels(tables[levels > LEVELS[self._width]])
        checked = 0
        for level in (4, 3, 2, 1):  # from the top: an L3 tells which L2 has Xen's slots
            level_tables = tables[levels == level]
            for i in range(0, len(level_tables), PAGES_PER_BATCH):
                batch = level_tables[i : i + PAGES_PER_BATCH]
                self._check_batch(level, batch)
                checked += len(batch)
                if progress is not None:
                    progress(Progress(checked, len(tables), "checking page tables", "tables"))
        self._check_orphans(tables, types)
        self._check_linear(tables, types)
        if self.saved.pages_complete:
            self._check_earlier_tables()

    def _check_levels(self, pfns: U64) -> None:
        """Report tables of a level that a guest of this width has not."""

        def describe(pfn: np.uint64) -> tuple[str, dict[str, int]]:
            return f"pfn {int(pfn):#x} is an L4 table, in a 32-bit guest", {"pfn": int(pfn), "level": 4}

        self.findings.add_each(rules.TABLE_LEVEL, pfns, describe)

    def _add(self, rule: Rule, rows: I64, entries: _Entries, problem: str) -> None:
        """Add a finding for each of the entries at ``rows``.

        "{target}" in the problem is what the entry names.
        """

        def describe(i: int) -> tuple[str, dict[str, int | None]]:
            place = entries.place(i)
            target = f"pfn {int(entries.target[i]):#x} ({type_name(int(entries.target_type[i]))})"
            message = f"{entries.describe(i)} {problem.format(target=target)}"
            return message, {"offset": self._entry_offset(place), **place}

        self.findings.add_each(rule, rows, describe)

    def _entry_offset(self, place: dict[str, int]) -> int | None:
        """Return the byte offset of an entry in the file, None if its page is not there."""
        page = self._page_offset(place["pfn"])
        return None if page is None else page + place["entry"] * 8

    def _page_offset(self, pfn: int) -> int | None:
        offset = int(self.saved.contents.index.offsets(np.array([pfn], np.uint64))[0])
        return offset if offset >= 0 else None

    def _entries_at(self, level: int, tables: U64, ptes: U64, mask: Mask) -> _Entries:
        """Return the entries of some tables at which a mask of shape (n, 512) is set."""
        row, slot = np.nonzero(mask)
        pte = ptes[row, slot]
        target = pte_frames(pte)
        return _Entries(level, tables, row, slot, pte, target, self.saved.frames.types(target))

    def _check_batch(self, level: int, tables: U64) -> None:
        """Check some tables of one level."""
        pages, tables = self._read_tables(level, tables)
        if not len(tables):
            return
        ptes = self._check_xen_slots(level, tables, as_ptes(pages))
        entries = self._entries_at(level, tables, ptes, ptes & np.uint64(PTE_P) != 0)
        end_pfn = self.saved.contents.end_pfn
        beyond = entries.target > np.uint64(max(end_pfn, 0))  # as entries_beyond()
        problem = f"names {{target}}, beyond the last pfn {end_pfn:#x}"
        self._add(rules.PTE_RANGE, np.flatnonzero(beyond), entries, problem)
        refused = entries.pte & np.uint64(~(allowed_flags(level, self._width) | PTE_FRAME_MASK) & (1 << 64) - 1)
        if level > 1:
            superpage = entries.pte & np.uint64(PTE_PSE) != 0
            self._add(rules.SUPERPAGE, np.flatnonzero(superpage), entries, "is a superpage")
            refused[superpage] = 0
        self._add(rules.PTE_FLAGS, np.flatnonzero(refused), entries, "has flags that Xen refuses")
        missing = ~beyond & ~IS_POPULATED[entries.target_type]
        if self.saved.pages_complete:
            self._add(rules.PTE_MISSING, np.flatnonzero(missing), entries, "names {target}, which has no page")
        populated = ~beyond & ~missing
        if level > 1:
            self._check_upper_entries(entries, populated)
        else:
            self._check_l1_entries(entries, populated)
        self._check_outliers(level, tables, ptes)
        leaks = leaks_l1tf(ptes, level)
        if leaks.any():
            not_present = self._entries_at(level, tables, ptes, leaks)
            self._add(rules.PTE_L1TF, np.arange(len(not_present.pte)), not_present, "is not present and names {target}")

    def _read_tables(self, level: int, tables: U64) -> tuple[U8, U64]:
        """Return the pages of those tables that can be read, and their pfns.

        Add a finding for each other table.
        """
        frames = self.saved.frames
        has_content = frames.has_content(tables)  # asked at once: a stream may name many tables without content
        if self.saved.pages_complete:
            self.findings.add_each(
                rules.TABLE_CONTENT,
                tables[~has_content].tolist(),
                lambda pfn: (str(frames.missing_content(pfn)), {"pfn": pfn, "level": level}),
            )
        return frames.pages(tables[has_content]), tables[has_content]

    def _check_xen_slots(self, level: int, tables: U64, ptes: U64) -> U64:
        """Check that Xen's own slots are empty; return the entries without them."""
        slots = is_xen_slot(level, self._width)
        if self._width == 4 and level == 2:
            is_last = np.isin(tables, np.array(self._last_pae_l2s, np.uint64))
            slots = is_last[:, None] & is_xen_slot(2, 4, last_pae_l2=True)
        filled = (ptes != 0) & slots
        if not np.any(filled):
            return ptes
        entries = self._entries_at(level, tables, ptes, filled)
        self._add(rules.XEN_SLOT, np.arange(len(entries.pte)), entries, "fills a slot that is Xen's own")
        return np.where(filled, np.uint64(0), ptes)

    def _check_upper_entries(self, entries: _Entries, populated: Mask) -> None:
        """Check entries of L2 to L4 tables.

        Each names a table one level below, or one of its own level read-only.
        """
        target_level = entries.target_type & 7
        is_table = IS_TABLE[entries.target_type]
        below = is_table & (target_level == entries.level - 1)
        linear = is_table & (target_level == entries.level)
        writable = entries.pte & np.uint64(PTE_RW) != 0
        wrong = np.flatnonzero(populated & ~below & ~linear)
        self._add(rules.PTE_LEVEL, wrong, entries, f"names {{target}}, not an L{entries.level - 1} table")
        writable_linear = np.flatnonzero(linear & writable)
        self._add(rules.LINEAR_TABLE, writable_linear, entries, "maps {target} of its own level writable")
        readable = np.flatnonzero(populated & linear & ~writable)
        if len(readable):
            pfns, slots = entries.tables[entries.row[readable]], entries.slot[readable]
            levels = np.full(len(readable), entries.level, np.uint8)
            self._linear.append((pfns, slots, levels, entries.target[readable]))
        self._referenced.append(entries.target[below | linear])
        if entries.level == 3 and self._width == 4:
            self._check_pae_l3s(entries, populated)

    def _check_pae_l3s(self, entries: _Entries, populated: Mask) -> None:
        """Check entry 3 of a 32-bit guest's L3 tables.

        It is present, and nothing else names its L2.
        """
        is_last = entries.slot == 3
        l2s = entries.target[is_last & populated].tolist()
        self._last_pae_l2s += l2s
        for row, table in enumerate(entries.tables.tolist()):
            if not np.any((entries.row == row) & is_last):
                place = {"pfn": table, "level": 3, "entry": 3}
                message = f"L3[3] of pfn {table:#x} is not present"
                self.findings.add(rules.PAE_L3, message, offset=self._entry_offset(place), **place)
        for l2 in sorted({pfn for pfn in l2s if np.count_nonzero(entries.target == np.uint64(pfn)) > 1}):
            message = f"the L2 at L3[3], pfn {l2:#x}, is named more than once"
            self.findings.add(rules.PAE_L3, message, offset=self._page_offset(l2), pfn=l2, level=2)

    def _check_l1_entries(self, entries: _Entries, populated: Mask) -> None:
        """Check entries of L1 tables: none maps a page table or a GDT frame writable."""
        writable = populated & (entries.pte & np.uint64(PTE_RW) != 0)
        table = np.flatnonzero(writable & IS_TABLE[entries.target_type])
        self._add(rules.PTE_WRITABLE, table, entries, "maps the page table {target} writable")
        if len(self.gdt_pfns):
            gdt = np.flatnonzero(writable & np.isin(entries.target, self.gdt_pfns))
            self._add(rules.PTE_WRITABLE, gdt, entries, "maps the GDT frame {target} writable")

    def _check_earlier_tables(self) -> None:
        """Check tables that were sent again later, be it as other pages.

        A restorer localises each of them as it comes; what else is wrong with them is gone by the end.
        """
        end_pfn = self.saved.contents.end_pfn
        for pfns, types, offsets, pages in self.saved.earlier_tables():
            for level in np.unique(types & 7).tolist():
                of_level = types & 7 == level
                ptes = as_ptes(pages[of_level])
                entries = self._entries_at(level, pfns[of_level], ptes, entries_beyond(ptes, end_pfn))
                describe = partial(_describe_earlier, entries, offsets[of_level])
                self.findings.add_each(rules.PTE_RANGE, np.arange(len(entries.pte)), describe)

    def _check_outliers(self, level: int, tables: U64, ptes: U64) -> None:
        """Report entries that no rule of Xen forbids and no kernel writes.

        heuristics.py finds them.
        """
        for mask, problem in outliers(level, ptes):
            if mask.any():
                entries = self._entries_at(level, tables, ptes, mask)
                self._add(rules.PTE_OUTLIER, np.arange(len(entries.pte)), entries, problem)

    def _check_linear(self, tables: U64, types: U8) -> None:
        """Check that Xen takes the tables that map tables of their own level.

        It counts such entries and such uses of a table in one number, as long as the domain lives: a table cannot have
        both. And the table that is mapped must have been promoted. A restorer promotes the vcpus' top tables first,
        and then pins in the order of pfns. A table may always map itself.
        """
        if not self._linear:
            return
        pfns, slots, levels, targets = (np.concatenate(column) for column in zip(*self._linear, strict=True))
        first = {"pfn": int(pfns[0]), "level": int(levels[0]), "entry": int(slots[0])}
        message = f"entries that map a table of their own level: {len(pfns)}; Xen with pv-linear-pt=false refuses them"
        self.findings.add(rules.LINEAR_TABLE_USED, message, offset=self._entry_offset(first), **first)
        tops = [top for _, vcpu_tops in sorted(self._tops_by_vcpu().items()) for top in vcpu_tops]
        order = np.array(list(dict.fromkeys(tops)), np.uint64)
        order = np.append(order, np.setdiff1d(tables[types & PINNED != 0], order))
        other = pfns != targets
        both = np.isin(pfns, targets[other]) & other
        rank, target_rank = _rank(pfns, order), _rank(targets, order)
        # Other tables may have been promoted with an earlier top table.
        early = other & ~both & (levels == LEVELS[self._width]) & (rank >= 0) & (rank < target_rank)
        for mask, problem in (
            (both, "maps {target:#x}, a table of its own level, and is mapped by one itself"),
            (early, "maps {target:#x}, a table of its own level that is promoted only after it"),
        ):

            def describe(i: int, problem: str = problem) -> tuple[str, dict[str, int | None]]:
                place = {"pfn": int(pfns[i]), "level": int(levels[i]), "entry": int(slots[i])}
                message = f"L{place['level']}[{place['entry']}] of pfn {place['pfn']:#x}"
                message = f"{message} {problem.format(target=int(targets[i]))}"
                return message, {"offset": self._entry_offset(place), **place}

            self.findings.add_each(rules.LINEAR_TABLE, np.flatnonzero(mask), describe)

    def _tops_by_vcpu(self) -> dict[int, list[int]]:
        """Return the top tables of each vcpu: the kernel's, then that of the user half."""
        return {vcpu: [int(top) for top in self.saved.tops(vcpu)] for vcpu in self.saved.contents.vcpus}

    def _check_orphans(self, tables: U64, types: U8) -> None:
        """Report tables that are not pinned, not named, and no vcpu's top table."""
        if not self.saved.contents.complete:
            return
        tops = [top for vcpu_tops in self._tops_by_vcpu().values() for top in vcpu_tops]
        referenced = np.unique(np.concatenate([*self._referenced, np.array(tops, np.uint64)]))
        orphan = (types & PINNED == 0) & ~np.isin(tables, referenced)

        def describe(i: int) -> tuple[str, dict[str, int | None]]:
            pfn, level = int(tables[i]), int(types[i] & 7)
            message = f"the L{level} table at pfn {pfn:#x} is neither pinned nor named by another table"
            return message, {"offset": self._page_offset(pfn), "pfn": pfn, "level": level}

        self.findings.add_each(rules.TABLE_ORPHAN, np.flatnonzero(orphan), describe)


def _describe_earlier(entries: _Entries, offsets: I64, i: int) -> tuple[str, dict[str, int | None]]:
    """Describe an entry beyond the p2m's end in a table that was sent again later.

    ``offsets`` are those of the tables.
    """
    place = entries.place(i)
    problem = f"names pfn {int(entries.target[i]):#x}, beyond the last one, in a table that was sent again later"
    offset = int(offsets[entries.row[i]]) + place["entry"] * 8
    return f"{entries.describe(i)} {problem}", {"offset": offset, **place}


def _rank(pfns: U64, order: U64) -> I64:
    """Return the place of each pfn in an order; -1 for one that is not in it."""
    by_pfn = np.argsort(order)
    at = np.minimum(np.searchsorted(order[by_pfn], pfns), max(len(order) - 1, 0))
    if not len(order):
        return np.full(len(pfns), -1)
    return np.where(order[by_pfn][at] == pfns, by_pfn[at], -1)
