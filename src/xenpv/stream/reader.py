"""Reader: bytes in, events out, no I/O.

Strategy. The grammar (envelope, libxl records, libxc records, back to libxl) is written as nested generators that yield
an event, or None for "I need more data"; ``next_event`` runs them. Page content is never gathered: after a PageData
event its pages either come as Pages events, a few hundred at a time, or, by default, are passed over, and a caller that
can seek asks ``skippable`` how far. So what is held is bounded by the largest record that is not PAGE_DATA, and grows
only with bytes that really came.

A breach of a rule raises, unless a ``fault`` callback collects it; then the reader goes on wherever the record's length
still says where the next one begins.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping

from xenpv.abi.x86 import PAGE_SIZE
from xenpv.errors import StreamError, Unsupported
from xenpv.stream import envelope, libxl, rules
from xenpv.stream.byte_buffer import Feeding, Taking
from xenpv.stream.envelope import Envelope, Kind, Section
from xenpv.stream.events import DomainHeader, Event, ImageHeader, LibxlHeader, Pages, SectionHeader, SkippedPageData
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
from xenpv.stream.order import OPTIONAL, Guest, Order, Type
from xenpv.stream.pagedata import PageData
from xenpv.stream.records import LIBXC
from xenpv.stream.rules import BreachHandler

PAGES_AT_ONCE = 256  # pages of one Pages event at most: 1 MiB
Steps = Generator[Event | None, None, None]

_NAMES = {int(kind): kind.name for kind in Type}


class Reader(Feeding):
    """Reads one stream. ``feed`` bytes, ``feed_eof`` at their end, and call ``next_event`` until it says None.

    ``pages``: give Pages events rather than pass page content over. ``kind``: what the stream is, when it is not to be
    told by looking. ``skip_page_data``: PAGE_DATA that is known and skipped, by its offset. ``done``
    is set behind the outermost END; bytes fed beyond it are in ``trailing``.
    """

    def __init__(
        self,
        *,
        on_breach: BreachHandler | None = None,
        pages: bool = False,
        kind: Kind | None = None,
        skip_page_data: Mapping[int, SkippedPageData] | None = None,
    ) -> None:
        super().__init__(on_breach)
        self._skip_page_data = skip_page_data or {}
        self._pages = pages
        self._kind = kind
        self._failed: StreamError | None = None
        self.done = False
        self._ctx = RecordContext(self._fault)
        self._steps = self._stream()

    def next_event(self) -> Event | None:
        """The next event, or None: feed more, or the stream is ``done``. Raises StreamError, again at every call."""
        if self._failed is not None:
            raise self._failed
        try:
            return next(self._steps, None)
        except StreamError as e:
            self._failed = e
            raise

    @property
    def trailing(self) -> int:
        """Bytes fed behind the end of the stream."""
        return self._have if self.done else 0

    # --- the grammar -----------------------------------------------------------------------------------------------

    def _stream(self) -> Steps:
        kind = self._kind
        if kind is None:
            while self._have < envelope.SNIFF and not self._eof:
                self.need = envelope.SNIFF - self._have
                yield None
            kind = self._sniff(self._ahead(envelope.SNIFF))
        inside = {
            Kind.XL: self._xl,
            Kind.LIBVIRT: self._libvirt,
            Kind.XENOPSD: self._xenopsd,
            Kind.LIBXL: self._libxl,
            Kind.LIBXC: self._libxc,
        }
        yield from self._legacy("a legacy stream") if kind is None else inside[kind]()
        self.done = True
        self.need = 0

    def _sniff(self, head: bytes) -> Kind | None:
        """What begins so; None for a legacy stream, which LegacyReader alone takes."""
        return envelope.sniff(head)

    def _legacy(self, what: str, at: int = 0, *, emulator: bool = True) -> Steps:  # noqa: ARG002
        """A stream of the legacy format, which LegacyReader alone reads. ``emulator``: its state is part of it."""
        raise Unsupported(f"{what}, which is not read", offset=at)

    def _xl(self) -> Steps:
        self._begin("xl header")
        head = yield from self._take(envelope.XL_HEADER_SIZE, "the xl header")
        if head[:32] != envelope.XL_MAGIC:
            raise self._fatal(rules.ENVELOPE, "not an xl header")
        order = ">" if bytes(head[32:36]) == envelope.XL_BYTEORDER.to_bytes(4, "big") else "<"
        byteorder, flags, optional, length = envelope.XL_FIELDS.unpack(head[len(envelope.XL_MAGIC) :], order)
        if byteorder != envelope.XL_BYTEORDER:
            self._fault(rules.ENVELOPE, f"byte order mark is {byteorder:#x}, not {envelope.XL_BYTEORDER:#x}")
        if flags & ~envelope.XL_FLAGS_KNOWN:
            self._fault(rules.ENVELOPE, f"xl header has unknown mandatory flags {flags & ~envelope.XL_FLAGS_KNOWN:#x}")
        if optional:
            self._fault(rules.RESERVED, f"xl header has optional flags {optional:#x}, of which none is defined")
        self._bound_config(length)
        data = yield from self._take(length, "the domain configuration")
        (size,) = envelope.XL_CONFIG.unpack(memoryview(bytes(data[:4]).ljust(4, b"\0")), order)
        if size > max(0, length - 4):
            self._fault(rules.ENVELOPE, f"{length} bytes of optional data cannot hold a configuration of {size}")
        config = data[4 : 4 + size]  # "skip, or skip tail, if not understood"
        style = "json" if flags & envelope.XL_FLAG_JSON else "xl"
        if config and (style == "json") != bytes(config).startswith(b"{"):
            self._fault(rules.ENVELOPE, f"the flags say that the configuration is {style}, and it is not")
        yield Envelope(Kind.XL, self._at, self.offset - self._at, bytes(config), style)
        if not flags & envelope.XL_FLAG_STREAMV2:
            yield from self._legacy("an xl file of the legacy format (before Xen 4.6)", self._at)
        else:
            yield from self._libxl()

    def _bound_config(self, length: int) -> None:
        if length > envelope.CONFIG_MAX:
            raise self._fatal(
                rules.ENVELOPE, f"a configuration of {length} bytes; more than {envelope.CONFIG_MAX} is a lie"
            )

    def _libvirt(self) -> Steps:
        self._begin("libvirt header")
        head = yield from self._take(envelope.LIBVIRT_HEADER_SIZE, "the libvirt header")
        if head[:16] != envelope.LIBVIRT_MAGIC:
            raise self._fatal(rules.ENVELOPE, "not a libvirt header")
        fields = envelope.LIBVIRT_FIELDS.read(self._ctx, "the libvirt header", head[len(envelope.LIBVIRT_MAGIC) :])
        version, length = fields["version"], fields["length"]
        if version not in {1, 2}:
            self._fault(rules.ENVELOPE, f"libvirt header version {version}, expected 1 or 2")
        self._bound_config(length)
        xml = yield from self._take(length, "the domain configuration")
        yield Envelope(Kind.LIBVIRT, self._at, self.offset - self._at, bytes(xml).rstrip(b"\0"), "xml")
        if version == 1:
            yield from self._legacy("a libvirt file of the legacy stream format", self.offset)
        else:
            yield from self._libxl()

    def _xenopsd(self) -> Steps:
        self._begin("xenopsd signature")
        magic = yield from self._take(len(envelope.XENOPSD_MAGIC), "the xenopsd signature")
        if magic != envelope.XENOPSD_MAGIC:
            raise self._fatal(rules.ENVELOPE, "not a xenopsd signature")
        yield Envelope(Kind.XENOPSD, self._at, len(magic))
        found = False
        while True:
            self._begin("xenopsd section")
            head = yield from self._take(envelope.XENOPSD_SECTION.size, "a section header")
            number, length = envelope.XENOPSD_SECTION.unpack(head)
            section = envelope.SECTIONS.get(number)
            if section is None:
                raise self._fatal(rules.ENVELOPE, f"unknown xenopsd section {number:#x}")
            at, config = self._at, b""
            if section is Section.XENOPS:
                self._bound_config(length)
                config = bytes((yield from self._take(length, "the xenops record")))
            yield SectionHeader(at, section, length, config)
            found |= section in {Section.LIBXC, Section.LIBXL, Section.LIBXC_LEGACY}
            if section is Section.END:
                if not found:
                    self._fault(rules.MISSING, "the suspend image ends without a libxc or libxl section")
                return
            if section is Section.LIBXC_LEGACY:
                yield from self._legacy("a suspend image with a legacy libxc stream", at, emulator=False)
            elif section is Section.LIBXC:
                yield from self._libxc()
            elif section is Section.LIBXL:
                yield from self._libxl()
            elif section is not Section.XENOPS:
                yield from self._pass_over(length, f"the {section} section")

    def _libxl(self) -> Steps:
        self._begin("libxl header")
        head = yield from self._take(libxl.HEADER.size, "the libxl header")
        _, version, options = libxl.HEADER.unpack(head, ">")
        if head[:8] != envelope.LIBXL_IDENT:
            raise self._fatal(rules.LIBXL_HEADER, f"Bad image id: expected LibxlFmt, got {bytes(head[:8])!r}")
        if version != libxl.VERSION:
            raise self._fatal(rules.LIBXL_HEADER, f"Unknown libxl stream version: expected 2, got {version}")
        if options & ~(libxl.OPTION_BIG_ENDIAN | libxl.OPTION_LEGACY):
            self._fault(rules.LIBXL_HEADER, f"reserved bits set in the libxl options: {options:#x}")
        if options & libxl.OPTION_BIG_ENDIAN:
            self._fault(rules.LIBXL_HEADER, "the libxl stream is big-endian, which no x86 host writes or takes")
        ctx = RecordContext(self._fault, ">" if options & libxl.OPTION_BIG_ENDIAN else "<")
        yield LibxlHeader(self._at, version, options)
        order = LibxlOrder()
        libxc = self._libxc()
        while not order.ended:
            self._begin("libxl record")
            kind, length = RECORD_HEADER.unpack((yield from self._take(8, "a libxl record header")), ctx.order)
            yield from self._body(ctx, kind, length, libxl.LIBXL)
            for rule, message in order.check_next(kind):
                self._fault(rule, message)
                if rule is rules.REPEATED:
                    libxc = self._libxc()
            if order.inside:
                order.handed_back(checkpoint=(yield from self._until_handed_back(libxc)))

    def _until_handed_back(self, libxc: Steps) -> Generator[Event | None, None, bool]:
        """The libxc stream until its END, or until a CHECKPOINT hands back to libxl: then True, there is more of it."""
        for event in libxc:
            yield event
            if event is not None and event.name == Type.CHECKPOINT.name:
                return True
        return False

    def _libxc(self) -> Steps:
        self._begin("image header")
        head = yield from self._take(IMAGE_HEADER.size, "the image header")
        _, ident, version, options, *reserved = IMAGE_HEADER.unpack(head, ">")
        if head[:8] != envelope.LIBXC_MARKER:
            raise self._fatal(rules.IMAGE_HEADER, f"Invalid marker: Got 0x{bytes(head[:8])[::-1].hex()}")
        if ident != IMAGE_ID:
            raise self._fatal(rules.IMAGE_HEADER, f"Invalid ID: Expected {IMAGE_ID:#x}, Got {ident:#010x}")
        if version not in {2, 3}:
            raise self._fatal(rules.IMAGE_HEADER, f"Invalid Version: Expected 2 <= ver <= 3, Got {version}")
        big_endian = bool(options & OPTION_BIG_ENDIAN)
        if big_endian:
            self._fault(rules.IMAGE_HEADER, "Unable to handle big endian streams")
        self._ctx.reserved("the image header", options & ~OPTION_BIG_ENDIAN, *reserved)
        ctx = self._ctx = RecordContext(self._fault, ">" if big_endian else "<", version)
        yield ImageHeader(self._at, version, big_endian)
        yield self._domain_header(ctx, (yield from self._domain_header_bytes()))
        order = Order(ctx.guest, version)
        while True:
            self._begin("record")
            kind, length = RECORD_HEADER.unpack((yield from self._take(8, "a record header")), ctx.order)
            if kind in _NAMES:
                self._record = _NAMES[kind]
                for rule, message in order.check_next(kind):
                    self._fault(rule, message)
            if kind == Type.END:
                for missing in order.missing():
                    self._fault(rules.MISSING, f"the stream ends without {missing.name}")
            if kind == Type.CHECKPOINT:
                self._fault(rules.CHECKPOINT, "Found checkpoint: only a checkpoint-aware receiver takes this stream")
            if kind == Type.PAGE_DATA:
                known = self._skip_page_data.get(self._at)
                if known is None:
                    yield from self._page_data(ctx, length)
                else:
                    yield known
                    yield from self._pass_over(known.size - RECORD_HEADER.size, "PAGE_DATA")
                continue
            record = yield from self._body(ctx, kind, length, LIBXC)
            if record is not None:
                record.update_context(ctx)
            if kind == Type.END:
                return

    def _domain_header_bytes(self) -> Taking:
        self._begin("domain header")
        return (yield from self._take(DOMAIN_HEADER.size, "the domain header"))

    def _domain_header(self, ctx: RecordContext, head: memoryview) -> DomainHeader:
        guest, shift, reserved, major, minor = DOMAIN_HEADER.unpack(head, ctx.order)
        if guest not in set(Guest):
            raise self._fatal(rules.DOMAIN_HEADER, f"Unrecognised domain type {guest:#x}")
        if shift != 12:
            raise self._fatal(rules.DOMAIN_HEADER, f"Invalid page size: page shift {shift}, expected 12")
        ctx.reserved("the domain header", reserved)
        check_xen_version(ctx, major, minor)
        ctx.guest = Guest(guest)
        return DomainHeader(self._at, ctx.guest, major, minor)

    def _body(
        self, ctx: RecordContext, kind: int, length: int, known: Mapping[int, type[Record]]
    ) -> Generator[Event | None, None, Record | None]:
        """Read or pass over the body of a record whose header was read; yield it as an event if it is sound."""
        padded = -(-length // 8) * 8
        cls = known.get(kind)
        unknown = Unknown(offset=self._at, length=length, type=kind)
        self._record = cls.type_name() if cls else unknown.name
        if length > RECORD_LENGTH_MAX:
            raise self._fatal(rules.RECORD_LENGTH, f"length {length:#x} exceeds max ({RECORD_LENGTH_MAX:#x})")
        if cls is None:
            if not kind & OPTIONAL:
                self._fault(rules.RECORD_UNKNOWN, f"mandatory record of unknown type {kind:#x}")
            elif kind & ~OPTIONAL in known or kind & ~OPTIONAL == Type.PAGE_DATA:
                self._fault(
                    rules.RECORD_OPTIONAL, f"type {kind:#x} is that of a known record, marked optional: passed over"
                )
            yield from self._pass_over(padded, unknown.name)
            yield unknown
            return None
        if length not in cls.LENGTH:
            self._fault(rules.RECORD_SIZE, f"length {length:#x}, expected {_span(cls.LENGTH)}")
            yield from self._pass_over(padded, "the record")
            return None
        body = yield from self._take(padded, "the record's body")
        if any(body[length:]):
            self._fault(rules.PADDING, "padding containing non-zero bytes found")
        record = cls.parse(ctx, body[:length], offset=self._at)
        if record is not None:
            yield record
        return record

    def _page_data(self, ctx: RecordContext, length: int) -> Steps:
        at, body, padded = self._at, self.offset, -(-length // 8) * 8
        if length > RECORD_LENGTH_MAX:
            raise self._fatal(rules.RECORD_LENGTH, f"length {length:#x} exceeds max ({RECORD_LENGTH_MAX:#x})")
        if length < 8:
            self._fault(rules.PAGE_COUNT, f"PAGE_DATA record truncated: length {length}, min 8")
            yield from self._pass_over(padded, "the record")
            return
        head = yield from self._take(PageData.FIELDS.size, "PAGE_DATA")
        count = PageData.FIELDS.read(ctx, "PAGE_DATA", head)["count"]
        if count < 1 or length < 8 + count * 8:
            self._fault(rules.PAGE_COUNT, f"PAGE_DATA record of length {length} for {count} pfns")
            yield from self._pass_over(padded - 8, "the record")
            return
        raw = yield from self._take(count * 8, "the pfn array of PAGE_DATA")
        record = PageData.read(ctx, raw, offset=at, length=length, pages_offset=self.offset)
        yield record
        if self._pages and record.size_matches:
            yield from self._contents(record)
        yield from self._pass_over(body + padded - self.offset, "page content")

    def _contents(self, record: PageData) -> Steps:
        for first in range(0, record.pages, PAGES_AT_ONCE):
            offset = self.offset
            data = yield from self._take(min(PAGES_AT_ONCE, record.pages - first) * PAGE_SIZE, "page content")
            yield Pages(offset, record, first, data)


def _span(lengths: range) -> str:
    return f"{lengths.start:#x}" if len(lengths) == 1 else f"{lengths.start:#x} to {lengths.stop - 1:#x}"
