"""How much memory a kernel can be started with as PV, and what bounds it.

A list of 8 bytes for each page, in what is left of the addresses behind virt_base, is what bounded PV domains; with
INIT_P2M it lies elsewhere. All is computed from the kernel's own numbers, by the initial mapping as mapping.py has it.
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

# mfns that Xen's m2p table has room for, and so pages of one domain: MACH2PHYS_NR_ENTRIES of
# xen.git:xen/include/public/arch-x86/xen-x86_64.h; MACH2PHYS_COMPAT_NR_ENTRIES of xen/arch/x86/include/asm/config.h.
_M2P_ENTRIES = {8: 0x40_0000_0000 >> 3, 4: 0xFFE0_0000 - XEN_VIRT_PAE.start >> 2}
LIBXC_PAGES = 1 << 32  # xg_dom_core.c xc_dom_mem_init() counts in 32 bits


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


def limits(image: KernelImage, *, initrd: int = 0) -> list[Limit]:
    """The most memory in each way in which the kernel can be started as PV; none where it cannot be at all.

    ``initrd`` is the size of the initrd in bytes, which counts where it has to be mapped.
    """
    if pv_obstacles(image):
        return []
    found = []
    if p2m_obstacle(image) is None:
        found.append(_limit_outside(image, initrd))
    end, what = addresses_behind(image)
    if image.width == 8:
        reach = (image.virt_base // _L2_REACH + 1) * _L2_REACH
        if reach < end:
            what_kernel = (
                f"the addresses of one L2 page, {image.virt_base:#x} to {_address(reach)}, for a kernel that takes "
                "over no more of the initial mapping (Linux)"
            )
            found.append(_limit_inside(image, initrd, reach, what_kernel))
    found.append(_limit_inside(image, initrd, end, what))
    return found


def libxc_limit(image: KernelImage, *, initrd: int = 0) -> Limit:
    """The one of limits() that binds who builds as libxc does: with the p2m outside wherever it can be there, else with
    all addresses behind virt_base. The kernel can be started as PV.
    """
    found = limits(image, initrd=initrd)
    return found[0] if found[0].outside else found[-1]


def _limit_inside(image: KernelImage, initrd: int, end: int, what: str) -> Limit:
    """With the p2m list in the initial mapping, which may reach up to an address."""
    mapped = mapped_initrd(image, initrd)

    def fits(pages: int) -> bool:
        return initial_mapping(image, pages, initrd=mapped, p2m_outside=False).end <= end

    most = _most(fits, _M2P_ENTRIES[image.width])
    bound = _m2p_bound(image.width) if most == _M2P_ENTRIES[image.width] else what

    def needed(pages: int) -> int:
        return initial_mapping(image, pages, initrd=mapped, p2m_outside=False).pages + whole_pages(initrd - mapped)

    least = _least(needed, most)
    return _limit("inside the initial mapping", False, most, least, bound)


def _limit_outside(image: KernelImage, initrd: int) -> Limit:
    """With the p2m list at INIT_P2M."""
    base = image.parameters.init_p2m
    assert base is not None
    mapped = mapped_initrd(image, initrd)
    ends = {image.virt_base: f"VIRT_BASE {image.virt_base:#x}"}
    if base < _LOW_HALF_END:
        ends[_LOW_HALF_END] = f"the end of the lower half of addresses, {_LOW_HALF_END:#x}"
    elif base < XEN_VIRT_64.start:
        ends[base] = "addresses that are not canonical"
    elif base < XEN_VIRT_64.stop:
        ends[base] = "what Xen keeps for itself"
    end = min(ends)
    by_addresses = (end - base) // 8
    mapping_fits = initial_mapping(image, 0, initrd=mapped, p2m_outside=True).end <= addresses_behind(image)[0]
    most = min(by_addresses, _M2P_ENTRIES[8]) if mapping_fits else 0
    bound = _m2p_bound(8) if by_addresses > _M2P_ENTRIES[8] else f"{ends[end]}, which the list at {base:#x} would reach"
    if not mapping_fits:
        bound = addresses_behind(image)[1]
    elif most >= LIBXC_PAGES:
        bound += f" (libxc counts pages in 32 bits, so it builds less than {LIBXC_PAGES * PAGE_SIZE >> 40} TiB)"

    def needed(pages: int) -> int:
        mapping = initial_mapping(image, pages, initrd=mapped, p2m_outside=True)
        tables = sum(map(len, p2m_tables(image, mapping, pages))) if pages else 0
        return mapping.pages + whole_pages(initrd - mapped) + p2m_pages(image, pages) + tables

    return _limit(f"at {base:#x}, where INIT_P2M wants it", True, most, _least(needed, most), bound)


def _limit(p2m: str, outside: bool, most: int, least: int | None, bound: str) -> Limit:
    return Limit(p2m, outside, most if least is not None else 0, least, bound)


def mapped_initrd(image: KernelImage, initrd: int) -> int:
    """How many bytes of an initrd are in the initial mapping: all or none."""
    return 0 if image.parameters.mod_start_pfn else initrd


def addresses_behind(image: KernelImage) -> tuple[int, str]:
    """The address behind which the initial mapping cannot reach, and what is there, in words.

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
        end, what = ADDRESSES[8] - REGION, "the end of all addresses"
    return end, f"the addresses from {base:#x} to {_address(end)}, {what}"


def _address(end: int) -> str:
    return f"{end:#x}" if end < ADDRESSES[8] else "the end"


def _m2p_bound(width: Width) -> str:
    entries = _M2P_ENTRIES[width]
    return f"the {entries:#x} entries of Xen's m2p table{' for 32-bit guests' if width == 4 else ''}"


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
