"""Restore a suspended domain to another host without a stream. Every mfn changes."""

from __future__ import annotations

import numpy as np

from xenpv.abi.x86 import PTE_FRAME_MASK, PTE_P, VCPU_GUEST_CONTEXT
from xenpv.abi.xen import SHARED_INFO, START_INFO
from xenpv.frames import I64, IS_TABLE, PAGE_SIZE, U64, DomId
from xenpv.host.model.host import ModelHost
from xenpv.memory.p2m_reader import decode_entries, names_local_frame
from xenpv.memory.p2m_writer import encode_entries
from xenpv.memory.page_tables import cr3_to_frame, is_xen_slot, pte_frames
from xenpv.source.live import LiveDomain


def restore_directly(source: ModelHost, domid: DomId, target: ModelHost) -> DomId:
    """Restore a domain on another host, or the same one. It is unpaused, and can resume."""
    info = source.info(domid)
    width = info.width
    old = source.frames.owned(domid + 1)
    old = old[old != np.uint64(info.shared_info_mfn)]
    pfns = source.m2p(old)
    assert len(np.unique(pfns)) == info.pages
    other = target.create(width, max_pages=info.max_pages)
    target.populate_physmap(other, np.zeros(7, np.uint64))  # so that mfns differ even with the same seed
    target.hypervisor.decrease_reservation(other, target.frames.owned(other + 1)[1:])
    new = target.populate_physmap(other, pfns)

    def moved(mfns: U64) -> U64:
        at = np.minimum(np.searchsorted(old, mfns), len(old) - 1)
        assert (old[at] == mfns).all(), "an mfn that is not the domain's would be saved"
        return new[at]

    pages = source.frames.read(old)
    kinds = source.page_types(domid, old)
    top = cr3_to_frame(int(VCPU_GUEST_CONTEXT.read(source.vcpu_context(domid, 0), width)["ctrlreg"][3]), width)
    last = 0  # the L2 of a PAE guest that has Xen's entries
    if width == 4:
        last = int(pte_frames(pages[np.searchsorted(old, np.uint64(top))].view("<u8"))[3])
    for row in np.flatnonzero(IS_TABLE[kinds]).tolist():
        ptes = pages[row].view("<u8")
        ptes[is_xen_slot(int(kinds[row]) & 7, width, last_pae_l2=int(old[row]) == last)] = 0
        there = ptes & np.uint64(PTE_P) != 0
        ptes[there] = ptes[there] & np.uint64(~PTE_FRAME_MASK & (1 << 64) - 1) | moved(
            pte_frames(ptes[there])
        ) << np.uint64(12)
    p2m = LiveDomain(source, info).p2m
    rows: I64 = np.searchsorted(old, p2m.distinct_leaves.frame)
    leaves = decode_entries(pages[rows], width).copy()
    leaves[names_local_frame(leaves)] = moved(leaves[names_local_frame(leaves)])
    pages[rows] = encode_entries(leaves, width)

    context = np.frombuffer(bytearray(source.vcpu_context(domid, 0)), VCPU_GUEST_CONTEXT[width])
    regs = context["user_regs"]
    record = int(regs["rdx" if width == 8 else "edx"][0])
    cr3 = int(moved(np.array([top], np.uint64))[0])
    context["ctrlreg"][0, 3] = cr3 << 12 if width == 8 else (cr3 << 12 | cr3 >> 20) & 0xFFFF_FFFF
    start = pages[np.searchsorted(old, np.uint64(record))][: START_INFO.size(width)].view(START_INFO[width])
    start["shared_info"], start["flags"] = target.info(other).shared_info_mfn * PAGE_SIZE, 0
    start["nr_pages"] = p2m.entries
    by_pfn = dict(zip(pfns.tolist(), new.tolist(), strict=True))
    start["store_mfn"] = by_pfn[int(start["store_mfn"][0])]
    start["console"]["domU"]["mfn"] = by_pfn[int(start["console"]["domU"]["mfn"][0])]
    target.write_frames(other, new, pages)
    target.hypervisor.pin(other, cr3, 4 if width == 8 else 3)
    shared = bytearray(source.shared_info(domid))
    at = SHARED_INFO.offset(width, "arch.pfn_to_mfn_frame_list_list")
    shared[at : at + width] = bytes(width)
    target.write_shared_info(other, bytes(shared))
    target.set_vcpu_context(other, 0, context.tobytes())
    target.unpause(other)
    return other
