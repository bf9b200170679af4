"""Runs of consecutive pfns: how all rooms hold many pages in few rows.

A domain's memory mostly comes in long runs, so 100 GiB of pages are a few thousand rows. This module lies below
``stream`` and ``memory`` because both use it: a stream's index and a domain's extents are the same type.

``Runs`` are pfns, ``Extents`` have a page type each, a ``FrameMap`` translates runs, and ``FrameRuns`` are places in a
p2m or in page tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt

from xenpv.errors import GuestError
from xenpv.frames import ABSENT, I64, NO_FRAME, U8, U64, Mask

Number = TypeVar("Number", np.int64, np.uint64)

ROWS_MAX = 1 << 26  # runs of a FrameMap, 1.6 GB: 256 GiB of pages in no order at all


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Runs of consecutive pfns.

    ``first`` is the first pfn of each run, ``pages`` its number of pages.

    Runs ascend and do not overlap. The arrays have one length. Operations never change them.
    """

    first: U64
    pages: I64

    @classmethod
    def empty(cls) -> Self:
        """No run at all."""
        return cls(np.empty(0, np.uint64), np.empty(0, np.int64))

    @staticmethod
    def from_pfns(pfns: U64) -> Runs:
        """Return the runs of ascending pfns."""
        start, pages = group_rows(np.diff(pfns) != 1, len(pfns))
        return Runs(pfns[start], pages)

    @classmethod
    def concatenate(cls, pieces: Iterable[Self]) -> Self:
        """Join pieces that follow each other."""
        parts = [cls.empty(), *pieces]
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, rows: slice | I64 | Mask) -> Self:
        return type(self)(*(getattr(self, f.name)[rows] for f in fields(self)))

    @property
    def end(self) -> U64:
        """The pfn after the last one of each run."""
        end: U64 = self.first + self.pages.astype(np.uint64)
        return end

    @property
    def stop(self) -> int:
        """The pfn after the last one of all runs, 0 if there is none."""
        return int(self.end[-1]) if len(self) else 0

    @property
    def total(self) -> int:
        """The number of pages in all runs."""
        return int(self.pages.sum())

    @property
    def pfns(self) -> U64:
        """Every pfn, ascending."""
        return expand_runs(self.first, self.pages)

    def rows_of(self, pfns: U64) -> I64:
        """Return the run that each pfn lies in, -1 for none; int64 of the same shape."""
        if not len(self):
            return np.full(pfns.shape, -1, np.int64)
        row = np.searchsorted(self.first, pfns, "right") - 1
        return np.where((row >= 0) & (pfns - self.first[row] < self.pages[row].astype(np.uint64)), row, -1)

    def positions(self, pfns: U64) -> I64:
        """Return how many pages of these runs precede each pfn.

        The result is int64 of the same shape, -1 for a pfn in no run.
        """
        row = self.rows_of(pfns)
        if not len(self):
            return row
        preceding = np.cumsum(self.pages) - self.pages
        return np.where(row >= 0, preceding[row] + (pfns - self.first[row]).astype(np.int64), -1)

    def pfns_at(self, positions: I64) -> U64:
        """Return the pfn at each position: the inverse of ``positions``."""
        preceding = np.cumsum(self.pages) - self.pages
        row = np.searchsorted(preceding, positions, "right") - 1
        return self.first[row] + (positions - preceding[row]).astype(np.uint64)

    def batches(self, size: int, limit: int | None = None) -> Iterator[U64]:
        """Iterate over the pfns, ``size`` at a time.

        A run may end and another begin in one batch.

        Args:
            size: pfns in a batch; the last may have fewer.
            limit: pfns in all batches, at most; None for all.
        """
        for _, pfns in self._batches(size, limit):
            yield pfns

    def _batches(self, size: int, limit: int | None) -> Iterator[tuple[I64, U64]]:
        """Iterate over pfns and the run that each is of."""
        ends = np.cumsum(self.pages)
        total = int(ends[-1]) if len(ends) else 0
        total = total if limit is None else min(total, limit)
        for start in range(0, total, size):
            stop = min(start + size, total)
            rows = np.arange(np.searchsorted(ends, start, "right"), np.searchsorted(ends, stop, "left") + 1)
            run_begin = ends[rows] - self.pages[rows]
            low = np.maximum(run_begin, start)
            pages = np.minimum(ends[rows], stop) - low
            yield np.repeat(rows, pages), expand_runs(self.first[rows] + (low - run_begin).astype(np.uint64), pages)

    def merged(self) -> Runs:
        """Return the same pfns with adjacent runs joined; types are dropped."""
        start, _ = group_rows(self.first[1:] != self.end[:-1], len(self))
        return Runs(self.first[start], np.add.reduceat(self.pages, start) if len(start) else self.pages)

    def where(self, keep: Mask) -> Runs:
        """Return the runs of those pfns for which ``keep`` is set.

        ``keep`` has one element for each pfn.
        """
        return Runs.from_pfns(self.pfns[keep])


@dataclass(frozen=True, slots=True, eq=False)
class Extents(Runs):
    """Runs of consecutive pfns of one page type each.

    ``type`` is uint8, one of PageType or ABSENT.
    """

    type: U8

    @classmethod
    def empty(cls) -> Self:
        """No extent at all."""
        return cls(np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.uint8))

    @classmethod
    def from_types(cls, pfns: U64, types: U8) -> Self:
        """Return the extents of ascending pfns with a page type each."""
        start, pages = group_rows((np.diff(pfns) != 1) | (types[1:] != types[:-1]), len(pfns))
        return cls(pfns[start], pages, types[start])

    def typed_batches(self, size: int, limit: int | None = None) -> Iterator[tuple[U64, U8]]:
        """Iterate over the pfns as ``batches`` does, with the page type of each."""
        for rows, pfns in self._batches(size, limit):
            yield pfns, self.type[rows]

    def split_at(self, edges: U64) -> Extents:
        """Return the page type of each interval between ascending edges.

        ABSENT stands for an interval without pages.

        The edges must contain the first pfn and the end of every extent.
        """
        row = self.rows_of(edges[:-1])
        kind = np.append(self.type, np.uint8(ABSENT))[row]  # row -1 is the last element
        return Extents(edges[:-1], (edges[1:] - edges[:-1]).astype(np.int64), kind)


@dataclass(frozen=True, slots=True, eq=False)
class FrameMap:
    """A map of frame numbers, run by run.

    Each run of consecutive numbers maps to consecutive numbers.

    Attributes:
        runs: the numbers that are mapped.
        target: uint64, the target of the first number of each run.
        repeated: how many numbers the source named again; the target from the lower run counts.
        first_repeated: the first such number, None if there is none.
    """

    runs: Runs
    target: U64
    repeated: int = 0
    first_repeated: int | None = None

    @classmethod
    def empty(cls) -> Self:
        """A map of nothing."""
        return cls(Runs.empty(), np.empty(0, np.uint64))

    @classmethod
    def from_pieces(cls, pieces: Iterable[tuple[U64, U64]]) -> Self:
        """Build a map out of pieces of (numbers, targets) in any order.

        Raises:
            GuestError: there are more than ROWS_MAX runs.
        """
        firsts, counts, targets = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
        rows = 0
        for numbers, to in pieces:
            start, count = group_rows((np.diff(numbers) != 1) | (np.diff(to) != 1), len(numbers))
            firsts.append(numbers[start])
            counts.append(count)
            targets.append(to[start])
            rows += len(start)
            if rows > ROWS_MAX:
                raise GuestError(f"more than {ROWS_MAX:#x} runs of pages")
        first, count, target = np.concatenate(firsts), np.concatenate(counts), np.concatenate(targets)
        if (first[1:] < first[:-1]).any():
            order = np.argsort(first, kind="stable")
            first, count, target = first[order], count[order], target[order]
        reach = np.maximum.accumulate(first + count.astype(np.uint64))[:-1]
        overlap = np.zeros(len(first), np.int64)  # numbers at the head of each run that lower runs have as well
        if len(first):
            overlap[1:] = np.clip(reach.astype(np.int64) - first[1:].astype(np.int64), 0, count[1:])
        if not overlap.any():
            return cls(Runs(first, count), target)
        has_rest, head = overlap < count, overlap.astype(np.uint64)
        runs = Runs((first + head)[has_rest], (count - overlap)[has_rest])
        return cls(runs, (target + head)[has_rest], int(overlap.sum()), int(first[np.argmax(overlap > 0)]))

    def lookup(self, numbers: U64) -> U64:
        """Return the target of each number; uint64 of the same shape.

        NO_FRAME stands for a number that is not mapped.
        """
        if not len(self.runs):
            return np.full(numbers.shape, NO_FRAME)
        row = self.runs.rows_of(numbers)
        mapped: U64 = self.target[row] + (numbers - self.runs.first[row])
        return np.where(row >= 0, mapped, NO_FRAME)

    def lookup_range(self, numbers: range) -> U64:
        """Return the targets of consecutive numbers, as ``lookup`` does.

        It does not search for each number.
        """
        first, end = self.runs.first, self.runs.end
        rows = slice(int(np.searchsorted(end, numbers.start, "right")), int(np.searchsorted(first, numbers.stop)))
        start: U64 = np.maximum(first[rows], np.uint64(numbers.start))
        count = (np.minimum(end[rows], np.uint64(numbers.stop)) - start).astype(np.int64)
        target: U64 = self.target[rows] + (start - first[rows])
        targets = expand_runs(target, count)
        if len(targets) == len(numbers):
            return targets
        out = np.full(len(numbers), NO_FRAME)
        out[expand_runs((start - np.uint64(numbers.start)).astype(np.int64), count)] = targets
        return out


@dataclass(frozen=True, slots=True, eq=False)
class FrameRuns:
    """Runs of places of one level of a tree, and the frame of each run.

    All places of a run name that one frame.

    A place is the index of a table, or of a leaf, among all of its level: int64, since no level has 2^63 of them.
    Runs ascend and do not overlap. The arrays have one length.
    """

    first: I64
    count: I64
    frame: U64

    @classmethod
    def empty(cls) -> Self:
        """No run at all."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint64))

    @classmethod
    def from_frames(cls, frames: U64) -> Self:
        """Return the runs of an array with the frame of each place from 0 on.

        NO_FRAME stands for a place without one.
        """
        starts, count = group_rows(frames[1:] != frames[:-1], len(frames))
        present = frames[starts] != NO_FRAME
        return cls(starts[present], count[present], frames[starts][present])

    @classmethod
    def in_order(cls, pieces: Iterable[Self]) -> Self:
        """Join pieces that do not overlap, and sort them by place."""
        parts = list(pieces)
        first, count = (np.concatenate([getattr(part, name) for part in parts]) for name in ("first", "count"))
        frame = np.concatenate([part.frame for part in parts])
        return cls(first, count, frame)[np.argsort(first, kind="stable")]

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, rows: slice | I64 | Mask) -> Self:
        return type(self)(self.first[rows], self.count[rows], self.frame[rows])

    def equals(self, other: FrameRuns) -> bool:
        """Return whether both are the same rows."""
        columns = ((self.first, other.first), (self.count, other.count), (self.frame, other.frame))
        return all(np.array_equal(column, other_column) for column, other_column in columns)

    @property
    def end(self) -> I64:
        """The place after the last one of each run."""
        return np.add(self.first, self.count)

    @property
    def places(self) -> I64:
        """Every place, ascending."""
        return expand_runs(self.first, self.count)

    def frame_of(self, places: I64) -> U64:
        """Return the frame of each place, NO_FRAME where there is none."""
        if not len(self):
            return np.full(places.shape, NO_FRAME)
        row = np.searchsorted(self.first, places, "right") - 1
        inside = (row >= 0) & (places < self.end[row])
        return np.where(inside, self.frame[row], NO_FRAME)

    def gaps(self, places: range) -> FrameRuns:
        """Return the parts of ``places`` that no run covers, with NO_FRAME as their frame."""
        first, end = (np.clip(bound, places.start, places.stop) for bound in (self.first, self.end))
        starts = np.append(places.start, end)
        count = np.append(first, places.stop) - starts
        present = count > 0
        return FrameRuns(starts[present], count[present], np.full(np.count_nonzero(present), NO_FRAME))

    def fill_gaps(self, places: range, frame: int) -> FrameRuns:
        """Return these runs, and one frame everywhere else in ``places``."""
        gaps = self.gaps(places)
        return FrameRuns.in_order([self, FrameRuns(gaps.first, gaps.count, np.full(len(gaps), frame, np.uint64))])

    def below(self, stop: int) -> FrameRuns:
        """Return the parts of these runs at places below ``stop``."""
        runs = self[self.first < stop]
        return FrameRuns(runs.first, np.minimum(runs.count, stop - runs.first), runs.frame)

    def difference(self, other: FrameRuns) -> FrameRuns:
        """Return the parts of these runs in which ``other`` names another frame, or none."""
        cuts = np.concatenate([self.first, self.end, other.first, other.end])
        cuts.sort(kind="stable")  # each part is in order already, which np.unique would make nothing of
        cuts = cuts[group_rows(cuts[1:] != cuts[:-1], len(cuts))[0]]
        frame = self.frame_of(cuts)
        differs = (frame != NO_FRAME) & (frame != other.frame_of(cuts))  # never at the last cut, where all runs end
        return FrameRuns(cuts[differs], np.diff(np.append(cuts, cuts[-1:]))[differs], frame[differs])


def align(a: Extents, b: Extents) -> tuple[Extents, Extents]:
    """Cut the extents of two domains at each other's edges.

    Row n of both results is the same run of pfns.

    A run that only one of them has is ABSENT in the other. Runs that neither has are left out.
    """
    edges = np.unique(np.concatenate([a.first, a.end, b.first, b.end]))
    cut_a, cut_b = a.split_at(edges), b.split_at(edges)
    present = (cut_a.type != ABSENT) | (cut_b.type != ABSENT)
    return cut_a[present], cut_b[present]


def expand_runs(first: npt.NDArray[Number], count: I64) -> npt.NDArray[Number]:
    """Return every number of some runs, run after run.

    The result has the dtype of ``first``.

    Args:
        first: the first number of each run, int64 or uint64.
        count: how many numbers each run has; 0 is allowed.
    """
    offset = np.cumsum(count) - count
    begins = np.repeat(first - offset.astype(first.dtype), count)
    return np.add(begins, np.arange(len(begins), dtype=first.dtype))


def group_rows(breaks: Mask, rows: int) -> tuple[I64, I64]:
    """Split rows into groups at the breaks between neighbours.

    Args:
        breaks: for each row but the first, whether a group begins there; bool, one element fewer than rows.
        rows: how many rows there are; 0 is allowed.

    Returns:
        The first row and the number of rows of each group.
    """
    starts = np.flatnonzero(np.append(True, breaks)[:rows])
    return starts, np.diff(np.append(starts, rows))
