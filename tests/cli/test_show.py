"""``xenpv show``: descriptions of save files and cores."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.support.command import xenpv
from tests.support.writers.build import pv_domain
from tests.support.writers.core import core_of
from tests.support.writers.domain import Domain
from tests.support.writers.envelopes import ENVELOPES
from tests.support.writers.hvm import cpu, hvm_context, hvm_stream
from tests.support.writers.stream import RECORDS
from xenpv.abi.declare import Width


def test_show_text_has_identity_memory_p2m_and_start_info(good: Path, domain: Domain) -> None:
    ran = xenpv("show", good)
    assert (ran.code, ran.err) == (0, "")
    tables = sum(domain.is_table(pfn) for pfn in domain.types)
    for part in (
        'PV domain "made", 64-bit with 4 levels of page tables, saved by Xen 4.17, complete',
        "8d1c2f6e-3f0a-4c5b-9a77-0123456789ab",
        f"{len(domain.pages) - tables} NOTAB",
        "linear virtual list and three-level tree",
        f"pfns 0 to {domain.entries - 1:#x} in {len(domain.p2m_pfns)} frames",
        f"xenstore pfn {domain.places.store:#x}, console pfn {domain.places.console:#x}",
        "console=hvc0",
    ):
        assert part in ran.out, part
    assert "Records" not in ran.out


def test_show_json_has_every_figure(good: Path, domain: Domain) -> None:
    facts = xenpv("show", "--json", good).json
    assert (facts["file"], facts["size"], facts["envelope"]) == (str(good), good.stat().st_size, "xl")
    assert (facts["domain_type"], facts["width"], facts["levels"], facts["xen"]) == ("PV", 8, 4, "4.17")
    assert (facts["complete"], facts["trailing_bytes"], facts["stream_version"]) == (True, 0, 3)
    assert facts["memory_in_stream"] == len(domain.pages) * 4096
    assert facts["entries_sent"] == len(domain.types)
    assert facts["config"]["name"] == "made"
    assert facts["config"]["max_vcpus"] == 2
    assert facts["p2m"]["end_pfn"] == domain.entries - 1
    assert facts["p2m"]["max_pfn"] == domain.entries
    assert facts["p2m"]["p2m_vaddr"] == domain.p2m_vaddr
    assert facts["start_info"] == {
        "pfn": domain.places.start_info,
        "nr_pages": len(domain.pages),
        "store_pfn": domain.places.store,
        "console_pfn": domain.places.console,
        "cmd_line": "console=hvc0",
    }
    assert [v["vcpu"] for v in facts["vcpus"]] == [0, 1]
    for vcpu in facts["vcpus"]:
        regs = domain.vcpus[vcpu["vcpu"]]["user_regs"]
        assert (vcpu["ip"], vcpu["sp"], vcpu["cs"]) == (int(regs["rip"]), int(regs["rsp"]), 0xE033)
        assert (vcpu["cr3_pfn"], vcpu["user_cr3_pfn"]) == (domain.places.top, domain.places.user_top)
        assert vcpu["mode"] == "kernel"
        assert vcpu["records"] == ["basic", "extended", "xsave", "msrs"]
    stream = domain.to_stream()
    listed = {r["name"]: r["offset"] for r in reversed(facts["records"])}
    for name in RECORDS:
        if any(piece.name == name for piece in stream):
            assert listed[name] == stream.offset(name)
    pages = next(r for r in facts["records"] if r["name"] == "PAGE_DATA")
    assert (pages["count"], pages["pages"]) == (2, len(domain.pages))


def test_show_verbose_lists_records_and_configuration(good: Path, domain: Domain) -> None:
    out = xenpv("show", "-v", good).out
    for name in ("image header", "PAGE_DATA", "X86_PV_VCPU_XSAVE", "libxl END", '"max_memkb"'):
        assert name in out
    assert f"{domain.to_stream().offset('SHARED_INFO'):#x}" in out


def test_show_into_a_pipe_folds_no_line(good: Path, domain: Domain) -> None:
    """grep could not find an address that is folded over two lines of a table."""
    rip = int(domain.vcpus[0]["user_regs"]["rip"])
    assert f"{rip:#x}" in xenpv("show", good).out


@pytest.mark.parametrize("envelope", ENVELOPES)
@pytest.mark.parametrize("version", [2, 3])
def test_show_every_envelope_and_version(tmp_path: Path, envelope: str, version: int) -> None:
    file = tmp_path / "made"
    file.write_bytes(pv_domain(width=4).to_bytes(envelope, version=version))
    ran = xenpv("show", file)
    assert ran.code == 0
    assert "32-bit with 3 levels" in ran.out
    assert f"{envelope}, libxc stream version {version}" in ran.out
    facts = xenpv("show", "--json", file).json
    assert (facts["envelope"], facts["width"]) == (envelope, 4)
    assert (facts["config"] is None) == (envelope in {"libxl", "libxc"})


def test_show_hvm_has_parameters_and_pages(hvm: Path) -> None:
    ran = xenpv("show", hvm)
    assert ran.code == 0
    assert ran.out.startswith('HVM domain "made", saved by Xen 4.17, complete')
    facts = xenpv("show", "--json", hvm).json
    assert facts["domain_type"] == "HVM"
    assert facts["hvm"]["params"]["17"] == 0xFEFFF
    assert facts["pages"] == {"NOTAB": 15, "XALLOC": 1}


def test_show_of_a_pipe_equals_show_of_the_file(good: Path) -> None:
    ran = xenpv("show", "--json", "-", stdin=good.read_bytes())
    assert ran.code == 0
    assert ran.json | {"file": str(good)} == xenpv("show", "--json", good).json


def test_show_counts_trailing_bytes_and_repeated_pages(tmp_path: Path) -> None:
    domain = pv_domain()
    stream = domain.to_stream()
    stream.after("PAGE_DATA", stream[stream.find("PAGE_DATA")], nth=-1)
    file = tmp_path / "again"
    file.write_bytes(bytes(stream) + b"12345")
    out = xenpv("show", file).out
    assert "5 bytes follow" in out
    assert "161 sent, 64 of them" in out
    facts = xenpv("show", "--json", file).json
    assert (facts["trailing_bytes"], facts["entries_sent"], facts["entries_repeated"]) == (5, 161, 64)


def test_show_counts_checkpoints(tmp_path: Path) -> None:
    file = tmp_path / "remus"
    file.write_bytes(bytes(pv_domain().to_checkpointed(rounds=3)))
    assert xenpv("show", "--json", file).json["checkpoints"] == 3


def test_show_with_bad_start_info_names_the_pfn(tmp_path: Path) -> None:
    domain = pv_domain()
    domain.vcpus[0]["user_regs"]["rdx"] = domain.places.text
    file = tmp_path / "made"
    file.write_bytes(domain.to_bytes())
    assert xenpv("show", "--json", file).json["start_info"].keys() == {"pfn", "error"}
    domain.vcpus[0]["user_regs"]["rdx"] = 0x1234567
    file.write_bytes(domain.to_bytes())
    ran = xenpv("show", file)
    assert ran.code == 0
    assert "pfn 0x1234567" in ran.out


@pytest.mark.parametrize("width", [8, 4], ids=["64-bit", "32-bit"])
def test_show_core_has_pages_p2m_and_vcpus(width: Width, tmp_path: Path) -> None:
    domain = pv_domain(width=width, vcpus=2)
    file = tmp_path / "made.core"
    core = core_of(domain)
    file.write_bytes(bytes(core))
    ran = xenpv("show", file)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"PV domain, {width * 8}-bit, a core of xl dump-core on Xen 4.17.5-test, ")
    assert f"{len(domain.pages)} (384.0 KiB), pfns up to 0x5f\n" in ran.out
    facts = xenpv("show", "--json", file).json
    assert facts["p2m"]["max_pfn"] == domain.entries
    assert [v["cr3_pfn"] for v in facts["vcpus"]] == [domain.places.top] * 2
    assert facts["vcpus"][0]["ip"] == domain.vaddrs[domain.places.text] + 0x3AA


def test_show_core_with_a_bad_cr3_tells_why_it_has_none(tmp_path: Path) -> None:
    domain = pv_domain(vcpus=2)
    core = bytes(core_of(domain))
    cr3 = struct.pack("<Q", domain.cr3(domain.mfns[domain.places.top]))
    file = tmp_path / "made.core"
    at = core.index(cr3)
    file.write_bytes(core[:at] + struct.pack("<Q", domain.cr3(0x77_7777)) + core[at + 8 :])
    ran = xenpv("show", file)
    assert ran.code == 0
    assert "mfn 0x777777" in ran.out
    vcpus = xenpv("show", "--json", file).json["vcpus"]
    assert (vcpus[0]["cr3_pfn"], vcpus[1]["cr3_pfn"]) == (None, domain.places.top)
    assert vcpus[0]["user_cr3_pfn"] == domain.places.user_top
    assert "mfn 0x777777" in vcpus[0]["cr3_error"]
    assert "cr3_error" not in vcpus[1]


def test_show_hvm_vcpus_have_paging_modes(tmp_path: Path) -> None:
    file = tmp_path / "long.save"
    context = hvm_context(
        {
            0: cpu(cr0=0x8000_0011, cr4=0x20, cr3=0x5000, msr_efer=0x500, rip=0x1234),
            2: cpu(),
            3: cpu(cr0=0x8000_0011, cr4=0x20),
        }
    )
    file.write_bytes(bytes(hvm_stream(context=context)))
    facts = xenpv("show", "--json", file).json
    assert [(v["vcpu"], v["ip"], v["cr3_pfn"], v["paging"]) for v in facts["hvm"]["vcpus"]] == [
        (0, 0x1234, 5, "4 levels"),
        (2, 0, 0, "off"),
        (3, 0, 0, "PAE"),
    ]
    assert "4 levels" in xenpv("show", file).out


def test_show_with_index_keeps_one_and_prints_the_same(good: Path, tmp_path: Path) -> None:
    file = tmp_path / "made.save"
    file.write_bytes(good.read_bytes())
    without_index = xenpv("show", "--json", file).json
    assert list(tmp_path.iterdir()) == [file]
    assert xenpv("show", "--json", "--index", file).json == without_index
    assert (tmp_path / "made.save.xpvi").exists()
    assert (
        xenpv("show", "--json", "--index", file).json
        == without_index
        == xenpv("show", "--json", "--no-index", file).json
    )
