"""Numbers in runs. Spans: numbers to numbers, where both grow by one; memory that was given in one piece is one row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np

from xenpv.errors import GuestError
from xenpv.frames import I64, NO_FRAME, U64
from xenpv.memory.radix import counting

ROWS_MAX = 1 << 26  # 1.6 GB: 256 GiB of pages in no order at all


@dataclass(frozen=True, slots=True)
class Spans:
    """``count`` numbers from ``first`` on become as many from ``to`` on. Ascending and apart.

    ``repeated``: how many numbers were named again, ``again`` the first of them; what came with the lower run counts.
    """

    first: U64
    count: I64
    to: U64
    repeated: int = 0
    again: int | None = None

    @classmethod
    def of(cls, pieces: Iterable[tuple[U64, U64]]) -> Self:
        """Out of pieces of (numbers, what they become), in any order. Raises GuestError for more than ROWS_MAX runs."""
        parts = [(np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.uint64))]
        rows = 0
        for numbers, to in pieces:
            goes_on = (np.diff(numbers) == 1) & (np.diff(to) == 1)
            at = np.flatnonzero(np.append(True, ~goes_on)[: len(numbers)])
            parts.append((numbers[at], np.diff(np.append(at, len(numbers))), to[at]))
            rows += len(at)
            if rows > ROWS_MAX:
                raise GuestError(f"more than {ROWS_MAX:#x} runs of pages")
        first, count, to = (np.concatenate(column) for column in zip(*parts, strict=True))
        if (first[1:] < first[:-1]).any():
            order = np.argsort(first, kind="stable")
            first, count, to = first[order], count[order], to[order]
        end = first + count.astype(np.uint64)
        before = np.maximum.accumulate(end)[:-1]
        over = np.zeros(len(first), np.int64)  # numbers at the head of each run that runs below it have had
        if len(first):
            over[1:] = np.clip(before.astype(np.int64) - first[1:].astype(np.int64), 0, count[1:])
        again = np.flatnonzero(over)[:1].tolist()
        if not again:
            return cls(first, count, to)
        keep = over < count
        head = over.astype(np.uint64)
        return cls((first + head)[keep], (count - over)[keep], (to + head)[keep], int(over.sum()), int(first[again[0]]))

    def find(self, numbers: U64) -> U64:
        """What each number becomes, NO_FRAME for one that is in no run; of the same shape."""
        if not len(self.first):
            return np.full(numbers.shape, NO_FRAME)
        row = np.searchsorted(self.first, numbers, "right") - 1
        within = numbers - self.first[row]
        inside = (row >= 0) & (within < self.count[row].astype(np.uint64))
        return np.where(inside, self.to[row] + within, NO_FRAME)


def batches(first: U64, count: I64, size: int, limit: int | None = None) -> Iterator[tuple[I64, U64]]:
    """The numbers of some runs, ``size`` of them at a time and ``limit`` at most; and which run each is of.

    ``first`` and ``count`` are those of the runs. One may end and another begin in one batch.
    """
    ends = np.cumsum(count)
    total = int(ends[-1]) if len(ends) else 0
    total = total if limit is None else min(total, limit)
    for at in range(0, total, size):
        stop = min(at + size, total)
        rows = np.arange(np.searchsorted(ends, at, "right"), np.searchsorted(ends, stop, "left") + 1)
        begin = ends[rows] - count[rows]
        low = np.maximum(begin, at)
        many = np.minimum(ends[rows], stop) - low
        yield np.repeat(rows, many), counting(first[rows].astype(np.int64) + low - begin, many).astype(np.uint64)
