"""Records of the libxl layer around a libxc stream.

Source: xen.git:docs/specs/libxl-migration-stream.pandoc.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from xenpv.findings import Rule
from xenpv.stream import rules
from xenpv.stream.fields import Fields, RecordContext
from xenpv.stream.framing import RECORD_LENGTH_MAX, Record

HEADER = Fields(ident=8, version=4, options=4)  # big-endian, whatever the records are
VERSION = 2
OPTION_BIG_ENDIAN = 1 << 0
OPTION_LEGACY = 1 << 1


class LibxlType(IntEnum):
    """Types of libxl records."""

    END = 0
    LIBXC_CONTEXT = 1
    EMULATOR_XENSTORE_DATA = 2
    EMULATOR_CONTEXT = 3
    CHECKPOINT_END = 4
    CHECKPOINT_STATE = 5


class Emulator(IntEnum):
    """The emulators that libxl's records name."""

    UNKNOWN = 0
    QEMU_TRADITIONAL = 1
    QEMU_UPSTREAM = 2


class LibxlRecord(Record):
    """A record of the libxl layer."""

    @classmethod
    def type_name(cls) -> str:
        return f"libxl {LibxlType(cls.TYPE).name}"


class LibxlEnd(LibxlRecord):
    """END: the libxl stream is complete."""

    TYPE = LibxlType.END


class LibxcContext(LibxlRecord):
    """A libxc stream begins after it."""

    TYPE = LibxlType.LIBXC_CONTEXT


class CheckpointEnd(LibxlRecord):
    """CHECKPOINT_END: the libxc stream goes on."""

    TYPE = LibxlType.CHECKPOINT_END


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointState(LibxlRecord):
    """CHECKPOINT_STATE: a message of COLO's back channel."""

    TYPE = LibxlType.CHECKPOINT_STATE
    LENGTH = range(8, 9)
    FIELDS = Fields(control_id=4, _padding=4)
    control_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatorRecord(LibxlRecord):
    """State of a device model; ``data`` follows the emulator's header."""

    LENGTH = range(8, RECORD_LENGTH_MAX + 1)
    FIELDS = Fields(emulator_id=4, index=4)
    BLOB = "data"
    emulator_id: int
    index: int
    data: bytes = field(repr=False)

    def check(self, ctx: RecordContext) -> bool:
        if self.emulator_id not in set(Emulator):
            ctx.report(rules.EMULATOR, f"unrecognised emulator id {self.emulator_id:#x}")
        return True


class EmulatorContext(EmulatorRecord):
    """EMULATOR_CONTEXT: the saved state of a device model."""

    TYPE = LibxlType.EMULATOR_CONTEXT


class EmulatorXenstoreData(EmulatorRecord):
    """Keys and values for the device model's part of xenstore."""

    TYPE = LibxlType.EMULATOR_XENSTORE_DATA

    def check(self, ctx: RecordContext) -> bool:
        super().check(ctx)
        if self.data and not self.data.endswith(b"\0"):
            ctx.report(rules.EMULATOR, "emulator xenstore data is not NUL terminated")
        elif self.data.count(b"\0") % 2:
            ctx.report(rules.EMULATOR, f"expected key and value pairs, got {self.data.count(bytes(1))} strings")
        return True

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


class LibxlOrder:
    """The order of one libxl stream, for readers and writers.

    Call ``check_next`` for each libxl record.

    ``in_libxc``: the libxc stream goes on after this record, until ``libxc_handed_back``.
    """

    def __init__(self) -> None:
        self.in_libxc = False
        self.ended = False
        self._begun = False
        self._in_checkpoint = False

    def check_next(self, kind: int) -> list[tuple[Rule, str]]:
        """Note that a record comes next; return the rules that this breaks.

        Each has a message.
        """
        breaches = []
        if kind == LibxlType.END:
            self.ended = True
            if not self._begun:
                breaches.append((rules.MISSING, "the libxl stream ends without LIBXC_CONTEXT"))
            elif self._in_checkpoint:
                message = "the libxl stream ends inside a checkpoint, without libxc's END"
                breaches.append((rules.MISSING, message))
        elif kind == LibxlType.LIBXC_CONTEXT:
            if self._begun:
                breaches.append((rules.REPEATED, "a second LIBXC_CONTEXT"))
            self._begun = self.in_libxc = True
        elif kind == LibxlType.CHECKPOINT_END:
            # "The higher level stream may then hand the stream back to libxc to process another set of records"
            self.in_libxc = self._in_checkpoint
            if not self._in_checkpoint:
                breaches.append((rules.ORDER, "CHECKPOINT_END without a CHECKPOINT before it"))
        return breaches

    def libxc_handed_back(self, *, checkpoint: bool) -> None:
        """Note that the libxc stream came to its END or to a CHECKPOINT.

        After a CHECKPOINT it goes on.
        """
        self.in_libxc, self._in_checkpoint = False, checkpoint
