"""Writer: records in, buffers out, no I/O.

Each call gives the buffers to be written next, in order; page content is among them as it was given, not copied. What
a Reader refuses, a Writer does not write: both ask the same tables what may follow what (order.py, LibxlOrder), and
the same records what their values may be. Reserved fields, padding and whatever else a verifier would warn of are
right by construction, or refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from xenpv.errors import RequestError, StreamError
from xenpv.findings import Rule
from xenpv.stream import envelope, libxl, rules
from xenpv.stream.envelope import Kind
from xenpv.stream.fields import Buffer, RecordContext
from xenpv.stream.framing import (
    DOMAIN_HEADER,
    IMAGE_HEADER,
    IMAGE_ID,
    RECORD_HEADER,
    RECORD_LENGTH_MAX,
    Record,
    check_xen_version,
)
from xenpv.stream.libxl import LibxlOrder, LibxlRecord
from xenpv.stream.order import Guest, Order, Type
from xenpv.stream.pagedata import PageData
from xenpv.stream.records import LIBXC

VERSION = 3
KINDS = (Kind.XL, Kind.LIBXL, Kind.LIBXC)

_PAGE_SHIFT = 12
_ALL_ONES = (1 << 64) - 1


class Writer:
    """Writes one stream, little-endian, libxc version 3: ``start``, then ``send`` and ``pages``, until it is ``done``.

    ``kind`` is what wraps it: xl's file header with ``config`` (JSON as libxl has it, or nothing) around libxl's
    records around libxc's, the latter two, or libxc's alone. ``xen`` is the version of Xen on which the domain ran.
    ``legacy``: libxl's header says that the stream was converted from the legacy format. ``offset`` counts the bytes
    given so far.

    Every call raises, and gives nothing, for what may not stand there: OutOfOrder, Malformed or Unsupported, with the
    offset at which it would have stood. After that the stream cannot be finished, and each call raises the same again.

    >>> writer = Writer(Kind.LIBXC)
    >>> head = writer.start()
    >>> [bytes(buffer).hex() for buffer in writer.send(X86PVInfo(guest_width=8, pt_levels=4))]   # doctest: +SKIP
    ['0200000008000000', '0804000000000000']
    """

    def __init__(
        self,
        kind: Kind = Kind.LIBXC,
        *,
        guest: Guest = Guest.PV,
        xen: tuple[int, int] = (4, 17),
        config: bytes = b"",
        legacy: bool = False,
    ) -> None:
        """Raises RequestError for an envelope that is not written, or a configuration that it has no place for."""
        if kind not in KINDS:
            raise RequestError(f"no {kind} envelope is written; {', '.join(KINDS)} are")
        if config and kind is not Kind.XL:
            raise RequestError(f"a bare {kind} stream has no place for a configuration")
        envelope.check_config_size(config)
        if config and not config.startswith(b"{"):
            raise RequestError("the configuration is not libxl's JSON")
        self.kind = kind
        self.guest = guest
        self.offset = 0
        self.done = False
        self._xen = xen
        self._config = config
        self._options = libxl.OPTION_LEGACY if legacy else 0
        self._ctx = RecordContext(self._fault, "<", VERSION, guest)
        self._order: Order | None = None  # of the libxc stream, once it has begun
        self._libxl = LibxlOrder()
        self._record: str | None = None
        self._failed: StreamError | None = None

    def start(self) -> list[Buffer]:
        """The envelope's header and those of the streams, up to where the first libxc record stands."""
        self._begin("image header")
        if self._order is not None:
            raise self._broken(rules.REPEATED, "a second image header")
        self._order = Order(self.guest, VERSION)
        out: list[Buffer] = []
        if self.kind is Kind.XL:
            out += envelope.xl_header(self._config)
        if self.kind is not Kind.LIBXC:
            ident = int.from_bytes(envelope.LIBXL_IDENT, "big")
            out.append(libxl.HEADER.pack(">", ident=ident, version=libxl.VERSION, options=self._options))
            context = libxl.LibxcContext()
            self._libxl.check_next(context.TYPE)
            out += _framed(context.TYPE, context.body())
        out.append(IMAGE_HEADER.pack(">", marker=_ALL_ONES, id=IMAGE_ID, version=VERSION, options=0))
        major, minor = self._xen
        check_xen_version(self._ctx, major, minor)
        out.append(DOMAIN_HEADER.pack(type=self.guest, page_shift=_PAGE_SHIFT, xen_major=major, xen_minor=minor))
        return self._give(out)

    def send(self, record: Record) -> list[Buffer]:
        """A record, of libxc's or libxl's. PAGE_DATA has a call of its own.

        libxl's come when libxc's END, or a CHECKPOINT, has handed the stream back; behind CHECKPOINT_END libxc's come
        again.
        """
        inner = not isinstance(record, LibxlRecord)
        known = LIBXC if inner else libxl.LIBXL
        kind = getattr(type(record), "TYPE", -1)
        self._begin(record.name)
        if known.get(kind) is not type(record):
            raise self._broken(rules.RECORD_UNKNOWN, f"{type(record).__name__} is no record that can be written")
        self._place(kind, inner=inner)
        try:
            body = record.body()
        except OverflowError as e:
            raise self._broken(rules.RECORD_SIZE, f"a value does not fit: {e}") from None
        length = _size(body)
        if length not in record.LENGTH:
            raise self._broken(rules.RECORD_SIZE, f"a body of {length:#x} bytes")
        record.check(self._ctx)
        record.update_context(self._ctx)
        self._turn(kind, inner=inner)
        return self._give(_framed(kind, body))

    def pages(self, entries: Buffer, contents: Sequence[Buffer] = ()) -> list[Buffer]:
        """PAGE_DATA. ``entries``: 64 bits each, little-endian, type in bits 63 to 60, pfn in 51 to 0. ``contents``: the
        pages of those that have content, in their order, cut as they come: any number of bytes to a buffer.
        """
        self._begin(Type.PAGE_DATA.name)
        self._place(Type.PAGE_DATA, inner=True)
        count, rest = divmod(len(entries), 8)
        length = PageData.FIELDS.size + len(entries) + _size(contents)
        if not count or rest:
            raise self._broken(rules.PAGE_COUNT, f"PAGE_DATA with {len(entries)} bytes of pfns")
        if length > RECORD_LENGTH_MAX:
            raise self._broken(rules.RECORD_LENGTH, f"length {length:#x} exceeds max ({RECORD_LENGTH_MAX:#x})")
        begin = self.offset + RECORD_HEADER.size + PageData.FIELDS.size + len(entries)
        raw = memoryview(entries)
        PageData.parse_entries(self._ctx, raw, offset=self.offset, length=length, pages_offset=begin)
        return self._give(_framed(Type.PAGE_DATA, [PageData.FIELDS.pack(count=count), entries, *contents], length))

    # --- what may stand where ----------------------------------------------------------------------------------------

    def _begin(self, record: str) -> None:
        self._record = record
        if self._failed is not None:
            raise self._failed
        if self.done:
            raise self._broken(rules.ORDER, f"{record} behind the end of the stream")

    def _place(self, kind: int, *, inner: bool) -> None:
        """Whether a record may come now; END also needs all others to have come."""
        order = self._order
        if order is None:
            raise self._broken(rules.ORDER, f"{self._record} before the headers")
        wrapped = self.kind is not Kind.LIBXC
        if inner != (not wrapped or self._libxl.in_libxc):
            where = "within libxc's stream" if not inner else "where libxl's records stand"
            raise self._broken(rules.ORDER, f"{self._record} {where if wrapped else 'in a bare libxc stream'}")
        for rule, message in order.check_next(kind) if inner else self._libxl.check_next(kind):
            self._fault(rule, message)
        if inner and kind == Type.END:
            for missing in order.missing():
                self._fault(rules.MISSING, f"the stream ends without {missing.name}")

    def _turn(self, kind: int, *, inner: bool) -> None:
        """Who has the stream after this record."""
        if not inner:
            self.done = self._libxl.ended
        elif kind in {Type.END, Type.CHECKPOINT}:
            self._libxl.libxc_handed_back(checkpoint=kind == Type.CHECKPOINT)
            self.done = self.kind is Kind.LIBXC and kind == Type.END

    def _fault(self, rule: Rule, message: str) -> None:
        raise self._broken(rule, message)

    def _broken(self, rule: Rule, message: str) -> StreamError:
        self._failed = rules.breach(rule, message, offset=self.offset, record=self._record)
        return self._failed

    def _give(self, buffers: list[Buffer]) -> list[Buffer]:
        self.offset += _size(buffers)
        return buffers


def _framed(kind: int, body: Sequence[Buffer], length: int | None = None) -> list[Buffer]:
    """A record's header, body and padding."""
    length = _size(body) if length is None else length
    padding = bytes(-length % 8)
    whole = [RECORD_HEADER.pack(type=kind, length=length), *body, padding]
    return [buffer for buffer in whole if len(buffer)]


def _size(buffers: Sequence[Buffer]) -> int:
    return sum(map(len, buffers))
