"""drgn and Volatility 3 over a Debian guest, by our plug-ins: its save file, its core, and the guest while it runs.

What they say is held against what the guest printed. drgn needs the kernel's debugging information for more than
symbols and memory: give its path as XENPV_VMLINUX (debuggers.md has where from); without, that part is skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
from drgn import Program
from drgn.helpers.linux.kallsyms import load_vmlinux_kallsyms
from drgn.helpers.linux.pid import for_each_task

import lab
from lab import guests
from tests.support.lab.debian import Debian, has_marker, volatility
from tests.support.lab.guest import ONE_VERSION
from xenpv.plugins.drgn import program, stack_of
from xenpv.source.open import open_domain

KINDS = ["save", "core"]
VMLINUX = os.environ.get("XENPV_VMLINUX", "")
with_debug = pytest.mark.skipif(not VMLINUX, reason="XENPV_VMLINUX is not set")


def path_of(debian: Debian, kind: str) -> Path:
    return debian.path if kind == "save" else debian.core


# --- Volatility ------------------------------------------------------------------------------------------------------


@pytest.mark.deep_elsewhere
@pytest.mark.parametrize("kind", KINDS)
def test_volatility_plugin_lists_the_guests_processes(debian: Debian, symbols: Path, kind: str) -> None:
    tasks = volatility(symbols, path_of(debian, kind), "linux.pslist.PsList", by_folder=kind == "core")
    has_marker({task["PID"]: task["COMM"] for task in tasks})


@pytest.mark.deep_elsewhere
def test_volatility_plugin_finds_the_banner(debian: Debian, symbols: Path) -> None:
    """At its pseudo-physical address."""
    banners = {b["Offset"]: b["Banner"] for b in volatility(symbols, debian.path, "banners.Banners")}
    with open_domain(str(debian.path)) as kept:
        at = debian.symbols["linux_banner"]
        pfn = kept.memory.walk(at).pfn
    assert pfn is not None
    assert banners[pfn << 12 | at & 4095].startswith(debian.version)


# --- drgn ------------------------------------------------------------------------------------------------------------


@pytest.mark.deep_elsewhere
@pytest.mark.parametrize("kind", KINDS)
def test_drgn_plugin_reads_the_kernels_symbols(debian: Debian, kind: str) -> None:
    """Out of the guest's memory, without debugging information: kallsyms as the guest itself has them."""
    with open_domain(str(path_of(debian, kind))) as kept:
        prog = program(kept)
        prog.register_symbol_finder("kallsyms", load_vmlinux_kallsyms(prog), enable_index=0)
        assert {name: prog.symbol(name).address for name in debian.symbols} == debian.symbols
        assert prog.read_c_string(debian.symbols["linux_banner"]).decode().strip() == debian.version


def debugged(prog: Program) -> Program:
    prog.load_debug_info([VMLINUX])
    return prog


@with_debug
@pytest.mark.deep
@pytest.mark.parametrize("kind", KINDS)
def test_drgn_plugin_lists_processes_and_vcpu_stacks(debian: Debian, kind: str) -> None:
    with open_domain(str(path_of(debian, kind))) as kept:
        prog = debugged(program(kept))
        has_marker({task.pid.value_(): task.comm.string_().decode() for task in for_each_task(prog)})
        [marker] = [task for task in for_each_task(prog) if task.comm.string_().decode() == guests.MARKER]
        assert "context_switch" in {frame.name for frame in prog.stack_trace(marker)}
        names = [frame.name for frame in stack_of(prog, kept, 0)]
    assert ("xen_suspend" in names) == (kind == "save")  # a saved guest stands in its suspend


LIVE = """
import json, sys
from drgn.helpers.linux import for_each_task
said = {"banner": prog.read_c_string(int(sys.argv[1], 16)).decode()}
if len(sys.argv) > 2:
    said["tasks"] = {task.pid.value_(): task.comm.string_().decode() for task in for_each_task(prog)}
    said["stack"] = [frame.name for frame in stack_of(0)]
json.dump(said, sys.stdout)
"""


@ONE_VERSION
@pytest.mark.deep
@pytest.mark.parametrize("how", ["--pause", ""])
def test_drgn_plugin_reads_a_running_guest_from_dom0(host: lab.Host, how: str) -> None:
    if sys.version_info[:2] != (3, 11):
        pytest.skip("dom0's Python is 3.11, and drgn is installed for another here")
    name = "debian-drgn"
    config = host.write("drgn.cfg", guests.config(name))
    start = len(host.guest_console(name))
    host.run(f"xl create {config}").check()
    host.wait_for_guest(name, f"{guests.BEAT} 1", after=start)
    console = host.guest_console(name)[start:]
    banner = re.search(r"symbol (\w+) linux_banner", console)
    version = re.search(r"xenpv-guest: version (.*)", console)
    assert banner
    assert version
    site = Path(sysconfig.get_path("platlib"))
    for part in [*site.glob("drgn*"), *site.glob("_drgn*")]:
        if part.is_dir():
            shutil.copytree(part, host.share / "site" / part.name, dirs_exist_ok=True)
        else:
            host.put(part, f"site/{part.name}")
    script = host.write("live.py", LIVE)
    symbols = f"-s {host.put(Path(VMLINUX), 'vmlinux')}" if VMLINUX else ""
    command = f"python3 -m xenpv.plugins.drgn {symbols} {how} {name} {script} {banner[1]} {'all' if VMLINUX else ''}"
    said = json.loads(host.run(f"PYTHONPATH=/share/site:$PYTHONPATH {command}", timeout=500).check().stdout)
    assert said["banner"].strip() == version[1]
    if VMLINUX:
        has_marker({int(pid): comm for pid, comm in said["tasks"].items()})
        assert said["stack"] or not how
