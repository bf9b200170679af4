"""The modelled hypervisor's state of a domain and its vcpus, except frames."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import LEVELS, VCPU_GUEST_CONTEXT
from xenpv.cpu.context import iter_context_refusals
from xenpv.frames import DomId
from xenpv.host.model.cpu_state import CPU_KHZ, initial_cpu_policy, initial_vcpu_state
from xenpv.host.model.dirty_log import DirtyLog
from xenpv.host.model.page_types import DESCRIPTORS, HypercallError, Owner, PageTypes
from xenpv.host.protocol import CpuPolicy, DomainInfo, TscInfo, VcpuState
from xenpv.memory.page_tables import cr3_to_frame, frame_to_cr3

PAE_EXTENDED_CR3 = 1 << 3  # VMASST_TYPE_pae_extended_cr3
_GDT_ENTRIES_MAX = 14 * 512  # FIRST_RESERVED_GDT_ENTRY: those above are Xen's


@dataclass
class Vcpu:
    """A vcpu: its context, and the frames that Xen holds for it.

    Names are those of Xen's struct arch_vcpu.
    """

    context: bytes | None = None  # as it was set; None: not initialised
    guest_table: int = 0  # mfn of its top-level page table
    guest_table_user: int = 0  # mfn of the top-level page table of its user half; 64-bit only, 0: none
    gdt_frames: tuple[int, ...] = ()
    state: VcpuState = field(default_factory=initial_vcpu_state)

    def set_context(self, types: PageTypes, owner: Owner, data: bytes, *, vcpu: int) -> None:
        """XEN_DOMCTL_setvcpucontext. Raises HypercallError.

        Loading cr3 and the GDT validates the tables below.

        An initialised vcpu keeps its tables and its GDT.

        Source: xen.git:xen/arch/x86/domain.c: arch_set_info_guest()
        """
        context = VCPU_GUEST_CONTEXT.read(data, owner.width)
        for number, reason in iter_context_refusals(context, owner.width, vcpu=vcpu):
            raise HypercallError(number, reason)
        guest_table = cr3_to_frame(int(context["ctrlreg"][3]), owner.width)
        guest_table_user = cr3_to_frame(int(context["ctrlreg"][1]), 8) if owner.width == 8 else 0
        gdt_entries = int(context["gdt_ents"])
        if gdt_entries > _GDT_ENTRIES_MAX:
            raise HypercallError(errno.EINVAL, f"a GDT of {gdt_entries} entries overlaps Xen's own entries")
        gdt_frames = tuple(context["gdt_frames"][: -(-gdt_entries // 512)].tolist())
        if self.context is not None:
            if (guest_table, guest_table_user, gdt_frames) != (
                self.guest_table,
                self.guest_table_user,
                self.gdt_frames,
            ):
                raise HypercallError(errno.EOPNOTSUPP, "an initialised vcpu keeps its tables and its GDT")
            self.context = data
            return
        references = [(mfn, DESCRIPTORS) for mfn in gdt_frames] + [(guest_table, LEVELS[owner.width])]
        references += [(guest_table_user, 4)] if guest_table_user else []
        referenced_mfns = list[int]()
        try:
            for mfn, page_type in references:
                types.get_page_type(owner, mfn, page_type)
                referenced_mfns.append(mfn)
        except HypercallError:
            for mfn in reversed(referenced_mfns):
                types.put_page_type(owner, mfn)
            raise
        self.context, self.gdt_frames = data, gdt_frames
        self.guest_table, self.guest_table_user = guest_table, guest_table_user

    def get_context(self, width: Width) -> bytes:
        """XEN_DOMCTL_getvcpucontext: the context, with the tables that are loaded now."""
        assert self.context is not None
        context = np.frombuffer(bytearray(self.context), VCPU_GUEST_CONTEXT[width])
        ctrlreg = context["ctrlreg"][0]
        ctrlreg[3] = frame_to_cr3(self.guest_table, width)
        if width == 8:
            ctrlreg[1] = self.guest_table_user << 12
        return context.tobytes()

    def load_guest_table(self, types: PageTypes, owner: Owner, mfn: int) -> None:
        """MMUEXT_NEW_BASEPTR. Raises HypercallError."""
        if mfn == self.guest_table:
            return
        types.get_page_type(owner, mfn, LEVELS[owner.width])
        if self.guest_table:
            types.put_page_type(owner, self.guest_table)
        self.guest_table = mfn

    def load_guest_table_user(self, types: PageTypes, owner: Owner, mfn: int) -> None:
        """MMUEXT_NEW_USER_BASEPTR; 0 for none. Raises HypercallError."""
        if mfn == self.guest_table_user:
            return
        if mfn:
            types.get_page_type(owner, mfn, 4)
        if self.guest_table_user:
            types.put_page_type(owner, self.guest_table_user)
        self.guest_table_user = mfn


@dataclass
class ModelDomain:
    """A domain of the model."""

    domid: DomId
    width: Width
    name: str | None
    uuid: str | None
    vcpus: list[Vcpu]
    max_pages: int = 0
    memory_map_pages: int | None = None  # what XENMEM_memory_map tells the guest: this many from pfn 0; None: not set
    shared_info_mfn: int = 0
    pauses: int = 1
    shutdown_reason: int | None = None
    dirty_log: DirtyLog | None = None  # None: log-dirty is disabled
    ports: list[int] = field(default_factory=list)  # the domid that may bind each event channel, port 1 first
    pending_events: set[int] = field(default_factory=set)  # ports
    grants: dict[int, int] = field(default_factory=dict)  # mfn by reserved entry of the grant table
    vm_assist: int = 0
    tsc: TscInfo = field(default_factory=lambda: TscInfo(khz=CPU_KHZ, incarnation=1))
    has_run: bool = False
    policy: CpuPolicy = field(default_factory=initial_cpu_policy)
    config: bytes = b""  # its configuration, as libxl keeps it
    time_slice: Callable[[], None] | None = None  # see ModelHost.set_time_slice

    @property
    def owner_id(self) -> int:
        """The number of this owner in the frame table."""
        return self.domid + 1

    @property
    def owner(self) -> Owner:
        """The domain as page types know it."""
        started = bool(self.vcpus) and self.vcpus[0].context is not None
        low_l3 = self.width == 4 and started and not self.vm_assist & PAE_EXTENDED_CR3
        return Owner(self.owner_id, self.width, low_l3)

    def info(self, pages: int) -> DomainInfo:
        """Return the DomainInfo of a domain that holds so many pages."""
        return DomainInfo(
            domid=self.domid,
            name=self.name,
            uuid=self.uuid,
            hvm=False,
            width=self.width,
            pages=pages,
            max_pages=self.max_pages,
            shared_info_mfn=self.shared_info_mfn,
            max_vcpu=len(self.vcpus) - 1,
            paused=self.pauses > 0,
            shutdown=self.shutdown_reason is not None,
            shutdown_reason=self.shutdown_reason,
            dying=False,
        )
