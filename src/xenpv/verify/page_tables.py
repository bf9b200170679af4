"""Checks of every page table in a saved PV domain, whole arrays of tables at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from xenpv.abi.x86 import PTE_FRAME_MASK, PTE_P, PTE_PSE, PTE_RW
from xenpv.errors import Fault
from xenpv.findings import Findings, Rule
from xenpv.frames import ABSENT, I64, IS_POPULATED, IS_TABLE, PAGES_PER_BATCH, PINNED, U8, U64, Mask, type_name
from xenpv.io.progress import Progress, ProgressCallback
from xenpv.memory.pagetables import allowed_flags, as_entries, flag_names, frames, is_xen_slot
from xenpv.source.saved import SavedDomain
from xenpv.verify import rules
from xenpv.verify.heuristics import stray_entries


@dataclass
class _Entries:
    """The present entries of some tables of one level: which table, which entry, what it says, what it names."""

    level: int
    tables: U64  # pfns
    row: I64
    entry: I64
    pte: U64
    target: U64
    kind: U8  # page types of the targets

    def where(self, at: int) -> dict[str, int]:
        return {"pfn": int(self.tables[self.row[at]]), "level": self.level, "entry": int(self.entry[at])}

    def says(self, at: int) -> str:
        pte, where = int(self.pte[at]), self.where(at)
        return f"L{self.level}[{where['entry']}] of pfn {where['pfn']:#x} ({pte:#x}, {flag_names(pte)})"


@dataclass
class TableChecks:
    """One pass over the page tables of a domain; ``run`` it."""

    saved: SavedDomain
    findings: Findings
    gdt: U64  # pfns of all GDT frames, ascending
    _named: list[U64] = field(default_factory=list)  # tables that some table names
    _pae_l3_3: list[int] = field(default_factory=list)  # L2 tables behind entry 3 of a 32-bit guest's L3

    def run(self, progress: ProgressCallback | None = None) -> None:
        """Check all tables. Findings name table pfn, level, entry, and the byte offset of the entry."""
        saved = self.saved
        tables = saved.contents.index.pfns(IS_TABLE)
        types = saved.frames.types(tables)
        levels = types & 7
        done = 0
        for level in (4, 3, 2, 1):  # from the top, so that what L3[3] names is known when the L2s come
            of_level = tables[levels == level]
            for i in range(0, len(of_level), PAGES_PER_BATCH):
                batch = of_level[i : i + PAGES_PER_BATCH]
                self._batch(level, batch)
                done += len(batch)
                if progress is not None:
                    progress(Progress(done, len(tables), "checking page tables", "tables"))
        self._orphans(tables, types)

    def _add(self, rule: Rule, at: I64, entries: _Entries, message: str) -> None:
        """A finding for each of the entries ``at``; ``message`` goes on behind what the entry is and says."""

        def describe(one: int) -> tuple[str, dict[str, int | None]]:
            where = entries.where(one)
            names = f"pfn {int(entries.target[one]):#x} ({type_name(int(entries.kind[one]))})"
            return f"{entries.says(one)} {message.format(names=names)}", {"offset": self._offset(where), **where}

        self.findings.add_each(rule, at, describe)

    def _offset(self, where: dict[str, int]) -> int | None:
        page = self._page_offset(where["pfn"])
        return None if page is None else page + where["entry"] * 8

    def _page_offset(self, pfn: int) -> int | None:
        offset = int(self.saved.contents.index.offsets(np.array([pfn], np.uint64))[0])
        return offset if offset >= 0 else None

    def _batch(self, level: int, tables: U64) -> None:
        pages, tables = self._content(level, tables)
        if not len(tables):
            return
        content = as_entries(pages)
        width = self.saved.contents.width
        content = self._xen_slots(level, tables, content)
        row, entry = np.nonzero(content & np.uint64(PTE_P))
        pte = content[row, entry]
        target = frames(pte)
        here = _Entries(level, tables, row, entry, pte, target, self.saved.frames.types(target))
        end_pfn = self.saved.contents.end_pfn
        beyond = target > np.uint64(max(end_pfn, 0))
        self._add(rules.PTE_RANGE, np.flatnonzero(beyond), here, f"names {{names}}, beyond the last pfn {end_pfn:#x}")
        refused = pte & np.uint64(~(allowed_flags(level, width) | PTE_FRAME_MASK) & (1 << 64) - 1)
        if level > 1:
            superpage = (pte & np.uint64(PTE_PSE)) != 0
            self._add(rules.SUPERPAGE, np.flatnonzero(superpage), here, "is a superpage")
            refused[superpage] = 0
        self._add(rules.PTE_FLAGS, np.flatnonzero(refused), here, "has flags that Xen refuses")
        missing = ~beyond & ~IS_POPULATED[here.kind]
        if self.saved.pages_complete:
            self._add(rules.PTE_MISSING, np.flatnonzero(missing), here, "names {names}, which has no page")
        inside = ~beyond & ~missing
        if level > 1:
            self._upper(here, inside)
        else:
            self._leaves(here, inside)
        self._strays(level, tables, content)

    def _content(self, level: int, tables: U64) -> tuple[U8, U64]:
        """The pages of the tables that have content, and their pfns; a finding for each other."""
        frames_of = self.saved.frames
        try:
            return frames_of.pages(tables), tables
        except Fault:
            good = []
            for pfn in tables:
                try:
                    good.append(frames_of.pages(np.array([pfn], np.uint64)))
                except Fault as e:
                    if self.saved.pages_complete:
                        self.findings.add(rules.TABLE_CONTENT, str(e), pfn=int(pfn), level=level)
                    tables = tables[tables != pfn]
            return (np.concatenate(good) if good else np.empty((0, 4096), np.uint8)), tables

    def _xen_slots(self, level: int, tables: U64, content: U64) -> U64:
        """Report what is not empty among Xen's own slots, and give the content without it."""
        width = self.saved.contents.width
        slots = is_xen_slot(level, width)
        if width == 4 and level == 2:
            last = np.isin(tables, np.array(self._pae_l3_3, np.uint64))
            slots = last[:, None] & is_xen_slot(2, 4, last_pae_l2=True)
        filled = (content != 0) & slots
        if not np.any(filled):
            return content
        row, entry = np.nonzero(filled)
        pte = content[row, entry]
        found = _Entries(level, tables, row, entry, pte, frames(pte), np.full(len(pte), ABSENT, np.uint8))
        self._add(rules.XEN_SLOT, np.arange(len(pte)), found, "fills a slot that is Xen's own")
        return np.where(filled, np.uint64(0), content)

    def _upper(self, here: _Entries, inside: Mask) -> None:
        """Entries of L2 to L4 tables: each names a table one level down, or, read-only, one of its own level."""
        kind = here.kind & 7
        is_table = IS_TABLE[here.kind]
        below = is_table & (kind == here.level - 1)
        linear = is_table & (kind == here.level)
        writable = (here.pte & np.uint64(PTE_RW)) != 0
        wrong = inside & ~below & ~linear
        self._add(rules.PTE_LEVEL, np.flatnonzero(wrong), here, f"names {{names}}, not an L{here.level - 1} table")
        self._add(rules.LINEAR_TABLE, np.flatnonzero(linear & writable), here, "maps {names} of its own level writable")
        self._named.append(here.target[below | linear])
        if here.level == 3 and self.saved.contents.width == 4:
            self._pae_roots(here, inside)

    def _pae_roots(self, here: _Entries, inside: Mask) -> None:
        last = here.entry == 3
        behind = here.target[last & inside].tolist()
        self._pae_l3_3 += behind
        for row, table in enumerate(here.tables.tolist()):
            mine = here.row == row
            if not np.any(mine & last):
                where = {"pfn": table, "level": 3, "entry": 3}
                what = f"L3[3] of pfn {table:#x} is not present"
                self.findings.add(rules.PAE_L3, what, offset=self._offset(where), **where)
        for l2 in sorted({pfn for pfn in behind if np.count_nonzero(here.target == np.uint64(pfn)) > 1}):
            what = f"the L2 behind L3[3], pfn {l2:#x}, is named more than once"
            self.findings.add(rules.PAE_L3, what, offset=self._page_offset(l2), pfn=l2, level=2)

    def _leaves(self, here: _Entries, inside: Mask) -> None:
        """Entries of L1 tables: they may name anything, but nothing writable that is a table or holds a GDT."""
        writable = inside & ((here.pte & np.uint64(PTE_RW)) != 0)
        table = writable & IS_TABLE[here.kind]
        self._add(rules.PTE_WRITABLE, np.flatnonzero(table), here, "maps the page table {names} writable")
        if len(self.gdt):
            gdt = writable & np.isin(here.target, self.gdt)
            self._add(rules.PTE_WRITABLE, np.flatnonzero(gdt), here, "maps the GDT frame {names} writable")

    def _strays(self, level: int, tables: U64, content: U64) -> None:
        """What no rule of Xen's forbids, and no kernel writes: see likeness.py."""
        for (row, entry), odd in stray_entries(level, content):
            if len(row):
                pte = content[row, entry]
                target = frames(pte)
                found = _Entries(level, tables, row, entry, pte, target, self.saved.frames.types(target))
                self._add(rules.PTE_OUTLIER, np.arange(len(row)), found, odd)

    def _orphans(self, tables: U64, types: U8) -> None:
        """Tables that nothing holds: neither pinned, nor named, nor a vcpu's top."""
        if not self.saved.contents.complete:
            return
        tops = [saved_top for vcpu in self.saved.contents.vcpus for saved_top in self.saved.tops(vcpu)]
        held = np.unique(np.concatenate([*self._named, np.array(tops, np.uint64)]))
        free = (types & PINNED == 0) & ~np.isin(tables, held)

        def describe(at: int) -> tuple[str, dict[str, int | None]]:
            pfn, level = int(tables[at]), int(types[at] & 7)
            what = f"the L{level} table at pfn {pfn:#x} is neither pinned nor named by another table"
            return what, {"offset": self._page_offset(pfn), "pfn": pfn, "level": level}

        self.findings.add_each(rules.TABLE_ORPHAN, np.flatnonzero(free), describe)
