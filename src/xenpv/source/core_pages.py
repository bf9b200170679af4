"""The list of pages in a core: the offset of each pfn, and the pfn of each mfn."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from xenpv.abi.dumpcore import INVALID
from xenpv.errors import GuestError, Truncated, Unsupported
from xenpv.frames import PAGE_SIZE, PFNS_PER_SCAN, U64, PageType, first_bad
from xenpv.io.stream_input import Input
from xenpv.memory.page_tables import NO_PFN
from xenpv.runs import Extents, FrameMap, Runs
from xenpv.source.saved import FilePages
from xenpv.stream import dumpcore
from xenpv.stream.dumpcore import CoreLayout, Report
from xenpv.stream.index import PageIndex

_REPEATS_MAX = 1 << 16  # entries of one batch that may repeat the pfn before them


class CorePages:
    """The pages of a core, by its list of pages.

    The list is read when the core is opened, and once more when mfns are asked for.

    Attributes:
        index: The offset of each page.
        raw: The pages as they are in the file, all of type NOTAB.
    """

    def __init__(self, source: Input, layout: CoreLayout, report: Report) -> None:
        self._source = source
        self._layout = layout
        try:
            self._rows = FrameMap.from_pieces((pfns, rows) for pfns, _, rows in self._read_list(report))
        except GuestError as e:
            raise Unsupported(f"a list of {layout.present:#x} pages has {e}", offset=layout.table.offset) from e
        if self._rows.repeated:
            more = f"; {self._rows.repeated} entries of the list repeat a pfn" if self._rows.repeated > 1 else ""
            message = f"pfn {self._rows.first_repeated:#x} is listed more than once{more}"
            report(dumpcore.REPEATED, message, layout.table.offset)
        offset = self._rows.target.astype(np.int64) * PAGE_SIZE + layout.content.offset
        types = np.full(len(offset), PageType.NOTAB, np.uint8)
        self.index = PageIndex.from_extents(Extents(self.runs.first, self.runs.pages, types), offset)
        self.raw = FilePages(source.fd, self.index, self.index, source.start, source_name="the core")

    def _read_list(self, report: Report | None = None) -> Iterator[tuple[U64, U64, U64]]:
        """Yield the valid entries of the list of pages, in batches.

        Args:
            report: Called for each breach of a rule.

        Yields:
            pfns, mfns and row numbers in the list, uint64 of one shape. An HVM core lists pfns only: they stand for
            the mfns, too.
        """
        layout, last_pfn = self._layout, -1
        for first_row in range(0, layout.present, PFNS_PER_SCAN):
            count = min(PFNS_PER_SCAN, layout.present - first_row)
            offset = layout.table.offset + first_row * layout.entry_size
            data = os.pread(self._source.fd, count * layout.entry_size, self._source.start + offset)
            if len(data) != count * layout.entry_size:
                raise Truncated(f"the list of pages has {len(data)} bytes from here on", offset=offset)
            words = np.frombuffer(data, "<u8")
            pfns, mfns = (words, words) if layout.hvm else words.reshape(-1, 2).T
            used = (pfns != INVALID) & (mfns != INVALID)
            valid = used & (pfns < NO_PFN) & (mfns < NO_PFN)
            rows = np.flatnonzero(valid).astype(np.uint64) + np.uint64(first_row)
            valid_pfns, valid_mfns = pfns[valid], mfns[valid]
            if report is not None:
                self._refuse_hole(valid_pfns, rows)
                if (bad := first_bad(used & ~valid)) is not None:
                    message = f"entry {first_row + bad:#x} names pfn {int(pfns[bad]):#x}, mfn {int(mfns[bad]):#x}"
                    report(dumpcore.RANGE, message, offset + bad * layout.entry_size)
                steps = np.diff(valid_pfns.astype(np.int64), prepend=last_pfn)
                if (back := first_bad(steps < 0)) is not None:
                    message = f"pfn {int(valid_pfns[back]):#x} comes after a higher one"
                    report(dumpcore.ORDER, message, offset + int(rows[back] - np.uint64(first_row)) * layout.entry_size)
                last_pfn = int(valid_pfns[-1]) if len(valid_pfns) else last_pfn
            yield valid_pfns, valid_mfns, rows

    def _refuse_hole(self, pfns: U64, rows: U64) -> None:
        """Raise Unsupported if the list repeats one pfn too often.

        A hole in a sparse file costs nothing, and reads as any number of entries for pfn 0.
        """
        repeats = np.flatnonzero(pfns[1:] == pfns[:-1])
        if len(repeats) > _REPEATS_MAX:
            row = int(rows[int(repeats[0]) + 1])
            pfn = int(pfns[int(repeats[0]) + 1])
            raise Unsupported(
                f"the list of pages has a hole: from entry {row:#x} on it names pfn {pfn:#x} again and again; "
                "is the core cut short, or copied in part?",
                offset=self._layout.table.offset + row * self._layout.entry_size,
            )

    @cached_property
    def _pfn_by_mfn(self) -> FrameMap:
        return FrameMap.from_pieces((mfns, pfns) for pfns, mfns, _ in self._read_list())

    @cached_property
    def _mfn_by_pfn(self) -> FrameMap:
        return FrameMap.from_pieces((pfns, mfns) for pfns, mfns, _ in self._read_list())

    def pfns_of(self, mfns: U64) -> U64:
        """Return the pfn of each mfn, NO_FRAME for one that is not in the core."""
        return self._pfn_by_mfn.lookup(mfns)

    def mfns_of(self, pfns: U64) -> U64:
        """Return the mfn of each pfn, NO_FRAME for one that is not in the core."""
        return self._mfn_by_pfn.lookup(pfns)

    @property
    def runs(self) -> Runs:
        """The pfns in the core."""
        return self._rows.runs
