"""What verify does as a whole: one pass, counts, cut files, pages that come again, huge and hostile inputs."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.breakage import KEEP, UNMAPPED, make_table, page_of, unmap
from tests.support.saved_files import (
    page_offsets,
    stream_with_bad_entry,
    verify_file,
    verify_file_and_pipe,
    verify_pipe,
)
from tests.support.saving import BOTH
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import RW, Domain
from tests.support.writers.envelopes import libvirt_header, xenopsd_section
from tests.support.writers.hvm import hvm_stream
from tests.support.writers.stream import PAGE, Piece, Wire
from xenpv.abi.declare import Width
from xenpv.errors import RequestError, Unsupported
from xenpv.frames import PAGES_PER_BATCH, U8, U64
from xenpv.source.saved import FilePages
from xenpv.verify import rules
from xenpv.verify.stream import verify

WIRE = Wire()


# --- one pass --------------------------------------------------------------------------------------------------------


@BOTH
def test_verify_reports_all_findings_in_one_pass(tmp_path: Path, width: Width) -> None:
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
        "gdt-frame", "cr3", "vcpu-state", "vcpu-extended", "start-info-frames", "p2m-generation", "page-missing",
        "pte-missing", "pte-range", "pte-writable", "table-orphan", "reserved-zero", "trailing-data",
    }  # fmt: skip
    for result in verify_file_and_pipe(tmp_path, bytes(stream)):
        assert result.rules - UNMAPPED == everything, str(result)
        assert len([f for f in result.findings if f.rule.name not in UNMAPPED]) == len(everything)
        assert result.report.findings.errors >= 9
        assert result.report.findings.warnings >= 3
        assert not result.report.ok


REPEATED_BREACHES: dict[str, Callable[[Domain, int], None]] = {}


def repeated(rule: str) -> Callable[[Callable[[Domain, int], None]], None]:
    def register(spoil: Callable[[Domain, int], None]) -> None:
        REPEATED_BREACHES[rule] = spoil

    return register


@repeated("pte-range")
def _(domain: Domain, n: int) -> None:
    domain.table(make_table(domain, domain.places.data[0], 1, 8))[:n] = domain.entries << 12 | 1


@repeated("pte-missing")
def _(domain: Domain, n: int) -> None:
    domain.table(make_table(domain, domain.places.data[0], 1, 8))[:n] = domain.entries - 1 << 12 | 1


@repeated("pte-writable")
def _(domain: Domain, n: int) -> None:
    domain.table(make_table(domain, domain.places.data[0], 1, 8))[:n] = domain.places.top << 12 | 3


@repeated("pte-flags")
def _(domain: Domain, n: int) -> None:
    domain.table(make_table(domain, domain.places.data[0], 1, 8))[:n] = domain.places.text << 12 | 0x11


@repeated("pte-level")
def _(domain: Domain, n: int) -> None:
    domain.table(make_table(domain, domain.places.data[0], 2, 8))[:n] = domain.places.store << 12 | 1


@repeated("table-orphan")
def _(domain: Domain, n: int) -> None:
    for pfn in domain.places.data[:n]:
        make_table(domain, pfn, 1)


@repeated("xen-slot")
def _(domain: Domain, n: int) -> None:
    remaining = n
    for pfn in domain.places.data:
        slots = min(remaining, 16)
        domain.table(make_table(domain, pfn, 4, 8))[256 : 256 + slots] = 1 << 12
        remaining -= slots


@repeated("page-missing")
def _(domain: Domain, n: int) -> None:
    for pfn in domain.places.data[:n]:
        unmap(domain, pfn)
        del domain.pages[pfn], domain.types[pfn]


@repeated("page-unmapped")
def _(domain: Domain, n: int) -> None:
    for pfn in domain.places.data[:n]:
        domain.p2m_frame(int(domain.p2m_pfns[0]))[pfn] = KEEP


@pytest.mark.parametrize("keep", [0, 3, 35, 36, 200])
@pytest.mark.parametrize("rule", REPEATED_BREACHES)
def test_verify_keeps_some_findings_and_counts_all(tmp_path: Path, rule: str, keep: int) -> None:
    domain = pv_domain()
    REPEATED_BREACHES[rule](domain, 36)
    for result in verify_file_and_pipe(tmp_path, domain.to_bytes(), keep=keep):
        assert result.rules == {rule}, str(result)
        assert len(result.report.findings) == 36
        assert len(result.findings) == min(36, keep)
        assert {r.name: n for r, n in result.report.findings.omitted().items()} == (
            {rule: 36 - keep} if keep < 36 else {}
        )


@pytest.mark.parametrize("keep", [5, 14, 15, 29])
def test_verify_keeps_some_p2m_findings_and_counts_all(tmp_path: Path, keep: int) -> None:
    domain = pv_domain(pfns=[*range(96), 40 * 512])
    domain.p2m_pfns[1:31] = domain.entries + 7
    for result in verify_file_and_pipe(tmp_path, domain.to_bytes(), keep=keep):
        assert {rule.name: n for rule, n in result.report.findings.count.items()} == {
            "p2m-frame": 30,
            "p2m-anchor": 30,
        }
        assert len(result.findings) == 2 * keep


def test_report_to_json_has_all_findings(tmp_path: Path) -> None:
    domain = pv_domain()
    REPEATED_BREACHES["pte-range"](domain, 30)
    domain.shared_info["arch"]["p2m_generation"] = 1
    result, _ = verify_file_and_pipe(tmp_path, domain.to_bytes())
    document = json.loads(json.dumps(result.report.to_json()))
    assert (document["ok"], document["deep"], document["errors"], document["warnings"]) == (False, True, 31, 0)
    assert document["domain_type"] == "PV"
    assert document["pages"] == len(domain.pages)
    assert document["left_out"] == {"pte-range": 10}
    assert document["file"].endswith("made.save")
    assert len(document["findings"]) == 21
    for item, finding in zip(document["findings"], result.findings, strict=True):
        place = {name: getattr(finding, name) for name in ("offset", "record", "pfn", "level", "entry", "vcpu")}
        known = {name: value for name, value in place.items() if value is not None}
        assert item == {"rule": finding.rule.name, "severity": "error", "message": finding.message} | known


def test_finding_as_text_names_its_place(tmp_path: Path) -> None:
    domain = pv_domain(vcpus=2)
    table = domain.tables(1)[0]
    domain.table(table)[400] = 0xABCDE << 12 | 1
    domain.vcpus[1]["gdt_ents"] = 9999
    texts = [str(f) for f in verify_file_and_pipe(tmp_path, domain.to_bytes())[0].findings]
    offset = page_offsets(domain.to_stream())[table] + 400 * 8
    basic = domain.to_stream().offset("X86_PV_VCPU_BASIC", 1)
    gdt, pte = texts
    assert gdt.endswith(f"(offset {basic:#x}, X86_PV_VCPU_BASIC, vcpu1) [gdt-count]")
    assert pte.endswith(f"(offset {offset:#x}, pfn {table:#x}, L1[400]) [pte-range]")


# --- HVM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("envelope", ["xl", "libvirt", "xenopsd", "libxl", "libxc"])
def test_verify_hvm_stream_checks_framing(tmp_path: Path, envelope: str) -> None:
    for result in verify_file_and_pipe(tmp_path, bytes(hvm_stream(envelope))):
        assert not result.findings, str(result)
        assert not result.report.deep
        assert result.report.ok


def test_verify_broken_hvm_stream_reports_records(tmp_path: Path) -> None:
    stream = hvm_stream().drop("HVM_CONTEXT").before("END", WIRE.pv_info())
    for result in verify_file_and_pipe(tmp_path, bytes(stream)):
        assert result.rules == {"record-missing", "record-misplaced"}, str(result)
        assert not result.report.deep


# --- truncated files -------------------------------------------------------------------------------------------------


def test_verify_truncated_anywhere_names_the_record(tmp_path: Path) -> None:
    stream = pv_domain(vcpus=2).to_stream(batch=16)
    data, at = bytes(stream), 0
    for piece in stream:
        end = at + len(piece.data)
        for cut in {at + 1, at + len(piece.data) // 2, end - 1} - {at}:
            for result in verify_file_and_pipe(tmp_path, data[:cut]):
                assert result.rules == {"truncated"}, f"{piece.name} cut at {cut:#x}: {result}"
                (finding,) = result.findings
                assert finding.offset is not None
                assert at <= finding.offset <= cut
                assert result.report.error is not None
                assert result.report.error.offset == finding.offset
                assert not result.report.ok
        at = end


def test_verify_truncated_reports_findings_before_the_end(tmp_path: Path) -> None:
    stream, offset = stream_with_bad_entry()
    for cut in (stream.offset("PAGE_DATA", 3), stream.offset("SHARED_INFO") + 5, stream.offset("END") + 3):
        for result in verify_file_and_pipe(tmp_path, bytes(stream)[:cut]):
            assert result.rules == {"truncated", "pte-range"}, str(result)
            assert result.of_rule("pte-range")[0].offset == offset
            assert result.report.deep


def test_verify_page_data_with_too_few_pages_reports_its_tables(tmp_path: Path) -> None:
    """One page of a PAGE_DATA record is missing, and nothing says which one."""
    domain = pv_domain()
    stream = domain.to_stream(batch=16)
    name_at = stream.find("PAGE_DATA")
    old = stream[name_at].data
    length = int.from_bytes(old[4:8], "little") - PAGE
    stream[name_at] = Piece("PAGE_DATA", old[:4] + length.to_bytes(4, "little") + old[8 : len(old) - PAGE])
    tables = [pfn for pfn in range(16) if domain.is_table(pfn)]
    for result in verify_file_and_pipe(tmp_path, bytes(stream)):
        assert "page-data-size" in result.rules
        assert [f.pfn for f in sorted(result.of_rule("table-content"), key=page_of)] == tables
        assert all(f.level == domain.types[f.pfn or 0] & 7 for f in result.of_rule("table-content"))


def test_verify_asks_once_for_tables_without_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream may name 131,072 tables in a mebibyte: there is a read for a batch of them, not for each."""
    reads = 0
    pages = FilePages.pages

    def count(self: FilePages, pfns: U64) -> U8:
        nonlocal reads
        reads += 1
        return pages(self, pfns)

    monkeypatch.setattr(FilePages, "pages", count)
    counts = []
    for tables in (100, 10_000):
        stream = pv_domain().to_stream()
        last = max(i for i, piece in enumerate(stream) if piece.name == "PAGE_DATA")
        stream.insert(last + 1, WIRE.page_data([(1000 + i, 1) for i in range(tables)], []))
        file = tmp_path / "tables"
        file.write_bytes(bytes(stream))
        reads = 0
        assert verify(str(file), keep=20).findings.count[rules.TABLE_CONTENT] == tables
        counts.append(reads)
    assert counts[1] - counts[0] <= 10_000 // PAGES_PER_BATCH + 1


@pytest.mark.parametrize("data", [b"", b"\x1f\x8b\x08" + bytes(40), b"junk" * 20], ids=["empty", "gzip", "junk"])
def test_verify_what_is_no_stream_raises(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "none"
    file.write_bytes(data)
    for deep in (True, False):
        with pytest.raises(Unsupported):
            verify_file(file, deep=deep)
        with pytest.raises(Unsupported):
            verify_pipe(data, deep=deep)


def test_verify_legacy_stream_after_warning_raises(tmp_path: Path) -> None:
    """A reserved field that is set is only a warning; the legacy stream after it cannot be read."""
    file = tmp_path / "legacy"
    file.write_bytes(libvirt_header(version=1, unused=b"\1" + bytes(39)).data + bytes(100))
    with pytest.raises(Unsupported) as e:
        verify_file(file)
    assert e.value.offset == file.stat().st_size - 100
    file.write_bytes(b"XenSavedDomv2-\n" + xenopsd_section(0xF2, bytes(16)).data)
    with pytest.raises(Unsupported) as e:
        verify_file(file)
    assert e.value.offset == len(b"XenSavedDomv2-\n")


def test_verify_path_that_cannot_be_opened_raises(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(RequestError):
            verify(str(path))


def test_verify_leaves_no_descriptor_open(tmp_path: Path) -> None:
    good = pv_domain().to_bytes()
    before = len(os.listdir("/proc/self/fd"))
    for data in (good, good[:5000], b"", b"\x1f\x8b", b"junk" * 100):
        for deep in (True, False):
            with contextlib.suppress(Unsupported):
                verify_file_and_pipe(tmp_path, data, deep=deep)
            with contextlib.suppress(Unsupported):
                verify_pipe(data, deep=deep)
    with pytest.raises(RequestError):
        verify(str(tmp_path))
    assert len(os.listdir("/proc/self/fd")) == before
