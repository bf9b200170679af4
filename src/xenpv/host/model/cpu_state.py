"""Vcpu state, TSC and CPU policy: the accepted values and how Xen stores them.

Source: xen.git:xen/arch/x86/domctl.c, time.c: tsc_set_info(), xen/lib/x86/cpuid.c: x86_cpuid_copy_from_buffer()
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from struct import pack

import numpy as np

from xenpv.abi.declare import Struct, Width
from xenpv.abi.domctl import (
    CPUID_LEAF,
    EXT_VCPUCONTEXT,
    EXT_VCPUCONTEXT_MAX,
    MSR_ENTRY,
    VCPU_MSR,
    XSAVE_HEADER_SIZE,
)
from xenpv.frames import first_bad
from xenpv.host.model.page_types import HypercallError
from xenpv.host.protocol import CpuPolicy, TscInfo, VcpuState

CPU_KHZ = 1_000_000
XSAVE_MAX = XSAVE_HEADER_SIZE + 512 + 64 + 256  # of a CPU with AVX
TSC_DEFAULT, TSC_ALWAYS_EMULATE, TSC_NEVER_EMULATE = range(3)
VCPU_MSRS = frozenset({0x48, 0x140, 0xC000_0103, 0xC001_1027, 0xC001_1019, 0xC001_101A, 0xC001_101B})
POLICY_MSRS = (0xCE, 0x10A)
LEAVES = (range(0x20), range(0x4000_0000, 0x4000_0200), range(0x8000_0000, 0x8000_0022))
LEAVES_MAX, MSRS_MAX = 128, len(POLICY_MSRS)
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
        old = old._replace(extended=_stored_extended(new.extended, width))
    if new.xsave:
        if not XSAVE_HEADER_SIZE <= len(new.xsave) <= XSAVE_MAX:
            raise HypercallError(errno.EINVAL, f"an xsave area of {len(new.xsave)} bytes")
        old = old._replace(xsave=new.xsave)
    if new.msrs:
        msrs = _as_structs(new.msrs, VCPU_MSR)
        _check_known(msrs["index"], VCPU_MSRS, "MSR", errno.EINVAL)
        old = old._replace(msrs=msrs[msrs["value"] != 0].tobytes())
    return old


def _stored_extended(data: bytes, width: Width) -> bytes:
    """Return struct xen_domctl_ext_vcpucontext as Xen stores it."""
    if not EXT_VCPUCONTEXT.offset(8, "vmce") <= len(data) <= EXT_VCPUCONTEXT_MAX:
        raise HypercallError(errno.EINVAL, f"an extended context of {len(data)} bytes")
    context = np.frombuffer(bytearray(data.ljust(EXT_VCPUCONTEXT_MAX, b"\0")), EXT_VCPUCONTEXT[8], 1)
    if not EXT_VCPUCONTEXT.offset(8, "vmce") <= int(context["size"][0]) <= len(data):
        raise HypercallError(errno.EINVAL, f"an extended context that claims to have {int(context['size'][0])} bytes")
    for name in ("syscall32_callback", "sysenter_callback"):
        eip = int(context[f"{name}_eip"][0])
        if eip >> 47 not in {0, (1 << 17) - 1}:
            raise HypercallError(errno.EINVAL, f"{name}_eip {eip:#x} is not canonical")
        ring, cs = 3 if width == 8 else 1, context[f"{name}_cs"]  # the ring in which Xen runs a guest's kernel
        if int(cs[0]) & 3 < ring:
            cs[0] = int(cs[0]) & ~3 | ring
    context["size"] = EXT_VCPUCONTEXT.size(8)
    return context.tobytes()


def updated_tsc_info(info: TscInfo) -> TscInfo:
    """Return the TSC info that a domain has after it was set. Raises HypercallError."""
    if info.mode not in {TSC_DEFAULT, TSC_ALWAYS_EMULATE, TSC_NEVER_EMULATE}:
        raise HypercallError(errno.EINVAL, f"tsc_mode {info.mode}")
    info = info._replace(khz=info.khz or CPU_KHZ, incarnation=info.incarnation + 1)
    return info._replace(khz=0, nsec=0) if info.mode == TSC_NEVER_EMULATE else info


def updated_cpu_policy(old: CpuPolicy, new: CpuPolicy) -> CpuPolicy:
    """Return ``old`` with the parts of ``new`` that are not empty.

    HypercallError names an unknown leaf or MSR.
    """
    leaves, msrs = _as_structs(new.leaves, CPUID_LEAF), _as_structs(new.msrs, MSR_ENTRY)
    if len(leaves) > LEAVES_MAX or len(msrs) > MSRS_MAX:
        raise HypercallError(errno.E2BIG, f"{len(leaves)} leaves and {len(msrs)} MSRs")
    _check_known(leaves["leaf"], {leaf for leaf_range in LEAVES for leaf in leaf_range}, "leaf", errno.ERANGE)
    _check_known(msrs["idx"], POLICY_MSRS, "MSR", errno.ERANGE)
    return CpuPolicy(new.leaves or old.leaves, new.msrs or old.msrs)


def _as_structs(data: bytes, struct: Struct) -> np.ndarray:
    if len(data) % struct.size(8):
        raise HypercallError(errno.EINVAL, f"{len(data)} bytes are not a whole number of struct {struct.name}")
    return np.frombuffer(data, struct[8])


def _check_known(numbers: np.ndarray, known: Iterable[int], noun: str, number: int) -> None:
    """Raise HypercallError with errno ``number`` for the first unknown one."""
    if (first := first_bad(~np.isin(numbers, list(known)))) is not None:
        raise HypercallError(number, f"unknown {noun} {int(numbers[first]):#x}")
