"""xenpv build without a Xen: files that it makes, and what it refuses before anything is created."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.command import Ran, xenpv
from tests.support.writers.kernel import PV64, Kernel, note, quad

P2M = note(15, quad(1 << 39))


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    file = tmp_path / "kernel.elf"
    file.write_bytes(Kernel(notes=[*PV64, P2M]).to_bytes())
    return file


def build(kernel: Path, *options: object) -> Ran:
    return xenpv("build", kernel, "--memory", "16M", "-o", kernel.parent / "made.save", *options)


def test_what_it_says_of_a_file(kernel: Path) -> None:
    saved = kernel.parent / "made.save"
    ran = build(kernel, "--name", "wéb")
    assert (ran.code, ran.raw) == (0, b"")
    assert ran.err.startswith(f"{saved}: wéb, 16.0 MiB, ")
    assert ran.err.endswith(f"without content; start it by: xl restore {saved}\n")
    ran = build(kernel, "--json")
    assert (ran.code, ran.err) == (0, "")
    said = ran.json
    assert (said["file"], said["name"], said["pages"]) == (str(saved), "kernel.elf", 4096)
    assert said["stored"] + said["without_content"] == 4096


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 256, "é" * 128, os.fsdecode(b"a\xff")])
def test_a_name_that_nobody_could_type(kernel: Path, name: str) -> None:
    ran = build(kernel, "--name", name)
    assert (ran.code, list(kernel.parent.iterdir())) == (1, [kernel])
    assert ran.err.startswith("xenpv: error: a name has 1 to 255 bytes that can be printed, not '")
    assert ran.err.count("\n") == 1


def test_a_name_that_would_be_an_id(kernel: Path) -> None:
    assert build(kernel, "--name", "12").err == (
        "xenpv: error: the name '12' would be taken for a domain's id; say another --name\n"
    )


def test_ramdisks_that_are_none(kernel: Path) -> None:
    folder = kernel.parent
    empty, huge = folder / "empty", folder / "huge"
    empty.touch()
    with huge.open("wb") as file:
        file.truncate(1 << 42)  # of which nothing is read
    for path, sentence in (
        (empty, f"{empty}: is empty; nothing takes an empty ramdisk"),
        (folder, f"{folder}: is a directory, not a ramdisk"),
        (folder / "no", f"{folder / 'no'}: No such file or directory"),
        (huge, "a ramdisk of 0x40000000 pages (4 TiB) is larger than the memory, 0x1000 pages (16 MiB)"),
    ):
        ran = build(kernel, "--ramdisk", path)
        assert (ran.code, ran.err) == (1, f"xenpv: error: {sentence}\n")
    assert not (folder / "made.save").exists()


def test_errors_name_the_kernel(kernel: Path) -> None:
    kernel.write_bytes(b"MZ\x90\0" + bytes(500))
    assert build(kernel).err.startswith(f"xenpv: error: {kernel}: a PE program (Windows")


def test_what_does_not_go_together(kernel: Path) -> None:
    ran = xenpv("build", kernel, "--memory", "16M", "-o", "-", "--json")
    assert (ran.code, ran.raw) == (64, b"")
    assert "standard output is the file" in ran.err
    assert build(kernel, "--start").code == 64


def test_with_no_xen_below_it_says_so(kernel: Path) -> None:
    ran = xenpv("build", kernel, "--memory", "16M", "--name", "x")
    assert (ran.code, ran.raw) == (1, b"")
    assert ran.err.startswith("xenpv: error: not on a Xen host")
