"""Spans against a dictionary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenpv.errors import GuestError
from xenpv.frames import NO_FRAME
from xenpv.memory import spans
from xenpv.memory.spans import Spans

RUNS = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 30), st.integers(0, 1 << 40)), max_size=12)


def pieces(runs: list[tuple[int, int, int]]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.arange(f, f + n, dtype=np.uint64), np.arange(t, t + n, dtype=np.uint64)) for f, n, t in runs]


@settings(max_examples=150, deadline=None)
@given(RUNS)
def test_what_comes_once_is_found(runs: list[tuple[int, int, int]]) -> None:
    made, expected = Spans.of(iter(pieces(runs))), dict[int, set[int]]()
    for first, count, to in runs:
        for i in range(count):
            expected.setdefault(first + i, set()).add(to + i)
    found = made.find(np.arange(300, dtype=np.uint64)).tolist()
    for number, to in enumerate(found):
        assert to in expected[number] if number in expected else to == int(NO_FRAME)
    assert made.repeated == sum(count for _, count, _ in runs) - len(expected)
    assert (made.again is None) == (made.repeated == 0)
    ends = made.first + made.count.astype(np.uint64)
    assert (made.first[1:] >= ends[:-1]).all()
    assert int(made.count.sum()) == len(expected)


def test_memory_in_one_piece_is_one_row() -> None:
    numbers = np.arange(1 << 16, dtype=np.uint64)
    assert len(Spans.of([(numbers, numbers + np.uint64(7))]).first) == 1
    assert len(Spans.of([]).find(numbers)) == 1 << 16
    assert Spans.of([]).find(np.array([[1, 2]], np.uint64)).shape == (1, 2)


def test_there_is_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "ROWS_MAX", 100)
    numbers = np.arange(0, 400, 2, dtype=np.uint64)
    with pytest.raises(GuestError, match="more than 0x64 runs"):
        Spans.of([(numbers, numbers)])
