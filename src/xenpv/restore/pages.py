"""Pages of a stream, into a domain's frames as they come.

Content is read straight into the domain's own memory. Page tables lie there with pfns in their entries until what they
name has come too (restore_tables.py): so no pfn needs a frame before its own page has come, alone and not in an extent.
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
    U64,
    DomId,
    Mask,
)
from xenpv.host.protocol import Toolstack
from xenpv.io.background import BackgroundWorker
from xenpv.memory.pagetables import as_entries, localise
from xenpv.memory.physmap import CHUNK, ORDER, Physmap, chunks_of
from xenpv.restore.page_tables import TablesIn
from xenpv.stream.pagedata import PageData, ReadInto

Later = Callable[[int], ReadInto]
"""later(count): a take of the next so many bytes that may be called when others were taken, in another thread."""


class PagesIn:
    """The memory of a domain that is being filled.

    ``physmap`` is what it has, ``tables`` sees to those of its page tables. ``compare``: what comes now was sent before
    (a VERIFY record came), and ``differing`` has the pfns of pages that were not the same.
    """

    def __init__(self, host: Toolstack, domid: DomId) -> None:
        info = host.info(domid)
        self.host = host
        self.domid = domid
        self.physmap = Physmap()
        self.compare = False
        self.differing = np.empty(0, np.uint64)
        self.tables = TablesIn(host, info, self.physmap)
        self._max_pages = info.max_pages
        self._highest = 0  # pfn that came
        self._worker = BackgroundWorker()
        self._mapped = ExitStack()  # what is being read into
        self._coming = np.empty(0, np.uint64)  # tables whose content that is
        self._came: list[U64] = []  # tables that are there, and were not told of yet

    def put(self, record: PageData, take: ReadInto, later: Later | None = None) -> None:
        """Take one record in. With ``later``, content may still be on its way into the domain's memory when this
        returns: ``settle`` waits for it.

        RequestError when the domain may not have so many pages, HostError, and whatever ``take`` raises, this one's or
        the last one's.
        """
        self._translate()  # before any of them is told to be coming anew
        pfns, kinds = record.pfns, record.types
        for i in range(0, len(pfns), PFNS_PER_BATCH):
            some, of = pfns[i : i + PFNS_PER_BATCH], kinds[i : i + PFNS_PER_BATCH]
            self.populate(some[IS_POPULATED[of]])
            self._highest = max(self._highest, int(some.max()))
            mfns = self.physmap.mfns(some)
            # A pfn that had a frame, and comes now as one without, keeps it, as in libxenguest: there is no telling
            # the guest, whose p2m is made of what has a frame. It is no table any more, which is all that matters.
            there = mfns != NO_FRAME
            self.physmap.put_types(some[there], of[there])
            content = HAS_DATA[of]
            some, of, with_content = some[content], of[content], mfns[content]
            ascending = _ascending(some)
            for j in range(0, len(with_content), PAGES_PER_BATCH):
                now = slice(j, j + PAGES_PER_BATCH)
                mfns, table = with_content[now], IS_TABLE[of[now]]
                if ascending and not self.compare:  # so that no frame stands there twice
                    from_ = take if later is None else later(len(mfns) * PAGE_SIZE)
                    self._read_into(mfns, some[now][table], from_, behind=later is not None)
                else:
                    self._wait()
                    self._overwrite(some[now], mfns, table, take)

    def populate(self, pfns: U64) -> None:
        """Frames for those of some pfns that have none. Raises as ``put``."""
        physmap = self.physmap
        new = pfns[physmap.mfns(pfns) == NO_FRAME]
        if not len(new):
            return
        if not _ascending(new):
            new = np.unique(new)
        if physmap.pages + len(new) > self._max_pages:
            needed = physmap.pages + len(new)
            what = f"dom{self.domid} may have {self._max_pages:#x} pages, and the stream has {needed:#x} so far"
            raise RequestError(f"{what}: give it more memory", needed=needed, available=self._max_pages)
        chunks, count = chunks_of(new)
        whole = np.flatnonzero(count == CHUNK)
        if len(whole):
            mfns = self.host.populate_physmap(self.domid, chunks[whole] << np.uint64(ORDER), ORDER)
            physmap.put_extents(chunks[whole[: len(mfns)]], mfns)
            single = np.ones(len(count), np.bool_)
            single[whole[: len(mfns)]] = False
            new = new[np.repeat(single, count)]
        if len(new):
            mfns = self.host.populate_physmap(self.domid, new)
            physmap.put(new[: len(mfns)], mfns)
            if len(mfns) < len(new):
                needed = physmap.pages + len(new) - len(mfns)
                what = f"dom{self.domid}: the host gave {physmap.pages:#x} pages, and has not the {needed:#x} it takes"
                raise HostError(what, op="populate_physmap", domid=self.domid, errno=errno.ENOMEM)

    def _read_into(self, mfns: U64, tables: U64, take: ReadInto, *, behind: bool) -> None:
        """Read content straight into frames, each of which stands here once: of a file, while the next are mapped."""
        with ExitStack() as mapped:
            pages = mapped.enter_context(self.host.map_writable(self.domid, mfns))
            into = pages.reshape(-1).data
            self._wait()
            self._coming = tables
            if behind:
                self._worker.submit(partial(take, into))
                self._mapped = mapped.pop_all()
            else:
                take(into)

    def settle(self) -> None:
        """Until all content is where it belongs. Raises what reading it came to."""
        self._wait()
        self._translate()

    def _wait(self) -> None:
        try:
            self._worker.wait()
        finally:
            self._mapped.close()
        self._came.append(self._coming)
        self._coming = self._coming[:0]

    def _translate(self) -> None:
        came, self._came = np.concatenate([self._coming[:0], *self._came]), []
        self.tables.came(came, self._highest, self._coming)

    def _overwrite(self, pfns: U64, mfns: U64, table: Mask, take: ReadInto) -> None:
        """Write content to frames that may hold the same already, or stand here twice: then the last counts."""
        content = np.empty((len(mfns), PAGE_SIZE), np.uint8)
        take(content.reshape(-1).data)
        once, back = np.unique(mfns[::-1], return_index=True)
        content, pfns, table = content[::-1][back], pfns[::-1][back], table[::-1][back]
        with self.host.map_writable(self.domid, once) as pages:
            if self.compare:
                differs = (pages != content).any(axis=1)
                local, _ = localise(as_entries(content[table]), self.physmap.mfns)
                differs[table] &= (as_entries(pages[table]) != local).any(axis=1)
                self.differing = np.union1d(self.differing, pfns[differs])
            pages[:] = content
        self._came.append(pfns[table])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        with self._mapped:  # which lasts until all is read
            self._worker.__exit__(kind, e, tb)


def _ascending(pfns: U64) -> bool:
    """Whether they are in order, and each stands there once, as in all that savers send."""
    return bool((pfns[1:] > pfns[:-1]).all())
