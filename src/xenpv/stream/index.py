"""The index of a stream's pages: type of each page, and where its content lies."""

from __future__ import annotations

from typing import Self

import numpy as np

from xenpv.frames import ABSENT, HAS_DATA, I64, IS_TABLE, PAGE_SIZE, U8, U64, Mask
from xenpv.runs import Extents, expand_runs, group_rows
from xenpv.stream.page_data import PFN_MASK, PageData

_PFN_MASK = np.uint64(PFN_MASK)

_DUPLICATES_MAX = 100  # duplicates to remember: a stream with one has many
_RECORDS_PER_MERGE = 256  # records turned into extents at once, to spread NumPy's cost per call


class PageIndex:
    """Maps a pfn to its type and the byte offset of its content.

    PAGE_DATA records are added in their order.

    A page that comes again, as in a live migration, counts with its last type and content. An extent is a run of
    consecutive pfns of one type with adjacent contents. Cost follows the number of extents, at most one for each 8
    bytes of the stream.

    Attributes:
        sent: entries in all records, repeats included.
        repeated: entries that a later one overrode; known after the first look-up.
        duplicates: pfns that one record has twice, each with the offset of its second entry.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[U64, int, bool]] = []  # entries, offset of the first page, whether there is content
        self._unmerged: list[tuple[U64, I64, U8, I64]] = []  # first pfn, pages, type, offset of the first page or -1
        self.sent = 0
        self.repeated = 0
        self.duplicates: list[tuple[int, int]] = []
        self._earlier_tables: list[tuple[U64, U8, I64]] = []  # as earlier_tables() returns them
        self._extents = Extents.empty()
        self._offset = np.empty(0, np.int64)

    @classmethod
    def from_extents(cls, extents: Extents, offset: I64) -> Self:
        """Return an index of these extents.

        ``offset`` is that of each one's first page, -1 without content.
        """
        index = cls()
        index._extents, index._offset = extents, offset
        return index

    def add(self, record: PageData) -> None:
        """Add a record.

        If its size does not match its pages, it gives types, and no content.
        """
        self.add_entries(record.entries, record.pages_offset, content=record.size_matches)

    def add_entries(self, entries: U64, pages_offset: int, *, content: bool = True) -> None:
        """Add entries as in PAGE_DATA; their content begins at pages_offset.

        The type is in bits 63 to 60, the pfn in 51 to 0.
        """
        self.sent += len(entries)
        self._pending.append((entries, pages_offset, content))
        if len(self._pending) >= _RECORDS_PER_MERGE:
            self._make_extents()

    def _make_extents(self) -> None:
        """Turn the pending records into extents, unmerged."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        entries = np.concatenate([e for e, _, _ in pending])
        starts = np.zeros(len(entries), np.bool_)
        firsts = np.cumsum([0] + [len(e) for e, _, _ in pending[:-1]])
        starts[firsts] = True
        # A run goes on where the raw entry grows by one: the same type, the next pfn.
        starts[1:] |= np.diff(entries) != 1
        row = np.flatnonzero(starts)
        types = (entries[row] >> np.uint64(60)).astype(np.uint8)
        lengths = np.diff(np.append(row, len(entries)))
        data_pages = np.where(HAS_DATA[types], lengths, 0)
        before = np.cumsum(data_pages) - data_pages  # pages with content before each run, over all these records
        of_record = np.searchsorted(firsts, row, "right") - 1
        first_run = np.searchsorted(row, firsts)
        base = np.array([offset for _, offset, _ in pending], np.int64)
        is_whole = np.array([whole for _, _, whole in pending], np.bool_)  # as many pages as entries that have some
        offsets = base[of_record] + (before - before[first_run][of_record]) * PAGE_SIZE
        offsets[~(HAS_DATA[types] & is_whole[of_record])] = -1
        pfns = entries[row] & _PFN_MASK
        self._unmerged.append((pfns, lengths, types, offsets))
        descends = pfns[1:] < pfns[:-1] + lengths[:-1].astype(np.uint64)
        descends[of_record[1:] != of_record[:-1]] = False  # between records it may
        if descends.any():  # most records ascend, so that no pfn can come twice
            self._note_duplicates(np.unique(of_record[1:][descends]), pending)

    def _note_duplicates(self, suspects: I64, pending: list[tuple[U64, int, bool]]) -> None:
        """Remember pfns that come twice in one of the suspected records."""
        for record in suspects[: max(0, _DUPLICATES_MAX - len(self.duplicates))].tolist():
            entries, pages_offset, _ = pending[record]
            pfns = entries & _PFN_MASK
            order = np.argsort(pfns, kind="stable")
            second = order[1:][pfns[order][1:] == pfns[order][:-1]]
            entries_offset = pages_offset - entries.nbytes
            self.duplicates += [(int(pfns[i]), entries_offset + i * 8) for i in second[:_DUPLICATES_MAX].tolist()]

    def _merge(self) -> None:
        """Merge all extents into one sorted table in which no pfn occurs twice."""
        self._make_extents()
        if not self._unmerged:
            return
        merged = self._extents
        old = [] if not len(merged) else [(merged.first, merged.pages, merged.type, self._offset)]
        start, pages, kind, offset = (np.concatenate(c) for c in zip(*old, *self._unmerged, strict=True))
        self._unmerged = []
        by_pfn = np.argsort(start, kind="stable")
        end = start + pages.astype(np.uint64)
        if np.any(end[by_pfn][:-1] > start[by_pfn][1:]):
            start, pages, kind, offset = self._resolve_overlaps(start, pages, kind, offset)
        else:
            start, pages, kind, offset = start[by_pfn], pages[by_pfn], kind[by_pfn], offset[by_pfn]
        self._extents, self._offset = Extents(start, pages, kind), offset

    def _resolve_overlaps(self, start: U64, pages: I64, kind: U8, offset: I64) -> tuple[U64, I64, U8, I64]:
        """Return extents that do not overlap: the last page of each pfn counts."""
        pfn, row = expand_runs(start, pages), np.repeat(np.arange(len(start)), pages)
        kinds = kind[row]
        within = (pfn - start[row]).astype(np.int64)
        offsets = np.where(offset[row] >= 0, offset[row] + within * PAGE_SIZE, -1)
        order = np.argsort(pfn, kind="stable")
        pfn, kinds, offsets = pfn[order], kinds[order], offsets[order]
        last = np.append(pfn[1:] != pfn[:-1], True)
        self.repeated += int(len(last) - np.count_nonzero(last))
        earlier = ~last & IS_TABLE[kinds] & (offsets >= 0)
        if earlier.any():
            self._earlier_tables.append((pfn[earlier], kinds[earlier], offsets[earlier]))
        pfn, kinds, offsets = pfn[last], kinds[last], offsets[last]
        continues = (np.diff(pfn) == 1) & (kinds[1:] == kinds[:-1])
        continues &= np.where(offsets[1:] >= 0, np.diff(offsets) == PAGE_SIZE, offsets[:-1] < 0)
        rows, count = group_rows(~continues, len(pfn))
        return pfn[rows], count, kinds[rows], offsets[rows]

    def earlier_tables(self) -> tuple[U64, U8, I64]:
        """Return the page tables that a later page of the same pfn replaced.

        Returns:
            The pfn, the page type and the offset of the content of each, in the order of the stream.
        """
        self._merge()
        none = np.empty(0, np.uint64), np.empty(0, np.uint8), np.empty(0, np.int64)
        pfns, types, offsets = (np.concatenate(column) for column in zip(none, *self._earlier_tables, strict=True))
        order = np.argsort(offsets)
        return pfns[order], types[order], offsets[order]

    def types(self, pfns: U64) -> U8:
        """Return the page type of each pfn, ABSENT where it never came.

        uint8, of the shape of ``pfns``.
        """
        types = np.append(self.extents.type, np.uint8(ABSENT))  # row -1, which is none, is the last element
        return np.asarray(types[self.extents.rows_of(pfns)])

    def offsets(self, pfns: U64) -> I64:
        """Return the byte offset of each page's content, -1 without content.

        int64, of the shape of ``pfns``.
        """
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

    def pfns(self, mask: Mask) -> U64:
        """Return the pfns, ascending, whose type is in ``mask``.

        ``mask`` is a table indexed by type, such as frames.IS_TABLE.
        """
        return self.extents[mask[self.extents.type]].pfns

    @property
    def last_pfn(self) -> int:
        """The highest pfn that came, -1 for none."""
        return self.extents.stop - 1

    @property
    def extents(self) -> Extents:
        """Every page that came, once."""
        self._merge()
        return self._extents
