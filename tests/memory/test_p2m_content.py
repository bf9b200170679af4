"""Look-ups and surveys of a p2m against ones that go through it entry by entry, leaves shared and missing at will."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.frames import Machine, array
from xenpv.abi.declare import Width
from xenpv.abi.xen import INVALID_MFN
from xenpv.frames import FOREIGN, IDENTITY, NO_FRAME, PAGE_SIZE, U8, U64, Mask
from xenpv.memory.p2m_anchors import Anchors
from xenpv.memory.p2m_reader import P2M
from xenpv.memory.p2m_survey import EntryKind, survey
from xenpv.memory.p2m_writer import encode_entries
from xenpv.runs import FrameRuns

NONE = int(NO_FRAME)
MARKED = [int(FOREIGN) | 7, int(IDENTITY) | 9]
BAD = 99  # a leaf that cannot be read


@dataclass
class Drawn:
    """A p2m, and the same entry by entry: None where there is no leaf."""

    p2m: P2M
    frames: list[int]
    entries: list[int | None]


@st.composite
def p2ms(draw: st.DrawFn, width: Width, *, shared: bool = True) -> Drawn:
    per_leaf, machine = PAGE_SIZE // width, Machine()
    leaves = []
    for _ in range(3):
        row = np.full(per_leaf, draw(st.sampled_from([NONE, NONE, 5, *MARKED])), np.uint64)
        for _ in range(draw(st.integers(0, 4))):
            at, n = draw(st.integers(0, per_leaf - 1)), draw(st.sampled_from([1, 2, 300]))
            row[at : at + n] = draw(st.sampled_from([NONE, 0, 1, 5, 6, *MARKED]))
        leaves.append(row)
    names = [BAD, NONE, *machine.put(encode_entries(np.array(leaves), width)).tolist()]
    content = dict(zip(names[2:], leaves, strict=True))
    frames = draw(st.permutations(names)) if not shared else draw(st.lists(st.sampled_from(names), max_size=6))
    end = len(frames) * per_leaf
    entries = end - draw(st.sampled_from([0, 1, per_leaf // 2, per_leaf - 1])) if frames else 0
    naive = [int(content[frame][at]) if frame in content else None for frame in frames for at in range(per_leaf)]
    return Drawn(
        P2M(width, entries, FrameRuns.from_frames(array(*frames)), machine.read), list(frames), naive[:entries]
    )


@pytest.mark.parametrize("width", [8, 4])
@given(data=st.data())
def test_lookup_random_p2m_equals_each_entry(width: Width, data: st.DataObject) -> None:
    drawn = data.draw(p2ms(width))
    p2m, naive, per_leaf = drawn.p2m, drawn.entries, PAGE_SIZE // width
    wanted = [*range(0, len(naive) + per_leaf, 37), *range(max(len(naive) - 2, 0), len(naive) + 2), 1 << 63, NONE]
    plain = [NONE if mfn is None else mfn for mfn in naive]
    assert p2m.lookup(array(*wanted)).tolist() == [plain[pfn] if pfn < len(plain) else NONE for pfn in wanted]
    assert p2m.lookup(array(*wanted[::-1])).tolist() == [plain[p] if p < len(plain) else NONE for p in wanted[::-1]]
    firsts = [at for at, f in enumerate(drawn.frames) if f not in {NONE, BAD} and drawn.frames.index(f) == at]
    last = {
        mfn: pfn
        for place in firsts
        for pfn, mfn in enumerate(plain[place * per_leaf : (place + 1) * per_leaf], place * per_leaf)
    }
    mfns = [0, 1, 5, 6, 77, *MARKED]
    assert p2m.pfns_of(array(*mfns, NONE)).tolist() == [*(last.get(mfn, NONE) for mfn in mfns), NONE]
    lost: list[int] = []
    found = {
        first: row.tolist()
        for leaves in p2m.iter_leaves(on_unreadable=lambda runs: lost.extend(runs.first.tolist()))
        for first, row in zip(leaves.first_place.tolist(), leaves.mfns, strict=True)
    }
    assert list(found) == firsts
    padded = plain + [NONE] * per_leaf
    for place, row in found.items():
        there = padded[place * per_leaf : (place + 1) * per_leaf]
        assert row[: len(naive) - place * per_leaf] == there[: len(naive) - place * per_leaf]
    assert lost == ([drawn.frames.index(BAD)] if BAD in drawn.frames else [])


@pytest.mark.parametrize("width", [8, 4])
@given(data=st.data())
def test_used_entries_exclude_tail_of_one_leaf(width: Width, data: st.DataObject) -> None:
    """Trailing top entries that name one table are dropped but for the first, as libxenguest does (P2M.used)."""
    drawn = data.draw(p2ms(width))
    frames, per_leaf, used = list(drawn.frames), PAGE_SIZE // width, len(drawn.entries)
    while len(frames) > 1 and frames[-1] == frames[-2] != NONE:
        frames.pop()
        used = len(frames) * per_leaf
    assert drawn.p2m.used_entries == min(used, len(drawn.entries))
    once = {frame: drawn.frames.count(frame) for frame in drawn.frames if frame != NONE}
    distinct = drawn.p2m.distinct_leaves
    assert dict(zip(distinct.frame.tolist(), distinct.count.tolist(), strict=True)) == once
    assert distinct.first.tolist() == sorted(drawn.frames.index(frame) for frame in once)


def kind_of(mfn: int | None) -> EntryKind:
    if mfn is None:
        return EntryKind.HOLE
    if mfn == NONE:
        return EntryKind.INVALID
    return EntryKind.FOREIGN if mfn >> 63 else EntryKind.IDENTITY if mfn >> 62 else EntryKind.LOCAL


@pytest.mark.parametrize("width", [8, 4])
@given(data=st.data(), cells=st.integers(1, 600))
def test_survey_counts_equal_count_by_entry(width: Width, data: st.DataObject, cells: int) -> None:
    drawn = data.draw(p2ms(width))
    found = survey(drawn.p2m, cells)
    kinds = [kind_of(mfn) for mfn in drawn.entries]
    assert found.pages == {kind: Counter(kinds)[kind] for kind in EntryKind}
    assert found.first == {kind: kinds.index(kind) for kind in set(kinds)}


@pytest.mark.parametrize("width", [8, 4])
@given(data=st.data(), cells=st.integers(1, 600))
def test_survey_cells_equal_count_by_entry(width: Width, data: st.DataObject, cells: int) -> None:
    """Where no leaf is shared, each cell is what its pfns hold."""
    drawn = data.draw(p2ms(width, shared=False))
    found = survey(drawn.p2m, cells)
    own = [kind_of(mfn) is EntryKind.LOCAL for mfn in drawn.entries]
    assert len(found.local_pages) <= cells
    assert found.local_pages.tolist() == [
        sum(own[i : i + found.cell_pfns]) for i in range(0, len(own), found.cell_pfns)
    ]
    assert found.local_pages.sum() == found.pages[EntryKind.LOCAL]


@pytest.mark.parametrize("cells", [1, 2, 512])
def test_survey_near_2_to_the_64_does_not_wrap(cells: int) -> None:
    """A rooted tree of 8 levels over 2^64 - 1 entries: all tables one page that names itself, and is the leaf, too."""
    machine = Machine()
    [loop] = machine.put(np.zeros((1, PAGE_SIZE), np.uint8)).tolist()
    machine.content[loop] = encode_entries(np.full((1, 512), loop, np.uint64), 8)[0]
    anchors = Anchors(8, (1 << 64) - 1, INVALID_MFN[8], p2m_levels=8, p2m_root=loop)
    p2m = P2M.from_root(anchors, anchors.roots[0], machine.read)
    assert (p2m.leaf_count, p2m.distinct_leaves.count.tolist(), p2m.used_entries) == (1 << 55, [1 << 55], 512)
    found = survey(p2m, cells)
    assert found.pages == {kind: (1 << 64) - 1 if kind is EntryKind.LOCAL else 0 for kind in EntryKind}
    last = array(0, 1 << 63, (1 << 64) - 2, (1 << 64) - 1)
    assert p2m.lookup(last).tolist() == [loop, loop, loop, NONE]
    assert machine.reads < 20


def test_distinct_leaves_counts_above_2_to_the_53_are_exact() -> None:
    """A float would not tell 2^53 + 1 from 2^53."""
    frames = FrameRuns(np.array([0, 1, (1 << 53) + 1]), np.array([1, 1 << 53, 1]), array(7, 8, 8))
    p2m = P2M(8, 512 * ((1 << 53) + 2), frames, Machine().read)
    assert (p2m.distinct_leaves.first.tolist(), p2m.distinct_leaves.count.tolist()) == ([0, 1], [1, (1 << 53) + 1])
    assert p2m.used_entries == 1024
    with_leaf = p2m.iter_leaves(np.array([1 << 53]))
    assert list(with_leaf) == []


def test_iter_leaves_last_leaf_of_64_bits_has_its_pfns() -> None:
    machine = Machine()
    [leaf] = machine.put(encode_entries(np.arange(512, dtype=np.uint64)[None], 8)).tolist()
    place = np.array([(1 << 55) - 1])
    p2m = P2M(8, (1 << 64) - 1, FrameRuns(place, np.array([1]), array(leaf)), machine.read)
    [leaves] = p2m.iter_leaves()
    assert leaves.pfns[0, [0, 511]].tolist() == [(1 << 64) - 512, (1 << 64) - 1]
    assert leaves.mfns[0, [0, 510, 511]].tolist() == [0, 510, NONE]
    found = survey(p2m)
    assert (found.pages[EntryKind.LOCAL], found.pages[EntryKind.HOLE], int(found.local_pages[-1])) == (
        511,
        (1 << 64) - 512,
        511,
    )
    assert p2m.pfns_of(array(510, 511)).tolist() == [(1 << 64) - 2, NONE]


def test_survey_of_changing_p2m_is_consistent() -> None:
    """A mapping is the guest's own memory: what was read is a copy, or it would be counted as two kinds."""
    live = np.zeros((1, PAGE_SIZE), np.uint8)

    def read(mfns: U64) -> tuple[U8, Mask]:
        return live[np.zeros(len(mfns), np.int64)] if len(mfns) != 1 else live, np.ones(len(mfns), np.bool_)

    p2m = P2M(8, 512, FrameRuns.from_frames(array(7)), read)
    for leaves in p2m.iter_leaves():
        live.fill(0xFF)
        assert leaves.mfns.tolist() == [[0] * 512]
