"""Legacy streams, those of before Xen 4.6, told as the events of a stream of version 3.

xen.git@b15bc4345e^:tools/libxc/xg_save_restore.h, xc_domain_save.c, xc_domain_restore.c;
xen.git:tools/python/xen/migration/legacy.py, docs/specs/libxc-migration-stream.pandoc "Legacy Images".

The format has neither magic nor version, and its numbers are the toolstack's own longs: of 4 or 8 bytes, told by
looking. A header, then a body of chunks that ends with one of type 0, and a tail; of a domain under Remus, more bodies
and tails.
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from typing import TYPE_CHECKING

from xenpv.abi.declare import Width
from xenpv.abi.x86 import LEVELS, PAGE_SIZE, VCPU_GUEST_CONTEXT
from xenpv.errors import StreamError, Unsupported
from xenpv.stream import delta, envelope, framing, libxl, records, rules
from xenpv.stream.envelope import Kind
from xenpv.stream.events import DomainHeader, Event, PageDeltas
from xenpv.stream.fields import RecordContext
from xenpv.stream.legacy_physmap import physmap
from xenpv.stream.order import Guest
from xenpv.stream.pagedata import PageData
from xenpv.stream.reader import Reader, Steps
from xenpv.stream.rules import BreachHandler

if TYPE_CHECKING:
    from xenpv.frames import U64

MINOR = 1  # the Xen version of a converted stream's domain header is 0.1
BATCH_MAX = 1024
_P2M_MAX = 1 << 28  # pfns have 28 bits
_VCPUS_MAX = 4096  # XC_SR_MAX_VCPUS
_UNMAPPED = 0xF000_0000  # what stands for a pfn that could not be mapped
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


def recognise(head: bytes) -> tuple[int, Guest] | None:
    """Bytes of a long and the domain's type, of a legacy stream that begins so; None where it does not look like one.

    A PV domain's has extended info, whose mark is all ones, where an HVM domain's has the first chunk.
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


class LegacyReader(Reader):
    """A Reader that reads legacy streams too, bare or in an envelope, as if they were of version 3.

    Each body and tail but the last are followed by a Checkpoint. Emulator records come within their tail, before
    Checkpoint and End. ``told``: bytes of a long and the domain's type, where they are known; ``emulator``: whether its
    state is read, where the stream of an HVM domain is bare.
    """

    def __init__(
        self,
        *,
        on_breach: BreachHandler | None = None,
        pages: bool = False,
        kind: Kind | None = None,
        told: tuple[int, Guest] | None = None,
        emulator: bool = True,
    ) -> None:
        super().__init__(on_breach=on_breach, pages=pages, kind=kind)
        self.legacy = told is not None  # whether that is what it is
        self._told = told
        self._with_emulator = emulator
        self._long = 8
        self._guest = Guest.PV
        self._p2m_size = 0
        self._extended = False
        self._xsave = 0
        self._vcpus: list[int] = [0]
        self._last = False  # no checkpoint follows
        self._compressing = False
        self._entries = b""  # named, and their content has not come
        self._pending = 0  # how many of those have content
        self._rest = b""  # of compressed data: a page that is not whole
        self._physmap = b""

    def _sniff(self, head: bytes) -> Kind | None:
        if self._told is not None:
            return None
        try:
            return super()._sniff(head)
        except Unsupported:
            if recognise(head) is None:
                raise
            return None

    def _legacy(self, what: str, at: int = 0, *, emulator: bool = True) -> Steps:  # noqa: ARG002
        self.legacy = True
        self._begin("legacy header")
        self._long, self._guest = self._told or (yield from self._looked())
        size = yield from self._longs(1, "p2m_size")
        self._p2m_size = size[0]
        if not 0 < self._p2m_size <= _P2M_MAX:
            raise self._malformed(f"p2m_size is {self._p2m_size:#x}; pfns of the legacy format have 28 bits")
        self._ctx = RecordContext(self._fault, "<", 3, self._guest)
        yield DomainHeader(self._at, self._guest, 0, MINOR)
        if self._guest is Guest.PV:
            yield from self._extended_info()
        yield records.StaticDataEnd(offset=self.offset)
        if self._guest is Guest.PV:
            yield from self._p2m_frames()
        while True:
            yield from self._body_of_chunks()
            if self._guest is Guest.PV:
                yield from self._pv_tail()
            else:
                yield from self._hvm_tail(emulator and self._with_emulator)
            if self._last or not (yield from self._more()):
                break
            yield records.Checkpoint(offset=self.offset)
        yield records.End(offset=self.offset)

    # --- bytes -------------------------------------------------------------------------------------------------------

    def _looked(self) -> Generator[Event | None, None, tuple[int, Guest]]:
        while self._have < envelope.SNIFF and not self._eof:
            self.need = envelope.SNIFF - self._have
            yield None
        found = recognise(self._ahead(envelope.SNIFF))
        if found is None and self._have < 12:
            yield from self._wait(self._have, envelope.SNIFF, "the legacy header")
        if found is None:
            raise self._malformed("no legacy stream begins so: neither a 32-bit toolstack's nor a 64-bit one's")
        return found

    def _more(self) -> Generator[Event | None, None, bool]:
        """Whether the input goes on."""
        while not self._have and not self._eof:
            self.need = 1
            yield None
        return self._have > 0

    def _malformed(self, message: str) -> StreamError:
        return self._fatal(rules.LEGACY, message)

    def _unpack(self, layout: str, what: str) -> Generator[Event | None, None, tuple[int, ...]]:
        layout = f"<{layout}"
        return struct.unpack(layout, (yield from self._take(struct.calcsize(layout), what)))

    def _longs(self, count: int, what: str) -> Generator[Event | None, None, tuple[int, ...]]:
        return (yield from self._unpack(f"{count}{'Q' if self._long == 8 else 'I'}", what))

    # --- header ------------------------------------------------------------------------------------------------------

    def _extended_info(self) -> Steps:
        self._begin("legacy extended info")
        (mark,) = yield from self._longs(1, "the mark of extended info")
        if mark != (1 << 8 * self._long) - 1:
            raise self._malformed(f"unexpected extended info marker {mark:#x}")
        (left,) = yield from self._unpack("I", "the length of extended info")
        info = None
        while left:
            self._begin("legacy extended info")
            ident, size = struct.unpack("<4sI", (yield from self._take(8, "an extended info block")))
            if left < 8 + size:
                raise self._malformed(f"a block of {size} bytes does not fit into the {left} bytes of extended info")
            left -= 8 + size
            if ident == b"vcpu":
                info = yield from self._guest_width(size)
            elif ident == b"extv":
                self._extended = True
                yield from self._pass_over(size, "an extended info block")
            elif ident == b"xcnt" and size >= 4:
                self._xsave = int.from_bytes((yield from self._take(size, "an extended info block"))[:4], "little")
                if not 16 <= self._xsave < framing.BLOB_MAX:
                    raise self._malformed(f"an xsave area of {self._xsave} bytes")
            else:
                raise self._malformed(f"unrecognised extended info block {bytes(ident)!r} of {size} bytes")
        if info is None:
            raise self._malformed("no vcpu block says whether the guest has 32 or 64 bits")
        yield info

    def _guest_width(self, size: int) -> Generator[Event | None, None, records.X86PVInfo]:
        widths: tuple[Width, ...] = (4, 8)
        for width in widths:
            if size == VCPU_GUEST_CONTEXT.size(width):
                info = records.X86PVInfo(offset=self._at, length=size, guest_width=width, pt_levels=LEVELS[width])
                info.update_context(self._ctx)
                yield from self._pass_over(size, "vcpu 0's context")
                return info
        raise self._malformed(f"unable to determine the guest's width: a vcpu's context of {size} bytes")

    def _p2m_frames(self) -> Steps:
        self._begin("legacy p2m frame list")
        frames = -(-self._p2m_size * (self._ctx.width or 8) // PAGE_SIZE)
        raw = bytes((yield from self._take(frames * self._long, "the p2m frame list")))
        if self._long == 4:
            raw = struct.pack(f"<{frames}Q", *struct.unpack(f"<{frames}I", raw))
        record = records.X86PVP2MFrames(
            offset=self._at, length=8 + len(raw), start_pfn=0, end_pfn=self._p2m_size - 1, raw=raw
        )
        record.check(self._ctx)
        record.update_context(self._ctx)
        yield record

    # --- body --------------------------------------------------------------------------------------------------------

    def _body_of_chunks(self) -> Steps:
        compressed, params = self._compressing, dict[int, int]()
        while True:
            self._begin("legacy chunk")
            (chunk,) = yield from self._unpack("i", "a chunk's type")
            self._record = f"legacy chunk {chunk}"
            if chunk == 0:
                break
            if chunk > 0:
                yield from self._pages_of(chunk, compressed=compressed)
            elif chunk in _PARAMS:
                _, value = yield from self._unpack("IQ", "an HVM parameter")
                if self._guest is Guest.PV:
                    raise self._malformed("an HVM parameter in a PV domain's stream")
                params[_PARAMS[chunk]] = value
            elif chunk == _VCPU_INFO:
                yield from self._vcpu_info()
            elif chunk == _TSC_INFO:
                mode, nsec, khz, incarnation = yield from self._unpack("IQII", "TSC info")
                yield records.X86TscInfo(
                    offset=self._at, length=24, mode=mode, khz=khz, nsec=nsec, incarnation=incarnation
                )
            elif chunk == _LAST_CHECKPOINT:
                self._last = True
            elif chunk == _ENABLE_COMPRESSION:
                self._compressing = True  # from the next body on
            elif chunk == _COMPRESSED:
                yield from self._compressed()
            elif chunk == _TOOLSTACK:
                yield from self._toolstack()
            elif chunk in {_TMEM, _TMEM_EXTRA}:
                raise Unsupported("transcendent memory, which Xen has no more", offset=self._at, record=self._record)
            elif chunk != _VERIFY:  # behind that, pages come once more, to be compared
                raise self._malformed(f"unrecognised chunk {chunk}")
        if self._pending or self._rest:
            raise self._malformed(f"the body ends, and {self._pending} pages are named whose content has not come")
        if self._entries:
            yield self._checked(self._entries, 0)
            self._entries = b""
        if params:
            yield records.HvmParams(offset=self._at, length=8 + 16 * len(params), params=params)

    def _pages_of(self, count: int, *, compressed: bool) -> Steps:
        import numpy as np  # noqa: PLC0415  as in records.py

        from xenpv.frames import HAS_DATA  # noqa: PLC0415

        if count > BATCH_MAX:
            raise self._malformed(f"page batch ({count}) exceeds the most there can be ({BATCH_MAX})")
        raw = yield from self._take(count * self._long, "a batch's pfns")
        longs: U64 = np.frombuffer(raw, f"<u{self._long}").astype(np.uint64)
        longs = longs[longs != _UNMAPPED]
        if np.any(longs >> np.uint64(32)):
            raise self._malformed(f"a pfn and type of more than 32 bits: {int(longs.max()):#x}")
        if len(np.unique(longs)) != len(longs):
            raise self._malformed("duplicate pfns in a batch")
        types = longs & np.uint64(0xF000_0000)
        entries = (types << np.uint64(32) | longs & np.uint64(0x0FFF_FFFF)).tobytes()
        pages = int(np.count_nonzero(HAS_DATA[(types >> np.uint64(28)).astype(np.uint8)]))
        record = self._checked(entries, pages)
        if compressed:
            self._entries += entries
            self._pending += pages
            if len(self._entries) > 8 * _PENDING_MAX:
                raise self._malformed(f"more than {_PENDING_MAX} pages are named before any content comes")
        elif entries:
            yield record
            end = self.offset + pages * PAGE_SIZE
            if self._pages:
                yield from self._contents(record)
            yield from self._pass_over(end - self.offset, "page content")

    def _checked(self, entries: bytes, pages: int) -> PageData:
        length = 8 + len(entries) + pages * PAGE_SIZE
        if not entries:
            return PageData(offset=self._at, length=length, raw=entries, pages=0, pages_offset=self.offset)
        view = memoryview(entries)
        return PageData.read(self._ctx, view, offset=self._at, length=length, pages_offset=self.offset)

    def _compressed(self) -> Steps:
        (size,) = yield from self._longs(1, "the length of compressed data")
        if size > framing.RECORD_LENGTH_MAX:
            raise self._malformed(f"compressed data of {size:#x} bytes")
        data = self._rest + (yield from self._take(size, "compressed data"))
        try:
            ends = delta.ends(data, self._pending)
        except delta.Damaged as e:
            raise self._malformed(f"compressed data, byte {e.at:#x}: {e}") from None
        begin = 0
        for first in range(0, len(ends), BATCH_MAX):  # a byte can stand for a page
            some = ends[first : first + BATCH_MAX]
            entries, self._entries = self._split(len(some))
            self._pending -= len(some)
            yield PageDeltas(self._at, entries, [end - begin for end in some], bytes(data[begin : some[-1]]))
            begin = some[-1]
        self._rest = bytes(data[begin:])
        if self._rest and not self._pending:
            raise self._malformed(f"{len(self._rest)} bytes of compressed data are no page's")

    def _split(self, pages: int) -> tuple[bytes, bytes]:
        """The entries up to so many with content, and up to the next one; the others."""
        import numpy as np  # noqa: PLC0415

        with_content = np.frombuffer(self._entries, "<u8") >> np.uint64(60) < 0xD
        at = np.searchsorted(np.cumsum(with_content), pages, "right") * 8
        return self._entries[:at], self._entries[at:]

    def _vcpu_info(self) -> Steps:
        (last,) = yield from self._unpack("i", "the last vcpu's number")
        if not 0 <= last < _VCPUS_MAX:
            raise self._malformed(f"the last vcpu is {last}; at most {_VCPUS_MAX - 1} is possible")
        words = yield from self._unpack(f"{last // 64 + 1}Q", "the map of vcpus")
        self._vcpus = [vcpu for vcpu in range(last + 1) if words[vcpu // 64] >> vcpu % 64 & 1]

    def _toolstack(self) -> Steps:
        (size,) = yield from self._unpack("I", "the length of the toolstack's data")
        if size > framing.BLOB_MAX:
            raise self._malformed(f"toolstack data of {size:#x} bytes")
        data = yield from self._take(size, "the toolstack's data")
        try:
            self._physmap = physmap(data, self._long) if size else b""
        except ValueError as e:
            raise self._malformed(str(e)) from None

    # --- tail --------------------------------------------------------------------------------------------------------

    def _pv_tail(self) -> Steps:
        self._begin("legacy unmapped pfns")
        (count,) = yield from self._unpack("I", "the number of unmapped pfns")
        if count > _P2M_MAX:
            raise self._malformed(f"{count} unmapped pfns")
        yield from self._pass_over(count * self._long, "the unmapped pfns")
        size = VCPU_GUEST_CONTEXT.size(self._ctx.width or 8)
        for vcpu in self._vcpus:
            yield from self._blob(records.VcpuBasic, vcpu, size)
            if self._extended:
                yield from self._blob(records.VcpuExtended, vcpu, 128)
            if self._xsave:
                _, length = yield from self._unpack("QQ", "an xsave area's header")
                if length != self._xsave - 16:
                    raise self._malformed(f"vcpu{vcpu}: an xsave area of {length} bytes, not {self._xsave - 16}")
                yield from self._blob(records.VcpuXsave, vcpu, length)
        self._begin("legacy shared info")
        page = bytes((yield from self._take(PAGE_SIZE, "shared info")))
        yield records.SharedInfo(offset=self._at, length=PAGE_SIZE, data=page)

    def _blob(self, kind: type[records.VcpuBlob], vcpu: int, size: int) -> Steps:
        self._begin(f"legacy {kind.type_name()}")
        context = bytes((yield from self._take(size, kind.type_name())))
        if size:
            yield kind(offset=self._at, length=8 + size, vcpu_id=vcpu, context=context)

    def _hvm_tail(self, emulator: bool) -> Steps:
        self._begin("legacy HVM tail")
        ioreq, bufioreq, store = yield from self._unpack("QQQ", "the magic pfns")
        params = {_IOREQ: ioreq, _BUFIOREQ: bufioreq, _STORE: store}
        yield records.HvmParams(offset=self._at, length=56, params=params)
        self._begin("legacy HVM context")
        (size,) = yield from self._unpack("I", "the length of the HVM context")
        if not 0 < size <= framing.RECORD_LENGTH_MAX:
            raise self._malformed(f"an HVM context of {size:#x} bytes")
        context = bytes((yield from self._take(size, "the HVM context")))
        yield records.HvmContext(offset=self._at, length=size, data=context)
        unknown = libxl.Emulator.UNKNOWN
        if self._physmap:
            yield libxl.EmulatorXenstoreData(offset=self._at, emulator_id=unknown, index=0, data=self._physmap)
        if emulator:
            data = yield from self._qemu()
            yield libxl.EmulatorContext(offset=self._at, length=8 + len(data), emulator_id=unknown, index=0, data=data)

    def _qemu(self) -> Generator[Event | None, None, bytes]:
        self._begin("legacy qemu record")
        signature = bytes((yield from self._take(21, "qemu's signature")))
        most = framing.RECORD_LENGTH_MAX - 8
        if signature in _QEMU_SIGNATURES:
            (size,) = yield from self._unpack("I", "the length of qemu's state")
            if size > most:
                raise self._malformed(f"a qemu state of {size:#x} bytes")
            return bytes((yield from self._take(size, "qemu's state")))
        if signature != _QEMU_UNTIL_END:
            raise self._malformed(f"unrecognised qemu signature {signature!r}")
        while not self._eof:
            if self._have > most:
                raise self._malformed(f"a qemu state of more than {most:#x} bytes")
            self.need = 1
            yield None
        return bytes((yield from self._take(self._have, "qemu's state")))
