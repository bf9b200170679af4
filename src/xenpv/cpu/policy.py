"""CPU policy of a PV domain: what Xen refuses, and what it lets a guest have.

Each function yields a Refusal for each fault, the one that Xen meets first in front.

Source: xen.git:xen/lib/x86/cpuid.c x86_cpuid_copy_from_buffer(), msr.c x86_msr_copy_from_buffer(), policy.c
x86_cpu_policies_are_compatible()
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import numpy as np

from xenpv.abi.domctl import CPUID_LEAF, MSR_ENTRY
from xenpv.cpu.state import AVX512, PV_XCR0, YMM, Refusal, array_refusal

_NO_SUBLEAF = 0xFFFF_FFFF
# Xen's CPUID_GUEST_NR_*: the last subleaf of the leaves that have some
_LAST_SUBLEAF = {0x4: 5, 0x7: 2, 0xB: 1, 0xD: 62}
_LAST_BASIC, _EXTENDED, _LAST_EXTENDED = 0xD, 0x8000_0000, 0x8000_0021
_HYPERVISOR_LEAVES = (0x4000_0000, 0x4000_0100)
CPUID_LEAVES_MAX = (
    _LAST_BASIC + 1 + sum(_LAST_SUBLEAF.values()) + len(_HYPERVISOR_LEAVES) + _LAST_EXTENDED - _EXTENDED + 1
)
_MAXIMA = {(0, _NO_SUBLEAF): _LAST_BASIC, (7, 0): _LAST_SUBLEAF[7], (_EXTENDED, _NO_SUBLEAF): _LAST_EXTENDED}
_XSAVE, _AVX, _AVX512F = 1 << 26, 1 << 28, 1 << 16  # leaf 1 ecx; leaf 7 ebx

_PLATFORM_INFO, _ARCH_CAPS = 0xCE, 0x10A
POLICY_MSRS = (_PLATFORM_INFO, _ARCH_CAPS)


def iter_cpuid_policy_refusals(data: bytes) -> Iterator[Refusal]:
    """Yield why every host refuses a CPUID policy.

    Args:
        data: Array of struct xen_cpuid_leaf.
    """
    if refusal := array_refusal(data, CPUID_LEAF, CPUID_LEAVES_MAX, "leaves", too_many=errno.E2BIG):
        yield refusal
        return
    leaves = np.frombuffer(data, CPUID_LEAF[8])
    maxima = dict[tuple[int, int], int]()  # of two equal leaves the last counts
    for leaf, subleaf, eax in zip(*(leaves[name].tolist() for name in ("leaf", "subleaf", "a")), strict=True):
        if not (leaf <= _LAST_BASIC or leaf in _HYPERVISOR_LEAVES or _EXTENDED <= leaf <= _LAST_EXTENDED):
            yield Refusal(errno.ERANGE, f"unknown leaf {leaf:#x}")
        elif subleaf > _LAST_SUBLEAF[leaf] if leaf in _LAST_SUBLEAF else subleaf != _NO_SUBLEAF:
            allowed = f"0 to {_LAST_SUBLEAF[leaf]}" if leaf in _LAST_SUBLEAF else f"{_NO_SUBLEAF:#x}, for none"
            yield Refusal(errno.ERANGE, f"leaf {leaf:#x} has subleaf {subleaf:#x}: must be {allowed}")
        elif (leaf, subleaf) in _MAXIMA:
            maxima[leaf, subleaf] = eax
    for (leaf, subleaf), eax in maxima.items():
        if eax > _MAXIMA[leaf, subleaf]:
            reason = f"leaf {leaf:#x} names {eax:#x} as the last: Xen has {_MAXIMA[leaf, subleaf]:#x}"
            yield Refusal(errno.EINVAL, reason)


def iter_msr_policy_refusals(data: bytes) -> Iterator[Refusal]:
    """Yield why every host refuses an MSR policy.

    Args:
        data: Array of struct xen_msr_entry.
    """
    if refusal := array_refusal(data, MSR_ENTRY, len(POLICY_MSRS), "MSRs", too_many=errno.E2BIG):
        yield refusal
        return
    msrs = np.frombuffer(data, MSR_ENTRY[8])
    for index, flags, value in zip(*(msrs[name].tolist() for name in ("idx", "flags", "val")), strict=True):
        if flags:
            yield Refusal(errno.EINVAL, f"MSR {index:#x} has flags {flags:#x}: must be 0")
        if index not in POLICY_MSRS:
            yield Refusal(errno.ERANGE, f"unknown MSR {index:#x}")
        elif index == _PLATFORM_INFO and value >> 32:
            yield Refusal(errno.EOVERFLOW, f"MSR {index:#x} is {value:#x}: wider than 32 bits")
        elif index == _PLATFORM_INFO and value & ~(1 << 31):
            yield Refusal(errno.EINVAL, f"MSR {index:#x} is {value:#x}: Xen has bit 31 alone")


def xcr0_max(leaves: bytes) -> int:
    """Return the bits of xcr0 that a PV guest with a CPUID policy may have.

    A leaf that is not in the policy restricts nothing.

    Source: xen.git:xen/arch/x86/cpuid.c recalculate_xstate()
    """
    xcr0 = PV_XCR0
    if len(leaves) % CPUID_LEAF.size(8):
        return xcr0
    table = np.frombuffer(leaves, CPUID_LEAF[8])
    basic = table[(table["leaf"] == 1) & (table["subleaf"] == _NO_SUBLEAF)]
    features = table[(table["leaf"] == 7) & (table["subleaf"] == 0)]
    if len(basic):
        ecx = int(basic["c"][-1])
        xcr0 &= (PV_XCR0 if ecx & _XSAVE else 0) & (PV_XCR0 if ecx & _AVX else ~(YMM | AVX512))
    if len(features) and not int(features["b"][-1]) & _AVX512F:
        xcr0 &= ~AVX512
    return xcr0
