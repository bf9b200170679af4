"""Vcpu state, TSC and CPU policy: the errno of Xen for each fault, the model's too, and none for what Xen takes."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator

import pytest

from tests.support.xsave import xsave
from tests.verify.cases_cpu import NO_SUBLEAF
from xenpv.cpu import policy, state
from xenpv.cpu.state import Refusal
from xenpv.errors import HostError
from xenpv.host.model.host import ModelHost
from xenpv.host.protocol import CpuPolicy, TscInfo, VcpuState


def extended(**values: int) -> bytes:
    fields = {"vcpu": 0, "size": 64, "syscall32": 0, "sysenter": 0, "cs": 0, "caps": 2} | values
    return struct.pack("<IIQQQQ", *fields.values()).ljust(64, b"\0")


def leaf(number: int, subleaf: int = NO_SUBLEAF, a: int = 0, b: int = 0, c: int = 0) -> bytes:
    return struct.pack("<6I", number, subleaf, a, b, c, 0)


REFUSED: dict[str, tuple[Callable[[ModelHost], object], int]] = {
    "TSC mode 3": (lambda h: h.set_tsc_info(h.create(), TscInfo(3, 1)), errno.EINVAL),
    "TSC of 2^30 kHz": (lambda h: h.set_tsc_info(h.create(), TscInfo(0, 1 << 30)), errno.EINVAL),
    "xsave too long": (lambda h: h.set_vcpu_state(h.create(), 0, VcpuState(xsave=xsave(3, 3, 832))), errno.EINVAL),
    "xsave compressed": (
        lambda h: h.set_vcpu_state(h.create(), 0, VcpuState(xsave=xsave(3, 3, 576, xcomp_bv=1 << 63))),
        errno.EOPNOTSUPP,
    ),
    "xsave reserved": (
        lambda h: h.set_vcpu_state(h.create(), 0, VcpuState(xsave=xsave(3, 3, 576, reserved=1))),
        errno.EIO,
    ),
    "8 MSRs": (
        lambda h: h.set_vcpu_state(h.create(), 0, VcpuState(msrs=struct.pack("<IIQ", 0x140, 0, 1) * 8)),
        errno.EINVAL,
    ),
    "machine-check capability": (
        lambda h: h.set_vcpu_state(h.create(), 0, VcpuState(extended(caps=1 << 25))),
        errno.EINVAL,
    ),
    "leaf 0xe": (lambda h: h.set_cpu_policy(h.create(), CpuPolicy(leaf(0xE))), errno.ERANGE),
    "121 leaves": (lambda h: h.set_cpu_policy(h.create(), CpuPolicy(leaf(5) * 121)), errno.E2BIG),
    "leaf 0 too high": (lambda h: h.set_cpu_policy(h.create(), CpuPolicy(leaf(0, a=0xE))), errno.EINVAL),
    "MSR flags": (
        lambda h: h.set_cpu_policy(h.create(), CpuPolicy(msrs=struct.pack("<IIQ", 0xCE, 1, 0))),
        errno.EINVAL,
    ),
    "MSR of 33 bits": (
        lambda h: h.set_cpu_policy(h.create(), CpuPolicy(msrs=struct.pack("<IIQ", 0xCE, 0, 1 << 32))),
        errno.EOVERFLOW,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_model_refuses_what_xen_refuses_with_its_errno(name: str) -> None:
    call, number = REFUSED[name]
    with pytest.raises(HostError) as error:
        call(ModelHost())
    assert error.value.errno == number


TAKEN: dict[str, Iterator[Refusal]] = {
    "TSC never emulated, no frequency": state.iter_tsc_refusals(2, 1 << 29),
    "TSC without a frequency": state.iter_tsc_refusals(1, 0),
    "no xsave area": state.iter_xsave_refusals(bytes(16)),
    "x87 alone": state.iter_xsave_refusals(xsave(1, 1, 576, 1)),
    "AVX-512 of Intel": state.iter_xsave_refusals(xsave(7, 0xE7, 2688)),
    "AVX-512 of AMD": state.iter_xsave_refusals(xsave(0xE7, 0xE7, 2432)),
    "all MSRs": state.iter_msr_refusals(b"".join(struct.pack("<IIQ", n, 0, 1) for n in state.VCPU_MSRS)),
    "every capability": state.iter_extended_refusals(extended(caps=0x0900_0DFF)),
    "extended state of Xen 4.0, without machine checks": state.iter_extended_refusals(extended(size=32, caps=1 << 63)),
    "all leaves": policy.iter_cpuid_policy_refusals(
        leaf(0, a=0xD) + leaf(4, 5) + leaf(7, 2) + leaf(0xB, 1) + leaf(0xD, 62) + leaf(0x4000_0100) + leaf(0x8000_0021)
    ),
    "a maximum that a later leaf corrects": policy.iter_cpuid_policy_refusals(leaf(0, a=0x1F) + leaf(0, a=0xD)),
    "the MSR policy of Xen 4.20": policy.iter_msr_policy_refusals(
        struct.pack("<IIQIIQ", 0xCE, 0, 1 << 31, 0x10A, 0, 1 << 62)
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_checks_of_what_xen_takes_yield_nothing(name: str) -> None:
    assert list(TAKEN[name]) == []


@pytest.mark.parametrize(
    ("leaves", "expected"),
    [
        (b"", 0xE7),
        (leaf(1, c=1 << 26 | 1 << 28), 0xE7),
        (leaf(1, c=1 << 26), 3),
        (leaf(1), 0),
        (leaf(7, 0), 7),
        (leaf(7, 0, b=1 << 16), 0xE7),
    ],
    ids=["no leaf", "AVX", "no AVX", "no XSAVE", "no AVX-512", "AVX-512"],
)
def test_xcr0_max_follows_the_features_of_the_policy(leaves: bytes, expected: int) -> None:
    assert policy.xcr0_max(leaves) == expected
