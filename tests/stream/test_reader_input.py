"""However the bytes arrive, the same is read: whole, byte by byte, in pieces, with something behind, by seeking."""

from __future__ import annotations

from functools import cache

import pytest

from tests.support.stream_reading import one_chunk, random_chunks, read, read_seeking, single_bytes, split_at
from tests.support.writers.build import pv_domain
from tests.support.writers.envelopes import ENVELOPES
from tests.support.writers.hvm import hvm_stream
from tests.support.writers.stream import WITH_DATA, Stream, Wire
from xenpv.errors import Truncated, Unsupported
from xenpv.stream.envelope import Kind
from xenpv.stream.events import PageContent
from xenpv.stream.page_data import PageData
from xenpv.stream.reader import Reader

KINDS = [*ENVELOPES, "v2", "pae", "hvm", "hvm-xenopsd", "remus", "optional"]


@cache
def stream_of(kind: str) -> Stream:
    """A small whole stream of each kind."""
    match kind:
        case "v2":
            return pv_domain(pfns=range(36)).to_stream("xl", version=2, batch=16)
        case "pae":
            return pv_domain(width=4, pfns=range(36), vcpus=2).to_stream("libxl", batch=16)
        case "hvm":
            return hvm_stream("xl")
        case "hvm-xenopsd":
            return hvm_stream("xenopsd")
        case "remus":
            return pv_domain(pfns=range(36)).to_checkpointed(batch=16)
        case "optional":
            wire = Wire()
            stream = pv_domain(pfns=range(36)).to_stream("xl", batch=16)
            stream.before("X86_TSC_INFO", wire.record(0x8000_0013, b"what a later Xen may say"))
            return stream.before("libxl END", wire.libxl_record(0x8000_0006, b"and libxl"))
    return pv_domain(pfns=range(36)).to_stream(kind, batch=16)


@cache
def bytes_of(kind: str) -> bytes:
    return bytes(stream_of(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_reader_fed_in_any_pieces_gives_the_same_events(kind: str) -> None:
    data = bytes_of(kind)
    expected = read(one_chunk(data))
    assert expected.error is None
    assert expected.done
    assert expected.trailing == 0
    named = [piece.name for piece in stream_of(kind) if not piece.name.startswith(("xl", "libvirt", "xenopsd"))]
    assert [name for name in expected.names if not name.endswith(("envelope", "section"))] == named
    assert read(single_bytes(data)).comparable == expected.comparable
    for seed in range(3):
        assert read(random_chunks(data, seed)).comparable == expected.comparable


@pytest.mark.parametrize("kind", KINDS)
def test_reader_pieces_cut_near_records_give_the_same_events(kind: str) -> None:
    stream, data = stream_of(kind), bytes_of(kind)
    expected = read(one_chunk(data)).comparable
    begins = [stream.offset_of(i) for i in range(1, len(stream))]
    for shift in (-1, 0, 1, 7, 8, 9):
        assert read(split_at(data, [begin + shift for begin in begins])).comparable == expected


@pytest.mark.parametrize("kind", ["xl", "pae", "hvm-xenopsd", "remus"])
def test_reader_with_pages_gives_content_beside_the_same_events(kind: str) -> None:
    data = bytes_of(kind)
    expected = read(one_chunk(data), pages=True)
    assert [e for e in expected.comparable if e[0] != "PageContent"] == read(one_chunk(data)).comparable
    assert read(single_bytes(data), pages=True).comparable == expected.comparable
    for seed in range(3):
        assert read(random_chunks(data, seed), pages=True).comparable == expected.comparable
    for event in expected.events:
        if isinstance(event, PageContent):
            assert data[event.offset : event.offset + len(event.raw)] == event.raw


def test_reader_with_pages_gives_256_pages_an_event() -> None:
    domain = pv_domain(pfns=range(1200))
    reading = read(one_chunk(domain.to_bytes(batch=1024)), pages=True)
    sent = [pfn for pfn in sorted(domain.types) if domain.types[pfn] in WITH_DATA]
    assert reading.content == b"".join(domain.pages[pfn] for pfn in sent)
    events = [event for event in reading.events if isinstance(event, PageContent)]
    assert [event.data.shape for event in events] == [(256, 4096)] * 4 + [(1200 - 1024, 4096)]
    assert [event.first for event in events] == [0, 256, 512, 768, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_reader_seeking_caller_gets_the_same_events_without_page_content(kind: str) -> None:
    data = bytes_of(kind)
    expected = read(one_chunk(data))
    for step in (1, 24, 1000, 1 << 20):
        reading = read_seeking(data, step=step)
        assert reading.comparable == expected.comparable
        assert reading.error is None
    pages = sum(e.pages * 4096 for e in expected.events if isinstance(e, PageData))
    assert read_seeking(data, step=1).skipped >= pages


def test_reader_skip_beyond_skippable_raises_value_error() -> None:
    data = bytes_of("libxc")
    reader = Reader()
    reader.feed(data[:2000])
    while reader.next_event() is not None:
        pass
    assert reader.skippable > 0
    with pytest.raises(ValueError, match="cannot skip"):
        reader.skip(reader.skippable + 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("junk", [b"\0", b"\xff" * 3, b"\0" * 4096, b"Xen saved domain, xl format\n \0 \r"])
def test_reader_bytes_after_the_stream_are_trailing(kind: str, junk: bytes) -> None:
    data = bytes_of(kind)
    expected = read(one_chunk(data)).comparable
    for chunks in ([data, junk], [data + junk], [data[:-3], data[-3:] + junk[:1], junk[1:]]):
        reading = read(chunks)
        assert reading.comparable == expected
        assert reading.done
        assert reading.trailing == len(junk)


def assert_truncated(stream: Stream, data: bytes, end: int) -> None:
    reading = read(one_chunk(data[:end]))
    assert type(reading.error) is Truncated
    assert not reading.done
    assert f"at {end:#x}" in reading.error.reason
    begins = [stream.offset_of(i) for i in range(len(stream))]
    assert reading.error.offset == max(begin for begin in begins if begin <= end)
    assert reading.error.record


def test_reader_stream_cut_at_any_byte_is_truncated_there() -> None:
    stream = hvm_stream("xl", pages=2)
    data = bytes(stream)
    for end in range(1, len(data)):
        assert_truncated(stream, data, end)


@pytest.mark.parametrize("kind", KINDS)
def test_reader_stream_cut_near_a_record_is_truncated_there(kind: str) -> None:
    stream, data = stream_of(kind), bytes_of(kind)
    ends = {stream.offset_of(i) + n for i in range(len(stream)) for n in (0, 1, 4, 7, 8, 9, 15, 16, 23, 24, 40)}
    for end in {*ends, *range(1, len(data), 4099)} - {0}:
        if end < len(data):
            assert_truncated(stream, data, end)


def test_reader_truncated_only_after_feed_eof() -> None:
    data = bytes_of("xl")
    reader = Reader()
    reader.feed(data[:100])
    assert reader.next_event() is None
    assert reader.needed > 0
    reader.feed_eof()
    with pytest.raises(Truncated) as first:
        reader.next_event()
    with pytest.raises(Truncated) as again:
        reader.next_event()
    assert again.value is first.value


@pytest.mark.parametrize("chunk", [1, 1000])
def test_reader_fed_exactly_what_is_needed_reads_all(chunk: int) -> None:
    """Feeding exactly what is needed reads the whole stream, and never one byte beyond it."""
    data = bytes_of("xl")
    reader, position, plain = Reader(pages=True), 0, 0
    while not reader.done:
        if reader.next_event() is not None:
            plain += 1
        elif not reader.done:
            assert 0 < reader.needed <= len(data) - position
            n = min(chunk, reader.needed)
            reader.feed(data[position : position + n])
            position += n
    assert position == len(data)
    assert plain == len(read(one_chunk(data), pages=True).events)


def test_reader_feed_copies_mutable_buffers() -> None:
    data = bytes_of("xl")
    expected = read(one_chunk(data), pages=True).comparable
    buffer = bytearray(data)
    assert read([memoryview(buffer)], pages=True).comparable == expected  # type: ignore[list-item]
    reader = Reader()
    reader.feed(buffer)
    buffer[:] = bytes(len(buffer))  # the caller's buffer is its own again
    first = reader.next_event()
    assert first is not None
    assert first.name == "xl envelope"


def test_reader_given_kind_is_not_detected() -> None:
    assert read(one_chunk(bytes_of("libxc")), kind=Kind.LIBXC).done
    assert isinstance(read(one_chunk(bytes_of("libxl")), kind=Kind.LIBXC).error, Exception)
    assert isinstance(read(one_chunk(b"nonsense" * 8)).error, Unsupported)
