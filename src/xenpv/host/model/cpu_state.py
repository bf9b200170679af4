"""Vcpu state, TSC and CPU policy: the accepted values and how Xen stores them.

Source: xen.git:xen/arch/x86/domctl.c, time.c: tsc_set_info(), xen/lib/x86/cpuid.c: x86_cpuid_copy_from_buffer()
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import pack

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.domctl import EXT_VCPUCONTEXT, EXT_VCPUCONTEXT_MAX, VCPU_MSR, XSAVE_HEADER_SIZE
from xenpv.cpu.policy import POLICY_MSRS, iter_cpuid_policy_refusals, iter_msr_policy_refusals
from xenpv.cpu.state import (
    SSE,
    TSC_NEVER_EMULATE,
    X87,
    YMM,
    Refusal,
    iter_extended_refusals,
    iter_msr_refusals,
    iter_tsc_refusals,
    iter_xsave_refusals,
)
from xenpv.host.model.page_types import HypercallError
from xenpv.host.protocol import CpuPolicy, TscInfo, VcpuState

CPU_KHZ = 1_000_000
XCR0 = X87 | SSE | YMM  # of a CPU with AVX
_NO_SUBLEAF = 0xFFFF_FFFF
_VENDOR = b"AuthcAMDenti"  # as leaves have it: ebx, ecx, edx


def initial_vcpu_state() -> VcpuState:
    """Return the state of a new vcpu."""
    return VcpuState(pack("<II", 0, EXT_VCPUCONTEXT.size(8)).ljust(EXT_VCPUCONTEXT.size(8), b"\0"), bytes(16))


def initial_cpu_policy() -> CpuPolicy:
    """Return the CPU policy of a new domain."""
    leaves = [pack("<III", leaf, _NO_SUBLEAF, last) + _VENDOR for leaf, last in ((0, 0xD), (1 << 31, 0x8000_0008))]
    return CpuPolicy(b"".join(leaves), b"".join(pack("<IIQ", msr, 0, 0) for msr in POLICY_MSRS))


def updated_vcpu_state(old: VcpuState, new: VcpuState, width: Width) -> VcpuState:
    """Return ``old`` with all parts of ``new`` that are not empty.

    Raises HypercallError.
    """
    if new.extended:
        _raise_if_refused(iter_extended_refusals(new.extended))
        old = old._replace(extended=_stored_extended(new.extended, width))
    if new.xsave:
        _raise_if_refused(iter_xsave_refusals(new.xsave, XCR0))
        if len(new.xsave) > XSAVE_HEADER_SIZE:
            old = old._replace(xsave=new.xsave)
    if new.msrs:
        _raise_if_refused(iter_msr_refusals(new.msrs))
        msrs = np.frombuffer(new.msrs, VCPU_MSR[8])
        old = old._replace(msrs=msrs[msrs["value"] != 0].tobytes())
    return old


def _stored_extended(data: bytes, width: Width) -> bytes:
    """Return struct xen_domctl_ext_vcpucontext as Xen stores it."""
    context = np.frombuffer(bytearray(data.ljust(EXT_VCPUCONTEXT_MAX, b"\0")), EXT_VCPUCONTEXT[8], 1)
    for name in ("syscall32_callback", "sysenter_callback"):
        ring, cs = 3 if width == 8 else 1, context[f"{name}_cs"]  # the ring in which Xen runs a guest's kernel
        if int(cs[0]) & 3 < ring:
            cs[0] = int(cs[0]) & ~3 | ring
    context["size"] = EXT_VCPUCONTEXT.size(8)
    return context.tobytes()


def updated_tsc_info(info: TscInfo) -> TscInfo:
    """Return the TSC info that a domain has after it was set. Raises HypercallError."""
    _raise_if_refused(iter_tsc_refusals(info.mode, info.khz))
    info = info._replace(khz=info.khz or CPU_KHZ, incarnation=info.incarnation + 1)
    return info._replace(khz=0, nsec=0) if info.mode == TSC_NEVER_EMULATE else info


def updated_cpu_policy(old: CpuPolicy, new: CpuPolicy) -> CpuPolicy:
    """Return ``old`` with the parts of ``new`` that are not empty.

    HypercallError names an unknown leaf or MSR.
    """
    _raise_if_refused(iter_cpuid_policy_refusals(new.leaves))
    _raise_if_refused(iter_msr_policy_refusals(new.msrs))
    return CpuPolicy(new.leaves or old.leaves, new.msrs or old.msrs)


def _raise_if_refused(refusals: Iterable[Refusal]) -> None:
    """Raise HypercallError for the first reason why Xen refuses something."""
    for number, reason in refusals:
        raise HypercallError(number, reason)
