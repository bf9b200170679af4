"""What the Writer gives, the Reader takes and has the same again; what the Reader refuses, the Writer does not give.

The bytes are held against tests/writers, which know nothing of xenpv's own declarations.
"""

from __future__ import annotations

import lzma
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.stream_reading import Reading, one_chunk, read
from tests.support.stream_rewriting import rewrite_stream
from tests.support.stream_strategies import known_types, u32s, u64s
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from tests.support.writers.envelopes import config_json, wrap
from tests.support.writers.hvm import hvm_stream
from tests.support.writers.stream import NOTAB, PAGE, WITH_DATA, XTAB, Piece, Stream, Wire
from tests.vectors.make import DEMO, FOR_DEMO, RECIPES, Recipe
from xenpv.errors import Malformed, OutOfOrder, RequestError, StreamError, Unsupported
from xenpv.stream import framing, libxl, records, rules
from xenpv.stream.envelope import CONFIG_MAX, Envelope, Kind
from xenpv.stream.fields import Buffer, Fields
from xenpv.stream.framing import Record
from xenpv.stream.page_data import PageData
from xenpv.stream.record_order import Guest
from xenpv.stream.writer import KINDS, Writer

W = Wire()
LAST = 1023  # the last pfn of the made streams
CONFIG = config_json()


@cache
def made() -> Domain:
    return pv_domain(pfns=range(40), vcpus=2)


def frames(end: int = LAST, width: int = 8) -> records.X86PVP2MFrames:
    count = end * width // PAGE + 1
    raw = b"".join((n + 1).to_bytes(8, "little") for n in range(count))
    return records.X86PVP2MFrames(start_pfn=0, end_pfn=end, raw=raw)


def entry(pfn: int, kind: int) -> bytes:
    return (kind << 60 | pfn).to_bytes(8, "little")


Sent = Record | tuple[bytes, Sequence[Buffer]]


def give(writer: Writer, what: Sent) -> list[Buffer]:
    return writer.send(what) if isinstance(what, Record) else writer.pages(*what)


def written(writer: Writer, *given_records: Sent) -> bytes:
    """Headers and records, joined; the offset goes along."""
    out = b"".join(writer.start())
    for one in given_records:
        assert writer.offset == len(out)
        out += b"".join(give(writer, one))
    assert writer.offset == len(out)
    return out


# --- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [8, 4])
def test_writer_gives_the_same_bytes_as_the_oracle(kind: Kind, width: Any) -> None:
    domain = pv_domain(width=width, pfns=range(40), vcpus=2)
    data = domain.to_bytes(str(kind), batch=16)
    assert rewrite_stream(data) == data


def test_writer_p2m_leaves_stream_gives_the_same_bytes_as_the_oracle() -> None:
    domain = pv_domain(pfns=range(40))
    stream = domain.to_stream("libxc").replace(
        "X86_PV_P2M_FRAMES", W.p2m_leaves(1 << 40, (0, 2, 7), (2, (1 << 31) - 2, 9))
    )
    assert rewrite_stream(bytes(stream)) == bytes(stream)


@pytest.mark.parametrize("kind", KINDS)
def test_writer_hvm_stream_gives_the_same_bytes_as_the_oracle(kind: Kind) -> None:
    data = bytes(hvm_stream(str(kind)))
    assert rewrite_stream(data) == data


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_writer_stream_of_real_xl_gives_the_same_bytes(recipe: Recipe) -> None:
    data = lzma.decompress((DEMO if recipe is FOR_DEMO else recipe.path).read_bytes())
    assert rewrite_stream(data) == data


def test_writer_checkpointed_stream_gives_the_same_bytes_as_the_oracle() -> None:
    data = bytes(made().to_checkpointed(rounds=3))
    assert rewrite_stream(data) == data


def test_writer_xl_without_config_writes_size_0() -> None:
    """save_domain_core_writeconfig(): the size of the configuration is optional data even when it is 0."""
    data = b"".join(Writer(Kind.XL).start())
    assert data[32:52] == bytes.fromhex("04030201 02000000 00000000 04000000 00000000")


def test_writer_config_ends_with_one_nul() -> None:
    assert Writer(Kind.XL, config=CONFIG).start()[:3] == Writer(Kind.XL, config=CONFIG + b"\0").start()[:3]


# --- what was given is what is read ----------------------------------------------------------------------------------

blobs = st.binary(min_size=1, max_size=64)
vcpu_ids = st.integers(0, records.VCPUS_MAX - 1)
CONTEXT = 5168
static_data: list[st.SearchStrategy[Sent]] = [
    st.builds(lambda n: records.CpuidPolicy(data=bytes(24 * n)), st.integers(1, 3)),
    st.builds(lambda n: records.MsrPolicy(data=bytes(16 * n)), st.integers(1, 3)),
]
page_data = st.builds(
    lambda pfns, byte: (
        b"".join(entry(pfn, kind) for pfn, kind in pfns),
        [memoryview(bytes([byte]) * PAGE) for _, kind in pfns if kind in WITH_DATA],
    ),
    st.lists(st.tuples(st.integers(0, LAST), known_types), min_size=1, max_size=6),
    st.integers(0, 255),
)
shared = st.builds(lambda byte: records.SharedInfo(data=bytes([byte]) * PAGE), st.integers(0, 255))
basic = st.builds(
    lambda vcpu, byte: records.VcpuBasic(vcpu_id=vcpu, context=bytes([byte]) * CONTEXT), vcpu_ids, st.integers(0, 255)
)
volatile: st.SearchStrategy[Sent] = st.one_of(
    page_data,
    shared,
    basic,
    st.builds(records.X86TscInfo, mode=u32s, khz=u32s, nsec=u64s, incarnation=u32s),
    st.builds(records.VcpuExtended, vcpu_id=vcpu_ids, context=blobs),
    st.builds(records.VcpuXsave, vcpu_id=vcpu_ids, context=st.binary(min_size=16, max_size=40)),
    st.builds(lambda vcpu, n: records.VcpuMsrs(vcpu_id=vcpu, context=bytes(16 * n)), vcpu_ids, st.integers(1, 3)),
    st.builds(frames, st.integers(0, LAST)),
    st.just(records.Verify()),
)


@st.composite
def domains(draw: st.DrawFn) -> list[Sent]:
    """The records of a PV domain, all that it needs among them."""
    head: list[Sent] = [records.X86PVInfo(guest_width=8, pt_levels=4)]
    head += draw(st.lists(st.one_of(static_data), max_size=3))
    head += [records.StaticDataEnd(), frames(), draw(page_data)]
    tail = draw(st.lists(volatile, max_size=8))
    tail.insert(draw(st.integers(0, len(tail))), draw(shared))
    tail.insert(draw(st.integers(0, len(tail))), draw(basic))
    return [*head, *tail, records.End()]


@given(domains(), st.sampled_from(KINDS), st.sampled_from([b"", CONFIG]))
@settings(deadline=None)
def test_writer_records_are_read_back_equal(sent: list[Sent], kind: Kind, config: bytes) -> None:
    config = config if kind is Kind.XL else b""
    writer = Writer(kind, config=config)
    after: list[Sent] = [] if kind is Kind.LIBXC else [libxl.LibxlEnd()]
    data = written(writer, *sent, *after)
    assert writer.done
    reading = read(one_chunk(data), pages=True, collect=True)
    assert (reading.breaches, reading.error, reading.done, reading.trailing) == ([], None, True, 0)
    if kind is Kind.XL:
        first = reading.events[0]
        assert isinstance(first, Envelope)
        assert first.config.rstrip(b"\0") == config
    found = [e for e in reading.events if isinstance(e, Record) and not isinstance(e, libxl.LibxcContext)]
    assert len(found) == len(sent) + len(after)
    for one, event in zip([*sent, *after], found, strict=True):
        if isinstance(one, Record):
            assert event == one
        else:
            assert isinstance(event, PageData)
            assert event.raw == one[0]
    contents = [c for one in sent if not isinstance(one, Record) for c in one[1]]
    assert reading.content == b"".join(contents)


@given(st.dictionaries(u64s, u64s, min_size=1, max_size=6), st.binary(min_size=1, max_size=100), u32s)
def test_writer_hvm_records_are_read_back_equal(params: dict[int, int], context: bytes, index: int) -> None:
    sent: list[Sent] = [
        records.StaticDataEnd(),
        (entry(1 << 40, NOTAB), [bytes(PAGE)]),
        records.HvmParams(params=params),
        records.HvmContext(data=context),
        records.End(),
        libxl.EmulatorXenstoreData(emulator_id=2, index=index, data=b"a\0b\0"),
        libxl.EmulatorContext(emulator_id=1, index=index, data=context),
        libxl.CheckpointState(control_id=index),
        libxl.LibxlEnd(),
    ]
    data = written(Writer(Kind.LIBXL, guest=Guest.HVM), *sent)
    reading = read(one_chunk(data), collect=True)
    assert reading.breaches == []
    assert [e for e in reading.events if isinstance(e, Record)][1:2] == sent[:1]
    assert [e for e in reading.events if isinstance(e, Record)][3:] == sent[2:]


def test_writer_page_content_is_not_copied() -> None:
    """One buffer for a run of pages, the very object; nothing is joined."""
    writer = Writer()
    written(writer, *HEAD)
    two, one = memoryview(bytes(2 * PAGE)), memoryview(bytearray(PAGE))
    entries = b"".join([entry(0, NOTAB), entry(1, XTAB), entry(2, NOTAB), entry(3, NOTAB)])
    out = writer.pages(entries, [two, one])
    assert out[-2] is two
    assert out[-1] is one
    assert sum(len(buffer) for buffer in out[:-2]) == 16 + 4 * 8


# --- order -----------------------------------------------------------------------------------------------------------

HEAD: list[Sent] = [records.X86PVInfo(guest_width=8, pt_levels=4), records.StaticDataEnd(), frames()]
BASIC = records.VcpuBasic(vcpu_id=0, context=bytes(CONTEXT))
# Each record twice: as it is given, and as tests/writers put it.
POOL: dict[str, tuple[Sent, Callable[[], Piece]]] = {
    "pv info": (HEAD[0], lambda: W.pv_info(8, 4)),
    "static end": (HEAD[1], W.static_data_end),
    "frames": (HEAD[2], lambda: W.p2m_frames(0, LAST, [1, 2])),
    "cpuid": (records.CpuidPolicy(data=bytes(24)), lambda: W.cpuid_policy([(0, 0, 0, 0, 0, 0)])),
    "pages": ((entry(3, XTAB), []), lambda: W.page_data([(3, XTAB)], [])),
    "shared": (records.SharedInfo(data=bytes(PAGE)), lambda: W.shared_info(bytes(PAGE))),
    "tsc": (records.X86TscInfo(mode=1, khz=2, nsec=3, incarnation=4), lambda: W.tsc_info(1, 2, 3, 4)),
    "vcpu": (BASIC, lambda: W.vcpu_basic(0, bytes(CONTEXT))),
    "xsave": (records.VcpuXsave(vcpu_id=0, context=bytes(16)), lambda: W.vcpu_xsave(0, bytes(16))),
    "hvm context": (records.HvmContext(data=b"x"), lambda: W.hvm_context(b"x")),
    "toolstack": (records.Toolstack(data=b"x"), lambda: W.toolstack(b"x")),
    "dirty": (records.CheckpointDirtyPfnList(data=bytes(8)), lambda: W.dirty_pfns([0])),
    "verify": (records.Verify(), W.verify),
    "end": (records.End(), W.end),
}
FULL = ["pv info", "cpuid", "static end", "frames", "pages", "tsc", "shared", "vcpu", "xsave", "verify", "end"]


def in_oracle(names: list[str]) -> Reading:
    pieces = [W.image_header(), W.domain_header(), *(POOL[name][1]() for name in names)]
    return read(one_chunk(bytes(Stream(pieces))), collect=True)


def first_refused(names: list[str]) -> tuple[int, StreamError] | None:
    writer = Writer()
    written(writer)
    for name in names:
        before = writer.offset
        try:
            give(writer, POOL[name][0])
        except StreamError as e:
            assert writer.offset == before, "bytes were counted that were not given"
            with pytest.raises(type(e)):  # it cannot be mended: what came before is already with the reader
                writer.send(records.Verify())
            return before, e
    return None


@given(st.data())
@settings(deadline=None)
def test_writer_raises_exactly_where_the_reader_reports(data: st.DataObject) -> None:
    names = list(FULL)
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(names) - 1))
        change = data.draw(st.sampled_from(["drop", "move", "add"]))
        if change != "add":
            name = names.pop(at)
        if change != "drop":
            name = name if change == "move" else data.draw(st.sampled_from(list(POOL)))
            names.insert(data.draw(st.integers(0, len(names))), name)
        if not names:
            return
    if "end" in names[:-1]:
        del names[names.index("end") + 1 :]  # a reader reads no further
    faults = in_oracle(names).breaches
    faults = [fault for fault in faults if fault.rule is not rules.TRUNCATED]
    refused = first_refused(names)
    if not faults:
        assert refused is None
    else:
        assert refused is not None
        assert refused[0] == refused[1].offset == faults[0].offset
        assert refused[1].reason == faults[0].message
        assert refused[1].record == faults[0].record


def test_writer_records_before_headers_or_after_end_raise_out_of_order() -> None:
    with pytest.raises(OutOfOrder) as e:
        Writer().send(HEAD[0])  # type: ignore[arg-type]
    assert e.value.rule == "record-order"
    twice = Writer()
    twice.start()
    with pytest.raises(OutOfOrder) as e:
        twice.start()
    assert (e.value.rule, e.value.record) == ("record-repeated", "image header")
    writer = Writer()
    written(writer, *[POOL[name][0] for name in FULL])
    assert writer.done
    with pytest.raises(OutOfOrder) as e:
        writer.send(records.Verify())
    assert (e.value.rule, e.value.record) == ("record-order", "VERIFY")


@pytest.mark.parametrize("kind", [Kind.LIBXL, Kind.XL])
def test_writer_records_of_the_other_layer_raise_out_of_order(kind: Kind) -> None:
    """libxl-migration-stream.pandoc: LIBXC_CONTEXT hands it to libxc, END or CHECKPOINT hands it back."""
    full = [POOL[name][0] for name in FULL]

    def refused(*sent: Sent) -> tuple[str | None, str | None]:
        """Write all; return the rule and the record of the error that the last one gives."""
        writer = Writer(kind)
        written(writer, *sent[:-1])
        with pytest.raises(OutOfOrder) as e:
            give(writer, sent[-1])
        return e.value.rule, e.value.record

    assert refused(libxl.LibxlEnd()) == ("record-order", "libxl END")
    assert refused(*full, libxl.LibxcContext()) == ("record-repeated", "libxl LIBXC_CONTEXT")
    assert refused(*full, records.Verify()) == ("record-order", "VERIFY")
    assert refused(*full, libxl.CheckpointEnd()) == ("record-order", "libxl CHECKPOINT_END")
    some, checkpoint = full[:-1], records.Checkpoint()
    assert refused(*some, checkpoint, libxl.LibxlEnd()) == ("record-missing", "libxl END")
    assert refused(*some, checkpoint, records.Verify()) == ("record-order", "VERIFY")
    assert refused(*some, checkpoint, libxl.CheckpointEnd(), libxl.LibxlEnd()) == ("record-order", "libxl END")
    writer = Writer(kind)
    written(writer, *some, checkpoint, libxl.CheckpointEnd(), records.Verify(), records.End(), libxl.LibxlEnd())
    assert writer.done


def test_writer_libxl_record_in_bare_libxc_stream_raises_out_of_order() -> None:
    writer = Writer()
    written(writer)
    with pytest.raises(OutOfOrder) as e:
        writer.send(libxl.LibxlEnd())
    assert (e.value.rule, e.value.record) == ("record-order", "libxl END")


# --- values ----------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, list[Sent], type[StreamError], str]] = [
    ("width", [records.X86PVInfo(guest_width=8, pt_levels=3)], Malformed, "pv-info"),
    ("a value too large", [HEAD[0], records.X86TscInfo(mode=1 << 32, khz=0, nsec=0, incarnation=0)], Malformed,
     "record-size"),
    ("frames too few", [*HEAD[:2], records.X86PVP2MFrames(start_pfn=0, end_pfn=512, raw=bytes(8))], Malformed,
     "record-size"),
    ("pfn beyond", [*HEAD, (entry(LAST + 1, XTAB), [])], Malformed, "pfn-range"),
    ("no entries", [*HEAD, (b"", [])], Malformed, "page-data-count"),
    ("half an entry", [*HEAD, (bytes(12), [])], Malformed, "page-data-count"),
    ("unknown type", [*HEAD, (entry(1, 5), [])], Malformed, "page-type"),
    ("reserved bits", [*HEAD, (entry(1 << 52, XTAB), [])], Malformed, "reserved-zero"),
    ("a page too few", [*HEAD, (entry(1, NOTAB), [])], Malformed, "page-data-size"),
    ("a page too many", [*HEAD, (entry(1, XTAB), [bytes(PAGE)])], Malformed, "page-data-size"),
    ("half a page", [*HEAD, (entry(1, NOTAB), [bytes(100)])], Malformed, "page-data-size"),
    ("shared info", [*HEAD, records.SharedInfo(data=bytes(100))], Malformed, "record-size"),
    ("an empty blob", [*HEAD, (entry(1, XTAB), []), records.VcpuMsrs(vcpu_id=0, context=b"")],
     Malformed, "record-empty"),
    ("a context of the other width", [*HEAD, (entry(1, XTAB), []), records.VcpuBasic(vcpu_id=0, context=bytes(2800))],
     Malformed, "vcpu-size"),
    ("vcpu id", [*HEAD, (entry(1, XTAB), []), records.VcpuXsave(vcpu_id=8192, context=bytes(16))], Malformed,
     "vcpu-id"),
    ("a policy", [HEAD[0], records.MsrPolicy(data=bytes(15))], Malformed, "record-size"),
    ("an unknown record", [framing.Unknown(type=0x80001234)], Unsupported, "record-unknown"),
]  # fmt: skip


@pytest.mark.parametrize(("sent", "error", "rule"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_writer_invalid_record_raises_with_rule_and_offset(
    sent: list[Sent], error: type[StreamError], rule: str
) -> None:
    writer = Writer()
    before = len(written(writer, *sent[:-1]))
    with pytest.raises(error) as e:
        give(writer, sent[-1])
    assert e.value.rule == rule
    assert writer.offset == e.value.offset == before


def test_writer_record_beyond_128_mib_is_malformed() -> None:
    """REC_LENGTH_MAX: 128 MiB, the same MiB of which is enough to see it."""
    writer = Writer()
    written(writer, *HEAD)
    with pytest.raises(Malformed) as e:
        writer.pages(bytes(8 * 128 * 256), [bytes(1 << 20)] * 128)
    assert e.value.rule == "record-length"


def test_libxl_order_checkpoint_end_without_checkpoint_does_not_enter_libxc() -> None:
    """A reader that collects faults goes on with libxl's records, then."""
    order = libxl.LibxlOrder()
    assert [rule for rule, _ in order.check_next(libxl.LibxlType.CHECKPOINT_END)] == [rules.ORDER]
    assert not order.in_libxc


def test_writer_impossible_xen_version_raises() -> None:
    with pytest.raises(Malformed) as e:
        Writer(xen=(4, 5)).start()
    assert e.value.rule == "xen-version"


@pytest.mark.parametrize(
    ("kind", "config", "available"),
    [
        pytest.param(Kind.LIBVIRT, b"", None, id="libvirt"),
        pytest.param(Kind.XENOPSD, b"", None, id="xenopsd"),
        pytest.param(Kind.LIBXC, b"{}", None, id="libxc-with-config"),
        pytest.param(Kind.LIBXL, b"{}", None, id="libxl-with-config"),
        pytest.param(Kind.XL, b"name = 'x'", None, id="xl-config-not-json"),
        pytest.param(Kind.XL, b"{" + bytes(CONFIG_MAX), CONFIG_MAX, id="xl-config-too-long"),
    ],
)
def test_writer_impossible_envelope_raises_request_error(kind: Kind, config: bytes, available: int | None) -> None:
    with pytest.raises(RequestError) as e:
        Writer(kind, config=config)
    assert e.value.available == available


def test_fields_pack_too_large_value_names_the_field() -> None:
    with pytest.raises(OverflowError, match="count 0x100"):
        Fields(count=1, _reserved=1).pack(count=256)


def test_writer_envelopes_equal_those_of_the_oracle() -> None:
    """Headers and all, for a stream as short as can be."""
    names = ["pv info", "static end", "frames", "pages", "shared", "vcpu", "end"]
    inner = Stream([W.image_header(), W.domain_header(), *(POOL[name][1]() for name in names)])
    for kind in KINDS:
        config = CONFIG if kind is Kind.XL else b""
        after: list[Sent] = [] if kind is Kind.LIBXC else [libxl.LibxlEnd()]
        data = written(Writer(kind, config=config), *[POOL[name][0] for name in names], *after)
        assert data == bytes(wrap(inner, str(kind), config=CONFIG + b"\0" if config else None))


def test_writer_import_does_not_import_numpy() -> None:
    code = "import sys, xenpv.stream.writer; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
