"""The virtual addresses at which a kernel maps its memory.

Debuggers that walk no page tables need them.

Linux maps all memory in one piece, its direct map. It maps its own text and data a second time, and some pages in
vmalloc: modules, stacks of tasks. The page tables tell where the direct map is; it is never assumed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from xenpv.abi.x86 import LEVELS, PAE_L3_ENTRIES
from xenpv.errors import GuestError
from xenpv.export.formats.job import ExportJob
from xenpv.frames import ENTRIES, I64, NO_FRAME, PAGE_SHIFT, U64
from xenpv.memory import frame_tree
from xenpv.memory.p2m_reader import frame_reader
from xenpv.memory.page_tables import BITS_PER_LEVEL, decode_page_tables, page_number, translate
from xenpv.memory.paging import PV_PAGING
from xenpv.runs import Runs, group_rows
from xenpv.source.domain import Domain

LINUX_DIRECT_MAP = {8: 0xFFFF_8880_0000_0000, 4: 0xC000_0000}  # Linux, arch/x86/include/asm/page_types.h, 4 levels
_KERNEL_HALF = {8: 1 << 35, 4: 3 << 18}  # the first virtual page of the kernel's half
_VIRTUAL_PAGES = {8: 1 << 36, 4: 1 << 20}
_SAMPLES = 64  # pages whose virtual address is tried to tell whether a base is the direct map's
SEGMENTS_MAX = 16 << 10  # a debugger looks through them one by one


class Mappings(NamedTuple):
    """Runs of virtual pages that map consecutive pages of the file.

    Arrays of one length, ascending by address.

    Attributes:
        vaddr: The virtual address of the first byte.
        first: The first pfn.
        pages: The number of pages.
    """

    vaddr: U64
    first: U64
    pages: I64


NO_MAPPINGS = Mappings(np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.int64))


def find_direct_map(domain: Domain, pages: Runs) -> int | None:
    """Return the virtual address of pfn 0 in the kernel's direct map, or None.

    The base that fits most of a sample of pages wins, if it fits more than half of them.
    """
    if domain.memory.top is None or not len(pages):
        return None
    sample = pages.pfns_at(np.unique(np.linspace(0, pages.total - 1, _SAMPLES).astype(np.int64)))
    best, most = None, len(sample) // 2
    for base in _direct_map_candidates(domain):
        pfns = sample[sample < np.uint64((1 << 8 * domain.width) - base >> PAGE_SHIFT)]
        mapped = _translate(domain, (pfns << np.uint64(PAGE_SHIFT)) + np.uint64(base))
        fits = int(np.count_nonzero(mapped == pfns))
        if fits > most:
            best, most = base, fits
    return best


def _translate(domain: Domain, vaddrs: U64) -> U64:
    """Return the pfn at each virtual address, NO_FRAME for one that is not mapped."""
    memory = domain.memory
    paging = memory.paging or PV_PAGING[domain.width]
    pfns = np.full(len(vaddrs), NO_FRAME)
    canonical = np.array([not paging.invalid_reason(vaddr) for vaddr in vaddrs.tolist()], np.bool_)
    if memory.top is not None:
        read = frame_reader(memory.tables or memory.frames)
        pfns[canonical] = translate(read, memory.top, vaddrs[canonical], paging)
    return pfns


def _direct_map_candidates(domain: Domain) -> list[int]:
    """Return candidates for the direct map's base.

    They are Linux's own base, and one for each entry in the kernel's half of the top table.
    """
    width = domain.width
    shift = PAGE_SHIFT + BITS_PER_LEVEL * (LEVELS[width] - 1)
    slots = range(272, ENTRIES) if width == 8 else range(PAE_L3_ENTRIES - 1, PAE_L3_ENTRIES)
    vaddrs = [slot << shift | (0xFFFF << 48 if width == 8 else 0) for slot in slots]
    pfns = _translate(domain, np.array(vaddrs, np.uint64)).tolist()
    bases = [vaddr - (pfn << PAGE_SHIFT) for vaddr, pfn in zip(vaddrs, pfns, strict=True) if pfn <= vaddr >> PAGE_SHIFT]
    return list(dict.fromkeys([LINUX_DIRECT_MAP[width], *bases]))


def kernel_mappings(job: ExportJob, direct_map: int | None) -> Mappings:
    """Return vcpu 0's mappings in the kernel's half, without the direct map.

    Some pages are mapped at many addresses: the p2m's missing leaf, Linux's espfix stacks. Each is given once, where
    most pages are consecutive. If there are more runs than SEGMENTS_MAX, the longest are given. An HVM domain gives
    none. Page tables that are invalid or cannot be read add a remark to the job.
    """
    domain, pages = job.domain, job.pages
    memory, width = domain.memory, domain.width
    if memory.top is None or domain.hvm:
        return NO_MAPPINGS
    skips_direct_map = direct_map is not None and width == 8
    start = page_number(direct_map) + pages.stop if direct_map is not None and skips_direct_map else _KERNEL_HALF[width]
    virtual_pages = range(start, _VIRTUAL_PAGES[width])
    if not virtual_pages:
        return NO_MAPPINGS
    try:
        leaves, unreadable = frame_tree.walk_tree(
            frame_reader(memory.tables or memory.frames), memory.top, LEVELS[width], virtual_pages, decode_page_tables
        )
    except GuestError as e:
        job.remarks.append(f"modules, stacks and vmalloc have no virtual addresses: {e}")
        return NO_MAPPINGS
    if unreadable:
        place = f"the first is pfn {unreadable[0].frame:#x}, of level {unreadable[0].level}"
        job.remarks.append(
            f"{len(unreadable)} page tables cannot be read ({place}): what they map has no virtual address"
        )
    position = pages.positions(leaves.frame)
    in_file = position >= 0
    virtual_page, pfn, position = leaves.first[in_file], leaves.frame[in_file], position[in_file]
    breaks = (np.diff(virtual_page) != 1) | (np.diff(pfn) != 1) | (np.diff(position) != 1)
    row, count = group_rows(breaks, len(virtual_page))
    first, vaddr = pfn[row], virtual_page[row].astype(np.uint64) << np.uint64(PAGE_SHIFT)
    if width == 8:
        vaddr |= np.uint64(0xFFFF << 48)
    if direct_map is not None and width == 4:
        elsewhere = vaddr - np.uint64(direct_map) != first << np.uint64(PAGE_SHIFT)
        first, count, vaddr = first[elsewhere], count[elsewhere], vaddr[elsewhere]
    by_length = np.argsort(-count, kind="stable")
    longest_of_pfn = by_length[np.sort(np.unique(first[by_length], return_index=True)[1])]
    longest = np.sort(longest_of_pfn[:SEGMENTS_MAX])
    return Mappings(vaddr[longest], first[longest], count[longest])
