"""The record, which is a header and a body; and headers of a libxc stream.

records.py has the types of record.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self

from xenpv.stream import rules
from xenpv.stream.fields import Buffer, Fields, RecordContext
from xenpv.stream.record_order import RecordType

RECORD_LENGTH_MAX = 128 << 20  # REC_LENGTH_MAX
BLOB_MAX = 1 << 20  # far above any vcpu or policy blob that Xen makes (an xsave area is some 11 KiB)

# xen.git:tools/libs/guest/xg_sr_stream_format.h. The image header is big-endian, whatever the rest is.
IMAGE_HEADER = Fields(marker=8, id=4, version=4, options=2, _res1=2, _res2=4)
IMAGE_ID = 0x58454E46  # "XENF"
OPTION_BIG_ENDIAN = 1 << 0
DOMAIN_HEADER = Fields(type=4, page_shift=2, _reserved=2, xen_major=4, xen_minor=4)
RECORD_HEADER = Fields(type=4, length=4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A record of a stream; its subclasses are the types of record.

    A record that is made equals the one that a reader makes of it: offset and length do not count.

    Attributes:
        TYPE: the type, as in the header.
        LENGTH: lengths that a body may have; a reader checks them before it reads the body.
        FIELDS: the fixed fields that a body begins with; members of those names have the values.
        BLOB: the member that holds the rest of the body; None if nothing follows.
        offset: of the header in the input; 0 for a record that was not read.
        length: bytes of the body in the input, without padding; 0 for a record that was not read.
    """

    TYPE: ClassVar[int]
    LENGTH: ClassVar[range] = range(1)
    FIELDS: ClassVar[Fields] = Fields()
    BLOB: ClassVar[str | None] = None  # the member that holds the rest, bytes
    offset: int = field(default=0, compare=False)
    length: int = field(default=0, compare=False)

    @classmethod
    def type_name(cls) -> str:
        """Return the name of this type of record, as in the specification."""
        return RecordType(cls.TYPE).name

    @property
    def name(self) -> str:
        """The name of its type."""
        return self.type_name()

    @classmethod
    def parse(cls, ctx: RecordContext, body: memoryview, *, offset: int) -> Self | None:
        """Parse a body and report its breaches; return None if it is unusable."""
        values = cls.FIELDS.read(ctx, cls.type_name(), body)
        if cls.BLOB is not None:
            values[cls.BLOB] = bytes(body[cls.FIELDS.size :])
        record = cls(offset=offset, length=len(body), **values)
        return record if record.check(ctx) else None

    def check(self, ctx: RecordContext) -> bool:  # noqa: ARG002
        """Check the record's values and report breaches to ctx.

        Returns:
            Whether to keep the record. If False, show, diff and convert ignore it.
            If a breach is only a WARNING and the values can still be used, return True.
        """
        return True

    def update_context(self, ctx: RecordContext) -> None:
        """Note in ctx the facts that later records need: the guest's width, the last pfn."""

    def body(self) -> list[Buffer]:
        """Return the body to be written, little-endian.

        Raises OverflowError for a value that is too large.
        """
        buffers: list[Buffer] = [self.FIELDS.pack(**{name: getattr(self, name) for name in self.FIELDS.names})]
        if self.BLOB is not None:
            buffers.append(getattr(self, self.BLOB))
        return buffers


@dataclass(frozen=True, slots=True, kw_only=True)
class Opaque(Record):
    """A record whose body is bytes that are not parsed here."""

    LENGTH = range(RECORD_LENGTH_MAX + 1)
    BLOB = "data"
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unknown(Record):
    """A record of a type that is not in the specification; its body is skipped."""

    type: int

    @property
    def name(self) -> str:
        return f"{'optional ' if self.type >> 31 else ''}record {self.type:#x}"


def check_xen_version(ctx: RecordContext, major: int, minor: int) -> None:
    """Report a version of Xen that writes no such streams.

    0.n marks a converted legacy stream.
    """
    if major > 9 or minor > 99 or (major == 4 and minor < 6) or 0 < major < 4:
        ctx.report(rules.XEN_VERSION, f"no Xen {major}.{minor} writes such streams")
