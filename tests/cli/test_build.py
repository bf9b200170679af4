"""``xenpv build`` without Xen: save files, and requests that it refuses before it creates anything."""

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
    return xenpv("build", kernel, "--memory", "16M", "-o", kernel.parent / "out.save", *options)


def test_build_into_a_file_reports_name_size_and_next_command(kernel: Path) -> None:
    output = kernel.parent / "out.save"
    ran = build(kernel, "--name", "wéb")
    assert (ran.code, ran.raw) == (0, b"")
    assert ran.err.startswith(f"{output}: wéb, 16.0 MiB, ")
    assert f"xl restore {output}" in ran.err


def test_build_into_a_file_gives_a_file_that_verifies(kernel: Path) -> None:
    assert build(kernel).code == 0
    assert xenpv("verify", kernel.parent / "out.save").code == 0
    assert xenpv("show", "--json", kernel.parent / "out.save").json["config"]["name"] == "kernel.elf"


def test_build_with_too_little_memory_leaves_no_file(kernel: Path) -> None:
    assert xenpv("build", kernel, "--memory", "1M", "-o", kernel.parent / "out.save").error
    assert list(kernel.parent.iterdir()) == [kernel]


def test_build_json_counts_every_page(kernel: Path) -> None:
    ran = build(kernel, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert (ran.json["file"], ran.json["name"], ran.json["pages"]) == (
        str(kernel.parent / "out.save"), "kernel.elf", 4096,
    )  # fmt: skip
    assert ran.json["stored"] + ran.json["without_content"] == 4096


NAMES = {
    "empty": "",
    "newline": "a\nb",
    "256 bytes": "x" * 256,
    "256 bytes of utf-8": "é" * 128,
    "not unicode": os.fsdecode(b"a\xff"),
    "digits": "12",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_build_refuses_names_that_xl_cannot_hold(kernel: Path, name: str) -> None:
    assert "--name" in build(kernel, "--name", name).error
    assert list(kernel.parent.iterdir()) == [kernel]


def test_build_refuses_bad_ramdisks(kernel: Path) -> None:
    folder = kernel.parent
    empty, huge = folder / "empty", folder / "huge"
    empty.touch()
    with huge.open("wb") as file:
        file.truncate(1 << 42)  # build reads none of it
    for path, *parts in (
        (empty, f"{empty}: is empty"),
        (folder, f"{folder}: is a directory"),
        (folder / "no", f"{folder / 'no'}: No such file or directory"),
        (huge, "0x40000000 pages (4 TiB)", "0x1000 pages (16 MiB)"),
    ):
        error = build(kernel, "--ramdisk", path).error
        assert all(part in error for part in parts), error
    assert not (folder / "out.save").exists()


def test_build_names_the_kernel_in_errors(kernel: Path) -> None:
    kernel.write_bytes(b"MZ\x90\0" + bytes(500))
    assert build(kernel).error.startswith(f"{kernel}: ")


def test_build_refuses_options_that_exclude_each_other(kernel: Path) -> None:
    assert "--json" in xenpv("build", kernel, "--memory", "16M", "-o", "-", "--json").usage_error
    assert "--start" in build(kernel, "--start").usage_error


def test_build_without_xen_fails(kernel: Path) -> None:
    assert xenpv("build", kernel, "--memory", "16M", "--name", "x").error.startswith("not on a Xen host")
