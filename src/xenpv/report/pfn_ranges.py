"""PfnRanges: pfns of one kind in few rows, and an axis with narrow gaps for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xenpv.frames import I64, U64
from xenpv.runs import group_rows

_SEGMENTS_MAX = 24  # ranges with pages on the axis
_GAP_MAX = 0.015  # of the axis, for a gap of any width
_SEGMENT_MIN = 0.01  # of the axis, for a range of any size


@dataclass(frozen=True, slots=True)
class PfnRanges:
    """Ranges of pfns, ascending and apart. A coarse range has other pfns in between.

    Attributes:
        start: The first pfn of each.
        span: How many pfns each covers.
        pages: How many of those belong to the set.
    """

    start: U64
    span: I64
    pages: I64

    def __len__(self) -> int:
        return len(self.start)

    @property
    def end(self) -> U64:
        """The pfn after the last one of each."""
        end: U64 = self.start + self.span.astype(np.uint64)
        return end

    @classmethod
    def from_ranges(cls, start: U64, span: I64, pages: I64 | None = None) -> PfnRanges:
        """Return ranges that come in any order and do not overlap.

        Adjacent ranges without gaps are joined.
        """
        order = np.argsort(start, kind="stable")
        pages = span if pages is None else pages
        start, span, pages = start[order], span[order], pages[order]
        is_full = span == pages
        end = start + span.astype(np.uint64)
        continues = (end[:-1] == start[1:]) & is_full[:-1] & is_full[1:]
        return _joined(start, end, pages, group_rows(~continues, len(start))[0])

    @classmethod
    def from_pfns(cls, pfns: U64) -> PfnRanges:
        """Return the ranges of pfns in any order; duplicates count once."""
        pfns = np.unique(pfns)
        return cls.from_ranges(pfns, np.ones(len(pfns), np.int64))

    def coarsen(self, limit: int) -> PfnRanges:
        """Return at most ``limit`` ranges, joined over the narrowest gaps."""
        if len(self) <= limit:
            return self
        gaps, least = self.start[1:] - self.end[:-1], len(self) - 1 - limit
        cuts = np.sort(np.argpartition(gaps, least)[least + 1 :]) + 1  # the widest, limit - 1 of them
        return _joined(self.start, self.end, self.pages, np.append(0, cuts))

    def union(self, other: PfnRanges) -> PfnRanges:
        """Return the pfns of both; ranges that overlap are joined."""
        start = np.concatenate([self.start, other.start])
        end = np.concatenate([self.end, other.end])
        pages = np.concatenate([self.pages, other.pages])
        order = np.argsort(start, kind="stable")
        start, end, pages = start[order], end[order], pages[order]
        reach = np.maximum.accumulate(end) if len(end) else end
        first, _ = group_rows(start[1:] > reach[:-1], len(start))
        joined = _joined(start, reach, pages, first)
        return PfnRanges(joined.start, joined.span, np.minimum(joined.pages, joined.span))

    def rows(self) -> list[int]:
        """Return start, span and pages of each range, in one list."""
        table = np.column_stack([self.start.astype(np.int64), self.span, self.pages])
        return [int(n) for n in table.reshape(-1).tolist()]


NO_RANGES = PfnRanges(np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64))


def _joined(start: U64, end: U64, pages: I64, first: I64) -> PfnRanges:
    """Join groups of rows; ``first`` is the first row of each group."""
    if not len(start):
        return NO_RANGES
    last = np.append(first[1:], len(start)) - 1
    span = (end[last] - start[first]).astype(np.int64)
    return PfnRanges(start[first], span, np.add.reduceat(pages, first))


class RangeCollector:
    """Collects ranges in bounded memory: beyond ``rows`` ranges they become coarse."""

    def __init__(self, rows: int = 1 << 18) -> None:
        self._rows = rows
        self._parts: list[PfnRanges] = []
        self._held = 0

    def add(self, part: PfnRanges) -> None:
        """Add ranges, which must not overlap those added before."""
        self._parts.append(part)
        self._held += len(part)
        if self._held > self._rows:
            self._parts = [self.all.coarsen(self._rows // 4)]
            self._held = len(self._parts[0])

    @property
    def all(self) -> PfnRanges:
        """All ranges that were added, ascending."""
        parts = self._parts
        if not parts:
            return NO_RANGES
        columns = (np.concatenate([getattr(part, name) for part in parts]) for name in ("start", "span", "pages"))
        return PfnRanges.from_ranges(*columns)


def pfn_axis(present: PfnRanges, end: int) -> list[tuple[int, float]]:
    """Map pfns to a line from 0 to 1, on which wide gaps are narrow.

    64 MiB spread over 16 TiB stay visible.

    Args:
        present: The pfns that have pages.
        end: The pfn after the last one on the line.

    Returns:
        Corners (pfn, position), ascending, between which the line is straight.
    """
    segments = present.coarsen(_SEGMENTS_MAX)
    total = max(int(segments.span.sum()), 1)
    corners, weights = [0], []
    covered_end = 0
    for start, span in zip(segments.start.tolist(), segments.span.tolist(), strict=True):
        if start > covered_end:
            corners.append(start)
            weights.append(min((start - covered_end) / total, _GAP_MAX))
        corners.append(start + span)
        weights.append(max(span / total, _SEGMENT_MIN))
        covered_end = start + span
    if end > covered_end:
        corners.append(end)
        weights.append(min((end - covered_end) / total, _GAP_MAX) if len(segments) else 1.0)
    places = np.append(0, np.cumsum(weights))
    places /= max(float(places[-1]), 1e-300)
    return list(zip(corners, places.tolist(), strict=True))
