"""Loads the pages of a stream into the frames of a domain.

Content is read straight into the domain's own memory. Page tables keep their pfns there until they can be localised
(page_tables.py), so a pfn is populated only with its own page and its neighbours: as an extent where they fill one.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np

from xenpv.errors import HostError, RequestError
from xenpv.frames import (
    HAS_DATA,
    IS_POPULATED,
    IS_TABLE,
    NO_FRAME,
    PAGE_SIZE,
    PAGES_PER_BATCH,
    PFNS_PER_BATCH,
    U8,
    U64,
    DomId,
)
from xenpv.host.protocol import DomainInfo, Toolstack
from xenpv.io.background import BackgroundWorker
from xenpv.memory.page_tables import as_ptes, localise
from xenpv.memory.physmap import CHUNK, CHUNK_ORDER, Physmap, group_by_chunk
from xenpv.restore.page_tables import PageTableLocaliser
from xenpv.stream.contents import Contents
from xenpv.stream.page_data import PageData, ReadInto

DeferRead = Callable[[int], ReadInto]
"""defer_read(size): reserve the next ``size`` bytes; the result reads them at any time, in any thread."""


class MemoryLoader:
    """Loads PAGE_DATA records into a domain's memory; a context manager.

    Args:
        host: The host of the domain.
        info: The domain, which has its final width.
        contents: The other records of the stream, as they come.

    Attributes:
        physmap: Frames and types of all pages that were received.
        tables: Localises the domain's page tables.
        differing: After verify(): pfns of pages that were sent again with other content.
    """

    def __init__(self, host: Toolstack, info: DomainInfo, contents: Contents) -> None:
        self.host = host
        self._contents = contents
        self.domid: DomId = info.domid
        self.physmap = Physmap()
        self.differing = np.empty(0, np.uint64)
        self.tables = PageTableLocaliser(host, info, self.physmap)
        self._verifying = False
        self._max_pages = info.max_pages
        self._highest_pfn = 0  # of all that were received
        self._worker = BackgroundWorker()
        self._target = ExitStack()  # mappings that the background read fills
        self._in_transit = np.empty(0, np.uint64)  # pfns of tables that the background read fills
        self._received_tables: list[U64] = []  # complete, and not yet added to ``tables``

    def verify(self) -> None:
        """Compare all following pages with what the domain has.

        Call this when a VERIFY record was received.
        """
        self._verifying = True

    def load(self, record: PageData, read_into: ReadInto, defer_read: DeferRead | None = None) -> None:
        """Populate the pfns of one record, and read its content into their frames.

        Args:
            record: The types and pfns.
            read_into: Reads the record's content, in order.
            defer_read: Reads it later, in the background. Content may then be incomplete until flush().

        Raises:
            RequestError: The domain's max_pages is too low.
            HostError: The host has no memory left, or refuses a call.
            Exception: Whatever reading raised, for this record or for the one before.
        """
        self._localise_received()  # before one of them is read again
        pfns, types = record.pfns, record.types
        for i in range(0, len(pfns), PFNS_PER_BATCH):
            self._load_entries(pfns[i : i + PFNS_PER_BATCH], types[i : i + PFNS_PER_BATCH], read_into, defer_read)

    def _load_entries(self, pfns: U64, types: U8, read_into: ReadInto, defer_read: DeferRead | None) -> None:
        """Populate pages of a record, note their types, and read their content.

        Page tables go to the PageTableLocaliser, which localises each when the highest pfn in it has come.
        """
        again = pfns[self.physmap.lookup(pfns) != NO_FRAME]
        if len(again):
            self._finish_read()
            self.tables.check_before_resend(again, self._contents.end_pfn)
        each_once = _is_ascending(pfns)
        self.populate(pfns[IS_POPULATED[types]])
        self._highest_pfn = max(self._highest_pfn, int(pfns.max()))
        mfns = self.physmap.lookup(pfns)
        # A populated pfn that is sent again without a frame keeps its frame, as in libxenguest: the guest's p2m lists
        # all frames, and nothing tells the guest. Its new type is what matters: it is no page table any more.
        populated = mfns != NO_FRAME
        self.physmap.set_types(pfns[populated], types[populated])
        has_data = HAS_DATA[types]
        pfns, mfns, types = pfns[has_data], mfns[has_data], types[has_data]
        for i in range(0, len(pfns), PAGES_PER_BATCH):
            batch = slice(i, i + PAGES_PER_BATCH)
            if each_once and not self._verifying:
                self._read_into_frames(mfns[batch], pfns[batch][IS_TABLE[types[batch]]], read_into, defer_read)
            else:
                self._finish_read()
                self._overwrite(pfns[batch], mfns[batch], types[batch], read_into)

    def populate(self, pfns: U64) -> None:
        """Give a frame to each of these pfns that has none.

        Uses an extent wherever all of its pfns are named.

        Raises:
            RequestError: The domain's max_pages is too low.
            HostError: The host has no memory left.
        """
        physmap = self.physmap
        new = pfns[physmap.lookup(pfns) == NO_FRAME]
        if not len(new):
            return
        if not _is_ascending(new):
            new = np.unique(new)
        needed = physmap.populated + len(new)
        if needed > self._max_pages:
            problem = f"dom{self.domid} may have {self._max_pages:#x} pages, and the stream has {needed:#x} so far"
            raise RequestError(f"{problem}: give it more memory", needed=needed, available=self._max_pages)
        chunks, count = group_by_chunk(new)
        full = np.flatnonzero(count == CHUNK)
        if len(full):
            mfns = self.host.populate_physmap(self.domid, chunks[full] << np.uint64(CHUNK_ORDER), CHUNK_ORDER)
            physmap.add_extents(chunks[full[: len(mfns)]], mfns)
            is_single = np.ones(len(count), np.bool_)
            is_single[full[: len(mfns)]] = False
            new = new[np.repeat(is_single, count)]
        if len(new):
            mfns = self.host.populate_physmap(self.domid, new)
            physmap.add_pages(new[: len(mfns)], mfns)
            if len(mfns) < len(new):
                problem = f"dom{self.domid} needs {needed:#x} pages, and the host gave only {physmap.populated:#x}"
                advice = "free memory on the host"
                raise HostError(f"{problem}: {advice}", op="populate_physmap", domid=self.domid, errno=errno.ENOMEM)

    def _read_into_frames(self, mfns: U64, tables: U64, read_into: ReadInto, defer_read: DeferRead | None) -> None:
        """Read content straight into distinct frames.

        A deferred read happens in the background, while the next frames are mapped.
        """
        with ExitStack() as mapping:
            pages = mapping.enter_context(self.host.map_writable(self.domid, mfns))
            buffer = pages.reshape(-1).data
            self._finish_read()
            self._in_transit = tables
            if defer_read is None:
                read_into(buffer)
            else:
                self._worker.submit(partial(defer_read(len(buffer)), buffer))
                self._target = mapping.pop_all()

    def flush(self) -> None:
        """Wait until all content is in the domain's memory.

        Raises whatever reading it raised.
        """
        self._finish_read()
        self._localise_received()

    def _finish_read(self) -> None:
        """Wait for the background read, and unmap its frames."""
        try:
            self._worker.wait()
        finally:
            self._target.close()
        self._received_tables.append(self._in_transit)
        self._in_transit = self._in_transit[:0]

    def _localise_received(self) -> None:
        pfns = np.concatenate([self._in_transit[:0], *self._received_tables])
        self._received_tables = []
        self.tables.add_received(pfns, self._highest_pfn, self._in_transit)

    def _overwrite(self, pfns: U64, mfns: U64, types: U8, read_into: ReadInto) -> None:
        """Write content by way of a buffer.

        If a frame is named twice, the last content counts.
        """
        content = np.empty((len(mfns), PAGE_SIZE), np.uint8)
        read_into(content.reshape(-1).data)
        is_table = IS_TABLE[types]
        levels = types[is_table] & np.uint8(7)
        self.tables.check_range(as_ptes(content[is_table]), pfns[is_table], levels, self._contents.end_pfn)
        distinct, rows = np.unique(mfns[::-1], return_index=True)
        content, pfns, is_table = content[::-1][rows], pfns[::-1][rows], is_table[::-1][rows]
        with self.host.map_writable(self.domid, distinct) as pages:
            if self._verifying:
                differs = (pages != content).any(axis=1)
                local, _ = localise(as_ptes(content[is_table]), self.physmap.lookup)
                differs[is_table] &= (as_ptes(pages[is_table]) != local).any(axis=1)
                self.differing = np.union1d(self.differing, pfns[differs])
            pages[:] = content
        self._received_tables.append(pfns[is_table])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        with self._target:  # mapped until the background read has ended
            self._worker.__exit__(kind, e, tb)


def _is_ascending(pfns: U64) -> bool:
    """Whether pfns ascend, so that each is named once. All savers send them so."""
    return bool((pfns[1:] > pfns[:-1]).all())
