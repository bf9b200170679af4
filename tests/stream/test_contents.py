"""Contents gathers what a stream held: each part, the last of what may come again, and how all of it lay."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.stream_breaches import BREACHES, Breach
from tests.support.stream_reading import one_chunk, read
from tests.support.writers.build import pv_domain
from tests.support.writers.hvm import PARAMS, hvm_stream
from tests.support.writers.stream import NOTAB, PAGE, XTAB, Stream, Wire
from xenpv.frames import NO_FRAME
from xenpv.stream.contents import Contents
from xenpv.stream.envelope import Kind, Section
from xenpv.stream.page_data import PageData
from xenpv.stream.record_order import Guest

W = Wire()


def contents_of(stream: Stream, *, pages: bool = False) -> Contents:
    contents = Contents()
    for event in read(one_chunk(bytes(stream)), collect=True, pages=pages).events:
        contents.add(event)
    return contents


def test_contents_pv_stream_has_all_records() -> None:
    domain = pv_domain(vcpus=3)
    stream = domain.to_stream("xl")
    found = contents_of(stream)
    assert found.complete
    assert found.envelope is not None
    assert found.envelope.kind is Kind.XL
    assert found.image is not None
    assert found.image.version == 3
    assert found.domain is not None
    assert (found.domain.guest, found.domain.xen_major) == (Guest.PV, 4)
    assert found.width == 8
    assert found.end_pfn == domain.entries - 1
    assert found.p2m_frames.tolist() == domain.p2m_pfns.tolist()
    assert found.index.count() == dict(zip(*np.unique([*domain.types.values()], return_counts=True), strict=True))
    assert found.shared_info is not None
    assert found.shared_info.data == domain.shared_page
    assert found.tsc is not None
    assert found.cpuid_policy is not None
    assert found.msr_policy is not None
    assert sorted(found.vcpus) == [0, 1, 2]
    for i, vcpu in found.vcpus.items():
        for record, blob in (
            (vcpu.basic, domain.vcpus[i].tobytes()),
            (vcpu.extended, domain.extended[i]),
            (vcpu.xsave, domain.xsave[i]),
            (vcpu.msrs, domain.msrs[i]),
        ):
            assert record is not None
            assert record.context == blob


def test_contents_index_gives_offset_of_page_content() -> None:
    domain = pv_domain()
    data = domain.to_bytes("libvirt")
    found = contents_of(domain.to_stream("libvirt"), pages=True)
    for pfn, page in domain.pages.items():
        offset = int(found.index.offsets(np.array([pfn], np.uint64))[0])
        assert data[offset : offset + PAGE] == page


def test_contents_record_groups_list_records_in_order() -> None:
    stream = pv_domain().to_stream("libxl", batch=10)
    found = contents_of(stream)
    names = list(dict.fromkeys(piece.name for piece in stream))  # PAGE_DATA in a row are one
    assert [run.name for run in found.record_groups] == names
    assert [run.offset for run in found.record_groups] == [stream.offset(name) for name in names]
    (data,) = [run for run in found.record_groups if run.name == "PAGE_DATA"]
    assert (data.count, data.pages) == (10, 96)


def test_contents_hvm_stream_has_params_context_and_emulators() -> None:
    found = contents_of(hvm_stream("xenopsd"))
    assert found.domain is not None
    assert found.domain.guest is Guest.HVM
    assert found.hvm_params is not None
    assert found.hvm_params.params == PARAMS
    assert found.hvm_context is not None
    assert [section.section for section in found.sections][0::2] == [Section.XENOPS, Section.QEMU_XEN]
    assert [record.type_name() for record in contents_of(hvm_stream("libxl")).emulators] == [
        "libxl EMULATOR_XENSTORE_DATA",
        "libxl EMULATOR_CONTEXT",
    ]


def test_contents_repeated_records_keep_the_last() -> None:
    domain = pv_domain()
    stream = domain.to_stream("libxc")
    later = bytes(len(domain.vcpus[0].tobytes()))
    stream.before("END", W.page_data([(3, XTAB), (4, NOTAB)], [bytes(PAGE)]), W.vcpu_basic(0, later))
    stream.before("X86_TSC_INFO", W.p2m_frames(0, 96, [77]))
    found = contents_of(stream)
    assert found.index.types(np.array([3, 4], np.uint64)).tolist() == [XTAB, NOTAB]
    assert int(found.index.offsets(np.array([4], np.uint64))[0]) == stream.offset("PAGE_DATA", -1) + 32
    assert found.vcpus[0].basic is not None
    assert found.vcpus[0].basic.context == later
    assert found.p2m_frames.tolist() == [77]


def test_contents_second_p2m_frames_extends_the_p2m() -> None:
    """expand_p2m(): "liable to expand multiple times if the domain grows on the sending side"."""
    stream = pv_domain().to_stream("libxc").before("X86_TSC_INFO", W.p2m_frames(1024, 1535, [9]))
    found = contents_of(stream)
    assert found.end_pfn == 1535
    first = int(pv_domain().p2m_pfns[0])
    assert found.p2m_frames.tolist() == [first, int(NO_FRAME), 9]


def test_contents_second_pv_info_is_ignored() -> None:
    domain = pv_domain()
    stream = domain.to_stream("libxc").before("SHARED_INFO", W.pv_info(4, 3))
    found = contents_of(stream)
    assert found.width == 8
    assert found.vcpus[0].basic is not None
    assert len(found.vcpus[0].basic.context) == 5168


def test_contents_vcpu_context_before_pv_info_of_another_width_is_dropped() -> None:
    for width, kept in ((8, True), (4, False)):
        stream = pv_domain().to_stream("libxc")
        info = W.pv_info(width, 4 if width == 8 else 3)
        found = contents_of(stream.drop("X86_PV_INFO").before("END", info))
        assert (found.vcpus[0].basic is not None) == kept


@pytest.mark.parametrize("breach", BREACHES, ids=lambda b: f"{b.rule.name}:{b.id}")
def test_contents_malformed_stream_keeps_the_other_records(breach: Breach) -> None:
    reading = read(one_chunk(bytes(breach.stream())), collect=True, pages=True)
    found = Contents()
    for event in reading.events:
        found.add(event)
    assert found.complete == ("END" in reading.names)
    assert found.index.sent == sum(len(e.entries) for e in reading.events if isinstance(e, PageData))
