"""Records other than memory: vcpus, shared info, TSC and CPU policy.

They come in the order of xen.git:tools/libs/guest/xg_sr_save_x86_pv.c. Empty ones are left out, as there.
"""

from __future__ import annotations

import numpy as np

from xenpv.abi.x86 import (
    FIRST_RESERVED_GDT_ENTRY,
    GDT_ENTRIES_PER_FRAME,
    LEVELS,
    PTE_P,
    VCPU_GUEST_CONTEXT,
    VGCF_ONLINE,
)
from xenpv.abi.xen import START_INFO_MAGIC
from xenpv.errors import GuestError, HostError
from xenpv.frames import NO_FRAME, PAGE_SHIFT
from xenpv.host.protocol import Mover
from xenpv.memory.page_tables import cr3_to_frame, frame_to_cr3
from xenpv.save.suspend import has_suspended
from xenpv.source.live import NO_SUCH_VCPU, LiveDomain
from xenpv.stream.framing import Record
from xenpv.stream.records import (
    CpuidPolicy,
    MsrPolicy,
    SharedInfo,
    StaticDataEnd,
    VcpuBasic,
    VcpuExtended,
    VcpuMsrs,
    VcpuXsave,
    X86PVInfo,
    X86TscInfo,
)


def static_records(host: Mover, live: LiveDomain) -> list[Record]:
    """Return the records of what never changes in a domain, up to STATIC_DATA_END."""
    width = live.info.width
    records: list[Record] = [X86PVInfo(guest_width=width, pt_levels=LEVELS[width])]
    policy = host.cpu_policy(live.info.domid)
    if policy.leaves:
        records.append(CpuidPolicy(data=policy.leaves))
    if policy.msrs:
        records.append(MsrPolicy(data=policy.msrs))
    return [*records, StaticDataEnd()]


def state_records(host: Mover, live: LiveDomain) -> list[Record]:
    """Return the records of the TSC, of shared info and of the online vcpus.

    The domain must be stopped.

    Raises:
        GuestError: A vcpu's context names a frame that is not the domain's, or is invalid.
        HostError: Xen refused something.
    """
    tsc = host.tsc_info(live.info.domid)
    records: list[Record] = [
        X86TscInfo(mode=tsc.mode, khz=tsc.khz, nsec=tsc.nsec, incarnation=tsc.incarnation),
        SharedInfo(data=host.shared_info(live.info.domid)),
    ]
    for vcpu in live.vcpus or [0]:
        context = _context(live, vcpu)
        if context is None:
            continue
        state = host.vcpu_state(live.info.domid, vcpu)
        records.append(VcpuBasic(vcpu_id=vcpu, context=context))
        for kind, data in ((VcpuExtended, state.extended), (VcpuXsave, state.xsave), (VcpuMsrs, state.msrs)):
            if data:
                records.append(kind(vcpu_id=vcpu, context=data))
    return records


def _context(live: LiveDomain, vcpu: int) -> bytes | None:
    """Return a vcpu's context with pfns for mfns; None if the vcpu is offline.

    GuestError for frames not its own.
    """
    width = live.info.width
    try:
        data = bytearray(live.host.vcpu_context(live.info.domid, vcpu))
    except HostError as e:
        live.host.info(live.info.domid)  # ESRCH may be of the domain, too
        if vcpu == 0 or e.errno not in NO_SUCH_VCPU:
            raise
        return None
    context = np.frombuffer(data, VCPU_GUEST_CONTEXT[width])
    if not int(context["flags"][0]) & VGCF_ONLINE:
        if vcpu == 0:
            raise GuestError(
                f"{live.name}: vcpu 0 is offline; a restored guest resumes on vcpu 0: bring it online first"
            )
        return None
    if vcpu == 0:
        register = "rdx" if width == 8 else "edx"
        context["user_regs"][register] = _start_info(live, int(context["user_regs"][register][0]))
    entries = int(context["gdt_ents"][0])
    if entries > FIRST_RESERVED_GDT_ENTRY:
        problem = f"{live.name}: GDT entry count ({entries}) of vcpu{vcpu} out of range"
        raise GuestError(f"{problem} (max {FIRST_RESERVED_GDT_ENTRY})")
    gdt = context["gdt_frames"][0]
    for i in range(-(-entries // GDT_ENTRIES_PER_FRAME)):
        gdt[i] = _pfn(live, f"frame {i} of vcpu{vcpu}'s GDT", int(gdt[i]))
    ctrlreg = context["ctrlreg"][0]
    ctrlreg[3] = frame_to_cr3(_pfn(live, f"vcpu{vcpu}'s cr3", cr3_to_frame(int(ctrlreg[3]), width)), width)
    if width == 8 and ctrlreg[1]:
        cr1 = _pfn(live, f"vcpu{vcpu}'s cr1", int(ctrlreg[1]) >> PAGE_SHIFT)
        ctrlreg[1] = cr1 << PAGE_SHIFT | PTE_P  # libxenguest marks a pfn so
    return bytes(data)


def _start_info(live: LiveDomain, mfn: int) -> int:
    """Return the pfn of the suspend record.

    It must be a start info page, as a restorer writes to it.
    """
    pfn = _pfn(live, "suspend record", mfn)
    page, _ = live.read_p2m_frames(np.array([mfn], np.uint64))
    if not page.tobytes().startswith(START_INFO_MAGIC[live.info.width]):
        problem = f"{live.name}: pfn {pfn:#x}, its suspend record, is no start info page"
        raise GuestError(problem + _unsuspended_hint(live), pfn=pfn)
    return pfn


def _unsuspended_hint(live: LiveDomain) -> str:
    """Return the end of an error message: why a domain may be unfit to be saved.

    Empty if nothing says so.
    """
    info = live.info
    return ": it is stopped, but its kernel has not suspended" if info.is_stopped and not has_suspended(info) else ""


def _pfn(live: LiveDomain, user: str, mfn: int) -> int:
    pfn = int(live.pfns_of(np.array([mfn], np.uint64))[0])
    if pfn == int(NO_FRAME):
        raise bad_mfn(live, user, mfn)
    return pfn


def bad_mfn(live: LiveDomain, user: str, mfn: int) -> GuestError:
    """Return libxenguest's error for an mfn whose m2p and p2m disagree."""
    pfn = live.host.m2p(np.array([mfn], np.uint64))
    other = int(live.p2m.lookup(pfn)[0])
    where = f"mfn {mfn:#x}, m2p[{mfn:#x}] = {int(pfn[0]):#x}, p2m[{int(pfn[0]):#x}] = {other:#x}"
    return GuestError(f"{live.name}: Bad mfn for {user}: {where}{_unsuspended_hint(live)}", mfn=mfn)
