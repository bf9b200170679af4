"""The frames of a domain that is being filled: pfn to mfn and page type, in no order, and again and again.

Cost follows what is there, never the highest pfn. Pfns are kept in chunks of 512, the pages of an extent of 2 MiB: a
chunk whose frames follow each other is one number, all others are a table each; types take a table only where there is
another than NOTAB. 600 GiB in extents are some 20 MB, in single pages 1.3 GB.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from xenpv.frames import ABSENT, I64, IS_TABLE, NO_FRAME, PAGES_PER_BATCH, U8, U64, Mask, PageType

ORDER = 9
CHUNK = 1 << ORDER  # pfns in a chunk
_SHIFT = np.uint64(ORDER)
_WITHIN = np.uint64(CHUNK - 1)
_BLOCK = 1024  # tables that memory is taken for at once
_LOCAL = np.uint8(0x80)  # beside a type: the table's entries hold mfns


class Physmap:
    """Which frame each pfn has, and of which type the page is. ``pages`` is how many have one."""

    def __init__(self) -> None:
        self.pages = 0
        self._chunks = _Numbers()
        self._first = np.empty(0, np.uint64)  # of each chunk, by its row: the mfn from which its frames count on
        self._own = np.empty(0, np.int32)  # its table of mfns, -1 for none
        self._typed = np.empty(0, np.int32)  # its table of types, -1: all NOTAB
        self._mfns = _Tables(np.uint64, NO_FRAME)
        self._types = _Tables(np.uint8, PageType.NOTAB)

    def mfns(self, pfns: U64) -> U64:
        """The mfn of each pfn, NO_FRAME where there is none."""
        chunks, count = chunks_of(pfns)
        rows = self._chunks.find(chunks)
        first = self._first[rows] if len(self._chunks) else np.full(len(rows), NO_FRAME)
        alike = (rows >= 0) & (first != NO_FRAME)
        if alike.all():
            found: U64 = pfns + np.repeat(first - (chunks << _SHIFT), count)
            return found
        out = np.full(pfns.shape, NO_FRAME)
        if not (rows >= 0).any():
            return out
        row, within = np.repeat(rows, count), pfns & _WITHIN
        whole, single = np.repeat(alike, count), np.repeat((rows >= 0) & ~alike, count)
        out[whole] = self._first[row[whole]] + within[whole]
        out[single] = self._mfns.get(self._own[row[single]], within[single])
        return out

    def _rows(self, pfns: U64) -> I64:
        """The row of each pfn's chunk, -1 for none."""
        chunks, count = chunks_of(pfns)
        return np.repeat(self._chunks.find(chunks), count)

    def of_chunks(self, chunks: U64) -> U64:
        """The mfns of whole chunks, uint64 (n, 512); pfn ``chunk << 9`` is the first of a chunk."""
        out = np.full((len(chunks), CHUNK), NO_FRAME)
        if not len(self._chunks):
            return out
        row = self._chunks.find(chunks)
        alike = (row >= 0) & (self._first[row] != NO_FRAME)
        out[alike] = self._first[row[alike]][:, None] + np.arange(CHUNK, dtype=np.uint64)
        single = (row >= 0) & ~alike
        out[single] = self._mfns.rows(self._own[row[single]])
        return out

    def used(self, first: I64, stop: I64) -> I64:
        """How many chunks from ``first`` to before ``stop`` have a frame, of each pair."""
        numbers = self._chunks.ascending
        found = np.searchsorted(numbers, stop.astype(np.uint64)) - np.searchsorted(numbers, first.astype(np.uint64))
        return found.astype(np.int64)

    def put(self, pfns: U64, mfns: U64) -> None:
        """Give pfns their frames: each stands here once, and has none yet."""
        row = self._have(pfns >> _SHIFT)
        new = np.flatnonzero(np.bincount(row[self._own[row] < 0]))
        self._own[new] = self._mfns.take(len(new))
        self._mfns.put(self._own[row], pfns & _WITHIN, mfns)
        self.pages += len(pfns)

    def put_extents(self, chunks: U64, mfns: U64) -> None:
        """Give whole chunks, none of whose pfns has a frame yet, extents of frames: the first mfn of each."""
        row = self._have(chunks)
        self._first[row] = mfns
        self.pages += len(chunks) * CHUNK

    def _have(self, chunks: U64) -> I64:
        """The rows of chunks; they get one where they have none."""
        row = self._chunks.have(chunks)
        missing = len(self._chunks) - len(self._first)
        if missing > 0:  # doubled, so that many small steps cost no more than one large one
            missing += len(self._first)
            self._first = np.append(self._first, np.full(missing, NO_FRAME))
            self._own = np.append(self._own, np.full(missing, -1, np.int32))
            self._typed = np.append(self._typed, np.full(missing, -1, np.int32))
        return row

    # --- types -------------------------------------------------------------------------------------------------------

    def types(self, pfns: U64) -> U8:
        """The page type of each pfn, ABSENT where it has no frame."""
        out = np.where(self.mfns(pfns) == NO_FRAME, np.uint8(ABSENT), np.uint8(PageType.NOTAB))
        row = self._rows(pfns)
        if len(self._chunks):
            told = (out != ABSENT) & (self._typed[row] >= 0)
            out[told] = self._types.get(self._typed[row[told]], pfns[told] & _WITHIN) & ~_LOCAL
        return out

    def put_types(self, pfns: U64, types: U8) -> None:
        """Say of which type pages are, all of which have a frame; of a pfn that stands here twice the last counts.

        A table's entries hold pfns then.
        """
        chunks, count = chunks_of(pfns)
        rows = self._chunks.find(chunks)
        plain = types == PageType.NOTAB
        if plain.all() and (self._typed[rows] < 0).all():
            return
        row = np.repeat(rows, count)
        new = np.flatnonzero(np.bincount(row[~plain & (self._typed[row] < 0)]))
        self._typed[new] = self._types.take(len(new))
        told = self._typed[row] >= 0
        self._types.put(self._typed[row[told]], pfns[told] & _WITHIN, types[told])

    def put_local(self, tables: U64) -> None:
        """Say that the entries of page tables hold mfns now."""
        row, within = self._typed[self._rows(tables)], tables & _WITHIN
        self._types.put(row, within, self._types.get(row, within) | _LOCAL)

    def is_local(self, tables: U64) -> Mask:
        """Which page tables' entries hold mfns."""
        row = self._typed[self._rows(tables)]
        found: Mask = self._types.get(row, tables & _WITHIN) & _LOCAL != 0
        return found

    def tables(self) -> tuple[U64, U8]:
        """All page tables: their pfns, ascending, and types."""
        rows = self._chunks.rows[self._typed[self._chunks.rows] >= 0]
        pfns, kinds = [np.empty(0, np.uint64)], [np.empty(0, np.uint8)]
        for i in range(0, len(rows), PAGES_PER_BATCH):
            some = rows[i : i + PAGES_PER_BATCH]
            types = self._types.rows(self._typed[some]) & ~_LOCAL
            which, within = np.nonzero(IS_TABLE[types])
            pfns.append(self._chunks.number[some[which]] << _SHIFT | within.astype(np.uint64))
            kinds.append(types[which, within])
        return np.concatenate(pfns), np.concatenate(kinds)


def chunks_of(pfns: U64) -> tuple[U64, I64]:
    """The chunk of each run of pfns that lie in one, and how many they are. Neighbours mostly come together."""
    chunks = pfns >> _SHIFT
    if not len(chunks):
        return chunks, np.empty(0, np.int64)
    cuts = np.flatnonzero(chunks[1:] != chunks[:-1])
    bounds = np.empty(len(cuts) + 2, np.int64)
    bounds[0], bounds[1:-1], bounds[-1] = 0, cuts + 1, len(chunks)
    return chunks[bounds[:-1]], bounds[1:] - bounds[:-1]


class _Numbers:
    """Numbers as they come, each with a row: 0 for the first, and so on."""

    def __init__(self) -> None:
        self.ascending = np.empty(0, np.uint64)
        self.rows = np.empty(0, np.int64)  # in that order
        self._number = np.empty(0, np.uint64)  # by row; what is behind the last is room
        self._room = np.empty(0, np.uint64), np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.ascending)

    @property
    def number(self) -> U64:
        """The number of each row."""
        return self._number[: len(self)]

    def find(self, numbers: U64) -> I64:
        """The row of each, -1 for one that is not there."""
        if not len(self):
            return np.full(numbers.shape, -1, np.int64)
        at = np.minimum(np.searchsorted(self.ascending, numbers), len(self) - 1)
        return np.where(self.ascending[at] == numbers, self.rows[at], -1)

    def have(self, numbers: U64) -> I64:
        """The row of each, after those that have none got one."""
        row = self.find(numbers)
        if (row >= 0).all():
            return row
        new, old = np.unique(numbers[row < 0]), len(self)
        total = old + len(new)
        if total > len(self._number):
            room = max(total, 2 * len(self._number)) - len(self._number)
            self._number = np.append(self._number, np.zeros(room, np.uint64))
            sorted_, rows = self._room
            self._room = np.append(sorted_, np.zeros(room, np.uint64)), np.append(rows, np.zeros(room, np.int64))
        self._number[old:total] = new
        ascending, rows = self._room
        ascending[old:total], rows[old:total] = new, np.arange(old, total)
        if old and new[0] < ascending[old - 1]:  # seldom: they mostly come in order
            order = np.argsort(ascending[:total], kind="stable")
            ascending[:total], rows[:total] = ascending[:total][order], rows[:total][order]
        self.ascending, self.rows = ascending[:total], rows[:total]
        return self.find(numbers)


class _Tables:
    """Tables of CHUNK values, numbered from 0; memory for them is taken in blocks, and never moved."""

    def __init__(self, dtype: npt.DTypeLike, empty: Any) -> None:
        self._dtype, self._empty = dtype, empty
        self._blocks: list[npt.NDArray[Any]] = []
        self._used = 0

    def take(self, n: int) -> npt.NDArray[np.int32]:
        """So many new ones, all empty."""
        first, self._used = self._used, self._used + n
        while len(self._blocks) * _BLOCK < self._used:
            self._blocks.append(np.full((_BLOCK, CHUNK), self._empty, self._dtype))
        return np.arange(first, self._used, dtype=np.int32)

    def get(self, tables: npt.NDArray[np.int32], within: U64) -> npt.NDArray[Any]:
        """One value each."""
        out = np.empty(len(tables), self._dtype)
        for block, mine in self._by_block(tables):
            out[mine] = block[tables[mine] % _BLOCK, within[mine]]
        return out

    def rows(self, tables: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
        """All values of each: (n, CHUNK)."""
        out = np.empty((len(tables), CHUNK), self._dtype)
        for block, mine in self._by_block(tables):
            out[mine] = block[tables[mine] % _BLOCK]
        return out

    def put(self, tables: npt.NDArray[np.int32], within: U64, values: npt.NDArray[Any]) -> None:
        """One value each; of a place that is named twice the last."""
        for block, mine in self._by_block(tables):
            block[tables[mine] % _BLOCK, within[mine]] = values[mine]

    def _by_block(self, tables: npt.NDArray[np.int32]) -> list[tuple[npt.NDArray[Any], Any]]:
        which = tables // _BLOCK
        first = which[:1].tolist()
        if first and (which == first[0]).all():
            return [(self._blocks[first[0]], slice(None))]
        return [(self._blocks[number], np.flatnonzero(which == number)) for number in np.unique(which).tolist()]
