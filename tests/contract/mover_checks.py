"""What every Mover must do: functions of a host and the width of the domains to move.

They run on ModelHost always, and on XenHost in the lab (mover_on_xen.py). Each leaves the host as it was.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from struct import pack

import numpy as np

from tests.contract import tiny_guest
from tests.contract.host_checks import NO_DOMAIN, array, fails
from tests.contract.toolstack_checks import domain, levels, pfns, top_level, with_tables
from xenpv.abi.declare import Width
from xenpv.abi.domctl import CPUID_LEAF, EXT_VCPUCONTEXT, MSR_ENTRY, VCPU_MSR
from xenpv.abi.x86 import PAGE_SIZE
from xenpv.abi.xen import SHARED_INFO
from xenpv.errors import HostError
from xenpv.frames import DomId
from xenpv.host.protocol import CpuPolicy, Mover, TscInfo, VcpuState

KERNEL_RING: dict[Width, int] = {8: 3, 4: 1}
MAX_PFN: dict[Width, int] = {8: SHARED_INFO.offset(8, "arch.max_pfn"), 4: SHARED_INFO.offset(4, "arch.max_pfn")}
UNKNOWN = 0x12345  # neither a leaf nor an MSR


def extended(width: Width, **changes: int) -> bytes:
    """Return an extended context in the form in which Xen returns it."""
    context = np.zeros(1, EXT_VCPUCONTEXT[8])
    context["size"] = EXT_VCPUCONTEXT.size(8)
    context["syscall32_callback_eip"], context["sysenter_callback_eip"] = 0xFFFF_8800_0000_1000, 0x7FFF_F000
    context["syscall32_callback_cs"] = context["sysenter_callback_cs"] = 0xE030 | KERNEL_RING[width]
    context["syscall32_disables_events"] = 1
    for name, value in changes.items():
        context[name] = value
    return context.tobytes()


def max_pfn(entries: int, width: Width) -> bytes:
    """Return arch.max_pfn as shared info has it."""
    return entries.to_bytes(width, "little")


def xsave() -> bytes:
    """Return the xsave area of a vcpu that has used x87 and SSE."""
    area = bytearray(576)
    area[0:2], area[24:28] = pack("<H", 0x37F), pack("<I", 0x1F80)
    area[160:176], area[512:520] = bytes(range(16)), pack("<Q", 3)
    return pack("<QQ", 3, 3) + bytes(area)


def without_vcpu_number(state: VcpuState) -> VcpuState:
    """Return the state without the vcpu's number, the first member of its extended context."""
    return VcpuState(state.extended[4:], state.xsave, state.msrs)


def enable_log_dirty(host: Mover, domid: DomId) -> bool:
    """Enable log-dirty. Whether this Xen has it; if not, check that each call raises EOPNOTSUPP."""
    try:
        host.log_dirty(domid, on=True)
    except HostError as error:
        assert error.errno == errno.EOPNOTSUPP, error  # noqa: PT017  not only for pytest
        fails(lambda: host.log_dirty(domid, on=False), errno.EOPNOTSUPP, domid)
        fails(lambda: host.dirty_pfns(domid, 64, clean=False), errno.EOPNOTSUPP, domid)
        return False
    return True


def dirty_pfns(host: Mover, domid: DomId, pages: int, *, clean: bool = True) -> list[int]:
    pfns = host.dirty_pfns(domid, pages, clean=clean)
    assert pfns.dtype == np.uint64
    dirty: list[int] = pfns.tolist()
    assert dirty == sorted(set(dirty))
    return dirty


def vcpu_state_moves_to_another_domain(host: Mover, width: Width) -> None:
    with domain(host, width, vcpus=3) as one, domain(host, width, vcpus=2) as two:
        fresh = host.vcpu_state(one, 2)
        assert fresh.extended[:8] == pack("<II", 2, EXT_VCPUCONTEXT.size(8))
        assert len(fresh.msrs) % VCPU_MSR.size(8) == 0
        host.set_vcpu_state(one, 2, VcpuState())
        assert host.vcpu_state(one, 2) == fresh
        caps = int(EXT_VCPUCONTEXT.read(fresh.extended, 8)["vmce"]["caps"])
        context = bytearray(extended(width, vcpu=77))
        context[EXT_VCPUCONTEXT.offset(8, "vmce") :][:8] = pack("<Q", caps)
        host.set_vcpu_state(one, 2, VcpuState(extended=bytes(context)))
        state = host.vcpu_state(one, 2)
        assert state.extended[4:26] == bytes(context[4:26])
        assert (state.extended[:4], state.xsave, state.msrs) == (pack("<I", 2), fresh.xsave, fresh.msrs)
        host.set_vcpu_state(one, 2, VcpuState(xsave=xsave()))
        state = host.vcpu_state(one, 2)
        assert state.xsave == xsave()
        host.set_vcpu_state(two, 0, state)
        assert without_vcpu_number(host.vcpu_state(two, 0)) == without_vcpu_number(state)
        assert without_vcpu_number(host.vcpu_state(two, 1)) == without_vcpu_number(fresh)


def set_vcpu_state_raises_the_ring_of_callbacks(host: Mover, width: Width) -> None:
    with domain(host, width) as domid:
        given = extended(width, syscall32_callback_cs=0xE030, sysenter_callback_cs=0)
        host.set_vcpu_state(domid, 0, VcpuState(extended=given))
        context = EXT_VCPUCONTEXT.read(host.vcpu_state(domid, 0).extended, 8)
        assert context["syscall32_callback_cs"] == 0xE030 | KERNEL_RING[width]
        assert context["sysenter_callback_cs"] == KERNEL_RING[width]


def set_vcpu_state_of_invalid_state_raises_einval(host: Mover, width: Width) -> None:
    with domain(host, width, vcpus=2) as domid:
        before = host.vcpu_state(domid, 1)
        for bad in (-1, 2, 1 << 33):
            fails(lambda bad=bad: host.vcpu_state(domid, bad), errno.EINVAL, domid)  # type: ignore[misc]
            fails(lambda bad=bad: host.set_vcpu_state(domid, bad, before), errno.EINVAL, domid)  # type: ignore[misc]
        unknown = pack("<IIQ", UNKNOWN, 0, 1)
        for state in (
            VcpuState(extended=b"abc"),
            VcpuState(extended=before.extended[:31]),
            VcpuState(extended=bytes(129)),
            VcpuState(extended=extended(width, size=31)),
            VcpuState(extended=extended(width, sysenter_callback_eip=1 << 63)),
            VcpuState(xsave=b"abc"),
            VcpuState(xsave=bytes(1 << 16)),
            VcpuState(xsave=bytes((1 << 20) + 1)),
            VcpuState(msrs=b"abc"),
            VcpuState(msrs=unknown),
            VcpuState(msrs=unknown * 1000),
        ):
            fails(lambda state=state: host.set_vcpu_state(domid, 1, state), errno.EINVAL, domid)  # type: ignore[misc]
        assert host.vcpu_state(domid, 1) == before


def tsc_info_moves_to_another_domain(host: Mover, width: Width) -> None:
    """Xen counts the hosts that a domain has been on: each set_tsc_info adds 1 to the incarnation."""
    with domain(host, width) as domid:
        info = host.tsc_info(domid)
        assert (info.mode, info.incarnation) == (0, 1)
        assert info.khz > 0
        for mode in (1, 0):
            given = TscInfo(mode, 1_234_567, 10**12, 7)
            host.set_tsc_info(domid, given)
            info = host.tsc_info(domid)
            assert (info.mode, info.khz, info.incarnation) == (mode, given.khz, 8)
            assert 10**12 <= info.nsec < 10**12 + 10**11
        host.set_tsc_info(domid, TscInfo(2, 1_234_567, 10**12, 1))
        assert host.tsc_info(domid) == TscInfo(2, 0, 0, 2)
        for mode in (3, 9):
            fails(lambda mode=mode: host.set_tsc_info(domid, TscInfo(mode, 1, 1, 1)), errno.EINVAL, domid)  # type: ignore[misc]
        assert host.tsc_info(domid) == TscInfo(2, 0, 0, 2)


def cpu_policy_moves_to_a_new_domain(host: Mover, width: Width) -> None:
    with domain(host, width) as one, domain(host, width) as two:
        policy = host.cpu_policy(one)
        assert policy.leaves
        assert policy.msrs
        assert len(policy.leaves) % CPUID_LEAF.size(8) == len(policy.msrs) % MSR_ENTRY.size(8) == 0
        host.set_cpu_policy(two, policy)
        assert host.cpu_policy(two) == policy
        for part in (CpuPolicy(), CpuPolicy(leaves=policy.leaves), CpuPolicy(msrs=policy.msrs)):
            host.set_cpu_policy(two, part)
            assert host.cpu_policy(two) == policy


def set_cpu_policy_names_the_leaf_or_msr_it_refuses(host: Mover, width: Width) -> None:
    with domain(host, width) as domid:
        before = host.cpu_policy(domid)
        leaf, msr = pack("<6I", UNKNOWN, 0xFFFF_FFFF, 0, 0, 0, 0), pack("<IIQ", UNKNOWN, 0, 0)
        for policy, number, named in (
            (CpuPolicy(leaves=leaf), errno.ERANGE, "leaf 0x12345"),
            (CpuPolicy(msrs=msr), errno.ERANGE, "MSR 0x12345"),
            (CpuPolicy(leaves=before.leaves[:-1]), errno.EINVAL, "struct xen_cpuid_leaf"),
            (CpuPolicy(msrs=before.msrs + b"x"), errno.EINVAL, "struct xen_msr_entry"),
            (CpuPolicy(leaves=leaf * 1000), errno.E2BIG, "1000 leaves"),
            (CpuPolicy(msrs=msr * 1000), errno.E2BIG, "1000 MSRs"),
        ):
            try:
                host.set_cpu_policy(domid, policy)
            except HostError as error:
                assert (error.errno, error.domid) == (number, domid), error  # noqa: PT017  not only for pytest
                assert named in str(error), error  # noqa: PT017
            else:
                raise AssertionError(named)
        assert host.cpu_policy(domid) == before


def set_cpu_policy_after_the_domain_ran_raises_eexist(host: Mover, width: Width) -> None:
    with domain(host, width, tiny_guest.PAGES) as domid:
        if width == 8:
            tiny_guest.build(host, domid, width)
        policy = host.cpu_policy(domid)
        host.set_cpu_policy(domid, policy)
        host.unpause(domid)
        fails(lambda: host.set_cpu_policy(domid, policy), errno.EEXIST, domid)
        assert host.cpu_policy(domid) == policy


def log_dirty_is_enabled_and_disabled_repeatedly(host: Mover, width: Width) -> None:
    with domain(host, width) as domid:
        if not enable_log_dirty(host, domid):
            return
        for _ in range(2):
            assert dirty_pfns(host, domid, 64) == []
            fails(lambda: host.log_dirty(domid, on=True), errno.EINVAL, domid)
            host.log_dirty(domid, on=False)
            fails(lambda: host.log_dirty(domid, on=False), errno.EINVAL, domid)
            for clean in (False, True):
                fails(lambda clean=clean: host.dirty_pfns(domid, 64, clean=clean), errno.EINVAL, domid)  # type: ignore[misc]
            host.log_dirty(domid, on=True)
        assert dirty_pfns(host, domid, 0) == []  # and it is destroyed with the log on


def log_dirty_ignores_writes_of_the_toolstack(host: Mover, width: Width) -> None:
    """But what Xen does for it is: tables that it pins."""
    with domain(host, width) as domid:
        mfns = with_tables(host, domid, width)
        if not enable_log_dirty(host, domid):
            return
        some = mfns[[tiny_guest.CODE, tiny_guest.STACK]]
        host.write_frames(domid, some, np.full((2, PAGE_SIZE), 1, np.uint8))
        with host.map_writable(domid, some) as pages:
            pages[:] = 2
        host.write_shared_info(domid, b"x")
        host.init_hypercall_page(domid, int(mfns[tiny_guest.HYPERCALLS]))
        host.map_frames(domid, mfns)
        assert len(host.populate_physmap(domid, pfns(2, 20))) == 2
        assert dirty_pfns(host, domid, 64) == []
        host.pin_tables(domid, mfns[[tiny_guest.top_table(width)]], levels(top_level(width)))
        which = [tiny_guest.L1, tiny_guest.L2, tiny_guest.L3, tiny_guest.L4][: top_level(width)]
        assert dirty_pfns(host, domid, 64, clean=False) == which
        host.set_vcpu_context(domid, 0, tiny_guest.context(int(mfns[tiny_guest.top_table(width)]), width))
        assert dirty_pfns(host, domid, 64) == which
        assert dirty_pfns(host, domid, 64) == []
        host.log_dirty(domid, on=False)


def log_dirty_logs_sparse_pfns(host: Mover, width: Width) -> None:
    """Also where the log takes more memory than Xen gives it for so few; those beyond what is asked are not."""
    with domain(host, width, 2000) as domid:
        far = [*range(0, 1000 << 15, 1 << 15), (1 << 28) + 7]
        host.write_shared_info(domid, max_pfn(far[-1] + 1, width), MAX_PFN[width])
        mfns = host.populate_physmap(domid, array(*far))
        host.write_frames(domid, mfns, np.zeros((len(far), PAGE_SIZE), np.uint8))
        if not enable_log_dirty(host, domid):
            return
        host.pin_tables(domid, mfns, np.ones(len(far), np.uint8))
        assert dirty_pfns(host, domid, far[-1] + 1, clean=False) == far
        assert dirty_pfns(host, domid, far[-1], clean=False) == far[:-1]
        assert dirty_pfns(host, domid, far[500], clean=False) == far[:500]
        assert dirty_pfns(host, domid, far[500] + 1) == far[:501]
        assert dirty_pfns(host, domid, far[-1] + 1) == far[501:]


def request_shutdown_is_withdrawn_by_an_empty_request(host: Mover, width: Width) -> None:
    with domain(host, width, tiny_guest.PAGES) as domid:
        assert host.shutdown_request(domid) == ""
        host.request_shutdown(domid, "")
        assert host.shutdown_request(domid) == ""
        host.request_shutdown(domid, "suspend")
        assert host.shutdown_request(domid) == "suspend"
        host.request_shutdown(domid, "")
        assert host.shutdown_request(domid) == ""


def devices_leave_out_console_and_suspend_channel(host: Mover, width: Width) -> None:
    with domain(host, width, tiny_guest.PAGES) as domid:
        assert host.devices(domid) == []


def resume_of_a_domain_that_did_not_shut_down_does_nothing(host: Mover, width: Width) -> None:
    with domain(host, width) as domid:
        host.resume(domid)
        assert (host.info(domid).paused, host.info(domid).shutdown) == (True, False)


def mover_calls_for_an_absent_domain_raise_esrch(host: Mover, width: Width) -> None:
    for call in (
        lambda: host.vcpu_state(NO_DOMAIN, 0),
        lambda: host.set_vcpu_state(NO_DOMAIN, 0, VcpuState(extended(width))),
        lambda: host.tsc_info(NO_DOMAIN),
        lambda: host.set_tsc_info(NO_DOMAIN, TscInfo()),
        lambda: host.cpu_policy(NO_DOMAIN),
        lambda: host.set_cpu_policy(NO_DOMAIN, CpuPolicy()),
        lambda: host.log_dirty(NO_DOMAIN, on=True),
        lambda: host.log_dirty(NO_DOMAIN, on=False),
        lambda: host.dirty_pfns(NO_DOMAIN, 64, clean=True),
        lambda: host.request_shutdown(NO_DOMAIN, "suspend"),
        lambda: host.request_shutdown(NO_DOMAIN, ""),
        lambda: host.shutdown_request(NO_DOMAIN),
        lambda: host.devices(NO_DOMAIN),
        lambda: host.resume(NO_DOMAIN),
    ):
        fails(call, errno.ESRCH, NO_DOMAIN)


MOVER_CHECKS: tuple[Callable[[Mover, Width], None], ...] = (
    vcpu_state_moves_to_another_domain,
    set_vcpu_state_raises_the_ring_of_callbacks,
    set_vcpu_state_of_invalid_state_raises_einval,
    tsc_info_moves_to_another_domain,
    cpu_policy_moves_to_a_new_domain,
    set_cpu_policy_names_the_leaf_or_msr_it_refuses,
    set_cpu_policy_after_the_domain_ran_raises_eexist,
    log_dirty_is_enabled_and_disabled_repeatedly,
    log_dirty_ignores_writes_of_the_toolstack,
    log_dirty_logs_sparse_pfns,
    request_shutdown_is_withdrawn_by_an_empty_request,
    devices_leave_out_console_and_suspend_channel,
    resume_of_a_domain_that_did_not_shut_down_does_nothing,
    mover_calls_for_an_absent_domain_raise_esrch,
)
