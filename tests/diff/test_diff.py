"""diff finds all that differs between two domains, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.saved_files import piped
from tests.support.saving import saved, suspended
from tests.support.writers.build import pv_domain
from tests.support.writers.core import core_of
from tests.support.writers.domain import Domain
from tests.support.writers.envelopes import config_json
from tests.support.writers.hvm import hvm_stream
from tests.support.writers.stream import XALLOC
from xenpv.diff.diff import Difference, diff
from xenpv.diff.fields import differing_ranges
from xenpv.errors import RequestError
from xenpv.io.stream_input import Input
from xenpv.source.live import LiveDomain
from xenpv.source.open import open_domain
from xenpv.source.saved import SavedDomain


@pytest.fixture
def domains() -> tuple[Domain, Domain]:
    return pv_domain(pfns=range(96), vcpus=2), pv_domain(pfns=range(96), vcpus=2)


def diff_streams(folder: Path, a: bytes, b: bytes, **options: Any) -> Difference:
    paths = folder / "a", folder / "b"
    for path, data in zip(paths, (a, b), strict=True):
        path.write_bytes(data)
    with SavedDomain.open(str(paths[0])) as first, SavedDomain.open(str(paths[1])) as second:
        difference = diff(first, second, **options)
        reverse = diff(second, first, **options)
    assert difference.same == reverse.same
    assert [page.pfn for page in difference.first] == [page.pfn for page in reverse.first]
    assert [(f.where, f.name, f.a, f.b) for f in difference.fields] == [
        (f.where, f.name, f.b, f.a) for f in reverse.fields
    ]
    return difference


def diff_domains(folder: Path, domains: tuple[Domain, Domain], **options: Any) -> Difference:
    return diff_streams(folder, *(domain.to_bytes() for domain in domains), **options)


def test_diff_same_domain_in_other_envelopes_and_batches_is_same(
    domains: tuple[Domain, Domain], tmp_path: Path
) -> None:
    difference = diff_domains(tmp_path, domains)
    assert difference.same
    assert difference.compared == len(domains[0].pages)
    difference = diff_streams(tmp_path, domains[0].to_bytes("xl"), domains[1].to_bytes("xl", batch=7))
    assert difference.same
    difference = diff_streams(tmp_path, domains[0].to_bytes("libxc"), domains[1].to_bytes("libxl", version=2))
    assert {f.where for f in difference.fields} == {"stream", "X86_CPUID_POLICY", "X86_MSR_POLICY"}
    assert not difference.differ


def test_diff_changed_pages_are_counted_with_kind_and_ranges(domains: tuple[Domain, Domain], tmp_path: Path) -> None:
    second = domains[1]
    data = second.places.data[:5]
    for pfn in data:
        second.pages[pfn][10:12] = bytes(b ^ 1 for b in second.pages[pfn][10:12])
        second.pages[pfn][4095] ^= 0x80
    table = second.tables(1)[0]
    second.table(table)[511] = 0x1234 << 12
    difference = diff_domains(tmp_path, domains, keep=4)
    assert (difference.differ, difference.kinds) == (6, {"data": 5, "page table": 1})
    expected = sorted([*data, table])[:4]
    assert [page.pfn for page in difference.first] == expected
    page = next(page for page in difference.first if page.pfn in data)
    assert (page.type, page.kind, page.ranges) == ("NOTAB", "data", [(10, 12), (4095, 4096)])
    assert not difference.types
    assert not difference.fields


def test_diff_changed_p2m_frame_has_kind_p2m(domains: tuple[Domain, Domain], tmp_path: Path) -> None:
    leaf = domains[1].places.p2m[0]
    domains[1].p2m_frame(leaf)[3] += 1
    assert diff_domains(tmp_path, domains).kinds == {"p2m": 1}


def test_diff_changed_page_types_are_counted_by_pair(domains: tuple[Domain, Domain], tmp_path: Path) -> None:
    second = domains[1]
    absent, empty = second.places.data[0], second.places.data[1:4]
    del second.types[absent], second.pages[absent]
    for pfn in empty:
        second.types[pfn] = XALLOC
    difference = diff_domains(tmp_path, domains)
    assert [(t.a, t.b, t.pages, t.first) for t in difference.types] == [
        ("NOTAB", "XALLOC", 3, empty),
        ("NOTAB", "absent", 1, [absent]),
    ]
    assert difference.compared == len(second.pages) - 3
    assert not difference.differ


def test_diff_changed_record_fields_are_named(domains: tuple[Domain, Domain], tmp_path: Path) -> None:
    second = domains[1]
    second.vcpus[1]["user_regs"]["rip"] += 8
    second.vcpus[0]["trap_ctxt"][14]["address"] += 1
    second.shared_info["vcpu_info"][3]["time"]["system_time"] = 77
    second.start_info["nr_pages"] += 1
    second.msr_policy[0] = (0xCE, 0, 5)
    difference = diff_domains(tmp_path, domains)
    assert [(f.where, f.name) for f in difference.fields] == [
        ("X86_MSR_POLICY", "bytes 0x8 to 0x8"),
        ("X86_MSR_POLICY", "bytes 0xb to 0xb"),
        ("start info", "nr_pages"),
        ("shared info", "vcpu_info[3].time.system_time"),
        ("vcpu0", "trap_ctxt[14].address"),
        ("vcpu1", "user_regs.rip"),
    ]
    (rip,) = [f for f in difference.fields if f.name.endswith("rip")]
    assert int(rip.b, 0) == int(rip.a, 0) + 8
    assert difference.differ == 1  # start info is a page, too


def test_diff_records_of_one_domain_only_are_absent_in_the_other(
    domains: tuple[Domain, Domain], tmp_path: Path
) -> None:
    second = domains[1]
    del second.vcpus[1]
    second.xsave.clear()
    second.entries += 1
    difference = diff_domains(tmp_path, domains)
    assert ("vcpu1", "", "present", "absent") in [(f.where, f.name, f.a, f.b) for f in difference.fields]
    assert "entries" in {f.name for f in difference.fields if f.where == "p2m"}


@pytest.mark.parametrize("unreadable", [(1,), (0, 1)], ids=["one", "both"])
def test_diff_unreadable_start_info_is_a_difference(
    unreadable: tuple[int, ...], domains: tuple[Domain, Domain], tmp_path: Path
) -> None:
    for i in unreadable:
        domains[i].vcpus[0]["user_regs"]["rdx"] = 0x123_4567
    (field,) = [f for f in diff_domains(tmp_path, domains).fields if f.where == "start info"]
    assert ["0x1234567" in value for value in (field.a, field.b)] == [i in unreadable for i in (0, 1)]


def test_diff_hvm_domains_compares_params_and_context(tmp_path: Path) -> None:
    first, second = hvm_stream("xl"), hvm_stream("xl", pages=12)
    assert diff_streams(tmp_path, bytes(first), bytes(hvm_stream("xl"))).same
    difference = diff_streams(tmp_path, bytes(first), bytes(second))
    assert {(t.a, t.b): t.pages for t in difference.types} == {
        ("NOTAB", "XALLOC"): 1,
        ("NOTAB", "absent"): 3,
        ("XALLOC", "absent"): 1,
    }
    second = hvm_stream("xl").patch("HVM_PARAMS", 8 + 8 + 8, b"\1").patch("HVM_CONTEXT", 20, b"!")
    assert {f.where for f in diff_streams(tmp_path, bytes(first), bytes(second)).fields} == {
        "HVM_PARAMS",
        "HVM_CONTEXT",
    }
    difference = diff_streams(tmp_path, bytes(first), pv_domain().to_bytes())
    assert [(f.where, f.a, f.b) for f in difference.fields] == [("domain", "HVM, 64 bits", "PV, 64 bits")]


def test_diff_other_configuration_is_reported(domains: tuple[Domain, Domain], tmp_path: Path) -> None:
    config = config_json(name="else") + b"\0"
    difference = diff_streams(tmp_path, domains[0].to_bytes(), bytes(domains[1].to_stream(config=config)))
    assert {f.where for f in difference.fields} == {"configuration"}


def test_diff_compares_every_kind_of_record(domains: tuple[Domain, Domain], tmp_path: Path) -> None:
    second = domains[1]
    for kind in (second.extended, second.xsave, second.msrs):
        kind[0] = bytes(32)
        domains[0].__dict__[next(name for name, value in vars(second).items() if value is kind)][0] = bytes(31) + b"!"
    stream = second.to_stream().patch("X86_TSC_INFO", 8 + 8, b"\1\2\3")
    difference = diff_streams(tmp_path, domains[0].to_bytes(), bytes(stream))
    assert {f"{f.where} {f.name}" for f in difference.fields} == {
        "X86_TSC_INFO nsec",
        *(f"vcpu0 {kind} bytes 0x1f to 0x1f" for kind in ("extended", "xsave", "msrs")),
    }


def test_diff_suspended_domain_and_its_save_file_differ_only_in_start_info_register(tmp_path: Path) -> None:
    """The domain has suspended: rdx has its start info's mfn, and in the file the pfn."""
    guest = suspended("linear")
    saved(guest, tmp_path / "saved")
    live = LiveDomain(guest.host, guest.host.info(guest.domid))
    with SavedDomain.open(str(tmp_path / "saved")) as file:
        difference = diff(live, file)
        assert [(f.where, f.name) for f in difference.fields] == [("vcpu0", "rdx")]
        assert (difference.differ, difference.types) == (0, [])
        assert difference.compared == guest.host.info(guest.domid).pages
    assert diff(live, live).same


def test_diff_core_and_save_file_compares_pages_and_registers(domains: tuple[Domain, Domain], tmp_path: Path) -> None:
    core, file = tmp_path / "core", tmp_path / "file"
    core.write_bytes(bytes(core_of(domains[0])))
    pfn = domains[1].places.data[0]
    domains[1].pages[pfn][0] ^= 1
    domains[1].vcpus[0]["user_regs"]["rbx"] ^= 1
    file.write_bytes(domains[1].to_bytes())
    with open_domain(str(core)) as first, open_domain(str(file)) as second:
        difference = diff(first, second)
    assert pfn in [page.pfn for page in difference.first]
    assert ("vcpu0", "rbx") in [(f.where, f.name) for f in difference.fields]


def test_diff_pipe_raises_request_error(domains: tuple[Domain, Domain], tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(domains[0].to_bytes())
    with (
        piped(domains[1].to_bytes()) as fd,
        SavedDomain.open(str(path)) as first,
        SavedDomain.from_source(Input(os.dup(fd), "pipe")) as second,
        pytest.raises(RequestError),
    ):
        diff(first, second)


def test_differing_ranges_are_maximal() -> None:
    assert differing_ranges(b"", b"") == []
    assert differing_ranges(b"abc", b"abc") == []
    assert differing_ranges(b"abc", b"xbz") == [(0, 1), (2, 3)]
    assert differing_ranges(b"abcd", b"axyd") == [(1, 3)]
