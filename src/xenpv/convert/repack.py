"""PAGE_DATA on its way from one stream to another: cut anew, and page content left out."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from xenpv.frames import HAS_DATA, PAGE_SIZE, U8, U64, Mask, PageType, filled
from xenpv.stream.framing import RECORD_LENGTH_MAX
from xenpv.stream.pagedata import PFN_MASK, RESERVED_MASK, TYPE_SHIFT, ReadInto

BATCH = 1024  # pages of a record, as libxenguest has them
BATCH_MAX = (RECORD_LENGTH_MAX - 8) // (8 + PAGE_SIZE)

_PIECE_SHIFT = 12  # pfns of one piece of Marks: no more bytes than a page that made it

Batch = tuple[U64, list[U8]]
"""Entries as in PAGE_DATA, and the content of those that have some, in arrays of shape (n, 4096)."""


class Marks:
    """A number from 1 to 255 for some pfns, as they come, and 0 for all others. Its memory follows where they lie."""

    def __init__(self) -> None:
        self._pieces: dict[int, U8] = {}

    def put(self, pfns: U64, marks: U8 | int) -> None:
        """Give some their number, each its own or all the same; the last one counts."""
        marks = np.broadcast_to(np.asarray(marks, np.uint8), pfns.shape)
        for number, of, within in _pieces(pfns):
            self._pieces.setdefault(number, np.zeros(1 << _PIECE_SHIFT, np.uint8))[within[of]] = marks[of]

    def of(self, pfns: U64) -> U8:
        """The number of each."""
        out = np.zeros(len(pfns), np.uint8)
        for number, of, within in _pieces(pfns):
            if number in self._pieces:
                out[of] = self._pieces[number][within[of]]
        return out

    def __iter__(self) -> Iterator[tuple[U64, U8]]:
        """The pfns that have one, ascending, and their numbers; some at a time."""
        for number in sorted(self._pieces):
            marks = self._pieces[number]
            within = np.flatnonzero(marks)
            yield within.astype(np.uint64) + np.uint64(number << _PIECE_SHIFT), marks[within]


def _pieces(pfns: U64) -> Iterator[tuple[int, Mask, U64]]:
    """The number of each piece that pfns lie in, which of them do, and where within it all would."""
    numbers, within = pfns >> np.uint64(_PIECE_SHIFT), pfns & np.uint64((1 << _PIECE_SHIFT) - 1)
    for number in np.unique(numbers).tolist():
        yield number, numbers == number, within


class PageRepacker:
    """Cuts pages into records.

    ``batch``: so many pages to a record, whatever they were in before; None leaves records as they are, and cuts those
    that have more than libxenguest's. ``drop_zero``: a page that holds nothing but zeros comes as XALLOC, without
    content, unless its pfn is one of ``keep`` or came with other content before.
    """

    def __init__(self, batch: int | None = None, *, drop_zero: bool = False) -> None:
        self.pages = 0  # with content
        self.dropped = 0
        self.keep = np.empty(0, np.uint64)  # ascending
        self._batch = batch or BATCH
        self._join = batch is not None
        self._filled = Marks() if drop_zero else None
        self._entries = np.empty(0, np.uint64)
        self._contents: list[U8] = []

    def put(self, entries: U64, take: ReadInto) -> Iterator[Batch]:
        """A record's entries, and what its content is taken from; the records that are full now."""
        entries = entries & np.uint64(~RESERVED_MASK & (1 << 64) - 1)
        for first in range(0, len(entries), self._batch):
            some = entries[first : first + self._batch]
            content = np.empty((int(np.count_nonzero(has_data(some))), PAGE_SIZE), np.uint8)
            take(content.reshape(-1).data)
            if self._filled is not None:
                some, content = self._without_zeros(some, content)
            self.pages += len(content)
            if not self._join:
                yield some, [content]
                continue
            if np.isin(some & np.uint64(PFN_MASK), self._entries & np.uint64(PFN_MASK)).any():
                yield from self.flush()  # in one record a pfn stands once
            self._entries = np.append(self._entries, some)
            self._contents.append(content)
            if len(self._entries) >= self._batch:
                yield self._full()

    def _full(self) -> Batch:
        entries, self._entries = self._entries[: self._batch], self._entries[self._batch :]
        contents, self._contents = self._contents, []
        over = int(np.count_nonzero(has_data(self._entries)))
        if over:
            last = contents[-1]
            contents[-1], self._contents = last[:-over], [last[-over:]]
        return entries, contents

    def flush(self) -> Iterator[Batch]:
        """What is not full, because something else than pages follows."""
        if len(self._entries):
            entries, contents = self._entries, self._contents
            self._entries, self._contents = entries[:0], []
            yield entries, contents

    def _without_zeros(self, entries: U64, content: U8) -> tuple[U64, U8]:
        assert self._filled is not None
        at = np.flatnonzero(has_data(entries))
        pfns = entries[at] & np.uint64(PFN_MASK)
        full = filled(content)
        zero = ~full & (entries[at] >> np.uint64(TYPE_SHIFT) == PageType.NOTAB)
        zero &= ~np.isin(pfns, self.keep) & (self._filled.of(pfns) == 0)
        self._filled.put(pfns[full], 1)
        if not zero.any():
            return entries, content
        self.dropped += int(np.count_nonzero(zero))
        entries = entries.copy()
        entries[at[zero]] = pfns[zero] | np.uint64(PageType.XALLOC << TYPE_SHIFT)
        return entries, content[~zero]


def has_data(entries: U64) -> Mask:
    """Which entries have content."""
    return np.asarray(HAS_DATA[(entries >> np.uint64(TYPE_SHIFT)).astype(np.uint8)])
