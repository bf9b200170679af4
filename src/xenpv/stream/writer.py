"""Writer: records in, buffers out, no I/O.

Each call returns the buffers to be written next, in order; page content is not copied. A Writer does not write what a
Reader refuses: both ask the same tables for the order (record_order.py, LibxlOrder), and the same records for their
values.
What a verifier would warn of, such as reserved fields and padding, is right by construction, or refused.
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
from xenpv.stream.page_data import PageData
from xenpv.stream.record_order import Guest, Order, RecordType
from xenpv.stream.records import LIBXC, SealPart
from xenpv.stream.seal import Sealer

VERSION = 3
KINDS = (Kind.XL, Kind.LIBXL, Kind.LIBXC)  # that a Writer makes

_PAGE_SHIFT = 12
_ALL_ONES = (1 << 64) - 1


class Writer:
    """Writes one stream, little-endian, libxc version 3.

    Call ``start``, then ``send`` and ``pages``, until it is ``done``.

    Args:
        kind: the envelope: xl's file header, or none around a libxl or libxc stream.
        guest: PV or HVM.
        xen: the version of Xen on which the domain ran.
        config: for xl, the domain's configuration as libxl's JSON; may be empty.
        legacy: mark libxl's stream as converted from the legacy format.
        seal: seals the stream; bytes before the stream were added to it.

    Attributes:
        offset: bytes returned so far.
        done: whether the stream is complete.

    Raises:
        RequestError: the constructor, for a kind or a configuration that cannot be written.
        OutOfOrder, Malformed, Unsupported: every call, for a record that may not come here, with the offset at which
            it would be. The call returns nothing, and each later call raises the same again.

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
        seal: Sealer | None = None,
    ) -> None:
        if kind not in KINDS:
            raise RequestError(f"cannot write a {kind} envelope; only {', '.join(KINDS)}")
        if config and kind is not Kind.XL:
            raise RequestError(f"a bare {kind} stream cannot carry a configuration")
        envelope.check_config_size(config)
        if config and not config.startswith(b"{"):
            raise RequestError("the configuration is not libxl's JSON")
        self.kind = kind
        self.guest = guest
        self.offset = 0
        self.done = False
        self._xen = xen
        self._config = config
        self._seal = seal
        self._options = libxl.OPTION_LEGACY if legacy else 0
        self._ctx = RecordContext(self._raise_breach, "<", VERSION, guest)
        self._order: Order | None = None  # of the libxc stream; None before ``start``
        self._libxl = LibxlOrder()
        self._record: str | None = None
        self._failed: StreamError | None = None

    def start(self) -> list[Buffer]:
        """Return the headers of envelope and streams, up to the first libxc record."""
        self._start_record("image header")
        if self._order is not None:
            raise self._fatal_error(rules.REPEATED, "a second image header")
        self._order = Order(self.guest, VERSION)
        out: list[Buffer] = []
        if self.kind is Kind.XL:
            out += envelope.xl_header(self._config)
        if self.kind is not Kind.LIBXC:
            ident = int.from_bytes(envelope.LIBXL_IDENT, "big")
            out.append(libxl.HEADER.pack(">", ident=ident, version=libxl.VERSION, options=self._options))
            context = libxl.LibxcContext()
            self._libxl.check_next(context.TYPE)
            out += _frame(context.TYPE, context.body())
        covered = 0 if self._seal is None else self._seal.size + _total_size(out)
        out.append(IMAGE_HEADER.pack(">", marker=_ALL_ONES, id=IMAGE_ID, version=VERSION, options=0))
        major, minor = self._xen
        check_xen_version(self._ctx, major, minor)
        out.append(DOMAIN_HEADER.pack(type=self.guest, page_shift=_PAGE_SHIFT, xen_major=major, xen_minor=minor))
        if self._seal is not None:
            self._seal.add(out)
            out += self._frame_seal(SealPart.BEGIN, covered)
        return self._count(out)

    def send(self, record: Record) -> list[Buffer]:
        """Return a record of libxc's or libxl's; PAGE_DATA is written by ``pages``.

        libxl's records come after libxc's END or CHECKPOINT; after CHECKPOINT_END libxc's come again.
        """
        is_libxc = not isinstance(record, LibxlRecord)
        known = LIBXC if is_libxc else libxl.LIBXL
        kind = getattr(type(record), "TYPE", -1)
        self._start_record(record.name)
        if known.get(kind) is not type(record):
            raise self._fatal_error(rules.RECORD_UNKNOWN, f"cannot write a record of class {type(record).__name__}")
        self._check_order(kind, is_libxc=is_libxc)
        try:
            body = record.body()
        except OverflowError as e:
            raise self._fatal_error(rules.RECORD_SIZE, f"a value does not fit its field: {e}") from None
        length = _total_size(body)
        if length not in record.LENGTH:
            raise self._fatal_error(rules.RECORD_SIZE, f"a body of {length:#x} bytes")
        record.check(self._ctx)
        record.update_context(self._ctx)
        self._note_sent(kind, is_libxc=is_libxc)
        framed = _frame(kind, body)
        if self._seal is None or not is_libxc:
            return self._count(framed)
        if kind == RecordType.END:
            return self._count([*self._frame_seal(SealPart.END), *framed])
        self._seal.add(framed)
        return self._count(framed)

    def pages(self, entries: Buffer, contents: Sequence[Buffer] = ()) -> list[Buffer]:
        """Return a PAGE_DATA record.

        Args:
            entries: 64 bits each, little-endian: type in bits 63 to 60, pfn in bits 51 to 0.
            contents: the pages of those that have content, in their order; a buffer may have any number of bytes.
        """
        self._start_record(RecordType.PAGE_DATA.name)
        self._check_order(RecordType.PAGE_DATA, is_libxc=True)
        count, rest = divmod(len(entries), 8)
        length = PageData.FIELDS.size + len(entries) + _total_size(contents)
        if not count or rest:
            raise self._fatal_error(rules.PAGE_COUNT, f"PAGE_DATA with {len(entries)} bytes of pfns")
        if length > RECORD_LENGTH_MAX:
            raise self._fatal_error(rules.RECORD_LENGTH, f"length {length:#x} exceeds max ({RECORD_LENGTH_MAX:#x})")
        pages_offset = self.offset + RECORD_HEADER.size + PageData.FIELDS.size + len(entries)
        raw = memoryview(entries)
        PageData.parse_entries(self._ctx, raw, offset=self.offset, length=length, pages_offset=pages_offset)
        body = [PageData.FIELDS.pack(count=count), entries, *contents]
        framed = _frame(RecordType.PAGE_DATA, body, length)
        if self._seal is not None:
            self._seal.add_pages(framed)
            if self._seal.is_due:
                framed += self._frame_seal(SealPart.NEXT)
        return self._count(framed)

    def _frame_seal(self, part: SealPart, covered: int = 0) -> list[Buffer]:
        """Return the seal of all that was written so far."""
        assert self._seal is not None
        record = self._seal.seal(part, covered)
        return _frame(record.TYPE, record.body())

    # --- order -------------------------------------------------------------------------------------------------------

    def _start_record(self, record: str) -> None:
        """Start a record. Raises if an earlier one failed or the stream is done."""
        self._record = record
        if self._failed is not None:
            raise self._failed
        if self.done:
            raise self._fatal_error(rules.ORDER, f"{record} after the end of the stream")

    def _check_order(self, kind: int, *, is_libxc: bool) -> None:
        """Raise if a record may not come now; END also needs all mandatory records."""
        order = self._order
        if order is None:
            raise self._fatal_error(rules.ORDER, f"{self._record} before the headers")
        has_libxl = self.kind is not Kind.LIBXC
        if is_libxc != (not has_libxl or self._libxl.in_libxc):
            place = "within libxc's stream" if not is_libxc else "among libxl's records"
            raise self._fatal_error(rules.ORDER, f"{self._record} {place if has_libxl else 'in a bare libxc stream'}")
        for rule, message in order.check_next(kind) if is_libxc else self._libxl.check_next(kind):
            self._raise_breach(rule, message)
        if is_libxc and kind == RecordType.END:
            for missing in order.missing():
                self._raise_breach(rules.MISSING, f"the stream ends without {missing.name}")

    def _note_sent(self, kind: int, *, is_libxc: bool) -> None:
        """Note whether the stream is done, and whose records come next.

        The next records are libxc's or libxl's.
        """
        if not is_libxc:
            self.done = self._libxl.ended
        elif kind in {RecordType.END, RecordType.CHECKPOINT}:
            self._libxl.libxc_handed_back(checkpoint=kind == RecordType.CHECKPOINT)
            self.done = self.kind is Kind.LIBXC and kind == RecordType.END

    def _raise_breach(self, rule: Rule, message: str) -> None:
        raise self._fatal_error(rule, message)

    def _fatal_error(self, rule: Rule, message: str) -> StreamError:
        """Note a breach, and return the error that the caller must raise.

        Nothing can be written after it.
        """
        self._failed = rules.breach(rule, message, offset=self.offset, record=self._record)
        return self._failed

    def _count(self, buffers: list[Buffer]) -> list[Buffer]:
        """Add the size of buffers to ``offset``, and return them."""
        self.offset += _total_size(buffers)
        return buffers


def _frame(kind: int, body: Sequence[Buffer], length: int | None = None) -> list[Buffer]:
    """Return a record's header, body and padding."""
    length = _total_size(body) if length is None else length
    padding = bytes(-length % 8)
    buffers = [RECORD_HEADER.pack(type=kind, length=length), *body, padding]
    return [buffer for buffer in buffers if len(buffer)]


def _total_size(buffers: Sequence[Buffer]) -> int:
    return sum(map(len, buffers))
