"""What a restorer makes of a file, as plainly as can be: whether a guest goes on from it is the proof of a save.

As xen.git:tools/libs/guest/xg_sr_restore_x86_pv.c does it, but entry by entry, and without xenpv's own arithmetic.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from xenpv.abi.x86 import PTE_FRAME_MASK, PTE_P, VCPU_GUEST_CONTEXT
from xenpv.abi.xen import SHARED_INFO, START_INFO
from xenpv.frames import HAS_DATA, IS_TABLE, PAGE_SIZE, DomId
from xenpv.host.model.host import SHUTDOWN_SUSPEND, ModelHost
from xenpv.source.saved import SavedDomain


def restored_from(path: Path, target: ModelHost, *, suspended: bool = False) -> DomId:
    """A domain on ``target`` that runs from where it was suspended, when it is asked to.

    ``suspended``: one that has not gone on yet, as it was when it was saved; of its p2m only the list at p2m_vaddr.
    """
    with SavedDomain.open(str(path)) as saved:
        contents = saved.contents
        width = contents.width
        pfns = contents.index.pfns(HAS_DATA)
        domid = target.create(width, max_pages=len(pfns) + 8)
        target.populate_physmap(domid, np.zeros(7, np.uint64))  # so that on the same seed mfns do not come out the same
        target.hypervisor.decrease_reservation(domid, target.frames.owned(domid + 1)[1:])
        new = target.populate_physmap(domid, pfns)
        assert len(new) == len(pfns)
        at = dict(zip(pfns.tolist(), new.tolist(), strict=True))
        pages, kinds = saved.frames.pages(pfns), saved.frames.types(pfns)
        row_of = {pfn: row for row, pfn in enumerate(pfns.tolist())}
        for row in np.flatnonzero(IS_TABLE[kinds]).tolist():
            ptes = pages[row].view("<u8")
            for slot in np.flatnonzero(ptes & np.uint64(PTE_P)).tolist():
                pte = int(ptes[slot])
                ptes[slot] = pte & ~PTE_FRAME_MASK | at[(pte & PTE_FRAME_MASK) >> 12] << 12
        per = PAGE_SIZE // width
        for place, frame in enumerate(contents.p2m_frames.tolist()):
            leaf = pages[row_of[frame]].view(f"<u{width}")
            leaf[:] = [at.get(pfn, 256**width - 1) for pfn in range(place * per, (place + 1) * per)]
        context = np.frombuffer(bytearray(contents.vcpus[0].basic.context), VCPU_GUEST_CONTEXT[width])  # type: ignore[union-attr]
        shared = bytearray(contents.shared_info.data)  # type: ignore[union-attr]
        record = int(context["user_regs"]["rdx" if width == 8 else "edx"][0])
        start = pages[row_of[record]][: START_INFO.size(width)].view(START_INFO[width])
        if suspended:
            context["user_regs"]["rdx" if width == 8 else "edx"] = at[record]
        else:
            start["shared_info"], start["flags"] = target.info(domid).shared_info_mfn * PAGE_SIZE, 0
            start["nr_pages"] = contents.end_pfn + 1
            start["store_mfn"] = at[int(start["store_mfn"][0])]
            start["console"]["domU"]["mfn"] = at[int(start["console"]["domU"]["mfn"][0])]
        target.write_frames(domid, new, pages)
        top = int(context["ctrlreg"][0, 3])
        mfn = at[top >> 12 if width == 8 else (top >> 12 | top << 20) & 0xFFFF_FFFF]
        context["ctrlreg"][0, 3] = mfn << 12 if width == 8 else (mfn << 12 | mfn >> 20) & 0xFFFF_FFFF
        if width == 8 and context["ctrlreg"][0, 1]:
            context["ctrlreg"][0, 1] = at[int(context["ctrlreg"][0, 1]) >> 12] << 12
        gdt, used = context["gdt_frames"][0], -(-int(context["gdt_ents"][0]) // 512)
        gdt[:used] = [at[pfn] for pfn in gdt[:used].tolist()]
        for pfn, kind in zip(pfns.tolist(), kinds.tolist(), strict=True):
            if kind & 8:
                target.hypervisor.pin(domid, at[pfn], kind & 7)
        anchor = SHARED_INFO.offset(width, "arch.pfn_to_mfn_frame_list_list")
        shared[anchor : anchor + width] = bytes(width)
        if suspended:
            list_top = SHARED_INFO.offset(width, "arch.p2m_cr3")
            shared[list_top : list_top + width] = int(context["ctrlreg"][0, 3]).to_bytes(width, "little")
        target.write_shared_info(domid, bytes(shared))
        target.set_vcpu_context(domid, 0, context.tobytes())
        target.unpause(domid)
        if suspended:
            target.hypervisor.shutdown(domid, SHUTDOWN_SUSPEND)
        return domid
