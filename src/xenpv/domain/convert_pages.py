"""PAGE_DATA on its way from one stream to another: cut anew, page content left out, what changed made whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np

from xenpv.domain.source import FilePages, unlinked_file
from xenpv.errors import Unsupported
from xenpv.frames import HAS_DATA, PAGE_SIZE, U8, U64, Mask, PageType, filled
from xenpv.stream import delta
from xenpv.stream.events import Deltas
from xenpv.stream.index import PageIndex
from xenpv.stream.pagedata import PFN_MASK, RESERVED_MASK, TYPE_SHIFT, PageData
from xenpv.stream.records import RECORD_LENGTH_MAX

BATCH = 1024  # pages of a record, as libxenguest has them
BATCH_MAX = (RECORD_LENGTH_MAX - 8) // (8 + PAGE_SIZE)

_SEEN_SHIFT = 12  # pfns of one piece of a Seen: no more bytes than the page that made it

Take = Callable[[memoryview], None]
Batch = tuple[U64, list[U8]]
"""Entries as in PAGE_DATA, and the content of those that have some, in arrays of shape (n, 4096)."""


class Seen:
    """Some pfns, as they come. Its memory follows where they lie."""

    def __init__(self) -> None:
        self._pieces: dict[int, Mask] = {}

    def add(self, pfns: U64) -> None:
        """Note some."""
        for number, of, within in _pieces(pfns):
            self._pieces.setdefault(number, np.zeros(1 << _SEEN_SHIFT, np.bool_))[within[of]] = True

    def has(self, pfns: U64) -> Mask:
        """Which of them were noted."""
        out = np.zeros(len(pfns), np.bool_)
        for number, of, within in _pieces(pfns):
            if number in self._pieces:
                out[of] = self._pieces[number][within[of]]
        return out


def _pieces(pfns: U64) -> Iterator[tuple[int, Mask, U64]]:
    """The number of each piece that pfns lie in, which of them do, and where within it all would."""
    numbers, within = pfns >> np.uint64(_SEEN_SHIFT), pfns & np.uint64((1 << _SEEN_SHIFT) - 1)
    for number in np.unique(numbers).tolist():
        yield number, numbers == number, within


class Cutter:
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
        self._filled = Seen() if drop_zero else None
        self._entries = np.empty(0, np.uint64)
        self._contents: list[U8] = []

    def put(self, record: PageData, take: Take) -> Iterator[Batch]:
        """A record, and what its content is taken from; the records that are full now."""
        entries = record.entries & np.uint64(~RESERVED_MASK & (1 << 64) - 1)
        for first in range(0, len(entries), self._batch):
            some = entries[first : first + self._batch]
            content = np.empty((int(np.count_nonzero(_has_data(some))), PAGE_SIZE), np.uint8)
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
        over = int(np.count_nonzero(_has_data(self._entries)))
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
        at = np.flatnonzero(_has_data(entries))
        pfns = entries[at] & np.uint64(PFN_MASK)
        full = filled(content)
        zero = ~full & (entries[at] >> np.uint64(TYPE_SHIFT) == PageType.NOTAB)
        zero &= ~np.isin(pfns, self.keep) & ~self._filled.has(pfns)
        self._filled.add(pfns[full])
        if not zero.any():
            return entries, content
        self.dropped += int(np.count_nonzero(zero))
        entries = entries.copy()
        entries[at[zero]] = pfns[zero] | np.uint64(PageType.XALLOC << TYPE_SHIFT)
        return entries, content[~zero]


def _has_data(entries: U64) -> Mask:
    return np.asarray(HAS_DATA[(entries >> np.uint64(TYPE_SHIFT)).astype(np.uint8)])


class Earlier:
    """Page content that was sent before: what deltas change. Of a file, all; of a pipe, what itself came as deltas."""

    def __init__(self, fd: int | None, base: int) -> None:
        self._plain = PageIndex()
        self._made = PageIndex()
        self._spool: int | None = None
        self._source = None if fd is None else FilePages(fd, self._plain, self._plain, base)

    def plain(self, record: PageData) -> None:
        """A record as it stands in the input."""
        if self._source is not None:
            self._plain.add(record)

    def whole(self, deltas: Deltas) -> tuple[PageData, Take]:
        """The pages that deltas make of what was sent before. Raises Unsupported, where that is not there."""
        entries = np.frombuffer(deltas.entries, "<u8")
        pfns = (entries & np.uint64(PFN_MASK))[_has_data(entries)]
        starts = [0, *deltas.ends][: len(pfns)]
        need = np.array([not delta.whole(deltas.data, at) for at in starts], np.bool_)
        content = np.zeros((len(pfns), PAGE_SIZE), np.uint8)
        content[need] = self._before(pfns[need], deltas.offset)
        for page, at in zip(content, starts, strict=True):
            delta.apply(deltas.data, at, page.data)
        if self._spool is None:
            self._spool = unlinked_file()
        end = os.lseek(self._spool, 0, os.SEEK_END)
        with os.fdopen(os.dup(self._spool), "ab", buffering=0) as file:
            file.write(content.data)
        self._made.put(entries, end)
        record = PageData(
            offset=deltas.offset,
            length=8 + len(deltas.entries) + content.nbytes,
            raw=deltas.entries,
            pages=len(pfns),
            pages_offset=0,
        )
        return record, _taking(content)

    def _before(self, pfns: U64, at: int) -> U8:
        content = np.empty((len(pfns), PAGE_SIZE), np.uint8)
        made = self._made.offsets(pfns) >= 0
        there = made if self._source is None else made | (self._plain.offsets(pfns) >= 0)
        if not there.all():
            pfn = int(pfns[np.argmin(there)])
            what = f"pfn {pfn:#x} comes as what has changed in it, and what that was is not there"
            raise Unsupported(f"{what}; convert from a file, not from a pipe", offset=at, record=Deltas.name)
        if made.any():
            assert self._spool is not None
            content[made] = FilePages(self._spool, self._made, self._made).pages(pfns[made])
        if not made.all():
            assert self._source is not None
            content[~made] = self._source.pages(pfns[~made])
        return content

    def close(self) -> None:
        """Give the temporary file back."""
        if self._spool is not None:
            os.close(self._spool)
            self._spool = None


def _taking(content: U8) -> Take:
    left = content.reshape(-1).data

    def take(into: memoryview) -> None:
        nonlocal left
        into[:] = left[: len(into)]
        left = left[len(into) :]

    return take
