"""What of the cache is of use outside dom0: fetching ahead, Xen's public headers, and the peers' tools."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import cache, guests, programs, trees, versions


def fetch(wanted: Iterable[str] = (), *, prune: bool = False) -> None:
    """Bring all that the versions need (all versions, if none is named) into the cache."""
    programs.require(programs.FETCH)
    every = list(wanted) or versions.names()
    needed = [tree for xen in every for tree in (*trees.of_version(xen), trees.headers(xen))]
    needed += guests.trees_needed()
    trees.fetch(needed)
    folder = guests.folder()
    if prune:
        with cache.locked():
            for name in cache.prune({folder.name, *(tree.folder_name for tree in needed)}):
                cache.say(f"removed {name}")


def headers(xen: str = versions.DEFAULT) -> Path:
    """The include folder of that version's libxen-dev, with xen/xen.h in it."""
    programs.require(programs.FETCH)
    tree = trees.headers(xen)
    trees.fetch([tree])
    return tree.path / "usr/include"


@dataclass(frozen=True, slots=True)
class PeerTools:
    """Xen's own stream tools: scripts in `bin`, their modules (xen.migration) in `python`."""

    bin: Path
    python: Path

    def run(self, tool: str, *arguments: str, pass_fds: Sequence[int] = ()) -> subprocess.CompletedProcess[str]:
        """Run verify-stream-v2 or convert-legacy-stream with this machine's Python."""
        words = [sys.executable, "-B", str(self.bin / tool), *arguments]
        env = {**os.environ, "PYTHONPATH": str(self.python)}
        return subprocess.run(words, env=env, capture_output=True, text=True, check=False, pass_fds=pass_fds)


def peer_tools(xen: str = versions.DEFAULT) -> PeerTools:
    """The tools of that version's xen-utils, to be run on this machine."""
    programs.require(programs.FETCH)
    tree = trees.of_xen(xen)
    trees.fetch([tree])
    folder = tree.path / f"usr/lib/xen-{xen}"
    return PeerTools(folder / "bin", folder / "lib/python")
