"""The reader of legacy streams: whole, in pieces, cut off, with junk, and with each thing wrong that it looks at."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from tests.support.stream_reading import comparable, one_chunk, random_chunks, single_bytes
from tests.support.writers.build import pv_domain
from tests.support.writers.envelopes import LIBXC_LEGACY, libvirt_header, xenopsd_section, xenopsd_signature
from tests.support.writers.envelopes import XENOPS as XENOPS_SECTION
from tests.support.writers.legacy import (
    ENABLE_COMPRESSION,
    QEMU_OLD,
    QEMU_REMUS,
    UNMAPPED,
    VERIFY,
    Legacy,
    delta,
    hvm_stream,
    in_xl,
    pv_stream,
    remus_stream,
)
from tests.support.writers.legacy import whole as whole_page
from tests.support.writers.stream import NOTAB, PAGE, XALLOC, XTAB, Piece, Stream
from xenpv.abi.declare import Width
from xenpv.errors import Malformed, StreamError, Truncated, Unsupported
from xenpv.stream import records
from xenpv.stream.events import DomainHeader, Event, PageContent, PageDeltas
from xenpv.stream.legacy import LegacyFormat, detect_toolstack
from xenpv.stream.libxl import EmulatorContext, EmulatorXenstoreData
from xenpv.stream.page_data import PageData
from xenpv.stream.reader import Reader
from xenpv.stream.record_order import Guest

LONGS = (8, 4)
DOMAIN = pv_domain(pfns=range(48), vcpus=2)
SMALL = {
    **{f"pv-{n * 8}": pv_stream(DOMAIN, Legacy(n), batch=16) for n in LONGS},
    **{f"pv32-{n * 8}": pv_stream(pv_domain(width=4, pfns=range(48)), Legacy(n), batch=16) for n in LONGS},
    **{f"hvm-{n * 8}": hvm_stream(Legacy(n), pages=6) for n in LONGS},
    "xl": in_xl(pv_stream(DOMAIN, batch=16)),
    "remus": remus_stream(DOMAIN, [[Legacy().pages([(3, NOTAB)], []), Legacy().compressed(whole_page(b"a" * PAGE))]]),
}


@dataclass
class Read:
    events: list[Event]
    error: StreamError | None
    reader: Reader

    @property
    def names(self) -> list[str]:
        return [event.name for event in self.events if not isinstance(event, PageContent)]


def read(chunks: list[bytes], reader: Reader | None = None) -> Read:
    """All of it, with page content."""
    reader = reader or Reader(pages=True, legacy=LegacyFormat())
    out = Read([], None, reader)
    try:
        for chunk in [*chunks, None]:
            reader.feed_eof() if chunk is None else reader.feed(chunk)
            while (event := reader.next_event()) is not None:
                out.events.append(event)
    except StreamError as e:
        out.error = e
    return out


@pytest.mark.parametrize("name", SMALL)
def test_legacy_reader_fed_in_any_pieces_gives_the_same_events(name: str) -> None:
    data = bytes(SMALL[name])
    first = read(one_chunk(data))
    assert first.error is None
    assert first.reader.done
    assert first.reader.offset == len(data)
    for pieces in (
        random_chunks(data, 1),
        random_chunks(data, 2),
        [*single_bytes(data)] if len(data) < 100_000 else [],
    ):
        if pieces:
            assert [comparable(event) for event in read(pieces).events] == [comparable(event) for event in first.events]


@pytest.mark.parametrize("name", [name for name in SMALL if name != "remus"])
def test_legacy_reader_truncated_stream_names_the_offset(name: str) -> None:
    stream = SMALL[name]
    data = bytes(stream)
    edges = {stream.offset_of(i) + n for i in range(1, len(stream)) for n in (-1, 0, 1, 5)}
    for cut in {*(edge for edge in edges if edge >= 16), *random.Random(1).sample(range(40, len(data)), 30)}:
        got = read([data[:cut]])
        assert type(got.error) is Truncated, cut
        assert f"{cut:#x}" in str(got.error)
        assert not got.reader.done


def test_legacy_reader_remus_stream_may_end_after_any_tail() -> None:
    stream = SMALL["remus"]
    first_tail = stream.offset_of(stream.find("shared info") + 1)
    got = read([bytes(stream)[:first_tail]])
    assert got.error is None
    assert got.reader.done
    assert got.names[-1] == "END"
    assert "CHECKPOINT" not in got.names
    assert read([bytes(stream)]).names.count("CHECKPOINT") == 1


@pytest.mark.parametrize("long", LONGS)
@pytest.mark.parametrize("width", [8, 4])
def test_legacy_reader_pv_stream_gives_the_domain(long: int, width: Width) -> None:
    domain = pv_domain(width=width, pfns=range(48), vcpus=2)
    got = read([bytes(pv_stream(domain, Legacy(long), batch=16))])
    assert got.error is None
    header, info, _, frames = got.events[:4]
    assert isinstance(header, DomainHeader)
    assert (header.guest, header.xen_major, header.xen_minor) == (Guest.PV, 0, 1)
    assert isinstance(info, records.X86PVInfo)
    assert (info.guest_width, info.pt_levels) == (width, {8: 4, 4: 3}[width])
    assert isinstance(frames, records.X86PVP2MFrames)
    assert frames.end_pfn == domain.entries - 1
    assert frames.p2m_pfns.tolist() == np.asarray(domain.p2m_pfns).tolist()
    types: dict[int, int] = {}
    contents: dict[int, bytes] = {}
    for event in got.events:
        if isinstance(event, PageData):
            types.update(zip(event.pfns.tolist(), event.types.tolist(), strict=True))
        elif isinstance(event, PageContent):
            named = event.record.pfns[event.record.has_data][event.first :]
            contents.update(zip(named.tolist(), [page.tobytes() for page in event.data], strict=False))
    assert types == domain.types
    assert contents == {pfn: bytes(domain.pages[pfn]) for pfn in contents}
    assert len(contents) == len(domain.pages)
    basics = [event for event in got.events if isinstance(event, records.VcpuBasic)]
    assert {event.vcpu_id: event.context for event in basics} == {n: c.tobytes() for n, c in domain.vcpus.items()}
    assert got.names[-1] == "END"


@pytest.mark.parametrize("long", LONGS)
def test_legacy_reader_hvm_stream_gives_the_domain(long: int) -> None:
    got = read([bytes(hvm_stream(Legacy(long)))])
    assert got.error is None
    params = [event.params for event in got.events if isinstance(event, records.HvmParams)]
    assert params == [{12: 0xFEFFF000, 15: 0xFEFFE000, 17: 0xFEFFF, 19: 1}, {5: 0xFEFFD, 6: 0xFEFFB, 1: 0xFEFFC}]
    (physmap,) = [event for event in got.events if isinstance(event, EmulatorXenstoreData)]
    vga, rom = "physmap/f0000000", "physmap/40"
    assert physmap.pairs == {
        f"{vga}/start_addr": "f0000000",
        f"{vga}/size": "800000",
        f"{vga}/name": "vga.vram",
        f"{rom}/start_addr": "c0000",
        f"{rom}/size": "20000",
        f"{rom}/name": "rom",
    }
    (state,) = [event for event in got.events if isinstance(event, EmulatorContext)]
    assert state.data == b"QEVM" + bytes(60)


@pytest.mark.parametrize("signature", [QEMU_REMUS, QEMU_OLD])
def test_legacy_reader_other_qemu_signatures_are_read(signature: bytes) -> None:
    stream = hvm_stream().replace("qemu", Legacy().qemu(b"QEVM" + bytes(9000), signature))
    for chunks in (one_chunk(bytes(stream)), random_chunks(bytes(stream), 4)):
        got = read(chunks)
        assert got.error is None
        assert isinstance(got.events[-2], EmulatorContext)
        assert got.events[-2].data == b"QEVM" + bytes(9000)


def test_detect_toolstack_by_first_bytes() -> None:
    for long in LONGS:
        assert detect_toolstack(bytes(pv_stream(DOMAIN, Legacy(long)))[:32]) == (long, Guest.PV)
        assert detect_toolstack(bytes(hvm_stream(Legacy(long)))[:32]) == (long, Guest.HVM)
    for other in (b"", bytes(64), b"\x7fELF" + bytes(60), b"#!/bin/sh\necho no domain at all"):
        assert detect_toolstack(other) is None
        assert type(read([other]).error) in {Unsupported, Truncated}
    assert read([bytes(SMALL["pv-64"])], Reader(legacy=LegacyFormat(toolstack=(4, Guest.PV)))).error is not None


def test_legacy_reader_current_streams_give_the_same_events() -> None:
    for envelope in ("xl", "libvirt", "xenopsd", "libxl", "libxc"):
        data = DOMAIN.to_bytes(envelope)
        ours, reader = read([data], Reader(legacy=LegacyFormat())), Reader()
        reader.feed(data)
        reader.feed_eof()
        theirs = [comparable(event) for event in iter(reader.next_event, None)]
        assert [comparable(event) for event in ours.events] == theirs
        assert not ours.reader.is_legacy


def test_legacy_reader_reads_streams_in_libvirt_and_xenopsd_envelopes() -> None:
    inside = bytes(SMALL["pv-64"])
    got = read([libvirt_header(version=1).data + inside])
    assert (got.error, got.names[0], got.names[-1]) == (None, "libvirt envelope", "END")
    hvm = bytes(hvm_stream(qemu=False))
    section = xenopsd_section(LIBXC_LEGACY).data
    head, tail = xenopsd_signature().data + xenopsd_section(XENOPS_SECTION, b"()").data, xenopsd_section(0xFFFF).data
    for stream in (inside, hvm):
        got = read([head + section + stream + tail])
        assert (got.error, got.names[-1]) == (None, "end section")


def test_legacy_reader_verify_chunk_is_ignored() -> None:
    wire = Legacy()
    again = [wire.chunk(VERIFY), wire.pages([(0, NOTAB)], [bytes(PAGE)])]
    got = read([bytes(pv_stream(DOMAIN).before("chunk -7", *again))])
    assert got.error is None
    assert "VERIFY" not in got.names


def test_legacy_reader_without_vcpu_info_reads_one_vcpu() -> None:
    """xc_domain_restore(): vcpumap[0] = 1."""
    one = pv_domain(pfns=range(36), vcpus=1)
    got = read([bytes(pv_stream(one).drop("chunk -2"))])
    assert got.error is None
    assert got.names.count("X86_PV_VCPU_BASIC") == 1


def test_legacy_reader_vcpus_beyond_the_last_are_ignored() -> None:
    """xc_domain_restore() counts up to max_vcpu_id, whatever the map has above it."""
    stream = pv_stream(DOMAIN).replace("chunk -2", Legacy().chunk(-2, struct.pack("<iQ", 1, 0xFF)))
    got = read([bytes(stream)])
    assert got.error is None
    assert [event.vcpu_id for event in got.events if isinstance(event, records.VcpuBasic)] == [0, 1]


def test_legacy_reader_batch_of_unmapped_pfns_gives_no_record() -> None:
    """Xen's own converter makes a PAGE_DATA without pfns of it, which no restorer takes."""
    wire = Legacy()
    got = read([bytes(pv_stream(DOMAIN).before("chunk -7", wire.chunk(2, wire.longs(UNMAPPED, UNMAPPED))))])
    assert got.error is None
    assert all(len(event.raw) for event in got.events if isinstance(event, PageData))


# --- compressed pages ------------------------------------------------------------------------------------------------


def deltas(*pieces: Piece) -> Read:
    return read([bytes(remus_stream(DOMAIN, [pieces]))])


def test_legacy_reader_compressed_pages_come_with_their_pfns() -> None:
    wire, a, b = Legacy(), b"a" * PAGE, b"b" * PAGE
    data = whole_page(a) + delta(a, b"x" * 8 + a[8:])
    got = deltas(
        wire.pages([(3, NOTAB), (4, 0xE)], []),
        wire.pages([(5, NOTAB)], []),
        wire.compressed(data[:5000]),  # a page may go on in the next chunk
        wire.pages([(6, NOTAB)], []),
        wire.compressed(data[5000:] + whole_page(b)),
    )
    assert got.error is None
    found = [event for event in got.events if isinstance(event, PageDeltas)]
    entries = [np.frombuffer(event.raw, "<u8") & np.uint64(0xFFFF) for event in found]
    assert [pfns.tolist() for pfns in entries] == [[3, 4, 5], [6]] or sum(map(len, entries)) == 4
    assert b"".join(event.data for event in found) == data + whole_page(b)


@dataclass(frozen=True)
class Malformation:
    """A change to a sound stream, and the error that it must give: rule, record, and a number in the message."""

    id: str
    change: Callable[[Stream], object]
    record: str
    number: str = ""
    rule: str = "legacy"
    base: str = "pv-64"


def _pages(longs: list[int], count: int | None = None, long: int = 8) -> Piece:
    return Legacy(long).chunk(len(longs) if count is None else count, Legacy(long).longs(*longs))


def _insert(piece: Piece) -> Callable[[Stream], object]:
    return lambda stream: stream.before("chunk -7", piece)


def _replace(name: str, piece: Piece) -> Callable[[Stream], object]:
    return lambda stream: stream.replace(name, piece)


def _info(*blocks: tuple[bytes, bytes], length: int | None = None) -> Callable[[Stream], object]:
    return _replace("extended info", W.extended(*blocks, length=length))


W = Legacy()
CONTEXT = DOMAIN.vcpus[0].tobytes()
INFO, TOOLSTACK, COMPRESSED = "legacy extended info", "legacy chunk -18", "legacy chunk -12"
BAD_PHYSMAP_NAME = struct.pack("<IIIQQQI4s4x", 44, 1, 1, 0, 0, 0, 4, b"abcd")
MALFORMATIONS = [
    Malformation("extended-info-unknown-block", _info((b"what", b"")), INFO, "b'what'"),
    Malformation("extended-info-vcpu-size", _info((b"vcpu", bytes(99))), INFO, "99"),
    Malformation("extended-info-no-vcpu", _info((b"extv", b"")), INFO),
    Malformation("extended-info-too-short", _info((b"vcpu", CONTEXT), length=99), INFO, "99"),
    Malformation("extended-info-xsave-1-gib", _info((b"xcnt", struct.pack("<I", 1 << 30))), INFO, str(1 << 30)),
    Malformation("batch-of-1025", _insert(_pages([1], 1025)), "legacy chunk 1025", "1025"),
    Malformation("chunk-unknown", _insert(W.chunk(-21)), "legacy chunk -21", "-21"),
    Malformation("pfn-repeated", _insert(_pages([1 | 0xE << 28, 1 | 0xE << 28])), "legacy chunk 2"),
    Malformation("pfn-of-41-bits", _insert(_pages([1 | 0xE << 28 | 1 << 40])), "legacy chunk 1", "0x100e0000001"),
    Malformation("page-type-unknown", _insert(W.pages([(1, 5)], [bytes(PAGE)])), "legacy chunk 1", "0x5", "page-type"),
    Malformation("pfn-beyond-p2m", _insert(W.pages([(1 << 20, 0xE)], [])), "legacy chunk 1", "0x100000", "pfn-range"),
    Malformation("vcpus-4097", _replace("chunk -2", W.chunk(-2, struct.pack("<i", 4096))), "legacy chunk -2", "4096"),
    Malformation("vcpus-minus-1", _replace("chunk -2", W.chunk(-2, struct.pack("<i", -2))), "legacy chunk -2", "-2"),
    Malformation(
        "unmapped-pfns-2-tib", _replace("unmapped", Piece("unmapped", struct.pack("<I", (1 << 28) + 1))),
        "legacy unmapped pfns", str((1 << 28) + 1),
    ),
    Malformation("hvm-param-in-pv", _insert(W.param(-3, 1)), "legacy chunk -3"),
    Malformation("toolstack-2-gib", _insert(W.chunk(-18, struct.pack("<I", 1 << 31))), TOOLSTACK, "0x80000000"),
    Malformation("toolstack-version-2", _insert(W.toolstack({}, version=2)), TOOLSTACK, "2"),
    Malformation("toolstack-truncated", _insert(W.chunk(-18, struct.pack("<III", 8, 1, 9))), TOOLSTACK),
    Malformation("toolstack-of-7-bytes", _insert(W.chunk(-18, struct.pack("<I7x", 7))), TOOLSTACK, "7"),
    Malformation("physmap-name-unterminated", _insert(W.chunk(-18, BAD_PHYSMAP_NAME)), TOOLSTACK),
    Malformation("compressed-without-pfns", _insert(W.compressed(b"\0")), COMPRESSED, "1"),
    Malformation("compressed-1-tib", _insert(W.compressed(b"", 1 << 40)), COMPRESSED, "0x10000000000"),
    Malformation(
        "hvm-context-empty", _replace("hvm context", W.hvm_context(b"")), "legacy HVM context", "0x0", base="hvm-64"
    ),
    Malformation("qemu-signature", _replace("qemu", W.qemu(b"", b"?" * 21)), "legacy qemu record", base="hvm-64"),
    Malformation(
        "qemu-4-gib", _replace("qemu", Piece("qemu", b"DeviceModelRecord0002" + b"\xff" * 4)),
        "legacy qemu record", "0xffffffff", base="hvm-64",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", MALFORMATIONS, ids=lambda case: case.id)
def test_legacy_reader_malformed_stream_raises_with_rule_record_and_number(case: Malformation) -> None:
    stream = Stream(SMALL[case.base])
    case.change(stream)
    got = read([bytes(stream)])
    assert type(got.error) is Malformed
    assert (got.error.rule, got.error.record) == (case.rule, case.record)
    assert case.number in got.error.reason
    assert not got.reader.done


def test_legacy_reader_p2m_of_2_tib_is_no_legacy_stream() -> None:
    stream = Stream(SMALL["pv-64"]).replace("p2m_size", W.header(1 << 29))
    assert type(read([bytes(stream)]).error) is Unsupported


def test_legacy_reader_transcendent_memory_is_unsupported() -> None:
    got = read([bytes(Stream(SMALL["pv-64"]).before("chunk -7", W.chunk(-5)))])
    assert type(got.error) is Unsupported
    assert got.error.record == "legacy chunk -5"


def test_legacy_reader_compressed_pfns_without_content_give_page_data() -> None:
    got = deltas(
        W.pages([(3, NOTAB)], []), W.compressed(whole_page(bytes(PAGE))), W.pages([(7, XTAB), (9, XALLOC)], [])
    )
    assert got.error is None
    last = [event for event in got.events if isinstance(event, PageData)][-1]
    assert (last.pfns.tolist(), last.types.tolist(), last.pages) == ([7, 9], [XTAB, XALLOC], 0)


def test_legacy_reader_many_compressed_pages_come_in_batches() -> None:
    named = [W.pages([(pfn, NOTAB) for pfn in range(48)], [])] * 100
    got = deltas(*named, W.compressed(bytes(4800)))
    found = [event for event in got.events if isinstance(event, PageDeltas)]
    assert [len(event.ends) for event in found] == [1024] * 4 + [704]
    assert [len(event.raw) for event in found] == [8 * 1024] * 4 + [8 * 704]
    got = deltas(*[W.pages([(pfn, NOTAB) for pfn in range(48)], [])] * 1400)
    assert type(got.error) is Malformed
    assert (got.error.rule, got.error.record) == ("legacy", "legacy chunk 48")
    assert str(1 << 16) in got.error.reason


def test_legacy_reader_missing_compressed_content_is_malformed() -> None:
    got = deltas(W.pages([(3, NOTAB), (4, NOTAB)], []), W.compressed(whole_page(bytes(PAGE))))
    assert type(got.error) is Malformed
    assert (got.error.rule, got.error.record) == ("legacy", "legacy chunk 0")
    got = deltas(W.pages([(3, NOTAB)], []), W.compressed(b"\x81" + b"\x00" + bytes(64)))
    assert type(got.error) is Malformed
    assert (got.error.rule, got.error.record) == ("legacy", "legacy chunk -12")
    assert "0x4" in got.error.reason


def test_legacy_reader_compression_begins_with_the_next_body() -> None:
    """The chunk that enables it comes in a body whose pages are as ever."""
    stream = pv_stream(DOMAIN, batch=16)
    stream.before("pages", W.chunk(ENABLE_COMPRESSION))
    assert read([bytes(stream)]).error is None


def test_legacy_reader_random_changes_raise_only_stream_errors() -> None:
    rng = random.Random(7)
    for name, stream in SMALL.items():
        data = bytearray(bytes(stream))
        head = min(len(data), stream.offset_of(4))
        for _ in range(40):
            broken = bytearray(data)
            for _ in range(rng.choice((1, 3, 20))):
                broken[rng.randrange(head) if rng.random() < 0.7 else rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            got = read([bytes(broken)])
            assert got.error is None or "\n" not in str(got.error), name
