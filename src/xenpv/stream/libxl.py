"""Records of the libxl layer around a libxc stream (xen.git:docs/specs/libxl-migration-stream.pandoc)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Self

from xenpv.stream import rules
from xenpv.stream.records import RECORD_LENGTH_MAX, Context, Record

VERSION = 2
OPTION_BIG_ENDIAN = 1 << 0
OPTION_LEGACY = 1 << 1


class LibxlType(IntEnum):
    END = 0
    LIBXC_CONTEXT = 1
    EMULATOR_XENSTORE_DATA = 2
    EMULATOR_CONTEXT = 3
    CHECKPOINT_END = 4
    CHECKPOINT_STATE = 5


class Emulator(IntEnum):
    UNKNOWN = 0
    QEMU_TRADITIONAL = 1
    QEMU_UPSTREAM = 2


class LibxlRecord(Record):
    """A record of the libxl layer."""

    @classmethod
    def title(cls) -> str:
        return f"libxl {LibxlType(cls.TYPE).name}"


class LibxlEnd(LibxlRecord):
    TYPE = LibxlType.END


class LibxcContext(LibxlRecord):
    """A libxc stream begins right behind."""

    TYPE = LibxlType.LIBXC_CONTEXT


class CheckpointEnd(LibxlRecord):
    TYPE = LibxlType.CHECKPOINT_END


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointState(LibxlRecord):
    TYPE = LibxlType.CHECKPOINT_STATE
    LENGTH = range(8, 9)
    control_id: int

    @classmethod
    def parse(cls, ctx: Context, body: memoryview, *, offset: int) -> Self | None:
        control_id, padding = ctx.ints(body, 4, 4)
        ctx.reserved("CHECKPOINT_STATE", padding)
        return cls(offset=offset, length=8, control_id=control_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatorRecord(LibxlRecord):
    """State of a device model; ``data`` is what follows the emulator header."""

    LENGTH = range(8, RECORD_LENGTH_MAX + 1)
    emulator_id: int
    index: int
    data: bytes = field(repr=False)

    @classmethod
    def parse(cls, ctx: Context, body: memoryview, *, offset: int) -> Self | None:
        emulator, index = ctx.ints(body, 4, 4)
        if emulator not in set(Emulator):
            ctx.fault(rules.EMULATOR, f"unrecognised emulator id {emulator:#x}")
        return cls(offset=offset, length=len(body), emulator_id=emulator, index=index, data=bytes(body[8:]))


class EmulatorContext(EmulatorRecord):
    TYPE = LibxlType.EMULATOR_CONTEXT


class EmulatorXenstoreData(EmulatorRecord):
    """Key and value pairs for the device model's part of xenstore."""

    TYPE = LibxlType.EMULATOR_XENSTORE_DATA

    @classmethod
    def parse(cls, ctx: Context, body: memoryview, *, offset: int) -> Self | None:
        record = super().parse(ctx, body, offset=offset)
        if record is not None and record.data:
            if not record.data.endswith(b"\0"):
                ctx.fault(rules.EMULATOR, "emulator xenstore data is not NUL terminated")
            elif record.data.count(b"\0") % 2:
                ctx.fault(rules.EMULATOR, f"expected key and value pairs, got {record.data.count(bytes(1))} strings")
        return record

    @property
    def pairs(self) -> dict[str, str]:
        """Keys, relative to the device model's directory, with their values."""
        strings = [s.decode("utf-8", "replace") for s in self.data.split(b"\0")[:-1]]
        return dict(zip(strings[::2], strings[1::2], strict=False))


_ALL: tuple[type[LibxlRecord], ...] = (
    LibxlEnd,
    LibxcContext,
    EmulatorXenstoreData,
    EmulatorContext,
    CheckpointEnd,
    CheckpointState,
)
LIBXL = {cls.TYPE: cls for cls in _ALL}
