"""Page tables made of pfns and made of mfns again, and how many tables an address range takes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.frames import array
from xenpv.abi.declare import Width
from xenpv.abi.x86 import LEVELS, PTE_FRAME_MASK, PTE_P
from xenpv.frames import NO_FRAME, U64, Vaddr
from xenpv.memory.page_tables import (
    NO_PFN,
    as_ptes,
    count_tables,
    decode_page_tables,
    is_xen_slot,
    localise,
    normalise,
)

FLAGS = (1 << 64) - 1 & ~PTE_FRAME_MASK
NONE = int(NO_FRAME)
SLOTS: list[tuple[Width, int, bool]] = [(8, 4, False), (8, 3, False), (8, 1, False), (4, 3, False), (4, 2, True)]


class Names:
    """A domain's frames: pfn by mfn, as a p2m would say it."""

    def __init__(self, pfn_of: dict[int, int]) -> None:
        self.pfn_of, self.mfn_of = pfn_of, {pfn: mfn for mfn, pfn in pfn_of.items()}

    def pfns(self, mfns: U64) -> U64:
        return array(*(self.pfn_of.get(int(mfn), NONE) for mfn in mfns))

    def mfns(self, pfns: U64) -> U64:
        return array(*(self.mfn_of.get(int(pfn), NONE) for pfn in pfns))


FRAMES = st.integers(0, NO_PFN - 1)
OWN = st.lists(st.tuples(FRAMES, FRAMES), min_size=1, max_size=20, unique_by=(lambda two: two[0], lambda two: two[1]))


@st.composite
def tables(draw: st.DrawFn) -> tuple[Names, U64]:
    """Two tables whose entries name frames of the domain, others' and none, with any flags."""
    names = Names(dict(draw(OWN)))
    frame = st.one_of(st.sampled_from(list(names.pfn_of)), FRAMES, st.just(NO_PFN))
    some = st.tuples(st.integers(0, 1023), frame, st.integers(0, FLAGS))
    out = np.zeros(1024, np.uint64)
    for at, mfn, flags in draw(st.lists(some, max_size=40)):
        out[at] = flags & FLAGS | mfn << 12
    return names, out.reshape(2, 512)


@given(tables())
def test_localise_inverts_normalise(drawn: tuple[Names, U64]) -> None:
    """Frame numbers change, flags do not, nor do entries that are not present; another's frame names NO_PFN."""
    names, had = drawn
    before = had.copy()
    pfns, foreign = normalise(had, names.pfns)
    assert np.array_equal(had, before), "not in place: it may be a live mapping"
    back, lost = localise(pfns, names.mfns)
    for was, pfn, bad, again, gone in zip(
        had.reshape(-1).tolist(),
        pfns.reshape(-1).tolist(),
        foreign.reshape(-1).tolist(),
        back.reshape(-1).tolist(),
        lost.reshape(-1).tolist(),
        strict=True,
    ):
        own = (was & PTE_FRAME_MASK) >> 12 in names.pfn_of
        if not was & PTE_P:
            assert (pfn, bad, again, gone) == (was, False, was, False)
            continue
        assert pfn & FLAGS == again & FLAGS == was & FLAGS
        assert (bad, gone) == (not own, not own)
        if own:
            assert pfn >> 12 & NO_PFN == names.pfn_of[was >> 12 & NO_PFN]
            assert again == was
        else:
            assert pfn >> 12 & NO_PFN == again >> 12 & NO_PFN == NO_PFN


@pytest.mark.parametrize(("width", "level", "last"), SLOTS)
@given(drawn=tables())
def test_normalise_xen_slots_become_zero(width: Width, level: int, last: bool, drawn: tuple[Names, U64]) -> None:
    names, had = drawn
    xens = is_xen_slot(level, width, last_pae_l2=last)
    pfns, foreign = normalise(had, names.pfns, xens)
    assert not pfns[:, xens].any()
    assert not foreign[:, xens].any()
    plain, mask = normalise(had, names.pfns)
    assert np.array_equal(pfns[:, ~xens], plain[:, ~xens])
    assert np.array_equal(foreign[:, ~xens], mask[:, ~xens])


@pytest.mark.parametrize("pfn", [NO_PFN, NO_PFN + 1, 1 << 45, (1 << 52) - 1, 1 << 63])
def test_normalise_pfn_too_large_for_entry_becomes_no_pfn(pfn: int) -> None:
    """An entry has 40 bits for a frame, and a p2m may have pfns above 2^40."""
    had = np.zeros((1, 512), np.uint64)
    had[0, 7] = 5 << 12 | 0x67
    names = Names({5: pfn})
    pfns, foreign = normalise(had, names.pfns)
    assert int(pfns[0, 7]) == NO_PFN << 12 | 0x67
    assert np.flatnonzero(foreign).tolist() == [7]


@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=8), st.integers(1, 4))
def test_decode_page_tables_returns_named_frames(ptes: list[int], level: int) -> None:
    """None that is not present, and no superpage, which PV has not; bit 7 of an L1 entry is none."""
    page = np.zeros((1, 512), np.uint64)
    page[0, : len(ptes)] = ptes
    named = decode_page_tables(page.view(np.uint8), level)
    for pte, frame in zip(ptes, named[0].tolist(), strict=False):
        there = pte & 1 and not (level > 1 and pte & 1 << 7)
        assert frame == (pte >> 12 & (1 << 40) - 1 if there else NONE)
    assert (named[0, len(ptes) :] == NO_FRAME).all()
    assert np.array_equal(as_ptes(page.view(np.uint8)), page)


@given(st.integers(0, (1 << 36) - 1), st.integers(1, 3000), st.sampled_from([8, 4]))
def test_count_tables_equals_count_by_page(first: int, pages: int, width: Width) -> None:
    first %= (1 << (36 if width == 8 else 20)) - 3000
    needed = count_tables(Vaddr(first << 12), pages, width)
    levels = LEVELS[width]
    assert needed == {
        level: len({page >> 9 * level for page in range(first, first + pages)}) if level < levels else 1
        for level in range(1, levels + 1)
    }


def test_count_tables_of_a_tebibyte() -> None:
    """2^28 pages in 2^19 L1, 2^10 L2 and 2 L3 tables, when they begin where a table does."""
    assert count_tables(Vaddr(1 << 47), 1 << 28) == {1: 1 << 19, 2: 1 << 10, 3: 2, 4: 1}
