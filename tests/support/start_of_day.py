"""A domain on the model as a domain builder leaves it: the start-of-day ABI.

The initial mapping has the kernel image, the p2m list unless it is outside, start info, the rings of xenstore and
console, page tables, boot stack, and at least 512 KiB of padding, up to a multiple of 4 MiB. A list outside is mapped
at OUTSIDE, which Linux asks for with INIT_P2M. Its pages and page tables follow the initial mapping.

Source: xen.git:xen/include/public/xen.h; libxenguest for a list outside
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.support.model_guest import BASE, pfns
from xenpv.abi.declare import Width
from xenpv.abi.x86 import ENTRIES, PAGE_SIZE, PTE_A, PTE_P, PTE_RW, VCPU_GUEST_CONTEXT, VGCF_IN_KERNEL, VGCF_ONLINE
from xenpv.abi.xen import SHARED_INFO, START_INFO, START_INFO_MAGIC
from xenpv.frames import U64, DomId
from xenpv.host.model.host import ModelHost

IMAGE = 16  # pages of the kernel, which has no content here
OUTSIDE = 0x80_0000_0000
PAGE = PTE_P | PTE_RW | PTE_A
TABLE = 0x67  # P, RW, US, A, D
MIB4 = 1024  # pages
PADDING = 128


@dataclass
class BootLayout:
    """The first pfn of each part of the domain, and the mfns of all pfns."""

    domid: DomId
    width: Width
    mfns: U64
    list: int
    start_info: int
    tables: int
    stack: int
    mapped: int  # where the initial mapping ends


def build_domain(
    host: ModelHost, width: Width = 8, pages: int = 4096, *, outside: bool = False, order: int = 0, name: str = "litmus"
) -> BootLayout:
    """Build a domain and unpause it. The next ``host.run`` starts its kernel."""
    domid = host.create(width, max_pages=pages, name=name)
    mfns = host.populate_physmap(domid, pfns(pages)[:: 1 << order], order)
    mfns = (mfns[:, None] + pfns(1 << order)).reshape(-1)
    n_list = -(-pages * width // PAGE_SIZE)
    info = IMAGE + (0 if outside else n_list)
    tables = info + 3
    upper = 3 if width == 8 else 2
    end = 0
    while end < tables + upper + -(-end // ENTRIES) + 1 + PADDING:
        end += MIB4
    l1 = -(-end // ENTRIES)
    stack = tables + upper + l1
    end = min(end, pages)
    layout = BootLayout(domid, width, mfns, end if outside else IMAGE, info, tables, stack, end)
    list_vaddr = _write_list(host, layout, n_list)
    top = mfns[tables : tables + 1]
    l4: dict[int, int] = {}
    base = BASE[width]
    if width == 8:
        l3, l2, l1s = tables + 1, tables + 2, tables + 3
        l4[511] = l3
        _write(host, layout, l3, {510: l2})
    else:
        l2, l1s = tables + 1, tables + 2
        l4[3] = l2
    _write(host, layout, l2, {i: l1s + i for i in range(l1)})
    read_only = np.zeros(end, np.bool_)
    read_only[tables:stack] = True
    _write_l1(host, layout, l1s, mfns[:end], read_only)
    n_tables = 0
    if outside:
        n_tables, l4[1] = _outside(host, layout, n_list)
    _write(host, layout, tables, l4, flags=TABLE if width == 8 else PTE_P)
    host.hypervisor.pin(domid, int(top[0]), 4 if width == 8 else 3)
    start_info = np.zeros(1, START_INFO[width])
    start_info["magic"], start_info["nr_pages"] = START_INFO_MAGIC[width], pages
    start_info["shared_info"] = host.info(domid).shared_info_mfn * PAGE_SIZE
    start_info["store_mfn"], start_info["store_evtchn"] = mfns[info + 1], host.alloc_event_channel(domid)
    start_info["console"]["domU"]["mfn"] = mfns[info + 2]
    start_info["console"]["domU"]["evtchn"] = host.alloc_event_channel(domid)
    start_info["pt_base"], start_info["nr_pt_frames"] = base + tables * PAGE_SIZE, upper + l1
    start_info["mfn_list"] = list_vaddr
    if outside:
        start_info["first_p2m_pfn"], start_info["nr_p2m_frames"] = end, n_list + n_tables
    page = np.zeros((1, PAGE_SIZE), np.uint8)
    page[0, : start_info.itemsize] = start_info.view(np.uint8)
    host.write_frames(domid, mfns[info : info + 1], page)
    shared = np.zeros(1, SHARED_INFO[width])
    shared["vcpu_info"]["evtchn_upcall_mask"] = 1
    host.write_shared_info(domid, shared.tobytes())
    host.set_vcpu_context(domid, 0, _context(layout))
    host.unpause(domid)
    return layout


def _write_list(host: ModelHost, layout: BootLayout, n_list: int) -> int:
    """Its content; its address."""
    per = PAGE_SIZE // layout.width
    for at in range(0, n_list, 1024):
        some = layout.mfns[at * per : (at + 1024) * per]
        words = np.zeros(-(-len(some) // per) * per, f"<u{layout.width}")
        words[: len(some)] = some
        frames = layout.mfns[layout.list + at : layout.list + at + 1024][: len(words) // per]
        host.write_frames(layout.domid, frames, words.view(np.uint8).reshape(-1, PAGE_SIZE))
    return BASE[layout.width] + layout.list * PAGE_SIZE if layout.list < layout.mapped else OUTSIDE


def _outside(host: ModelHost, layout: BootLayout, n_list: int) -> tuple[int, int]:
    """Page tables of a list outside the initial mapping: how many, and the pfn of the L3."""
    n2 = -(-n_list // (ENTRIES * ENTRIES))
    n1 = -(-n_list // ENTRIES)
    l3 = layout.list + n_list
    _write(host, layout, l3, {i: l3 + 1 + i for i in range(n2)})
    for i in range(n2):
        here = range(i * ENTRIES, min((i + 1) * ENTRIES, n1))
        _write(host, layout, l3 + 1 + i, {n - here.start: l3 + 1 + n2 + n for n in here})
    frames = layout.mfns[layout.list : layout.list + n_list]
    _write_l1(host, layout, l3 + 1 + n2, frames, np.zeros(n_list, np.bool_))
    return 1 + n2 + n1, l3


def _write(host: ModelHost, layout: BootLayout, pfn: int, entries: dict[int, int], flags: int = TABLE) -> None:
    words = np.zeros(ENTRIES, "<u8")
    for at, to in entries.items():
        words[at] = int(layout.mfns[to]) << 12 | flags
    host.write_frames(layout.domid, layout.mfns[pfn : pfn + 1], words.view(np.uint8)[None])


def _write_l1(host: ModelHost, layout: BootLayout, first: int, frames: U64, read_only: np.ndarray) -> None:
    n = -(-len(frames) // ENTRIES)
    ptes = np.zeros(n * ENTRIES, "<u8")
    flags = np.where(read_only, np.uint64(PAGE & ~PTE_RW), np.uint64(PAGE))
    ptes[: len(frames)] = frames << np.uint64(12) | flags
    host.write_frames(layout.domid, layout.mfns[first : first + n], ptes.view(np.uint8).reshape(n, PAGE_SIZE))


def _context(layout: BootLayout) -> bytes:
    base, width = BASE[layout.width], layout.width
    data = np.zeros(1, VCPU_GUEST_CONTEXT[width])
    data["flags"] = VGCF_ONLINE | VGCF_IN_KERNEL
    top = int(layout.mfns[layout.tables])
    data["ctrlreg"][0, 3] = top << 12 if width == 8 else (top << 12 | top >> 20) & 0xFFFF_FFFF
    letter = "r" if width == 8 else "e"
    for name, value in (
        ("ip", base),
        ("si", base + layout.start_info * PAGE_SIZE),
        ("sp", base + (layout.stack + 1) * PAGE_SIZE),
        ("flags", 0x200),
    ):
        data["user_regs"][f"{letter}{name}"] = value
    return data.tobytes()
