"""PageIndex against the simplest thing that does the same: a dictionary that each record overwrites."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.support.stream_strategies import KNOWN_TYPES, LAST_PFN
from tests.support.writers.stream import PAGE, WITH_DATA
from xenpv.frames import ABSENT, IS_TABLE, U64
from xenpv.stream import index as index_module
from xenpv.stream.index import PageIndex

# Runs of pfns and types, as savers write them, with some at random: few pfns, so that much comes again.
runs = st.tuples(st.integers(0, 60), st.integers(1, 20), st.sampled_from(KNOWN_TYPES))
odd = st.tuples(st.sampled_from([0, 7, 1 << 31, (1 << 32) - 1, LAST_PFN]), st.just(1), st.sampled_from(KNOWN_TYPES))
batches = st.lists(st.lists(runs | odd, min_size=1, max_size=4), max_size=8)
looked_at: U64 = np.array([*range(90), (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, LAST_PFN], np.uint64)


@dataclass
class Model:
    """pfn to type and offset of the content, or -1."""

    pages: dict[int, tuple[int, int]] = field(default_factory=dict)
    sent: int = 0

    def put(self, entries: list[tuple[int, int]], offset: int) -> int:
        for pfn, kind in entries:
            self.pages[pfn] = (kind, offset if kind in WITH_DATA else -1)
            offset += PAGE * (kind in WITH_DATA)
        self.sent += len(entries)
        return offset


def build(records: list[list[tuple[int, int, int]]], *, look_between: bool) -> tuple[PageIndex, Model]:
    index, model, offset = PageIndex(), Model(), 1000
    for record in records:
        entries = [(pfn + i, kind) for pfn, n, kind in record for i in range(n)]
        words = np.array([kind << 60 | pfn for pfn, kind in entries], np.uint64)
        index.add_entries(words, offset)
        offset = model.put(entries, offset) + 24 + 8 * len(entries)
        if look_between:
            check(index, model)
    return index, model


def check(index: PageIndex, model: Model) -> None:
    expected = [model.pages.get(int(pfn), (ABSENT, -1)) for pfn in looked_at]
    assert index.types(looked_at).tolist() == [kind for kind, _ in expected]
    assert index.offsets(looked_at).tolist() == [offset for _, offset in expected]


@given(batches, st.booleans())
def test_index_last_entry_of_pfn_counts(records: list[list[tuple[int, int, int]]], look_between: bool) -> None:
    index, model = build(records, look_between=look_between)
    check(index, model)
    assert index.sent == model.sent
    kinds = [kind for kind, _ in model.pages.values()]
    assert index.count() == {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    assert index.last_pfn == max(model.pages, default=-1)
    assert index.pfns(IS_TABLE).tolist() == sorted(pfn for pfn, (kind, _) in model.pages.items() if IS_TABLE[kind])
    assert index.repeated == model.sent - len(model.pages)


@given(batches)
def test_index_extents_are_disjoint_ascending_and_complete(records: list[list[tuple[int, int, int]]]) -> None:
    index, model = build(records, look_between=False)
    index.types(looked_at)
    start, pages, kinds = index.extents.first, index.extents.pages, index.extents.type
    flat = {int(s) + i: int(kind) for s, n, kind in zip(start, pages.tolist(), kinds, strict=True) for i in range(n)}
    assert flat == {pfn: kind for pfn, (kind, _) in model.pages.items()}
    ends = start + pages.astype(np.uint64)
    assert (ends[:-1] <= start[1:]).all()


@given(st.lists(st.tuples(st.lists(runs, min_size=1, max_size=3), st.integers(0, 3)), max_size=6))
def test_index_duplicates_within_a_record_are_kept(records: list[tuple[list[tuple[int, int, int]], int]]) -> None:
    index = PageIndex()
    expected = []
    offset = 500
    for record, again in records:
        entries = [(pfn + i, kind) for pfn, n, kind in record for i in range(n)]
        entries += entries[:again]
        words = np.array([kind << 60 | pfn for pfn, kind in entries], np.uint64)
        seen: set[int] = set()
        for i, (pfn, _) in enumerate(entries):
            if pfn in seen:
                expected.append((pfn, offset - words.nbytes + 8 * i))
            seen.add(pfn)
        index.add_entries(words, offset)
        offset += 1 << 20
    index.types(looked_at)
    assert sorted(index.duplicates) == sorted(expected)


def test_index_many_records_equal_one() -> None:
    """More than are gathered before they are turned into extents."""
    n = index_module._RECORDS_PER_MERGE * 3 + 5
    index = PageIndex()
    for i in range(n):
        index.add_entries(np.array([2 * i, 2 * i + 1], np.uint64), 100 + i * (16 + 2 * PAGE))
    assert index.count() == {0: 2 * n}
    assert index.offsets(np.array([0, 1, 2 * n - 1], np.uint64)).tolist() == [
        100,
        100 + PAGE,
        100 + (n - 1) * (16 + 2 * PAGE) + PAGE,
    ]
    assert len(index.extents) <= n
