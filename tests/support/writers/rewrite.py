"""A real save file of today written again as Xen's tools wrote it before: as version 1, and as version 2."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from tests.support.writers import legacy
from tests.support.writers.legacy import Legacy
from tests.support.writers.stream import Piece, Stream
from xenpv.abi.xen import SHARED_INFO
from xenpv.frames import HAS_DATA
from xenpv.source.saved import SavedDomain

BATCH = 1024
STATIC_DATA_END, CPUID_POLICY, MSR_POLICY = 0x10, 0x11, 0x12
IMAGE = b"\xff" * 8 + b"XENF"


def as_v1(path: Path, wire: Legacy) -> Stream:
    """In xl's envelope. What that format has no place for (MSRs, CPU policies) is left out."""
    with SavedDomain.open(str(path)) as saved:
        contents = saved.contents
        assert contents.envelope is not None
        vcpus = contents.vcpus
        basics = [vcpu.basic for vcpu in vcpus.values() if vcpu.basic is not None]
        blocks = [(b"vcpu", basics[0].context), (b"extv", b"")]
        areas = {n: vcpu.xsave.context for n, vcpu in vcpus.items() if vcpu.xsave is not None}
        if areas:
            blocks.append((b"xcnt", struct.pack("<I", len(areas[0]) + 16)))
        stream = Stream([wire.header(contents.end_pfn + 1), wire.extended(*blocks)])
        stream += [wire.p2m_frames(contents.p2m_frames.tolist()), *_pages(saved, wire)]
        assert contents.tsc is not None
        tsc = contents.tsc
        stream.append(wire.tsc(tsc.mode, tsc.khz, tsc.nsec, tsc.incarnation))
        stream += [wire.vcpu_info(vcpus), wire.chunk(legacy.LAST_CHECKPOINT), wire.end(), wire.unmapped()]
        for number, vcpu in sorted(vcpus.items()):
            assert vcpu.basic is not None
            extended = b"" if vcpu.extended is None else vcpu.extended.context
            data = vcpu.basic.context + extended.ljust(128, b"\0")
            if areas:
                data += struct.pack("<QQ", 7, len(areas[number])) + areas[number]
            stream.append(Piece("vcpu", data))
        shared = bytearray(saved.shared_info() or b"")
        at = SHARED_INFO.offset(saved.width, "arch.pfn_to_mfn_frame_list_list")
        shared[at : at + saved.width] = bytes(saved.width)
        stream.append(Piece("shared info", bytes(shared)))
        return legacy.in_xl(stream, contents.envelope.config)


def _pages(saved: SavedDomain, wire: Legacy) -> Iterator[Piece]:
    pfns = saved.contents.index.extents.pfns
    for first in range(0, len(pfns), BATCH):
        some = pfns[first : first + BATCH]
        types = saved.frames.types(some)
        content = saved.frames.pages(some[HAS_DATA[types]])
        yield wire.pages(zip(some.tolist(), types.tolist(), strict=True), [content.tobytes()])


def as_v2(data: bytes) -> bytes:
    """Without what came with version 3: the end of static data, and CPU policies."""
    at = data.index(IMAGE)
    out = bytearray(data[:at] + data[at : at + 12] + struct.pack(">I", 2) + data[at + 16 : at + 40])
    at += 40
    kind = -1
    while kind:
        kind, length = struct.unpack_from("<II", data, at)
        record = data[at : at + 8 + -(-length // 8) * 8]
        if kind not in {STATIC_DATA_END, CPUID_POLICY, MSR_POLICY}:
            out += record
        at += len(record)
    return bytes(out + data[at:])
