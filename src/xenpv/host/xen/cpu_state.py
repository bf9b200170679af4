"""Vcpu state beyond the context, TSC and CPU policy of real domains."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from xenpv.abi.declare import Struct
from xenpv.abi.domctl import CPUID_LEAF, EXT_VCPUCONTEXT, EXT_VCPUCONTEXT_MAX, MSR_ENTRY, VCPU_MSR
from xenpv.errors import HostError
from xenpv.frames import DomId
from xenpv.host.errors import host_error
from xenpv.host.protocol import DOM0, CpuPolicy, TscInfo, VcpuState
from xenpv.host.xen import domctl
from xenpv.host.xen.shared_libraries import Buffer, Hypercalls

_BLOB_MAX = 1 << 20  # bytes: far more than any vcpu state or policy has
_NO_CULPRIT = 0xFFFF_FFFF  # Xen blames no leaf, subleaf or MSR


class CpuState:
    """The domctls for vcpu state, TSC and CPU policy.

    ``max_vcpu`` returns a domain's highest vcpu number.
    """

    def __init__(self, calls: Hypercalls, max_vcpu: Callable[[DomId], int]) -> None:
        self._calls, self._max_vcpu = calls, max_vcpu

    def vcpu_state(self, domid: DomId, vcpu: int) -> VcpuState:
        """See Mover."""
        return VcpuState(
            self._extended(domid, vcpu),
            self._xsave(domid, vcpu),
            self._msrs(domid, vcpu),
        )

    def _extended(self, domid: DomId, vcpu: int) -> bytes:
        command, op = domctl.GET_EXT_VCPUCONTEXT, "get_ext_vcpucontext"
        _, result = self._vcpu_domctl(command, op, domid, vcpu, EXT_VCPUCONTEXT)
        size = int(result["size"])
        if size > EXT_VCPUCONTEXT.size(8):
            raise _implausible_size(op, domid, size)
        return result.tobytes()[:size]

    def _xsave(self, domid: DomId, vcpu: int) -> bytes:
        command, op, struct = domctl.GETVCPUEXTSTATE, "getvcpuextstate", domctl.VCPUEXTSTATE
        _, limits = self._vcpu_domctl(command, op, domid, vcpu, struct)
        size, mask = int(limits["size"]), int(limits["xfeature_mask"])
        if size > _BLOB_MAX:
            raise _implausible_size(op, domid, size)
        if not mask:
            return b""
        with self._calls.buffer(size) as buffer:
            arguments = {"xfeature_mask": mask, "size": size, "buffer": buffer.address}
            _, result = self._vcpu_domctl(command, op, domid, vcpu, struct, **arguments)
            return buffer.array[: min(int(result["size"]), size)].tobytes()

    def _msrs(self, domid: DomId, vcpu: int) -> bytes:
        command, op, struct = domctl.GET_VCPU_MSRS, "get_vcpu_msrs", domctl.VCPU_MSRS
        count = int(self._vcpu_domctl(command, op, domid, vcpu, struct)[1]["msr_count"])
        size = count * VCPU_MSR.size(8)
        if size > _BLOB_MAX:
            raise _implausible_size(op, domid, size)
        if not count:
            return b""
        with self._calls.buffer(size) as buffer:
            _, result = self._vcpu_domctl(command, op, domid, vcpu, struct, msr_count=count, msrs=buffer.address)
            return buffer.array[: min(int(result["msr_count"]), count) * VCPU_MSR.size(8)].tobytes()

    def set_vcpu_state(self, domid: DomId, vcpu: int, state: VcpuState) -> None:
        """See Mover."""
        if state.extended:
            self._set_extended(domid, vcpu, state.extended)
        if state.xsave:
            self._set_xsave(domid, vcpu, state.xsave)
        if state.msrs:
            self._set_msrs(domid, vcpu, state.msrs)

    def _set_extended(self, domid: DomId, vcpu: int, data: bytes) -> None:
        command, op = domctl.SET_EXT_VCPUCONTEXT, "set_ext_vcpucontext"
        if len(data) > EXT_VCPUCONTEXT_MAX:
            raise host_error(op, errno.EINVAL, domid, f"an extended context of {len(data)} bytes is too long")
        members = EXT_VCPUCONTEXT.read(data.ljust(EXT_VCPUCONTEXT_MAX, b"\0"), 8)
        if int(members["size"]) > len(data):  # Xen does not learn the length
            reason = f"an extended context of {len(data)} bytes claims to have {int(members['size'])}"
            raise host_error(op, errno.EINVAL, domid, reason)
        arguments = {name: members[name] for name, _ in EXT_VCPUCONTEXT.members(8) if name != "vcpu"}
        self._vcpu_domctl(command, op, domid, vcpu, EXT_VCPUCONTEXT, **arguments)

    def _set_xsave(self, domid: DomId, vcpu: int, data: bytes) -> None:
        command, op, struct = domctl.SETVCPUEXTSTATE, "setvcpuextstate", domctl.VCPUEXTSTATE
        with self._input_buffer(op, domid, data) as buffer:
            self._vcpu_domctl(command, op, domid, vcpu, struct, size=len(data), buffer=buffer.address)

    def _set_msrs(self, domid: DomId, vcpu: int, data: bytes) -> None:
        command, op, struct = domctl.SET_VCPU_MSRS, "set_vcpu_msrs", domctl.VCPU_MSRS
        count = _count(op, domid, data, VCPU_MSR)
        with self._input_buffer(op, domid, data) as buffer:
            arguments = {"msr_count": count, "msrs": buffer.address}
            number, result = self._vcpu_domctl(command, op, domid, vcpu, struct, errno.EINVAL, errno.ENXIO, **arguments)
        if number:
            index = int(result["msr_count"])
            msrs = f"MSR {_msr_number(data, index):#x}" if index < count else f"{count} MSRs"
            raise host_error(op, errno.EINVAL, domid, f"{msrs} cannot be set on this host")

    def _vcpu_domctl(
        self, command: int, op: str, domid: DomId, vcpu: int, struct: Struct, *expected: int, **arguments: Any
    ) -> tuple[int, np.void]:
        """Make a domctl about a vcpu.

        0 or one of the ``expected`` errnos, and the arguments as Xen leaves them.
        """
        if not 0 <= vcpu <= self._max_vcpu(domid):
            raise host_error(op, errno.EINVAL, domid, f"it has no vcpu {vcpu}")
        number, result = self._calls.try_domctl(command, op, domid, struct, vcpu=vcpu, **arguments)
        if number == errno.ESRCH and domid == DOM0:
            raise host_error(op, errno.EINVAL, domid, f"vcpu {vcpu} of dom0 makes this call")
        if number and number not in expected:
            raise host_error(op, number, domid)
        return number, result

    @contextlib.contextmanager
    def _input_buffer(self, op: str, domid: DomId, data: bytes) -> Iterator[Buffer]:
        """Copy bytes to where Xen can read them, until the block ends."""
        if len(data) > _BLOB_MAX:
            raise host_error(op, errno.EINVAL, domid, f"{len(data)} bytes are more than any CPU has")
        with self._calls.buffer(len(data)) as buffer:
            buffer.array[: len(data)] = np.frombuffer(data, np.uint8)
            yield buffer

    def tsc_info(self, domid: DomId) -> TscInfo:
        """See Mover."""
        struct = domctl.TSC_INFO
        result = self._calls.domctl(domctl.GETTSCINFO, "gettscinfo", domid, struct)
        return TscInfo(*(int(result[name]) for name in ("tsc_mode", "gtsc_khz", "elapsed_nsec", "incarnation")))

    def set_tsc_info(self, domid: DomId, info: TscInfo) -> None:
        """See Mover."""
        arguments = {"tsc_mode": info.mode, "gtsc_khz": info.khz}
        arguments |= {"elapsed_nsec": info.nsec, "incarnation": info.incarnation}
        self._calls.domctl(domctl.SETTSCINFO, "settscinfo", domid, domctl.TSC_INFO, **arguments)

    def cpu_policy(self, domid: DomId) -> CpuPolicy:
        """See Mover."""
        op = "get_cpu_policy"
        leaves, msrs = self._policy_sizes(domid)
        sizes = leaves * CPUID_LEAF.size(8), msrs * MSR_ENTRY.size(8)
        with self._calls.buffer(sizes[0]) as leaf_buffer, self._calls.buffer(sizes[1]) as msr_buffer:
            arguments = {"nr_leaves": leaves, "leaves": leaf_buffer.address}
            arguments |= {"nr_msrs": msrs, "msrs": msr_buffer.address}
            result = self._calls.domctl(domctl.GET_CPU_POLICY, op, domid, domctl.CPU_POLICY, **arguments)
            return CpuPolicy(
                leaf_buffer.array[: min(int(result["nr_leaves"]), leaves) * CPUID_LEAF.size(8)].tobytes(),
                msr_buffer.array[: min(int(result["nr_msrs"]), msrs) * MSR_ENTRY.size(8)].tobytes(),
            )

    def _policy_sizes(self, domid: DomId) -> tuple[int, int]:
        """Return how many leaves and MSRs this Xen knows at most."""
        op = "get_cpu_policy"
        limits = self._calls.domctl(domctl.GET_CPU_POLICY, op, domid, domctl.CPU_POLICY)
        leaves, msrs = int(limits["nr_leaves"]), int(limits["nr_msrs"])
        if max(leaves, msrs) * CPUID_LEAF.size(8) > _BLOB_MAX:
            raise _implausible_size(op, domid, max(leaves, msrs) * CPUID_LEAF.size(8))
        return leaves, msrs

    def set_cpu_policy(self, domid: DomId, policy: CpuPolicy) -> None:
        """See Mover."""
        op, struct = "set_cpu_policy", domctl.CPU_POLICY
        leaves, msrs = _count(op, domid, policy.leaves, CPUID_LEAF), _count(op, domid, policy.msrs, MSR_ENTRY)
        with (
            self._input_buffer(op, domid, policy.leaves) as leaf_buffer,
            self._input_buffer(op, domid, policy.msrs) as msr_buffer,
        ):
            arguments = {"nr_leaves": leaves, "leaves": leaf_buffer.address}
            arguments |= {"nr_msrs": msrs, "msrs": msr_buffer.address}
            number, result = self._calls.try_domctl(domctl.SET_CPU_POLICY, op, domid, struct, **arguments)
        if not number:
            return
        if number == errno.EEXIST:
            raise host_error(op, number, domid, "the domain runs or has run already")
        if number == errno.E2BIG:
            raise host_error(op, number, domid, f"{leaves} leaves and {msrs} MSRs are more than this Xen knows")
        leaf, subleaf, msr = (int(result[f"err_{name}"]) for name in ("leaf", "subleaf", "msr"))
        subleaf_text = f", subleaf {subleaf:#x}" if subleaf != _NO_CULPRIT else ""
        culprits = [f"leaf {leaf:#x}{subleaf_text}"] if leaf != _NO_CULPRIT else []
        culprits += [f"MSR {msr:#x}"] if msr != _NO_CULPRIT else []
        if number == errno.ESRCH or not culprits:
            raise host_error(op, number, domid)
        raise host_error(op, number, domid, f"this host cannot provide the value of {' and '.join(culprits)}")


def _count(op: str, domid: DomId, data: bytes, struct: Struct) -> int:
    """Return the number of structs in an array. HostError if it is no whole number."""
    size = struct.size(8)
    if len(data) % size:
        reason = f"{len(data)} bytes are not a whole number of struct {struct.name} ({size} bytes each)"
        raise host_error(op, errno.EINVAL, domid, reason)
    return len(data) // size


def _msr_number(data: bytes, index: int) -> int:
    return int(VCPU_MSR.read(data, 8, index * VCPU_MSR.size(8))["index"])


def _implausible_size(op: str, domid: DomId, size: int) -> HostError:
    return HostError(f"dom{domid}: {op}: Xen claims a size of {size:#x} bytes", op=op, domid=domid)
