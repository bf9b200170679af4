"""Each record's fields come out as they were written, in both byte orders and both versions."""

from __future__ import annotations

import struct
from functools import cache
from typing import TypeVar

import numpy as np
import pytest

from tests.support.stream_reading import Reading, one_chunk, read
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import CPUID_POLICY, MSR_POLICY, Domain
from tests.support.writers.hvm import PARAMS, hvm_context, hvm_stream
from tests.support.writers.stream import NOTAB, PAGE, WITH_DATA, XTAB, Wire
from xenpv.stream import framing, libxl, records
from xenpv.stream.events import DomainHeader, Event, ImageHeader, LibxlHeader
from xenpv.stream.page_data import PageData
from xenpv.stream.record_order import Guest

E = TypeVar("E", bound=Event)
BOTH_ORDERS = pytest.mark.parametrize("big_endian", [False, True], ids=["little", "big"])


def the(reading: Reading, kind: type[E]) -> E:
    """The one event of a type."""
    (event,) = [event for event in reading.events if type(event) is kind]
    return event


@cache
def domain() -> Domain:
    return pv_domain(pfns=range(40), vcpus=2)


@cache
def pv(big_endian: bool = False, version: int = 3) -> Reading:
    # "The endianness shall be 0 (little-endian) for images generated on an i386, x86_64": a big-endian one is a fault,
    # and read for who collects faults. Only the stream's own fields are swapped, not what Xen and the guest wrote.
    stream = domain().to_stream("libxl", big_endian=big_endian, version=version, batch=16)
    return read(one_chunk(bytes(stream)), collect=True)


@BOTH_ORDERS
def test_reader_gives_headers(big_endian: bool) -> None:
    reading = pv(big_endian)
    assert reading.done
    assert len(reading.breaches) == (2 if big_endian else 0)
    assert all("big" in fault.message for fault in reading.breaches)
    assert the(reading, LibxlHeader) == LibxlHeader(0, 2, int(big_endian))
    assert the(reading, ImageHeader) == ImageHeader(24, 3, big_endian)
    assert the(reading, DomainHeader) == DomainHeader(48, Guest.PV, 4, 17)


@BOTH_ORDERS
def test_reader_gives_pv_info_and_p2m_frames(big_endian: bool) -> None:
    info = the(pv(big_endian), records.X86PVInfo)
    assert (info.guest_width, info.pt_levels, info.offset, info.length) == (8, 4, 64, 8)
    frames = the(pv(big_endian), records.X86PVP2MFrames)
    assert (frames.start_pfn, frames.end_pfn) == (0, 40)
    assert frames.p2m_pfns.tolist() == domain().p2m_pfns.tolist()
    assert frames.p2m_pfns.dtype == np.uint64


@BOTH_ORDERS
def test_reader_gives_page_data(big_endian: bool) -> None:
    data = [event for event in pv(big_endian).events if isinstance(event, PageData)]
    pfns, types = np.concatenate([d.pfns for d in data]), np.concatenate([d.types for d in data])
    assert dict(zip(pfns.tolist(), types.tolist(), strict=True)) == domain().types
    assert [d.pages for d in data] == [16, 16, 8]
    assert data[-1].has_data.tolist() == [True] * 8 + [False]
    assert data[-1].types[-1] == XTAB
    assert all(d.pages_offset == d.offset + 16 + 8 * len(d.entries) for d in data)
    assert all(d.entries.dtype == np.uint64 for d in data)


def test_page_data_entries_of_unknown_type_have_no_content() -> None:
    """The pages of a record are matched with its entries by has_data, so the two have to agree whatever comes."""
    wire = Wire()
    for kind in range(16):
        piece = wire.page_data([(0, NOTAB), (1, kind), (2, NOTAB)], [bytes(PAGE)] * (2 + (kind in WITH_DATA)))
        stream = domain().to_stream("libxc", batch=1024).replace("PAGE_DATA", piece)
        data = the(read(one_chunk(bytes(stream)), collect=True), PageData)
        assert data.has_data.tolist() == [True, kind in WITH_DATA, True]
        assert data.pages == 2 + (kind in WITH_DATA)


def test_page_data_last_of_5000_entries_is_checked() -> None:
    """Pages without content may be many to a record: only its length bounds them."""
    last = the(pv(), records.X86PVP2MFrames).end_pfn
    for pfn, message in (
        (last, None),
        (last + 1, f"pfn {last + 1:#x} (index 4999) outside domain maximum {last:#x}"),
        (1 << 52, "reserved bits set in pfn[4999]: 0x10000000000000"),
    ):
        piece = Wire().page_data([*[(0, XTAB)] * 4999, (pfn, XTAB)], [])
        reading = read(one_chunk(bytes(domain().to_stream("libxc").replace("PAGE_DATA", piece))), collect=True)
        assert len(the(reading, PageData).entries) == 5000
        assert [fault.message for fault in reading.breaches] == ([message] if message else [])


@BOTH_ORDERS
def test_reader_gives_vcpu_records(big_endian: bool) -> None:
    expected = {
        records.VcpuBasic: {i: vcpu.tobytes() for i, vcpu in domain().vcpus.items()},
        records.VcpuExtended: domain().extended,
        records.VcpuXsave: domain().xsave,
        records.VcpuMsrs: domain().msrs,
    }
    for kind, blobs in expected.items():
        found = [event for event in pv(big_endian).events if type(event) is kind]
        assert {e.vcpu_id: e.context for e in found if isinstance(e, records.VcpuBlob)} == blobs


@BOTH_ORDERS
def test_reader_gives_tsc_info_and_shared_info(big_endian: bool) -> None:
    tsc = the(pv(big_endian), records.X86TscInfo)
    assert (tsc.mode, tsc.khz, tsc.nsec, tsc.incarnation) == (0, 2_400_000, 10**9, 1)
    assert the(pv(big_endian), records.SharedInfo).data == domain().shared_page


def test_reader_gives_policies() -> None:
    assert the(pv(), records.CpuidPolicy).data == b"".join(struct.pack("<6I", *leaf) for leaf in CPUID_POLICY)
    assert the(pv(), records.MsrPolicy).data == b"".join(struct.pack("<IIQ", *entry) for entry in MSR_POLICY)


def test_reader_version_2_has_no_static_data_records() -> None:
    reading = pv(version=2)
    assert reading.breaches == []
    assert the(reading, ImageHeader).version == 2
    names = set(reading.names)
    assert not names & {"STATIC_DATA_END", "X86_CPUID_POLICY", "X86_MSR_POLICY"}
    assert names == set(pv().names) - {"STATIC_DATA_END", "X86_CPUID_POLICY", "X86_MSR_POLICY"}


def test_reader_32_bit_domain_gives_width_4() -> None:
    domain = pv_domain(width=4, pfns=range(40))
    reading = read(one_chunk(domain.to_bytes("libxc")), collect=True)
    assert reading.breaches == []
    info = the(reading, records.X86PVInfo)
    assert (info.guest_width, info.pt_levels) == (4, 3)
    assert len(the(reading, records.VcpuBasic).context) == 2800


def test_reader_32_bit_p2m_frame_holds_1024_entries() -> None:
    domain = pv_domain(width=4, pfns=[*range(39), 1023, 1024], ballooned=())
    frames = the(read(one_chunk(domain.to_bytes("libxc"))), records.X86PVP2MFrames)
    assert (frames.end_pfn, len(frames.p2m_pfns)) == (1024, 2)


def test_reader_gives_hvm_records() -> None:
    reading = read(one_chunk(bytes(hvm_stream("libxl"))), collect=True)
    assert reading.breaches == []
    assert the(reading, DomainHeader).guest is Guest.HVM
    assert the(reading, records.HvmParams).params == PARAMS
    assert the(reading, records.HvmContext).data == hvm_context()
    context = the(reading, libxl.EmulatorContext)
    assert (context.emulator_id, context.index, context.data[:4]) == (libxl.Emulator.QEMU_UPSTREAM, 0, b"QEVM")
    pairs = the(reading, libxl.EmulatorXenstoreData).pairs
    assert pairs == {"physmap/f0000000/start_addr": "f0000000", "physmap/f0000000/size": "800000"}


def test_reader_gives_checkpoint_state() -> None:
    wire = Wire()
    stream = domain().to_stream("libxl").before("libxl END", wire.checkpoint_state(2))
    assert the(read(one_chunk(bytes(stream))), libxl.CheckpointState).control_id == 2


def test_reader_checkpointed_stream_alternates_between_libxc_and_libxl() -> None:
    reading = read(one_chunk(bytes(domain().to_checkpointed(rounds=2))), collect=True)
    assert reading.done
    assert {fault.rule.name for fault in reading.breaches} == {"checkpointed"}
    names = [name for name in reading.names if name in {"CHECKPOINT", "libxl CHECKPOINT_END", "END", "libxl END"}]
    assert names == ["CHECKPOINT", "libxl CHECKPOINT_END"] * 2 + ["END", "libxl END"]
    assert sum(isinstance(event, ImageHeader) for event in reading.events) == 1
    assert sum(isinstance(event, records.VcpuBasic) for event in reading.events) == 3 * 2


def test_reader_optional_record_gives_unknown_with_type() -> None:
    wire = Wire()
    stream = domain().to_stream("libxl").before("END", wire.record(0x8000_0042, b"12345"))
    unknown = the(read(one_chunk(bytes(stream))), framing.Unknown)
    assert (unknown.type, unknown.length, unknown.name) == (0x8000_0042, 5, "optional record 0x80000042")
    assert unknown.offset == stream.offset("optional record 0x80000042")


def test_reader_events_have_offset_and_length() -> None:
    stream = domain().to_stream("libxl", batch=16)
    events = read(one_chunk(bytes(stream))).events
    assert [event.offset for event in events] == [stream.offset_of(i) for i in range(len(stream))]
    for event, piece in zip(events, stream, strict=True):
        if isinstance(event, framing.Record):
            assert -(-event.length // 8) * 8 == len(piece.data) - 8
