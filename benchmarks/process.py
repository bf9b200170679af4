"""Wall time and peak memory of whole processes, for the benchmarks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

RUNS = 5
XENPV = [sys.executable, "-m", "xenpv"]
SOURCES = {"PYTHONPATH": str(Path(__file__).resolve().parent.parent / "src")}
"""The environment in which XENPV runs."""

Command = tuple[list[str], dict[str, str]]
"""Arguments, and variables to add to the environment."""

# A process's peak memory includes what it had before exec, so a process that has next to nothing starts the command.
_LAUNCH = """
import os, sys, time
start = time.perf_counter()
null = [(os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)]
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=null)
_, status, usage = os.wait4(pid, 0)
print(time.perf_counter() - start, usage.ru_maxrss, os.waitstatus_to_exitcode(status))
"""


@dataclass
class Figure:
    """The least wall time (seconds) and the least peak resident size (KiB) of all runs of a command."""

    seconds: float = float("inf")
    peak: float = float("inf")

    def run(self, command: list[str], environment: dict[str, str]) -> None:
        """Run the command once more."""
        launched = subprocess.run([sys.executable, "-S", "-E", "-c", _LAUNCH, *command],
                                  env={**os.environ, **environment},
                                  stdout=subprocess.PIPE, text=True, check=True)  # fmt: skip
        seconds, peak, status = launched.stdout.split()
        self.seconds = min(self.seconds, float(seconds))
        self.peak = min(self.peak, int(peak))
        if int(status):
            raise SystemExit(f"{' '.join(command)}: exit status {status}")


def run_in_turns(commands: dict[str, Command], cold: Path | None = None) -> dict[str, Figure]:
    """Run all commands in turns, RUNS times each.

    Args:
        commands: The commands by name.
        cold: A file to drop from the page cache before each run.
    """
    figures = {name: Figure() for name in commands}
    # From the second run on Python finds compiled modules, as after an installation by pip.
    with tempfile.TemporaryDirectory() as folder:
        compiled = {"PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        for _ in range(RUNS):
            for name, (command, environment) in commands.items():
                if cold is not None:
                    drop_from_cache(cold)
                figures[name].run(command, compiled | environment)
    return figures


def drop_from_cache(path: Path) -> None:
    """Make the kernel drop a file's pages from its cache, so that reading the file means the disk."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
