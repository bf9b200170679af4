"""What verify does as a whole: one pass, counts, cut files, pages that come again, huge and hostile inputs."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.breakage import KEEP, UNMAPPED, make_table, page_of, unmap
from tests.support.saved_files import both_ways, flawed, judge, judge_pipe, page_offsets
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import RW, Domain
from tests.support.writers.envelopes import libvirt_header, xenopsd_section
from tests.support.writers.hvm import hvm_stream
from tests.support.writers.stream import PAGE, Piece, Wire
from xenpv.abi.declare import Width
from xenpv.errors import RequestError, StreamError, Unsupported
from xenpv.verify.stream import verify

WIRE = Wire()


# --- one pass --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [8, 4])
def test_all_findings_come_in_one_pass(tmp_path: Path, width: Width) -> None:
    domain = pv_domain(width=width, vcpus=3)
    at = domain.places
    domain.vcpus[0]["gdt_frames"][0] = domain.entries
    domain.vcpus[1]["ctrlreg"][3] = domain.cr3(at.text)
    domain.vcpus[2]["ldt_base"] = 1
    domain.extended[2] = domain.extended[1]
    domain.start_info["store_mfn"] = at.top
    domain.shared_info["arch"]["p2m_generation"] = 5
    del domain.types[at.data[0]], domain.pages[at.data[0]]
    domain.table(domain.tables(1)[0])[500] = domain.entries << 12 | 1
    domain.set_pte(domain.vaddrs[at.top], at.top << 12 | RW | 1)
    make_table(domain, at.data[1], 1)
    stream = domain.to_stream()
    stream.patch("X86_TSC_INFO", 8 + 20, b"\1")
    stream.append(Piece("junk", b"junk"))
    everything = {
        "gdt-frame", "cr3", "vcpu-state", "vcpu-extended", "p2m-generation", "page-missing", "pte-missing", "pte-range",
        "pte-writable", "table-orphan", "reserved-zero", "trailing-data",
    }  # fmt: skip
    for verdict in both_ways(tmp_path, bytes(stream)):
        assert verdict.rules - UNMAPPED == everything, str(verdict)
        assert len([f for f in verdict.found if f.rule.name not in UNMAPPED]) == len(everything)
        assert verdict.report.findings.errors >= 9
        assert verdict.report.findings.warnings >= 3
        assert not verdict.report.ok


MANY_WAYS: dict[str, Callable[[Domain, int], None]] = {}


def many(rule: str) -> Callable[[Callable[[Domain, int], None]], None]:
    def register(spoil: Callable[[Domain, int], None]) -> None:
        MANY_WAYS[rule] = spoil

    return register


@many("pte-range")
def _(domain: Domain, n: int) -> None:
    domain.table(make_table(domain, domain.places.data[0], 1, 8))[:n] = domain.entries << 12 | 1


@many("pte-missing")
def _(domain: Domain, n: int) -> None:
    domain.table(make_table(domain, domain.places.data[0], 1, 8))[:n] = domain.entries - 1 << 12 | 1


@many("pte-writable")
def _(domain: Domain, n: int) -> None:
    domain.table(make_table(domain, domain.places.data[0], 1, 8))[:n] = domain.places.top << 12 | 3


@many("pte-flags")
def _(domain: Domain, n: int) -> None:
    domain.table(make_table(domain, domain.places.data[0], 1, 8))[:n] = domain.places.text << 12 | 0x11


@many("pte-level")
def _(domain: Domain, n: int) -> None:
    domain.table(make_table(domain, domain.places.data[0], 2, 8))[:n] = domain.places.store << 12 | 1


@many("table-orphan")
def _(domain: Domain, n: int) -> None:
    for pfn in domain.places.data[:n]:
        make_table(domain, pfn, 1)


@many("xen-slot")
def _(domain: Domain, n: int) -> None:
    left = n
    for pfn in domain.places.data:
        here = min(left, 16)
        domain.table(make_table(domain, pfn, 4, 8))[256 : 256 + here] = 1 << 12
        left -= here


@many("page-missing")
def _(domain: Domain, n: int) -> None:
    for pfn in domain.places.data[:n]:
        unmap(domain, pfn)
        del domain.pages[pfn], domain.types[pfn]


@many("page-unmapped")
def _(domain: Domain, n: int) -> None:
    for pfn in domain.places.data[:n]:
        domain.p2m_frame(int(domain.p2m_pfns[0]))[pfn] = KEEP


@pytest.mark.parametrize("keep", [0, 3, 35, 36, 200])
@pytest.mark.parametrize("rule", MANY_WAYS)
def test_some_are_kept_and_all_are_counted(tmp_path: Path, rule: str, keep: int) -> None:
    domain = pv_domain()
    MANY_WAYS[rule](domain, 36)
    for verdict in both_ways(tmp_path, domain.to_bytes(), keep=keep):
        assert verdict.rules == {rule}, str(verdict)
        assert len(verdict.report.findings) == 36
        assert len(verdict.found) == min(36, keep)
        assert {r.name: n for r, n in verdict.report.findings.left_out().items()} == (
            {rule: 36 - keep} if keep < 36 else {}
        )


@pytest.mark.parametrize("keep", [5, 14, 15, 29])
def test_frames_of_the_p2m_are_counted_too(tmp_path: Path, keep: int) -> None:
    domain = pv_domain(pfns=[*range(96), 40 * 512])
    domain.p2m_pfns[1:31] = domain.entries + 7
    for verdict in both_ways(tmp_path, domain.to_bytes(), keep=keep):
        assert {rule.name: n for rule, n in verdict.report.findings.count.items()} == {
            "p2m-frame": 30,
            "p2m-anchor": 30,
        }
        assert len(verdict.found) == 2 * keep


def test_the_report_as_json(tmp_path: Path) -> None:
    domain = pv_domain()
    MANY_WAYS["pte-range"](domain, 30)
    domain.shared_info["arch"]["p2m_generation"] = 1
    verdict, _ = both_ways(tmp_path, domain.to_bytes())
    found = json.loads(json.dumps(verdict.report.to_json()))
    assert (found["ok"], found["deep"], found["errors"], found["warnings"]) == (False, True, 31, 0)
    assert found["domain_type"] == "PV"
    assert found["pages"] == len(domain.pages)
    assert found["left_out"] == {"pte-range": 10}
    assert found["file"].endswith("made.save")
    assert len(found["findings"]) == 21
    for told, finding in zip(found["findings"], verdict.found, strict=True):
        place = {name: getattr(finding, name) for name in ("offset", "record", "pfn", "level", "entry", "vcpu")}
        known = {name: value for name, value in place.items() if value is not None}
        assert told == {"rule": finding.rule.name, "severity": "error", "message": finding.message} | known


def test_a_finding_in_words(tmp_path: Path) -> None:
    domain = pv_domain(vcpus=2)
    table = domain.tables(1)[0]
    domain.table(table)[400] = 0xABCDE << 12 | 1
    domain.vcpus[1]["gdt_ents"] = 9999
    words = [str(f) for f in both_ways(tmp_path, domain.to_bytes())[0].found]
    offset = page_offsets(domain.to_stream())[table] + 400 * 8
    basic = domain.to_stream().offset("X86_PV_VCPU_BASIC", 1)
    assert words == [
        f"GDT entry count (9999) out of range (max 7168) (offset {basic:#x}, X86_PV_VCPU_BASIC, vcpu1) [gdt-count]",
        (
            f"L1[400] of pfn {table:#x} (0xabcde001, P) names pfn 0xabcde (absent), beyond the last pfn 0x60 "
            f"(offset {offset:#x}, pfn {table:#x}, L1[400]) [pte-range]"
        ),
    ]


# --- HVM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("envelope", ["xl", "libvirt", "xenopsd", "libxl", "libxc"])
def test_of_hvm_streams_the_framing_is_checked(tmp_path: Path, envelope: str) -> None:
    for verdict in both_ways(tmp_path, bytes(hvm_stream(envelope))):
        assert not verdict.found, str(verdict)
        assert not verdict.report.deep
        assert verdict.report.ok


def test_a_broken_hvm_stream(tmp_path: Path) -> None:
    stream = hvm_stream().drop("HVM_CONTEXT").before("END", WIRE.pv_info())
    for verdict in both_ways(tmp_path, bytes(stream)):
        assert verdict.rules == {"record-missing", "record-misplaced"}, str(verdict)
        assert not verdict.report.deep


# --- what ends early -------------------------------------------------------------------------------------------------


def test_a_file_cut_anywhere_is_told_at_the_record_where_it_ends(tmp_path: Path) -> None:
    stream = pv_domain(vcpus=2).to_stream(batch=16)
    data, at = bytes(stream), 0
    for piece in stream:
        end = at + len(piece.data)
        for cut in {at + 1, at + len(piece.data) // 2, end - 1} - {at}:
            for verdict in both_ways(tmp_path, data[:cut]):
                assert verdict.rules == {"truncated"}, f"{piece.name} cut at {cut:#x}: {verdict}"
                (finding,) = verdict.found
                assert finding.offset is not None
                assert at <= finding.offset <= cut
                assert verdict.report.error is not None
                assert verdict.report.error.offset == finding.offset
                assert not verdict.report.ok
        at = end


def test_a_cut_file_tells_what_was_found_before_the_cut(tmp_path: Path) -> None:
    stream, flaw = flawed()
    for cut in (stream.offset("PAGE_DATA", 3), stream.offset("SHARED_INFO") + 5, stream.offset("END") + 3):
        for verdict in both_ways(tmp_path, bytes(stream)[:cut]):
            assert verdict.rules == {"truncated", "pte-range"}, str(verdict)
            assert verdict.of("pte-range")[0].offset == flaw
            assert verdict.report.deep


def test_content_of_which_nobody_knows_whose_it_is(tmp_path: Path) -> None:
    """A PAGE_DATA with a page less than it names: which it is that is missing, nobody can say."""
    domain = pv_domain()
    stream = domain.to_stream(batch=16)
    name_at = stream.find("PAGE_DATA")
    old = stream[name_at].data
    length = int.from_bytes(old[4:8], "little") - PAGE
    stream[name_at] = Piece("PAGE_DATA", old[:4] + length.to_bytes(4, "little") + old[8 : len(old) - PAGE])
    tables = [pfn for pfn in range(16) if domain.is_table(pfn)]
    for verdict in both_ways(tmp_path, bytes(stream)):
        assert "page-data-size" in verdict.rules
        assert [f.pfn for f in sorted(verdict.of("table-content"), key=page_of)] == tables
        assert all(f.level == domain.types[f.pfn or 0] & 7 for f in verdict.of("table-content"))


@pytest.mark.parametrize("data", [b"", b"\x1f\x8b\x08" + bytes(40), b"junk" * 20])
def test_what_is_no_stream_raises(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "none"
    file.write_bytes(data)
    for deep in (True, False):
        with pytest.raises(Unsupported):
            judge(file, deep=deep)
        with pytest.raises(Unsupported):
            judge_pipe(data, deep=deep)


def test_a_stream_that_cannot_be_read_is_not_good_after_mere_warnings(tmp_path: Path) -> None:
    """A reserved field that is set is a warning; the legacy stream behind it is what matters."""
    file = tmp_path / "legacy"
    file.write_bytes(libvirt_header(version=1, unused=b"\1" + bytes(39)).data + bytes(100))
    with pytest.raises(StreamError, match="legacy"):
        judge(file)
    file.write_bytes(b"XenSavedDomv2-\n" + xenopsd_section(0xF2, bytes(16)).data)
    with pytest.raises(StreamError, match="legacy"):
        judge(file)


def test_paths_that_cannot_be_opened(tmp_path: Path) -> None:
    for path, why in ((tmp_path, "is a directory"), (tmp_path / "nothing", "No such file")):
        with pytest.raises(RequestError, match=why):
            verify(str(path))


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    good = pv_domain().to_bytes()
    before = len(os.listdir("/proc/self/fd"))
    for data in (good, good[:5000], b"", b"\x1f\x8b", b"junk" * 100):
        for deep in (True, False):
            with contextlib.suppress(Unsupported):
                both_ways(tmp_path, data, deep=deep)
            with contextlib.suppress(Unsupported):
                judge_pipe(data, deep=deep)
    with pytest.raises(RequestError):
        verify(str(tmp_path))
    assert len(os.listdir("/proc/self/fd")) == before
