"""What ModelHost knows of a domain, but for its frames."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import LEVELS, VCPU_GUEST_CONTEXT
from xenpv.frames import DomId
from xenpv.host.model.dirty_log import DirtyLog
from xenpv.host.model.page_types import DESCRIPTORS, Owner, PageTypes, Refused
from xenpv.host.model.vcpu_state import CPU_KHZ, bare_policy, bare_state
from xenpv.host.protocol import CpuPolicy, DomainInfo, TscInfo, VcpuState
from xenpv.memory.pagetables import cr3_frame, cr3_of

PAE_EXTENDED_CR3 = 1 << 3  # VMASST_TYPE_pae_extended_cr3


@dataclass
class Vcpu:
    """A vcpu: its context as it was set, and which frames Xen holds for it."""

    context: bytes | None = None  # None until it was set: not initialised
    top: int = 0  # mfn of its top table
    user_top: int = 0  # of the user half's, 64-bit only
    gdt: tuple[int, ...] = ()
    state: VcpuState = field(default_factory=bare_state)


@dataclass
class Domain:
    """One domain."""

    domid: DomId
    width: Width
    name: str | None
    uuid: str | None
    vcpus: list[Vcpu]
    max_pages: int = 0
    memory_map: int | None = None  # pages, from pfn 0 on, that it is told it has; None: nobody said
    shared_info_mfn: int = 0
    pauses: int = 1
    shutdown_reason: int | None = None
    dirty: DirtyLog | None = None
    ports: list[int] = field(default_factory=list)  # who may bind each event channel that was allocated, port 1 first
    events: Counter[int] = field(default_factory=Counter)  # by port
    grants: dict[int, int] = field(default_factory=dict)  # mfn by reserved entry of its grant table
    vm_assist: int = 0
    tsc: TscInfo = field(default_factory=lambda: TscInfo(khz=CPU_KHZ, incarnation=1))
    has_run: bool = False
    policy: CpuPolicy = field(default_factory=bare_policy)
    config: bytes = b""  # what it is made by, for xl
    passes: Callable[[], None] | None = None  # what it does as time passes

    @property
    def number(self) -> int:
        """Of its frames' owner."""
        return self.domid + 1

    @property
    def owner(self) -> Owner:
        started = bool(self.vcpus) and self.vcpus[0].context is not None
        low = self.width == 4 and started and not self.vm_assist & PAE_EXTENDED_CR3
        return Owner(self.number, self.width, low)

    def info(self, pages: int) -> DomainInfo:
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


def set_context(domain: Domain, types: PageTypes, vcpu: Vcpu, data: bytes) -> None:
    """XEN_DOMCTL_setvcpucontext, xen.git:xen/arch/x86/domain.c: arch_set_info_guest(). Raises Refused.

    Loading cr3 validates the tables below it. A vcpu that was set once keeps its tables and its GDT.
    """
    context = VCPU_GUEST_CONTEXT.read(data, domain.width)
    top = cr3_frame(int(context["ctrlreg"][3]), domain.width)
    user_top = cr3_frame(int(context["ctrlreg"][1]), 8) if domain.width == 8 else 0
    entries = int(context["gdt_ents"])
    if entries > 14 * 512:
        raise Refused(errno.EINVAL, f"a GDT of {entries} entries reaches into Xen's own")
    gdt = tuple(context["gdt_frames"][: -(-entries // 512)].tolist())
    if vcpu.context is not None:
        if (top, user_top, gdt) != (vcpu.top, vcpu.user_top, vcpu.gdt):
            raise Refused(errno.EOPNOTSUPP, "an initialised vcpu keeps its tables and its GDT")
        vcpu.context = data
        return
    owner, taken = domain.owner, list[int]()
    wanted = [(mfn, DESCRIPTORS) for mfn in gdt] + [(top, LEVELS[domain.width])]
    try:
        for mfn, kind in wanted + ([(user_top, 4)] if user_top else []):
            types.get(owner, mfn, kind)
            taken.append(mfn)
    except Refused:
        for mfn in reversed(taken):
            types.put(owner, mfn)
        raise
    vcpu.context, vcpu.top, vcpu.user_top, vcpu.gdt = data, top, user_top, gdt


def get_context(domain: Domain, vcpu: Vcpu) -> bytes:
    """The context, with the tables that are loaded now."""
    assert vcpu.context is not None
    context = np.frombuffer(bytearray(vcpu.context), VCPU_GUEST_CONTEXT[domain.width])
    ctrlreg = context["ctrlreg"][0]
    ctrlreg[3] = cr3_of(vcpu.top, domain.width)
    if domain.width == 8:
        ctrlreg[1] = vcpu.user_top << 12
    return context.tobytes()


def load_top(domain: Domain, types: PageTypes, vcpu: Vcpu, mfn: int) -> None:
    """MMUEXT_NEW_BASEPTR. Raises Refused."""
    if mfn == vcpu.top:
        return
    types.get(domain.owner, mfn, LEVELS[domain.width])
    if vcpu.top:
        types.put(domain.owner, vcpu.top)
    vcpu.top = mfn


def load_user_top(domain: Domain, types: PageTypes, vcpu: Vcpu, mfn: int) -> None:
    """MMUEXT_NEW_USER_BASEPTR; 0 for none. Raises Refused."""
    if mfn == vcpu.user_top:
        return
    if mfn:
        types.get(domain.owner, mfn, 4)
    if vcpu.user_top:
        types.put(domain.owner, vcpu.user_top)
    vcpu.user_top = mfn
