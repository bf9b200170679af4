"""Typed records, each with the checks that its own bytes allow. Page content passes elsewhere, see reader.py.

Nothing here needs NumPy: a checker of framing starts in half the time without it. Arrays are views, made when asked
for.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Self

from xenpv.abi.declare import Width
from xenpv.abi.domctl import CPUID_LEAF, EXT_VCPUCONTEXT_MAX, MSR_ENTRY, VCPU_MSR, XSAVE_HEADER_SIZE
from xenpv.abi.x86 import LEVELS, PAGE_SIZE, VCPU_GUEST_CONTEXT
from xenpv.findings import Rule
from xenpv.stream import rules
from xenpv.stream.order import Guest, Type

if TYPE_CHECKING:
    from xenpv.frames import U64

RECORD_LENGTH_MAX = 128 << 20  # REC_LENGTH_MAX
BLOB_MAX = 1 << 20  # far above any vcpu or policy blob that Xen makes (an xsave area is some 11 KiB)
VCPUS_MAX = 8192  # xen.git:xen/include/xen/sched.h MAX_VIRT_CPUS for PV, 64-bit


@lru_cache
def _layout(order: str, sizes: tuple[int, ...]) -> struct.Struct:
    """Unsigned fields of these sizes, one behind the other."""
    return struct.Struct(order + "".join({1: "B", 2: "H", 4: "I", 8: "Q"}[size] for size in sizes))


@dataclass(slots=True)
class Context:
    """What reading one record needs to know of the stream around it.

    ``fault(rule, message)`` raises or collects; a parser that calls it for something that makes the body useless then
    returns None. ``order`` is "<" or ">"; ``max_pfn`` the last pfn that P2M_FRAMES allow, None for HVM.
    """

    fault: Callable[[Rule, str], None]
    order: str = "<"
    version: int = 3
    guest: Guest = Guest.PV
    width: Width | None = None
    max_pfn: int | None = None

    def ints(self, body: memoryview, *sizes: int) -> tuple[int, ...]:
        """Unsigned fields of those sizes in bytes, from the start of body, in the stream's byte order."""
        return _layout(self.order, sizes).unpack_from(body)

    def reserved(self, name: str, *values: int) -> None:
        if any(values):
            self.fault(rules.RESERVED, f"reserved bits set in {name}: {', '.join(hex(v) for v in values)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A record at byte ``offset`` (of its header) with a body of ``length`` bytes, padding not counted."""

    TYPE: ClassVar[int]
    LENGTH: ClassVar[range] = range(1)  # lengths that a body may have; the reader checks it before it takes the body
    offset: int
    length: int

    @classmethod
    def title(cls) -> str:
        """The name of this type of record, as the specification has it."""
        return Type(cls.TYPE).name

    @property
    def name(self) -> str:
        return self.title()

    @classmethod
    def parse(cls, ctx: Context, body: memoryview, *, offset: int) -> Self | None:  # noqa: ARG003
        """The record out of its body; None when faults left nothing to use."""
        return cls(offset=offset, length=len(body))


class End(Record):
    TYPE = Type.END


class StaticDataEnd(Record):
    TYPE = Type.STATIC_DATA_END


class Verify(Record):
    TYPE = Type.VERIFY


class Checkpoint(Record):
    TYPE = Type.CHECKPOINT


@dataclass(frozen=True, slots=True, kw_only=True)
class Opaque(Record):
    """A record of which only the bytes are known here."""

    data: bytes = field(repr=False)
    LENGTH = range(RECORD_LENGTH_MAX + 1)

    @classmethod
    def parse(cls, ctx: Context, body: memoryview, *, offset: int) -> Self | None:  # noqa: ARG003
        return cls(offset=offset, length=len(body), data=bytes(body))


@dataclass(frozen=True, slots=True, kw_only=True)
class Unknown(Record):
    """A record of a type that is not in the specification; its body is passed over."""

    type: int

    @property
    def name(self) -> str:
        return f"{'optional ' if self.type >> 31 else ''}record {self.type:#x}"


@dataclass(frozen=True, slots=True, kw_only=True)
class X86PVInfo(Record):
    TYPE = Type.X86_PV_INFO
    LENGTH = range(8, 9)
    guest_width: Width
    pt_levels: int

    @classmethod
    def parse(cls, ctx: Context, body: memoryview, *, offset: int) -> Self | None:
        width, levels, res1, res2 = ctx.ints(body, 1, 1, 2, 4)
        ctx.reserved("X86_PV_INFO", res1, res2)
        if LEVELS.get(width) != levels:
            ctx.fault(rules.PV_INFO, f"Invalid X86_PV_INFO combination: width {width}, pt_levels {levels}")
            return None
        return cls(offset=offset, length=len(body), guest_width=8 if width == 8 else 4, pt_levels=levels)


@dataclass(frozen=True, slots=True, kw_only=True)
class X86PVP2MFrames(Record):
    """The frames that hold the p2m's entries for start_pfn to end_pfn, both included."""

    TYPE = Type.X86_PV_P2M_FRAMES
    LENGTH = range(8, RECORD_LENGTH_MAX + 1)
    start_pfn: int
    end_pfn: int
    raw: bytes = field(repr=False)
    order: str = "<"

    @property
    def p2m_pfns(self) -> U64:
        """The pfns of the frames."""
        import numpy as np  # noqa: PLC0415

        return np.frombuffer(self.raw, f"{self.order}u8").astype(np.uint64)

    @classmethod
    def parse(cls, ctx: Context, body: memoryview, *, offset: int) -> Self | None:
        start, end = ctx.ints(body, 4, 4)
        if start > end:
            ctx.fault(rules.P2M_RANGE, f"End pfn in stream ({end:#x}) exceeds Start ({start:#x})")
            return None
        per_page = PAGE_SIZE // (ctx.width or 8)
        frames = end // per_page - start // per_page + 1
        if len(body) != 8 + frames * 8:
            ctx.fault(
                rules.RECORD_SIZE,
                f"X86_PV_P2M_FRAMES record wrong size: start_pfn {start:#x}, end_pfn {end:#x}, length {len(body)}, "
                f"expected 8 + {frames} * 8",
            )
            return None
        raw = bytes(body[8:])
        return cls(offset=offset, length=len(body), start_pfn=start, end_pfn=end, raw=raw, order=ctx.order)


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuBlob(Record):
    """One vcpu's state as a pair of domctls gives and takes it."""

    LENGTH = range(8, BLOB_MAX)
    vcpu_id: int
    context: bytes = field(repr=False)

    @classmethod
    def parse(cls, ctx: Context, body: memoryview, *, offset: int) -> Self | None:
        vcpu, reserved = ctx.ints(body, 4, 4)
        name = cls.title()
        ctx.reserved(name, reserved)
        if len(body) == 8:
            ctx.fault(rules.RECORD_EMPTY, f"empty {name} record for vcpu {vcpu}")
            return None
        if vcpu >= VCPUS_MAX:
            ctx.fault(rules.VCPU_ID, f"{name} record vcpu_id ({vcpu}) exceeds what Xen can have ({VCPUS_MAX - 1})")
            return None
        if wrong := cls.wrong_size(ctx, len(body) - 8):
            ctx.fault(rules.VCPU_SIZE, f"{name} record of vcpu{vcpu} {wrong}, got {len(body) - 8}")
            return None
        return cls(offset=offset, length=len(body), vcpu_id=vcpu, context=bytes(body[8:]))

    @classmethod
    def wrong_size(cls, ctx: Context, size: int) -> str | None:
        raise NotImplementedError


class VcpuBasic(VcpuBlob):
    TYPE = Type.X86_PV_VCPU_BASIC

    @classmethod
    def wrong_size(cls, ctx: Context, size: int) -> str | None:
        expected = VCPU_GUEST_CONTEXT.size(ctx.width or 8)
        return None if size == expected else f"wrong size: expected {expected} bytes"


class VcpuExtended(VcpuBlob):
    TYPE = Type.X86_PV_VCPU_EXTENDED

    @classmethod
    def wrong_size(cls, ctx: Context, size: int) -> str | None:  # noqa: ARG003
        return None if size <= EXT_VCPUCONTEXT_MAX else f"too long: max {EXT_VCPUCONTEXT_MAX} bytes"


class VcpuXsave(VcpuBlob):
    TYPE = Type.X86_PV_VCPU_XSAVE

    @classmethod
    def wrong_size(cls, ctx: Context, size: int) -> str | None:  # noqa: ARG003
        return None if size >= XSAVE_HEADER_SIZE else f"too short: min {XSAVE_HEADER_SIZE} bytes"


class VcpuMsrs(VcpuBlob):
    TYPE = Type.X86_PV_VCPU_MSRS

    @classmethod
    def wrong_size(cls, ctx: Context, size: int) -> str | None:  # noqa: ARG003
        return None if size % VCPU_MSR.size(8) == 0 else f"expected to be a multiple of {VCPU_MSR.size(8)} bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedInfo(Opaque):
    """The shared info page, 4096 bytes; its mfns are those of the host that saved."""

    TYPE = Type.SHARED_INFO
    LENGTH = range(PAGE_SIZE, PAGE_SIZE + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class X86TscInfo(Record):
    TYPE = Type.X86_TSC_INFO
    LENGTH = range(24, 25)
    mode: int
    khz: int
    nsec: int
    incarnation: int

    @classmethod
    def parse(cls, ctx: Context, body: memoryview, *, offset: int) -> Self | None:
        mode, khz, nsec, incarnation, reserved = ctx.ints(body, 4, 4, 8, 4, 4)
        ctx.reserved("X86_TSC_INFO", reserved)
        return cls(offset=offset, length=24, mode=mode, khz=khz, nsec=nsec, incarnation=incarnation)


@dataclass(frozen=True, slots=True, kw_only=True)
class HvmContext(Opaque):
    TYPE = Type.HVM_CONTEXT
    LENGTH = range(1, RECORD_LENGTH_MAX + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class HvmParams(Record):
    """HVM parameters, value by index."""

    TYPE = Type.HVM_PARAMS
    LENGTH = range(8, BLOB_MAX)
    params: dict[int, int]

    @classmethod
    def parse(cls, ctx: Context, body: memoryview, *, offset: int) -> Self | None:
        count, reserved = ctx.ints(body, 4, 4)
        ctx.reserved("HVM_PARAMS", reserved)
        if len(body) != 8 + count * 16:
            ctx.fault(rules.RECORD_SIZE, f"HVM_PARAMS: {count} parameters need {8 + count * 16} bytes, got {len(body)}")
            return None
        if count == 0:
            ctx.fault(rules.RECORD_EMPTY, "empty HVM_PARAMS record")
        params = dict(struct.iter_unpack(f"{ctx.order}QQ", body[8:]))
        return cls(offset=offset, length=len(body), params=params)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy(Opaque):
    """A CPU policy: an array of ENTRY structs, at least one."""

    LENGTH = range(1, BLOB_MAX)
    ENTRY: ClassVar[int]

    @classmethod
    def parse(cls, ctx: Context, body: memoryview, *, offset: int) -> Self | None:
        if len(body) % cls.ENTRY:
            ctx.fault(rules.RECORD_SIZE, f"{cls.title()} size {len(body)} should be multiple of {cls.ENTRY}")
            return None
        return cls(offset=offset, length=len(body), data=bytes(body))


class CpuidPolicy(Policy):
    TYPE = Type.X86_CPUID_POLICY
    ENTRY = CPUID_LEAF.size(8)


class MsrPolicy(Policy):
    TYPE = Type.X86_MSR_POLICY
    ENTRY = MSR_ENTRY.size(8)


class Toolstack(Opaque):
    TYPE = Type.TOOLSTACK


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDirtyPfnList(Opaque):
    TYPE = Type.CHECKPOINT_DIRTY_PFN_LIST


_ALL: tuple[type[Record], ...] = (
    End, X86PVInfo, X86PVP2MFrames, VcpuBasic, VcpuExtended, VcpuXsave, SharedInfo, X86TscInfo, HvmContext,
    HvmParams, Toolstack, VcpuMsrs, Verify, Checkpoint, CheckpointDirtyPfnList, StaticDataEnd, CpuidPolicy, MsrPolicy,
)  # fmt: skip
LIBXC = {cls.TYPE: cls for cls in _ALL}
