"""The start of day in bytes: a plan's page tables, start info, shared info and vcpu 0, whole arrays at a time.

Tables come with pfns; memory.pagetables.localise() puts mfns in their place. What an entry holds is what libxc gives it
(xen.git:tools/libs/guest/xg_dom_x86.c setup_pgtables_pv(), start_info_x86_64(), shared_info_x86_64(), vcpu_x86_64()).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import ENTRIES, PAGE_SHIFT, PAGE_SIZE, PTE_A, PTE_P, PTE_RW, VCPU_GUEST_CONTEXT
from xenpv.abi.xen import SHARED_INFO, START_INFO
from xenpv.frames import NO_FRAME, PAGES_PER_BATCH, U64
from xenpv.image.layout import Layout, Span
from xenpv.memory.publish import TABLE_FLAGS

L1_FLAGS = PTE_P | PTE_RW | PTE_A  # RW is not set for a page table


def tables(layout: Layout, at_once: int = PAGES_PER_BATCH) -> Iterator[tuple[int, U64, U64]]:
    """All page tables, the top one first, up to so many of one level at once: level, pfns uint64 (n,), and entries that
    hold pfns, uint64 (n, 512). Every table comes once.
    """
    for span in layout.tables:
        for start in range(0, span.count, at_once):
            rows = range(start, min(start + at_once, span.count))
            pfns = np.arange(span.first + rows.start, span.first + rows.stop, dtype=np.uint64)
            yield span.level, pfns, entries(layout, span, rows)


def entries(layout: Layout, span: Span, rows: range) -> U64:
    """The entries of some tables of a span of ``layout.tables``, by number within it: uint64 (len(rows), 512)."""
    places = np.arange((span.place + rows.start) * ENTRIES, (span.place + rows.stop) * ENTRIES, dtype=np.uint64)
    frames = np.full(places.shape, NO_FRAME)
    for below in layout.spans(span.level - 1):
        low, high = (min(max(at - int(places[0]), 0), len(places)) for at in (below.place, below.place + below.count))
        frames[low:high] = places[low:high] - np.uint64(below.place) + np.uint64(below.first)
    flags = np.full(places.shape, TABLE_FLAGS if span.level > 1 else L1_FLAGS, np.uint64)
    if span.level == 1:
        for pfns in layout.read_only:
            flags[(frames >= np.uint64(pfns.start)) & (frames < np.uint64(pfns.stop))] &= np.uint64(~PTE_RW & 0xFFF)
    ptes = np.where(frames == NO_FRAME, np.uint64(0), frames << np.uint64(PAGE_SHIFT) | flags)
    return ptes.reshape(len(rows), ENTRIES)


def start_info(
    layout: Layout, *, shared_info: int, store_mfn: int, store_evtchn: int, console_mfn: int, console_evtchn: int
) -> bytes:
    """The page of start info. ``shared_info`` is that page's machine address in bytes."""
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
    if layout.width == 8:  # a 32-bit guest's has the members, and libxc leaves them 0
        page["first_p2m_pfn"], page["nr_p2m_frames"] = info.first_p2m_pfn, info.nr_p2m_frames
    page["shared_info"], page["store_mfn"], page["store_evtchn"] = shared_info, store_mfn, store_evtchn
    page["console"]["domU"]["mfn"], page["console"]["domU"]["evtchn"] = console_mfn, console_evtchn
    return page.tobytes().ljust(PAGE_SIZE, b"\0")


def shared_info(width: Width) -> bytes:
    """The page of shared info, as it is before the guest has written to it: all upcalls masked."""
    page = np.zeros((), SHARED_INFO[width])
    page["vcpu_info"]["evtchn_upcall_mask"] = 1
    return page.tobytes().ljust(PAGE_SIZE, b"\0")


def vcpu_context(layout: Layout, cr3: int) -> bytes:
    """The vcpu_guest_context of vcpu 0. ``cr3`` is the top table's mfn in the form that a cr3 of that width has:
    shifted, or for 32 bits folded (xen_pfn_to_cr3()).
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
