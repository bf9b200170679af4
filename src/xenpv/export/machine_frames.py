"""MachineFrames: page tables and registers with mfns, as in `xl dump-core`."""

from __future__ import annotations

import numpy as np

from xenpv.abi.x86 import GDT_ENTRIES_PER_FRAME, PTE_A, PTE_D, PTE_NX, PTE_P, PTE_RW, VCPU_GUEST_CONTEXT
from xenpv.errors import RequestError
from xenpv.frames import IS_TABLE, NO_FRAME, PAGE_SHIFT, PAGE_SIZE, PINNED, U8, U64, PageType
from xenpv.memory.page_tables import as_ptes, cr3_to_frame, frame_to_cr3, localise
from xenpv.source.core_page_tables import LINEAR_PT_SLOT
from xenpv.source.domain import Domain

_LINEAR_PT_FLAGS = np.uint64(PTE_P | PTE_RW | PTE_A | PTE_D | PTE_NX)  # __PAGE_HYPERVISOR_RW


class MachineFrames:
    """A PV domain with mfns in the place of pfns, by its own p2m.

    The mfns are those of its host, or of the host that saved it.

    Attributes:
        pages_without_mfn: Pages for which ``mfns_of`` found no mfn.
    """

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self.pages_without_mfn = 0
        if domain.saved is not None and not domain.has_p2m:
            raise RequestError(f"{domain.name}: the stream has no p2m, so its mfns are unknown; use another format")
        self._p2m = domain.p2m

    def mfns_of(self, pfns: U64) -> U64:
        """Return the mfn of each page, NO_FRAME for a page without one; and count those."""
        mfns = self._p2m.lookup(pfns)
        self.pages_without_mfn += int(np.count_nonzero(mfns == NO_FRAME))
        return mfns

    def localise_pages(self, pfns: U64, pages: U8) -> U8:
        """Return pages with mfns in page tables, both uint8 of shape (n, 4096).

        Of Xen's own entries only the linear page table in each L4 is filled in: readers know L4 tables by it.
        """
        page_types = self._domain.frames.types(pfns)
        is_table = IS_TABLE[page_types]
        if is_table.any():
            entries, _ = localise(as_ptes(pages[is_table]), self._p2m.lookup)
            if self._domain.width == 8:
                is_l4 = page_types[is_table] & ~np.uint8(PINNED) == PageType.L4TAB
                own_mfns = self._p2m.lookup(pfns[is_table][is_l4])
                entries[is_l4, LINEAR_PT_SLOT] = own_mfns << np.uint64(PAGE_SHIFT) | _LINEAR_PT_FLAGS
            pages[is_table] = entries.view(np.uint8).reshape(-1, PAGE_SIZE)
        return pages

    def vcpu_contexts(self) -> list[bytes]:
        """Return the vcpu_guest_context of each vcpu that is known, with mfns."""
        contexts = [(vcpu, self._domain.vcpu_context(vcpu)) for vcpu in self._domain.vcpus]
        return [self._localise_context(vcpu, context) for vcpu, context in contexts if context is not None]

    def _localise_context(self, vcpu: int, context: np.void) -> bytes:
        """Turn pfns into mfns in the fields that a saver normalises.

        Only saved domains have pfns there.

        Source: xen.git:tools/libs/guest/xg_sr_save_x86_pv.c write_one_vcpu_basic().
        """
        if self._domain.saved is None:
            return context.tobytes()
        width = self._domain.width
        data = bytearray(context.tobytes())  # a copy of the struct would not keep its padding
        fields = VCPU_GUEST_CONTEXT.read(data, width)
        if vcpu == 0:  # the third argument of the suspend hypercall is the frame of start info
            rdx = "rdx" if width == 8 else "edx"
            fields["user_regs"][rdx] = self._mfn_or_pfn(int(fields["user_regs"][rdx]))
        cr = fields["ctrlreg"]
        cr[3] = frame_to_cr3(self._mfn_or_pfn(cr3_to_frame(int(cr[3]), width)), width)
        if width == 8 and int(cr[1]) & 1:  # the user half's top table
            cr[1] = frame_to_cr3(self._mfn_or_pfn(int(cr[1]) >> PAGE_SHIFT), width)
        gdt = fields["gdt_frames"]
        for i in range(min(-(-int(fields["gdt_ents"]) // GDT_ENTRIES_PER_FRAME), len(gdt))):
            gdt[i] = self._mfn_or_pfn(int(gdt[i]))
        return bytes(data)

    def _mfn_or_pfn(self, pfn: int) -> int:
        """Return the mfn of a pfn, or the pfn itself if it has none."""
        mfn = self._p2m.lookup(np.array([pfn], np.uint64))[0]
        return pfn if mfn == NO_FRAME else int(mfn)
