"""Runs of pfns, frame maps and runs of frames, against plain sets and dictionaries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xenpv import runs
from xenpv.errors import GuestError
from xenpv.frames import ABSENT, I64, NO_FRAME, U64
from xenpv.runs import Extents, FrameMap, Runs, align, expand_runs, group_rows

PFNS = st.sets(st.integers(0, 60) | st.integers((1 << 52) - 20, (1 << 52) - 1), max_size=40)
TYPES = st.dictionaries(st.integers(0, 60), st.sampled_from([0, 1, 4, 0xD]), max_size=40)
PIECES = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 30), st.integers(0, 1 << 40)), max_size=12)
ASKED = np.arange(64, dtype=np.uint64)


def u64(numbers: object) -> U64:
    return np.array(sorted(numbers), np.uint64)  # type: ignore[call-overload]


def extents_of(types: dict[int, int]) -> Extents:
    return Extents.from_types(u64(types), np.array([types[pfn] for pfn in sorted(types)], np.uint8))


def pieces(rows: list[tuple[int, int, int]]) -> list[tuple[U64, U64]]:
    return [(np.arange(f, f + n, dtype=np.uint64), np.arange(t, t + n, dtype=np.uint64)) for f, n, t in rows]


@settings(deadline=None)
@given(PFNS)
def test_runs_from_pfns_are_as_few_as_can_be(pfns: set[int]) -> None:
    made = Runs.from_pfns(u64(pfns))
    assert made.pfns.tolist() == sorted(pfns)
    assert len(made) == sum(pfn - 1 not in pfns for pfn in pfns)
    assert (made.total, made.stop) == (len(pfns), max(pfns, default=-1) + 1)


@settings(deadline=None)
@given(PFNS, st.integers(1, 50), st.none() | st.integers(0, 50))
def test_batches_have_the_size_asked_and_end_at_the_limit(pfns: set[int], size: int, limit: int | None) -> None:
    batches = [batch.tolist() for batch in Runs.from_pfns(u64(pfns)).batches(size, limit)]
    assert [pfn for batch in batches for pfn in batch] == sorted(pfns)[:limit]
    assert all(len(batch) == size for batch in batches[:-1])


@settings(deadline=None)
@given(PFNS)
def test_positions_count_the_pages_before_each_pfn(pfns: set[int]) -> None:
    made, listed = Runs.from_pfns(u64(pfns)), sorted(pfns)
    asked = np.append(ASKED, u64(pfns | {(1 << 64) - 1}))
    assert made.positions(asked).tolist() == [listed.index(pfn) if pfn in pfns else -1 for pfn in asked.tolist()]
    assert (made.rows_of(asked) >= 0).tolist() == [pfn in pfns for pfn in asked.tolist()]
    assert made.pfns_at(np.arange(len(listed))).tolist() == listed


@settings(deadline=None)
@given(TYPES)
def test_extents_keep_the_type_of_each_pfn(types: dict[int, int]) -> None:
    made = extents_of(types)
    told = {int(p): int(t) for pfns, kinds in made.typed_batches(7) for p, t in zip(pfns, kinds, strict=True)}
    assert told == types
    assert made.merged().pfns.tolist() == sorted(types)
    assert len(made.merged()) == len(Runs.from_pfns(u64(types)))
    assert Extents.concatenate([made[:2], made[2:]]).type.tolist() == made.type.tolist()


@settings(deadline=None)
@given(TYPES, TYPES)
def test_align_gives_both_domains_the_same_runs(a: dict[int, int], b: dict[int, int]) -> None:
    of_a, of_b = align(extents_of(a), extents_of(b))
    assert of_a.first.tolist() == of_b.first.tolist()
    assert of_a.pages.tolist() == of_b.pages.tolist()
    told = {
        pfn: (kind_a, kind_b)
        for first, pages, kind_a, kind_b in zip(
            of_a.first.tolist(), of_a.pages.tolist(), of_a.type.tolist(), of_b.type.tolist(), strict=True
        )
        for pfn in range(first, first + pages)
    }
    assert told == {pfn: (a.get(pfn, ABSENT), b.get(pfn, ABSENT)) for pfn in a.keys() | b.keys()}


@settings(max_examples=150, deadline=None)
@given(PIECES)
def test_frame_map_finds_each_number_once(rows: list[tuple[int, int, int]]) -> None:
    made, expected = FrameMap.from_pieces(iter(pieces(rows))), dict[int, set[int]]()
    for first, count, target in rows:
        for i in range(count):
            expected.setdefault(first + i, set()).add(target + i)
    found = made.lookup(np.arange(300, dtype=np.uint64)).tolist()
    for number, target in enumerate(found):
        assert target in expected[number] if number in expected else target == int(NO_FRAME)
    assert made.repeated == sum(count for _, count, _ in rows) - len(expected)
    assert (made.first_repeated is None) == (made.repeated == 0)
    assert (made.runs.first[1:] >= made.runs.end[:-1]).all()
    assert made.runs.total == len(expected)
    assert made.lookup_range(range(17, 211)).tolist() == found[17:211]


def test_frame_map_of_consecutive_numbers_is_one_run() -> None:
    numbers = np.arange(1 << 16, dtype=np.uint64)
    assert len(FrameMap.from_pieces([(numbers, numbers + np.uint64(7))]).runs) == 1
    assert len(FrameMap.empty().lookup(numbers)) == 1 << 16
    assert FrameMap.from_pieces([]).lookup(np.array([[1, 2]], np.uint64)).shape == (1, 2)


def test_frame_map_with_too_many_runs_raises_guest_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "ROWS_MAX", 100)
    numbers = np.arange(0, 400, 2, dtype=np.uint64)
    with pytest.raises(GuestError):
        FrameMap.from_pieces([(numbers, numbers)])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1 << 60), st.integers(0, 9)), max_size=9))
def test_expand_runs_lists_every_number_of_each_run(rows: list[tuple[int, int]]) -> None:
    first: I64 = np.array([f for f, _ in rows], np.int64)
    count: I64 = np.array([n for _, n in rows], np.int64)
    expected = [f + i for f, n in rows for i in range(n)]
    assert expand_runs(first, count).tolist() == expected
    assert expand_runs(first.astype(np.uint64), count).dtype == np.uint64
    assert expand_runs(first.astype(np.uint64), count).tolist() == expected


def test_group_rows_of_no_rows_and_of_one_row() -> None:
    none = np.empty(0, np.bool_)
    assert [column.tolist() for column in group_rows(none, 0)] == [[], []]
    assert [column.tolist() for column in group_rows(none, 1)] == [[0], [1]]
    assert [column.tolist() for column in group_rows(np.array([True, False]), 3)] == [[0, 1], [1, 2]]
