"""The initial mapping and its page tables, and those of a p2m list outside it: how far they reach, in addresses.

The initial mapping begins at virt_base with pfn 0 and holds the kernel, the initrd unless it may be unmapped, the p2m
list unless INIT_P2M puts it elsewhere, start info, xenstore and console pages, the page tables of the mapping itself,
a stack and 512 KiB of padding, up to a multiple of 4 MiB (xen.git:xen/include/public/xen.h "Start-of-day memory
layout"; tools/libs/guest/xg_dom_x86.c alloc_pgtables_pv(), count_pgtables()). What capacity.py bounds and layout.py
places is computed here, once.

Page tables are named by place: which of its level a table is, counted from address 0, where of an address the bits
beyond those that page tables translate (48, or 32) do not count.
"""

from __future__ import annotations

from dataclasses import dataclass

from xenpv.abi.declare import Width
from xenpv.abi.x86 import LEVELS, PAGE_SHIFT, PAGE_SIZE
from xenpv.image.kernel import KernelImage

REGION = 4 << 20  # the initial mapping ends at a multiple of so many bytes
PADDING = (512 << 10) >> PAGE_SHIFT  # pages that stay free at its end
STACK = 1
SPECIAL = 3  # start info, xenstore, console
ADDRESSES = {8: 1 << 64, 4: 1 << 32}  # behind the last address of a guest of that width

_TRANSLATED = {8: (1 << 48) - 1, 4: (1 << 32) - 1}
_PAE_LAST_L2 = 0xC000_0000  # Xen wants an L2 for the last GiB of a PAE guest, mapped or not


@dataclass(frozen=True, slots=True)
class InitialMapping:
    """The initial mapping for a number of pages: the virtual addresses of its begin and behind its end, and the places
    of its page tables, L1 first, the one top table last.
    """

    first: int
    end: int
    tables: tuple[range, ...]

    @property
    def pages(self) -> int:
        """Pages that are mapped, which are the pfns from 0 on."""
        return self.end - self.first >> PAGE_SHIFT

    @property
    def nr_tables(self) -> int:
        """Page tables of all levels."""
        return sum(map(len, self.tables))


def whole_pages(size: int) -> int:
    """Pages that so many bytes take."""
    return -(-size // PAGE_SIZE)


def p2m_pages(image: KernelImage, entries: int) -> int:
    """Pages that a p2m list of so many entries takes."""
    return whole_pages(entries * image.width)


def place(vaddr: int, level: int, width: Width) -> int:
    """Which table of that level maps an address; of level 0, which page that is."""
    return (vaddr & _TRANSLATED[width]) >> PAGE_SHIFT + 9 * level


def address(at: int, level: int, width: Width) -> int:
    """The first virtual address that a table of that level maps; the inverse of place, sign-extended."""
    vaddr = at << PAGE_SHIFT + 9 * level
    return vaddr | ADDRESSES[8] - (_TRANSLATED[8] + 1) if width == 8 and vaddr >> 47 else vaddr


def table_places(first: int, last: int, width: Width) -> tuple[range, ...]:
    """The page tables that map the addresses from first to last: their places, L1 first, the one top table last."""
    places = []
    for level in range(1, LEVELS[width]):
        end = last & _TRANSLATED[width]
        if width == 4 and level == 2 and end < _PAE_LAST_L2:
            end = _TRANSLATED[4]
        places.append(range(place(first, level, width), place(end, level, width) + 1))
    return (*places, range(1))


def initial_mapping(image: KernelImage, entries: int, *, initrd: int = 0, p2m_outside: bool) -> InitialMapping:
    """The initial mapping of a domain whose p2m has so many entries; ``initrd`` is the size in bytes of one that is
    mapped.

    It may end beyond the last address there is: that is for the caller to see. The tables are counted for an end that
    was guessed without them, and again for a later one when they do not fit, as libxc does; so it is the same end.
    """
    start = image.kernel_start
    used = start + (whole_pages(image.kernel_end - start) + whole_pages(initrd) + SPECIAL) * PAGE_SIZE
    if not p2m_outside:
        used += p2m_pages(image, entries) * PAGE_SIZE
    pages = STACK + PADDING
    while True:
        end = ((used + pages * PAGE_SIZE) // REGION + 1) * REGION
        mapping = InitialMapping(
            image.virt_base, end, table_places(image.virt_base, min(end, ADDRESSES[image.width]) - 1, image.width)
        )
        pages = mapping.nr_tables + STACK + PADDING
        if used + pages * PAGE_SIZE <= end:
            return mapping


def p2m_tables(image: KernelImage, mapping: InitialMapping, entries: int) -> tuple[range, ...]:
    """The page tables of a p2m list at INIT_P2M that the initial mapping has not: places, L1 first, no top table."""
    base = image.parameters.init_p2m
    assert base is not None
    mine = table_places(base, base + p2m_pages(image, entries) * PAGE_SIZE - 1, 8)[:-1]
    return tuple(_without(places, theirs) for places, theirs in zip(mine, mapping.tables, strict=False))


def _without(mine: range, theirs: range) -> range:
    """What of mine is not theirs, which does not lie in the middle of mine."""
    start = theirs.stop if mine.start in theirs else mine.start
    stop = theirs.start if mine.stop - 1 in theirs else mine.stop
    return range(start, max(start, stop))
