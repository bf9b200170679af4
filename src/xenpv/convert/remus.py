"""Pages that come as what has changed in them, under Remus with compression: made whole, and each written once.

Nothing but the last content of a page counts where a stream becomes a file. So what comes out, and what is kept
meanwhile, is bounded by the pages that came whole: nobody can say what has changed in another one. Written as they
came, pages could come out of a few bytes each, checkpoint by checkpoint, without end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import BytesIO
from typing import IO

import numpy as np

from xenpv.convert.repack import BATCH, Marks, has_data
from xenpv.errors import Malformed, Unsupported
from xenpv.frames import PAGE_SIZE, U8, U64, first_bad
from xenpv.io.tempfile import unlinked_file
from xenpv.runs import group_rows
from xenpv.source.saved import FilePages
from xenpv.stream import delta
from xenpv.stream.events import PageDeltas
from xenpv.stream.index import PageIndex
from xenpv.stream.pagedata import PFN_MASK, TYPE_SHIFT, PageData, ReadInto

_NAMED, _MADE = 0x10, 0x20  # marks of a pfn, over its last type: that it has one; it has content


class DeltaStore:
    """The pages that came as changes, and what those change: of a file, all that was sent; of a pipe, only them.

    Content is in a file without a name, where each page has one place, at its pfn.
    """

    def __init__(self, fd: int | None, base: int) -> None:
        self._plain = PageIndex()
        self._source = None if fd is None else FilePages(fd, self._plain, self._plain, base)
        self._marks = Marks()
        self._file: IO[bytes] | None = None

    @property
    def begun(self) -> bool:
        """Whether changes have come: from then on no page comes in another way."""
        return self._file is not None

    def plain(self, record: PageData) -> None:
        """A record as it stands in the input."""
        if self._source is not None:
            self._plain.add(record)

    def name(self, entries: U64) -> None:
        """Entries behind the first changes, as in PAGE_DATA: what they say of each pfn counts."""
        pfns = entries & np.uint64(PFN_MASK)
        types = (entries >> np.uint64(TYPE_SHIFT)).astype(np.uint8)
        self._marks.put(pfns, types | self._marks.of(pfns) & np.uint8(_MADE) | np.uint8(_NAMED))

    def change(self, deltas: PageDeltas) -> None:
        """Make pages what they are from now on. Unsupported, where what changes is not there."""
        if self._file is None:
            self._file = os.fdopen(unlinked_file(), "w+b")
        entries = np.frombuffer(deltas.entries, "<u8")
        pfns = (entries & np.uint64(PFN_MASK))[has_data(entries)]
        distinct, times = np.unique(pfns, return_counts=True)
        if (twice := first_bad(times > 1)) is not None:
            what = f"pfn {int(distinct[twice]):#x} comes twice among the changes of one checkpoint"
            raise Malformed(what, offset=deltas.offset, record=PageDeltas.name)
        starts = [0, *deltas.ends][: len(pfns)]
        need = np.array([not delta.is_full_page(deltas.data, at) for at in starts], np.bool_)
        content = np.zeros((len(pfns), PAGE_SIZE), np.uint8)
        content[need] = self._before(pfns[need], deltas.offset)
        for page, at in zip(content, starts, strict=True):
            delta.apply_changes(deltas.data, at, page.data)
        for pfn, rows in _runs(pfns):
            self._file.seek(pfn * PAGE_SIZE)
            self._file.write(content[rows].data)
        self._marks.put(pfns, _MADE)
        self.name(entries)

    def _before(self, pfns: U64, at: int) -> U8:
        content = np.empty((len(pfns), PAGE_SIZE), np.uint8)
        made = self._marks.of(pfns) & _MADE != 0
        there = made if self._source is None else made | (self._plain.offsets(pfns) >= 0)
        if not there.all():
            pfn = int(pfns[np.argmin(there)])
            what = f"pfn {pfn:#x} comes as what has changed in it, and what that was is not there"
            raise Unsupported(f"{what}; convert from a file, not from a pipe", offset=at, record=PageDeltas.name)
        content[made] = self._made(pfns[made])
        if not made.all():
            assert self._source is not None
            content[~made] = self._source.pages(pfns[~made])
        return content

    def _made(self, pfns: U64) -> U8:
        assert self._file is not None
        content = bytearray(len(pfns) * PAGE_SIZE)
        for pfn, rows in _runs(pfns):
            self._file.seek(pfn * PAGE_SIZE)
            length = (rows.stop - rows.start) * PAGE_SIZE
            content[rows.start * PAGE_SIZE : rows.stop * PAGE_SIZE] = self._file.read(length)
        return np.frombuffer(content, np.uint8).reshape(-1, PAGE_SIZE)

    def pages(self) -> Iterator[tuple[U64, ReadInto]]:
        """All that were named, with their last types and content: entries as in PAGE_DATA, some at a time."""
        for pfns, marks in self._marks:
            for first in range(0, len(pfns), BATCH):
                some = slice(first, first + BATCH)
                entries = pfns[some] | (marks[some] & np.uint8(0xF)).astype(np.uint64) << np.uint64(TYPE_SHIFT)
                content = BytesIO(self._made(pfns[some][has_data(entries)]).data)
                yield entries, content.readinto

    def close(self) -> None:
        """Give the temporary file back."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _runs(pfns: U64) -> Iterator[tuple[int, slice]]:
    """Iterate over runs of consecutive pfns, in any order: the first pfn, and the rows of the run."""
    starts, sizes = group_rows(np.diff(pfns) != 1, len(pfns))
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        yield int(pfns[start]), slice(start, start + size)
