"""Computes the sizes of the initial mapping and of its page tables.

Also of the tables of a p2m list outside it.

The initial mapping begins at virt_base with pfn 0. It holds the kernel, the initrd unless it may be unmapped, the p2m
list unless INIT_P2M puts it elsewhere, start info, xenstore and console pages, the mapping's own page tables, a stack
and 512 KiB of padding. It ends at a multiple of 4 MiB.

The *place* of a page table is its index among all tables of its level, counted from address 0. Only the bits of an
address that page tables translate count: 48, or 32.

Source: xen.git:xen/include/public/xen.h "Start-of-day memory layout", tools/libs/guest/xg_dom_x86.c
alloc_pgtables_pv(), count_pgtables()
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
ADDRESSES = {8: 1 << 64, 4: 1 << 32}  # the number of addresses of a guest of that width

_TRANSLATED = {8: (1 << 48) - 1, 4: (1 << 32) - 1}
_PAE_LAST_L2 = 0xC000_0000  # Xen wants an L2 for the last GiB of a PAE guest, mapped or not


@dataclass(frozen=True, slots=True)
class InitialMapping:
    """The initial mapping of a domain.

    Attributes:
        first: Its first virtual address.
        end: The virtual address after its last one.
        tables: The places of its page tables, L1 first and the one top table last.
    """

    first: int
    end: int
    tables: tuple[range, ...]

    @property
    def pages(self) -> int:
        """Number of mapped pages: the pfns from 0 on."""
        return self.end - self.first >> PAGE_SHIFT

    @property
    def nr_tables(self) -> int:
        """Number of page tables of all levels."""
        return sum(map(len, self.tables))


def whole_pages(size: int) -> int:
    """Return how many pages a number of bytes takes."""
    return -(-size // PAGE_SIZE)


def p2m_pages(image: KernelImage, entries: int) -> int:
    """Return how many pages a p2m list takes."""
    return whole_pages(entries * image.width)


def place(vaddr: int, level: int, width: Width) -> int:
    """Return the place of the table of a level that maps an address.

    For level 0, return the page's own place.
    """
    return (vaddr & _TRANSLATED[width]) >> PAGE_SHIFT + 9 * level


def address(table_place: int, level: int, width: Width) -> int:
    """Return the first virtual address that a table maps, sign-extended.

    This is the inverse of place().
    """
    vaddr = table_place << PAGE_SHIFT + 9 * level
    return vaddr | ADDRESSES[8] - (_TRANSLATED[8] + 1) if width == 8 and vaddr >> 47 else vaddr


def table_places(first: int, last: int, width: Width) -> tuple[range, ...]:
    """Return the places of the tables that map first to last: L1 first, top last."""
    places = []
    for level in range(1, LEVELS[width]):
        end = last & _TRANSLATED[width]
        if width == 4 and level == 2 and end < _PAE_LAST_L2:
            end = _TRANSLATED[4]
        places.append(range(place(first, level, width), place(end, level, width) + 1))
    return (*places, range(1))


def initial_mapping(image: KernelImage, entries: int, *, initrd: int = 0, p2m_outside: bool) -> InitialMapping:
    """Return the initial mapping of a domain.

    The caller checks whether it ends beyond the last address. As in libxc, the tables are counted for an end that was
    guessed without them, and again for a later end if they do not fit.

    Args:
        image: The kernel.
        entries: Entries of the p2m.
        initrd: Bytes of an initrd that is mapped.
        p2m_outside: Whether the p2m list is outside the mapping.
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
    """Return the places of the tables that a list at INIT_P2M adds, L1 first."""
    base = image.parameters.init_p2m
    assert base is not None
    needed = table_places(base, base + p2m_pages(image, entries) * PAGE_SIZE - 1, 8)[:-1]
    return tuple(_difference(places, present) for places, present in zip(needed, mapping.tables, strict=False))


def _difference(places: range, present: range) -> range:
    """Return the places that are not present.

    ``present`` must not lie in the middle of ``places``.
    """
    start = present.stop if places.start in present else places.start
    stop = present.start if places.stop - 1 in present else places.stop
    return range(start, max(start, stop))
