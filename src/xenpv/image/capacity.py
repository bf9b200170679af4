"""How much memory a kernel can be started with as PV, and what bounds it.

The p2m list has 8 bytes for each page. Inside the initial mapping, the addresses after virt_base bound it. With
INIT_P2M it is elsewhere. All numbers follow from the kernel's own, by the initial mapping of mapping.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xenpv.abi.declare import Width
from xenpv.abi.x86 import PAGE_SHIFT, PAGE_SIZE, XEN_VIRT_64, XEN_VIRT_PAE
from xenpv.image.kernel import KernelImage
from xenpv.image.mapping import ADDRESSES, REGION, initial_mapping, p2m_pages, p2m_tables, whole_pages
from xenpv.image.verdict import p2m_obstacle, pv_obstacles

_L2_REACH = 1 << PAGE_SHIFT + 18  # bytes that the tables below one L2 map
_LOW_HALF_END = 1 << 47

# Entries of Xen's m2p table, and so the most pages of one domain: MACH2PHYS_NR_ENTRIES of
# xen.git:xen/include/public/arch-x86/xen-x86_64.h; MACH2PHYS_COMPAT_NR_ENTRIES of xen/arch/x86/include/asm/config.h.
_M2P_ENTRIES = {8: 0x40_0000_0000 >> 3, 4: 0xFFE0_0000 - XEN_VIRT_PAE.start >> 2}
LIBXC_PAGES = 1 << 32  # xg_dom_core.c xc_dom_mem_init() counts in 32 bits


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """The least and the most memory of a kernel, for one place of the p2m list.

    Attributes:
        p2m_place: The place of the list, in words.
        p2m_outside: Whether that is outside the initial mapping.
        max_pages: The most memory in pages, 0 if no amount is possible.
        min_pages: The least memory in pages, None if no amount is possible.
        bound: The bound of max_pages, in words.
    """

    p2m_place: str
    p2m_outside: bool
    max_pages: int
    min_pages: int | None
    bound: str


def memory_limits(image: KernelImage, *, initrd: int = 0) -> list[MemoryLimit]:
    """Return the limits for each place of the p2m list.

    There are none if the kernel cannot be started as PV.

    Args:
        image: The kernel.
        initrd: Size of the initrd in bytes. It counts if it must be mapped.
    """
    if pv_obstacles(image):
        return []
    limits = []
    if p2m_obstacle(image) is None:
        limits.append(_limit_p2m_outside(image, initrd))
    end, bound = address_limit(image)
    if image.width == 8:
        l2_end = (image.virt_base // _L2_REACH + 1) * _L2_REACH
        if l2_end < end:
            l2_bound = (
                f"the addresses of one L2 page, {image.virt_base:#x} to {_format_address(l2_end)}, for a kernel that "
                "takes over no more of the initial mapping (Linux)"
            )
            limits.append(_limit_p2m_inside(image, initrd, l2_end, l2_bound))
    limits.append(_limit_p2m_inside(image, initrd, end, bound))
    return limits


def libxc_memory_limit(image: KernelImage, *, initrd: int = 0) -> MemoryLimit:
    """Return the limit that binds libxc.

    Libxc puts the p2m outside if it can. Otherwise it has all addresses after virt_base.

    The kernel must be one that can be started as PV.
    """
    limits = memory_limits(image, initrd=initrd)
    return limits[0] if limits[0].p2m_outside else limits[-1]


def _limit_p2m_inside(image: KernelImage, initrd: int, end: int, bound: str) -> MemoryLimit:
    """Return the limit with the p2m list in a mapping that reaches to ``end``."""
    mapped = mapped_initrd_size(image, initrd)

    def fits(pages: int) -> bool:
        return initial_mapping(image, pages, initrd=mapped, p2m_outside=False).end <= end

    def needed(pages: int) -> int:
        return initial_mapping(image, pages, initrd=mapped, p2m_outside=False).pages + whole_pages(initrd - mapped)

    max_pages = _largest_fitting(fits, _M2P_ENTRIES[image.width])
    if max_pages == _M2P_ENTRIES[image.width]:
        bound = _m2p_bound(image.width)
    min_pages = _smallest_sufficient(needed, max_pages)
    max_pages = 0 if min_pages is None else max_pages
    return MemoryLimit("inside the initial mapping", False, max_pages, min_pages, bound)


def _limit_p2m_outside(image: KernelImage, initrd: int) -> MemoryLimit:
    """Return the limit with the p2m list at INIT_P2M."""
    base = image.parameters.init_p2m
    assert base is not None
    mapped = mapped_initrd_size(image, initrd)
    ends = {image.virt_base: f"VIRT_BASE {image.virt_base:#x}"}
    if base < _LOW_HALF_END:
        ends[_LOW_HALF_END] = f"the end of the lower half of addresses, {_LOW_HALF_END:#x}"
    elif base < XEN_VIRT_64.start:
        ends[base] = "addresses that are not canonical"
    elif base < XEN_VIRT_64.stop:
        ends[base] = "Xen's own address range"
    end = min(ends)
    entries = (end - base) // 8
    mapping_end, mapping_bound = address_limit(image)
    mapping_fits = initial_mapping(image, 0, initrd=mapped, p2m_outside=True).end <= mapping_end
    max_pages = min(entries, _M2P_ENTRIES[8]) if mapping_fits else 0
    bound = _m2p_bound(8) if entries > _M2P_ENTRIES[8] else f"{ends[end]}, which the list at {base:#x} would reach"
    if not mapping_fits:
        bound = mapping_bound
    elif max_pages >= LIBXC_PAGES:
        bound += f" (libxc counts pages in 32 bits, so it builds less than {LIBXC_PAGES * PAGE_SIZE >> 40} TiB)"

    def needed(pages: int) -> int:
        mapping = initial_mapping(image, pages, initrd=mapped, p2m_outside=True)
        tables = sum(map(len, p2m_tables(image, mapping, pages))) if pages else 0
        return mapping.pages + whole_pages(initrd - mapped) + p2m_pages(image, pages) + tables

    min_pages = _smallest_sufficient(needed, max_pages)
    max_pages = 0 if min_pages is None else max_pages
    return MemoryLimit(f"at {base:#x} (INIT_P2M)", True, max_pages, min_pages, bound)


def mapped_initrd_size(image: KernelImage, initrd: int) -> int:
    """Return how many bytes of an initrd are in the initial mapping: all or none."""
    return 0 if image.parameters.mod_start_pfn else initrd


def address_limit(image: KernelImage) -> tuple[int, str]:
    """Return the address that the initial mapping cannot reach beyond, and the reason.

    The last 4 MiB of all addresses are unusable: after them comes address 0, for which libxc searches forever
    (xg_dom_x86.c alloc_pgtables_pv()).
    """
    base = image.virt_base
    if image.width == 4:
        end, reason = XEN_VIRT_PAE.start, "Xen's own address range"
    elif base < _LOW_HALF_END:
        end, reason = _LOW_HALF_END, "the end of the lower half of addresses"
    elif base < XEN_VIRT_64.stop:
        end, reason = base, "Xen's own address range"
    else:
        end, reason = ADDRESSES[8] - REGION, "the end of all addresses"
    return end, f"the addresses from {base:#x} to {_format_address(end)}, {reason}"


def _format_address(end: int) -> str:
    return f"{end:#x}" if end < ADDRESSES[8] else "the end"


def _m2p_bound(width: Width) -> str:
    entries = _M2P_ENTRIES[width]
    return f"the {entries:#x} entries of Xen's m2p table{' for 32-bit guests' if width == 4 else ''}"


def _largest_fitting(fits: Callable[[int], bool], maximum: int) -> int:
    """Return the largest number up to ``maximum`` that fits, 0 if none does.

    All smaller ones must fit, too.
    """
    low, high = 0, maximum
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _smallest_sufficient(needed: Callable[[int], int], maximum: int) -> int | None:
    """Return the smallest number of pages that covers its own needs.

    None if no number up to ``maximum`` does.
    """
    pages = 0
    while pages < (requirement := needed(pages)):
        if requirement > maximum:
            return None
        pages = requirement
    return pages
