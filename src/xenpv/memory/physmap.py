"""The physmap of a domain that is being filled.

It has the mfn and the page type of each pfn. Pfns may arrive in any order.

Cost follows the populated pages, never the highest pfn. Pfns are kept in chunks of 512, the pages of an extent of
2 MiB. A chunk whose frames are consecutive is one number; every other chunk has a table of mfns. A chunk has a table of
types only if one of its pages is not NOTAB. 600 GiB in extents are some 20 MB, in single pages 1.3 GB.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from xenpv.frames import ABSENT, I64, IS_TABLE, NO_FRAME, PAGES_PER_BATCH, U8, U64, Mask, PageType
from xenpv.runs import group_rows

CHUNK_ORDER = 9
CHUNK = 1 << CHUNK_ORDER  # pfns in a chunk
_SHIFT = np.uint64(CHUNK_ORDER)
_OFFSET_MASK = np.uint64(CHUNK - 1)
_TABLES_PER_BLOCK = 1024  # tables that memory is allocated for at once
_LOCALISED = np.uint8(0x80)  # a bit next to a page table's type: its entries hold mfns


class Physmap:
    """The frame of each pfn, and the type of each page.

    Attributes:
        populated: how many pfns have a frame.
    """

    def __init__(self) -> None:
        self.populated = 0
        self._chunks = _RowIndex()
        self._first_mfn = np.empty(0, np.uint64)  # by chunk row: its first mfn, NO_FRAME unless they are consecutive
        self._mfn_table = np.empty(0, np.int32)  # by chunk row: its table of mfns, -1 for none
        self._type_table = np.empty(0, np.int32)  # by chunk row: its table of types, -1 if all are NOTAB
        self._mfns = _TableStore(np.uint64, NO_FRAME)
        self._types = _TableStore(np.uint8, PageType.NOTAB)

    def lookup(self, pfns: U64) -> U64:
        """Return the mfn of each pfn, NO_FRAME where there is none."""
        chunks, count = group_by_chunk(pfns)
        rows = self._chunks.find(chunks)
        first = self._first_mfn[rows] if len(self._chunks) else np.full(len(rows), NO_FRAME)
        is_extent = (rows >= 0) & (first != NO_FRAME)
        if is_extent.all():
            mfns: U64 = pfns + np.repeat(first - (chunks << _SHIFT), count)
            return mfns
        out = np.full(pfns.shape, NO_FRAME)
        if not (rows >= 0).any():
            return out
        row, offset = np.repeat(rows, count), pfns & _OFFSET_MASK
        in_extent, in_table = np.repeat(is_extent, count), np.repeat((rows >= 0) & ~is_extent, count)
        out[in_extent] = self._first_mfn[row[in_extent]] + offset[in_extent]
        out[in_table] = self._mfns.get(self._mfn_table[row[in_table]], offset[in_table])
        return out

    def lookup_chunks(self, chunks: U64) -> U64:
        """Return the mfns of whole chunks; uint64 of shape (n, 512).

        Chunk n begins at pfn ``n << 9``.
        """
        out = np.full((len(chunks), CHUNK), NO_FRAME)
        if not len(self._chunks):
            return out
        row = self._chunks.find(chunks)
        is_extent = (row >= 0) & (self._first_mfn[row] != NO_FRAME)
        out[is_extent] = self._first_mfn[row[is_extent]][:, None] + np.arange(CHUNK, dtype=np.uint64)
        has_table = (row >= 0) & ~is_extent
        out[has_table] = self._mfns.whole_tables(self._mfn_table[row[has_table]])
        return out

    def count_chunks(self, first: I64, stop: I64) -> I64:
        """Count the chunks with a frame from ``first`` to before ``stop``.

        The result has one count for each pair.
        """
        numbers = self._chunks.ascending
        count = np.searchsorted(numbers, stop.astype(np.uint64)) - np.searchsorted(numbers, first.astype(np.uint64))
        return count.astype(np.int64)

    def add_pages(self, pfns: U64, mfns: U64) -> None:
        """Give pfns their frames. No pfn may occur twice or have a frame already."""
        row = self._add_chunks(pfns >> _SHIFT)
        new = np.flatnonzero(np.bincount(row[self._mfn_table[row] < 0]))
        self._mfn_table[new] = self._mfns.allocate(len(new))
        self._mfns.put(self._mfn_table[row], pfns & _OFFSET_MASK, mfns)
        self.populated += len(pfns)

    def add_extents(self, chunks: U64, first_mfns: U64) -> None:
        """Add extents of frames to whole chunks.

        None of their pfns may have a frame already.
        """
        row = self._add_chunks(chunks)
        self._first_mfn[row] = first_mfns
        self.populated += len(chunks) * CHUNK

    def _add_chunks(self, chunks: U64) -> I64:
        """Return the rows of chunks, new ones for those that had none."""
        row = self._chunks.add(chunks)
        missing = len(self._chunks) - len(self._first_mfn)
        if missing > 0:  # doubled, so that many small steps cost no more than one large one
            missing += len(self._first_mfn)
            self._first_mfn = np.append(self._first_mfn, np.full(missing, NO_FRAME))
            self._mfn_table = np.append(self._mfn_table, np.full(missing, -1, np.int32))
            self._type_table = np.append(self._type_table, np.full(missing, -1, np.int32))
        return row

    def _chunk_rows(self, pfns: U64) -> I64:
        """Return the row of each pfn's chunk, -1 for none."""
        chunks, count = group_by_chunk(pfns)
        return np.repeat(self._chunks.find(chunks), count)

    # --- types -------------------------------------------------------------------------------------------------------

    def types(self, pfns: U64) -> U8:
        """Return the page type of each pfn, ABSENT where it has no frame."""
        out = np.where(self.lookup(pfns) == NO_FRAME, np.uint8(ABSENT), np.uint8(PageType.NOTAB))
        row = self._chunk_rows(pfns)
        if len(self._chunks):
            has_table = (out != ABSENT) & (self._type_table[row] >= 0)
            tables, offset = self._type_table[row[has_table]], pfns[has_table] & _OFFSET_MASK
            out[has_table] = self._types.get(tables, offset) & ~_LOCALISED
        return out

    def set_types(self, pfns: U64, types: U8) -> None:
        """Set the types of pages that have a frame.

        Of a pfn that occurs twice the last type counts.

        Page tables among them count as not localised: their entries hold pfns.
        """
        chunks, count = group_by_chunk(pfns)
        rows = self._chunks.find(chunks)
        plain = types == PageType.NOTAB
        if plain.all() and (self._type_table[rows] < 0).all():
            return
        row = np.repeat(rows, count)
        new = np.flatnonzero(np.bincount(row[~plain & (self._type_table[row] < 0)]))
        self._type_table[new] = self._types.allocate(len(new))
        has_table = self._type_table[row] >= 0
        self._types.put(self._type_table[row[has_table]], pfns[has_table] & _OFFSET_MASK, types[has_table])

    def mark_localised(self, tables: U64) -> None:
        """Record that the entries of page tables hold mfns now."""
        row, offset = self._type_table[self._chunk_rows(tables)], tables & _OFFSET_MASK
        self._types.put(row, offset, self._types.get(row, offset) | _LOCALISED)

    def is_localised(self, tables: U64) -> Mask:
        """Return which page tables' entries hold mfns."""
        row = self._type_table[self._chunk_rows(tables)]
        marked: Mask = self._types.get(row, tables & _OFFSET_MASK) & _LOCALISED != 0
        return marked

    def page_tables(self) -> tuple[U64, U8]:
        """Return the pfns of all page tables, ascending, and their types."""
        rows = self._chunks.rows[self._type_table[self._chunks.rows] >= 0]
        pfns, page_types = [np.empty(0, np.uint64)], [np.empty(0, np.uint8)]
        for i in range(0, len(rows), PAGES_PER_BATCH):
            batch = rows[i : i + PAGES_PER_BATCH]
            types = self._types.whole_tables(self._type_table[batch]) & ~_LOCALISED
            chunk, offset = np.nonzero(IS_TABLE[types])
            pfns.append(self._chunks.numbers[batch[chunk]] << _SHIFT | offset.astype(np.uint64))
            page_types.append(types[chunk, offset])
        return np.concatenate(pfns), np.concatenate(page_types)


def group_by_chunk(pfns: U64) -> tuple[U64, I64]:
    """Return the chunk and the length of each group of neighbouring pfns of one chunk."""
    chunks = pfns >> _SHIFT
    starts, count = group_rows(chunks[1:] != chunks[:-1], len(chunks))
    return chunks[starts], count


class _RowIndex:
    """Maps numbers to rows in the order of their arrival.

    The first number has row 0, the next row 1, and so on.
    """

    def __init__(self) -> None:
        self.ascending = np.empty(0, np.uint64)
        self.rows = np.empty(0, np.int64)  # of the numbers in ``ascending``
        self._by_row = np.empty(0, np.uint64)  # with spare room at the end
        self._buffers = np.empty(0, np.uint64), np.empty(0, np.int64)  # of ascending and rows, with spare room

    def __len__(self) -> int:
        return len(self.ascending)

    @property
    def numbers(self) -> U64:
        """The number of each row."""
        return self._by_row[: len(self)]

    def find(self, numbers: U64) -> I64:
        """Return the row of each number, -1 for none."""
        if not len(self):
            return np.full(numbers.shape, -1, np.int64)
        position = np.minimum(np.searchsorted(self.ascending, numbers), len(self) - 1)
        return np.where(self.ascending[position] == numbers, self.rows[position], -1)

    def add(self, numbers: U64) -> I64:
        """Return the row of each number, a new one for those that had none."""
        row = self.find(numbers)
        if (row >= 0).all():
            return row
        new, old = np.unique(numbers[row < 0]), len(self)
        total = old + len(new)
        if total > len(self._by_row):
            room = max(total, 2 * len(self._by_row)) - len(self._by_row)
            self._by_row = np.append(self._by_row, np.zeros(room, np.uint64))
            ascending, rows = self._buffers
            self._buffers = np.append(ascending, np.zeros(room, np.uint64)), np.append(rows, np.zeros(room, np.int64))
        self._by_row[old:total] = new
        ascending, rows = self._buffers
        ascending[old:total], rows[old:total] = new, np.arange(old, total)
        if old and new[0] < ascending[old - 1]:  # seldom: they mostly come in order
            order = np.argsort(ascending[:total], kind="stable")
            ascending[:total], rows[:total] = ascending[:total][order], rows[:total][order]
        self.ascending, self.rows = ascending[:total], rows[:total]
        return self.find(numbers)


class _TableStore:
    """Tables of CHUNK values each, numbered from 0.

    Their memory is allocated in blocks, and never moved.
    """

    def __init__(self, dtype: npt.DTypeLike, default: Any) -> None:
        self._dtype, self._default = dtype, default
        self._blocks: list[npt.NDArray[Any]] = []
        self._used = 0

    def allocate(self, n: int) -> npt.NDArray[np.int32]:
        """Return the numbers of n new tables, filled with the default."""
        first, self._used = self._used, self._used + n
        while len(self._blocks) * _TABLES_PER_BLOCK < self._used:
            self._blocks.append(np.full((_TABLES_PER_BLOCK, CHUNK), self._default, self._dtype))
        return np.arange(first, self._used, dtype=np.int32)

    def get(self, tables: npt.NDArray[np.int32], offset: U64) -> npt.NDArray[Any]:
        """Return one value from each table."""
        out = np.empty(len(tables), self._dtype)
        for block, rows in self._by_block(tables):
            out[rows] = block[tables[rows] % _TABLES_PER_BLOCK, offset[rows]]
        return out

    def whole_tables(self, tables: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
        """Return all values of each table, of shape (n, CHUNK)."""
        out = np.empty((len(tables), CHUNK), self._dtype)
        for block, rows in self._by_block(tables):
            out[rows] = block[tables[rows] % _TABLES_PER_BLOCK]
        return out

    def put(self, tables: npt.NDArray[np.int32], offset: U64, values: npt.NDArray[Any]) -> None:
        """Store one value in each table.

        Of a place that occurs twice the last value counts.
        """
        for block, rows in self._by_block(tables):
            block[tables[rows] % _TABLES_PER_BLOCK, offset[rows]] = values[rows]

    def _by_block(self, tables: npt.NDArray[np.int32]) -> list[tuple[npt.NDArray[Any], Any]]:
        """Return each block that has some of the tables, and their rows."""
        block_of = tables // _TABLES_PER_BLOCK
        if len(block_of) and (block_of == block_of[0]).all():
            return [(self._blocks[int(block_of[0])], slice(None))]
        return [(self._blocks[number], np.flatnonzero(block_of == number)) for number in np.unique(block_of).tolist()]
