"""How much memory a kernel can be started with as PV, and what bounds it.

The initial mapping begins at virt_base with pfn 0 and holds the kernel, the initrd unless it may be unmapped, the p2m
list unless INIT_P2M puts it elsewhere, start info, xenstore and console pages, the page tables of the mapping itself,
a stack and 512 KiB of padding, up to a multiple of 4 MiB (xen.git:xen/include/public/xen.h "Start-of-day memory
layout"; tools/libs/guest/xg_dom_x86.c alloc_pgtables_pv(), count_pgtables()). A list of 8 bytes for each page, in what
is left of the addresses behind virt_base, is what bounded PV domains. All is computed from the kernel's own numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xenpv.abi.declare import Width
from xenpv.abi.x86 import LEVELS, PAGE_SHIFT, PAGE_SIZE, XEN_VIRT_64, XEN_VIRT_PAE
from xenpv.image.kernel import KernelImage
from xenpv.image.verdict import p2m_obstacle, pv_obstacles

REGION = 4 << 20  # the initial mapping ends at a multiple of so many bytes
PADDING = (512 << 10) >> PAGE_SHIFT  # pages that stay free at its end
STACK = 1
SPECIAL = 3  # start info, xenstore, console

_TABLE_SHIFT = {level: PAGE_SHIFT + 9 * level for level in (1, 2, 3)}  # bits of address that a table of that level maps
_PAE_LAST_L2 = 0xC000_0000  # Xen wants an L2 for the last GiB of a PAE guest, mapped or not
_ADDRESSES = {8: 1 << 64, 4: 1 << 32}
_MASK = {8: (1 << 48) - 1, 4: (1 << 32) - 1}
_LOW_HALF_END = 1 << 47

# mfns that Xen's m2p table has room for, and so pages of one domain: MACH2PHYS_NR_ENTRIES of
# xen.git:xen/include/public/arch-x86/xen-x86_64.h; MACH2PHYS_COMPAT_NR_ENTRIES of xen/arch/x86/include/asm/config.h.
_M2P_ENTRIES = {8: 0x40_0000_0000 >> 3, 4: 0xFFE0_0000 - XEN_VIRT_PAE.start >> 2}
_LIBXC_PAGES = 1 << 32  # xg_dom_core.c xc_dom_mem_init() counts in 32 bits


@dataclass(frozen=True, slots=True)
class InitialMapping:
    """The initial mapping for a number of pages: the virtual address behind it, and its page tables, L1 first."""

    first: int
    end: int
    tables: tuple[int, ...]

    @property
    def pages(self) -> int:
        return self.end - self.first >> PAGE_SHIFT


@dataclass(frozen=True, slots=True)
class Limit:
    """The most memory, in pages, that a kernel can be started with in one way, and what bounds it.

    ``p2m`` says in words where the list is, ``outside`` whether that is outside the initial mapping; ``least`` is the
    least memory in pages, or None where none is enough, as ``pages`` is 0 then.
    """

    p2m: str
    outside: bool
    pages: int
    least: int | None
    bound: str


def p2m_pages(image: KernelImage, pages: int) -> int:
    """Pages that a p2m list for so many pages takes."""
    return _pages(pages * image.width)


def table_counts(first: int, last: int, width: Width) -> tuple[int, ...]:
    """Page tables that map the addresses from first to last, L1 first, the one top table last."""
    mask = _MASK[width]
    first, last = first & mask, last & mask
    counts = []
    for level in range(1, LEVELS[width]):
        shift, end = _TABLE_SHIFT[level], last
        if width == 4 and level == 2 and last < _PAE_LAST_L2:
            end = mask
        counts.append((end >> shift) - (first >> shift) + 1)
    return (*counts, 1)


def initial_mapping(image: KernelImage, nr_pages: int, *, initrd: int = 0, p2m_outside: bool) -> InitialMapping:
    """The initial mapping of a domain of so many pages; ``initrd`` is the size in bytes of one that is mapped.

    It may end beyond the last address there is: that is for the caller to see. The tables are counted for an end that
    was guessed without them, and again for a later one when they do not fit, as libxc does; so it is the same end.
    """
    start = image.kernel_start
    used = start + (_pages(image.kernel_end - start) + _pages(initrd) + SPECIAL) * PAGE_SIZE
    if not p2m_outside:
        used += p2m_pages(image, nr_pages) * PAGE_SIZE
    pages = STACK + PADDING
    while True:
        end = ((used + pages * PAGE_SIZE) // REGION + 1) * REGION
        tables = table_counts(image.virt_base, min(end, _ADDRESSES[image.width]) - 1, image.width)
        pages = sum(tables) + STACK + PADDING
        if used + pages * PAGE_SIZE <= end:
            return InitialMapping(image.virt_base, end, tables)


def p2m_table_counts(image: KernelImage, mapping: InitialMapping, pages: int) -> tuple[int, ...]:
    """Page tables that a p2m list at INIT_P2M takes beyond those of the initial mapping, L1 first, no top table."""
    base = image.parameters.init_p2m
    assert base is not None
    mask = _MASK[8]
    last = (base & mask) + p2m_pages(image, pages) * PAGE_SIZE - 1
    counts = []
    for level in (1, 2, 3):
        shift = _TABLE_SHIFT[level]
        mine = range((base & mask) >> shift, (last >> shift) + 1)
        theirs = range((mapping.first & mask) >> shift, ((mapping.end - 1 & mask) >> shift) + 1)
        shared = range(max(mine.start, theirs.start), min(mine.stop, theirs.stop))
        counts.append(len(mine) - len(shared))
    return tuple(counts)


def limits(image: KernelImage, *, initrd: int = 0) -> list[Limit]:
    """The most memory in each way in which the kernel can be started as PV; none where it cannot be at all.

    ``initrd`` is the size of the initrd in bytes, which counts where it has to be mapped.
    """
    if pv_obstacles(image):
        return []
    found = []
    if p2m_obstacle(image) is None:
        found.append(_limit_outside(image, initrd))
    mapped = _mapped_initrd(image, initrd)
    end, what = _addresses_behind(image)
    if image.width == 8:
        reach = (image.virt_base >> _TABLE_SHIFT[2]) + 1 << _TABLE_SHIFT[2]
        if reach < end:
            what_kernel = (
                f"the addresses of one L2 page, {image.virt_base:#x} to {_address(reach)}, for a kernel that takes "
                "over no more of the initial mapping (Linux)"
            )
            found.append(_limit_inside(image, mapped, reach, what_kernel))
    found.append(_limit_inside(image, mapped, end, what))
    return found


def _limit_inside(image: KernelImage, mapped: int, end: int, what: str) -> Limit:
    """With the p2m list in the initial mapping, which may reach up to an address."""

    def fits(pages: int) -> bool:
        return initial_mapping(image, pages, initrd=mapped, p2m_outside=False).end <= end

    most = _most(fits, _M2P_ENTRIES[image.width])
    bound = _m2p_bound(image.width) if most == _M2P_ENTRIES[image.width] else what
    least = _least(lambda pages: initial_mapping(image, pages, initrd=mapped, p2m_outside=False).pages, most)
    return _limit("inside the initial mapping", False, most, least, bound)


def _limit_outside(image: KernelImage, initrd: int) -> Limit:
    """With the p2m list at INIT_P2M."""
    base = image.parameters.init_p2m
    assert base is not None
    mapped = _mapped_initrd(image, initrd)
    ends = {image.virt_base: f"VIRT_BASE {image.virt_base:#x}"}
    if base < _LOW_HALF_END:
        ends[_LOW_HALF_END] = f"the end of the lower half of addresses, {_LOW_HALF_END:#x}"
    elif base < XEN_VIRT_64.start:
        ends[base] = "addresses that are not canonical"
    elif base < XEN_VIRT_64.stop:
        ends[base] = "what Xen keeps for itself"
    end = min(ends)
    by_addresses = (end - base) // 8
    mapping_fits = initial_mapping(image, 0, initrd=mapped, p2m_outside=True).end <= _addresses_behind(image)[0]
    most = min(by_addresses, _M2P_ENTRIES[8]) if mapping_fits else 0
    bound = _m2p_bound(8) if by_addresses > _M2P_ENTRIES[8] else f"the list at {base:#x} would reach {ends[end]}"
    if not mapping_fits:
        bound = _addresses_behind(image)[1]
    elif most >= _LIBXC_PAGES:
        bound += f"; libxc counts pages in 32 bits, so it builds less than {_LIBXC_PAGES * PAGE_SIZE >> 40} TiB"

    def needed(pages: int) -> int:
        mapping = initial_mapping(image, pages, initrd=mapped, p2m_outside=True)
        tables = sum(p2m_table_counts(image, mapping, pages)) if pages else 0
        return mapping.pages + _pages(initrd - mapped) + p2m_pages(image, pages) + tables

    return _limit(f"at {base:#x}, where INIT_P2M wants it", True, most, _least(needed, most), bound)


def _limit(p2m: str, outside: bool, most: int, least: int | None, bound: str) -> Limit:
    return Limit(p2m, outside, most if least is not None else 0, least, bound)


def _mapped_initrd(image: KernelImage, initrd: int) -> int:
    return 0 if image.parameters.mod_start_pfn else initrd


def _addresses_behind(image: KernelImage) -> tuple[int, str]:
    """How far the initial mapping can reach, and what is there, in words.

    The last 4 MiB of all addresses cannot be used: behind them is address 0, for which libxc searches forever
    (xg_dom_x86.c alloc_pgtables_pv()).
    """
    base = image.virt_base
    if image.width == 4:
        end, what = XEN_VIRT_PAE.start, "what Xen keeps for itself"
    elif base < _LOW_HALF_END:
        end, what = _LOW_HALF_END, "the end of the lower half of addresses"
    elif base < XEN_VIRT_64.stop:
        end, what = base, "what Xen keeps for itself"
    else:
        end, what = _ADDRESSES[8] - REGION, "the end of all addresses"
    return end, f"the addresses from {base:#x} to {_address(end)}, {what}"


def _address(end: int) -> str:
    return f"{end:#x}" if end < _ADDRESSES[8] else "the end"


def _m2p_bound(width: Width) -> str:
    entries = _M2P_ENTRIES[width]
    return f"Xen's m2p table has {entries:#x} entries{' for 32-bit guests' if width == 4 else ''}"


def _most(fits: Callable[[int], bool], bound: int) -> int:
    """The largest number up to a bound that fits, 0 if none does; what fits, fits for all smaller ones."""
    low, high = 0, bound
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _least(needed: Callable[[int], int], most: int) -> int | None:
    """The smallest number of pages that is as large as what it needs, which grows with it; None if beyond most."""
    pages = 0
    while pages < (wanted := needed(pages)):
        if wanted > most:
            return None
        pages = wanted
    return pages


def _pages(size: int) -> int:
    return -(-size // PAGE_SIZE)
