"""The pages of a core: which pfn lies where in the file, and which mfn is which pfn."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from xenpv.abi.dumpcore import INVALID
from xenpv.errors import GuestError, Unsupported
from xenpv.frames import PAGE_SIZE, PFNS_PER_SCAN, U64, PageType, first_bad
from xenpv.io.stream_input import Input
from xenpv.memory.pagetables import NO_PFN
from xenpv.runs import Extents, FrameMap, Runs
from xenpv.source.saved import FilePages
from xenpv.stream import dumpcore
from xenpv.stream.dumpcore import Layout, Report
from xenpv.stream.index import PageIndex

_AGAIN_MAX = 1 << 16  # of these may name the same pfn as the one before


class CorePages:
    """The list of a core's pages, read once when it is opened, and once more when mfns are asked for.

    ``raw`` is the pages as they are in the file, all of them of type NOTAB.
    """

    def __init__(self, source: Input, layout: Layout, report: Report) -> None:
        self._source = source
        self._layout = layout
        try:
            self._where = FrameMap.from_pieces((pfns, rows) for pfns, _, rows in self._entries(report))
        except GuestError as e:
            raise Unsupported(f"a list of {layout.present:#x} pages has {e}", offset=layout.table.offset) from e
        if self._where.repeated:
            what = f"pfn {self._where.first_repeated:#x} is listed twice, and {self._where.repeated - 1} others"
            report(dumpcore.REPEATED, what, layout.table.offset)
        offset = self._where.target.astype(np.int64) * PAGE_SIZE + layout.content.offset
        types = np.full(len(offset), PageType.NOTAB, np.uint8)
        self.index = PageIndex.from_extents(Extents(self.runs.first, self.runs.pages, types), offset)
        self.raw = FilePages(source.fd, self.index, self.index, source.start, what="the core")

    def _entries(self, report: Report | None = None) -> Iterator[tuple[U64, U64, U64]]:
        """The list in pieces: pfns, mfns (of HVM the pfns again) and their rows; what names no page is left out."""
        layout, last = self._layout, -1
        for first in range(0, layout.present, PFNS_PER_SCAN):
            count = min(PFNS_PER_SCAN, layout.present - first)
            at = self._source.start + layout.table.offset + first * layout.entry
            words = np.frombuffer(os.pread(self._source.fd, count * layout.entry, at), "<u8")
            pfns, mfns = (words, words) if layout.hvm else words[: len(words) & ~1].reshape(-1, 2).T
            there = (pfns != INVALID) & (mfns != INVALID)
            good = there & (pfns < NO_PFN) & (mfns < NO_PFN)
            rows = np.flatnonzero(good).astype(np.uint64) + np.uint64(first)
            if report is not None:
                self._refuse_holes(pfns[good], rows)
                if (bad := first_bad(there & ~good)) is not None:
                    what = f"entry {first + bad:#x} names pfn {int(pfns[bad]):#x}, mfn {int(mfns[bad]):#x}"
                    report(dumpcore.RANGE, what, at + bad * layout.entry)
                steps = np.diff(pfns[good].astype(np.int64), prepend=last)
                if (back := first_bad(steps < 0)) is not None:
                    what = f"pfn {int(pfns[good][back]):#x} comes behind a higher one"
                    report(dumpcore.ORDER, what, at + int(rows[back] - np.uint64(first)) * layout.entry)
                last = int(pfns[good][-1]) if good.any() else last
            yield pfns[good], mfns[good], rows

    def _refuse_holes(self, pfns: U64, rows: U64) -> None:
        """A hole in a sparse file costs nothing, and is any number of entries that name pfn 0: no list has so many."""
        again = np.flatnonzero(pfns[1:] == pfns[:-1])
        if len(again) > _AGAIN_MAX:
            first = int(again[0]) + 1
            offset = self._layout.table.offset + int(rows[first]) * self._layout.entry
            what = f"from entry {int(rows[first]):#x} on it names pfn {int(pfns[first]):#x} again and again"
            raise Unsupported(
                f"the list of pages has a hole: {what}; is the core cut short, or copied in part?", offset=offset
            )

    @cached_property
    def _pfn_of(self) -> FrameMap:
        return FrameMap.from_pieces((mfns, pfns) for pfns, mfns, _ in self._entries())

    @cached_property
    def _mfn_of(self) -> FrameMap:
        return FrameMap.from_pieces((pfns, mfns) for pfns, mfns, _ in self._entries())

    def pfns_of(self, mfns: U64) -> U64:
        """The pfn of each mfn, NO_FRAME for one that is in the core nowhere."""
        return self._pfn_of.lookup(mfns)

    def mfns_of(self, pfns: U64) -> U64:
        """The mfn of each pfn, NO_FRAME for one that is in the core nowhere."""
        return self._mfn_of.lookup(pfns)

    @property
    def runs(self) -> Runs:
        """The pfns that the core has."""
        return self._where.runs
