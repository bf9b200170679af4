"""Legacy (v1) streams as bytes, by the description in xen.git:tools/python/xen/migration/legacy.py and what the saver
of Xen 4.5 wrote (xen.git@b15bc4345e^:tools/libxc/xc_domain_save.c). It checks nothing, and shares nothing with
xenpv.stream.

>>> from tests.support.writers.build import pv_domain
>>> bytes(pv_stream(pv_domain(pfns=range(36))))[:16].hex()
'2400000000000000ffffffffffffffff'
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tests.support.writers.build import pattern
from tests.support.writers.domain import Domain
from tests.support.writers.envelopes import config_json
from tests.support.writers.stream import NOTAB, PAGE, WITH_DATA, XALLOC, XTAB, Piece, Stream
from xenpv.abi.xen import SHARED_INFO

CONTEXT = {8: 0x1430, 4: 0xAF0}
UNMAPPED = 0xF000_0000
LAST_CHECKPOINT, ENABLE_COMPRESSION, VERIFY = -9, -13, -1
QEMU = b"DeviceModelRecord0002"
QEMU_REMUS = b"RemusDeviceModelState"
QEMU_OLD = b"QemuDeviceModelRecord"


@dataclass(frozen=True)
class Legacy:
    """The toolstack that writes: bytes of its long."""

    long: int = 8

    def longs(self, *values: int) -> bytes:
        return struct.pack(f"<{len(values)}{'Q' if self.long == 8 else 'I'}", *values)

    @property
    def ones(self) -> int:
        return (1 << 8 * self.long) - 1

    # --- header ------------------------------------------------------------------------------------------------------

    def header(self, p2m_size: int) -> Piece:
        return Piece("p2m_size", self.longs(p2m_size))

    def extended(self, *blocks: tuple[bytes, bytes], length: int | None = None) -> Piece:
        body = b"".join(ident + struct.pack("<I", len(data)) + data for ident, data in blocks)
        size = len(body) if length is None else length
        return Piece("extended info", self.longs(self.ones) + struct.pack("<I", size) + body)

    def p2m_frames(self, pfns: Sequence[int]) -> Piece:
        return Piece("p2m frames", self.longs(*pfns))

    # --- body --------------------------------------------------------------------------------------------------------

    def chunk(self, kind: int, data: bytes = b"") -> Piece:
        return Piece(f"chunk {kind}" if kind <= 0 else "pages", struct.pack("<i", kind) + data)

    def pages(
        self, entries: Iterable[tuple[int, int]], contents: Iterable[bytes], *, count: int | None = None
    ) -> Piece:
        """(pfn, type) pairs and the content of those that have some."""
        words = [kind << 28 | pfn for pfn, kind in entries]
        return self.chunk(len(words) if count is None else count, self.longs(*words) + b"".join(contents))

    def vcpu_info(self, vcpus: Iterable[int], last: int | None = None) -> Piece:
        vcpus = list(vcpus)
        last = max(vcpus) if last is None else last
        words = [0] * (last // 64 + 1)
        for vcpu in vcpus:
            words[vcpu // 64] |= 1 << vcpu % 64
        return self.chunk(-2, struct.pack(f"<i{len(words)}Q", last, *words))

    def tsc(self, mode: int = 0, khz: int = 2_400_000, nsec: int = 10**9, incarnation: int = 1) -> Piece:
        return self.chunk(-7, struct.pack("<IQII", mode, nsec, khz, incarnation))

    def param(self, kind: int, value: int) -> Piece:
        return self.chunk(kind, struct.pack("<IQ", 0, value))

    def compressed(self, data: bytes, size: int | None = None) -> Piece:
        return self.chunk(-12, self.longs(len(data) if size is None else size) + data)

    def toolstack(self, regions: Mapping[int, tuple[int, int, bytes]], *, version: int = 1) -> Piece:
        """A physmap: start, size and name by offset."""
        body = struct.pack("<II", version, len(regions))
        for offset, (start, size, name) in regions.items():
            body += struct.pack("<QQQI", offset, start, size, len(name) + 1) + name + b"\0" + bytes(self.long // 2 & 4)
        return self.chunk(-18, struct.pack("<I", len(body)) + body)

    def end(self) -> Piece:
        return self.chunk(0)

    # --- tail --------------------------------------------------------------------------------------------------------

    def unmapped(self, pfns: Sequence[int] = ()) -> Piece:
        return Piece("unmapped", struct.pack("<I", len(pfns)) + self.longs(*pfns))

    def hvm_context(self, data: bytes, pfns: tuple[int, int, int] = (0xFEFFD, 0xFEFFB, 0xFEFFC)) -> Piece:
        return Piece("hvm context", struct.pack("<QQQI", *pfns, len(data)) + data)

    def qemu(self, state: bytes, signature: bytes = QEMU) -> Piece:
        size = b"" if signature == QEMU_OLD else struct.pack("<I", len(state))
        return Piece("qemu", signature + size + state)


def pv_head(domain: Domain, wire: Legacy) -> list[Piece]:
    blocks = [(b"vcpu", domain.vcpus[0].tobytes())]
    if domain.extended:
        blocks.append((b"extv", b""))
    if domain.xsave:
        blocks.append((b"xcnt", struct.pack("<I", len(next(iter(domain.xsave.values()))) + 16)))
    frames = wire.p2m_frames(np.asarray(domain.p2m_pfns).tolist())
    return [wire.header(domain.entries), wire.extended(*blocks), frames]


def pv_pages(domain: Domain, wire: Legacy, batch: int, pfns: Sequence[int] | None = None) -> list[Piece]:
    """Pages as the saver sends them: what has no frame comes as 0xf0000000, without its pfn."""
    pfns = sorted(domain.types) if pfns is None else pfns
    out = []
    for first in range(0, len(pfns), batch):
        some = [(pfn, domain.types[pfn]) for pfn in pfns[first : first + batch]]
        some[2:2] = [(0, XTAB), (0, XTAB)]
        out.append(wire.pages(some, [bytes(domain.pages[pfn]) for pfn, kind in some if kind in WITH_DATA]))
    return out


def pv_tail(domain: Domain, wire: Legacy) -> list[Piece]:
    unmapped = [pfn for pfn in range(domain.entries) if pfn not in domain.types]
    out = [wire.unmapped(unmapped[:100])]
    for vcpu, context in domain.vcpus.items():
        data = context.tobytes()
        if domain.extended:
            data += domain.extended[vcpu].ljust(128, b"\0")
        if domain.xsave:
            area = domain.xsave[vcpu]
            data += struct.pack("<QQ", 7, len(area)) + area
        out.append(Piece("vcpu", data))
    shared = bytearray(domain.shared_page)
    at = SHARED_INFO.offset(domain.width, "arch.pfn_to_mfn_frame_list_list")
    shared[at : at + domain.width] = bytes(domain.width)  # as the saver leaves it
    return [*out, Piece("shared info", bytes(shared))]


def pv_stream(domain: Domain, wire: Legacy = Legacy(), *, batch: int = 64) -> Stream:
    """A saved PV domain. Pages without a frame are among the others, as the saver leaves them."""
    body = pv_pages(domain, wire, batch)
    end = [wire.tsc(), wire.vcpu_info(domain.vcpus), wire.chunk(LAST_CHECKPOINT), wire.end()]
    return Stream([*pv_head(domain, wire), *body, *end, *pv_tail(domain, wire)])


def remus_stream(
    domain: Domain, rounds: Sequence[Sequence[Piece]], wire: Legacy = Legacy(), *, batch: int = 64
) -> Stream:
    """A PV domain under Remus with compression: its first body and tail, then rounds of pages each with a tail."""
    head = [*pv_head(domain, wire), *pv_pages(domain, wire, batch)]
    info = [wire.vcpu_info(domain.vcpus)]
    stream = Stream([*head, wire.tsc(), *info, wire.chunk(ENABLE_COMPRESSION), wire.end(), *pv_tail(domain, wire)])
    for pieces in rounds:
        stream += [*pieces, *info, wire.end(), *pv_tail(domain, wire)]
    return stream


def hvm_stream(wire: Legacy = Legacy(), *, pages: int = 16, toolstack: bool = True, qemu: bool = True) -> Stream:
    """A saved HVM domain with ``pages`` pages from pfn 0 on, the last of them without content."""
    entries = [(pfn, XALLOC if pfn == pages - 1 else NOTAB) for pfn in range(pages)]
    body = [wire.pages(entries, [bytes(pattern(pfn)) for pfn, kind in entries if kind == NOTAB])]
    params = [wire.param(-3, 0xFEFFF000), wire.param(-4, 0xFEFFE000), wire.param(-8, 0xFEFFF), wire.param(-10, 1)]
    regions = {0xF0000000: (0xF0000000, 0x800000, b"vga.vram"), 0x40: (0xC0000, 0x20000, b"rom")}
    records = struct.pack("<HHI", 1, 0, 28) + bytes(28) + struct.pack("<HHI", 0, 0, 0)
    return Stream(
        [
            wire.header(pages),
            *body,
            wire.tsc(),
            wire.vcpu_info([0]),
            *params,
            *([wire.toolstack(regions)] if toolstack else []),
            wire.chunk(LAST_CHECKPOINT),
            wire.end(),
            wire.hvm_context(records),
            *([wire.qemu(b"QEVM" + bytes(60))] if qemu else []),
        ]
    )


def in_xl(stream: Stream, config: bytes | None = None) -> Stream:
    """The stream in a file of xl's, as that of Xen 4.5 wrote it: the flag of the second format is not set."""
    config = config_json() + b"\0" if config is None else config
    data = struct.pack("<I", len(config)) + config
    head = b"Xen saved domain, xl format\n \0 \r" + b"\4\3\2\1" + struct.pack("<III", 1, 0, len(data)) + data
    return Stream([Piece("xl header", head), *stream])


def delta(old: bytes, new: bytes) -> bytes:
    """A page as what has changed in it, in runs of words."""
    a, b = (np.frombuffer(page, "<u4") for page in (old, new))
    changed = a != b
    if not changed.any():
        return b"\0"
    edges = np.flatnonzero(np.append(True, changed[1:] != changed[:-1]))
    out = b""
    for first, last in zip(edges, [*edges[1:], PAGE // 4], strict=True):
        for at in range(first, last, 127):
            count = min(127, last - at)
            out += bytes([count]) + b[at : at + count].tobytes() if changed[first] else bytes([0x80 | count])
    return out


def whole(page: bytes) -> bytes:
    """A page that was not sent before."""
    return b"\x80" + page
