"""The records of a libxc stream, each with the checks that its bytes allow.

PAGE_DATA is in page_data.py.

NumPy is imported only on demand: verify-stream-v2 starts in half the time without it. Arrays are views.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar, Self

from xenpv.abi.declare import Width
from xenpv.abi.domctl import CPUID_LEAF, EXT_VCPUCONTEXT_MAX, MSR_ENTRY, VCPU_MSR, XSAVE_HEADER_SIZE
from xenpv.abi.x86 import LEVELS, PAGE_SIZE, VCPU_GUEST_CONTEXT
from xenpv.stream import rules
from xenpv.stream.fields import Buffer, Fields, RecordContext, byteswap_words
from xenpv.stream.framing import BLOB_MAX, RECORD_LENGTH_MAX, Opaque, Record
from xenpv.stream.record_order import RecordType

if TYPE_CHECKING:
    from xenpv.frames import I64, U64

PFN_MAX = (1 << 52) - 1  # the largest pfn that an entry of PAGE_DATA can name
VCPUS_MAX = 8192  # xen.git:xen/include/xen/sched.h MAX_VIRT_CPUS for PV, 64-bit


class End(Record):
    """END: the stream is complete."""

    TYPE = RecordType.END


class StaticDataEnd(Record):
    """STATIC_DATA_END: memory and registers follow."""

    TYPE = RecordType.STATIC_DATA_END


class Verify(Record):
    """VERIFY: all pages are sent once more, to be compared."""

    TYPE = RecordType.VERIFY


class Checkpoint(Record):
    """CHECKPOINT: a domain could start from the records so far."""

    TYPE = RecordType.CHECKPOINT


@dataclass(frozen=True, slots=True, kw_only=True)
class X86PVInfo(Record):
    """X86_PV_INFO: the guest's width and its levels of page tables."""

    TYPE = RecordType.X86_PV_INFO
    LENGTH = range(8, 9)
    FIELDS = Fields(guest_width=1, pt_levels=1, _res1=2, _res2=4)
    guest_width: Width
    pt_levels: int

    def check(self, ctx: RecordContext) -> bool:
        if LEVELS.get(self.guest_width) == self.pt_levels:
            return True
        message = f"width {self.guest_width}, pt_levels {self.pt_levels}"
        ctx.report(rules.PV_INFO, f"Invalid X86_PV_INFO combination: {message}")
        return False

    def update_context(self, ctx: RecordContext) -> None:
        ctx.width = ctx.width or self.guest_width  # a second X86_PV_INFO is a breach, and the first counts


@dataclass(frozen=True, slots=True, kw_only=True)
class X86PVP2MFrames(Record):
    """The frames that hold the p2m's entries for start_pfn to end_pfn, both included.

    ``raw`` is their pfns, 64 bits each, little-endian.
    """

    TYPE = RecordType.X86_PV_P2M_FRAMES
    LENGTH = range(8, RECORD_LENGTH_MAX + 1)
    FIELDS = Fields(start_pfn=4, end_pfn=4)
    BLOB = "raw"
    start_pfn: int
    end_pfn: int
    raw: Buffer = field(repr=False)

    def update_context(self, ctx: RecordContext) -> None:
        ctx.max_pfn = max(ctx.max_pfn or 0, self.end_pfn)

    @property
    def p2m_pfns(self) -> U64:
        """The pfns of the frames, uint64."""
        import numpy as np  # noqa: PLC0415

        return np.frombuffer(self.raw, "<u8").astype(np.uint64, copy=False)

    @classmethod
    def parse(cls, ctx: RecordContext, body: memoryview, *, offset: int) -> Self | None:
        start, end = cls.FIELDS.unpack(body, ctx.byte_order)
        raw = bytes(body[8:])
        if ctx.byte_order == ">" and len(raw) % 8 == 0:  # check() refuses other sizes
            raw = byteswap_words(raw)
        record = cls(offset=offset, length=len(body), start_pfn=start, end_pfn=end, raw=raw)
        return record if record.check(ctx) else None

    def check(self, ctx: RecordContext) -> bool:
        start, end = self.start_pfn, self.end_pfn
        if start > end:
            ctx.report(rules.P2M_RANGE, f"End pfn in stream ({end:#x}) exceeds Start ({start:#x})")
            return False
        per_page = PAGE_SIZE // (ctx.width or 8)
        frames = end // per_page - start // per_page + 1
        if len(self.raw) != frames * 8:
            ctx.report(
                rules.RECORD_SIZE,
                f"X86_PV_P2M_FRAMES record wrong size: start_pfn {start:#x}, end_pfn {end:#x}, "
                f"length {8 + len(self.raw)}, expected 8 + {frames} * 8",
            )
            return False
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class P2MLeaves(Record):
    """The leaves of a p2m of ``entries`` entries, in runs.

    A later record replaces all of it. It is never shorter: earlier pages may lie beyond its end.

    ``raw`` is the runs, three words of 64 bits each, little-endian: number of the first leaf, how many leaves, and the
    pfn of the one frame that holds all of them.

    Source: docs/reference/records.md
    """

    TYPE = RecordType.XENPV_P2M_LEAVES
    LENGTH = range(8 + 24, RECORD_LENGTH_MAX + 1)
    FIELDS = Fields(entries=8)
    BLOB = "raw"
    entries: int
    raw: Buffer = field(repr=False)

    @property
    def end_pfn(self) -> int:
        """The last pfn of the p2m."""
        return self.entries - 1

    def update_context(self, ctx: RecordContext) -> None:
        ctx.max_pfn = max(ctx.max_pfn or 0, self.end_pfn)

    @property
    def runs(self) -> tuple[I64, I64, U64]:
        """The runs: number of the first leaf, number of leaves, and pfn.

        int64, int64 and uint64, one element for each run.
        """
        import numpy as np  # noqa: PLC0415

        first, count, pfn = np.frombuffer(self.raw, "<u8").reshape(-1, 3).T
        return first.astype(np.int64), count.astype(np.int64), pfn.astype(np.uint64)

    @classmethod
    def parse(cls, ctx: RecordContext, body: memoryview, *, offset: int) -> Self | None:
        entries, raw = cls.FIELDS.unpack(body, ctx.byte_order)[0], bytes(body[8:])
        if ctx.byte_order == ">" and len(raw) % 8 == 0:
            raw = byteswap_words(raw)
        record = cls(offset=offset, length=len(body), entries=entries, raw=raw)
        return record if record.check(ctx) else None

    def check(self, ctx: RecordContext) -> bool:
        import numpy as np  # noqa: PLC0415

        from xenpv.frames import first_bad  # noqa: PLC0415

        if len(self.raw) % 24:
            ctx.report(
                rules.RECORD_SIZE,
                f"XENPV_P2M_LEAVES: {len(self.raw)} bytes are not a multiple of 24",
            )
            return False
        first, count, pfn = np.frombuffer(self.raw, "<u8").reshape(-1, 3).T
        limit = np.uint64(PFN_MAX)
        valid = (first <= limit) & (count > 0) & (count <= limit) & (pfn <= limit)
        valid[0] &= first[0] == 0
        valid[1:] &= first[1:] == first[:-1] + count[:-1]
        if (row := first_bad(~valid)) is not None:
            words = ", ".join(f"{int(n):#x}" for n in (first[row], count[row], pfn[row]))
            ctx.report(rules.P2M_RANGE, f"XENPV_P2M_LEAVES: run {row} ({words}) does not continue the last run")
            return False
        leaves, end = -(-self.entries * (ctx.width or 8) // PAGE_SIZE), int(first[-1]) + int(count[-1])
        if leaves != end or self.entries > PFN_MAX + 1:
            message = f"XENPV_P2M_LEAVES: {self.entries:#x} entries have {leaves:#x} leaves, not {end:#x}"
            ctx.report(rules.P2M_RANGE, message)
            return False
        if ctx.max_pfn is not None and self.end_pfn < ctx.max_pfn:
            message = f"XENPV_P2M_LEAVES: the p2m ends at {self.end_pfn:#x}, and ended at {ctx.max_pfn:#x} before"
            ctx.report(rules.P2M_RANGE, message)
            return False
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuBlob(Record):
    """One part of a vcpu's state, as a domctl returns it and another one sets it."""

    LENGTH = range(8, BLOB_MAX)
    FIELDS = Fields(vcpu_id=4, _reserved=4)
    BLOB = "context"
    vcpu_id: int
    context: bytes = field(repr=False)

    def check(self, ctx: RecordContext) -> bool:
        name, vcpu, size = self.type_name(), self.vcpu_id, len(self.context)
        if not size:
            ctx.report(rules.RECORD_EMPTY, f"empty {name} record for vcpu {vcpu}")
            return False
        if vcpu >= VCPUS_MAX:
            ctx.report(rules.VCPU_ID, f"{name} record vcpu_id ({vcpu}) exceeds what Xen can have ({VCPUS_MAX - 1})")
            return False
        if error := self.size_error(ctx, size):
            ctx.report(rules.VCPU_SIZE, f"{name} record of vcpu{vcpu} {error}, got {size}")
            return False
        return True

    @classmethod
    def size_error(cls, ctx: RecordContext, size: int) -> str | None:
        """Return the fault of a context of that size; None if it is right."""
        raise NotImplementedError


class VcpuBasic(VcpuBlob):
    """X86_PV_VCPU_BASIC: a vcpu_guest_context."""

    TYPE = RecordType.X86_PV_VCPU_BASIC

    @classmethod
    def size_error(cls, ctx: RecordContext, size: int) -> str | None:
        expected = VCPU_GUEST_CONTEXT.size(ctx.width or 8)
        return None if size == expected else f"wrong size: expected {expected} bytes"


class VcpuExtended(VcpuBlob):
    """X86_PV_VCPU_EXTENDED: an xen_domctl_ext_vcpucontext."""

    TYPE = RecordType.X86_PV_VCPU_EXTENDED

    @classmethod
    def size_error(cls, ctx: RecordContext, size: int) -> str | None:  # noqa: ARG003
        return None if size <= EXT_VCPUCONTEXT_MAX else f"too long: max {EXT_VCPUCONTEXT_MAX} bytes"


class VcpuXsave(VcpuBlob):
    """X86_PV_VCPU_XSAVE: the xsave area of a vcpu."""

    TYPE = RecordType.X86_PV_VCPU_XSAVE

    @classmethod
    def size_error(cls, ctx: RecordContext, size: int) -> str | None:  # noqa: ARG003
        return None if size >= XSAVE_HEADER_SIZE else f"too short: min {XSAVE_HEADER_SIZE} bytes"


class VcpuMsrs(VcpuBlob):
    """X86_PV_VCPU_MSRS: an array of xen_domctl_vcpu_msr."""

    TYPE = RecordType.X86_PV_VCPU_MSRS

    @classmethod
    def size_error(cls, ctx: RecordContext, size: int) -> str | None:  # noqa: ARG003
        return None if size % VCPU_MSR.size(8) == 0 else f"expected to be a multiple of {VCPU_MSR.size(8)} bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedInfo(Opaque):
    """The shared info page, 4096 bytes; its mfns are the saving host's."""

    TYPE = RecordType.SHARED_INFO
    LENGTH = range(PAGE_SIZE, PAGE_SIZE + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class X86TscInfo(Record):
    """X86_TSC_INFO: mode, frequency and clock of the guest's TSC."""

    TYPE = RecordType.X86_TSC_INFO
    LENGTH = range(24, 25)
    FIELDS = Fields(mode=4, khz=4, nsec=8, incarnation=4, _reserved=4)
    mode: int
    khz: int
    nsec: int
    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HvmContext(Opaque):
    """HVM_CONTEXT: Xen's own records of an HVM domain."""

    TYPE = RecordType.HVM_CONTEXT
    LENGTH = range(1, RECORD_LENGTH_MAX + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class HvmParams(Record):
    """HVM parameters: ``params`` has the values by index."""

    TYPE = RecordType.HVM_PARAMS
    LENGTH = range(8, BLOB_MAX)
    FIELDS = Fields(count=4, _reserved=4)
    params: dict[int, int]

    @classmethod
    def parse(cls, ctx: RecordContext, body: memoryview, *, offset: int) -> Self | None:
        count = cls.FIELDS.read(ctx, cls.type_name(), body)["count"]
        if len(body) != 8 + count * 16:
            ctx.report(
                rules.RECORD_SIZE, f"HVM_PARAMS: {count} parameters need {8 + count * 16} bytes, got {len(body)}"
            )
            return None
        record = cls(offset=offset, length=len(body), params=dict(struct.iter_unpack(f"{ctx.byte_order}QQ", body[8:])))
        return record if record.check(ctx) else None

    def check(self, ctx: RecordContext) -> bool:
        if not self.params:
            ctx.report(rules.RECORD_EMPTY, "empty HVM_PARAMS record")
        return True

    def body(self) -> list[Buffer]:
        pairs = (_PARAM.pack(index=index, value=value) for index, value in self.params.items())
        return [self.FIELDS.pack(count=len(self.params)), *pairs]


_PARAM = Fields(index=8, value=8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy(Opaque):
    """A CPU policy: an array of structs of ENTRY bytes, at least one."""

    LENGTH = range(1, BLOB_MAX)
    ENTRY: ClassVar[int]

    def check(self, ctx: RecordContext) -> bool:
        if len(self.data) % self.ENTRY:
            message = f"{self.type_name()} size {len(self.data)} should be multiple of {self.ENTRY}"
            ctx.report(rules.RECORD_SIZE, message)
            return False
        return True


class CpuidPolicy(Policy):
    """X86_CPUID_POLICY: an array of xen_cpuid_leaf."""

    TYPE = RecordType.X86_CPUID_POLICY
    ENTRY = CPUID_LEAF.size(8)


class MsrPolicy(Policy):
    """X86_MSR_POLICY: an array of xen_msr_entry."""

    TYPE = RecordType.X86_MSR_POLICY
    ENTRY = MSR_ENTRY.size(8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal(Record):
    """XENPV_SEAL: digests of the batches since the last seal, then of all so far.

    ``number``: of BEGIN, the bytes before the image header that the seal covers; otherwise the batches so far.

    Source: docs/reference/records.md
    """

    TYPE = RecordType.XENPV_SEAL
    LENGTH = range(16, BLOB_MAX)
    FIELDS = Fields(part=4, algorithm=4, number=8)
    BLOB = "digests"
    part: int
    algorithm: int
    number: int
    digests: bytes = field(repr=False)

    def check(self, ctx: RecordContext) -> bool:
        size = SEAL_DIGEST_SIZES.get(self.algorithm)
        if size is None or self.part not in set(SealPart) or not self.digests or len(self.digests) % size:
            problem = f"part {self.part}, algorithm {self.algorithm}, {len(self.digests)} bytes of digests"
            ctx.report(rules.SEAL, f"XENPV_SEAL that is none: {problem}")
            return False
        return True


class SealPart(IntEnum):
    """The parts of a seal."""

    BEGIN = 0
    NEXT = 1
    END = 2


SEAL_DIGEST_SIZES = {1: 16, 2: 16, 3: 32}  # bytes, by the number of the algorithm


class Toolstack(Opaque):
    """TOOLSTACK: deprecated; no restorer takes it."""

    TYPE = RecordType.TOOLSTACK


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDirtyPfnList(Opaque):
    """CHECKPOINT_DIRTY_PFN_LIST: of the back channel of a checkpointed migration."""

    TYPE = RecordType.CHECKPOINT_DIRTY_PFN_LIST


_ALL: tuple[type[Record], ...] = (
    End, X86PVInfo, X86PVP2MFrames, VcpuBasic, VcpuExtended, VcpuXsave, SharedInfo, X86TscInfo, HvmContext,
    HvmParams, Toolstack, VcpuMsrs, Verify, Checkpoint, CheckpointDirtyPfnList, StaticDataEnd, CpuidPolicy, MsrPolicy,
    P2MLeaves, Seal,
)  # fmt: skip
LIBXC = {cls.TYPE: cls for cls in _ALL}
