"""What an exported file is made of, in order: bytes, holes, and runs of the domain's pages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

import numpy as np

from xenpv.frames import HAS_DATA, I64, PAGE_SIZE, U64, Mask
from xenpv.memory.domain import Extents
from xenpv.memory.spans import batches


class Pages(NamedTuple):
    """Runs of pages with content: first pfn and number of pages of each, arrays of one length.

    All that a domain has are ascending and apart, with neighbours joined whatever their types.
    """

    first: U64
    pages: I64

    @property
    def total(self) -> int:
        """Pages in all of the runs."""
        return int(self.pages.sum())

    @property
    def end(self) -> int:
        """One more than the last pfn, 0 of none."""
        return int(self.first[-1]) + int(self.pages[-1]) if len(self.first) else 0

    def row(self, row: int) -> Pages:
        """One of the runs."""
        return Pages(self.first[row : row + 1], self.pages[row : row + 1])

    def places(self, pfns: U64) -> I64:
        """Where each pfn comes among all pages of these runs, -1 for one that does not."""
        if not len(self.first):
            return np.full(pfns.shape, -1, np.int64)
        row = np.maximum(np.searchsorted(self.first, pfns, "right") - 1, 0)
        within = (pfns - self.first[row]).astype(np.int64)  # a pfn before the first run comes out negative
        before = np.cumsum(self.pages) - self.pages
        return np.where((within >= 0) & (within < self.pages[row]), before[row] + within, -1)

    def batches(self, size: int) -> Iterator[U64]:
        """The pfns, so many at a time: a run may end and another begin in one batch."""
        for _, pfns in batches(self.first, self.pages, size):
            yield pfns

    @property
    def pfns(self) -> U64:
        """All of the pfns."""
        return np.concatenate([*self.batches(1 << 20), np.empty(0, np.uint64)])

    def where(self, kept: Mask) -> Pages:
        """Those pages only for which the mask, as long as all runs together, is set."""
        return joined(*_runs(self.pfns[kept]))

    @classmethod
    def of(cls, extents: Iterable[Extents]) -> Pages:
        """All pages with content of a domain's extents."""
        first, count = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for some in extents:
            data = HAS_DATA[some.type]
            one = joined(some.start[data], some.pages[data])
            first.append(one.first)
            count.append(one.pages)
        return joined(np.concatenate(first), np.concatenate(count))


class Hole(NamedTuple):
    """So many bytes of zeros that need no room."""

    length: int


Piece: TypeAlias = bytes | Hole | Pages


def joined(first: U64, pages: I64) -> Pages:
    """Runs, ascending, with those that touch made one."""
    at = np.flatnonzero(np.append(True, first[1:] != first[:-1] + pages[:-1].astype(np.uint64))[: len(first)])
    return Pages(first[at], np.add.reduceat(pages, at) if len(at) else pages)


def _runs(pfns: U64) -> tuple[U64, I64]:
    at = np.flatnonzero(np.append(True, np.diff(pfns) != 1)[: len(pfns)])
    return pfns[at], np.diff(np.append(at, len(pfns)))


def padded(data: bytes, to: int = PAGE_SIZE) -> bytes:
    """Data, and zeros up to a multiple of so many bytes."""
    return data + bytes(-len(data) % to)
