"""The map of a domain that is being filled, held against a dict, and what it costs."""

from __future__ import annotations

import tracemalloc

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from xenpv.frames import ABSENT, IS_TABLE, NO_FRAME, U64
from xenpv.memory.physmap import CHUNK, Physmap

CHUNKS = st.integers(0, 6) | st.integers((1 << 52 - 9) - 3, (1 << 52 - 9) - 1) | st.just(1 << 23)
STEPS = st.lists(
    st.tuples(CHUNKS, st.booleans(), st.lists(st.integers(0, CHUNK - 1), max_size=6), st.sampled_from((0, 1, 12, 14))),
    max_size=12,
)


@settings(max_examples=60)
@given(STEPS)
def test_physmap_any_sequence_of_additions_equals_a_dictionary(steps: list[tuple[int, bool, list[int], int]]) -> None:
    physmap, mfns, kinds = Physmap(), dict[int, int](), dict[int, int]()
    for n, (chunk, extent, within, kind) in enumerate(steps):
        pfns = [chunk * CHUNK + at for at in (range(CHUNK) if extent else within)]
        if extent and not any(pfn in mfns for pfn in pfns):
            physmap.add_extents(u64([chunk]), u64([n << 20]))
            mfns |= {pfn: (n << 20) + i for i, pfn in enumerate(pfns)}
        new = list(dict.fromkeys(pfn for pfn in pfns if pfn not in mfns))
        frames = [(n << 20) + 7 * i for i in range(len(new))][::-1]
        physmap.add_pages(u64(new), u64(frames))
        mfns |= dict(zip(new, frames, strict=True))
        typed = [chunk * CHUNK + at for at in within if chunk * CHUNK + at in mfns]
        physmap.set_types(u64(typed), np.full(len(typed), kind, np.uint8))
        kinds |= dict.fromkeys(typed, kind)
    asked = [*sorted(mfns)[:2000:3], 5, 700, 1 << 40, (1 << 52) - 1]
    assert physmap.lookup(u64(asked)).tolist() == [mfns.get(pfn, int(NO_FRAME)) for pfn in asked]
    expected = [kinds.get(pfn, 0) if pfn in mfns else ABSENT for pfn in asked]
    assert physmap.types(u64(asked)).tolist() == expected
    assert physmap.populated == len(mfns)
    tables, types = physmap.page_tables()
    assert dict(zip(tables.tolist(), types.tolist(), strict=True)) == {p: k for p, k in kinds.items() if IS_TABLE[k]}
    assert (tables[1:] > tables[:-1]).all()
    whole = physmap.lookup_chunks(u64([0, 1, 1 << 23]))
    for row, chunk in enumerate((0, 1, 1 << 23)):
        assert whole[row].tolist() == [mfns.get(chunk * CHUNK + i, int(NO_FRAME)) for i in range(CHUNK)]
    used = {pfn // CHUNK for pfn in mfns}
    first, stop = np.array([0, 2, 0]), np.array([3, 1 << 23, 1 << 44])
    found = physmap.count_chunks(first, stop).tolist()
    assert found == [sum(a <= c < b for c in used) for a, b in zip(first.tolist(), stop.tolist(), strict=True)]


def test_set_types_resent_table_is_not_localised() -> None:
    physmap = Physmap()
    physmap.add_extents(u64([3]), u64([1 << 20]))
    pfns = u64([3 * CHUNK, 3 * CHUNK + 1])
    physmap.set_types(pfns, np.array([1, 12], np.uint8))
    physmap.mark_localised(pfns)
    assert physmap.is_localised(pfns).all()
    physmap.set_types(pfns[:1], np.zeros(1, np.uint8))
    assert physmap.page_tables()[0].tolist() == [3 * CHUNK + 1]
    assert physmap.types(pfns).tolist() == [0, 12]


def u64(values: list[int]) -> U64:
    return np.array(values, np.uint64)


def cost(fill: object) -> int:
    """Bytes that are held afterwards."""
    tracemalloc.start()
    physmap = Physmap()
    fill(physmap)  # type: ignore[operator]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert physmap.populated
    return held


def test_add_extents_of_a_tebibyte_takes_megabytes() -> None:
    def extents(physmap: Physmap) -> None:
        for first in range(0, 1 << 19, 1 << 12):
            chunks = np.arange(first, first + (1 << 12), dtype=np.uint64)
            physmap.add_extents(chunks, (chunks + np.uint64(5)) << np.uint64(9))

    assert cost(extents) < 32 << 20


def test_add_pages_takes_8_bytes_each_without_moving_tables() -> None:
    def singles(physmap: Physmap) -> None:
        for first in range(0, 1 << 22, 1 << 16):
            pfns = np.arange(first, first + (1 << 16), dtype=np.uint64)
            physmap.add_pages(pfns, pfns[::-1])

    assert cost(singles) < (8 << 22) * 1.1


def test_add_pages_64_mib_over_16_tib_takes_megabytes() -> None:
    def sparse(physmap: Physmap) -> None:
        for place in range(64):
            pfns = np.arange(place << 26, (place << 26) + 256, dtype=np.uint64)
            physmap.add_pages(pfns, pfns)
            physmap.set_types(pfns[:1], np.array([1], np.uint8))

    assert cost(sparse) < 8 << 20
