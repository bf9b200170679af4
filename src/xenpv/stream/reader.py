"""Reader: bytes in, events out, no I/O.

The parsers of each layer (envelope, libxl records, libxc records) are nested generators that yield an event, or None
where they need more bytes; ``next_event`` runs them. Page content is never gathered: it is skipped, or comes as
PageContent events. A caller that can seek asks ``skippable`` how far. So memory is bounded by the largest record that
is not PAGE_DATA, and grows only with bytes that really came.

A breach of a rule raises, unless an ``on_breach`` handler collects it. Then the reader goes on wherever the record's
length still says where the next one begins.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING

from xenpv.errors import StreamError, Unsupported
from xenpv.stream import envelope, libxl, rules
from xenpv.stream.cursor import Cursor, Steps, read_pages
from xenpv.stream.envelope import Envelope, Kind, Section
from xenpv.stream.events import DomainHeader, Event, ImageHeader, LibxlHeader, SectionHeader, SkippedPageData
from xenpv.stream.fields import RecordContext
from xenpv.stream.framing import (
    DOMAIN_HEADER,
    IMAGE_HEADER,
    IMAGE_ID,
    OPTION_BIG_ENDIAN,
    RECORD_HEADER,
    RECORD_LENGTH_MAX,
    Record,
    Unknown,
    check_xen_version,
)
from xenpv.stream.libxl import LibxlOrder
from xenpv.stream.page_data import PageData
from xenpv.stream.record_order import OPTIONAL, Guest, Order, RecordType
from xenpv.stream.records import LIBXC, Seal
from xenpv.stream.rules import BreachHandler
from xenpv.stream.seal import SealChecker, SealState

if TYPE_CHECKING:
    from xenpv.stream.legacy import LegacyFormat

_NAMES = {int(kind): kind.name for kind in RecordType}


class Reader:
    """Reads one stream: bytes in, events out.

    ``feed`` bytes, ``feed_eof`` at their end, and call ``next_event`` until it returns None.

    Args:
        on_breach: collects breaches of rules, which raise otherwise.
        pages: give page content as PageContent events, instead of skipping it.
        kind: the kind of stream; None detects it.
        legacy: how to read a legacy stream, which is Unsupported otherwise.
        skip_page_data: PAGE_DATA records to skip, by the offset of the first.
        check_seal: compare a sealed stream with its seal, which takes all page content. Never with skip_page_data.
        seal_key: the key of a keyed seal.

    Attributes:
        done: whether the outermost END was read.
        is_legacy: whether a legacy stream was found.
    """

    def __init__(
        self,
        *,
        on_breach: BreachHandler | None = None,
        pages: bool = False,
        kind: Kind | None = None,
        legacy: LegacyFormat | None = None,
        skip_page_data: Mapping[int, SkippedPageData] | None = None,
        check_seal: bool = True,
        seal_key: bytes | None = None,
    ) -> None:
        self.done = False
        self.is_legacy = False
        self._cursor = cursor = Cursor(on_breach)
        self._seal = SealChecker(
            seal_key,
            lambda error: cursor.report_error(error, rules.SEAL),
            lambda problem: cursor.report_or_raise(rules.SEAL_UNCHECKED, problem),
        )
        self._checks_seal = check_seal and not skip_page_data
        if self._checks_seal:
            cursor.buffer.tap = self._seal.update
        self._skip_page_data = skip_page_data or {}
        self._pages = pages
        self._kind = kind
        self._legacy = legacy
        self._failed: StreamError | None = None
        self._steps = self._read_stream()

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Add the next bytes of the input."""
        self._cursor.buffer.feed(data)

    def feed_eof(self) -> None:
        """Mark the end of the input."""
        self._cursor.buffer.feed_eof()

    def next_event(self) -> Event | None:
        """Return the next event, or None: feed more, or the stream is ``done``.

        Raises StreamError, at each call.
        """
        if self._failed is not None:
            raise self._failed
        try:
            return next(self._steps, None)
        except StreamError as e:
            self._failed = e
            raise

    def skip(self, n: int) -> None:
        """Count n bytes that the caller seeked over as fed.

        Raises ValueError for more than ``skippable``.
        """
        self._seal.note_gap()
        self._cursor.buffer.skip(n)

    @property
    def skippable(self) -> int:
        """Bytes to come that will be skipped.

        A caller that can seek may ``skip`` them instead of feeding them.
        """
        return self._cursor.buffer.skippable

    @property
    def needs_content(self) -> bool:
        """Whether ``skippable`` bytes have to be fed or absorbed, to check a seal."""
        return self._seal.active

    def absorb(self, data: bytes | memoryview) -> None:
        """Take bytes for the seal that will be counted by ``skip``."""
        if self._seal.active:
            self._seal.update(data)

    @property
    def seal(self) -> SealState:
        """What is known of the stream's seal."""
        return self._seal.state

    @property
    def needed(self) -> int:
        """Bytes, beyond those that were fed, without which there is no next event."""
        return self._cursor.needed

    @property
    def offset(self) -> int:
        """Offset of the next byte to be read, from the start of the input."""
        return self._cursor.offset

    @property
    def trailing(self) -> int:
        """Bytes that were fed beyond the end of the stream."""
        return self._cursor.buffer.available if self.done else 0

    # --- envelopes --------------------------------------------------------------------------------------------------

    def _read_stream(self) -> Steps:
        kind = self._kind or (yield from self._detect_kind())
        readers = {
            Kind.XL: self._read_xl,
            Kind.LIBVIRT: self._read_libvirt,
            Kind.XENOPSD: self._read_xenopsd,
            Kind.LIBXL: self._read_libxl,
            Kind.LIBXC: self._read_libxc,
            Kind.XEND: self._read_xend,
        }
        yield from self._read_legacy("a legacy stream") if kind is None else readers[kind]()
        self.done = True
        self._cursor.needed = 0

    def _detect_kind(self) -> Generator[Event | None, None, Kind | None]:
        """Return the kind of stream by its first bytes.

        None stands for a legacy stream, if one is allowed.
        """
        head = yield from self._cursor.peek(envelope.SNIFF_SIZE)
        if self._legacy is not None and self._legacy.matches(head):
            return None
        return envelope.sniff(head)

    def _read_legacy(self, name: str, offset: int = 0, *, emulator: bool = True) -> Steps:
        """Read a legacy stream.

        ``name`` and ``offset`` are for the error. ``emulator`` tells whether a device model's state may follow.
        """
        if self._legacy is None:
            raise Unsupported(f"{name}, which is not read", offset=offset)
        self.is_legacy = True
        self._cursor.buffer.tap = None
        yield from self._legacy.read(self._cursor, pages=self._pages, emulator=emulator)

    def _read_xl(self) -> Steps:
        cursor = self._cursor
        cursor.start_record("xl header")
        head = yield from cursor.read(envelope.XL_HEADER_SIZE, "the xl header")
        if head[:32] != envelope.XL_MAGIC:
            raise cursor.fatal_error(rules.ENVELOPE, "not an xl header")
        order = ">" if bytes(head[32:36]) == envelope.XL_BYTEORDER.to_bytes(4, "big") else "<"
        byteorder, flags, optional, length = envelope.XL_FIELDS.unpack(head[len(envelope.XL_MAGIC) :], order)
        if byteorder != envelope.XL_BYTEORDER:
            cursor.report_or_raise(rules.ENVELOPE, f"byte order mark is {byteorder:#x}, not {envelope.XL_BYTEORDER:#x}")
        if unknown := flags & ~envelope.XL_FLAGS_KNOWN:
            cursor.report_or_raise(rules.ENVELOPE, f"xl header has unknown mandatory flags {unknown:#x}")
        if optional:
            cursor.report_or_raise(rules.RESERVED, f"the xl header has optional flags {optional:#x}; none are defined")
        self._check_config_length(length)
        data = yield from cursor.read(length, "the domain configuration")
        (size,) = envelope.XL_CONFIG.unpack(bytes(data[:4]).ljust(4, b"\0"), order)
        if size > max(0, length - 4):
            cursor.report_or_raise(
                rules.ENVELOPE, f"a configuration of {size} bytes does not fit into {length} bytes of optional data"
            )
        config = data[4 : 4 + size]  # "skip, or skip tail, if not understood"
        config_format = "json" if flags & envelope.XL_FLAG_JSON else "xl"
        if config and (config_format == "json") != bytes(config).startswith(b"{"):
            cursor.report_or_raise(rules.ENVELOPE, f"the configuration is not {config_format}, as the flags say")
        yield Envelope(
            Kind.XL, cursor.record_offset, cursor.offset - cursor.record_offset, bytes(config), config_format
        )
        if not flags & envelope.XL_FLAG_STREAMV2:
            yield from self._read_legacy("an xl file of the legacy format (before Xen 4.6)", cursor.record_offset)
        else:
            yield from self._read_libxl()

    def _check_config_length(self, length: int) -> None:
        cursor = self._cursor
        if length > envelope.CONFIG_MAX:
            message = f"a configuration of {length:#x} bytes; the maximum is {envelope.CONFIG_MAX:#x}"
            raise cursor.fatal_error(rules.ENVELOPE, message)

    def _read_libvirt(self) -> Steps:
        cursor = self._cursor
        cursor.start_record("libvirt header")
        head = yield from cursor.read(envelope.LIBVIRT_HEADER_SIZE, "the libvirt header")
        if head[:16] != envelope.LIBVIRT_MAGIC:
            raise cursor.fatal_error(rules.ENVELOPE, "not a libvirt header")
        fields = envelope.LIBVIRT_FIELDS.read(
            RecordContext(cursor.report_or_raise), "the libvirt header", head[len(envelope.LIBVIRT_MAGIC) :]
        )
        version, length = fields["version"], fields["length"]
        if version not in {1, 2}:
            cursor.report_or_raise(rules.ENVELOPE, f"libvirt header version {version}, expected 1 or 2")
        self._check_config_length(length)
        xml = yield from cursor.read(length, "the domain configuration")
        header_offset = cursor.record_offset
        yield Envelope(Kind.LIBVIRT, header_offset, cursor.offset - header_offset, bytes(xml).rstrip(b"\0"), "xml")
        if version == 1:
            yield from self._read_legacy("a libvirt file of the legacy stream format", cursor.offset)
        else:
            yield from self._read_libxl()

    def _read_xend(self) -> Steps:
        cursor = self._cursor
        cursor.start_record("xend header")
        head = yield from cursor.read(envelope.XEND_HEADER_SIZE, "the xend header")
        if head[: len(envelope.XEND_MAGIC)] != envelope.XEND_MAGIC:
            raise cursor.fatal_error(rules.ENVELOPE, "not a xend header")
        length = int.from_bytes(head[len(envelope.XEND_MAGIC) :], "big")
        self._check_config_length(length)
        config = bytes((yield from cursor.read(length, "the domain configuration"))).rstrip(b"\0\n ")
        if not envelope.is_whole_expression(config):
            message = f"the configuration of {length} bytes is no whole s-expression; is its length wrong?"
            raise cursor.fatal_error(rules.ENVELOPE, message)
        yield Envelope(Kind.XEND, cursor.record_offset, cursor.offset - cursor.record_offset, config, "xend")
        if self._legacy is None:
            from xenpv.stream.legacy import LegacyFormat  # noqa: PLC0415  few streams are legacy

            self._legacy = LegacyFormat()  # xend wrote no other stream
        yield from self._read_legacy("a file of xend", cursor.offset)

    def _read_xenopsd(self) -> Steps:
        cursor = self._cursor
        cursor.start_record("xenopsd signature")
        magic = yield from cursor.read(len(envelope.XENOPSD_MAGIC), "the xenopsd signature")
        if magic != envelope.XENOPSD_MAGIC:
            raise cursor.fatal_error(rules.ENVELOPE, "not a xenopsd signature")
        yield Envelope(Kind.XENOPSD, cursor.record_offset, len(magic))
        has_stream = False
        while True:
            cursor.start_record("xenopsd section")
            head = yield from cursor.read(envelope.XENOPSD_SECTION.size, "a section header")
            number, length = envelope.XENOPSD_SECTION.unpack(head)
            section = envelope.SECTIONS.get(number)
            if section is None:
                raise cursor.fatal_error(rules.ENVELOPE, f"unknown xenopsd section {number:#x}")
            section_offset, config = cursor.record_offset, b""
            if section is Section.XENOPS:
                self._check_config_length(length)
                config = bytes((yield from cursor.read(length, "the xenops record")))
            yield SectionHeader(section_offset, section, length, config)
            has_stream |= section in {Section.LIBXC, Section.LIBXL, Section.LIBXC_LEGACY}
            if section is Section.END:
                if not has_stream:
                    cursor.report_or_raise(rules.MISSING, "the suspend image ends without a libxc or libxl section")
                return
            if section is Section.LIBXC_LEGACY:
                yield from self._read_legacy(
                    "a suspend image with a legacy libxc stream", section_offset, emulator=False
                )
            elif section is Section.LIBXC:
                yield from self._read_libxc()
            elif section is Section.LIBXL:
                yield from self._read_libxl()
            elif section is not Section.XENOPS:
                yield from cursor.skip(length, f"the {section} section")

    def _read_libxl(self) -> Steps:
        cursor = self._cursor
        cursor.start_record("libxl header")
        head = yield from cursor.read(libxl.HEADER.size, "the libxl header")
        _, version, options = libxl.HEADER.unpack(head, ">")
        if head[:8] != envelope.LIBXL_IDENT:
            raise cursor.fatal_error(rules.LIBXL_HEADER, f"Bad image id: expected LibxlFmt, got {bytes(head[:8])!r}")
        if version != libxl.VERSION:
            raise cursor.fatal_error(rules.LIBXL_HEADER, f"Unknown libxl stream version: expected 2, got {version}")
        if options & ~(libxl.OPTION_BIG_ENDIAN | libxl.OPTION_LEGACY):
            cursor.report_or_raise(rules.LIBXL_HEADER, f"reserved bits set in the libxl options: {options:#x}")
        if options & libxl.OPTION_BIG_ENDIAN:
            cursor.report_or_raise(
                rules.LIBXL_HEADER, "the libxl stream is big-endian; no x86 host writes or takes such"
            )
        ctx = RecordContext(cursor.report_or_raise, ">" if options & libxl.OPTION_BIG_ENDIAN else "<")
        yield LibxlHeader(cursor.record_offset, version, options)
        order = LibxlOrder()
        libxc = self._read_libxc()
        while not order.ended:
            cursor.start_record("libxl record")
            kind, length = RECORD_HEADER.unpack((yield from cursor.read(8, "a libxl record header")), ctx.byte_order)
            record = yield from self._read_body(ctx, kind, length, libxl.LIBXL)
            if self.seal.complete and length:
                self.seal.uncovered.append("a libxl record" if record is None else record.name)
            for rule, message in order.check_next(kind):
                cursor.report_or_raise(rule, message)
                if rule is rules.REPEATED:
                    libxc = self._read_libxc()
            if order.in_libxc:
                order.libxc_handed_back(checkpoint=(yield from self._read_libxc_part(libxc)))

    def _read_libxc_part(self, libxc: Steps) -> Generator[Event | None, None, bool]:
        """Read the libxc stream until its END or a CHECKPOINT.

        A CHECKPOINT hands back to libxl. Return whether it was one.
        """
        for event in libxc:
            yield event
            if event is not None and event.name == RecordType.CHECKPOINT.name:
                return True
        return False

    def _read_libxc(self) -> Steps:
        cursor, seal = self._cursor, self._seal
        seal.start_image()
        ctx = yield from self._read_image_header()
        yield from self._read_domain_header(ctx)
        order = Order(ctx.guest, ctx.version)
        while True:
            cursor.start_record("record")
            header = yield from cursor.read(8, "a record header")
            kind, length = RECORD_HEADER.unpack(header, ctx.byte_order)
            if self._checks_seal:
                seal.start_record(is_seal=kind == RecordType.XENPV_SEAL)
                if kind != RecordType.END:
                    seal.check_after_end(_NAMES.get(kind, f"record {kind:#x}"), cursor.record_offset)
            if not seal.wants_bytes:
                cursor.buffer.tap = None
            if kind in _NAMES:
                cursor.record = _NAMES[kind]
                for rule, message in order.check_next(kind):
                    cursor.report_or_raise(rule, message)
            if kind == RecordType.END:
                for missing in order.missing():
                    cursor.report_or_raise(rules.MISSING, f"the stream ends without {missing.name}")
            if kind == RecordType.CHECKPOINT:
                message = "Found checkpoint: only a checkpoint-aware receiver takes this stream"
                cursor.report_or_raise(rules.CHECKPOINT, message)
            if kind == RecordType.PAGE_DATA:
                known = self._skip_page_data.get(cursor.record_offset)
                if known is None:
                    seal.start_pages(header)
                    record_offset = cursor.record_offset
                    page_data = yield from self._read_page_data(ctx, length)
                    seal.end_pages(record_offset, page_data)
                else:
                    yield known
                    yield from cursor.skip(known.size - RECORD_HEADER.size, "PAGE_DATA")
                continue
            record = yield from self._read_body(ctx, kind, length, LIBXC)
            if record is not None:
                record.update_context(ctx)
            if isinstance(record, Seal):
                (seal.check if self._checks_seal else seal.note)(record)
            if kind == RecordType.END:
                seal.end(cursor.record_offset)
                return

    def _read_image_header(self) -> Generator[Event | None, None, RecordContext]:
        """Read libxc's image header; return the context for the records that follow."""
        cursor = self._cursor
        cursor.start_record("image header")
        head = yield from cursor.read(IMAGE_HEADER.size, "the image header")
        _, ident, version, options, *reserved = IMAGE_HEADER.unpack(head, ">")
        if head[:8] != envelope.LIBXC_MARKER:
            raise cursor.fatal_error(rules.IMAGE_HEADER, f"Invalid marker: Got 0x{bytes(head[:8])[::-1].hex()}")
        if ident != IMAGE_ID:
            raise cursor.fatal_error(rules.IMAGE_HEADER, f"Invalid ID: Expected {IMAGE_ID:#x}, Got {ident:#010x}")
        if version not in {2, 3}:
            raise cursor.fatal_error(rules.IMAGE_HEADER, f"Invalid Version: Expected 2 <= ver <= 3, Got {version}")
        big_endian = bool(options & OPTION_BIG_ENDIAN)
        if big_endian:
            cursor.report_or_raise(rules.IMAGE_HEADER, "Unable to handle big endian streams")
        ctx = RecordContext(cursor.report_or_raise, ">" if big_endian else "<", version)
        ctx.check_reserved("the image header", options & ~OPTION_BIG_ENDIAN, *reserved)
        yield ImageHeader(cursor.record_offset, version, big_endian)
        return ctx

    def _read_domain_header(self, ctx: RecordContext) -> Steps:
        """Read libxc's domain header, and note the guest's type in ctx."""
        cursor = self._cursor
        cursor.start_record("domain header")
        head = yield from cursor.read(DOMAIN_HEADER.size, "the domain header")
        guest, shift, reserved, major, minor = DOMAIN_HEADER.unpack(head, ctx.byte_order)
        if guest not in set(Guest):
            raise cursor.fatal_error(rules.DOMAIN_HEADER, f"Unrecognised domain type {guest:#x}")
        if shift != 12:
            raise cursor.fatal_error(rules.DOMAIN_HEADER, f"Invalid page size: page shift {shift}, expected 12")
        ctx.check_reserved("the domain header", reserved)
        check_xen_version(ctx, major, minor)
        ctx.guest = Guest(guest)
        yield DomainHeader(cursor.record_offset, ctx.guest, major, minor)

    def _read_body(
        self, ctx: RecordContext, kind: int, length: int, known: Mapping[int, type[Record]]
    ) -> Generator[Event | None, None, Record | None]:
        """Read or skip the body of a record whose header was read.

        Yield and return the record, if it is usable.
        """
        cursor = self._cursor
        padded = -(-length // 8) * 8
        cls = known.get(kind)
        unknown = Unknown(offset=cursor.record_offset, length=length, type=kind)
        cursor.record = cls.type_name() if cls else unknown.name
        if length > RECORD_LENGTH_MAX:
            raise cursor.fatal_error(rules.RECORD_LENGTH, f"length {length:#x} exceeds max ({RECORD_LENGTH_MAX:#x})")
        if cls is None:
            if not kind & OPTIONAL:
                cursor.report_or_raise(rules.RECORD_UNKNOWN, f"mandatory record of unknown type {kind:#x}")
            elif kind & ~OPTIONAL in known or kind & ~OPTIONAL == RecordType.PAGE_DATA:
                cursor.report_or_raise(
                    rules.RECORD_OPTIONAL, f"type {kind:#x} is a known record, marked optional: skipped"
                )
            yield from cursor.skip(padded, unknown.name)
            yield unknown
            return None
        if length not in cls.LENGTH:
            cursor.report_or_raise(rules.RECORD_SIZE, f"length {length:#x}, expected {_describe_lengths(cls.LENGTH)}")
            yield from cursor.skip(padded, "the record")
            return None
        body = yield from cursor.read(padded, "the record's body")
        if any(body[length:]):
            cursor.report_or_raise(rules.PADDING, "padding containing non-zero bytes found")
        record = cls.parse(ctx, body[:length], offset=cursor.record_offset)
        if record is not None:
            yield record
        return record

    def _read_page_data(self, ctx: RecordContext, length: int) -> Generator[Event | None, None, PageData | None]:
        """Read the body of a PAGE_DATA record; return it, if it is usable."""
        cursor = self._cursor
        record_offset, body_offset, padded = cursor.record_offset, cursor.offset, -(-length // 8) * 8
        if length > RECORD_LENGTH_MAX:
            raise cursor.fatal_error(rules.RECORD_LENGTH, f"length {length:#x} exceeds max ({RECORD_LENGTH_MAX:#x})")
        if length < 8:
            cursor.report_or_raise(rules.PAGE_COUNT, f"PAGE_DATA record truncated: length {length}, min 8")
            yield from cursor.skip(padded, "the record")
            return None
        head = yield from cursor.read(PageData.FIELDS.size, "PAGE_DATA")
        count = PageData.FIELDS.read(ctx, "PAGE_DATA", head)["count"]
        if count < 1 or length < 8 + count * 8:
            cursor.report_or_raise(rules.PAGE_COUNT, f"PAGE_DATA record of length {length} for {count} pfns")
            yield from cursor.skip(padded - 8, "the record")
            return None
        raw = yield from cursor.read(count * 8, "the pfn array of PAGE_DATA")
        record = PageData.parse_entries(ctx, raw, offset=record_offset, length=length, pages_offset=cursor.offset)
        yield record
        if self._pages and record.size_matches:
            yield from read_pages(cursor, record)
        yield from cursor.skip(body_offset + padded - cursor.offset, "page content")
        return record


def _describe_lengths(lengths: range) -> str:
    """Describe the lengths that a body may have."""
    return f"{lengths.start:#x}" if len(lengths) == 1 else f"{lengths.start:#x} to {lengths.stop - 1:#x}"
