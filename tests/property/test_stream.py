"""What the two specifications say in words, for any values. The docstrings quote them.

libxc-migration-stream.pandoc unless another is named.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.support.stream_reading import Reading, comparable, one_chunk, read, split_at
from tests.support.stream_strategies import (
    LAST_PFN,
    U32,
    bodies,
    collected,
    hvm,
    known_types,
    mandatory,
    optional,
    raised,
    sound,
    u32s,
    u64s,
    unknown_types,
    widths,
)
from tests.support.writers.stream import BROKEN, PAGE, WITH_DATA, XALLOC, XTAB, Piece, Stream, Wire
from xenpv.errors import Malformed, Truncated, Unsupported
from xenpv.stream import framing, libxl, records, rules
from xenpv.stream.envelope import Kind
from xenpv.stream.page_data import PageData

W, BIG = Wire(), Wire(big_endian=True)
entries = st.lists(st.tuples(st.integers(0, LAST_PFN), known_types), min_size=1, max_size=12)


def page_data_of(reading: Reading) -> PageData:
    (record,) = [event for event in reading.events if isinstance(event, PageData)]
    return record


def values(reading: Reading) -> list[Any]:
    """The events without offsets and lengths, so that streams of different layout can be compared."""
    return [
        tuple(f for f in event if not isinstance(f, tuple) or f[0] not in {"offset", "length", "pages_offset", "raw"})
        for event in map(comparable, reading.events)
    ]


@given(st.lists(st.tuples(optional, bodies), max_size=8), st.data())
def test_reader_padded_records_give_the_same_events(extra: list[tuple[int, bytes]], data: st.DataObject) -> None:
    """ "If body_length is not a multiple of 8, the body is padded with zeroes to align the end of the record on an 8
    octet boundary."
    """
    stream = sound()
    for kind, body in extra:
        at = data.draw(st.integers(2, len(stream) - 1))
        stream.insert(at, W.record(kind, body))
    reading = raised(stream)
    assert reading.error is None
    assert [event.offset for event in reading.events] == [stream.offset_of(i) for i in range(len(stream))]
    lengths = [event.length for event in reading.events if isinstance(event, framing.Unknown)]
    bodies_in_order = [piece for piece in stream if piece.name.startswith("optional")]
    assert [-(-n // 8) * 8 + 8 for n in lengths] == [len(piece.data) for piece in bodies_in_order]


@given(optional, bodies, st.integers(2, 8))
def test_reader_unknown_optional_record_is_ignored(kind: int, body: bytes, at: int) -> None:
    """ "The contents of optional records may be ignored during a restore."."""
    stream = sound()
    stream.insert(at, W.record(kind, body))
    reading = collected(stream)
    assert reading.breaches == []
    assert reading.done
    without = [e for e in values(reading) if e[0] != "Unknown"]
    assert without == values(collected(sound()))


@given(mandatory, bodies, st.integers(2, 8))
def test_reader_unknown_mandatory_record_is_refused(kind: int, body: bytes, at: int) -> None:
    """ "Restoring an image that has unrecognised or unsupported mandatory record must fail."."""
    stream = sound()
    stream.insert(at, W.record(kind, body))
    reading = raised(stream)
    assert type(reading.error) is Unsupported
    assert reading.error.offset == stream.offset_of(at)
    assert f"{kind:#x}" in str(reading.error)
    assert [fault.rule for fault in collected(stream).breaches] == [rules.RECORD_UNKNOWN]


@given(st.tuples(u32s, u32s, u64s, u32s), entries, st.dictionaries(u64s, u64s, min_size=1, max_size=5))
def test_reader_integers_follow_the_image_header(tsc: Any, pfns: Any, params: dict[int, int]) -> None:
    """ "Integer fields in the domain header and in the records are in the endianness described in the image header"."""
    both = []
    for wire in (W, BIG):
        pages = [bytes(PAGE)] * sum(kind in WITH_DATA for _, kind in pfns)
        data = [wire.page_data(pfns, pages), wire.tsc_info(*tsc), wire.hvm_params(params)]
        both.append(collected(hvm(*data, wire=wire)))
    little, big = both
    assert values(little)[1:] == values(big)[1:]
    assert page_data_of(little).entries.tolist() == page_data_of(big).entries.tolist()
    assert {fault.rule for fault in big.breaches} - {fault.rule for fault in little.breaches} == {rules.IMAGE_HEADER}
    tsc_info = next(event for event in little.events if isinstance(event, records.X86TscInfo))
    assert (tsc_info.mode, tsc_info.khz, tsc_info.nsec, tsc_info.incarnation) == tsc


@given(entries)
def test_reader_page_data_gives_its_pfns_and_types(pfns: list[tuple[int, int]]) -> None:
    """ "Bit 63-60: XEN_DOMCTL_PFINFO_* type. Bit 59-52: Reserved. Bit 51-0: PFN." "N is strictly <= C"."""
    contents = [bytes([i % 256]) * PAGE for i, (_, kind) in enumerate(pfns) if kind in WITH_DATA]
    stream = hvm(W.page_data(pfns, contents))
    reading = read(one_chunk(bytes(stream)), pages=True, collect=True)
    record = page_data_of(reading)
    assert list(zip(record.pfns.tolist(), record.types.tolist(), strict=True)) == pfns
    assert record.has_data.tolist() == [kind in WITH_DATA for _, kind in pfns]
    assert record.pages == len(contents) <= len(pfns)
    assert record.pages_offset == stream.offset("PAGE_DATA") + 16 + 8 * len(pfns)
    assert reading.content == b"".join(contents)


@given(st.lists(st.tuples(st.integers(0, LAST_PFN), st.sampled_from([BROKEN, XALLOC, XTAB])), min_size=1, max_size=20))
def test_reader_types_without_data_have_no_page(pfns: list[tuple[int, int]]) -> None:
    """ "PFNs with type BROKEN, XALLOC, or XTAB do not have any corresponding page_data."."""
    reading = collected(hvm(W.page_data(pfns, [])))
    assert page_data_of(reading).pages == 0
    assert rules.PAGE_SIZE_MATCH not in reading.rules
    assert rules.PAGE_SIZE_MATCH in collected(hvm(W.page_data(pfns, [bytes(PAGE)]))).rules


@given(entries, st.integers(0, LAST_PFN), unknown_types, st.data())
def test_reader_unknown_page_type_is_reported(
    pfns: list[tuple[int, int]], pfn: int, kind: int, data: st.DataObject
) -> None:
    """ "Restoring an image with unrecognised page types shall fail."."""
    at = data.draw(st.integers(0, len(pfns)))
    pages = [bytes(PAGE)] * sum(known in WITH_DATA for _, known in pfns)
    reading = raised(hvm(W.page_data([*pfns[:at], (pfn, kind), *pfns[at:]], pages)))
    assert type(reading.error) is Malformed
    assert f"{kind:#x} for pfn {pfn:#x} (index {at})" in str(reading.error)


@given(entries, st.integers(0, U32))
def test_reader_page_data_wrong_count_is_reported(pfns: list[tuple[int, int]], count: int) -> None:
    """ "count: Number of pages described in this record." "Count is strictly > 0."."""
    pages = [bytes(PAGE)] * sum(kind in WITH_DATA for _, kind in pfns)
    assume(count != len(pfns))
    reading = raised(hvm(W.page_data(pfns, pages, count=count)))
    assert isinstance(reading.error, Malformed)
    assert reading.error.record == "PAGE_DATA"


@given(widths, u32s, u32s, st.integers(-2, 2))
def test_reader_p2m_frames_have_the_length_of_their_range(width: int, a: int, b: int, more: int) -> None:
    """ "Array of PFNs containing the guest's P2M table, for the PFN frames containing the PFN range S to E
    (inclusive)."
    """
    start, end = min(a, b), max(a, b)
    per_frame = PAGE // width
    frames = end // per_frame - start // per_frame + 1
    assume(0 <= frames + more < 5000)
    pfns = np.arange(frames + more, dtype=np.uint64)
    stream = sound().replace("X86_PV_INFO", W.pv_info(width, 4 if width == 8 else 3))
    stream = Stream([*stream[:4], W.p2m_frames(start, end, pfns), W.end()])
    reading = collected(stream)
    p2m_records = [event for event in reading.events if isinstance(event, records.X86PVP2MFrames)]
    if more:
        assert p2m_records == []
        assert rules.RECORD_SIZE in reading.rules
    else:
        (record,) = p2m_records
        assert (record.start_pfn, record.end_pfn) == (start, end)
        assert record.p2m_pfns.tolist() == pfns.tolist()


@given(st.integers(0, 100), st.integers(0, 400), known_types)
def test_reader_pfn_beyond_the_p2m_is_reported(end: int, pfn: int, kind: int) -> None:
    """handle_page_data(): "pfn %#lx (index %u) outside domain maximum", whatever the type."""
    pages = [bytes(PAGE)] if kind in WITH_DATA else []
    stream = sound().replace("X86_PV_P2M_FRAMES", W.p2m_frames(0, end, [1]))
    reading = collected(stream.replace("PAGE_DATA", W.page_data([(pfn, kind)], pages)))
    assert reading.rules == ({rules.PAGE_RANGE} if pfn > end else set())


@given(st.integers(0, 2 * PAGE))
def test_reader_shared_info_other_than_one_page_is_reported(length: int) -> None:
    """ "This record should be exactly 1 page long."."""
    reading = raised(sound().replace("SHARED_INFO", W.shared_info(bytes(length))))
    assert (reading.error is None) == (length == PAGE)


RESERVED = {
    "X86_PV_INFO": (10, 6),
    "PAGE_DATA": (12, 4),
    "X86_PV_VCPU_BASIC": (12, 4),
    "domain header": (6, 2),
    "image header": (18, 6),
}


@given(st.sampled_from(sorted(RESERVED)), st.data())
def test_reader_reserved_fields_are_ignored(name: str, data: st.DataObject) -> None:
    """ "Padding and reserved fields are set to zero on save and must be ignored during restore."."""
    at, size = RESERVED[name]
    filler = data.draw(st.binary(min_size=size, max_size=size))
    stream = sound().patch(name, at, filler)
    assert values(raised(stream)) == values(raised(sound()))
    assert collected(stream).rules == ({rules.RESERVED} if any(filler) else set())


@given(st.binary(min_size=8, max_size=8), st.binary(max_size=40))
def test_reader_marker_with_a_zero_bit_is_legacy(first: bytes, rest: bytes) -> None:
    """ "Legacy images will have at one or more zero bits within the first 8 octets of the image."."""
    assume(first != b"\xff" * 8)
    assert isinstance(read([first + rest]).error, Unsupported | Truncated | Malformed)
    error = read([first + rest + bytes(64)], kind=Kind.LIBXC).error
    assert type(error) is Malformed
    assert "marker" in str(error).lower()


@given(st.integers(0, U32))
def test_reader_accepts_versions_2_and_3_only(version: int) -> None:
    """ "version: 0x00000003"; restorers take "Expected 2 <= ver <= 3"."""
    reading = raised(sound().replace("image header", Wire(version).image_header()))
    if version not in {2, 3}:
        assert type(reading.error) is Malformed
        assert str(version) in str(reading.error)
    else:
        # "A v3 stream is compatible with a v2 stream, but mandates the presense of a STATIC_DATA_END record"
        assert (reading.error is None) == (version == 3)


@given(st.sampled_from(["vcpu_extended", "vcpu_xsave", "vcpu_msrs"]), st.integers(0, U32))
def test_reader_empty_record_is_accepted(method: str, vcpu: int) -> None:
    """Errata: "the receiving side of a stream should tolerate and ignore variable sized records with zero content"."""
    stream = sound().before("END", getattr(W, method)(vcpu, b""))
    reading = raised(stream)
    assert reading.error is None
    assert reading.done
    assert collected(stream).rules == {rules.RECORD_EMPTY}


keys = st.text("abcdefghijklmnopqrstuvwxyz0123456789-/_@", min_size=1, max_size=12)
ascii_values = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12)


@given(st.dictionaries(keys, ascii_values, max_size=6), st.integers(0, 2), u32s)
def test_reader_xenstore_data_gives_its_pairs(pairs: dict[str, str], emulator: int, index: int) -> None:
    """libxl-migration-stream.pandoc.

    "Xenstore key/value data are encoded as a packed sequence of (key, value) tuples. Each (key, value) tuple is a
    packed pair of NUL terminated octets".
    """
    stream = Stream([W.libxl_header(), W.emulator_xenstore(pairs, emulator=emulator, index=index), W.libxl_end()])
    record = next(e for e in collected(stream).events if isinstance(e, libxl.EmulatorXenstoreData))
    assert (record.pairs, record.emulator_id, record.index) == (pairs, emulator, index)


# --- not of the specification: what a reader owes its caller, whatever comes


@given(st.data())
def test_reader_bytes_cut_anywhere_give_the_same_events_and_errors(data: st.DataObject) -> None:
    """The same events, faults and error, and the same again with page content given."""
    stream = sound()
    for _ in range(data.draw(st.integers(0, 3))):
        i = data.draw(st.integers(0, len(stream) - 1))
        at = data.draw(st.integers(0, min(40, len(stream[i].data) - 1)))
        stream[i] = Piece(stream[i].name, stream[i].data[:at] + data.draw(st.binary(max_size=4)) + stream[i].data[at:])
    whole_bytes = bytes(stream)
    cuts = data.draw(st.lists(st.integers(0, len(whole_bytes)), max_size=12))
    for pages in (False, True):
        expected = read(one_chunk(whole_bytes), collect=True, pages=pages)
        reading = read(split_at(whole_bytes, cuts), collect=True, pages=pages)
        assert reading.comparable == expected.comparable
        assert reading.breaches == expected.breaches
        assert repr(reading.error) == repr(expected.error)
        assert (reading.done, reading.trailing) == (expected.done, expected.trailing)


@given(st.binary(max_size=300), st.sampled_from([None, *Kind]), st.booleans())
def test_reader_any_bytes_parse_or_raise_stream_error(junk: bytes, kind: Kind | None, collect: bool) -> None:
    """The helper catches StreamError and nothing else."""
    reading = read(one_chunk(junk), kind=kind, collect=collect, pages=True)
    assert reading.done or reading.error is not None
    if reading.error is not None:
        assert 0 <= reading.error.offset <= len(junk)
