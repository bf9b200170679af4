"""Which page came with which type, and where its content lies.

Extents, so that 100 GiB of pages are a few thousand rows.
"""

from __future__ import annotations

from typing import Self

import numpy as np

from xenpv.frames import ABSENT, HAS_DATA, I64, PAGE_SIZE, U8, U64, Mask
from xenpv.runs import Extents, expand_runs, group_rows
from xenpv.stream.pagedata import PFN_MASK, PageData

_PFN_MASK = np.uint64(PFN_MASK)

_TWICE_KEPT = 100  # repeats to remember: who has one has many
_MERGE_AT = 256  # records gathered before they are turned into extents, to spread NumPy's cost per call


class PageIndex:
    """pfn to (type, byte offset of its content), out of PAGE_DATA records in the order in which they come.

    A page that comes again (live migration sends pages many times) counts with its last type and content. An extent
    is a run of consecutive pfns of one type whose contents lie one behind the other. Cost follows the number of
    extents, which a stream can drive no higher than one for each 8 bytes of its own.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[U64, int, bool]] = []
        self._parts: list[tuple[U64, I64, U8, I64]] = []  # start pfn, pages, type, offset of the first page or -1
        self.sent = 0  # entries in all records, repeats counted
        self.repeated = 0  # entries that a later one overrode; known after the first look-up
        self.duplicates: list[tuple[int, int]] = []  # pfns that one record names twice, and the entry's byte offset
        self._extents = Extents.empty()
        self._offset = np.empty(0, np.int64)

    @classmethod
    def from_extents(cls, extents: Extents, offset: I64) -> Self:
        """Return an index of these extents; ``offset`` is that of each one's first page, -1 without content."""
        index = cls()
        index._extents, index._offset = extents, offset
        return index

    def add(self, record: PageData) -> None:
        """Take in one record. From one that has not as many pages as it names, types are known, and no content is."""
        self.add_entries(record.entries, record.pages_offset, content=record.size_matches)

    def add_entries(self, entries: U64, pages_offset: int, *, content: bool = True) -> None:
        """Take in entries as in PAGE_DATA: type in bits 63 to 60, pfn in 51 to 0; contents from byte pages_offset."""
        self.sent += len(entries)
        self._waiting.append((entries, pages_offset, content))
        if len(self._waiting) >= _MERGE_AT:
            self._to_extents()

    def _to_extents(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        entries = np.concatenate([e for e, _, _ in waiting])
        starts = np.zeros(len(entries), np.bool_)
        firsts = np.cumsum([0] + [len(e) for e, _, _ in waiting[:-1]])
        starts[firsts] = True
        # A run goes on where the raw entry grows by one: the same type, the next pfn.
        starts[1:] |= np.diff(entries) != 1
        at = np.flatnonzero(starts)
        types = (entries[at] >> np.uint64(60)).astype(np.uint8)
        lengths = np.diff(np.append(at, len(entries)))
        data_pages = np.where(HAS_DATA[types], lengths, 0)
        before = np.cumsum(data_pages) - data_pages  # pages with content in front of each run, over all these records
        of_record = np.searchsorted(firsts, at, "right") - 1
        first_run = np.searchsorted(at, firsts)
        base = np.array([offset for _, offset, _ in waiting], np.int64)
        content = np.array([content for _, _, content in waiting], np.bool_)
        offsets = base[of_record] + (before - before[first_run][of_record]) * PAGE_SIZE
        offsets[~(HAS_DATA[types] & content[of_record])] = -1
        pfns = entries[at] & _PFN_MASK
        self._parts.append((pfns, lengths, types, offsets))
        goes_back = pfns[1:] < pfns[:-1] + lengths[:-1].astype(np.uint64)
        goes_back[of_record[1:] != of_record[:-1]] = False  # from one record to the next it may
        if goes_back.any():  # ascending is usual, and then nothing can come twice
            self._note_repeats(np.unique(of_record[1:][goes_back]), waiting)

    def _note_repeats(self, suspects: I64, waiting: list[tuple[U64, int, bool]]) -> None:
        """Remember what is twice in one of the suspected records."""
        for record in suspects[: max(0, _TWICE_KEPT - len(self.duplicates))].tolist():
            entries, pages_offset, _ = waiting[record]
            mine = entries & _PFN_MASK
            order = np.argsort(mine, kind="stable")
            again = order[1:][mine[order][1:] == mine[order][:-1]]
            begin = pages_offset - entries.nbytes
            self.duplicates += [(int(mine[i]), begin + i * 8) for i in again[:_TWICE_KEPT].tolist()]

    def _settle(self) -> None:
        """Make the extents one sorted table in which no pfn occurs twice."""
        self._to_extents()
        if not self._parts:
            return
        merged = self._extents
        old = [] if not len(merged) else [(merged.first, merged.pages, merged.type, self._offset)]
        start, pages, kind, offset = (np.concatenate(c) for c in zip(*old, *self._parts, strict=True))
        self._parts = []
        by_pfn = np.argsort(start, kind="stable")
        end = start + pages.astype(np.uint64)
        if np.any(end[by_pfn][:-1] > start[by_pfn][1:]):
            start, pages, kind, offset = self._last_wins(start, pages, kind, offset)
        else:
            start, pages, kind, offset = start[by_pfn], pages[by_pfn], kind[by_pfn], offset[by_pfn]
        self._extents, self._offset = Extents(start, pages, kind), offset

    def _last_wins(self, start: U64, pages: I64, kind: U8, offset: I64) -> tuple[U64, I64, U8, I64]:
        """Extents that overlap, page by page: for each pfn the last; then runs again."""
        pfn, which = expand_runs(start, pages), np.repeat(np.arange(len(start)), pages)
        kinds = kind[which]
        within = (pfn - start[which]).astype(np.int64)
        offsets = np.where(offset[which] >= 0, offset[which] + within * PAGE_SIZE, -1)
        order = np.argsort(pfn, kind="stable")
        pfn, kinds, offsets = pfn[order], kinds[order], offsets[order]
        last = np.append(pfn[1:] != pfn[:-1], True)
        self.repeated += int(len(last) - np.count_nonzero(last))
        pfn, kinds, offsets = pfn[last], kinds[last], offsets[last]
        goes_on = (np.diff(pfn) == 1) & (kinds[1:] == kinds[:-1])
        goes_on &= np.where(offsets[1:] >= 0, np.diff(offsets) == PAGE_SIZE, offsets[:-1] < 0)
        at, count = group_rows(~goes_on, len(pfn))
        return pfn[at], count, kinds[at], offsets[at]

    def types(self, pfns: U64) -> U8:
        """Return the page type of each pfn, ABSENT where it never came; of the shape of ``pfns``."""
        types = np.append(self.extents.type, np.uint8(ABSENT))  # row -1, which is none, is the last element
        return np.asarray(types[self.extents.rows_of(pfns)])

    def offsets(self, pfns: U64) -> I64:
        """Return the byte offset of each page's content, -1 where there is none; of the shape of ``pfns``."""
        extents = self.extents
        row = extents.rows_of(pfns)
        if not len(extents):
            return row
        first = self._offset[row]
        within = (pfns - extents.first[row]).astype(np.int64)
        return np.where((row >= 0) & (first >= 0), first + within * PAGE_SIZE, np.int64(-1))

    def count(self) -> dict[int, int]:
        """Return the number of pages of each type that there is."""
        counts = np.bincount(self.extents.type, weights=self.extents.pages, minlength=16)
        return {kind: int(n) for kind, n in enumerate(counts) if n}

    def pfns(self, wanted: Mask) -> U64:
        """Return the pfns, ascending, whose type is in ``wanted``: a table indexed by type, such as frames.IS_TABLE."""
        return self.extents[wanted[self.extents.type]].pfns

    @property
    def last_pfn(self) -> int:
        """The highest pfn that came, -1 for none."""
        return self.extents.stop - 1

    @property
    def extents(self) -> Extents:
        """Every page that came, once."""
        self._settle()
        return self._extents
