"""Makes the bytes of the start of day of a plan.

These are page tables, start info, shared info and vcpu 0.

Tables hold pfns; memory.page_tables.localise() puts mfns in their place. All entries are as libxc makes them.

Source: xen.git:tools/libs/guest/xg_dom_x86.c setup_pgtables_pv(), start_info_x86_64(), shared_info_x86_64(),
vcpu_x86_64()
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import ENTRIES, PAGE_SHIFT, PAGE_SIZE, PTE_A, PTE_P, PTE_RW, VCPU_GUEST_CONTEXT
from xenpv.abi.xen import SHARED_INFO, START_INFO
from xenpv.frames import NO_FRAME, PAGES_PER_BATCH, U64
from xenpv.image.layout import Layout, Span
from xenpv.memory.p2m_writer import TABLE_FLAGS

L1_FLAGS = PTE_P | PTE_RW | PTE_A  # RW is not set for a page table


def iter_page_tables(layout: Layout, batch: int = PAGES_PER_BATCH) -> Iterator[tuple[int, U64, U64]]:
    """Yield all page tables once, the top table first, in batches of one level.

    Args:
        layout: The plan.
        batch: The highest number of tables in a batch.

    Yields:
        Level, the tables' pfns, uint64 of shape (n,), and their entries, which hold pfns, uint64 of shape (n, 512).
    """
    for span in layout.tables:
        for start in range(0, span.count, batch):
            indices = range(start, min(start + batch, span.count))
            pfns = np.arange(span.first + indices.start, span.first + indices.stop, dtype=np.uint64)
            yield span.level, pfns, table_entries(layout, span, indices)


def table_entries(layout: Layout, span: Span, indices: range) -> U64:
    """Return the entries of the tables at ``indices`` of a span.

    They are uint64 of shape (len(indices), 512).
    """
    places = np.arange((span.place + indices.start) * ENTRIES, (span.place + indices.stop) * ENTRIES, dtype=np.uint64)
    frames = np.full(places.shape, NO_FRAME)
    for below in layout.spans(span.level - 1):
        low, high = (
            min(max(edge - int(places[0]), 0), len(places)) for edge in (below.place, below.place + below.count)
        )
        frames[low:high] = places[low:high] - np.uint64(below.place) + np.uint64(below.first)
    flags = np.full(places.shape, TABLE_FLAGS if span.level > 1 else L1_FLAGS, np.uint64)
    if span.level == 1:
        for pfns in layout.read_only:
            flags[(frames >= np.uint64(pfns.start)) & (frames < np.uint64(pfns.stop))] &= np.uint64(~PTE_RW & 0xFFF)
    ptes = np.where(frames == NO_FRAME, np.uint64(0), frames << np.uint64(PAGE_SHIFT) | flags)
    return ptes.reshape(len(indices), ENTRIES)


def start_info(
    layout: Layout, *, shared_info: int, store_mfn: int, store_evtchn: int, console_mfn: int, console_evtchn: int
) -> bytes:
    """Return the page of start info.

    ``shared_info`` is the machine address of that page, in bytes.
    """
    info, page = layout.start_info, np.zeros((), START_INFO[layout.width])
    for name in (
        "magic",
        "nr_pages",
        "flags",
        "pt_base",
        "nr_pt_frames",
        "mfn_list",
        "mod_start",
        "mod_len",
        "cmd_line",
    ):
        page[name] = getattr(info, name)
    if layout.width == 8:  # libxc leaves these members 0 in 32-bit guests
        page["first_p2m_pfn"], page["nr_p2m_frames"] = info.first_p2m_pfn, info.nr_p2m_frames
    page["shared_info"], page["store_mfn"], page["store_evtchn"] = shared_info, store_mfn, store_evtchn
    page["console"]["domU"]["mfn"], page["console"]["domU"]["evtchn"] = console_mfn, console_evtchn
    return page.tobytes().ljust(PAGE_SIZE, b"\0")


def shared_info(width: Width) -> bytes:
    """Return the first content of the shared info page: all upcalls are masked."""
    page = np.zeros((), SHARED_INFO[width])
    page["vcpu_info"]["evtchn_upcall_mask"] = 1
    return page.tobytes().ljust(PAGE_SIZE, b"\0")


def vcpu_context(layout: Layout, cr3: int) -> bytes:
    """Return the vcpu_guest_context of vcpu 0.

    Args:
        layout: The plan.
        cr3: What memory.page_tables.frame_to_cr3() returns for the top table's mfn.
    """
    registers, context = layout.registers, np.zeros((), VCPU_GUEST_CONTEXT[layout.width])
    user, prefix = context["user_regs"], "r" if layout.width == 8 else "e"
    for name, value in (
        ("ip", registers.ip),
        ("sp", registers.sp),
        ("si", registers.si),
        ("flags", registers.eflags),
    ):
        user[prefix + name] = value
    user["cs"], user["ss"] = registers.cs, registers.ss
    for name in ("ds", "es", "fs", "gs"):
        user[name] = registers.ds
    context["kernel_ss"], context["kernel_sp"] = registers.ss, registers.sp
    context["ctrlreg"][3] = cr3
    context["debugreg"][6], context["debugreg"][7] = registers.dr6, registers.dr7
    context["flags"], context["vm_assist"] = registers.vgcf, registers.vm_assist
    return context.tobytes()
