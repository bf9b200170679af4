"""XenMover: the Mover protocol over the Xen that this dom0 runs on."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from xenpv.abi.declare import Struct
from xenpv.abi.domctl import CPUID_LEAF, EXT_VCPUCONTEXT, EXT_VCPUCONTEXT_MAX, MSR_ENTRY, VCPU_MSR
from xenpv.abi.xen import SHARED_INFO
from xenpv.errors import HostError
from xenpv.frames import PAGE_SHIFT, PAGE_SIZE, U64, DomId
from xenpv.host import xenstore_nodes
from xenpv.host.protocol import DOM0, CpuPolicy, TscInfo, VcpuState
from xenpv.host.xen import domctl
from xenpv.host.xen.libxen import Buffer, failed, refused
from xenpv.host.xen.toolstack import XenToolstack

_BLOB_MAX = 1 << 20  # bytes; nothing that a vcpu or a policy has is near it
_NONE = 0xFFFF_FFFF  # no leaf, subleaf or MSR is to blame
_LEAF_PFNS = 8 * PAGE_SIZE  # what one page of Xen's own bitmap is for
_LEAVES_MAX = 1 << 14  # 64 MiB
_WORDS_AT_ONCE = 1 << 16  # half a MiB of bitmap, 4 Mi pfns


class XenMover(XenToolstack):
    """XenToolstack, and what moves PV domains."""

    # -- vcpus

    def vcpu_state(self, domid: DomId, vcpu: int) -> VcpuState:
        return VcpuState(
            self._extended(domid, vcpu),
            self._xsave(domid, vcpu),
            self._msrs(domid, vcpu),
        )

    def _extended(self, domid: DomId, vcpu: int) -> bytes:
        command, op = domctl.GET_EXT_VCPUCONTEXT, "get_ext_vcpucontext"
        _, found = self._of_vcpu(command, op, domid, vcpu, EXT_VCPUCONTEXT)
        size = int(found["size"])
        if size > EXT_VCPUCONTEXT.size(8):
            raise _too_much(op, domid, size)
        return found.tobytes()[:size]

    def _xsave(self, domid: DomId, vcpu: int) -> bytes:
        command, op, struct = domctl.GETVCPUEXTSTATE, "getvcpuextstate", domctl.VCPUEXTSTATE
        _, most = self._of_vcpu(command, op, domid, vcpu, struct)
        size, mask = int(most["size"]), int(most["xfeature_mask"])
        if size > _BLOB_MAX:
            raise _too_much(op, domid, size)
        if not mask:
            return b""
        with self._calls.buffer(size) as buffer:
            arguments = {"xfeature_mask": mask, "size": size, "buffer": buffer.address}
            _, found = self._of_vcpu(command, op, domid, vcpu, struct, **arguments)
            return buffer.array[: min(int(found["size"]), size)].tobytes()

    def _msrs(self, domid: DomId, vcpu: int) -> bytes:
        command, op, struct = domctl.GET_VCPU_MSRS, "get_vcpu_msrs", domctl.VCPU_MSRS
        count = int(self._of_vcpu(command, op, domid, vcpu, struct)[1]["msr_count"])
        size = count * VCPU_MSR.size(8)
        if size > _BLOB_MAX:
            raise _too_much(op, domid, size)
        if not count:
            return b""
        with self._calls.buffer(size) as buffer:
            _, found = self._of_vcpu(command, op, domid, vcpu, struct, msr_count=count, msrs=buffer.address)
            return buffer.array[: min(int(found["msr_count"]), count) * VCPU_MSR.size(8)].tobytes()

    def set_vcpu_state(self, domid: DomId, vcpu: int, state: VcpuState) -> None:
        if state.extended:
            self._set_extended(domid, vcpu, state.extended)
        if state.xsave:
            self._set_xsave(domid, vcpu, state.xsave)
        if state.msrs:
            self._set_msrs(domid, vcpu, state.msrs)

    def _set_extended(self, domid: DomId, vcpu: int, data: bytes) -> None:
        command, op = domctl.SET_EXT_VCPUCONTEXT, "set_ext_vcpucontext"
        if len(data) > EXT_VCPUCONTEXT_MAX:
            raise refused(op, domid, errno.EINVAL, f"an extended context of {len(data)} bytes is not one")
        given = EXT_VCPUCONTEXT.read(data.ljust(EXT_VCPUCONTEXT_MAX, b"\0"), 8)
        if int(given["size"]) > len(data):  # which Xen cannot know
            why = f"an extended context of {len(data)} bytes says that it has {int(given['size'])}"
            raise refused(op, domid, errno.EINVAL, why)
        arguments = {name: given[name] for name, _ in EXT_VCPUCONTEXT.members(8) if name != "vcpu"}
        self._of_vcpu(command, op, domid, vcpu, EXT_VCPUCONTEXT, **arguments)

    def _set_xsave(self, domid: DomId, vcpu: int, data: bytes) -> None:
        command, op, struct = domctl.SETVCPUEXTSTATE, "setvcpuextstate", domctl.VCPUEXTSTATE
        with self._given(op, domid, data) as buffer:
            self._of_vcpu(command, op, domid, vcpu, struct, size=len(data), buffer=buffer.address)

    def _set_msrs(self, domid: DomId, vcpu: int, data: bytes) -> None:
        command, op, struct = domctl.SET_VCPU_MSRS, "set_vcpu_msrs", domctl.VCPU_MSRS
        count = _count(op, domid, data, VCPU_MSR)
        with self._given(op, domid, data) as buffer:
            arguments = {"msr_count": count, "msrs": buffer.address}
            number, left = self._of_vcpu(command, op, domid, vcpu, struct, errno.EINVAL, errno.ENXIO, **arguments)
        if number:
            at = int(left["msr_count"])
            which = f"MSR {_index(data, VCPU_MSR, at):#x}" if at < count else f"{count} MSRs"
            raise refused(op, domid, errno.EINVAL, f"{which} cannot be set on this host")

    def _of_vcpu(
        self, command: int, op: str, domid: DomId, vcpu: int, struct: Struct, *expected: int, **arguments: Any
    ) -> tuple[int, np.void]:
        """A domctl of a vcpu: 0 or the errno, where it is an expected one, and the arguments as Xen leaves them."""
        if not 0 <= vcpu <= self._last_vcpu(domid):
            raise refused(op, domid, errno.EINVAL, f"it has no vcpu {vcpu}")
        number, left = self._calls.answered(command, op, domid, struct, vcpu=vcpu, **arguments)
        if number == errno.ESRCH and domid == DOM0:
            raise refused(op, domid, errno.EINVAL, f"vcpu {vcpu} is the one that asks")
        if number and number not in expected:
            raise failed(op, number, domid)
        return number, left

    def _last_vcpu(self, domid: DomId) -> int:
        last = int(self._raw(domid)["max_vcpu_id"])
        return -1 if last == domctl.INVALID_MAX_VCPU_ID else last

    @contextlib.contextmanager
    def _given(self, op: str, domid: DomId, data: bytes) -> Iterator[Buffer]:
        """Bytes where Xen can read them."""
        if len(data) > _BLOB_MAX:
            raise refused(op, domid, errno.EINVAL, f"{len(data)} bytes are more than any CPU has")
        with self._calls.buffer(len(data)) as buffer:
            buffer.array[: len(data)] = np.frombuffer(data, np.uint8)
            yield buffer

    # -- time and CPU

    def tsc_info(self, domid: DomId) -> TscInfo:
        struct = domctl.TSC_INFO
        found = self._calls.domctl(domctl.GETTSCINFO, "gettscinfo", domid, struct)
        return TscInfo(*(int(found[name]) for name in ("tsc_mode", "gtsc_khz", "elapsed_nsec", "incarnation")))

    def set_tsc_info(self, domid: DomId, info: TscInfo) -> None:
        given = {"tsc_mode": info.mode, "gtsc_khz": info.khz}
        given |= {"elapsed_nsec": info.nsec, "incarnation": info.incarnation}
        self._calls.domctl(domctl.SETTSCINFO, "settscinfo", domid, domctl.TSC_INFO, **given)

    def cpu_policy(self, domid: DomId) -> CpuPolicy:
        op = "get_cpu_policy"
        leaves, msrs = self._policy_sizes(domid)
        sizes = leaves * CPUID_LEAF.size(8), msrs * MSR_ENTRY.size(8)
        with self._calls.buffer(sizes[0]) as first, self._calls.buffer(sizes[1]) as second:
            arguments = {"nr_leaves": leaves, "leaves": first.address}
            arguments |= {"nr_msrs": msrs, "msrs": second.address}
            found = self._calls.domctl(domctl.GET_CPU_POLICY, op, domid, domctl.CPU_POLICY, **arguments)
            return CpuPolicy(
                first.array[: min(int(found["nr_leaves"]), leaves) * CPUID_LEAF.size(8)].tobytes(),
                second.array[: min(int(found["nr_msrs"]), msrs) * MSR_ENTRY.size(8)].tobytes(),
            )

    def _policy_sizes(self, domid: DomId) -> tuple[int, int]:
        """How many leaves and MSRs this Xen knows."""
        op = "get_cpu_policy"
        most = self._calls.domctl(domctl.GET_CPU_POLICY, op, domid, domctl.CPU_POLICY)
        leaves, msrs = int(most["nr_leaves"]), int(most["nr_msrs"])
        if max(leaves, msrs) * CPUID_LEAF.size(8) > _BLOB_MAX:
            raise _too_much(op, domid, max(leaves, msrs) * CPUID_LEAF.size(8))
        return leaves, msrs

    def set_cpu_policy(self, domid: DomId, policy: CpuPolicy) -> None:
        op, struct = "set_cpu_policy", domctl.CPU_POLICY
        leaves, msrs = _count(op, domid, policy.leaves, CPUID_LEAF), _count(op, domid, policy.msrs, MSR_ENTRY)
        with self._given(op, domid, policy.leaves) as first, self._given(op, domid, policy.msrs) as second:
            arguments = {"nr_leaves": leaves, "leaves": first.address}
            arguments |= {"nr_msrs": msrs, "msrs": second.address}
            number, left = self._calls.answered(domctl.SET_CPU_POLICY, op, domid, struct, **arguments)
        if not number:
            return
        if number == errno.EEXIST:
            raise refused(op, domid, number, "the domain runs, or has run")
        if number == errno.E2BIG:
            raise refused(op, domid, number, f"{leaves} leaves and {msrs} MSRs are more than this Xen knows")
        leaf, subleaf, msr = (int(left[f"err_{name}"]) for name in ("leaf", "subleaf", "msr"))
        why = [f"leaf {leaf:#x}" + (f", subleaf {subleaf:#x}" if subleaf != _NONE else "")] if leaf != _NONE else []
        why += [f"MSR {msr:#x}"] if msr != _NONE else []
        if number == errno.ESRCH or not why:
            raise failed(op, number, domid)
        raise refused(op, domid, number, f"this host cannot give what is asked in {' and '.join(why)}")

    # -- pages that are written

    def log_dirty(self, domid: DomId, *, on: bool) -> None:
        """See Mover. Xen keeps the log in memory of its own, beside the domain's (see _grow_shadow)."""
        if not on:
            self._check_logging(domid)
            self._shadow(domid, domctl.SHADOW_OP_OFF)
            self._free_shadow(domid)  # the pages of the log itself go to a pool that nobody has any more
            return
        self._grow_shadow(domid)
        try:
            self._shadow(domid, domctl.SHADOW_OP_ENABLE_LOGDIRTY)
        except HostError as error:
            in_use = self._free_shadow(domid)
            if error.errno == errno.EINVAL and in_use:
                raise refused(error.op, domid, errno.EINVAL, "log-dirty is on already") from None
            raise

    def _grow_shadow(self, domid: DomId) -> None:
        """Give a domain that is tiny, or whose pfns lie far apart, the memory that its log will take.

        Xen itself gives the log a page for each 256 pages that the domain has, and uses one for each 32768 pfns in
        which any was written, and for each table above: too little below 4 MiB, and where nearly all of a p2m is holes.
        A page that could not be had is an error when the log is read.
        xen.git:xen/arch/x86/mm/shadow/common.c: sh_min_allocation(), shadow_alloc_p2m_page()
        """
        self._shadow(domid, domctl.SHADOW_OP_GET_ALLOCATION)  # no Xen without shadow paging gets beyond
        info = self.info(domid)
        max_pfn = int(SHARED_INFO.read(self.shared_info(domid), info.width)["arch"]["max_pfn"])
        leaves = max(min(-(-max_pfn // _LEAF_PFNS), info.pages, _LEAVES_MAX), 1)
        nodes = 3 * leaves + 1  # of both levels above as many at most, and the top
        if nodes <= info.pages >> 8:
            return
        pages = 128 * (info.max_vcpu + 1) + nodes
        self._shadow(domid, domctl.SHADOW_OP_SET_ALLOCATION, mb=-(-pages >> (20 - PAGE_SHIFT)))

    def dirty_pfns(self, domid: DomId, pages: int, *, clean: bool) -> U64:
        """See Mover. Takes a bit for each of ``pages`` while it runs: 512 MiB for 2^32."""
        self._check_logging(domid)
        which = domctl.SHADOW_OP_CLEAN if clean else domctl.SHADOW_OP_PEEK
        size = -(-pages // 64) * 8
        with self._calls.buffer(size, zeroed=False) as bitmap:
            bitmap.array[size - 8 : size] = 0  # Xen writes whole bytes
            try:
                done = self._shadow(domid, which, dirty_bitmap=bitmap.address, pages=pages)
            except HostError as error:
                if error.errno != errno.ENOMEM:
                    raise
                why = "too little memory was left for the log, and pages are missing in it; turn it off and on again"
                raise refused(error.op, domid, errno.ENOMEM, why) from None
            pfns = bits_set(bitmap.array[:size].view("<u8"))
            return pfns[: int(np.searchsorted(pfns, np.uint64(min(pages, int(done["pages"])))))]

    def _check_logging(self, domid: DomId) -> None:
        """Raises HostError where no log is kept: Xen itself would give an empty one.

        Xen does not say whether there is one; but a domain that has no shadow tables may give up the memory for them.
        Only on a host with the L1TF flaw may a PV domain have such tables without a log.
        """
        told = self._shadow(domid, domctl.SHADOW_OP_GET_ALLOCATION)
        if not int(told["mb"]) or not self._free_shadow(domid):
            raise refused("shadow_op", domid, errno.EINVAL, "log-dirty is off")

    def _free_shadow(self, domid: DomId) -> bool:
        """Give back the memory for shadow tables. Whether it cannot be, for it is in use."""
        try:
            self._shadow(domid, domctl.SHADOW_OP_SET_ALLOCATION, mb=0)
        except HostError as error:
            if error.errno != errno.EINVAL:
                raise
            return True
        return False

    def _shadow(self, domid: DomId, which: int, **arguments: int) -> np.void:
        op = "shadow_op"
        try:
            return self._calls.domctl(domctl.SHADOW_OP, op, domid, domctl.SHADOW, op=which, **arguments)
        except HostError as error:
            unknown = error.errno == errno.EINVAL and which == domctl.SHADOW_OP_GET_ALLOCATION
            if domid == DOM0 or not (unknown or error.errno == errno.EOPNOTSUPP):
                raise
            why = "this Xen cannot log which pages a PV domain writes (built without CONFIG_SHADOW_PAGING)"
            raise refused(op, domid, errno.EOPNOTSUPP, why) from None

    # -- suspend and resume

    def request_shutdown(self, domid: DomId, value: str) -> None:
        """See Mover. What the guest has seen is not taken back: it has emptied the node itself."""
        self._raw(domid)
        home = xenstore_nodes.home(domid)
        path = f"{home}/{xenstore_nodes.CONTROL}"

        def wanted(read: Callable[[str], str | None]) -> bool:
            if read(home) is None:
                raise failed("xenstore", errno.ESRCH, domid)
            return bool(value) or bool(read(path))

        self._xenstore().write_if(domid, xenstore_nodes.Node(path, value, xenstore_nodes.Access.WRITE), wanted)

    def shutdown_request(self, domid: DomId) -> str:
        self._raw(domid)
        store = self._xenstore()
        store.needed("xenstore", domid)
        return store.read(f"{xenstore_nodes.home(domid)}/{xenstore_nodes.CONTROL}") or ""

    def resume(self, domid: DomId) -> None:
        self._calls.domctl(domctl.RESUMEDOMAIN, "resumedomain", domid, domctl.NOTHING)


def bits_set(words: U64) -> U64:
    """The numbers of the bits that are set, bit 0 of the first word being 0, ascending.

    Costs a look at each word, and memory for half a MiB of them beyond what is returned.
    """
    found = [np.empty(0, np.uint64)]
    for first in range(0, len(words), _WORDS_AT_ONCE):
        batch = words[first : first + _WORDS_AT_ONCE]
        at = np.flatnonzero(batch != 0)
        if len(at):
            bits = np.flatnonzero(np.unpackbits(batch[at].view(np.uint8), bitorder="little"))
            found.append(((at[bits >> 6] + first << 6) + (bits & 63)).astype(np.uint64))
    return np.concatenate(found)


def _count(op: str, domid: DomId, data: bytes, struct: Struct) -> int:
    size = struct.size(8)
    if len(data) % size:
        raise refused(op, domid, errno.EINVAL, f"{len(data)} bytes are no array of struct {struct.name} ({size} bytes)")
    return len(data) // size


def _index(data: bytes, struct: Struct, at: int) -> int:
    return int(struct.read(data, 8, at * struct.size(8))["index"])


def _too_much(op: str, domid: DomId, size: int) -> HostError:
    return HostError(f"dom{domid}: {op}: Xen says that it takes {size:#x} bytes", op=op, domid=domid)
