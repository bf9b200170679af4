"""Memory limits, compared with layouts of stock libxc on real Xen, and with independent arithmetic."""

from __future__ import annotations

import lzma
from pathlib import Path
from random import Random

import pytest

from tests.support.images import P2M, image, sized
from tests.support.writers.kernel import BASE, PV32, PV64, Kernel, Load, kernel32, note, quad, word
from tests.vectors.make import DEMO, FOR_DEMO, RECIPES, Recipe
from xenpv.abi.xen import START_INFO
from xenpv.image.capacity import MemoryLimit, memory_limits
from xenpv.image.mapping import (
    PADDING,
    REGION,
    SPECIAL,
    InitialMapping,
    initial_mapping,
    p2m_pages,
    p2m_tables,
    table_places,
)
from xenpv.source.saved import SavedDomain

GIB = 1 << 18  # pages
MIB = 1 << 8


def counts(places: tuple[range, ...]) -> tuple[int, ...]:
    return tuple(map(len, places))


@pytest.mark.parametrize("recipe", [*RECIPES], ids=lambda recipe: recipe.name)
def test_initial_mapping_equals_libxc(recipe: Recipe, tmp_path: Path) -> None:
    """Stock toolstacks of Xen 4.14, 4.17 and 4.20 built these domains; their start info has the sizes."""
    path = tmp_path / "vector.save"
    path.write_bytes(lzma.decompress((DEMO if recipe is FOR_DEMO else recipe.path).read_bytes()))
    with SavedDomain.open(str(path)) as saved:
        assert saved.start_info_pfn is not None
        info = START_INFO.read(bytes(saved.memory.page(saved.start_info_pfn)), 8)
    pages, pt_base, base = int(info["nr_pages"]), int(info["pt_base"]), int(info["mfn_list"])
    # The size of litmus at that time follows from the begin of its page tables: after litmus and three pages.
    end = pt_base - BASE - SPECIAL * 4096
    litmus = image(Kernel(notes=[*PV64, note(15, quad(base))], loads=[Load(0x10_0000, b"", end - 0x10_0000)]))
    mapping = initial_mapping(litmus, pages, p2m_outside=True)
    assert mapping.nr_tables == int(info["nr_pt_frames"])
    assert mapping.pages == int(info["first_p2m_pfn"])
    tables = counts(p2m_tables(litmus, mapping, pages))
    assert p2m_pages(litmus, pages) + sum(tables) == int(info["nr_p2m_frames"])


@pytest.mark.parametrize("width", [8, 4])
def test_initial_mapping_holds_everything_and_no_more(width: int) -> None:
    rng = Random(1)
    for _ in range(300):
        pages, initrd, size = rng.randrange(1 << 27), rng.randrange(64 << 20), rng.randrange(1, 64 << 20)
        loads = [Load(0x10_0000, b"", size)]
        kernel = image(Kernel(loads=loads) if width == 8 else kernel32(loads=loads))
        outside = width == 8 and rng.random() < 0.5
        mapping = initial_mapping(kernel, pages, initrd=initrd, p2m_outside=outside)
        content = 0x100 + sum(-(-n // 4096) for n in (size, initrd, 0 if outside else pages * width)) + SPECIAL
        content += mapping.nr_tables + 1
        assert mapping.end % REGION == 0
        assert content + PADDING <= mapping.pages
        assert mapping.pages - content - PADDING < 2 * REGION >> 12
        l1, l2, *_ = counts(mapping.tables)
        assert l1 == -(-mapping.pages // 512)
        assert l2 == (-(-mapping.pages // (512 * 512)) if width == 8 else 1)


def test_table_places_of_a_range() -> None:
    assert counts(table_places(BASE, BASE + (4 << 20) - 1, 8)) == (2, 1, 1, 1)
    assert counts(table_places(BASE, BASE + (1 << 30) + (4 << 20) - 1, 8)) == (514, 2, 1, 1)
    assert counts(table_places((1 << 30) - 4096, (1 << 30) + 4095, 8)) == (2, 2, 1, 1)
    assert counts(table_places((1 << 39) - 4096, (1 << 39) + 4095, 8)) == (2, 2, 2, 1)
    # A PAE guest has L2 tables up to the last GiB, wherever its mapping ends.
    assert counts(table_places(0xC000_0000, 0xC03F_FFFF, 4)) == (2, 1, 1)
    assert counts(table_places(0x4000_0000, 0x403F_FFFF, 4)) == (2, 3, 1)


def mapped(first: int) -> InitialMapping:
    end = first + (4 << 20)
    return InitialMapping(first, end, table_places(first, end - 1, 8))


def test_p2m_tables_leave_out_those_of_the_initial_mapping() -> None:
    kernel = sized(2, P2M)
    mapping = initial_mapping(kernel, 2048, p2m_outside=True)
    assert counts(p2m_tables(kernel, mapping, 2048)) == (1, 1, 1)
    assert counts(p2m_tables(kernel, mapping, 1 << 27)) == (512, 1, 1)
    assert counts(p2m_tables(kernel, mapping, (1 << 27) + 1)) == (513, 2, 1)
    below = mapped((1 << 39) + (2 << 30))
    assert counts(p2m_tables(kernel, below, 2048)) == (1, 1, 0)
    beside = mapped((1 << 39) + (4 << 20))
    assert counts(p2m_tables(kernel, beside, 2048)) == (1, 0, 0)


def by_hand(window: int, used: int) -> int:
    """Pages whose p2m list fits into ``window`` bytes, of which ``used`` are taken."""
    return (window - used) // 8 // 512 * 512


def test_memory_limits_without_init_p2m_are_bounded_by_the_list() -> None:
    kernel = sized(64)
    one_l2, all_addresses = memory_limits(kernel)
    # 64 MiB of kernel, 3 pages, 512 + 1 + 1 + 1 tables for 1 GiB, a stack, 512 KiB
    assert one_l2.max_pages == by_hand(1 << 30, (64 << 20) + (3 + 515 + 1 + 128) * 4096)
    # up to 4 MiB below the end of addresses: 1022 + 2 + 1 + 1 tables
    assert all_addresses.max_pages == by_hand((2 << 30) - (4 << 20), (64 << 20) + (3 + 1026 + 1 + 128) * 4096)
    assert 478 * GIB < one_l2.max_pages < 480 * GIB  # "about 500 GB" of 2014
    assert "0xffffffff80000000 to 0xffffffffc0000000" in one_l2.bound
    assert "0xffffffff80000000 to 0xffffffffffc00000" in all_addresses.bound
    assert not one_l2.p2m_outside
    for limit in (one_l2, all_addresses):
        end = 1 << 64 if limit is all_addresses else 0xFFFF_FFFF_C000_0000
        assert initial_mapping(kernel, limit.max_pages, p2m_outside=False).end <= end
        assert initial_mapping(kernel, limit.max_pages + 1, p2m_outside=False).end > end - REGION


def test_memory_limits_with_init_p2m_are_bounded_by_the_m2p() -> None:
    outside, *inside = memory_limits(sized(64, P2M))
    assert inside == memory_limits(sized(64))
    assert (outside.max_pages, outside.p2m_outside) == (1 << 35, True)  # 128 TiB
    assert "0x800000000 entries" in outside.bound
    assert "16 TiB" in outside.bound


@pytest.mark.parametrize(
    ("base", "pages", "bound"),
    [
        ((1 << 47) - (1 << 30), 1 << 27, "0x800000000000"),
        (BASE - (1 << 30), 1 << 27, "VIRT_BASE 0xffffffff80000000"),
        (0xFFFF_8800_0000_0000, 1 << 35, "Xen's m2p table"),
        (0xFFFF_8000_0000_0000, 0, "Xen's own address range"),
        (1 << 47, 0, "not canonical"),
    ],
    ids=["end of lower half", "VIRT_BASE", "m2p", "Xen", "not canonical"],
)
def test_memory_limits_with_init_p2m_are_bounded_by_the_next_address_range(base: int, pages: int, bound: str) -> None:
    outside = memory_limits(sized(64, note(15, quad(base))))[0]
    assert (outside.max_pages, outside.min_pages is None) == (pages, pages == 0)
    assert bound in outside.bound


def test_memory_limits_count_an_initrd_only_if_it_is_mapped() -> None:
    size = 200 << 20
    without = memory_limits(sized(64))
    mapped = memory_limits(sized(64), initrd=size)
    assert [a.max_pages - b.max_pages for a, b in zip(without, mapped, strict=True)] == [size // 8] * 2
    unmapped = memory_limits(sized(64, note(16, word(1))), initrd=size)
    assert [limit.max_pages for limit in unmapped] == [limit.max_pages for limit in without]
    # It needs memory in both cases.
    for notes in ((), (note(16, word(1)),), (P2M,), (P2M, note(16, word(1)))):
        min_pages = [memory_limits(sized(64, *notes), initrd=n)[0].min_pages or 0 for n in (0, size)]
        assert 199 * MIB <= min_pages[1] - min_pages[0] <= 205 * MIB


def test_memory_limits_min_pages_is_the_initial_mapping_and_the_list() -> None:
    outside, inside, _ = memory_limits(sized(64, P2M))
    assert inside.min_pages == initial_mapping(sized(64), inside.min_pages or 0, p2m_outside=False).pages
    assert inside.min_pages == 68 * MIB
    assert outside.min_pages == 68 * MIB + 34 + 1 + 1 + 1 + 1  # a list of 34 pages and its tables, of 35 then
    assert memory_limits(sized(1100))[0].min_pages is None


def test_memory_limits_of_kernel_too_large_for_its_addresses_are_zero() -> None:
    assert memory_limits(sized(2046))[-1] == MemoryLimit(
        "inside the initial mapping", False, 0, None,
        "the addresses from 0xffffffff80000000 to 0xffffffffffc00000, the end of all addresses",
    )  # fmt: skip
    outside = memory_limits(sized(2046, P2M))[0]
    assert (outside.max_pages, outside.min_pages) == (0, None)
    assert outside.bound.startswith("the addresses from 0xffffffff80000000")


def test_memory_limits_of_32_bit_kernel_are_bounded_by_m2p_and_xen() -> None:
    [limit] = memory_limits(image(kernel32()))
    assert limit.max_pages == (0xFFE0_0000 - 0xF580_0000) // 4  # 166 GiB
    assert "0x2980000 entries" in limit.bound
    [high] = memory_limits(image(kernel32(notes=[*PV32, note(3, word(0xF000_0000)), note(1, word(0xF010_0000))])))
    assert "0xf0000000 to 0xf5800000" in high.bound
    # 88 MiB for lists of 4 bytes a page
    assert 85 * MIB < high.max_pages >> 10 < 88 * MIB


def test_memory_limits_of_kernel_in_lower_half() -> None:
    low = image(Kernel(notes=[*PV64[:3], note(1, quad(0x10_0000))]))
    one_l2, all_addresses = memory_limits(low)
    assert "one L2 page, 0x0 to 0x40000000" in one_l2.bound
    assert all_addresses.max_pages == 1 << 35


def test_memory_limits_of_kernel_that_cannot_boot_are_none() -> None:
    assert memory_limits(image(Kernel(notes=[]))) == []
