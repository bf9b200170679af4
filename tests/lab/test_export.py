"""A Debian guest exported: what stock tools say of the files, held against what the guest itself said.

gdb, crash and drgn need the kernel's debugging information: give its path as XENPV_VMLINUX (debuggers.md has where
from); without, and without gdb or crash, those parts are skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import drgn
import numpy as np
import pytest
from drgn.helpers.linux.pid import for_each_task

from lab import guests
from tests.support.lab.debian import Debian, has_marker, volatility
from xenpv.export.export import export
from xenpv.memory.page_tables import NO_PFN
from xenpv.source.open import open_domain

PAGE = 4096
VMLINUX = os.environ.get("XENPV_VMLINUX", "")
with_debug = pytest.mark.skipif(not VMLINUX, reason="XENPV_VMLINUX is not set")


def exported(path: Path, folder: Path, form: str) -> Path:
    out = folder / f"out.{form}"
    with open_domain(str(path)) as kept:
        done = export(kept, str(out), form)
        assert done.lost == 0
    return out


@pytest.mark.deep_elsewhere
def test_dumpcore_of_xls_core_is_the_same_again(debian: Debian, tmp_path: Path) -> None:
    """But for a note, Xen's own entries of the top tables, and what names no frame of the guest."""
    ours, theirs = exported(debian.core, tmp_path, "dumpcore").read_bytes(), debian.core.read_bytes()
    assert len(ours) == len(theirs)
    pages = [
        np.frombuffer(data[: len(data) // PAGE * PAGE], np.uint64).reshape(-1, PAGE // 8) for data in (ours, theirs)
    ]
    differs = pages[0] != pages[1]
    rows = np.flatnonzero(differs.any(axis=1))
    assert rows[0] == 0  # of the note
    assert 0 < len(rows) < 200
    differs[0] = differs[:, 256:272] = False
    frames = pages[0][differs] >> np.uint64(12) & np.uint64(NO_PFN)
    assert len(frames) < 10  # shared info, in the guest's fixmap
    assert (frames == NO_PFN).all()


@pytest.mark.deep_elsewhere
@pytest.mark.parametrize("form", ["elf", "lime"])
def test_export_opens_in_volatility_with_the_guests_processes(
    debian: Debian, symbols: Path, form: str, tmp_path: Path
) -> None:
    """By its own layers, which know nothing of Xen."""
    tasks = volatility(symbols, exported(debian.path, tmp_path, form), "linux.pslist.PsList")
    has_marker({task["PID"]: task["COMM"] for task in tasks})


@with_debug
@pytest.mark.deep
@pytest.mark.parametrize("kind", ["save", "core"])
@pytest.mark.parametrize("form", ["elf", "kdump"])
def test_export_opens_in_drgn_with_the_guests_processes(debian: Debian, form: str, kind: str, tmp_path: Path) -> None:
    prog = drgn.Program()
    prog.set_core_dump(exported(debian.path if kind == "save" else debian.core, tmp_path, form))
    prog.load_debug_info([VMLINUX])
    has_marker({task.pid.value_(): task.comm.string_().decode() for task in for_each_task(prog)})
    assert prog["linux_banner"].string_().decode().strip() == debian.version


@with_debug
@pytest.mark.deep
@pytest.mark.skipif(not shutil.which("gdb"), reason="there is no gdb")
def test_export_opens_in_gdb_with_banner_and_registers(debian: Debian, tmp_path: Path) -> None:
    core = exported(debian.path, tmp_path, "elf")
    words = ["-ex", 'printf "%s", linux_banner', "-ex", "info registers rip rsp", "-ex", "bt"]
    done = subprocess.run(
        ["gdb", "-nx", "-batch", *words, VMLINUX, str(core)], capture_output=True, text=True, check=True
    )
    assert debian.version in done.stdout
    with open_domain(str(debian.path)) as kept:
        registers = kept.registers(0)
    assert registers is not None
    assert re.search(rf"^rip +{registers.ip:#x} ", done.stdout, re.MULTILINE)
    assert re.search(rf"^rsp +{registers.sp:#x} ", done.stdout, re.MULTILINE)
    assert "xen_suspend" in done.stdout  # behind a hypercall: read from the stack, which is in vmalloc


@with_debug
@pytest.mark.deep
@pytest.mark.skipif(not shutil.which("crash"), reason="there is no crash")
@pytest.mark.parametrize("form", ["elf", "kdump", "dumpcore"])
def test_export_opens_in_crash_with_the_guests_processes(debian: Debian, form: str, tmp_path: Path) -> None:
    """crash before 8.0.4 knows of a kernel like this one no tasks but those that run (docs/howto/export.md)."""
    file = exported(debian.path, tmp_path, form)
    told = subprocess.run(["crash", "--version"], capture_output=True, text=True, check=True).stdout
    version = tuple(int(n) for n in re.findall(r"^crash (\d+)\.(\d+)\.(\d+)", told, re.MULTILINE)[0])
    commands = tmp_path / "commands"
    commands.write_text("sys\nps\nbt\nlog\nvtop 0xffffc90040080000\nquit\n")
    words = ["crash", "-s", "-i", str(commands), VMLINUX, str(file)]
    said = subprocess.run(words, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout
    assert "suspending xenstore" in said  # the last line of its log
    assert re.search(r"^ffffc90040080000 +[0-9a-f]+ *$", said, re.MULTILINE)
    assert re.search(r"^ #\d+ \[[0-9a-f]{16}\] (__schedule|default_idle)", said, re.MULTILINE)
    if version >= (8, 0, 4):
        assert said.count(f"  {guests.MARKER}") == 1
