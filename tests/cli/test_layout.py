"""``xenpv layout``: a layout in text, JSON and SVG, and the error where a domain does not fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.support.command import Ran, lines, xenpv
from tests.support.writers.kernel import BASE, PV64, Kernel, Load, bzimage, kernel32, note, quad, word

LINUX = Kernel(notes=[*PV64, note(15, quad(1 << 39)), note(16, word(1))])
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def vmlinuz(tmp_path: Path) -> Path:
    file = tmp_path / "vmlinuz"
    file.write_bytes(bzimage("gzip", LINUX.to_bytes()))
    return file


def picture(file: Path) -> ET.Element:
    return ET.parse(file).getroot()  # noqa: S314  our own


def test_layout_text_shows_segments_tables_and_start_info(vmlinuz: Path) -> None:
    ran = xenpv("layout", vmlinuz, "--memory", "640G", "--ramdisk", "5M", "--vcpus", 4, "--cmdline", "console=hvc0 ro")
    assert (ran.code, ran.err) == (0, "")
    for part in (
        f"{vmlinuz}: xen-3.0-x86_64, 640.0 GiB, 4 vcpus\n",
        "p2m list 0xa000000 entries, outside the initial mapping",
        "mapped 0xffffffff80000000 to 0xffffffff80400000, 4.0 MiB from pfn 0",
        "0x100 0x6 24.0 KiB 0xffffffff80100000 kernel ███\n",
        "0x109 0x1 4.0 KiB 0xffffffff80109000 L4 page tables █\n",
        "0x400 0x500 5.0 MiB ramdisk ███████████\n",
        "0x900 0x50000 1.2 GiB 0x8000000000 p2m list ███████████████████\n",
        "0x50903 0x280 2.5 MiB L1 p2m's page tables ██████████\n",
        "0x50b83 0x9faf47d 638.7 GiB free",
        "L4 0x109 0x1 all\n",
        "L3 0x10a 0x1 0xffffff8000000000 0xffffffffffffffff\n",
        "L1 0x50903 0x280 0x8000000000 0x804fffffff\n",
        "Start info in pfn 0x106; xenstore ring in pfn 0x107, console ring in pfn 0x108\n",
        "flags MOD_START_PFN | VIRT_P2M_4TOOLS\n",
        "mfn_list 0x8000000000, first_p2m_pfn 0x900, nr_p2m_frames 0x50283\n",
        "mod_start 0x400 (pfn), mod_len 0x500000\n",
        "cmd_line console=hvc0 ro\n",
        "registers rip 0xffffffff80100000, rsp 0xffffffff8010f000, rsi 0xffffffff80106000\n",
        "cr3 pfn 0x109",
    ):
        assert part in lines(ran), part


def test_layout_json_has_every_figure(vmlinuz: Path) -> None:
    d = xenpv("layout", vmlinuz, "--memory", "64M", "--ramdisk", "10000", "--cmdline", "a", "--json").json
    assert (d["file"], d["width"], d["nr_pages"], d["p2m_entries"]) == (str(vmlinuz), 8, 16384, 16384)
    assert (d["p2m_outside"], d["virt_base"], d["mapping_end"]) == (True, BASE, BASE + (4 << 20))
    assert d["segments"][1] == {
        "what": "kernel", "pfn": 256, "pages": 6, "vaddr": BASE + 0x10_0000, "size": 0x6000, "level": None,
    }  # fmt: skip
    assert sum(s["pages"] for s in d["segments"]) == 16384
    assert d["mapped"][1] == {"vaddr": 1 << 39, "end": (1 << 39) + 32 * 4096, "pfn": 1027, "pages": 32}
    assert d["tables"][1] == {
        "level": 3, "pfn": 266, "count": 1, "vaddr": (1 << 64) - (1 << 39), "end": 1 << 64,
    }  # fmt: skip
    assert d["read_only"] == [{"pfn": 265, "pages": 5}, {"pfn": 1059, "pages": 3}]
    info = d["start_info"]
    assert (info["magic"], info["mfn_list"], info["mod_start"], info["mod_len"]) == (
        "xen-3.0-x86_64", 1 << 39, 1024, 12288,
    )  # fmt: skip
    assert (info["flag_names"], info["cmd_line"]) == (["MOD_START_PFN", "VIRT_P2M_4TOOLS"], "a")
    assert (d["vcpu0"]["ip"], d["vcpu0"]["cr3_pfn"], d["remarks"]) == (BASE + 0x10_0000, 265, [])


def test_layout_of_a_32_bit_kernel_on_a_pipe() -> None:
    ran = xenpv("layout", "-", "--memory", "64M", stdin=kernel32().to_bytes())
    assert ran.code == 0
    assert "-: xen-3.0-x86_32p, 64.0 MiB, 1 vcpu\n" in ran.out
    assert "p2m list 0x4000 entries, inside the initial mapping" in lines(ran)
    assert "registers eip 0xc0100000, esp 0xc0" in lines(ran)
    assert "mod_start" not in ran.out


def test_layout_svg_draws_every_segment_and_mapping(vmlinuz: Path, tmp_path: Path) -> None:
    out = tmp_path / "layout.svg"
    ran = xenpv("layout", vmlinuz, "--memory", "16T", "--ramdisk", "1G", "-o", out)
    assert ran.code == 0
    assert "Memory" in ran.out
    svg = picture(out)
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    for part in (f"{vmlinuz}, 16.0 TiB", "p2m list", "L1 p2m's page tables", "0x8000000000", "0xffffffff80400000"):
        assert part in texts
    blocks = [rect for rect in svg.iter(f"{SVG}rect") if "x" in rect.attrib]
    rows = xenpv("layout", vmlinuz, "--memory", "16T", "--ramdisk", "1G", "--json").json["segments"]
    mapped = [row for row in rows if row["vaddr"] is not None]
    assert len(blocks) == len(rows) + len(mapped)
    assert len([*svg.iter(f"{SVG}polygon")]) == len(mapped)
    tall = {row["pages"]: float(rect.attrib["height"]) for row, rect in zip(rows, blocks, strict=False)}
    assert [tall[pages] for pages in sorted(tall)] == sorted(tall.values()), "a larger segment is drawn higher"
    assert min(tall.values()) > 15, "one page is visible"
    _, _, full, deep = map(float, svg.attrib["viewBox"].split())
    for rect in blocks:
        assert float(rect.attrib["x"]) + float(rect.attrib["width"]) < full
        assert float(rect.attrib["y"]) + float(rect.attrib["height"]) < deep
    piped = xenpv("layout", vmlinuz, "--memory", "16T", "--ramdisk", "1G", "-o", "-")
    assert piped.raw == out.read_bytes()
    assert b"prefers-color-scheme:dark" in piped.raw


def test_layout_escapes_control_characters_and_markup_in_text_and_svg(tmp_path: Path) -> None:
    file = tmp_path / "a<b>&\x1b[2J"
    file.write_bytes(LINUX.to_bytes())
    ran = xenpv("layout", file, "--memory", "64M", "--cmdline", "\x1b[31m[red]", "-o", tmp_path / "layout.svg")
    assert ran.code == 0
    assert "\x1b" not in ran.out
    assert "cmd_line ?[31m[red]" in lines(ran)
    assert picture(tmp_path / "layout.svg").findtext(f"{SVG}title") == f"{tmp_path}/a<b>&?[2J, 64.0 MiB"


def test_layout_ramdisk_is_a_file_or_a_size(vmlinuz: Path, tmp_path: Path) -> None:
    initrd, empty = tmp_path / "initrd", tmp_path / "empty"
    initrd.write_bytes(bytes(5000))
    empty.write_bytes(b"")

    def layout(ramdisk: object) -> Ran:
        return xenpv("layout", vmlinuz, "--memory", "64M", "--ramdisk", ramdisk, "--json")

    assert [s["size"] for s in layout(initrd).json["segments"] if s["what"] == "ramdisk"] == [5000]
    assert layout("5000").json == layout(initrd).json
    assert layout(empty).error.startswith(f"{empty}: is empty")
    assert layout(tmp_path).error.startswith(f"{tmp_path}: is a directory")
    assert "'no-such-file'" in layout("no-such-file").usage_error


TOO_LARGE = {
    "640 bytes of memory": (["--memory", "640"], ("640 bytes", "4096 bytes")),
    "2 MiB of memory": (["--memory", "2M"], ("0x200 pages (2 MiB)", "0x404 pages")),
    "no vcpus": (["--memory", "64M", "--vcpus", "0"], ("0 vcpus",)),
    "long command line": (["--memory", "64M", "--cmdline", "x" * 1024], ("1024 bytes", "1023")),
    "large ramdisk": (["--memory", "64M", "--ramdisk", "1G"], ("0x40000 pages (1 GiB)",)),
}


@pytest.mark.parametrize(("options", "numbers"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_layout_that_does_not_fit_fails_with_numbers(
    vmlinuz: Path, options: list[str], numbers: tuple[str, ...]
) -> None:
    error = xenpv("layout", vmlinuz, *options).error
    assert all(number in error for number in numbers), error


def test_layout_of_a_kernel_without_init_p2m_has_a_remark_then_an_error(tmp_path: Path) -> None:
    file = tmp_path / "old"
    file.write_bytes(Kernel(loads=[Load(0x10_0000, b"", 60 << 20)]).to_bytes())
    ran = xenpv("layout", file, "--memory", "500G")
    assert "\nremark the initial mapping" in lines(ran)
    assert "INIT_P2M" in xenpv("layout", file, "--memory", "1T").error


def test_layout_of_no_pv_kernel_fails_and_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "script"
    for data in (b"#!/bin/sh\n", Kernel(notes=[]).to_bytes()):
        file.write_bytes(data)
        assert xenpv("layout", file, "--memory", "64M").error.startswith(f"{file}: ")


def test_layout_without_or_with_a_bad_memory_size_is_wrong_usage(vmlinuz: Path) -> None:
    assert "--memory" in xenpv("layout", vmlinuz).usage_error
    assert "'much'" in xenpv("layout", vmlinuz, "--memory", "much").usage_error


def test_layout_does_not_import_numpy() -> None:
    code = "import sys, xenpv.cli.layout; print('numpy' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert ran.stdout == "False\n"
