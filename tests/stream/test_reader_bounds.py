"""Lengths and counts that lie: a clear error, at once, and no memory taken for what never comes."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterable

import numpy as np
import pytest

from tests.support.memory_limit import peak_memory_below
from tests.support.stream_reading import Reading, read
from tests.support.writers.build import pv_domain
from tests.support.writers.envelopes import XENOPS, libvirt_header, xenopsd_section, xenopsd_signature, xl_header
from tests.support.writers.stream import NOTAB, PAGE, RECORDS, Piece, Stream, Wire
from xenpv.errors import Malformed, Truncated
from xenpv.stream.contents import Contents
from xenpv.stream.envelope import CONFIG_MAX
from xenpv.stream.reader import Reader

W = Wire()
MIB = 1 << 20
U32 = (1 << 32) - 1


def up_to(name: str, *then: Piece) -> bytes:
    """A sound libxc stream up to a record, and something else from there on."""
    stream = pv_domain(pfns=range(36)).to_stream("libxc")
    return bytes(Stream([*stream[: stream.find(name)], *then]))


def lying(name: str, body: bytes, length: int) -> Piece:
    return W.record(RECORDS.index(name), body, length=length)


@pytest.mark.parametrize("name", RECORDS)
def test_reader_record_beyond_128_mib_is_malformed_at_once(name: str) -> None:
    for length in (128 * MIB + 1, U32):
        data = up_to(name if name in "X86_PV_INFO PAGE_DATA SHARED_INFO END" else "END", lying(name, b"", length))
        with peak_memory_below(MIB):
            reading = read([data], collect=True)
        assert type(reading.error) is Malformed
        assert f"{length:#x}" in str(reading.error)
        assert reading.error.record == name


@pytest.mark.parametrize("name", [name for name in RECORDS if name not in {"PAGE_DATA", "X86_PV_P2M_FRAMES"}])
def test_reader_impossible_record_length_is_malformed_before_the_body(name: str) -> None:
    """Those with a fixed or bounded size; the others hold what really came, and no more."""
    data = up_to("END", lying(name, bytes(PAGE), 100 * MIB))
    with peak_memory_below(MIB):
        reading = read([data])
    assert isinstance(reading.error, Malformed | Truncated) or type(reading.error).__name__ == "OutOfOrder"


@pytest.mark.parametrize("count", [2, 1024, 1 << 24, U32])
@pytest.mark.parametrize("collect", [False, True])
def test_reader_page_data_count_beyond_length_is_malformed(count: int, collect: bool) -> None:
    data = up_to("PAGE_DATA", W.page_data([(1, NOTAB)], [], count=count), *pv_domain().to_stream("libxc")[-3:])
    with peak_memory_below(MIB):
        reading = read([data], collect=collect)
    told = str(reading.error) if not collect else reading.breaches[0].message
    assert str(count) in told


def test_reader_truncated_page_data_of_16_million_pfns_takes_bounded_memory() -> None:
    """128 MiB of pfns are promised within the bounds of the format, some come: what is held is what came."""
    count = 128 * MIB // 8 - 1
    data = up_to("PAGE_DATA", lying("PAGE_DATA", struct.pack("<II", count, 0) + bytes(PAGE), 8 + 8 * count))
    with peak_memory_below(MIB):
        reading = read([data])
    assert type(reading.error) is Truncated


@pytest.mark.parametrize(("start", "end"), [(0, U32), (U32, U32), (U32 - 1, U32), (0, 1 << 31), (U32, 0)])
@pytest.mark.parametrize("collect", [False, True])
def test_reader_p2m_frames_of_huge_range_with_short_body_is_malformed(start: int, end: int, collect: bool) -> None:
    data = up_to("X86_PV_P2M_FRAMES", W.p2m_frames(start, end, [1, 2, 3]), W.end())
    with peak_memory_below(MIB):
        reading = read([data], collect=collect)
    told = str(reading.error) if not collect else reading.breaches[0].message
    assert f"{start:#x}" in told
    assert f"{end:#x}" in told


def test_reader_p2m_frames_of_largest_pfns_is_read() -> None:
    """Not a lie for the reader: the frame of the last pfn that the format can name."""
    with peak_memory_below(MIB):
        reading = read([up_to("X86_PV_P2M_FRAMES", W.p2m_frames(U32, U32, [7]), W.end())], collect=True)
    assert reading.names[-2:] == ["X86_PV_P2M_FRAMES", "END"]


def test_reader_hvm_params_count_beyond_length_is_malformed() -> None:
    piece = W.hvm_params({1: 2}, count=U32)
    head = Stream([W.image_header(), W.domain_header(2), W.static_data_end()])
    with peak_memory_below(MIB):
        reading = read([bytes(head) + piece.data])
    assert type(reading.error) is Malformed
    assert str(U32) in str(reading.error)


ENVELOPES: dict[str, Callable[[int], bytes]] = {
    "xl": lambda n: xl_header(length=n).data,
    "libvirt": lambda n: libvirt_header(length=n).data,
    "xenopsd": lambda n: xenopsd_signature().data + xenopsd_section(XENOPS, length=n).data,
}


@pytest.mark.parametrize("kind", ENVELOPES)
@pytest.mark.parametrize("length", [16 * MIB + 1, 1 << 31, U32])
def test_reader_config_beyond_maximum_takes_bounded_memory(kind: str, length: int) -> None:
    with peak_memory_below(MIB):
        reading = read([ENVELOPES[kind](length)])
    assert type(reading.error) is Malformed
    assert f"{length:#x}" in reading.error.reason


@pytest.mark.parametrize("kind", ENVELOPES)
def test_reader_missing_config_takes_bounded_memory(kind: str) -> None:
    with peak_memory_below(MIB):
        reading = read([ENVELOPES[kind](CONFIG_MAX), bytes(PAGE)])
    assert type(reading.error) is Truncated


def test_reader_xenopsd_section_of_any_length_is_skipped() -> None:
    data = (
        pv_domain().to_stream("xenopsd").before("xenopsd section", xenopsd_section(0x0F00, length=(1 << 64) - 1), nth=1)
    )
    with peak_memory_below(MIB):
        reading = read([bytes(data)])
    assert type(reading.error) is Truncated


def repeated(chunk: bytes, n: int) -> Iterable[bytes]:
    return (chunk for _ in range(n))


def test_reader_page_content_takes_no_memory() -> None:
    """64 MiB of pages go by, in chunks as a pipe gives them: without PageContent events nothing of them is kept."""
    pfns = np.arange(16384, dtype=np.uint64)
    head = struct.pack("<IIII", 1, 8 + len(pfns) * (8 + PAGE), len(pfns), 0) + pfns.tobytes()
    start = up_to("X86_PV_P2M_FRAMES", W.p2m_frames(0, 16383, list(range(32))))
    with peak_memory_below(2 * MIB):
        reading = read([start, head, *repeated(bytes(1 << 16), 1024)], collect=True, eof=False)
    assert reading.names[-1] == "PAGE_DATA"
    assert reading.breaches == []


def test_reader_with_pages_holds_one_event() -> None:
    pfns = np.arange(16384, dtype=np.uint64)
    head = struct.pack("<IIII", 1, 8 + len(pfns) * (8 + PAGE), len(pfns), 0) + pfns.tobytes()
    reader = Reader(pages=True)
    seen = 0
    with peak_memory_below(6 * MIB):
        for chunk in [up_to("X86_PV_P2M_FRAMES", W.p2m_frames(0, 16383, list(range(32)))), head]:
            reader.feed(chunk)
        for chunk in repeated(bytes(1 << 16), 1024):
            reader.feed(chunk)
            while (event := reader.next_event()) is not None:
                seen += event.name == "pages"
    assert seen == 64


def test_reader_long_record_in_small_pieces_takes_its_size() -> None:
    """A slow pipe may give a few bytes at a time; what is kept for each must not add up."""
    data = W.hvm_context(bytes(MIB // 4)).data
    start = bytes(Stream([W.image_header(), W.domain_header(2), W.static_data_end()]))
    start += W.page_data([(1, NOTAB)], [bytes(PAGE)]).data + W.hvm_params({1: 2}).data
    with peak_memory_below(5 * MIB // 4):
        reading = read(itertools.chain([start], (data[i : i + 3] for i in range(0, len(data), 3))), eof=False)
    assert reading.names[-1] == "HVM_CONTEXT"


def contents_of(reading: Reading) -> Contents:
    contents = Contents()
    for event in reading.events:
        contents.add(event)
    return contents


def test_contents_memory_is_bounded_by_the_stream() -> None:
    """A P2M_FRAMES record for the last pfns only does not make a table of all the others."""
    reading = read([up_to("X86_PV_P2M_FRAMES", W.p2m_frames(U32 - 511, U32, [7]), W.end())], collect=True)
    with peak_memory_below(80 * MIB):
        contents = contents_of(reading)
    assert contents.end_pfn == U32
