"""Streams of other shapes, sizes and sources: pages that come again, huge domains, pipes, lies about lengths."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.support.breakage import KEEP, make_table, unmap
from tests.support.memory_limit import peak_memory_below
from tests.support.restoring import restore_error
from tests.support.saved_files import (
    page_offsets,
    piped,
    stream_with_bad_entry,
    verify_file,
    verify_file_and_pipe,
    verify_pipe,
)
from tests.support.saving import BOTH
from tests.support.writers.build import pv_domain
from tests.support.writers.sparse import write_sparse
from tests.support.writers.stream import NOTAB, PAGE, PIN, XTAB, Piece, Wire
from xenpv.abi.declare import Width
from xenpv.errors import Fault
from xenpv.io.stream_input import Input
from xenpv.verify import page_tables
from xenpv.verify.stream import verify

WIRE = Wire()


# --- pages that are sent again ---------------------------------------------------------------------------------------


def page_data(entries: dict[int, int], contents: dict[int, bytes]) -> Piece:
    """Return a PAGE_DATA record: types and contents by pfn."""
    return WIRE.page_data(sorted(entries.items()), [contents[pfn] for pfn in sorted(contents)])


def test_verify_pages_sent_again_checks_the_last_content(tmp_path: Path) -> None:
    """As in a live migration: the first contents and types are all wrong, and must not matter.

    Only entries of tables that are present must be sound each time: bit 0 of all is clear.
    """
    domain = pv_domain()
    stream = domain.to_stream(batch=16)
    junk = {pfn: bytes([pfn & 0x7F]) * PAGE for pfn in domain.pages}
    first_contents = [page_data(dict.fromkeys(junk, NOTAB), junk)]
    wrong_types = {pfn: domain.types[pfn] if domain.is_table(pfn) else 1 for pfn in domain.pages}
    first_contents.append(page_data(wrong_types, dict.fromkeys(domain.pages, b"\xfe" * PAGE)))
    stream.before("PAGE_DATA", *first_contents)
    for result in verify_file_and_pipe(tmp_path, bytes(stream)):
        assert not result.findings, str(result)
        assert result.report.pages == len(domain.pages)


def test_verify_table_sent_again_broken_is_reported(tmp_path: Path) -> None:
    domain = pv_domain()
    stream = domain.to_stream(batch=16)
    top = domain.places.top
    domain.table(top)[300] = domain.entries << 12 | 1
    stream.after("PAGE_DATA", page_data({top: domain.types[top]}, {top: bytes(domain.pages[top])}), nth=-1)
    for result in verify_file_and_pipe(tmp_path, bytes(stream)):
        assert result.rules == {"pte-range"}, str(result)
        (finding,) = result.findings
        assert finding.offset == page_offsets(stream)[top] + 300 * 8


@pytest.mark.parametrize("later", ["data", "table", "XTAB", "same record"])
@BOTH
def test_entry_beyond_the_end_in_a_table_that_is_sent_again_is_refused(
    tmp_path: Path, width: Width, later: str
) -> None:
    """libxenguest's x86_pv_localise_page() asserts at each sending, not only at the last one."""
    domain = pv_domain(width=width)
    pfn = domain.places.data[0]
    junk = bytearray(PAGE)
    junk[40:48] = (domain.entries << 12 | 1).to_bytes(8, "little")
    first = [(pfn, 1)]
    if later == "XTAB":
        unmap(domain, pfn)
        domain.p2m_frame(int(domain.p2m_pfns[0]))[pfn : pfn + 1] = KEEP & (1 << 8 * width) - 1
        domain.types[pfn] = XTAB
        del domain.pages[pfn]
    elif later == "table":
        make_table(domain, pfn, 1, PIN)
    stream = domain.to_stream(batch=16)
    if later == "same record":
        stream.before("PAGE_DATA", WIRE.page_data([*first, (pfn, NOTAB)], [bytes(junk), bytes(PAGE)]))
    else:
        stream.before("PAGE_DATA", WIRE.page_data(first, [bytes(junk)]))
    at = stream.offset("PAGE_DATA") + len(stream[stream.find("PAGE_DATA")].data) - PAGE * (1 + (later == "same record"))
    of_file, of_pipe = verify_file_and_pipe(tmp_path, bytes(stream))
    assert of_file.findings == of_pipe.findings
    (finding,) = of_file.of_rule("pte-range")
    assert (finding.pfn, finding.level, finding.entry) == (pfn, 1, 5)
    assert finding.offset is not None
    assert bytes(stream)[finding.offset : finding.offset + 8] == junk[40:48]
    assert finding.offset == at + 40
    error = restore_error(stream)
    assert isinstance(error, Fault)
    assert (error.address, error.level, error.entry) == (pfn, 1, 5)


def test_verify_page_sent_again_as_xtab_is_not_populated(tmp_path: Path) -> None:
    """The page is sent with content, and then ballooned out."""
    domain = pv_domain()
    pfn = domain.places.data[0]
    unmap(domain, pfn)
    domain.p2m_frame(int(domain.p2m_pfns[0]))[pfn] = KEEP
    stream = domain.to_stream(batch=16)
    for result in verify_file_and_pipe(tmp_path, bytes(stream)):
        assert result.rules == {"page-unmapped"}, str(result)
    stream.after("PAGE_DATA", page_data({pfn: XTAB}, {}), nth=-1)
    for result in verify_file_and_pipe(tmp_path, bytes(stream)):
        assert not result.findings, str(result)


def test_verify_pfn_twice_in_a_record_is_a_warning(tmp_path: Path) -> None:
    domain = pv_domain()
    first, second = domain.places.data[:2]
    stream = domain.to_stream()
    entries = [(first, NOTAB), (second, NOTAB), (first, NOTAB)]
    again = WIRE.page_data(entries, [bytes(domain.pages[pfn]) for pfn, _ in entries])
    stream.after("PAGE_DATA", again, nth=-1)
    for result in verify_file_and_pipe(tmp_path, bytes(stream)):
        (finding,) = result.findings
        assert finding.rule.name == "page-repeated"
        assert finding.pfn == first
        assert finding.offset == stream.offset("PAGE_DATA", -1) + 16 + 2 * 8  # the second of the two
        assert result.report.ok


@BOTH
def test_verify_p2m_extended_by_second_record_finds_nothing(tmp_path: Path, width: Width) -> None:
    """The domain grew while it was sent."""
    per = PAGE // width
    domain = pv_domain(width=width, pfns=[*range(120), 2 * per + 5, 3 * per + 1])
    stream = domain.to_stream()
    low, high = [pfn for pfn in domain.types if pfn < per], [pfn for pfn in sorted(domain.types) if pfn >= per]
    one_record = stream[stream.find("X86_PV_P2M_FRAMES")]
    stream.replace("X86_PV_P2M_FRAMES", WIRE.p2m_frames(0, per - 1, domain.p2m_pfns[:1]))
    pages = [*domain.page_data(WIRE, 64, sorted(low)), WIRE.p2m_frames(per, domain.entries - 1, domain.p2m_pfns[1:])]
    pages += domain.page_data(WIRE, 64, high)
    at = stream.find("PAGE_DATA")
    stream.drop("PAGE_DATA")
    stream[at:at] = pages
    assert len(one_record.data) < sum(len(p.data) for p in stream if p.name == "X86_PV_P2M_FRAMES")
    from_file, from_pipe = verify_file_and_pipe(tmp_path, bytes(stream))
    assert not from_file.findings, str(from_file)
    if width == 8:  # the pipe passed leaves before the second record named them; 32-bit leaves look like leaves
        assert from_pipe.rules == {"not-checked"}
        assert from_pipe.findings[0].offset == stream.offset("X86_PV_P2M_FRAMES", 1)
    else:
        assert not from_pipe.findings, str(from_pipe)


def test_verify_pipe_reports_what_it_could_not_check(tmp_path: Path) -> None:
    """A frame list that is padded with zeros looks like data while the pipe passes it."""
    domain = pv_domain(tree=True, linear=False)
    domain.p2m_frame(domain.places.tree_mid[0])[len(domain.p2m_pfns) :] = 0
    from_file, from_pipe = verify_file_and_pipe(tmp_path, domain.to_bytes())
    assert not from_file.findings, str(from_file)
    assert from_pipe.rules == {"not-checked"}, str(from_pipe)
    assert from_pipe.report.ok
    assert from_pipe.findings[0].offset == domain.to_stream().offset("SHARED_INFO")


def test_verify_pipe_reports_a_gdt_that_looked_like_data(tmp_path: Path) -> None:
    """Its first descriptor, which no CPU uses, is not empty; so the pipe let the page pass."""
    domain = pv_domain()
    domain.pages[domain.places.gdt[0]][:8] = b"segments"
    from_file, from_pipe = verify_file_and_pipe(tmp_path, domain.to_bytes())
    assert not from_file.findings, str(from_file)
    assert [(f.rule.name, f.pfn) for f in from_pipe.findings] == [("not-checked", domain.places.gdt[0])]
    assert from_pipe.report.ok


# --- size ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half_a_gigabyte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sparse") / "big.save"
    write_sparse(file, 512 << 20)
    return file


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "framing"])
def test_verify_pipe_allocates_bounded_memory(half_a_gigabyte: Path, deep: bool) -> None:
    with subprocess.Popen(["head", "-c", str(96 << 20), half_a_gigabyte], stdout=subprocess.PIPE) as cat:
        assert cat.stdout is not None
        fd = os.dup(cat.stdout.fileno())
        with peak_memory_below(16 << 20):
            result = verify_file(Input(fd, "pipe"), deep=deep)
    assert "truncated" in result.rules


def test_verify_file_allocates_memory_for_tables_only(half_a_gigabyte: Path) -> None:
    with peak_memory_below(24 << 20):
        verify_file(half_a_gigabyte)
    with peak_memory_below(4 << 20):
        verify_file(half_a_gigabyte, deep=False)


def test_verify_pfns_beyond_2_31_cost_only_populated_pages(tmp_path: Path) -> None:
    """The domain has 100 pages; its p2m has 2^31 entries, nearly all in one shared leaf."""
    domain = pv_domain(pfns=[*range(60), (1 << 31) - 1, 1 << 31, (1 << 31) + 1])
    file = tmp_path / "far.save"
    file.write_bytes(domain.to_bytes())
    with peak_memory_below(512 << 20):  # a bit for each entry would take 256 MiB, a pfn 16 GiB
        result = verify_file(file)
    assert not result.findings, str(result)

    domain.table(domain.tables(1)[0])[511] = (1 << 31) + 3 << 12 | 1
    domain.p2m_pfns[-1] = domain.p2m_pfns[0]
    file.write_bytes(domain.to_bytes())
    result = verify_file(file)
    assert result.rules == {"pte-range", "p2m-frame-repeated", "p2m-anchor"}
    assert result.of_rule("p2m-frame-repeated")[0].entry == 1 << 22


def test_verify_too_large_length_allocates_little(tmp_path: Path) -> None:
    """A record claims 128 MiB, in a file of 400 KiB."""
    domain = pv_domain()
    stream = domain.to_stream()
    stream.patch("X86_PV_P2M_FRAMES", 4, (128 << 20).to_bytes(4, "little"))
    file = tmp_path / "lies.save"
    file.write_bytes(bytes(stream))
    with peak_memory_below(8 << 20):
        verify_file(file)
    assert verify_file(file).rules == {"truncated"}


# --- input and progress ----------------------------------------------------------------------------------------------


def test_verify_reports_progress_of_file_and_pipe(tmp_path: Path) -> None:
    data = pv_domain(pfns=range(2000)).to_bytes(batch=1024)
    file = tmp_path / "made.save"
    file.write_bytes(data)
    reported: list[tuple[int, int | None]] = []
    verify_file(file, deep=False, progress=lambda progress: reported.append((progress.done, progress.total)))
    assert reported
    assert [done for done, _ in reported] == sorted(done for done, _ in reported)
    assert {total for _, total in reported} == {len(data)}
    assert reported[-1][0] <= len(data)
    reported.clear()
    verify_pipe(data, deep=False, progress=lambda progress: reported.append((progress.done, progress.total)))
    assert reported[-1] == (len(data), None)


def test_verify_descriptor_within_a_file_counts_offsets_from_there(tmp_path: Path) -> None:
    stream, offset = stream_with_bad_entry()
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        file.write(b"something else" * 100 + bytes(stream))
        file.flush()
        fd = os.dup(file.fileno())
        os.lseek(fd, 1400, os.SEEK_SET)
        report = verify(Input(fd, "the descriptor"))
    assert [f.offset for f in report.findings] == [offset]


def test_verify_pipe_reads_to_its_end() -> None:
    data = pv_domain().to_bytes() + bytes(1 << 20)
    with piped(data) as fd:
        report = verify(Input(os.dup(fd), "pipe"))
        assert os.read(fd, 1) == b""
    (finding,) = report.findings
    assert finding.rule.name == "trailing-data"
    assert finding.offset == len(data) - (1 << 20)


def test_verify_all_entries_wrong_counts_all_and_describes_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every entry of 1500 tables is wrong: all are counted, only those that are kept are described."""
    domain = pv_domain(pfns=range(3000))
    for pfn in domain.places.data[:1500]:
        make_table(domain, pfn, 1, 8)
        domain.table(pfn)[:] = np.uint64(domain.entries << 12 | 0x19)
    file = tmp_path / "bad.save"
    file.write_bytes(domain.to_bytes())
    described: list[int] = []
    describe = page_tables._Entries.describe

    def counting_describe(self: page_tables._Entries, i: int) -> str:
        described.append(i)
        return describe(self, i)

    monkeypatch.setattr(page_tables._Entries, "describe", counting_describe)
    result = verify_file(file)
    assert len(described) == 2 * 20
    assert {rule.name: n for rule, n in result.report.findings.count.items()} == {
        "pte-range": 1500 * 512,
        "pte-flags": 1500 * 512,
    }
