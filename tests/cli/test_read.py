"""``xenpv read``: bytes by virtual and physical address, as hex and raw; numbers on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.command import xenpv
from tests.support.writers.build import USER_VADDR, pv_domain
from tests.support.writers.domain import Domain

PAGE = 4096


def content(domain: Domain, at: int, length: int) -> bytes:
    """Return bytes of the kernel's mapping of all memory, in virtual order."""
    return b"".join(bytes(domain.pages[pfn]) for pfn in domain.vaddrs)[at : at + length]


@pytest.mark.parametrize(("at", "length"), [(0, 1), (5, 4096), (98 * PAGE + 100, 3 * PAGE), (0, 102 * PAGE)])
def test_read_raw_writes_the_bytes(good: Path, domain: Domain, at: int, length: int) -> None:
    base = min(domain.vaddrs.values())
    ran = xenpv("read", "--raw", good, hex(base + at), length)
    assert (ran.code, ran.err) == (0, "")
    assert ran.raw == content(domain, at, length)


def test_read_of_several_chunks_writes_all_bytes(tmp_path: Path) -> None:
    domain = pv_domain(pfns=range(700))
    file = tmp_path / "dom.save"
    file.write_bytes(domain.to_bytes())
    length = 650 * PAGE
    assert length > 2 << 20
    content = b"".join(bytes(domain.pages[pfn]) for pfn in range(700))
    assert xenpv("read", "-p", "--raw", file, 10, length).raw == content[10 : 10 + length]
    base = min(domain.vaddrs.values())
    assert xenpv("read", "--raw", file, base + 7, length).raw == content[7 : 7 + length]


def test_read_prints_a_hex_dump(good: Path, domain: Domain) -> None:
    base = min(domain.vaddrs.values())
    data = content(domain, 8, 40)
    lines = xenpv("read", good, hex(base + 8), 40).out.splitlines()
    assert len(lines) == 3
    assert b"".join(bytes.fromhex(line[18:66].replace(" ", "")) for line in lines) == data
    assert [int(line[:16], 16) for line in lines] == [base + 8, base + 24, base + 40]
    text = "".join(chr(b) if 32 <= b < 127 else "." for b in data[:16])
    assert lines[0].endswith(f"|{text}|")


def test_read_physical_takes_pfn_times_4096(good: Path, domain: Domain) -> None:
    for pfn in (3, 600):
        assert xenpv("read", "--physical", "--raw", good, pfn * PAGE, "4K").raw == bytes(domain.pages[pfn])


def test_read_user_vcpu_and_top_options_choose_the_top_table(good: Path, domain: Domain) -> None:
    page = bytes(domain.pages[domain.places.user])
    for option in (["--user"], ["--vcpu", "1"], ["--top", str(domain.places.user_top)]):
        assert xenpv("read", "--raw", *option, good, hex(USER_VADDR), 16).raw == page[:16]


def test_read_across_a_hole_fails(good: Path, domain: Domain) -> None:
    end = max(domain.vaddrs.values()) + PAGE
    ran = xenpv("read", good, hex(end - 16), 32)
    assert ran.code == 1
    assert ran.err.count("\n") == 1
    assert f"{end:#x}: L1[" in ran.err
    assert xenpv("read", "-p", good, 101 * PAGE - 16, 32).err == "xenpv: error: pfn 0x64 is not in the stream\n"


def test_read_of_0_bytes_prints_nothing(good: Path) -> None:
    ran = xenpv("read", good, 0, 0)
    assert (ran.code, ran.raw, ran.err) == (0, b"", "")


@pytest.mark.parametrize("number", ["zero", "0x", "-1", "1P", hex(1 << 64), "", "1.5K", "K"])
def test_number_that_is_malformed_is_wrong_usage(good: Path, number: str) -> None:
    ran = xenpv("read", "--", good, 0, number)
    assert ran.code == 64
    assert "LENGTH" in ran.err


@pytest.mark.parametrize(("text", "value"), [("0x10", 16), ("16", 16), ("1k", 1024), ("2K", 2048), ("0X1_0", 16)])
def test_number_may_be_decimal_hexadecimal_or_have_a_suffix(good: Path, text: str, value: int) -> None:
    assert len(xenpv("read", "-p", "--raw", good, 0, text).raw) == value
