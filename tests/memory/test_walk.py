"""Walking one virtual address, for both widths, wherever it may end."""

from __future__ import annotations

import pytest

from tests.support.frames import DictFrames, words
from tests.support.writers.build import USER_VADDR, pv_domain
from xenpv.abi.declare import Width
from xenpv.errors import Fault
from xenpv.frames import Pfn, Vaddr
from xenpv.memory.domain import DomainMemory
from xenpv.memory.page_tables import (
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
def test_walk_every_page_has_the_writers_steps(width: Width) -> None:
    domain = pv_domain(width=width, pfns=[*range(100), 0x12345], tree=True)
    frames = DictFrames.of(domain)
    for pfn, vaddr in domain.vaddrs.items():
        result = walk_vaddr(frames, Pfn(domain.places.top), Vaddr(vaddr + 0x123), width)
        assert result.pfn == pfn
        assert result.fault is None
        assert result.vaddr == vaddr + 0x123
        assert [(s.level, s.table, s.entry, s.pte) for s in result.steps] == [tuple(s) for s in domain.walk(vaddr)]
        assert len(result.steps) == domain.levels


def test_walk_user_top_maps_user_memory_only() -> None:
    domain = pv_domain()
    frames = DictFrames.of(domain)
    assert walk_vaddr(frames, Pfn(domain.places.user_top), Vaddr(USER_VADDR)).pfn == domain.places.user
    kernel = walk_vaddr(frames, Pfn(domain.places.user_top), Vaddr(domain.vaddrs[0]))
    assert kernel.pfn is None
    assert kernel.fault is not None
    assert (kernel.fault.level, kernel.fault.entry) == (4, 511)


def test_walk_returns_all_four_steps() -> None:
    result = through(chain())
    assert result.pfn == 9
    assert [(s.level, s.table, s.entry) for s in result.steps] == [(4, 4, 1), (3, 3, 2), (2, 2, 3), (1, 1, 4)]


@pytest.mark.parametrize("level", [4, 3, 2, 1])
def test_walk_entry_not_present_ends_with_fault(level: int) -> None:
    result = through(chain(**{f"pfn{level}": words({5 - level: 0x1000})}))
    assert result.pfn is None
    assert [s.level for s in result.steps] == list(range(4, level - 1, -1))
    fault = result.fault
    assert fault is not None
    assert (fault.space, fault.level, fault.entry) == ("vaddr", level, 5 - level)
    assert fault.address == result.vaddr
    assert (result.steps[-1].table, result.steps[-1].pte) == (level, 0x1000)


@pytest.mark.parametrize("level", [3, 2])
def test_walk_superpage_ends_with_fault(level: int) -> None:
    result = through(chain(**{f"pfn{level}": words({5 - level: 0x20_0000 | TABLE | 1 << 7})}))
    assert result.pfn is None
    assert result.steps[-1].pte & 1 << 7
    assert result.fault is not None
    assert (result.fault.level, result.fault.entry) == (level, 5 - level)


def test_walk_bit_7_of_l1_entry_is_accepted() -> None:
    assert through(chain(pfn1=words({4: 9 << 12 | TABLE | 1 << 7}))).pfn == 9


@pytest.mark.parametrize("level", [4, 3, 2, 1])
def test_walk_table_without_content_ends_with_fault(level: int) -> None:
    pages = chain()
    del pages[level]
    result = through(pages)
    assert result.pfn is None
    assert len(result.steps) == 4 - level
    assert result.fault is not None
    assert (result.fault.level, result.fault.entry) == (level, 5 - level)


@pytest.mark.parametrize("vaddr", [1 << 47, 0xFFFF_7FFF_FFFF_F000, 0x8000_0000_0000_0000, 1 << 64])
def test_walk_noncanonical_address_ends_with_fault(vaddr: int) -> None:
    result = through(chain(), vaddr)
    assert result.pfn is None
    assert result.steps == ()
    assert result.fault is not None
    assert result.fault.address == vaddr


def test_walk_xen_slot_ends_with_fault() -> None:
    for slot in (256, 272):  # the first of Xen's slots, and the first after them, which is not present
        fault = through(chain(), address(slot, 0, 0, 0)).fault
        assert fault is not None
        assert (fault.level, fault.entry) == (4, slot)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_walk_recursive_table_returns_a_table(depth: int) -> None:
    """Linear page tables, of which a walk sees no more than four."""
    pages = chain(pfn4=words({1: 3 << 12 | TABLE, 5: 4 << 12 | TABLE}))
    result = through(pages, address(*[5] * depth, *[1, 2, 3, 4][: 4 - depth]))
    assert result.pfn == [3, 2, 1, 4][3 - depth]
    assert [s.table for s in result.steps][: depth + 1] == [4] * min(depth + 1, 4)


def test_walk_32_bit_address_beyond_4_gib_ends_with_fault() -> None:
    domain = pv_domain(width=4)
    result = walk_vaddr(DictFrames.of(domain), Pfn(domain.places.top), Vaddr(1 << 32), 4)
    assert result.steps == ()
    assert result.fault is not None
    assert result.fault.address == 1 << 32


def test_walk_32_bit_has_levels_of_2_9_and_9_bits() -> None:
    pages = {3: words({2: 2 << 12 | 1}), 2: words({511: 1 << 12 | TABLE}), 1: words({1: 7 << 12 | TABLE})}
    result = walk_vaddr(DictFrames(pages), Pfn(3), Vaddr(2 << 30 | 511 << 21 | 1 << 12), 4)
    assert result.pfn == 7
    assert [(s.level, s.entry) for s in result.steps] == [(3, 2), (2, 511), (1, 1)]


def test_walk_without_top_table_raises_fault() -> None:
    with pytest.raises(Fault) as e:
        DomainMemory(DictFrames({})).walk(0x1000)
    assert (e.value.space, e.value.address, e.value.level) == ("vaddr", 0x1000, None)


# --- the small print ---------------------------------------------------------------------------------------------


def test_cr3_to_frame_unfolds_32_bit_cr3() -> None:
    assert cr3_to_frame(0x1234_5000, 8) == 0x12345
    assert cr3_to_frame(0x1234_5000, 4) == 0x12345
    assert cr3_to_frame(0x1234_5ABC, 4) == 0xABC1_2345
    assert cr3_to_frame((0xF_FFFF_FFFF << 12), 8) == 0xF_FFFF_FFFF


@pytest.mark.parametrize(
    ("vaddr", "good"),
    [(0, True), ((1 << 47) - 1, True), (1 << 47, False), (0xFFFF_8000_0000_0000, True), (0xFFFF_7FFF_FFFF_FFFF, False),
     ((1 << 64) - 1, True), (1 << 64, False)],
)  # fmt: skip
def test_is_canonical_checks_bit_47(vaddr: int, good: bool) -> None:
    assert is_canonical(vaddr) == good


def test_is_xen_vaddr_covers_reserved_range() -> None:
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


def test_pte_index_selects_9_bits() -> None:
    assert [pte_index(address(1, 2, 3, 4), level) for level in (4, 3, 2, 1)] == [1, 2, 3, 4]
    assert pte_index(0xFFFF_FFFF_FFFF_F000, 4) == 511


def test_allowed_flags_equal_xens_masks() -> None:
    for width in (4, 8):
        for level in range(1, 5 if width == 8 else 4):
            flags = allowed_flags(level, width)
            assert flags & 0x67 == 0x67
            assert not flags & 0x000F_FFFF_FFFF_F000
            assert not flags & 0x98, "no caching bits, no superpage"
            assert bool(flags & 1 << 8) == (level == 1), "global in leaves only"
            assert bool(flags >> 63) == ((width, level) != (4, 3)), "no-execute but in a 32-bit L3"
            assert not (level == 1 and flags & 1 << 62), "Xen's own bit for grants"


def test_flag_names_lists_set_flags() -> None:
    assert flag_names(0x8000_0000_0000_1067) == "P|RW|US|A|D|NX"
    assert flag_names(0x81) == "P|PSE"
    assert flag_names(0x66) == "not present"
