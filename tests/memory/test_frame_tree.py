"""Walks of trees of frames against a naive one, on trees that share tables at will."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenpv.errors import GuestError
from xenpv.frames import NO_FRAME, PAGE_SIZE, U8, U64, Mask
from xenpv.memory import frame_tree
from xenpv.memory.frame_tree import build_tree, walk_tree
from xenpv.runs import FrameRuns

ENTRIES = 512


class Tables:
    """Frames of 512 entries each; a frame that is not there cannot be read."""

    def __init__(self, tables: dict[int, U64]) -> None:
        self.tables = tables
        self.reads = 0

    def read(self, frames: U64) -> tuple[U8, Mask]:
        self.reads += len(frames)
        there = np.array([int(f) in self.tables for f in frames])
        nothing = np.zeros(ENTRIES, np.uint64)
        rows = [self.tables.get(int(f), nothing) for f in frames]
        return np.array(rows, np.uint64).view(np.uint8).reshape(-1, PAGE_SIZE), there


def entries(pages: U8, _level: int) -> U64:
    table = pages.view(np.uint64).reshape(-1, ENTRIES)
    return np.where(table == 0, NO_FRAME, table)


def leaf(tables: Tables, root: int, levels: int, place: int) -> int:
    frame = root
    for level in range(levels - 1, -1, -1):
        if frame not in tables.tables:
            return int(NO_FRAME)
        frame = int(tables.tables[frame][place >> 9 * level & 511]) or int(NO_FRAME)
    return frame


def table(draw: st.DrawFn, names: list[int]) -> U64:
    out = np.full(ENTRIES, draw(st.sampled_from([0, *names])), np.uint64)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, ENTRIES - 1))
        out[at : at + draw(st.sampled_from([1, 2, 100]))] = draw(st.sampled_from([0, *names]))
    return out


@st.composite
def trees(draw: st.DrawFn) -> tuple[Tables, int]:
    """Three levels of three tables each, which name each other at will, and leaves 100 to 109; some are missing."""
    leaves = list(range(100, 110))
    tables = {frame: table(draw, leaves) for frame in (11, 12, 13)}
    tables |= {frame: table(draw, [11, 12, 13, 99]) for frame in (21, 22, 23)}
    tables[1] = table(draw, [21, 22, 23, 99])
    return Tables(tables), 3


@given(trees(), st.integers(0, 512**3 - 1), st.data())
def test_walk_tree_equals_walk_of_each_place(tree: tuple[Tables, int], start: int, data: st.DataObject) -> None:
    tables, levels = tree
    stop = min(512**3, start + data.draw(st.integers(1, 200_000)))
    runs, _ = walk_tree(tables.read, 1, levels, range(start, stop), entries)
    assert np.all(runs.first[1:] >= runs.first[:-1] + runs.count[:-1])
    assert not len(runs) or (runs.first[0] >= start and runs.first[-1] + runs.count[-1] <= stop)
    places = np.array(sorted({start, stop - 1, *(data.draw(st.integers(start, stop - 1)) for _ in range(20))}))
    expected = [leaf(tables, 1, levels, place) for place in places.tolist()]
    assert runs.frame_of(places).tolist() == expected
    outside = np.array([start - 1, stop])
    assert runs.frame_of(outside).tolist() == [int(NO_FRAME)] * 2


def test_walk_tree_shared_tables_are_read_once() -> None:
    """16 TiB of pfns of which all but one leaf are missing: five levels, six tables."""
    missing = {level: np.full(ENTRIES, level - 1, np.uint64) for level in (2, 3, 4)}  # of leaf 1
    tables = Tables({level: t.copy() for level, t in missing.items()} | {5: np.full(ENTRIES, 4, np.uint64)})
    tables.tables |= {12: missing[2].copy(), 13: missing[3].copy(), 14: missing[4].copy()}
    tables.tables[12][7] = 77
    tables.tables[13][0], tables.tables[14][0], tables.tables[5][0] = 12, 13, 14
    runs, unreadable = walk_tree(tables.read, 5, 4, range(512**4), entries)
    assert unreadable == []
    assert tables.reads == 7
    assert len(runs) < 10
    assert runs.frame_of(np.array([0, 7, 8, 512**4 - 1])).tolist() == [1, 77, 1, 1]
    assert runs.count.sum() == 512**4


def test_walk_tree_unreadable_tables_are_returned() -> None:
    top = np.zeros(ENTRIES, np.uint64)
    top[3:5] = 9
    runs, unreadable = walk_tree(Tables({1: top}).read, 1, 2, range(512**2), entries)
    assert len(runs) == 0
    assert [(u.frame, u.level, u.place) for u in unreadable] == [(9, 1, 3)]
    assert walk_tree(Tables({}).read, 1, 2, range(5), entries)[1][0].level == 2


def test_walk_tree_table_that_is_its_own_leaf_ends() -> None:
    loop = np.full(ENTRIES, 1, np.uint64)
    runs, _ = walk_tree(Tables({1: loop}).read, 1, 4, range(512**4), entries)
    assert (len(runs), runs.count.tolist(), runs.frame.tolist()) == (1, [512**4], [1])


def test_walk_tree_exponential_sharing_raises_guest_error() -> None:
    """A table whose entries alternate between two tables that do the same: 512^3 rows, if one let it."""
    mixed = np.array([1, 2] * 256, np.uint64)
    with pytest.raises(GuestError, match=r"\b1048576 .*frame 0x1\b"):
        walk_tree(Tables({1: mixed, 2: mixed}).read, 1, 4, range(512**4), entries)


def test_walk_tree_too_many_runs_raises_guest_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without anything shared: 2 tables of 512 leaves each."""
    leaves = np.arange(1000, 2024).astype(np.uint64)
    tables = Tables({1: np.array([2, 3] + [0] * 510, np.uint64), 2: leaves[:512], 3: leaves[512:]})
    monkeypatch.setattr(frame_tree, "RUNS_MAX", 1024)
    assert len(walk_tree(tables.read, 1, 2, range(512**2), entries)[0]) == 1024
    monkeypatch.setattr(frame_tree, "RUNS_MAX", 1023)
    with pytest.raises(GuestError, match=r"frame 0x1 .*\b1023\b"):
        walk_tree(tables.read, 1, 2, range(512**2), entries)


def test_walk_tree_too_many_shared_runs_raises_guest_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tables of 512 leaves in 256 places each: 2^18 runs, of which 1024 are not by sharing."""
    leaves = np.arange(1000, 2024).astype(np.uint64)
    tables = Tables({1: np.array([2, 3] * 256, np.uint64), 2: leaves[:512], 3: leaves[512:]})
    monkeypatch.setattr(frame_tree, "SHARED_RUNS_MAX", 512 * 512 - 1024)
    assert len(walk_tree(tables.read, 1, 2, range(512**2), entries)[0]) == 512 * 512
    monkeypatch.setattr(frame_tree, "SHARED_RUNS_MAX", 512 * 512 - 1025)
    with pytest.raises(GuestError, match=r"frame 0x2, .*\b256\b"):
        walk_tree(tables.read, 1, 2, range(512**2), entries)


def test_walk_tree_too_many_unreadable_tables_raises_guest_error() -> None:
    """Two tables that are not there, in 2^17 places each; and 2^17 that are not, each for itself."""
    tables = Tables({1: np.array([2, 3] * 256, np.uint64)})
    tables.tables |= {2: np.full(ENTRIES, 99, np.uint64), 3: np.full(ENTRIES, 98, np.uint64)}
    _, unreadable = walk_tree(tables.read, 1, 3, range(512**3), entries)
    assert [(u.frame, u.level, u.place) for u in unreadable] == [(99, 1, 0), (98, 1, 512)]
    many = {2 + i: np.arange(1000 + 512 * i, 1512 + 512 * i).astype(np.uint64) for i in range(256)}
    top = np.array([*many, *[0] * 256], np.uint64)
    with pytest.raises(GuestError, match=r"\b65536 .*frame 0x1\b"):
        walk_tree(Tables({1: top, **many}).read, 1, 3, range(512**3), entries)


def test_walk_tree_scattered_places_read_each_table_once() -> None:
    """Cost follows distinct tables: here 512 that stand in 2^18 places, in no order."""
    names = np.arange(10, 522).astype(np.uint64)
    tables = Tables({1: np.array([2, 3] * 256, np.uint64), 2: names, 3: names[::-1].copy()})
    tables.tables |= {int(frame): np.full(ENTRIES, 5, np.uint64) for frame in names}
    runs, _ = walk_tree(tables.read, 1, 3, range(512**3), entries)
    assert tables.reads == 1 + 2 + 512
    assert (int(runs.count.sum()), np.unique(runs.frame).tolist()) == (512**3, [5])


def test_frame_of_empty_runs_returns_no_frame() -> None:
    nothing = FrameRuns(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint64))
    assert nothing.frame_of(np.array([0, 5])).tolist() == [int(NO_FRAME)] * 2


# --- runs, and building trees, against naive ones --------------------------------------------------------------------

SIZE = 4  # entries a table of those that are built here
PLACES = st.lists(st.tuples(st.sampled_from([0, 7, 8, 9]), st.integers(1, 40)), max_size=12)


def spread(runs: list[tuple[int, int]]) -> list[int]:
    """Frames by place; 0 is none."""
    return [frame for frame, count in runs for _ in range(count)][: SIZE**4]


def of_places(frames: list[int]) -> FrameRuns:
    return FrameRuns.from_frames(np.array([frame or int(NO_FRAME) for frame in frames], np.uint64))


def flat(runs: FrameRuns) -> dict[int, int]:
    """Frame by place, and no place is there twice."""
    found: dict[int, int] = {}
    for first, count, frame in zip(runs.first.tolist(), runs.count.tolist(), runs.frame.tolist(), strict=True):
        assert count > 0
        for place in range(first, first + count):
            assert place not in found
            found[place] = frame
    assert list(found) == sorted(found)
    return found


@given(PLACES, st.integers(0, 300), st.integers(0, 300))
def test_frame_runs_from_frames_equal_the_array(what: list[tuple[int, int]], start: int, length: int) -> None:
    frames = spread(what)
    named = {place: frame for place, frame in enumerate(frames) if frame}
    runs = of_places(frames)
    assert flat(runs) == named
    assert not np.any((runs.frame[1:] == runs.frame[:-1]) & (runs.first[1:] == (runs.first + runs.count)[:-1]))
    asked = np.arange(-2, len(frames) + 2)
    assert runs.frame_of(asked).tolist() == [named.get(place, int(NO_FRAME)) for place in asked.tolist()]
    places = range(start, start + length)
    none = int(NO_FRAME)
    assert flat(runs.gaps(places)) == {place: none for place in places if place not in named}
    assert flat(runs.fill_gaps(places, 5)) == dict(sorted((dict.fromkeys(places, 5) | named).items()))


@given(PLACES, st.integers(1, 4))
def test_build_tree_round_trip_writes_no_table_twice(what: list[tuple[int, int]], levels: int) -> None:
    """Tables that say the same all through are made once; others differ, or stand in different places."""
    frames = spread(what)[: SIZE**levels]
    made: list[tuple[int, ...]] = []

    def put(pages: U8) -> U64:
        made.extend(tuple(row) for row in named(pages, 0).tolist())
        return np.arange(1000 + len(made) - len(pages), 1000 + len(made)).astype(np.uint64)

    def encode(rows: U64) -> U8:
        pages = np.zeros((len(rows), PAGE_SIZE), np.uint8)
        pages[:, : SIZE * 8] = rows.view(np.uint8)
        return pages

    def named(pages: U8, _level: int) -> U64:
        return np.ascontiguousarray(pages[:, : SIZE * 8]).view(np.uint64)

    def read(wanted: U64) -> tuple[U8, Mask]:
        return encode(np.array([made[int(frame) - 1000] for frame in wanted], np.uint64)), np.ones(
            len(wanted), np.bool_
        )

    top = build_tree(of_places(frames), levels, SIZE, encode, put)
    level, tables = frames, 0
    for _ in range(levels):
        level += [0] * (-len(level) % SIZE)
        groups = [tuple(level[i : i + SIZE]) for i in range(0, len(level), SIZE)]
        uniform = {group for group in groups if len(set(group)) == 1 and group[0]}
        mixed = [i for i, group in enumerate(groups) if len(set(group)) > 1]
        tables += len(uniform) + len(mixed)
        level = [-i - 1 if i in mixed else group[0] for i, group in enumerate(groups)]
    assert len(made) == tables
    if not any(frames):
        assert len(top) == 0
        return
    assert (top.first.tolist(), top.count.tolist()) == ([0], [1])
    runs, unreadable = walk_tree(read, int(top.frame[0]), levels, range(len(frames)), named)
    assert unreadable == []
    assert flat(runs) == {place: frame for place, frame in enumerate(frames) if frame}


@given(
    st.lists(st.sampled_from([5, 6, int(NO_FRAME)]), max_size=12),
    st.lists(st.sampled_from([5, 6, int(NO_FRAME)]), max_size=12),
)
def test_difference_is_where_frames_differ(ours: list[int], theirs: list[int]) -> None:
    mine, other = FrameRuns.from_frames(np.array(ours, np.uint64)), FrameRuns.from_frames(np.array(theirs, np.uint64))
    padded = theirs + [int(NO_FRAME)] * len(ours)
    expected = [frame if frame != padded[at] else int(NO_FRAME) for at, frame in enumerate(ours)]
    apart = mine.difference(other)
    assert apart.frame_of(np.arange(len(ours))).tolist() == expected
    assert (apart.count > 0).all()
