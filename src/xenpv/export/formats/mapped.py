"""Where a kernel has its memory at virtual addresses: what a debugger that knows no page tables needs.

Linux maps all memory in one piece (its direct map), its own text and data a second time, and what it allocates here and
there (vmalloc: modules, stacks of tasks). The direct map is found by asking the page tables, never assumed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from xenpv.abi.x86 import LEVELS, PAE_L3_ENTRIES
from xenpv.errors import XenPVError
from xenpv.frames import ENTRIES, I64, NO_FRAME, PAGE_SHIFT, U64
from xenpv.memory import radix
from xenpv.memory.p2m import frame_reader
from xenpv.memory.pagetables import BITS_PER_LEVEL, frames_of_tables, place_of, translate
from xenpv.memory.paging import PV
from xenpv.runs import Runs, group_rows
from xenpv.source.domain import Domain

LINUX_DIRECT_MAP = {8: 0xFFFF_8880_0000_0000, 4: 0xC000_0000}  # Linux, arch/x86/include/asm/page_types.h, 4 levels
_KERNEL_HALF = {8: 1 << 35, 4: 3 << 18}  # the first page of the kernel's addresses, among all
_ALL = {8: 1 << 36, 4: 1 << 20}
_TRIED = 64  # pages that are looked up to tell whether an address is the direct map's
SEGMENTS_MAX = 16 << 10  # a debugger looks through them one by one


class Mapped(NamedTuple):
    """Runs of virtual pages which lie behind each other in a domain's content, too: virtual address in bytes, first
    pfn, number of pages; arrays of one length, ascending by address.
    """

    vaddr: U64
    first: U64
    pages: I64


NOTHING = Mapped(np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.int64))


def direct_map(domain: Domain, pages: Runs) -> int | None:
    """The virtual address that pfn 0 has in the kernel's direct map; None where none is found."""
    if domain.memory.top is None or not len(pages.first):
        return None
    wanted = np.unique(np.linspace(0, pages.total - 1, _TRIED).astype(np.int64))
    before = np.cumsum(pages.pages) - pages.pages
    row = np.searchsorted(before, wanted, "right") - 1
    sample = pages.first[row] + (wanted - before[row]).astype(np.uint64)
    best, most = None, len(sample) // 2
    for base in _candidates(domain):
        here = sample < np.uint64((1 << 8 * domain.width) - base >> PAGE_SHIFT)
        pfns = sample[here]
        found = int(np.count_nonzero(_mapped_at(domain, (pfns << np.uint64(PAGE_SHIFT)) + np.uint64(base)) == pfns))
        if found > most:
            best, most = base, found
    return best


def _mapped_at(domain: Domain, vaddrs: U64) -> U64:
    """The pfn at each virtual address, NO_FRAME where there is none."""
    memory = domain.memory
    paging = memory.paging or PV[domain.width]
    out = np.full(len(vaddrs), NO_FRAME)
    top = memory.top
    good = np.array([not paging.refuses(vaddr) for vaddr in vaddrs.tolist()], np.bool_)
    if top is not None:
        out[good] = translate(frame_reader(memory.tables or memory.frames), top, vaddrs[good], paging)
    return out


def _candidates(domain: Domain) -> list[int]:
    """Where Linux has it; and for each entry of the kernel's half of the top table, what its first page comes to."""
    width = domain.width
    shift = PAGE_SHIFT + BITS_PER_LEVEL * (LEVELS[width] - 1)
    slots = range(272, ENTRIES) if width == 8 else range(PAE_L3_ENTRIES - 1, PAE_L3_ENTRIES)
    tops = [slot << shift | (0xFFFF << 48 if width == 8 else 0) for slot in slots]
    pfns = _mapped_at(domain, np.array(tops, np.uint64)).tolist()
    found = [top - (pfn << PAGE_SHIFT) for top, pfn in zip(tops, pfns, strict=True) if pfn <= top >> PAGE_SHIFT]
    return list(dict.fromkeys([LINUX_DIRECT_MAP[width], *found]))


def kernel_maps(domain: Domain, pages: Runs, direct: int | None) -> Mapped:
    """What vcpu 0's tables map in the kernel's half beside the direct map; the longest runs, if they are too many.

    What stands at several addresses (a p2m's missing leaf, Linux's espfix stacks, 65536 times a few pages) is had at
    one of them, where most is in a row. Nothing for an HVM domain, or where tables cannot be read.
    """
    memory, width = domain.memory, domain.width
    if memory.top is None or domain.hvm:
        return NOTHING
    start = place_of(direct) + pages.stop if direct is not None and width == 8 else _KERNEL_HALF[width]
    places = range(start, _ALL[width])
    if not places:
        return NOTHING
    try:
        runs, _ = radix.walk_tree(
            frame_reader(memory.tables or memory.frames), memory.top, LEVELS[width], places, frames_of_tables
        )
    except XenPVError:
        return NOTHING
    place = pages.positions(runs.frame)
    there = place >= 0
    at, pfn, place = runs.first[there], runs.frame[there], place[there]
    cut, count = group_rows((np.diff(at) != 1) | (np.diff(pfn) != 1) | (np.diff(place) != 1), len(at))
    vaddr = at[cut].astype(np.uint64) << np.uint64(PAGE_SHIFT)
    if width == 8:
        vaddr |= np.uint64(0xFFFF << 48)
    if direct is not None and width == 4:
        same = vaddr - np.uint64(direct) == pfn[cut] << np.uint64(PAGE_SHIFT)
        cut, count, vaddr = cut[~same], count[~same], vaddr[~same]
    first = pfn[cut]
    longest = np.argsort(-count, kind="stable")
    once = longest[np.sort(np.unique(first[longest], return_index=True)[1])]
    keep = np.sort(once[:SEGMENTS_MAX])
    return Mapped(vaddr[keep], first[keep], count[keep])
