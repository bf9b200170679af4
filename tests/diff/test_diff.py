"""What differs between two domains is found, all of it, and nothing else."""

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
from xenpv.diff.fields import ranges
from xenpv.errors import RequestError
from xenpv.io.stream_input import Input
from xenpv.source.live import LiveDomain
from xenpv.source.open import open_domain
from xenpv.source.saved import SavedDomain


@pytest.fixture
def two() -> tuple[Domain, Domain]:
    return pv_domain(pfns=range(96), vcpus=2), pv_domain(pfns=range(96), vcpus=2)


def compared(folder: Path, a: bytes, b: bytes, **how: Any) -> Difference:
    paths = folder / "a", folder / "b"
    for path, data in zip(paths, (a, b), strict=True):
        path.write_bytes(data)
    with SavedDomain.open(str(paths[0])) as one, SavedDomain.open(str(paths[1])) as other:
        found = diff(one, other, **how)
        back = diff(other, one, **how)
    assert found.same == back.same
    assert [page.pfn for page in found.first] == [page.pfn for page in back.first]
    assert [(f.where, f.name, f.a, f.b) for f in found.fields] == [(f.where, f.name, f.b, f.a) for f in back.fields]
    return found


def of(folder: Path, two: tuple[Domain, Domain], **how: Any) -> Difference:
    return compared(folder, *(domain.to_bytes() for domain in two), **how)


def test_the_same_is_the_same_however_it_is_wrapped_and_cut(two: tuple[Domain, Domain], tmp_path: Path) -> None:
    found = of(tmp_path, two)
    assert found.same
    assert found.compared == len(two[0].pages)
    found = compared(tmp_path, two[0].to_bytes("xl"), two[1].to_bytes("xl", batch=7))
    assert found.same
    found = compared(tmp_path, two[0].to_bytes("libxc"), two[1].to_bytes("libxl", version=2))
    assert {f.where for f in found.fields} == {"stream", "X86_CPUID_POLICY", "X86_MSR_POLICY"}
    assert not found.differ


def test_pages_and_the_bytes_of_them(two: tuple[Domain, Domain], tmp_path: Path) -> None:
    other = two[1]
    data = other.places.data[:5]
    for pfn in data:
        other.pages[pfn][10:12] = bytes(b ^ 1 for b in other.pages[pfn][10:12])
        other.pages[pfn][4095] ^= 0x80
    table = other.tables(1)[0]
    other.table(table)[511] = 0x1234 << 12
    found = of(tmp_path, two, keep=4)
    assert (found.differ, found.kinds) == (6, {"data": 5, "page table": 1})
    expected = sorted([*data, table])[:4]
    assert [page.pfn for page in found.first] == expected
    page = next(page for page in found.first if page.pfn in data)
    assert (page.type, page.what, page.ranges) == ("NOTAB", "data", [(10, 12), (4095, 4096)])
    assert not found.types
    assert not found.fields


def test_the_p2m_is_told_from_the_rest(two: tuple[Domain, Domain], tmp_path: Path) -> None:
    leaf = two[1].places.p2m[0]
    two[1].p2m_frame(leaf)[3] += 1
    assert of(tmp_path, two).kinds == {"p2m": 1}


def test_types(two: tuple[Domain, Domain], tmp_path: Path) -> None:
    other = two[1]
    gone, empty = other.places.data[0], other.places.data[1:4]
    del other.types[gone], other.pages[gone]
    for pfn in empty:
        other.types[pfn] = XALLOC
    found = of(tmp_path, two)
    assert [(t.a, t.b, t.pages, t.first) for t in found.types] == [
        ("NOTAB", "XALLOC", 3, empty),
        ("NOTAB", "absent", 1, [gone]),
    ]
    assert found.compared == len(other.pages) - 3
    assert not found.differ


def test_fields_of_records_by_their_names(two: tuple[Domain, Domain], tmp_path: Path) -> None:
    other = two[1]
    other.vcpus[1]["user_regs"]["rip"] += 8
    other.vcpus[0]["trap_ctxt"][14]["address"] += 1
    other.shared_info["vcpu_info"][3]["time"]["system_time"] = 77
    other.start_info["nr_pages"] += 1
    other.msr_policy[0] = (0xCE, 0, 5)
    found = of(tmp_path, two)
    assert [(f.where, f.name) for f in found.fields] == [
        ("X86_MSR_POLICY", "bytes 0x8 to 0x8"),
        ("X86_MSR_POLICY", "bytes 0xb to 0xb"),
        ("start info", "nr_pages"),
        ("shared info", "vcpu_info[3].time.system_time"),
        ("vcpu0", "trap_ctxt[14].address"),
        ("vcpu1", "user_regs.rip"),
    ]
    (rip,) = [f for f in found.fields if f.name.endswith("rip")]
    assert int(rip.b, 0) == int(rip.a, 0) + 8
    assert found.differ == 1  # start info is a page, too


def test_what_only_one_has(two: tuple[Domain, Domain], tmp_path: Path) -> None:
    other = two[1]
    del other.vcpus[1]
    other.xsave.clear()
    other.entries += 1
    found = of(tmp_path, two)
    assert ("vcpu1", "", "present", "absent") in [(f.where, f.name, f.a, f.b) for f in found.fields]
    assert "entries" in {f.name for f in found.fields if f.where == "p2m"}


def test_hvm(tmp_path: Path) -> None:
    one, other = hvm_stream("xl"), hvm_stream("xl", pages=12)
    assert compared(tmp_path, bytes(one), bytes(hvm_stream("xl"))).same
    found = compared(tmp_path, bytes(one), bytes(other))
    assert {(t.a, t.b): t.pages for t in found.types} == {
        ("NOTAB", "XALLOC"): 1,
        ("NOTAB", "absent"): 3,
        ("XALLOC", "absent"): 1,
    }
    other = hvm_stream("xl").patch("HVM_PARAMS", 8 + 8 + 8, b"\1").patch("HVM_CONTEXT", 20, b"!")
    assert {f.where for f in compared(tmp_path, bytes(one), bytes(other)).fields} == {"HVM_PARAMS", "HVM_CONTEXT"}
    found = compared(tmp_path, bytes(one), pv_domain().to_bytes())
    assert [(f.where, f.a, f.b) for f in found.fields] == [("domain", "HVM, 64 bits", "PV, 64 bits")]


def test_the_configuration(two: tuple[Domain, Domain], tmp_path: Path) -> None:
    config = config_json(name="else") + b"\0"
    found = compared(tmp_path, two[0].to_bytes(), bytes(two[1].to_stream(config=config)))
    assert {f.where for f in found.fields} == {"configuration"}


def test_every_record_is_looked_at(two: tuple[Domain, Domain], tmp_path: Path) -> None:
    other = two[1]
    for kind in (other.extended, other.xsave, other.msrs):
        kind[0] = bytes(32)
        two[0].__dict__[next(name for name, value in vars(other).items() if value is kind)][0] = bytes(31) + b"!"
    stream = other.to_stream().patch("X86_TSC_INFO", 8 + 8, b"\1\2\3")
    found = compared(tmp_path, two[0].to_bytes(), bytes(stream))
    assert {f"{f.where} {f.name}" for f in found.fields} == {
        "X86_TSC_INFO nsec",
        *(f"vcpu0 {kind} bytes 0x1f to 0x1f" for kind in ("extended", "xsave", "msrs")),
    }


def test_a_running_domain_and_its_file(tmp_path: Path) -> None:
    """The domain has suspended: rdx has its start info's mfn, and in the file the pfn."""
    guest = suspended("linear")
    saved(guest, tmp_path / "saved")
    live = LiveDomain(guest.host, guest.host.info(guest.domid))
    with SavedDomain.open(str(tmp_path / "saved")) as file:
        found = diff(live, file)
        assert [(f.where, f.name) for f in found.fields] == [("vcpu0", "rdx")]
        assert (found.differ, found.types) == (0, [])
        assert found.compared == guest.host.info(guest.domid).pages
    assert diff(live, live).same


def test_a_core_and_a_save_file(two: tuple[Domain, Domain], tmp_path: Path) -> None:
    core, file = tmp_path / "core", tmp_path / "file"
    core.write_bytes(bytes(core_of(two[0])))
    pfn = two[1].places.data[0]
    two[1].pages[pfn][0] ^= 1
    two[1].vcpus[0]["user_regs"]["rbx"] ^= 1
    file.write_bytes(two[1].to_bytes())
    with open_domain(str(core)) as one, open_domain(str(file)) as other:
        found = diff(one, other)
    assert pfn in [page.pfn for page in found.first]
    assert ("vcpu0", "rbx") in [(f.where, f.name) for f in found.fields]


def test_a_pipe_is_refused(two: tuple[Domain, Domain], tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(two[0].to_bytes())
    with (
        piped(two[1].to_bytes()) as fd,
        SavedDomain.open(str(path)) as one,
        SavedDomain.of(Input(os.dup(fd), "pipe")) as other,
        pytest.raises(RequestError, match="passes once"),
    ):
        diff(one, other)


def test_ranges() -> None:
    assert ranges(b"", b"") == []
    assert ranges(b"abc", b"abc") == []
    assert ranges(b"abc", b"xbz") == [(0, 1), (2, 3)]
    assert ranges(b"abcd", b"axyd") == [(1, 3)]
