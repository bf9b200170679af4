"""A Debian guest that stock xl saved, and what Volatility and drgn tell about it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lab
import xenpv.plugins.volatility
from lab import guests

DEBIAN_MIB = 96
ALWAYS = {1: "init", 2: "kthreadd"}


@dataclass
class Debian:
    """A Debian guest as it was: its save file, its core from before the save, what xl and the guest itself said."""

    path: Path
    core: Path
    xl: dict[str, Any]
    symbols: dict[str, int]
    version: str


def save_debian(host: lab.Host, keep: Path) -> Debian:
    config = host.write("debian.cfg", guests.config("debian-saved", memory=DEBIAN_MIB))
    start = len(host.guest_console("debian-saved"))
    host.run(f"xl create {config}").check()
    host.wait_for_guest("debian-saved", f"{guests.BEAT} 1", after=start)
    console = host.guest_console("debian-saved")[start:]
    symbols = {name: int(at, 16) for at, name in re.findall(r"symbol ([0-9a-f]+) (\w+)", console)}
    version = re.search(r"xenpv-guest: version (.*)", console)
    assert version is not None
    result = host.run(
        "xl list -l debian-saved > list.json && "
        # It stands still meanwhile: else pages are of different moments, and a process may take its tables along.
        "xl pause debian-saved && xl dump-core debian-saved /tmp/core && xl unpause debian-saved && "
        "xl save debian-saved /tmp/saved && xenpv verify /tmp/saved && mv /tmp/saved /tmp/core .",
        timeout=240,
    ).check()
    for name in ("saved", "core"):
        (result.outputs / name).rename(keep / name)
    listed = json.loads((result.outputs / "list.json").read_text())
    xl = listed[0] if isinstance(listed, list) else listed
    return Debian(keep / "saved", keep / "core", xl, symbols, version.group(1))


def volatility(symbols: Path, file: Path, plugin: str, *, by_folder: bool = False) -> Any:
    """What one of Volatility's plug-ins says: by our module, or by its own command and the folder."""
    [folder] = xenpv.plugins.volatility.__path__
    ours = [sys.executable, "-m", "xenpv.plugins.volatility"]
    words = [str(Path(sys.executable).with_name("vol")), "-p", folder] if by_folder else ours
    words += ["-q", "--offline", "--cache-path", str(symbols.parent / "cache"), "-s", str(symbols), "-r", "json"]
    done = subprocess.run([*words, "-f", str(file), plugin], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout[done.stdout.index("[") :])


def has_marker(tasks: dict[int, str]) -> None:
    assert {pid: tasks.get(pid) for pid in ALWAYS} == ALWAYS
    assert list(tasks.values()).count(guests.MARKER) == 1
    assert len(tasks) > 30
