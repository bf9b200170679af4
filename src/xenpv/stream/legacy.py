"""Legacy streams (before Xen 4.6), read as events of a stream of version 3.

xen.git@b15bc4345e^:tools/libxc/xg_save_restore.h, xc_domain_save.c, xc_domain_restore.c;
xen.git:tools/python/xen/migration/legacy.py, docs/specs/libxc-migration-stream.pandoc "Legacy Images".

The format has neither magic nor version. Many of its numbers are longs of the toolstack, of 4 or 8 bytes. A stream is a
header, a body of chunks that ends with chunk 0, and a tail. Under Remus more bodies and tails follow.
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from typing import TYPE_CHECKING

from xenpv.abi.declare import Width
from xenpv.abi.x86 import LEVELS, PAGE_SIZE, VCPU_GUEST_CONTEXT
from xenpv.errors import StreamError, Unsupported
from xenpv.stream import delta, envelope, framing, libxl, records, rules
from xenpv.stream.cursor import Cursor, Steps, read_pages
from xenpv.stream.events import DomainHeader, Event, PageDeltas
from xenpv.stream.fields import RecordContext
from xenpv.stream.legacy_physmap import convert_physmap
from xenpv.stream.page_data import PageData
from xenpv.stream.record_order import Guest

if TYPE_CHECKING:
    from xenpv.frames import U64

MINOR = 1  # the Xen version of a converted stream's domain header is 0.1
BATCH_MAX = 1024
_P2M_MAX = 1 << 28  # pfns have 28 bits
_VCPUS_MAX = 4096  # XC_SR_MAX_VCPUS
_UNMAPPED = 0xF000_0000  # in place of a pfn that could not be mapped
_PENDING_MAX = 1 << 16  # pages named and not yet sent; a sender keeps 8192
_QEMU_SIGNATURES = (b"DeviceModelRecord0002", b"RemusDeviceModelState")
_QEMU_UNTIL_END = b"QemuDeviceModelRecord"

# Chunks: XC_SAVE_ID_*.
_VERIFY, _VCPU_INFO, _TMEM, _TMEM_EXTRA, _TSC_INFO, _LAST_CHECKPOINT = -1, -2, -5, -6, -7, -9
_COMPRESSED, _ENABLE_COMPRESSION, _TOOLSTACK = -12, -13, -18
# Those that are an HVM parameter, and its number: xen.git:xen/include/public/hvm/params.h.
_PARAMS = {-3: 12, -4: 15, -8: 17, -10: 19, -11: 9, -14: 34, -15: 27, -16: 28, -17: 29, -19: 32, -20: 33}
_IOREQ, _BUFIOREQ, _STORE = 5, 6, 1
_CHUNKS = frozenset(range(-20, 0))
_HEADER_MIN = 12  # bytes by which an HVM stream is detected


def detect_toolstack(head: bytes) -> tuple[int, Guest] | None:
    """Detect a legacy stream's toolstack: bytes of its long, and the type of domain.

    None if the stream does not look like a legacy one.

    A PV domain's stream has the all-ones signature of extended info where an HVM domain's has its first chunk.
    """
    if bits := envelope.legacy_width(head):
        return bits // 8, Guest.PV
    wide = head[4:8] == bytes(4)
    chunk = head[8:12] if wide else head[4:8]
    if len(chunk) == 4 and 0 < int.from_bytes(head[:4], "little") < _P2M_MAX:
        number = int.from_bytes(chunk, "little", signed=True)
        if number in _CHUNKS or 0 < number <= BATCH_MAX:
            return 8 if wide else 4, Guest.HVM
    return None


class LegacyFormat:
    """Reads legacy streams for a Reader, bare or in an envelope.

    They give the events of a stream of version 3.

    A Checkpoint follows each body and tail but the last. Emulator records come within their tail, before Checkpoint and
    End.

    Args:
        toolstack: bytes of the long of the toolstack that saved, and the domain's type; None detects them.
        emulator: whether the device model's state follows a bare HVM stream.
    """

    def __init__(self, *, toolstack: tuple[int, Guest] | None = None, emulator: bool = True) -> None:
        self._toolstack = toolstack
        self._emulator = emulator

    def matches(self, head: bytes) -> bool:
        """Return whether to read a stream that begins so as a legacy one."""
        return self._toolstack is not None or detect_toolstack(head) is not None

    def read(self, cursor: Cursor, *, pages: bool, emulator: bool) -> Steps:
        """Read one stream.

        ``pages``: give page content; ``emulator``: the envelope allows its state to follow.
        """
        cursor.start_record("legacy header")
        long, guest = self._toolstack or (yield from _detect_toolstack(cursor))
        stream = _LegacyStream(cursor, long, guest, pages=pages, emulator=emulator and self._emulator)
        yield from stream.read()


def _detect_toolstack(cursor: Cursor) -> Generator[Event | None, None, tuple[int, Guest]]:
    """Wait for the first bytes, and detect the toolstack by them.

    Raises:
        Malformed: the bytes are not those of any toolstack.
    """
    head = yield from cursor.peek(envelope.SNIFF_SIZE)
    toolstack = detect_toolstack(head)
    if toolstack is None:
        if len(head) < _HEADER_MIN:
            yield from cursor.wait(len(head), envelope.SNIFF_SIZE, "the legacy header")
        message = "the input is no legacy stream, of neither a 32-bit nor a 64-bit toolstack"
        raise cursor.fatal_error(rules.LEGACY, message)
    return toolstack


class _LegacyStream:
    """The parser of one legacy stream, with the values of its header and chunks."""

    def __init__(self, cursor: Cursor, long: int, guest: Guest, *, pages: bool, emulator: bool) -> None:
        self._cursor = cursor
        self._long = long
        self._guest = guest
        self._pages = pages
        self._emulator = emulator
        self._ctx = RecordContext(cursor.report_or_raise, "<", 3, guest)
        self._p2m_size = 0
        self._has_extended = False  # an extended context follows each vcpu's
        self._xsave_size = 0  # bytes of the xsave area that follows each vcpu's context, with its header
        self._vcpus: list[int] = [0]
        self._last_checkpoint = False  # no more bodies follow
        self._compressing = False  # later bodies are compressed
        self._pending_entries = b""  # of a compressed body; their content comes later
        self._pending_pages = 0  # how many of those have content
        self._partial_page = b""  # of compressed data: a page that continues in the next chunk
        self._physmap = b""

    def read(self) -> Steps:
        """Read the header, then bodies and tails until the last one."""
        cursor = self._cursor
        (self._p2m_size,) = yield from self._longs(1, "p2m_size")
        if not 0 < self._p2m_size <= _P2M_MAX:
            raise self._malformed(f"p2m_size is {self._p2m_size:#x}; pfns of the legacy format have 28 bits")
        yield DomainHeader(cursor.record_offset, self._guest, 0, MINOR)
        if self._guest is Guest.PV:
            yield from self._read_extended_info()
        yield records.StaticDataEnd(offset=cursor.offset)
        if self._guest is Guest.PV:
            yield from self._read_p2m_frames()
        while True:
            yield from self._read_body()
            if self._guest is Guest.PV:
                yield from self._read_pv_tail()
            else:
                yield from self._read_hvm_tail()
            if self._last_checkpoint or not (yield from cursor.peek(1)):
                break
            yield records.Checkpoint(offset=cursor.offset)
        yield records.End(offset=cursor.offset)

    def _malformed(self, message: str) -> StreamError:
        """Report a breach of the format; return the error that the caller must raise."""
        return self._cursor.fatal_error(rules.LEGACY, message)

    def _unpack(self, layout: str, part: str) -> Generator[Event | None, None, tuple[int, ...]]:
        layout = f"<{layout}"
        return struct.unpack(layout, (yield from self._cursor.read(struct.calcsize(layout), part)))

    def _longs(self, count: int, part: str) -> Generator[Event | None, None, tuple[int, ...]]:
        """Read numbers of the size of the toolstack's long."""
        return (yield from self._unpack(f"{count}{'Q' if self._long == 8 else 'I'}", part))

    # --- header ------------------------------------------------------------------------------------------------------

    def _read_extended_info(self) -> Steps:
        cursor = self._cursor
        cursor.start_record("legacy extended info")
        (signature,) = yield from self._longs(1, "the signature of extended info")
        if signature != (1 << 8 * self._long) - 1:
            raise self._malformed(f"unexpected extended info marker {signature:#x}")
        (remaining,) = yield from self._unpack("I", "the length of extended info")
        info = None
        while remaining:
            cursor.start_record("legacy extended info")
            ident, size = struct.unpack("<4sI", (yield from cursor.read(8, "an extended info block")))
            if remaining < 8 + size:
                raise self._malformed(
                    f"a block of {size} bytes does not fit into the {remaining} bytes of extended info"
                )
            remaining -= 8 + size
            if ident == b"vcpu":
                info = yield from self._read_guest_width(size)
            elif ident == b"extv":
                self._has_extended = True
                yield from cursor.skip(size, "an extended info block")
            elif ident == b"xcnt" and size >= 4:
                block = yield from cursor.read(size, "an extended info block")
                self._xsave_size = int.from_bytes(block[:4], "little")
                if not 16 <= self._xsave_size < framing.BLOB_MAX:
                    raise self._malformed(f"an xsave area of {self._xsave_size} bytes")
            else:
                raise self._malformed(f"unrecognised extended info block {bytes(ident)!r} of {size} bytes")
        if info is None:
            raise self._malformed("extended info has no vcpu block, so the width of the guest is unknown")
        yield info

    def _read_guest_width(self, size: int) -> Generator[Event | None, None, records.X86PVInfo]:
        cursor = self._cursor
        widths: tuple[Width, ...] = (4, 8)
        for width in widths:
            if size == VCPU_GUEST_CONTEXT.size(width):
                info = records.X86PVInfo(
                    offset=cursor.record_offset, length=size, guest_width=width, pt_levels=LEVELS[width]
                )
                info.update_context(self._ctx)
                yield from cursor.skip(size, "vcpu 0's context")
                return info
        raise self._malformed(f"unable to determine the guest's width: a vcpu's context of {size} bytes")

    def _read_p2m_frames(self) -> Steps:
        cursor = self._cursor
        cursor.start_record("legacy p2m frame list")
        frames = -(-self._p2m_size * (self._ctx.width or 8) // PAGE_SIZE)
        raw = bytes((yield from cursor.read(frames * self._long, "the p2m frame list")))
        if self._long == 4:
            raw = struct.pack(f"<{frames}Q", *struct.unpack(f"<{frames}I", raw))
        record = records.X86PVP2MFrames(
            offset=cursor.record_offset, length=8 + len(raw), start_pfn=0, end_pfn=self._p2m_size - 1, raw=raw
        )
        record.check(self._ctx)
        record.update_context(self._ctx)
        yield record

    # --- body --------------------------------------------------------------------------------------------------------

    def _read_body(self) -> Steps:
        cursor = self._cursor
        compressed, params = self._compressing, dict[int, int]()
        while True:
            cursor.start_record("legacy chunk")
            (chunk,) = yield from self._unpack("i", "a chunk's type")
            cursor.record = f"legacy chunk {chunk}"
            if chunk == 0:
                break
            if chunk > 0:
                yield from self._read_pages(chunk, compressed=compressed)
            elif chunk in _PARAMS:
                _, value = yield from self._unpack("IQ", "an HVM parameter")
                if self._guest is Guest.PV:
                    raise self._malformed("an HVM parameter in a PV domain's stream")
                params[_PARAMS[chunk]] = value
            elif chunk == _VCPU_INFO:
                yield from self._read_vcpu_info()
            elif chunk == _TSC_INFO:
                mode, nsec, khz, incarnation = yield from self._unpack("IQII", "TSC info")
                yield records.X86TscInfo(
                    offset=cursor.record_offset, length=24, mode=mode, khz=khz, nsec=nsec, incarnation=incarnation
                )
            elif chunk == _LAST_CHECKPOINT:
                self._last_checkpoint = True
            elif chunk == _ENABLE_COMPRESSION:
                self._compressing = True  # from the next body on
            elif chunk == _COMPRESSED:
                yield from self._read_compressed()
            elif chunk == _TOOLSTACK:
                yield from self._read_toolstack()
            elif chunk in {_TMEM, _TMEM_EXTRA}:
                message = "transcendent memory, which Xen no longer has"
                raise Unsupported(message, offset=cursor.record_offset, record=cursor.record)
            elif chunk != _VERIFY:  # after it pages come once more, to be compared
                raise self._malformed(f"unrecognised chunk {chunk}")
        if self._pending_pages or self._partial_page:
            raise self._malformed(f"the body ends without the content of {self._pending_pages} pages that it names")
        if self._pending_entries:
            yield self._make_page_data(self._pending_entries, 0)
            self._pending_entries = b""
        if params:
            yield records.HvmParams(offset=cursor.record_offset, length=8 + 16 * len(params), params=params)

    def _read_pages(self, count: int, *, compressed: bool) -> Steps:
        import numpy as np  # noqa: PLC0415  as in records.py

        from xenpv.frames import HAS_DATA  # noqa: PLC0415

        cursor = self._cursor
        if count > BATCH_MAX:
            raise self._malformed(f"page batch ({count}) exceeds the maximum ({BATCH_MAX})")
        raw = yield from cursor.read(count * self._long, "a batch's pfns")
        longs: U64 = np.frombuffer(raw, f"<u{self._long}").astype(np.uint64)
        longs = longs[longs != _UNMAPPED]
        if np.any(longs >> np.uint64(32)):
            raise self._malformed(f"a pfn and type of more than 32 bits: {int(longs.max()):#x}")
        if len(np.unique(longs)) != len(longs):
            raise self._malformed("duplicate pfns in a batch")
        types = longs & np.uint64(0xF000_0000)
        entries = (types << np.uint64(32) | longs & np.uint64(0x0FFF_FFFF)).tobytes()
        pages = int(np.count_nonzero(HAS_DATA[(types >> np.uint64(28)).astype(np.uint8)]))
        record = self._make_page_data(entries, pages)
        if compressed:
            self._pending_entries += entries
            self._pending_pages += pages
            if len(self._pending_entries) > 8 * _PENDING_MAX:
                raise self._malformed(f"more than {_PENDING_MAX} pages are named before their content")
        elif entries:
            yield record
            end = cursor.offset + pages * PAGE_SIZE
            if self._pages:
                yield from read_pages(cursor, record)
            yield from cursor.skip(end - cursor.offset, "page content")

    def _make_page_data(self, entries: bytes, pages: int) -> PageData:
        cursor = self._cursor
        record_offset = cursor.record_offset
        length = 8 + len(entries) + pages * PAGE_SIZE
        if not entries:
            return PageData(offset=record_offset, length=length, raw=entries, pages=0, pages_offset=cursor.offset)
        view = memoryview(entries)
        return PageData.parse_entries(self._ctx, view, offset=record_offset, length=length, pages_offset=cursor.offset)

    def _read_compressed(self) -> Steps:
        cursor = self._cursor
        (size,) = yield from self._longs(1, "the length of compressed data")
        if size > framing.RECORD_LENGTH_MAX:
            raise self._malformed(f"compressed data of {size:#x} bytes")
        data = self._partial_page + (yield from cursor.read(size, "compressed data"))
        try:
            ends = delta.page_ends(data, self._pending_pages)
        except delta.MalformedDelta as e:
            raise self._malformed(f"compressed data, byte {e.offset:#x}: {e}") from None
        start = 0
        for first in range(0, len(ends), BATCH_MAX):  # a byte can stand for a page
            batch = ends[first : first + BATCH_MAX]
            entries, self._pending_entries = self._split_pending(len(batch))
            self._pending_pages -= len(batch)
            deltas = bytes(data[start : batch[-1]])
            yield PageDeltas(cursor.record_offset, entries, [end - start for end in batch], deltas)
            start = batch[-1]
        self._partial_page = bytes(data[start:])
        if self._partial_page and not self._pending_pages:
            raise self._malformed(f"{len(self._partial_page)} bytes of compressed data belong to no page")

    def _split_pending(self, pages: int) -> tuple[bytes, bytes]:
        """Split off the pending entries of so many pages with content.

        Return them and the others.
        """
        import numpy as np  # noqa: PLC0415

        with_content = np.frombuffer(self._pending_entries, "<u8") >> np.uint64(60) < 0xD
        split = np.searchsorted(np.cumsum(with_content), pages, "right") * 8
        return self._pending_entries[:split], self._pending_entries[split:]

    def _read_vcpu_info(self) -> Steps:
        (last,) = yield from self._unpack("i", "the last vcpu's number")
        if not 0 <= last < _VCPUS_MAX:
            raise self._malformed(f"the last vcpu is {last}; at most {_VCPUS_MAX - 1} is possible")
        words = yield from self._unpack(f"{last // 64 + 1}Q", "the map of vcpus")
        self._vcpus = [vcpu for vcpu in range(last + 1) if words[vcpu // 64] >> vcpu % 64 & 1]

    def _read_toolstack(self) -> Steps:
        cursor = self._cursor
        (size,) = yield from self._unpack("I", "the length of the toolstack's data")
        if size > framing.BLOB_MAX:
            raise self._malformed(f"toolstack data of {size:#x} bytes")
        data = yield from cursor.read(size, "the toolstack's data")
        try:
            self._physmap = convert_physmap(data, self._long) if size else b""
        except ValueError as e:
            raise self._malformed(str(e)) from None

    # --- tail --------------------------------------------------------------------------------------------------------

    def _read_pv_tail(self) -> Steps:
        cursor = self._cursor
        cursor.start_record("legacy unmapped pfns")
        (count,) = yield from self._unpack("I", "the number of unmapped pfns")
        if count > _P2M_MAX:
            raise self._malformed(f"{count} unmapped pfns")
        yield from cursor.skip(count * self._long, "the unmapped pfns")
        size = VCPU_GUEST_CONTEXT.size(self._ctx.width or 8)
        for vcpu in self._vcpus:
            yield from self._read_vcpu_blob(records.VcpuBasic, vcpu, size)
            if self._has_extended:
                yield from self._read_vcpu_blob(records.VcpuExtended, vcpu, 128)
            if self._xsave_size:
                _, length = yield from self._unpack("QQ", "an xsave area's header")
                if length != self._xsave_size - 16:
                    raise self._malformed(f"vcpu{vcpu}: an xsave area of {length} bytes, not {self._xsave_size - 16}")
                yield from self._read_vcpu_blob(records.VcpuXsave, vcpu, length)
        cursor.start_record("legacy shared info")
        page = bytes((yield from cursor.read(PAGE_SIZE, "shared info")))
        yield records.SharedInfo(offset=cursor.record_offset, length=PAGE_SIZE, data=page)

    def _read_vcpu_blob(self, kind: type[records.VcpuBlob], vcpu: int, size: int) -> Steps:
        cursor = self._cursor
        cursor.start_record(f"legacy {kind.type_name()}")
        context = bytes((yield from cursor.read(size, kind.type_name())))
        if size:
            yield kind(offset=cursor.record_offset, length=8 + size, vcpu_id=vcpu, context=context)

    def _read_hvm_tail(self) -> Steps:
        cursor = self._cursor
        cursor.start_record("legacy HVM tail")
        ioreq, bufioreq, store = yield from self._unpack("QQQ", "the magic pfns")
        params = {_IOREQ: ioreq, _BUFIOREQ: bufioreq, _STORE: store}
        yield records.HvmParams(offset=cursor.record_offset, length=56, params=params)
        cursor.start_record("legacy HVM context")
        (size,) = yield from self._unpack("I", "the length of the HVM context")
        if not 0 < size <= framing.RECORD_LENGTH_MAX:
            raise self._malformed(f"an HVM context of {size:#x} bytes")
        context = bytes((yield from cursor.read(size, "the HVM context")))
        yield records.HvmContext(offset=cursor.record_offset, length=size, data=context)
        unknown = libxl.Emulator.UNKNOWN
        if self._physmap:
            yield libxl.EmulatorXenstoreData(
                offset=cursor.record_offset, emulator_id=unknown, index=0, data=self._physmap
            )
        if self._emulator:
            data = yield from self._read_qemu()
            yield libxl.EmulatorContext(
                offset=cursor.record_offset, length=8 + len(data), emulator_id=unknown, index=0, data=data
            )

    def _read_qemu(self) -> Generator[Event | None, None, bytes]:
        cursor = self._cursor
        cursor.start_record("legacy qemu record")
        signature = bytes((yield from cursor.read(21, "qemu's signature")))
        most = framing.RECORD_LENGTH_MAX - 8
        if signature in _QEMU_SIGNATURES:
            (size,) = yield from self._unpack("I", "the length of qemu's state")
            if size > most:
                raise self._malformed(f"a qemu state of {size:#x} bytes")
            return bytes((yield from cursor.read(size, "qemu's state")))
        if signature != _QEMU_UNTIL_END:
            raise self._malformed(f"unrecognised qemu signature {signature!r}")
        while not cursor.buffer.ended:
            if cursor.buffer.available > most:
                raise self._malformed(f"a qemu state of more than {most:#x} bytes")
            cursor.needed = 1
            yield None
        return bytes((yield from cursor.read(cursor.buffer.available, "qemu's state")))
