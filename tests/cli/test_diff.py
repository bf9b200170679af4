"""``xenpv diff``: what it prints of domains that are equal, or are not."""

from __future__ import annotations

from pathlib import Path

from tests.support.command import lines, xenpv
from tests.support.writers.build import pv_domain_with_gdt

DOMAIN = pv_domain_with_gdt()


def test_diff_of_equal_domains_exits_0(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(DOMAIN.to_bytes())
    b.write_bytes(DOMAIN.to_bytes(batch=16))
    ran = xenpv("diff", a, b)
    assert (ran.code, ran.err) == (0, "")
    assert f" {len(DOMAIN.pages)} pages" in ran.out
    assert xenpv("diff", "-q", a, b).raw == b""


def test_diff_names_pages_bytes_and_fields_that_differ(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    other = pv_domain_with_gdt()
    pfn = other.places.data[0]
    other.pages[pfn][16:20] = bytes(x ^ 0xFF for x in other.pages[pfn][16:20])
    other.vcpus[1]["user_regs"]["rax"] ^= 1
    a.write_bytes(DOMAIN.to_bytes())
    b.write_bytes(other.to_bytes("libvirt"))
    ran = xenpv("diff", a, b)
    assert ran.code == 1
    text = lines(ran)
    assert f"{pfn:#x} NOTAB data 0x10-0x13" in text
    assert "vcpu1 user_regs.rax" in text
    assert f"1 of {len(DOMAIN.pages)} pages differ (1 of data)" in text
    difference = xenpv("diff", "--json", a, b).json
    assert difference["same"] is False
    assert difference["pages"]["first"] == [{"pfn": pfn, "type": "NOTAB", "what": "data", "ranges": [[16, 20]]}]
    for option in ("--keep", "--first"):
        assert xenpv("diff", "--json", option, 0, a, b).json["pages"]["first"] == []
    assert "gone.save" in xenpv("diff", a, tmp_path / "gone.save").error
