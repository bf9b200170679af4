"""``xenpv image``: a kernel in text and JSON, and the error for a file that is no kernel."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import lines, xenpv
from tests.support.writers.kernel import BASE, LEGACY, PV64, Kernel, Load, bzimage, kernel32, note, quad, text, word

FULL = Kernel(
    notes=[
        *PV64,
        note(2, quad(BASE + 0x10_2000)),
        note(10, text("!writable_page_tables|pae_pgdir_above_4gb|frobnicate")),
        note(13, quad(1) + quad(1)),
        note(14, word(1)),
        note(15, quad(1 << 39)),
        note(16, word(1)),
        note(18, word(0x10_0020)),
        note(99, b"\1\2"),
    ]
)


@pytest.fixture
def vmlinuz(tmp_path: Path) -> Path:
    file = tmp_path / "vmlinuz"
    file.write_bytes(bzimage("zstd", FULL.to_bytes()))
    return file


def test_image_text_shows_layers_notes_and_limits(vmlinuz: Path) -> None:
    ran = xenpv("image", vmlinuz)
    assert (ran.code, ran.err) == (0, "")
    for part in (
        f"{vmlinuz}: bzImage (boot protocol 2.15), ",
        " bytes of zstd; inside it a 64-bit ELF file of ",
        "version 6.1.0-made #1",
        "PV can boot, as xen-3.0-x86_64, entry 0xffffffff80100000",
        "PVH can boot, entry 0x100020",
        "p2m list may lie outside the initial mapping: INIT_P2M 0x8000000000",
        "initrd may stay unmapped (MOD_START_PFN)",
        "kernel 0xffffffff80100000 to 0xffffffff80106000, pfn 0 at 0xffffffff80000000",
        "hypercalls page at 0xffffffff80102000",
        "suspend can be cancelled",
        "features writable_page_tables (required), pae_pgdir_above_4gb",
        "remark FEATURES has names that Xen does not know: frobnicate",
        "Memory as PV\n",
        "at 0x8000000000 (INIT_P2M) 4.0 MiB 128.0 TiB 0x800000000 the 0x800000000 entries of Xen's m2p",
        "inside the initial mapping 4.0 MiB 510.2 GiB",
        "Xen ELF notes (PT_NOTE)",
        "15 INIT_P2M 0x8000000000 virtual address for the p2m list, outside the initial mapping",
        "13 L1_MFN_VALID 0x1 0x1 how to tell L1 entries that hold mfns from others",
        "99 0x63 01 02",
        "Load segments",
        "0x101000 0xffffffff80101000 0xffffffff80101000 0x4 0x5000 RW",
    ):
        assert part in lines(ran), part


def test_image_json_has_every_figure(vmlinuz: Path) -> None:
    d = xenpv("image", "--json", vmlinuz).json
    assert (d["file"], d["size"], d["machine"], d["width"]) == (str(vmlinuz), vmlinuz.stat().st_size, "x86-64", 8)
    assert [(x["kind"], x["compression"], x["boot_protocol"]) for x in d["layers"]] == [("bzImage", "zstd", "2.15")]
    assert d["pv"]["can_boot"] is d["pvh"]["can_boot"] is True
    assert d["pv"]["guest_type"] == "xen-3.0-x86_64"
    assert [d["pv"]["limits"][0][key] for key in ("p2m_outside", "max_pages", "min_pages")] == [True, 1 << 35, 1030]
    assert (d["p2m_outside_initial_mapping"], d["initrd_unmapped"], d["suspend_cancel"]) == (True, True, True)
    assert d["addresses"] == {
        "virt_base": BASE,
        "paddr_offset": 0,
        "kernel_start": BASE + 0x10_0000,
        "kernel_end": BASE + 0x10_6000,
        "entry": BASE + 0x10_0000,
        "elf_entry": BASE + 0x10_0000,
        "hypercall_page": BASE + 0x10_2000,
        "init_p2m": 1 << 39,
        "hv_start_low": None,
    }
    assert d["features"] == {
        "supported": ["writable_page_tables", "pae_pgdir_above_4gb"],
        "required": ["writable_page_tables"],
        "unknown": ["frobnicate"],
    }
    notes = {n["name"]: n["value"] for n in d["notes"]}
    assert (notes["L1_MFN_VALID"], notes["0x63"], notes["GUEST_OS"]) == ([1, 1], "0102", "made")
    assert [(s["paddr"], s["loaded_at"], s["flags"]) for s in d["segments"]] == [
        (0x10_0000, BASE + 0x10_0000, "R E"),
        (0x10_1000, BASE + 0x10_1000, "RW "),
    ]


def test_image_of_a_compressed_kernel_on_a_pipe_is_unpacked() -> None:
    ran = xenpv("image", "-", stdin=gzip.compress(FULL.to_bytes()))
    assert ran.code == 0
    assert "-: gzip, " in lines(ran)
    assert "of gzip; inside it a 64-bit ELF file" in lines(ran)


def test_image_that_cannot_boot_shows_every_obstacle_and_exits_0(tmp_path: Path) -> None:
    file = tmp_path / "vmlinux"
    file.write_bytes(Kernel(notes=[*PV64, note(5, text("xen-4")), note(8, text("x"))]).to_bytes())
    ran = xenpv("image", file)
    assert (ran.code, ran.err) == (0, "")
    assert "PV cannot boot: it is for another loader: LOADER 'x'" in lines(ran)
    assert "\nit is for another Xen ABI: XEN_VERSION 'xen-4'" in lines(ran)
    assert "PVH cannot boot: it has no PHYS32_ENTRY note" in lines(ran)
    assert "Memory as PV" not in ran.out
    d = xenpv("image", "--json", file).json
    assert (d["pv"]["can_boot"], len(d["pv"]["why_not"]), d["pv"]["limits"]) == (False, 2, [])


def test_image_without_notes_shows_segments_but_no_requirements(tmp_path: Path) -> None:
    file = tmp_path / "vmlinux"
    file.write_bytes(Kernel(notes=[]).to_bytes())
    ran = xenpv("image", file)
    facts = xenpv("image", "--json", file).json
    assert (facts["notes"], facts["pv"]["can_boot"], "__xen_guest" in facts["pv"]["why_not"][0]) == ([], False, True)
    assert facts["pv"]["why_not"][0] in ran.out
    assert "p2m list" not in ran.out
    assert "Load segments" in ran.out


def test_image_with_a_xen_guest_string_shows_its_fields(tmp_path: Path) -> None:
    file = tmp_path / "vmlinux"
    kernel = kernel32(place="__xen_guest", legacy=LEGACY, loads=[Load(0xC010_0000, b"", 5)], entry=0xC010_0000)
    file.write_bytes(kernel.to_bytes())
    ran = xenpv("image", file)
    assert "Notes of the string __xen_guest" in ran.out
    assert "5 XEN_VER xen-3.0 the Xen ABI that the kernel is for" in lines(ran)
    assert "166.0 GiB" in ran.out


def test_image_with_an_initrd_has_less_room_for_the_p2m(tmp_path: Path) -> None:
    file = tmp_path / "vmlinux"
    file.write_bytes(Kernel().to_bytes())
    ran = xenpv("image", "--initrd", "64M", file)
    assert "Memory as PV, with an initrd of 64.0 MiB" in ran.out
    without, with_initrd = (
        xenpv("image", "--json", *options, file).json["pv"]["limits"][0]["max_pages"]
        for options in ((), ("--initrd", "64M"))
    )
    assert without - with_initrd == (64 << 20) // 8
    assert xenpv("image", "--initrd", "much", file).code == 64


def test_image_escapes_control_characters_and_markup(tmp_path: Path) -> None:
    file = tmp_path / "vmlinux"
    evil = text("linux\x1b[2J\r[red]\n[/]")
    file.write_bytes(Kernel(notes=[*PV64, note(6, evil), note(10, evil), note(8, evil), note(5, evil)]).to_bytes())
    ran = xenpv("image", file)
    assert ran.code == 0
    assert "\x1b" not in ran.out
    assert "\r" not in ran.out
    assert "[red]" in ran.out


NO_KERNEL = {
    "empty": (b"", "(at 0x0)"),
    "script": (b"#!/bin/sh\n", "23 21 2f"),
    "payload beyond the file": (bzimage("xz", FULL.to_bytes())[:3400], "payload_length"),
    "bad segment": (bzimage("xz", Kernel(loads=[Load(0, b"code", 3)]).to_bytes()), "in the unpacked kernel: "),
}


@pytest.mark.parametrize(("data", "part"), NO_KERNEL.values(), ids=NO_KERNEL)
def test_image_of_no_kernel_fails_and_names_the_file(tmp_path: Path, data: bytes, part: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(data)
    for name, ran in ((file, xenpv("image", file)), ("standard input", xenpv("image", "--json", "-", stdin=data))):
        assert ran.error.startswith(f"{name}: ")
        assert part in ran.error


def test_image_of_a_directory_or_missing_file_fails(tmp_path: Path) -> None:
    assert xenpv("image", tmp_path).error.startswith(f"{tmp_path}: is a directory")
    assert xenpv("image", tmp_path / "no").error == f"{tmp_path / 'no'}: No such file or directory"


def test_image_without_a_kernel_is_wrong_usage() -> None:
    assert "KERNEL" in xenpv("image").usage_error


def test_image_imports_neither_numpy_nor_decompressors() -> None:
    code = (
        "import sys, xenpv.cli.image; print([m for m in ('numpy', 'lz4', 'zstandard', 'elftools') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert ran.stdout == "[]\n"
