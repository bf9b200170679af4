"""Vcpu state beyond the context, and TSC: what Xen refuses.

Each function yields a Refusal for each fault, the one that Xen meets first in front.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from xenpv.abi.declare import Struct
from xenpv.abi.domctl import EXT_VCPUCONTEXT, EXT_VCPUCONTEXT_MAX, VCPU_MSR, XSAVE_HEADER_SIZE
from xenpv.memory.page_tables import is_canonical

TSC_DEFAULT, TSC_ALWAYS_EMULATE, TSC_NEVER_EMULATE = range(3)
_TSC_PVRDTSCP = 3

X87, SSE, YMM = 1 << 0, 1 << 1, 1 << 2
AVX512 = 7 << 5  # OPMASK, ZMM and HI_ZMM: all or none
PV_XCR0 = X87 | SSE | YMM | AVX512  # all that a PV guest can be given: the features of the rest are for HVM alone
_BNDREGS, _BNDCSR = 1 << 3, 1 << 4
_LEGACY_SIZE = 576  # the 512 bytes of fxsave and the header of 64
# Where the last component of a set ends. AMD has no MPX, so that AVX-512 comes sooner than on Intel.
_AREA_SIZES = {0: (_LEGACY_SIZE,), YMM: (832,), YMM | AVX512: (2688, 2432)}
XSAVE_MAX = XSAVE_HEADER_SIZE + 2688

_SPEC_CTRL, _MISC_FEATURES, _TSC_AUX = 0x48, 0x140, 0xC000_0103
_DR_MASKS = (0xC001_1027, 0xC001_1019, 0xC001_101A, 0xC001_101B)
# The bits that some Xen lets a guest set; which of them depends on the domain's CPUID policy.
_SETTABLE = {_SPEC_CTRL: 0x4FF, _MISC_FEATURES: 1, _TSC_AUX: 0xFFFF_FFFF, **dict.fromkeys(_DR_MASKS, 0xFFFF_FFFF)}
VCPU_MSRS = frozenset(_SETTABLE)

_VMCE = EXT_VCPUCONTEXT.offset(8, "vmce")
# MCG_CAP: the count of banks, MCG_CTL_P, and what Intel's guests get: CMCI, TES, SER and LMCE
_MCG_CAPS = 0xFF | 1 << 8 | 1 << 10 | 1 << 11 | 1 << 24 | 1 << 27


class Refusal(NamedTuple):
    """Xen refuses a value: with an errno, and for a reason."""

    errno: int
    reason: str


def array_refusal(data: bytes, element: Struct, most: int, plural: str, *, too_many: int) -> Refusal | None:
    """Return why Xen refuses an array for its size; None if it takes it.

    Args:
        data: The array.
        element: The struct of an element.
        most: How many elements Xen takes.
        plural: What the elements are called.
        too_many: The errno for more than that.
    """
    count, rest = divmod(len(data), element.size(8))
    if rest:
        return Refusal(errno.EINVAL, f"{len(data)} bytes are not a whole number of struct {element.name}")
    if count > most:
        return Refusal(too_many, f"{count} {plural}: Xen takes at most {most}")
    return None


def iter_tsc_refusals(mode: int, khz: int) -> Iterator[Refusal]:
    """Yield why Xen refuses a TSC mode and frequency.

    Xen 4.17.0 and older multiply the frequency by 1000 in 32 bits. If nothing is left, set_time_scale() does not
    return. Later ones take it; no CPU has it.

    Source: xen.git:xen/arch/x86/time.c tsc_set_info()
    """
    if mode > TSC_NEVER_EMULATE:
        gone = ", PVRDTSCP, which Xen gave up in 4.13" if mode == _TSC_PVRDTSCP else ""
        yield Refusal(errno.EINVAL, f"TSC mode {mode}{gone}: must be 0, 1 or 2")
    elif mode != TSC_NEVER_EMULATE and khz and khz * 1000 % (1 << 32) == 0:
        yield Refusal(errno.EINVAL, f"TSC frequency {khz} kHz: Xen 4.17.0 and older would hang")


def iter_xsave_refusals(
    data: bytes, supported: int = PV_XCR0, sizes: dict[int, tuple[int, ...]] = _AREA_SIZES
) -> Iterator[Refusal]:
    """Yield why Xen refuses an xsave area of a PV guest.

    Args:
        data: xcr0, xcr0_accum and the area.
        supported: The bits of xcr0 that the guest may have.
        sizes: Lengths of areas by the bits of xcr0_accum beyond x87 and SSE.

    Source: xen.git:xen/arch/x86/domctl.c XEN_DOMCTL_setvcpuextstate, xstate.c validate_xstate()
    """
    if len(data) < XSAVE_HEADER_SIZE:
        yield Refusal(errno.EINVAL, f"an xsave area of {len(data)} bytes is too short: min {XSAVE_HEADER_SIZE}")
        return
    xcr0, accum = struct.unpack_from("<QQ", data)
    area = len(data) - XSAVE_HEADER_SIZE
    if not accum:
        if xcr0 or area:
            yield Refusal(errno.EINVAL, f"xcr0_accum is 0, with xcr0 {xcr0:#x} and an xsave area of {area} bytes")
        return
    if area < _LEGACY_SIZE:
        yield Refusal(errno.EINVAL, f"an xsave area of {area} bytes is too short: min {_LEGACY_SIZE}")
        return
    xstate_bv, xcomp_bv, *reserved = struct.unpack_from("<8Q", data, XSAVE_HEADER_SIZE + 512)
    for name, bits in (("xstate_bv", xstate_bv), ("xcr0", xcr0)):
        if bits & ~accum:
            yield Refusal(errno.EINVAL, f"{name} {bits:#x} has bits that xcr0_accum {accum:#x} lacks")
    if accum & ~supported:
        yield Refusal(
            errno.EINVAL, f"xcr0_accum {accum:#x} has bits {accum & ~supported:#x}, which the guest cannot have"
        )
    for name, bits in (("xcr0", xcr0), ("xcr0_accum", accum)):
        if not is_valid_xcr0(bits):
            yield Refusal(errno.EINVAL, f"{name} {bits:#x} is no set of states that a CPU allows")
    if xcomp_bv:
        yield Refusal(errno.EOPNOTSUPP, f"xcomp_bv {xcomp_bv:#x}: must be 0, since Xen takes no compressed area")
    if any(reserved):
        yield Refusal(errno.EIO, "reserved bytes of the xsave header are not 0")
    expected = sizes.get(accum & ~(X87 | SSE), (area,))
    if area not in expected:
        lengths = " or ".join(map(str, expected))
        yield Refusal(errno.EINVAL, f"an xsave area of {area} bytes: xcr0_accum {accum:#x} needs {lengths}")


def is_valid_xcr0(xcr0: int) -> bool:
    """Return whether a CPU could have this value of xcr0.

    Source: xen.git:xen/arch/x86/xstate.c valid_xcr0()
    """
    return bool(
        xcr0 & X87
        and (xcr0 & SSE or not xcr0 & YMM)
        and xcr0 & AVX512 in {0, AVX512}
        and (xcr0 & YMM or not xcr0 & AVX512)
        and bool(xcr0 & _BNDREGS) == bool(xcr0 & _BNDCSR)
    )


def iter_msr_refusals(data: bytes) -> Iterator[Refusal]:
    """Yield why Xen refuses the MSRs of a vcpu.

    Args:
        data: Array of struct xen_domctl_vcpu_msr.

    Source: xen.git:xen/arch/x86/domctl.c XEN_DOMCTL_set_vcpu_msrs, msr.c guest_wrmsr()
    """
    if refusal := array_refusal(data, VCPU_MSR, len(VCPU_MSRS), "MSRs", too_many=errno.EINVAL):
        yield refusal
        return
    msrs = np.frombuffer(data, VCPU_MSR[8])
    for index, reserved, value in zip(*(msrs[name].tolist() for name in ("index", "reserved", "value")), strict=True):
        if reserved:
            yield Refusal(errno.EINVAL, f"MSR {index:#x} has a reserved field of {reserved:#x}: must be 0")
        if index not in VCPU_MSRS:
            yield Refusal(errno.EINVAL, f"unknown MSR {index:#x}")
        elif value & ~_SETTABLE[index]:
            yield Refusal(
                errno.EINVAL, f"MSR {index:#x} is {value:#x}: no guest can set bits {value & ~_SETTABLE[index]:#x}"
            )


def iter_extended_refusals(data: bytes) -> Iterator[Refusal]:
    """Yield why Xen refuses the extended state of a PV guest, of either width.

    Args:
        data: A struct xen_domctl_ext_vcpucontext.

    Source: xen.git:xen/arch/x86/domctl.c XEN_DOMCTL_set_ext_vcpucontext, cpu/mcheck/vmce.c vmce_restore_vcpu()
    """
    if not _VMCE <= len(data) <= EXT_VCPUCONTEXT_MAX:
        yield Refusal(
            errno.EINVAL, f"an extended context of {len(data)} bytes: must be {_VMCE} to {EXT_VCPUCONTEXT_MAX}"
        )
        return
    context = EXT_VCPUCONTEXT.read(data.ljust(EXT_VCPUCONTEXT_MAX, b"\0"), 8)
    size = int(context["size"])
    if not _VMCE <= size <= len(data):
        yield Refusal(errno.EINVAL, f"size is {size} bytes, in an extended context of {len(data)} bytes")
        return
    for name in ("sysenter_callback_eip", "syscall32_callback_eip"):
        address = int(context[name])
        if not is_canonical(address):
            yield Refusal(errno.EINVAL, f"{name} {address:#x} is not canonical")
    caps = int(context["vmce"]["caps"])
    if size >= _VMCE + 8 and caps & ~_MCG_CAPS:
        yield Refusal(errno.EINVAL, f"vmce.caps {caps:#x} has bits {caps & ~_MCG_CAPS:#x}, which Xen gives no guest")
