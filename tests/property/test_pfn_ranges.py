"""PfnRanges of the pfns and the axis that they are drawn on, against plain sets of pfns."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenpv.report.pfn_ranges import NO_RANGES, PfnRanges, RangeCollector, pfn_axis

PFNS = st.sets(st.integers(0, 300), max_size=80)


def parts(pfns: set[int]) -> PfnRanges:
    return PfnRanges.from_pfns(np.array(sorted(pfns), np.uint64))


def pfns_of(ranges: PfnRanges) -> set[int]:
    """Of parts of which every pfn is meant."""
    assert (ranges.span == ranges.pages).all()
    return {pfn for start, span, _ in _rows(ranges) for pfn in range(start, start + span)}


def _rows(ranges: PfnRanges) -> list[tuple[int, int, int]]:
    flat = ranges.rows()
    return list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))


@given(PFNS)
def test_ranges_of_pfns_are_as_few_as_their_runs(pfns: set[int]) -> None:
    ranges = parts(pfns)
    assert pfns_of(ranges) == pfns
    assert len(ranges) == sum(pfn - 1 not in pfns for pfn in pfns)


@given(PFNS, st.integers(1, 12))
def test_ranges_coarsened_hold_all_pages_and_bridge_the_narrowest_gaps(pfns: set[int], limit: int) -> None:
    exact, coarse = parts(pfns), parts(pfns).coarsen(limit)
    assert len(coarse) == min(len(exact), limit)
    assert int(coarse.pages.sum()) == len(pfns)
    for start, span, pages in _rows(coarse):
        assert pages == sum(start <= pfn < start + span for pfn in pfns)
    gaps = sorted((exact.start[1:] - exact.end[:-1]).tolist(), reverse=True)
    assert sorted((coarse.start[1:] - coarse.end[:-1]).tolist(), reverse=True) == gaps[: max(0, len(coarse) - 1)]


@given(PFNS, PFNS)
def test_ranges_merged_hold_the_pfns_of_both(first: set[int], second: set[int]) -> None:
    both = parts(first).union(parts(second))
    covered = {pfn for start, span, _ in _rows(both) for pfn in range(start, start + span)}
    assert covered == first | second
    assert (both.start[1:] > both.end[:-1]).all() or len(both) < 2


def test_collector_below_its_limit_is_exact() -> None:
    few, many = RangeCollector(rows=64), RangeCollector(rows=64)
    for pfn in range(0, 120, 2):
        few.add(parts({pfn}))
    for pfn in range(0, 1000, 2):
        many.add(parts({pfn}))
    assert pfns_of(few.all) == set(range(0, 120, 2))
    assert int(many.all.pages.sum()) == 500
    assert len(many.all) <= 64
    assert RangeCollector().all is NO_RANGES


@given(PFNS, st.integers(301, 1 << 52))
def test_axis_of_all_pfns_ascends_from_0_to_1(pfns: set[int], end: int) -> None:
    line = pfn_axis(parts(pfns), end)
    assert line[0] == (0, 0.0)
    assert line[-1][0] == end
    assert line[-1][1] == pytest.approx(1)
    for (pfn, place), (next_pfn, next_place) in pairwise(line):
        assert next_pfn > pfn
        assert next_place > place


def test_axis_far_away_pages_are_visible() -> None:
    far = 1 << 32
    ranges = PfnRanges.from_ranges(np.array([0, far - 2], np.uint64), np.array([16384, 2]))
    line = dict(pfn_axis(ranges, far))
    assert line[16384] > 0.95
    assert line[far] - line[far - 2] > 0.009  # two pages of 16,386
    assert line[far - 2] - line[16384] < 0.02  # 16 TiB without any
