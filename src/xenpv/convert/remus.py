"""Decompression of Remus deltas: each page is completed, and written once.

Only the last content of a page counts where a stream becomes a file. So output and temporary file are bounded by the
pages that came with content, since a delta needs earlier content. If each delta became a page of the output, a few
bytes at each checkpoint could fill the disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import BytesIO
from typing import IO

import numpy as np

from xenpv.convert.repack import BATCH, PfnMarks, content_mask
from xenpv.errors import Malformed, Unsupported
from xenpv.frames import PAGE_SIZE, U8, U64, first_bad
from xenpv.io.tempfile import unlinked_file
from xenpv.runs import group_rows
from xenpv.source.saved import FilePages
from xenpv.stream import delta
from xenpv.stream.events import PageDeltas
from xenpv.stream.index import PageIndex
from xenpv.stream.page_data import PFN_MASK, TYPE_SHIFT, PageData, ReadInto

_HAS_TYPE, _HAS_CONTENT = 0x10, 0x20  # marks of a pfn, beside its last type: both are set by deltas


class DeltaStore:
    """The pages that deltas change, with their last type and content.

    Content is in an unlinked file, where each page is at offset pfn * 4096.

    Args:
        fd: the input, if it is a file: earlier content of a page may be there. None for a pipe.
        base: offset of the stream in the input, in bytes.
    """

    def __init__(self, fd: int | None, base: int) -> None:
        self._input_index = PageIndex()
        self._input = None if fd is None else FilePages(fd, self._input_index, self._input_index, base)
        self._marks = PfnMarks()
        self._file: IO[bytes] | None = None

    @property
    def has_deltas(self) -> bool:
        """Whether a delta was applied; all later pages come as deltas."""
        return self._file is not None

    def add_base(self, record: PageData) -> None:
        """Note a record whose pages later deltas may change."""
        if self._input is not None:
            self._input_index.add(record)

    def set_types(self, entries: U64) -> None:
        """Set the types of pages from entries as in PAGE_DATA.

        The last one of a pfn counts.
        """
        pfns = entries & np.uint64(PFN_MASK)
        types = (entries >> np.uint64(TYPE_SHIFT)).astype(np.uint8)
        self._marks.set(pfns, types | self._marks.get(pfns) & np.uint8(_HAS_CONTENT) | np.uint8(_HAS_TYPE))

    def apply(self, deltas: PageDeltas) -> None:
        """Apply deltas to the last content of their pages.

        Raises:
            Malformed: a pfn comes twice.
            Unsupported: the earlier content of a page is not there.
        """
        if self._file is None:
            self._file = os.fdopen(unlinked_file(), "w+b")
        entries = np.frombuffer(deltas.raw, "<u8")
        pfns = (entries & np.uint64(PFN_MASK))[content_mask(entries)]
        distinct, count = np.unique(pfns, return_counts=True)
        repeated = first_bad(count > 1)
        if repeated is not None:
            message = f"pfn {int(distinct[repeated]):#x} comes twice among the compressed pages of one checkpoint"
            raise Malformed(message, offset=deltas.offset, record=PageDeltas.name)
        starts = [0, *deltas.ends][: len(pfns)]
        needs_base = np.array([not delta.is_full_page(deltas.data, start) for start in starts], np.bool_)
        content = np.zeros((len(pfns), PAGE_SIZE), np.uint8)
        content[needs_base] = self._read_base(pfns[needs_base], deltas.offset)
        for page, start in zip(content, starts, strict=True):
            delta.apply_changes(deltas.data, start, page.data)
        for pfn, rows in _consecutive(pfns):
            self._file.seek(pfn * PAGE_SIZE)
            self._file.write(content[rows].data)
        self._marks.set(pfns, _HAS_CONTENT)
        self.set_types(entries)

    def _read_base(self, pfns: U64, offset: int) -> U8:
        """Return the last content of pages, uint8 of shape (n, 4096).

        ``offset`` is that of the record that needs it, for the error.
        """
        content = np.empty((len(pfns), PAGE_SIZE), np.uint8)
        stored = self._marks.get(pfns) & _HAS_CONTENT != 0
        available = stored if self._input is None else stored | (self._input_index.offsets(pfns) >= 0)
        missing = first_bad(~available)
        if missing is not None:
            message = f"pfn {int(pfns[missing]):#x} comes as a delta, and its earlier content is not there"
            raise Unsupported(f"{message}; convert from a file, not from a pipe", offset=offset, record=PageDeltas.name)
        content[stored] = self._read_stored(pfns[stored])
        if not stored.all():
            assert self._input is not None
            content[~stored] = self._input.pages(pfns[~stored])
        return content

    def _read_stored(self, pfns: U64) -> U8:
        """Return the content of pages that deltas set before, shape (n, 4096)."""
        assert self._file is not None
        content = bytearray(len(pfns) * PAGE_SIZE)
        for pfn, rows in _consecutive(pfns):
            self._file.seek(pfn * PAGE_SIZE)
            length = (rows.stop - rows.start) * PAGE_SIZE
            content[rows.start * PAGE_SIZE : rows.stop * PAGE_SIZE] = self._file.read(length)
        return np.frombuffer(content, np.uint8).reshape(-1, PAGE_SIZE)

    def pages(self) -> Iterator[tuple[U64, ReadInto]]:
        """Yield all pages, ascending, in batches.

        A batch is entries as in PAGE_DATA, and the function that reads their content.
        """
        for pfns, marks in self._marks:
            for first in range(0, len(pfns), BATCH):
                batch = slice(first, first + BATCH)
                entries = pfns[batch] | (marks[batch] & np.uint8(0xF)).astype(np.uint64) << np.uint64(TYPE_SHIFT)
                content = BytesIO(self._read_stored(pfns[batch][content_mask(entries)]).data)
                yield entries, content.readinto

    def close(self) -> None:
        """Close the temporary file; calling it again does no harm."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _consecutive(pfns: U64) -> Iterator[tuple[int, slice]]:
    """Yield the first pfn and the rows of each run of consecutive pfns.

    The pfns may come in any order.
    """
    starts, sizes = group_rows(np.diff(pfns) != 1, len(pfns))
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        yield int(pfns[start]), slice(start, start + size)
