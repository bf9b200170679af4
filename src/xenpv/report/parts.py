"""Which pfns are of some kind, in as few rows as a picture needs; and an axis of pfns that makes gaps narrow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xenpv.frames import I64, U64

_SEGMENTS = 24  # parts of the axis that have pages, at most
_GAP = 0.015  # of the axis: what a gap takes, however wide it is
_LEAST = 0.01  # of the axis: what a part with pages takes, however small it is


@dataclass(frozen=True, slots=True)
class Parts:
    """Parts of the pfns, ascending and apart: first pfn, how many pfns it spans, how many of them are meant."""

    start: U64
    span: I64
    pages: I64

    def __len__(self) -> int:
        return len(self.start)

    @property
    def end(self) -> U64:
        """One more than the last pfn of each."""
        end: U64 = self.start + self.span.astype(np.uint64)
        return end

    @classmethod
    def of(cls, start: U64, span: I64, pages: I64 | None = None) -> Parts:
        """Out of parts in any order that do not overlap; those that touch, and are meant as a whole, become one."""
        order = np.argsort(start, kind="stable")
        pages = span if pages is None else pages
        start, span, pages = start[order], span[order], pages[order]
        whole = span == pages
        end = start + span.astype(np.uint64)
        goes_on = (end[:-1] == start[1:]) & whole[:-1] & whole[1:]
        return _joined(start, end, pages, np.flatnonzero(np.append(True, ~goes_on)[: len(start)]))

    @classmethod
    def of_pfns(cls, pfns: U64) -> Parts:
        """Of single pfns, in any order; of one that comes twice once."""
        pfns = np.unique(pfns)
        return cls.of(pfns, np.ones(len(pfns), np.int64))

    def coarse(self, limit: int) -> Parts:
        """These in no more than ``limit`` rows: the narrowest gaps are passed over."""
        if len(self) <= limit:
            return self
        gaps, least = self.start[1:] - self.end[:-1], len(self) - 1 - limit
        cuts = np.sort(np.argpartition(gaps, least)[least + 1 :]) + 1  # the widest, limit - 1 of them
        return _joined(self.start, self.end, self.pages, np.append(0, cuts))

    def and_also(self, other: Parts) -> Parts:
        """Both, as one; where they overlap, as one part."""
        start = np.concatenate([self.start, other.start])
        end = np.concatenate([self.end, other.end])
        pages = np.concatenate([self.pages, other.pages])
        order = np.argsort(start, kind="stable")
        start, end, pages = start[order], end[order], pages[order]
        reach = np.maximum.accumulate(end) if len(end) else end
        first = np.flatnonzero(np.append(True, start[1:] > reach[:-1])[: len(start)])
        out = _joined(start, reach, pages, first)
        return Parts(out.start, out.span, np.minimum(out.pages, out.span))

    def rows(self) -> list[int]:
        """Start, span, pages of each, one behind the other."""
        table = np.column_stack([self.start.astype(np.int64), self.span, self.pages])
        return [int(n) for n in table.reshape(-1).tolist()]


NOTHING = Parts(np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64))


def _joined(start: U64, end: U64, pages: I64, first: I64) -> Parts:
    """Rows joined to groups; ``first``: the first row of each."""
    if not len(start):
        return NOTHING
    last = np.append(first[1:], len(start)) - 1
    span = (end[last] - start[first]).astype(np.int64)
    return Parts(start[first], span, np.add.reduceat(pages, first))


class Collector:
    """Parts that come in pieces, held in bounded memory: beyond ``rows`` they become coarse."""

    def __init__(self, rows: int = 1 << 18) -> None:
        self._rows = rows
        self._parts: list[Parts] = []
        self._held = 0

    def add(self, part: Parts) -> None:
        """Take some in; they must not overlap what is held."""
        self._parts.append(part)
        self._held += len(part)
        if self._held > self._rows:
            self._parts = [self.all.coarse(self._rows // 4)]
            self._held = len(self._parts[0])

    @property
    def all(self) -> Parts:
        """All that came, ascending."""
        parts = self._parts
        if not parts:
            return NOTHING
        whole = (np.concatenate([getattr(part, name) for part in parts]) for name in ("start", "span", "pages"))
        return Parts.of(*whole)


def axis(there: Parts, end: int) -> list[tuple[int, float]]:
    """Where pfns lie on a line from 0 to 1: corners (pfn, place), ascending, between which the line is straight.

    Of the gaps in ``there`` the widest take the same small place each, so that 64 MiB of pages that are spread over
    16 TiB are seen. ``end`` is one more than the last pfn that the line has.
    """
    segments = there.coarse(_SEGMENTS)
    total = max(int(segments.span.sum()), 1)
    corners, weights = [0], []
    at = 0
    for start, span in zip(segments.start.tolist(), segments.span.tolist(), strict=True):
        if start > at:
            corners.append(start)
            weights.append(min((start - at) / total, _GAP))
        corners.append(start + span)
        weights.append(max(span / total, _LEAST))
        at = start + span
    if end > at:
        corners.append(end)
        weights.append(min((end - at) / total, _GAP) if len(segments) else 1.0)
    places = np.append(0, np.cumsum(weights))
    places /= max(float(places[-1]), 1e-300)
    return list(zip(corners, places.tolist(), strict=True))
