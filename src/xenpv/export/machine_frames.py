"""A domain as its host's machine frames have it: what `xl dump-core` shows, mfns in page tables and registers."""

from __future__ import annotations

import numpy as np

from xenpv.abi.x86 import GDT_ENTRIES_PER_FRAME, LEVELS, PTE_A, PTE_D, PTE_NX, PTE_P, PTE_RW, VCPU_GUEST_CONTEXT
from xenpv.errors import RequestError
from xenpv.frames import IS_TABLE, NO_FRAME, U8, U64
from xenpv.memory.pagetables import as_entries, cr3_frame, cr3_of, localise
from xenpv.source.core_page_tables import LINEAR_PT_SLOT
from xenpv.source.domain import Domain

_LINEAR_PT_FLAGS = np.uint64(PTE_P | PTE_RW | PTE_A | PTE_D | PTE_NX)  # __PAGE_HYPERVISOR_RW


class Machine:
    """A PV domain's pfns turned back into mfns by its own p2m. Of a saved domain, those of the host that saved it."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self.lost = 0  # pages of which the p2m has no mfn
        if domain.saved is not None and not domain.has_p2m:
            raise RequestError(f"{domain.name}: names no p2m, and a core of xl's has the mfn of each page")
        self._p2m = domain.p2m

    def mfns_of(self, pfns: U64) -> U64:
        """The machine frame of each pfn of the table behind the pages, NO_FRAME for one that has none."""
        mfns = self._p2m.lookup(pfns)
        self.lost += int(np.count_nonzero(mfns == NO_FRAME))
        return mfns

    def localised(self, pfns: U64, content: U8) -> U8:
        """Pages as they are on the host: tables have mfns; of Xen's own entries only the one of each L4 that names
        itself, by which such tables are known.
        """
        kinds = self._domain.frames.types(pfns)
        tables = IS_TABLE[kinds]
        if tables.any():
            local, _ = localise(as_entries(content[tables]), self._p2m.lookup)
            if self._domain.width == 8:
                tops = kinds[tables] & 7 == LEVELS[8]
                local[tops, LINEAR_PT_SLOT] = self._p2m.lookup(pfns[tables][tops]) << np.uint64(12) | _LINEAR_PT_FLAGS
            content[tables] = local.view(np.uint8).reshape(-1, content.shape[1])
        return content

    def contexts(self) -> list[bytes]:
        """The vcpu_guest_context of each vcpu that is known; of a saved domain, its pfns turned into mfns."""
        found = [(vcpu, self._domain.vcpu_context(vcpu)) for vcpu in self._domain.vcpus]
        return [self._context(vcpu, context) for vcpu, context in found if context is not None]

    def _context(self, vcpu: int, context: np.void) -> bytes:
        """The fields that a saver normalises (xen.git:tools/libs/guest/xg_sr_save_x86_pv.c write_one_vcpu_basic())."""
        if self._domain.saved is None:
            return context.tobytes()
        width = self._domain.width
        data = bytearray(context.tobytes())  # its padding, too, which a copy of the struct would make anything
        mine = VCPU_GUEST_CONTEXT.read(data, width)
        if vcpu == 0:  # who suspends names start info
            name = "rdx" if width == 8 else "edx"
            mine["user_regs"][name] = self._mfn(int(mine["user_regs"][name]))
        mine["ctrlreg"][3] = cr3_of(self._mfn(cr3_frame(int(mine["ctrlreg"][3]), width)), width)
        if width == 8 and int(mine["ctrlreg"][1]) & 1:
            mine["ctrlreg"][1] = cr3_of(self._mfn(int(mine["ctrlreg"][1]) >> 12), width)
        for n in range(min(-(-int(mine["gdt_ents"]) // GDT_ENTRIES_PER_FRAME), len(mine["gdt_frames"]))):
            mine["gdt_frames"][n] = self._mfn(int(mine["gdt_frames"][n]))
        return bytes(data)

    def _mfn(self, pfn: int) -> int:
        """Of one pfn; a pfn that has none stays as it is."""
        mfn = self._p2m.lookup(np.array([pfn], np.uint64))[0]
        return pfn if mfn == NO_FRAME else int(mfn)
