"""What every record is: a header and a body; and the headers of a libxc stream. records.py has those that there are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self

from xenpv.stream import rules
from xenpv.stream.fields import Buffer, Fields, RecordContext
from xenpv.stream.order import Type

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
    """A record. One that was read is at byte ``offset`` (of its header) and has a body of ``length`` bytes, padding not
    counted; one that is made has neither, and is equal to what a reader makes of it.

    FIELDS and BLOB say what its body is, for reading and for writing.
    """

    TYPE: ClassVar[int]
    LENGTH: ClassVar[range] = range(1)  # lengths that a body may have; the reader checks it before it takes the body
    FIELDS: ClassVar[Fields] = Fields()  # what a body begins with: members of those names
    BLOB: ClassVar[str | None] = None  # the member that holds the rest, bytes
    offset: int = field(default=0, compare=False)
    length: int = field(default=0, compare=False)

    @classmethod
    def type_name(cls) -> str:
        """The name of this type of record, as the specification has it."""
        return Type(cls.TYPE).name

    @property
    def name(self) -> str:
        return self.type_name()

    @classmethod
    def parse(cls, ctx: RecordContext, body: memoryview, *, offset: int) -> Self | None:
        """The record out of its body; None when faults left nothing to use."""
        values = cls.FIELDS.read(ctx, cls.type_name(), body)
        if cls.BLOB is not None:
            values[cls.BLOB] = bytes(body[cls.FIELDS.size :])
        record = cls(offset=offset, length=len(body), **values)
        return record if record.check(ctx) else None

    def check(self, ctx: RecordContext) -> bool:  # noqa: ARG002
        """What its own values allow to say. Faults go to ctx; False when it is of no use to anybody."""
        return True

    def update_context(self, ctx: RecordContext) -> None:
        """Note in ctx what the records after this one depend on: the guest's width, the last pfn."""

    def body(self) -> list[Buffer]:
        """What is written of it, little-endian, the inverse of parse. Raises OverflowError for a value too large."""
        buffers: list[Buffer] = [self.FIELDS.pack(**{name: getattr(self, name) for name in self.FIELDS.names})]
        if self.BLOB is not None:
            buffers.append(getattr(self, self.BLOB))
        return buffers


@dataclass(frozen=True, slots=True, kw_only=True)
class Opaque(Record):
    """A record of which only the bytes are known here."""

    LENGTH = range(RECORD_LENGTH_MAX + 1)
    BLOB = "data"
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unknown(Record):
    """A record of a type that is not in the specification; its body is passed over."""

    type: int

    @property
    def name(self) -> str:
        return f"{'optional ' if self.type >> 31 else ''}record {self.type:#x}"


def check_xen_version(ctx: RecordContext, major: int, minor: int) -> None:
    """The version of Xen in a domain header; 0.n says that a legacy stream was converted."""
    if major > 9 or minor > 99 or (major == 4 and minor < 6) or 0 < major < 4:
        ctx.report(rules.XEN_VERSION, f"no Xen {major}.{minor} writes such streams")
