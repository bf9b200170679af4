"""Conversion: every accepted stream passes a deep verify, and holds the domain that went in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.frames import columns
from tests.support.saved_files import piped
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from tests.support.writers.envelopes import CONFIG_XML, ENVELOPES, config_json
from tests.support.writers.hvm import hvm_stream
from tests.support.writers.legacy import Legacy, delta, in_xl, pv_stream, remus_stream
from tests.support.writers.legacy import hvm_stream as legacy_hvm
from tests.support.writers.legacy import whole as whole_page
from tests.support.writers.stream import NOTAB, OPTIONAL, PAGE, XALLOC, XTAB, Piece, Stream, Wire
from xenpv.abi.declare import Width
from xenpv.convert import remus as remus_module
from xenpv.convert.convert import Conversion, ConversionResult, ConvertOptions
from xenpv.convert.file import NotRestorable, convert, write_verified
from xenpv.convert.repack import BATCH_MAX, PageRepacker
from xenpv.errors import Malformed, RequestError, StreamError, Truncated, Unsupported
from xenpv.frames import HAS_DATA
from xenpv.io.stream_input import Input
from xenpv.source.saved import SavedDomain
from xenpv.stream.envelope import CONFIG_MAX, INNER_KIND, Kind
from xenpv.stream.legacy import LegacyFormat
from xenpv.stream.reader import Reader
from xenpv.verify.stream import verify

W = Legacy()
DOMAIN = pv_domain(pfns=range(64), vcpus=2, tree=True)
CONFIG = config_json(vcpus=2) + b"\0"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def converted(data: bytes, out: Path, **options: Any) -> ConversionResult:
    """Convert a file, and verify the output again as a file of its own."""
    source = out.with_name("in")
    source.write_bytes(data)
    source_input = Input.open(str(source))
    try:
        result = convert(source_input, str(out), ConvertOptions(**options))
    finally:
        source_input.close()
    report = verify(str(out))
    assert report.ok, list(map(str, report.findings))
    assert [str(f) for f in report.findings] == [str(f) for f in result.findings]
    assert out.stat().st_mode & 0o777 == 0o600
    assert result.bytes_out == out.stat().st_size
    return result


def memory(path: Path) -> dict[int, tuple[int, bytes]]:
    """Return type and content of each pfn."""
    with SavedDomain.open(str(path)) as saved:
        content = {}
        for start, count, kind in columns(saved.contents.index.extents):
            pfns = np.arange(start, start + count, dtype=np.uint64)
            pages = saved.frames.pages(pfns) if HAS_DATA[kind] else np.empty((len(pfns), 0), np.uint8)
            content.update({int(pfn): (int(kind), page.tobytes()) for pfn, page in zip(pfns, pages, strict=True)})
        return content


def domain_memory(domain: Domain) -> dict[int, tuple[int, bytes]]:
    return {pfn: (kind, bytes(domain.pages.get(pfn, b""))) for pfn, kind in domain.types.items()}


# --- versions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("long", [8, 4])
@pytest.mark.parametrize("width", [8, 4])
def test_convert_legacy_pv_stream_keeps_the_domain(width: Width, long: int, out: Path) -> None:
    domain = pv_domain(width=width, pfns=range(64), vcpus=2, tree=True, linear=False)
    result = converted(bytes(in_xl(pv_stream(domain, Legacy(long)), CONFIG)), out)
    assert (result.version, result.source_kind, result.kind, result.pages) == (1, Kind.XL, Kind.XL, len(domain.pages))
    assert memory(out) == domain_memory(domain)
    with SavedDomain.open(str(out)) as saved:
        assert saved.contents.envelope is not None
        assert saved.contents.envelope.config == CONFIG
        assert saved.contents.domain is not None
        assert (saved.contents.domain.xen_major, saved.contents.domain.xen_minor) == (0, 1)
        assert sorted(saved.contents.vcpus) == [0, 1]


@pytest.mark.parametrize("long", [8, 4])
def test_convert_legacy_hvm_stream_keeps_emulator_state(long: int, out: Path) -> None:
    result = converted(bytes(legacy_hvm(Legacy(long))), out, kind=Kind.LIBXL)
    assert (result.version, result.pages) == (1, 15)
    with SavedDomain.open(str(out)) as saved:
        assert [event.name for event in saved.contents.emulators] == [
            "libxl EMULATOR_XENSTORE_DATA",
            "libxl EMULATOR_CONTEXT",
        ]
        assert saved.contents.libxl_header is not None
        assert saved.contents.libxl_header.options == 2  # from legacy


@pytest.mark.parametrize("envelope", ENVELOPES)
@pytest.mark.parametrize("version", [2, 3])
def test_convert_version_2_gives_3_and_version_3_the_same_bytes(envelope: str, version: int, out: Path) -> None:
    data = DOMAIN.to_bytes(envelope, version=version)
    result = converted(data, out)
    assert (result.version, result.source_kind, result.kind) == (version, envelope, envelope)
    assert memory(out) == domain_memory(DOMAIN)
    if version == 3:
        assert out.read_bytes() == data


def test_convert_version_2_hvm_stream_is_stable(out: Path) -> None:
    converted(bytes(hvm_stream("xl", version=2)), out)
    again = out.read_bytes()
    assert converted(again, out).version == 3
    assert out.read_bytes() == again


@pytest.mark.parametrize("to", list(INNER_KIND))
@pytest.mark.parametrize("envelope", ENVELOPES)
def test_convert_any_envelope_to_any_other_keeps_the_domain(envelope: str, to: Kind, out: Path) -> None:
    config = {"config": CONFIG_XML, "config_format": "xml"} if to is Kind.LIBVIRT else {}
    result = converted(DOMAIN.to_bytes(envelope), out, kind=to, **config)
    assert result.kind is to
    assert memory(out) == domain_memory(DOMAIN)
    with SavedDomain.open(str(out)) as saved:
        saved_envelope = saved.contents.envelope
        assert (saved_envelope.kind if saved_envelope else to) is to
    assert result.has_config == ((to == envelope and to in {Kind.XL, Kind.XENOPSD}) or to is Kind.LIBVIRT)


def test_convert_emulator_state_without_a_place_is_refused_unless_dropped(out: Path) -> None:
    data = bytes(hvm_stream("xl"))
    for to in (Kind.LIBXC, Kind.XENOPSD):
        with pytest.raises(Unsupported) as e:
            converted(data, out, kind=to)
        assert e.value.offset == hvm_stream("xl").offset("libxl EMULATOR_XENSTORE_DATA")
        assert not out.exists()
        assert converted(data, out, kind=to, drop_emulator=True).omitted
        out.unlink()
    with pytest.raises(Unsupported):
        converted(bytes(hvm_stream("xenopsd")), out, kind=Kind.XL)
    assert len(converted(data, out, kind=Kind.LIBXL).omitted) == 0


@pytest.mark.parametrize(
    ("options", "available"),
    [
        pytest.param({"kind": Kind.LIBVIRT}, None, id="libvirt-without-xml"),
        pytest.param({"kind": Kind.LIBXL, "config": CONFIG}, None, id="libxl-with-config"),
        pytest.param({"kind": Kind.XL, "config": CONFIG_XML, "config_format": "xml"}, None, id="xl-with-xml"),
        pytest.param({"kind": Kind.XL, "config": bytes(17 << 20)}, CONFIG_MAX, id="config-too-long"),
        pytest.param({"batch": 0}, BATCH_MAX, id="batch-0"),
        pytest.param({"batch": BATCH_MAX + 1}, BATCH_MAX, id="batch-too-large"),
    ],
)
def test_convert_options_that_do_not_fit_raise_request_error(
    options: dict[str, Any], available: int | None, out: Path
) -> None:
    with pytest.raises(RequestError) as e:
        converted(DOMAIN.to_bytes("xl"), out, **options)
    assert e.value.available == available
    assert not out.exists()


def test_convert_optional_records_are_omitted_and_reported(out: Path) -> None:
    stream = DOMAIN.to_stream("libxc").before("X86_TSC_INFO", Wire().record(OPTIONAL | 0x42, b"later"), Wire().verify())
    result = converted(bytes(stream), out)
    assert result.omitted == ["optional record 0x80000042"]
    assert out.read_bytes() == DOMAIN.to_bytes("libxc")


@pytest.mark.parametrize("envelope", ENVELOPES)
def test_convert_trailing_bytes_are_omitted_and_reported(envelope: str, out: Path) -> None:
    data = DOMAIN.to_bytes(envelope)
    assert converted(data + b"more", out).omitted == ["4 bytes after the stream"]
    assert out.read_bytes() == data
    assert from_pipe(data + b"more", out).omitted == ["4 bytes after the stream"]


# --- pages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7, 64, 5000])
def test_convert_batch_gives_records_of_that_many_pages(batch: int, out: Path) -> None:
    converted(DOMAIN.to_bytes("libxc", batch=10), out, batch=batch)
    assert out.read_bytes() == DOMAIN.to_bytes("libxc", batch=batch)
    assert converted(DOMAIN.to_bytes("libxc", batch=batch), out, batch=10).pages == len(DOMAIN.pages)
    assert out.read_bytes() == DOMAIN.to_bytes("libxc", batch=10)


def test_convert_repeated_page_keeps_the_last_content(out: Path) -> None:
    wire, old = Wire(), b"o" * PAGE
    pfn = DOMAIN.places.data[0]
    again = [wire.page_data([(pfn, NOTAB)], [old]), wire.page_data([(pfn, NOTAB)], [bytes(DOMAIN.pages[pfn])])]
    for batch in (None, 3, 1000):
        result = converted(bytes(DOMAIN.to_stream("libxc").before("X86_TSC_INFO", *again)), out, batch=batch)
        assert memory(out) == domain_memory(DOMAIN)
        assert result.findings == []  # not twice in one record, which is worth a warning


def test_convert_reserved_bits_are_cleared(out: Path) -> None:
    """ "Reserved fields [...] must be ignored during restore": a warning of the input, and none of the result."""
    stream = DOMAIN.to_stream("libxc")
    stream.patch("PAGE_DATA", 8 + 8 + 6, b"\xf0")
    assert converted(bytes(stream), out).findings == []
    assert out.read_bytes() == DOMAIN.to_bytes("libxc")


def test_convert_drop_zero_omits_content_where_restore_gives_the_same(out: Path) -> None:
    """Not those of the p2m, not tables, and not what an earlier sending gave other content."""
    domain = pv_domain(pfns=range(64))
    plain, again, leaf = domain.places.data[0], domain.places.data[1], domain.places.p2m_missing
    for pfn in (plain, again):
        domain.pages[pfn][:] = bytes(PAGE)
    for pfn in domain.places.gdt:
        domain.pages[pfn][16:24] = b"a segment"[:8]
    stream = domain.to_stream("libxc")
    stream.before("PAGE_DATA", Wire().page_data([(again, NOTAB)], [b"x" * PAGE]))
    with_zeros = converted(bytes(stream), out)
    result = converted(bytes(stream), out, drop_zero=True)
    content = memory(out)
    assert content[plain] == (XALLOC, b"")
    assert content[again] == (NOTAB, bytes(PAGE))
    assert leaf < 0 or content[leaf][0] == NOTAB
    assert {pfn: page for pfn, page in content.items() if page[0] != XALLOC} == {
        pfn: page for pfn, page in domain_memory(domain).items() if content[pfn][0] != XALLOC
    }
    assert result.zero_pages == sum(kind == XALLOC for kind, _ in content.values())
    assert result.bytes_saved == result.zero_pages * PAGE == with_zeros.bytes_out - result.bytes_out


def test_page_repacker_drop_zero_keeps_content_of_p2m_frames() -> None:
    """A restorer writes to all of its frames, and wants them to have come as pages."""
    repacker = PageRepacker(drop_zero=True)
    repacker.keep_content(np.array([5], np.uint64))
    record = np.array([4, 5, 6 | 1 << 60, 7], np.uint64)

    def read_into(into: memoryview) -> None:
        into[:] = bytes(4 * PAGE - 1) + b"!"

    ((entries, (content,)),) = repacker.add(record, read_into)
    assert entries.tolist() == [4 | XALLOC << 60, 5, 6 | 1 << 60, 7]
    assert content.shape == (3, PAGE)
    assert repacker.zero_pages == 1


@pytest.mark.parametrize("batch", [None, 1, 10])
@pytest.mark.parametrize("drop_zero", [False, True])
def test_page_repacker_keeps_the_last_of_a_pfn_that_comes_twice(batch: int | None, drop_zero: bool) -> None:
    """A restorer takes the entries in order. verify only warns of such a record, so it may come."""
    contents = [b"a" * PAGE, bytes(PAGE), b"c" * PAGE, b"d" * PAGE]
    repacker, given = PageRepacker(batch, drop_zero=drop_zero), b"".join(contents)
    position = 0

    def read_into(into: memoryview) -> None:
        nonlocal position
        into[:] = given[position : position + len(into)]
        position += len(into)

    memory: dict[int, bytes] = {}
    records = [*repacker.add(np.array([5, 5, 6, 5 | XTAB << 60, 6], np.uint64), read_into), *repacker.flush()]
    for entries, arrays in records:
        assert len(np.unique(entries & np.uint64((1 << 52) - 1))) == len(entries)
        pages = iter(np.concatenate(arrays)) if arrays else iter(())
        for entry in entries.tolist():
            has_content = entry >> 60 not in {XALLOC, XTAB}
            memory[entry & (1 << 52) - 1] = next(pages).tobytes() if has_content else b""
    assert memory == {5: b"", 6: contents[3]}
    assert position == len(given)


def test_page_repacker_drop_zero_sends_zeros_after_other_content_of_the_same_record() -> None:
    repacker = PageRepacker(drop_zero=True)

    def read_into(into: memoryview) -> None:
        into[:] = b"x" * PAGE + bytes(PAGE)

    ((entries, (content,)),) = repacker.add(np.array([5, 5], np.uint64), read_into)
    assert entries.tolist() in ([5], [5 | XALLOC << 60]), "zeros, as the last entry says"
    assert not content.any()


# --- Remus ------------------------------------------------------------------------------------------------------------


def unpopulated_pfn(domain: Domain) -> int:
    return next(pfn for pfn in range(domain.entries) if pfn not in domain.pages)


def remus_rounds(domain: Domain) -> tuple[list[list[Piece]], dict[int, bytes]]:
    """Two rounds of changes to pages of data, and what those hold in the end."""
    a, b, c = domain.places.data[:3]
    first = {pfn: bytes([pfn]) * PAGE for pfn in (a, b)}
    second = bytearray(first[a])
    second[100:140] = b"z" * 40
    plain = bytearray(domain.pages[c])
    plain[:8] = b"in place"
    return [
        [W.pages([(a, NOTAB), (b, NOTAB)], []), W.compressed(whole_page(first[a]) + whole_page(first[b]))],
        [
            W.pages([(a, NOTAB), (b, NOTAB), (c, NOTAB)], []),
            W.compressed(delta(first[a], bytes(second)) + b"\0" + delta(bytes(domain.pages[c]), bytes(plain))),
            W.pages([(unpopulated_pfn(domain), XTAB)], []),  # has ballooned meanwhile: nothing follows for it
        ],
    ], {a: bytes(second), b: first[b], c: bytes(plain)}


def test_convert_remus_deltas_gives_whole_pages(out: Path) -> None:
    domain = pv_domain(pfns=range(64), vcpus=2)
    rounds, changed = remus_rounds(domain)
    result = converted(bytes(remus_stream(domain, rounds)), out, kind=Kind.LIBXC)
    assert (result.checkpoints, result.truncated) == (2, None)
    contents, ballooned = memory(out), unpopulated_pfn(domain)
    assert {pfn: contents[pfn][1] for pfn in changed} == changed
    assert contents[ballooned] == (XTAB, b"")
    assert {pfn: page for pfn, page in contents.items() if pfn not in {ballooned, *changed}} == {
        pfn: page for pfn, page in domain_memory(domain).items() if pfn not in {ballooned, *changed}
    }


def test_convert_truncated_checkpoint_keeps_the_last_whole_one(out: Path) -> None:
    domain = pv_domain(pfns=range(64), vcpus=2)
    rounds, _ = remus_rounds(domain)
    stream = remus_stream(domain, rounds)
    first_checkpoint = bytes(remus_stream(domain, rounds[:1]))
    data = bytes(stream)
    converted(first_checkpoint, out, kind=Kind.LIBXC)
    expected = memory(out)
    for cut in (len(first_checkpoint) + 2, len(first_checkpoint) + 100, len(data) - 1):
        result = converted(data[:cut], out, kind=Kind.LIBXC)
        assert result.truncated is not None
        assert f"{cut:#x}" in result.truncated
        assert memory(out) == expected
    first = bytes(remus_stream(domain, []))
    for cut in (len(first) - 1, len(first) // 2):
        with pytest.raises(Truncated):
            converted(data[:cut], out)


def test_convert_many_unchanged_pages_gives_each_page_once(out: Path) -> None:
    """A byte says that a page is the same: written as they came, these would be 12 MiB."""
    domain = pv_domain(pfns=range(64))
    few = domain.places.data[:30]
    same = [W.pages([(pfn, NOTAB) for pfn in few], []), W.compressed(b"\0" * len(few))]
    result = converted(bytes(remus_stream(domain, [same] * 100)), out, kind=Kind.LIBXC)
    once = converted(bytes(remus_stream(domain, [same])), out, kind=Kind.LIBXC)
    assert result.pages == once.pages == len(domain.pages) + len(few)
    assert memory(out) == domain_memory(domain)


def test_delta_store_temporary_file_holds_each_page_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = pv_domain(pfns=range(64))
    pfn = domain.places.data[0]
    pages = [bytes([n]) * PAGE for n in range(100)]
    first = [W.pages([(pfn, NOTAB)], []), W.compressed(whole_page(pages[0]))]
    rounds = [[W.pages([(pfn, NOTAB)], []), W.compressed(delta(a, b))] for a, b in pairwise(pages)]
    sizes = []

    def file() -> int:
        path = tmp_path / "temporary"
        sizes.append(path.stat)
        return os.open(path, os.O_RDWR | os.O_CREAT)

    monkeypatch.setattr(remus_module, "unlinked_file", file)
    converted(bytes(remus_stream(domain, [first, *rounds])), tmp_path / "out", kind=Kind.LIBXC)
    assert [size().st_size for size in sizes] == [(pfn + 1) * PAGE]
    assert memory(tmp_path / "out")[pfn] == (NOTAB, pages[-1])


def test_convert_pfn_twice_in_one_checkpoint_is_malformed(out: Path) -> None:
    domain = pv_domain(pfns=range(64))
    pfn = domain.places.data[0]
    named = [W.pages([(pfn, NOTAB)], []) for _ in range(2)]
    with pytest.raises(Malformed) as e:
        converted(bytes(remus_stream(domain, [[*named, W.compressed(b"\0\0")]])), out)
    assert e.value.record == "compressed pages"
    assert f"{pfn:#x}" in e.value.reason


def test_convert_delta_of_an_uncompressed_page_from_a_pipe_is_unsupported(tmp_path: Path, out: Path) -> None:
    """A pipe keeps no plain pages; what came compressed it has."""
    domain = pv_domain(pfns=range(64), vcpus=2)
    rounds, _ = remus_rounds(domain)
    with pytest.raises(Unsupported) as e:
        from_pipe(bytes(remus_stream(domain, rounds)), out)
    assert e.value.record == "compressed pages"
    assert not out.exists()
    assert from_pipe(bytes(remus_stream(domain, rounds[:1])), out).checkpoints == 1


def test_convert_checkpointed_stream_gives_one_without_checkpoints(out: Path) -> None:
    stream = DOMAIN.to_checkpointed(rounds=2)
    result = converted(bytes(stream), out)
    assert result.checkpoints == 2
    assert memory(out) == domain_memory(DOMAIN)
    with SavedDomain.open(str(out)) as saved:
        assert saved.contents.checkpoints == 0


def test_convert_emulator_state_of_the_last_checkpoint_counts(out: Path) -> None:
    """Each checkpoint has all of it."""
    first_image = legacy_hvm()
    first_image.drop("chunk -9")
    again = Stream(legacy_hvm()[first_image.find("chunk -7") :]).replace("qemu", W.qemu(b"last"))
    converted(bytes(first_image.replace("qemu", W.qemu(b"first"))) + bytes(again), out, kind=Kind.XL)
    with SavedDomain.open(str(out)) as saved:
        assert [event.data for event in saved.contents.emulators[1:]] == [b"last"]


# --- files, pipes, and what goes wrong --------------------------------------------------------------------------------


def from_pipe(data: bytes, out: Path, **options: Any) -> ConversionResult:
    with piped(data) as fd:
        source = Input(os.dup(fd), "pipe")
        try:
            return convert(source, str(out), ConvertOptions(**options))
        finally:
            source.close()


SOURCES = {
    "legacy": bytes(in_xl(pv_stream(DOMAIN), CONFIG)),
    "legacy-hvm": bytes(in_xl(legacy_hvm(), config_json("hvm"))),
    "v2": DOMAIN.to_bytes("xl", version=2),
    "v3": DOMAIN.to_bytes("libxc"),
    "remus": bytes(DOMAIN.to_checkpointed()),
}


@pytest.mark.parametrize("name", SOURCES)
def test_convert_from_a_pipe_gives_what_a_file_gives(name: str, out: Path) -> None:
    converted(SOURCES[name], out)
    of_file = out.read_bytes()
    from_pipe(SOURCES[name], out)
    assert out.read_bytes() == of_file


@pytest.mark.parametrize("name", SOURCES)
def test_convert_into_a_pipe_writes_what_a_file_would_have(name: str, out: Path) -> None:
    converted(SOURCES[name], out)
    assert b"".join(into_pipe(out.with_name("in"), out.with_name("fifo"))) == out.read_bytes()


def into_pipe(source: Path, fifo: Path) -> Iterator[bytes]:
    os.mkfifo(fifo)
    reading = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reading, True)
    import fcntl  # noqa: PLC0415

    fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, 1 << 20)
    source_input = Input.open(str(source))
    try:
        convert(source_input, str(fifo), ConvertOptions())
    finally:
        source_input.close()
        while data := os.read(reading, 1 << 16):
            yield data
        os.close(reading)


@pytest.mark.parametrize("name", ["legacy", "v2", "v3"])
def test_convert_truncated_input_leaves_no_file(name: str, out: Path) -> None:
    data = SOURCES[name]
    for cut in range(0, len(data), len(data) // 11):
        with pytest.raises(StreamError):
            converted(data[:cut], out)
        assert [path.name for path in out.parent.iterdir()] == ["in"]


def unrestorable_stream() -> Stream:
    """A present entry that leads beyond the domain's end: framing is sound, memory is not."""
    domain = pv_domain(pfns=range(64))
    domain.set_pte(domain.vaddrs[domain.places.data[0]], 0x7F_FFFF << 12 | 3)
    return pv_stream(domain)


def test_convert_unrestorable_domain_is_refused_unless_forced(tmp_path: Path, out: Path) -> None:
    out.with_name("in").write_bytes(bytes(unrestorable_stream()))
    source_input = Input.open(str(out.with_name("in")))
    with pytest.raises(NotRestorable) as e:
        convert(source_input, str(out), ConvertOptions(Kind.LIBXC))
    assert {finding.rule.name for finding in e.value.findings} == {"pte-range"}
    assert [path.name for path in out.parent.iterdir()] == ["in"]
    result = convert(source_input, str(out), ConvertOptions(Kind.LIBXC), force=True)
    report = verify(str(out))
    assert [str(f) for f in report.findings] == [str(f) for f in result.findings]
    assert not report.ok
    source_input.close()


def test_convert_unrestorable_domain_in_a_pipe_lacks_its_last_record(out: Path) -> None:
    """All of it but the last record, so that nobody starts it."""
    data = bytes(unrestorable_stream())
    written = bytearray()
    out.with_name("in").write_bytes(data)
    source_input = Input.open(str(out.with_name("in")))
    with pytest.raises(NotRestorable):
        write_verified(
            Conversion(source_input, Reader(legacy=LegacyFormat()), ConvertOptions(Kind.LIBXC)),
            lambda pieces: written.extend(b"".join(pieces)),
        )
    assert convert(source_input, str(out), ConvertOptions(Kind.LIBXC), force=True).bytes_out == len(written) + 8
    assert out.read_bytes()[:-8] == written
    source_input.close()


# xen.git@RELEASE-4.4.0:tools/python/xen/xend/XendCheckpoint.py save: signature, big-endian length, expression, stream.
_XEND_CONFIG = b"(domain (domid 3) (name 'we)b') (on_reboot \"\\\")\") (image (linux (kernel ''))))"


@pytest.mark.parametrize(
    ("config", "length"),
    [
        pytest.param(_XEND_CONFIG, len(_XEND_CONFIG) - 1, id="length-too-small"),
        pytest.param(_XEND_CONFIG, len(_XEND_CONFIG) + 8, id="length-too-large"),
        pytest.param(_XEND_CONFIG, 0, id="length-0"),
        pytest.param(_XEND_CONFIG, 1 << 31, id="length-huge"),
        pytest.param(_XEND_CONFIG[:-2], len(_XEND_CONFIG) - 2, id="cut-after-a-bracket"),
        pytest.param(b"(domain) (x)", 12, id="two-expressions"),
        pytest.param(b"(domain ')", 10, id="quote-open"),
    ],
)
def test_convert_refuses_a_file_of_xend_whose_expression_is_not_whole(config: bytes, length: int, out: Path) -> None:
    data = b"LinuxGuestRecord" + length.to_bytes(4, "big") + config + bytes(pv_stream(DOMAIN))
    with pytest.raises(Malformed) as e:
        converted(data, out)
    assert (e.value.offset, e.value.record) == (0, "xend header")
    assert not out.exists()


def test_convert_brackets_in_quotes_of_xend_do_not_count(out: Path) -> None:
    data = b"LinuxGuestRecord" + len(_XEND_CONFIG).to_bytes(4, "big") + _XEND_CONFIG + bytes(pv_stream(DOMAIN))
    assert converted(data, out).source_kind is Kind.XEND
    assert memory(out) == domain_memory(DOMAIN)
