"""Page tables of HVM guests, in every mode of a processor: laid out by hand, after Intel's SDM volume 3 chapter 4."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests.support.frames import DictFrames, words
from xenpv.abi.declare import Width
from xenpv.errors import Fault
from xenpv.frames import NO_FRAME, Pfn, Vaddr
from xenpv.memory.domain import DomainMemory
from xenpv.memory.p2m_reader import frame_reader
from xenpv.memory.page_tables import translate, walk_vaddr
from xenpv.memory.paging import NO_PAGING, PV_PAGING, Paging, paging_mode

PG, PSE, PAE, LA57 = 1 << 31, 1 << 4, 1 << 5, 1 << 12
P, BIG = 0x67, 0xE7
LONG = paging_mode(PG | 1, 0x4000, PAE, long=True)
LONG5 = paging_mode(PG | 1, 0x5000, PAE | LA57, long=True)
PAE3 = paging_mode(PG | 1, 0x3000, PAE, long=False)
TWO = paging_mode(PG | 1, 0x2000, PSE, long=False)


def long_tables() -> dict[int, bytes]:
    return {
        5: words({511: 4 << 12 | P}),
        4: words({273: 3 << 12 | P, 1: 7 << 12 | P}),
        3: words({0: 2 << 12 | P, 5: 0x1_4000_0000 | BIG | 1 << 12}),  # 1 GiB; bit 12 is PAT
        2: words({0: 1 << 12 | P, 3: 0x4060_0000 | BIG | 1 << 12}),  # 2 MiB
        1: words({6: 0x999 << 12 | P | 1 << 63, 7: 0x998 << 12 | 0x80 | P}),  # bit 7 of the last level is PAT
    }


BASE = 0xFFFF_8880_0000_0000  # entry 273 of the top


@pytest.mark.parametrize(
    ("vaddr", "pfn", "steps"),
    [
        (BASE | 6 << 12 | 5, 0x999, 4),
        (BASE | 7 << 12, 0x998, 4),
        (BASE | 3 << 21, 0x40600, 3),
        (BASE | 3 << 21 | 0x1F_F123, 0x407FF, 3),
        (BASE | 5 << 30, 0x14_0000, 2),
        (BASE | 5 << 30 | 0x3FFF_FFFF, 0x17_FFFF, 2),
    ],
)
@pytest.mark.parametrize("mode", [LONG, LONG5])
def test_walk_long_mode_translates_all_page_sizes(vaddr: int, pfn: int, steps: int, mode: Paging) -> None:
    top = Pfn(mode.levels)
    memory = DomainMemory(DictFrames(long_tables()), 8, top, paging=mode)
    result = memory.walk(vaddr)
    assert result.fault is None
    assert (result.pfn, len(result.steps)) == (pfn, steps + mode.levels - 4)
    assert memory.translate(vaddr, 1).tolist() == [pfn]


def test_walk_five_levels_accept_57_bits() -> None:
    assert LONG.invalid_reason(0xFF10_0000_0000_0000) == "not a canonical address"
    assert LONG5.invalid_reason(0xFF10_0000_0000_0000) is None
    assert LONG5.invalid_reason(0xFE10_0000_0000_0000) == "not a canonical address"
    assert LONG5.invalid_reason(1 << 55) is None
    assert LONG5.invalid_reason(1 << 56) == "not a canonical address"


def test_translate_range_over_all_page_sizes() -> None:
    """From the end of a 2 MiB page to what is not mapped behind it, which is named."""
    memory = DomainMemory(DictFrames(long_tables()), 8, Pfn(4), paging=LONG)
    assert memory.translate(BASE | 3 << 21, 512).tolist() == list(range(0x40600, 0x40800))
    with pytest.raises(Fault) as e:
        memory.translate(BASE | 3 << 21, 513)
    assert (e.value.address, e.value.level, e.value.entry) == (BASE | 4 << 21, 2, 4)


def test_walk_pae_top_table_has_32_bytes() -> None:
    mode = paging_mode(PG | 1, 0x3460, PAE, long=False)
    assert mode.top_table_offset == 0x460
    top = bytearray(4096)
    top[0x460:0x480] = b"".join(entry.to_bytes(8, "little") for entry in (0, 0, 0, 2 << 12 | 1))
    pages = {3: bytes(top), 2: words({511: 1 << 12 | P, 1: 0x20_0000 << 12 | BIG}), 1: words({0: 9 << 12 | P})}
    memory = DomainMemory(DictFrames(pages), 4, Pfn(3), paging=mode)
    assert memory.walk(0xFFE0_0000).pfn == 9
    assert memory.walk(0xC020_3000).pfn == 0x20_0003
    assert memory.translate(0xC020_0000, 512).tolist() == list(range(0x20_0000, 0x20_0200))
    missing, beyond_4_gib = memory.walk(0x1000), memory.walk(1 << 32)
    assert missing.fault is not None
    assert (missing.fault.level, missing.fault.entry, len(missing.steps)) == (3, 0, 1)
    assert beyond_4_gib.fault is not None
    assert beyond_4_gib.steps == ()


def test_walk_two_levels_have_1024_entries() -> None:
    # A 4 MiB page above 4 GiB: bits 20 to 13 of its entry are bits 39 to 32 of the address (PSE-36).
    directory = words({0x300: 1 << 12 | P, 0x301: 0x0080_0000 | 3 << 13 | BIG, 2: 0x0040_0000 | BIG}, 4)
    pages = {2: directory, 1: words({1023: 0xABCDE << 12 | P}, 4)}
    memory = DomainMemory(DictFrames(pages), 4, Pfn(2), paging=TWO)
    assert memory.walk(0xC03F_F000).pfn == 0xABCDE
    assert memory.walk(0xC040_1000).pfn == 0x30_0801
    assert memory.translate(0xC040_0000, 1024).tolist() == list(range(0x30_0800, 0x30_0C00))
    # Without CR4.PSE the bit means nothing.
    plain = DomainMemory(DictFrames(pages), 4, Pfn(2), paging=paging_mode(PG, 0, 0, long=False))
    walk = plain.walk(0x80_0000)
    assert walk.fault is not None
    assert (walk.fault.level, [step.table for step in walk.steps]) == (1, [2])


def test_walk_without_paging_returns_physical_pfn() -> None:
    memory = DomainMemory(DictFrames({7: bytes(4096)}), 4, Pfn(0), paging=NO_PAGING)
    assert (memory.walk(0x7123).pfn, memory.walk(0x7123).steps) == (7, ())
    assert memory.read_virtual(0x7123, 4) == bytes(4)
    assert paging_mode(0, 0x1000, PAE, long=False) == NO_PAGING


@pytest.mark.parametrize("mode", [LONG, LONG5, PAE3, TWO, PV_PAGING[8], PV_PAGING[4]])
def test_translate_equals_walk_of_each_address(mode: Paging) -> None:
    """Tables of noise that mostly lead to each other, superpages and holes among them."""
    rng = random.Random(mode.levels * 7 + mode.entry_size)
    count = 4096 // mode.entry_size

    def entry() -> int:
        flags = rng.choice([0, 1, 1, 1, 1, 1, 0x81])
        return rng.randrange(12) << 12 | flags

    pages = {pfn: words({i: entry() for i in range(count)}, mode.entry_size) for pfn in range(8)}
    pages[1] = words({i: (2 + i) << 12 | 1 for i in range(4)} | {i: entry() for i in range(4, count)}, mode.entry_size)
    frames = DictFrames(pages)
    low = [rng.randrange(1 << min(32, 47)) for _ in range(300)]
    far = [rng.randrange(1 << 47) for _ in range(300)] if mode.sign_extended else []
    vaddrs = [*low, *far, *(((1 << 64) - 1 - vaddr) for vaddr in far)]
    width: Width = 8 if mode.sign_extended else 4
    one_by_one = [walk_vaddr(frames, Pfn(1), Vaddr(vaddr), width, mode).pfn for vaddr in vaddrs]
    result = translate(frame_reader(frames), Pfn(1), np.array(vaddrs, np.uint64), mode)
    assert [None if pfn == NO_FRAME else int(pfn) for pfn in result] == one_by_one
    assert len({pfn for pfn in one_by_one if pfn is not None}) > 10
    assert None in one_by_one
