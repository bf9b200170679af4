"""Walking one virtual address, for both widths, wherever it may end."""

from __future__ import annotations

import pytest

from tests.support.frames import DictFrames, words
from tests.support.writers.build import USER_VADDR, pv_domain
from xenpv.abi.declare import Width
from xenpv.errors import Fault
from xenpv.frames import Pfn, Vaddr
from xenpv.memory.domain import DomainMemory
from xenpv.memory.pagetables import (
    Walk,
    allowed_flags,
    cr3_to_frame,
    flag_names,
    is_canonical,
    is_xen_slot,
    is_xen_vaddr,
    pte_index,
    walk_vaddr,
)

TABLE = 0x67


def address(*indices: int) -> int:
    """The virtual address whose entries are those, from the top level down (64 bit)."""
    vaddr = 0
    for index in indices:
        vaddr = vaddr << 9 | index
    vaddr <<= 12
    return vaddr | 0xFFFF_0000_0000_0000 if vaddr >> 47 else vaddr


def chain(**changes: bytes) -> dict[int, bytes]:
    """An L4 at pfn 4, L3 at 3, L2 at 2 and L1 at 1, and a page at 9, through entries 1, 2, 3 and 4."""
    pages = {
        4: words({1: 3 << 12 | TABLE}),
        3: words({2: 2 << 12 | TABLE}),
        2: words({3: 1 << 12 | TABLE}),
        1: words({4: 9 << 12 | TABLE}),
    }
    return pages | {int(pfn.removeprefix("pfn")): page for pfn, page in changes.items()}


def through(pages: dict[int, bytes], vaddr: int = address(1, 2, 3, 4)) -> Walk:
    return walk_vaddr(DictFrames(pages), Pfn(4), Vaddr(vaddr))


@pytest.mark.parametrize("width", [8, 4])
def test_every_page_of_a_domain_is_found_as_its_maker_mapped_it(width: Width) -> None:
    domain = pv_domain(width=width, pfns=[*range(100), 0x12345], tree=True)
    frames = DictFrames.of(domain)
    for pfn, vaddr in domain.vaddrs.items():
        way = walk_vaddr(frames, Pfn(domain.places.top), Vaddr(vaddr + 0x123), width)
        assert way.pfn == pfn
        assert way.fault is None
        assert way.vaddr == vaddr + 0x123
        assert [(s.level, s.table, s.entry, s.pte) for s in way.steps] == [tuple(s) for s in domain.walk(vaddr)]
        assert len(way.steps) == domain.levels


def test_user_memory_has_a_table_of_its_own() -> None:
    domain = pv_domain()
    frames = DictFrames.of(domain)
    assert walk_vaddr(frames, Pfn(domain.places.user_top), Vaddr(USER_VADDR)).pfn == domain.places.user
    kernel = walk_vaddr(frames, Pfn(domain.places.user_top), Vaddr(domain.vaddrs[0]))
    assert kernel.pfn is None
    assert kernel.fault is not None
    assert (kernel.fault.level, kernel.fault.entry) == (4, 511)


def test_the_whole_way() -> None:
    way = through(chain())
    assert way.pfn == 9
    assert [(s.level, s.table, s.entry) for s in way.steps] == [(4, 4, 1), (3, 3, 2), (2, 2, 3), (1, 1, 4)]


@pytest.mark.parametrize("level", [4, 3, 2, 1])
def test_an_entry_that_is_not_present_ends_the_walk(level: int) -> None:
    way = through(chain(**{f"pfn{level}": words({5 - level: 0x1000})}))
    assert way.pfn is None
    assert [s.level for s in way.steps] == list(range(4, level - 1, -1))
    fault = way.fault
    assert fault is not None
    assert (fault.space, fault.level, fault.entry) == ("vaddr", level, 5 - level)
    assert fault.address == way.vaddr
    assert f"L{level}[{5 - level}] of pfn {level:#x} is not present (0x1000)" in str(fault)


@pytest.mark.parametrize("level", [3, 2])
def test_a_superpage_ends_the_walk(level: int) -> None:
    way = through(chain(**{f"pfn{level}": words({5 - level: 0x20_0000 | TABLE | 1 << 7})}))
    assert way.pfn is None
    assert "superpage" in str(way.fault)
    assert way.fault is not None
    assert (way.fault.level, way.fault.entry) == (level, 5 - level)


def test_bit_7_of_a_leaf_is_no_superpage() -> None:
    assert through(chain(pfn1=words({4: 9 << 12 | TABLE | 1 << 7}))).pfn == 9


@pytest.mark.parametrize("level", [4, 3, 2, 1])
def test_a_table_without_content_ends_the_walk(level: int) -> None:
    pages = chain()
    del pages[level]
    way = through(pages)
    assert way.pfn is None
    assert len(way.steps) == 4 - level
    assert f"L{level} table at pfn {level:#x} has no content" in str(way.fault)
    assert f"pfn {level:#x} is not there" in str(way.fault)


@pytest.mark.parametrize("vaddr", [1 << 47, 0xFFFF_7FFF_FFFF_F000, 0x8000_0000_0000_0000, 1 << 64])
def test_an_address_that_is_not_canonical_is_not_walked(vaddr: int) -> None:
    way = through(chain(), vaddr)
    assert way.pfn is None
    assert way.steps == ()
    assert "not a canonical address" in str(way.fault)


def test_xens_own_slots_are_called_that() -> None:
    way = through(chain(), address(256, 0, 0, 0))
    assert "L4[256] is Xen's own slot" in str(way.fault)
    assert "is not present" in str(through(chain(), address(272, 0, 0, 0)).fault)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_table_that_names_itself_ends_at_a_table(depth: int) -> None:
    """Linear page tables, of which a walk sees no more than four."""
    pages = chain(pfn4=words({1: 3 << 12 | TABLE, 5: 4 << 12 | TABLE}))
    way = through(pages, address(*[5] * depth, *[1, 2, 3, 4][: 4 - depth]))
    assert way.pfn == [3, 2, 1, 4][3 - depth]
    assert [s.table for s in way.steps][: depth + 1] == [4] * min(depth + 1, 4)


def test_a_32_bit_address_ends_at_4_gib() -> None:
    domain = pv_domain(width=4)
    way = walk_vaddr(DictFrames.of(domain), Pfn(domain.places.top), Vaddr(1 << 32), 4)
    assert way.steps == ()
    assert "beyond 4 GiB, in a 32-bit guest" in str(way.fault)


def test_a_32_bit_walk_has_three_levels_of_9_bits_and_one_of_2() -> None:
    pages = {3: words({2: 2 << 12 | 1}), 2: words({511: 1 << 12 | TABLE}), 1: words({1: 7 << 12 | TABLE})}
    way = walk_vaddr(DictFrames(pages), Pfn(3), Vaddr(2 << 30 | 511 << 21 | 1 << 12), 4)
    assert way.pfn == 7
    assert [(s.level, s.entry) for s in way.steps] == [(3, 2), (2, 511), (1, 1)]


def test_without_a_top_table_there_is_nothing_to_walk() -> None:
    with pytest.raises(Fault, match="no vcpu's cr3 is known"):
        DomainMemory(DictFrames({})).walk(0x1000)


# --- the small print ---------------------------------------------------------------------------------------------


def test_a_32_bit_cr3_is_folded() -> None:
    assert cr3_to_frame(0x1234_5000, 8) == 0x12345
    assert cr3_to_frame(0x1234_5000, 4) == 0x12345
    assert cr3_to_frame(0x1234_5ABC, 4) == 0xABC1_2345
    assert cr3_to_frame((0xF_FFFF_FFFF << 12), 8) == 0xF_FFFF_FFFF


@pytest.mark.parametrize(
    ("vaddr", "good"),
    [(0, True), ((1 << 47) - 1, True), (1 << 47, False), (0xFFFF_8000_0000_0000, True), (0xFFFF_7FFF_FFFF_FFFF, False),
     ((1 << 64) - 1, True), (1 << 64, False)],
)  # fmt: skip
def test_canonical(vaddr: int, good: bool) -> None:
    assert is_canonical(vaddr) == good


def test_what_xen_keeps() -> None:
    assert is_xen_vaddr(0xFFFF_8000_0000_0000, 8)
    assert is_xen_vaddr(0xFFFF_87FF_FFFF_FFFF, 8)
    assert not is_xen_vaddr(0xFFFF_8800_0000_0000, 8)
    assert is_xen_vaddr(0xF580_0000, 4)
    assert not is_xen_vaddr(0xF57F_FFFF, 4)
    assert [i for i, own in enumerate(is_xen_slot(4, 8)) if own] == list(range(256, 272))
    assert [i for i, own in enumerate(is_xen_slot(3, 4)) if own] == list(range(4, 512))
    assert [i for i, own in enumerate(is_xen_slot(2, 4, last_pae_l2=True)) if own] == list(range(0x1AC, 512))
    assert not is_xen_slot(2, 4).any()
    assert not is_xen_slot(3, 8).any()


def test_the_entry_of_an_address() -> None:
    assert [pte_index(address(1, 2, 3, 4), level) for level in (4, 3, 2, 1)] == [1, 2, 3, 4]
    assert pte_index(0xFFFF_FFFF_FFFF_F000, 4) == 511


def test_flags_that_xen_takes() -> None:
    for width in (4, 8):
        for level in range(1, 5 if width == 8 else 4):
            flags = allowed_flags(level, width)
            assert flags & 0x67 == 0x67
            assert not flags & 0x000F_FFFF_FFFF_F000
            assert not flags & 0x98, "no caching bits, no superpage"
            assert bool(flags & 1 << 8) == (level == 1), "global in leaves only"
            assert bool(flags >> 63) == ((width, level) != (4, 3)), "no-execute but in a 32-bit L3"
            assert not (level == 1 and flags & 1 << 62), "Xen's own bit for grants"


def test_flags_in_words() -> None:
    assert flag_names(0x8000_0000_0000_1067) == "P|RW|US|A|D|NX"
    assert flag_names(0x81) == "P|PSE"
    assert flag_names(0x66) == "not present"
