"""The frames behind a range of virtual addresses, against a walk of each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.memory.frames import DictFrames, words
from tests.writers.build import pv_domain
from xenpv.abi.declare import Width
from xenpv.frames import Pfn, Vaddr
from xenpv.memory.pagetables import mapped_frames

HOLE = (1 << 64) - 1
TABLES = 7  # pfns 0 to 6 are tables, what lies above are pages or nothing


@st.composite
def tables(draw: st.DrawFn) -> dict[int, dict[int, int]]:
    """Some tables whose entries, near either end, lead anywhere: to each other, too, at whatever level."""
    index = st.one_of(st.integers(0, 3), st.integers(508, 511), st.integers(254, 274))
    pte = st.builds(
        lambda pfn, flags: pfn << 12 | flags, st.integers(0, TABLES + 3), st.sampled_from([1, 0x67, 0x65, 0xE7, 0, 6])
    )
    entries = st.dictionaries(index, pte, max_size=12)
    found = draw(st.dictionaries(st.integers(0, TABLES - 1), entries, min_size=1))
    if draw(st.booleans()):  # all of it mapped by one shared table, as kernels do where nothing is
        shared = draw(st.integers(0, TABLES - 1))
        found[draw(st.integers(0, TABLES - 1))] = dict.fromkeys(range(512), shared << 12 | 0x67)
    return found


def naive(pages: dict[int, dict[int, int]], top: int, vaddr: int, levels: int) -> int:
    table = top
    for level in range(levels, 0, -1):
        pte = pages.get(table, {}).get(vaddr >> (3 + 9 * level) & 511, 0)
        if not pte & 1:
            return HOLE
        table = pte >> 12 & (1 << 40) - 1
    return table


@settings(max_examples=80, deadline=None)
@given(
    pages=tables(),
    top=st.integers(0, TABLES),
    width=st.sampled_from([4, 8]),
    base=st.sampled_from([0, 1 << 21, 1 << 30, 3 << 30, 1 << 39, (1 << 47) - (1 << 21), (1 << 64) - (1 << 23)]),
    before=st.integers(0, 600),
    count=st.integers(1, 1500),
)
def test_as_if_each_page_were_walked(
    *, pages: dict[int, dict[int, int]], top: int, width: Width, base: int, before: int, count: int
) -> None:
    levels = 4 if width == 8 else 3
    end = 1 << (64 if width == 8 else 32)
    first = max(0, min(base if width == 8 else base & end - 1, end - 4096 * 2000) - before * 4096)
    frames = DictFrames({pfn: words(entries) for pfn, entries in pages.items()})

    found = mapped_frames(frames, Pfn(top), Vaddr(first), count, width)

    assert found.dtype == np.uint64
    assert found.tolist() == [naive(pages, top, first + i * 4096, levels) for i in range(count)]


@pytest.mark.parametrize("width", [8, 4])
def test_the_memory_of_a_domain_in_the_order_in_which_it_is_mapped(width: Width) -> None:
    domain = pv_domain(width=width, pfns=[*range(600), 0x9999, 0x7777])
    first = min(domain.vaddrs.values())
    found = mapped_frames(DictFrames.of(domain), Pfn(domain.places.top), Vaddr(first), len(domain.vaddrs), width)
    assert found.tolist() == list(domain.vaddrs)


@pytest.mark.parametrize("level", [2, 3, 4])
def test_a_table_maps_nothing_beyond_its_end(level: int) -> None:
    """Where the next table is missing, the first entry of this one is not taken for that one's."""
    pages: dict[int, dict[int, int]] = {n: {0: n - 1 << 12 | 1, 511: n - 1 << 12 | 1} for n in range(2, 5)}
    pages[1] = {0: 7 << 12 | 1, 511: 8 << 12 | 1}
    pages[level] = {0: level - 1 << 12 | 1}
    end = 1 << 9 * (level - 1)  # in pages
    frames = DictFrames({pfn: words(entries) for pfn, entries in pages.items()})
    first = end - 300
    found = mapped_frames(frames, Pfn(4), Vaddr(first * 4096), 600)
    assert found.tolist() == [naive(pages, 4, (first + i) * 4096, 4) for i in range(600)]
    assert found[299] == 8
    assert found[300] == HOLE


def test_a_shared_table_is_read_once() -> None:
    """A p2m of 2^31 pages and more is mapped by a few tables; reading each as often as it stands there took minutes."""
    pages = {
        3: words({}, fill=2 << 12 | 1),
        2: words({}, fill=1 << 12 | 1),
        1: words({}, fill=9 << 12 | 1),
        4: words({0: 3 << 12 | 1}),
    }
    frames = DictFrames(pages)
    found = mapped_frames(frames, Pfn(4), Vaddr(0), 1 << 20)
    assert len(found) == 1 << 20
    assert (found == 9).all()
    assert max(frames.reads.values()) == 1
