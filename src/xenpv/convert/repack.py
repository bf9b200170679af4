"""PAGE_DATA between two streams: repacking pages and leaving out content."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from xenpv.frames import HAS_DATA, PAGE_SIZE, U8, U64, Mask, PageType, nonzero_pages
from xenpv.stream.framing import RECORD_LENGTH_MAX
from xenpv.stream.page_data import PFN_MASK, RESERVED_MASK, TYPE_SHIFT, ReadInto

BATCH = 1024  # pages of a record of libxenguest's
BATCH_MAX = (RECORD_LENGTH_MAX - 8) // (8 + PAGE_SIZE)

_CHUNK_SHIFT = 12  # a chunk of PfnMarks has no more bytes than the page that made it

Batch = tuple[U64, list[U8]]
"""Entries as in PAGE_DATA, and the content of those that have some, in arrays of shape (n, 4096)."""


class PfnMarks:
    """A number from 0 to 255 for each pfn, 0 at first.

    Memory is taken only for chunks of pfns with other numbers.
    """

    def __init__(self) -> None:
        self._chunks: dict[int, U8] = {}

    def set(self, pfns: U64, marks: U8 | int) -> None:
        """Set the numbers of pfns, each its own or all the same.

        The last one of a pfn counts.
        """
        marks = np.broadcast_to(np.asarray(marks, np.uint8), pfns.shape)
        for number, selected, within in _split_chunks(pfns):
            self._chunks.setdefault(number, np.zeros(1 << _CHUNK_SHIFT, np.uint8))[within[selected]] = marks[selected]

    def get(self, pfns: U64) -> U8:
        """Return the number of each pfn."""
        out = np.zeros(len(pfns), np.uint8)
        for number, selected, within in _split_chunks(pfns):
            if number in self._chunks:
                out[selected] = self._chunks[number][within[selected]]
        return out

    def __iter__(self) -> Iterator[tuple[U64, U8]]:
        """Yield the pfns whose number is not 0, and their numbers.

        Pfns ascend, and come chunk by chunk.
        """
        for number in sorted(self._chunks):
            marks = self._chunks[number]
            within = np.flatnonzero(marks)
            yield within.astype(np.uint64) + np.uint64(number << _CHUNK_SHIFT), marks[within]


def _split_chunks(pfns: U64) -> Iterator[tuple[int, Mask, U64]]:
    """Yield the number, the mask of pfns and their indices for each chunk.

    The mask tells which pfns lie in the chunk. An index is a pfn's place within its own chunk.
    """
    numbers, within = pfns >> np.uint64(_CHUNK_SHIFT), pfns & np.uint64((1 << _CHUNK_SHIFT) - 1)
    for number in np.unique(numbers).tolist():
        yield number, numbers == number, within


class PageRepacker:
    """Packs pages into PAGE_DATA records.

    Args:
        batch: pages per record. None keeps the input's records, but splits those larger than libxenguest's.
        drop_zero: send a page of zeros as XALLOC, without content. Excepted are pfns of ``keep_content``, and those
            that came with other content before.

    Attributes:
        pages: pages with content in the records so far.
        zero_pages: pages of zeros that were sent without content.
    """

    def __init__(self, batch: int | None = None, *, drop_zero: bool = False) -> None:
        self.pages = 0
        self.zero_pages = 0
        self._required_pfns = PfnMarks()  # those of keep_content
        self._batch = batch or BATCH
        self._join_records = batch is not None
        self._nonzero_pfns = PfnMarks() if drop_zero else None  # pfns that came with content other than zeros
        self._entries = np.empty(0, np.uint64)
        self._contents: list[U8] = []

    def keep_content(self, pfns: U64) -> None:
        """Send these pfns with their content, even if it is zeros."""
        self._required_pfns.set(pfns, 1)

    def add(self, entries: U64, read_into: ReadInto) -> Iterator[Batch]:
        """Add a record's entries; yield the records that are full now.

        ``read_into`` gives their content. Of a pfn that the record has twice the last one counts, as for a restorer.
        """
        entries = entries & np.uint64(~RESERVED_MASK & (1 << 64) - 1)
        for first in range(0, len(entries), self._batch):
            batch = entries[first : first + self._batch]
            content = np.empty((int(np.count_nonzero(content_mask(batch))), PAGE_SIZE), np.uint8)
            read_into(content.reshape(-1).data)
            batch, content = _keep_last(batch, content)
            if self._nonzero_pfns is not None:
                batch, content = self._drop_zero_pages(batch, content)
            self.pages += len(content)
            if not self._join_records:
                yield batch, [content]
                continue
            if np.isin(batch & np.uint64(PFN_MASK), self._entries & np.uint64(PFN_MASK)).any():
                yield from self.flush()  # a pfn may come only once in a record
            self._entries = np.append(self._entries, batch)
            self._contents.append(content)
            if len(self._entries) >= self._batch:
                yield self._pop_full_record()

    def _pop_full_record(self) -> Batch:
        entries, self._entries = self._entries[: self._batch], self._entries[self._batch :]
        contents, self._contents = self._contents, []
        remaining_pages = int(np.count_nonzero(content_mask(self._entries)))
        if remaining_pages:
            last = contents[-1]
            contents[-1], self._contents = last[:-remaining_pages], [last[-remaining_pages:]]
        return entries, contents

    def flush(self) -> Iterator[Batch]:
        """Yield the record that is not full, since a record of another type follows."""
        if len(self._entries):
            entries, contents = self._entries, self._contents
            self._entries, self._contents = entries[:0], []
            yield entries, contents

    def _drop_zero_pages(self, entries: U64, content: U8) -> tuple[U64, U8]:
        """Return the entries and content of a batch without the content of pages of zeros."""
        assert self._nonzero_pfns is not None
        with_data = np.flatnonzero(content_mask(entries))
        pfns = entries[with_data] & np.uint64(PFN_MASK)
        nonzero = nonzero_pages(content)
        droppable = ~nonzero & (entries[with_data] >> np.uint64(TYPE_SHIFT) == PageType.NOTAB)
        droppable &= (self._required_pfns.get(pfns) == 0) & (self._nonzero_pfns.get(pfns) == 0)
        self._nonzero_pfns.set(pfns[nonzero], 1)
        if not droppable.any():
            return entries, content
        self.zero_pages += int(np.count_nonzero(droppable))
        entries = entries.copy()
        entries[with_data[droppable]] = pfns[droppable] | np.uint64(PageType.XALLOC << TYPE_SHIFT)
        return entries, content[~droppable]


def _keep_last(entries: U64, content: U8) -> tuple[U64, U8]:
    """Return a batch with only the last entry of each pfn, and its content."""
    pfns = entries & np.uint64(PFN_MASK)
    if len(pfns) < 2 or (pfns[1:] > pfns[:-1]).all():
        return entries, content
    _, from_end = np.unique(pfns[::-1], return_index=True)
    kept = np.zeros(len(pfns), np.bool_)
    kept[len(pfns) - 1 - from_end] = True
    return entries[kept], content[kept[content_mask(entries)]]


def content_mask(entries: U64) -> Mask:
    """Return the mask of the entries of PAGE_DATA that have content."""
    return np.asarray(HAS_DATA[(entries >> np.uint64(TYPE_SHIFT)).astype(np.uint8)])
