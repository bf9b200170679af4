"""What ModelHost takes for a vcpu's state, a domain's time and its CPU policy, and what Xen makes of it.

xen.git:xen/arch/x86/domctl.c, time.c: tsc_set_info(), xen/lib/x86/cpuid.c: x86_cpuid_copy_from_buffer()
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
from xenpv.host.model.page_types import Refused
from xenpv.host.protocol import CpuPolicy, TscInfo, VcpuState

CPU_KHZ = 1_000_000
XSAVE_MAX = XSAVE_HEADER_SIZE + 512 + 64 + 256  # what a CPU with AVX has
TSC_DEFAULT, TSC_ALWAYS_EMULATE, TSC_NEVER_EMULATE = range(3)
VCPU_MSRS = frozenset({0x48, 0x140, 0xC000_0103, 0xC001_1027, 0xC001_1019, 0xC001_101A, 0xC001_101B})
POLICY_MSRS = (0xCE, 0x10A)
LEAVES = (range(0x20), range(0x4000_0000, 0x4000_0200), range(0x8000_0000, 0x8000_0022))
LEAVES_MAX, MSRS_MAX = 128, len(POLICY_MSRS)
_NO_SUBLEAF = 0xFFFF_FFFF
_VENDOR = b"AuthcAMDenti"  # as leaves have it: ebx, ecx, edx


def bare_state() -> VcpuState:
    """Of a vcpu that was never touched."""
    return VcpuState(pack("<II", 0, EXT_VCPUCONTEXT.size(8)).ljust(EXT_VCPUCONTEXT.size(8), b"\0"), bytes(16))


def bare_policy() -> CpuPolicy:
    """Of a domain for which nobody set any."""
    leaves = [pack("<III", leaf, _NO_SUBLEAF, last) + _VENDOR for leaf, last in ((0, 0xD), (1 << 31, 0x8000_0008))]
    return CpuPolicy(b"".join(leaves), b"".join(pack("<IIQ", msr, 0, 0) for msr in POLICY_MSRS))


def changed_state(old: VcpuState, given: VcpuState, width: Width) -> VcpuState:
    """The state once what is not empty was set, part by part. Raises Refused."""
    if given.extended:
        old = old._replace(extended=_extended(given.extended, width))
    if given.xsave:
        if not XSAVE_HEADER_SIZE <= len(given.xsave) <= XSAVE_MAX:
            raise Refused(errno.EINVAL, f"an xsave area of {len(given.xsave)} bytes")
        old = old._replace(xsave=given.xsave)
    if given.msrs:
        msrs = _array(given.msrs, VCPU_MSR)
        _known(msrs["index"], VCPU_MSRS, "MSR", errno.EINVAL)
        old = old._replace(msrs=msrs[msrs["value"] != 0].tobytes())
    return old


def _extended(data: bytes, width: Width) -> bytes:
    if not EXT_VCPUCONTEXT.offset(8, "vmce") <= len(data) <= EXT_VCPUCONTEXT_MAX:
        raise Refused(errno.EINVAL, f"an extended context of {len(data)} bytes")
    context = np.frombuffer(bytearray(data.ljust(EXT_VCPUCONTEXT_MAX, b"\0")), EXT_VCPUCONTEXT[8], 1)
    if not EXT_VCPUCONTEXT.offset(8, "vmce") <= int(context["size"][0]) <= len(data):
        raise Refused(errno.EINVAL, f"an extended context that says it has {int(context['size'][0])} bytes")
    for name in ("syscall32_callback", "sysenter_callback"):
        eip = int(context[f"{name}_eip"][0])
        if eip >> 47 not in {0, (1 << 17) - 1}:
            raise Refused(errno.EINVAL, f"{name}_eip {eip:#x} is not canonical")
        level, cs = 3 if width == 8 else 1, context[f"{name}_cs"]  # the least privilege that a kernel may have
        if int(cs[0]) & 3 < level:
            cs[0] = int(cs[0]) & ~3 | level
    context["size"] = EXT_VCPUCONTEXT.size(8)
    return context.tobytes()


def changed_time(given: TscInfo) -> TscInfo:
    """How the domain sees the TSC once that was set. Raises Refused."""
    if given.mode not in {TSC_DEFAULT, TSC_ALWAYS_EMULATE, TSC_NEVER_EMULATE}:
        raise Refused(errno.EINVAL, f"tsc_mode {given.mode}")
    given = given._replace(khz=given.khz or CPU_KHZ, incarnation=given.incarnation + 1)
    return given._replace(khz=0, nsec=0) if given.mode == TSC_NEVER_EMULATE else given


def changed_policy(old: CpuPolicy, given: CpuPolicy) -> CpuPolicy:
    """The policy once that was set. Raises Refused, which names the leaf or MSR."""
    leaves, msrs = _array(given.leaves, CPUID_LEAF), _array(given.msrs, MSR_ENTRY)
    if len(leaves) > LEAVES_MAX or len(msrs) > MSRS_MAX:
        raise Refused(errno.E2BIG, f"{len(leaves)} leaves and {len(msrs)} MSRs")
    _known(leaves["leaf"], {leaf for some in LEAVES for leaf in some}, "leaf", errno.ERANGE)
    _known(msrs["idx"], POLICY_MSRS, "MSR", errno.ERANGE)
    return CpuPolicy(given.leaves or old.leaves, given.msrs or old.msrs)


def _array(data: bytes, struct: Struct) -> np.ndarray:
    if len(data) % struct.size(8):
        raise Refused(errno.EINVAL, f"{len(data)} bytes are no array of struct {struct.name}")
    return np.frombuffer(data, struct[8])


def _known(numbers: np.ndarray, all_of: Iterable[int], what: str, number: int) -> None:
    if (unknown := first_bad(~np.isin(numbers, list(all_of)))) is not None:
        raise Refused(number, f"{what} {int(numbers[unknown]):#x} is not known")
