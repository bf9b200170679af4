"""xenpv verify and show against Xen's verify-stream-v2 and `cat`, whole processes, in one run.

    python -m benchmarks.verify dom.save            a save file of your own (xl's format)
    python -m benchmarks.verify --guest 1024        a Debian guest of 1024 MiB, saved in the lab now
    python -m benchmarks.verify --sparse 100        `show` of a made, sparse file of 100 GiB

Wall time and peak memory are the least of some runs, taken in turns; figures are ratios to the peer in the same run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import lab
from lab import guests
from tests.support.writers.sparse import write_sparse

ROOT = Path(__file__).resolve().parent.parent
RUNS = 5

# A process's peak memory counts what it had before exec, so it is measured from one that has next to nothing.
LAUNCH = """
import os, sys, time
start = time.perf_counter()
null = [(os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)]
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=null)
_, status, usage = os.wait4(pid, 0)
print(time.perf_counter() - start, usage.ru_maxrss, os.waitstatus_to_exitcode(status))
"""


@dataclass
class Figure:
    """The least wall time, in seconds, and the least peak resident size, in KiB, of a command's runs."""

    seconds: float = float("inf")
    peak: float = float("inf")

    def run(self, command: list[str], env: dict[str, str]) -> None:
        """Run once more."""
        launched = subprocess.run([sys.executable, "-S", "-E", "-c", LAUNCH, *command], env={**os.environ, **env},
                                  stdout=subprocess.PIPE, text=True, check=True)  # fmt: skip
        seconds, peak, status = launched.stdout.split()
        self.seconds = min(self.seconds, float(seconds))
        self.peak = min(self.peak, int(peak))
        if int(status):
            raise SystemExit(f"{' '.join(command)}: ended with {status}")


def in_turns(commands: dict[str, tuple[list[str], dict[str, str]]], cold: Path | None = None) -> dict[str, Figure]:
    """Run all commands, one after the other, RUNS times; with ``cold``, that file is thrown out of the cache before."""
    figures = {name: Figure() for name in commands}
    # Compiled modules are there from the second run on, as pip leaves them, whatever Python is told of the sources.
    with tempfile.TemporaryDirectory() as folder:
        compiled = {"PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
        for _ in range(RUNS):
            for name, (command, env) in commands.items():
                if cold is not None:
                    forget(cold)
                figures[name].run(command, compiled | env)
    return figures


def forget(path: Path) -> None:
    """Have the kernel drop the file's pages, so that reading it means the disk."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def compare(path: Path) -> None:
    """The comparison on one save file."""
    tools = lab.peer_tools()
    ours = [sys.executable, "-m", "xenpv"]
    src = {"PYTHONPATH": str(ROOT / "src")}
    peer = [sys.executable, str(tools.bin / "verify-stream-v2"), "-f", "xl", "-i", str(path)]
    commands: dict[str, tuple[list[str], dict[str, str]]] = {
        "cat": (["cat", str(path)], {}),
        "verify-stream-v2 (Xen's)": (peer, {"PYTHONPATH": str(tools.python)}),
        "xenpv verify --framing": ([*ours, "verify", "--framing", str(path)], src),
        "verify-stream-v2 (ours)": (
            [sys.executable, "-m", "xenpv.cli.verify_stream_v2", "-f", "xl", "-i", str(path)], src),
        "xenpv verify": ([*ours, "verify", str(path)], src),
        "xenpv show": ([*ours, "show", str(path)], src),
    }  # fmt: skip
    mib = path.stat().st_size / (1 << 20)
    print_figures(f"{path.name}: {mib:.1f} MiB, in the page cache, least of {RUNS} runs", in_turns(commands))
    print_figures(f"{path.name}: {mib:.1f} MiB, from the disk, least of {RUNS} runs", in_turns(commands, path))


def print_figures(title: str, figures: dict[str, Figure]) -> None:
    """A table of figures, with ratios to the peer and to cat."""
    print(f"\n{title}\n")
    print(f"{'command':<28}{'seconds':>9}{'of peer':>9}{'of cat':>9}{'peak MiB':>10}{'of peer':>9}")
    base, cat = figures["verify-stream-v2 (Xen's)"], figures["cat"]
    for name, f in figures.items():
        ratios = f"{f.seconds / base.seconds:9.2f}{f.seconds / cat.seconds:9.1f}"
        print(f"{name:<28}{f.seconds:9.3f}{ratios}{f.peak / 1024:10.1f}{f.peak / base.peak:9.2f}")


def saved_guest(mib: int, folder: Path) -> Path:
    """A Debian guest of that many MiB, saved by stock xl on real Xen."""
    with lab.Host(mem=f"{mib * 2 + 4096}M", dom0_mem=f"{mib + 2048}M") as host:
        config = host.write("bench.cfg", guests.config("bench", memory=mib))
        host.run(f"xl create {config}", timeout=120).check()
        host.wait_for_guest("bench", f"{guests.BEAT} 1")
        result = host.run("xl save bench /tmp/saved && cp --sparse=never /tmp/saved .", timeout=600).check()
        path = folder / f"debian-{mib}.save"
        path.write_bytes((result.outputs / "saved").read_bytes())
    return path


def show_sparse(gib: int, folder: Path) -> None:
    """`show` of a huge file."""
    path = folder / f"sparse-{gib}.save"
    write_sparse(path, gib << 30)
    figure = in_turns({"show": ([sys.executable, "-m", "xenpv", "show", str(path)], {"PYTHONPATH": str(ROOT / "src")})})
    print(f"xenpv show of {gib} GiB: {figure['show'].seconds:.3f} s, peak {figure['show'].peak / 1024:.1f} MiB")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="a save file of xl's")
    parser.add_argument("--guest", type=int, action="append", default=[], metavar="MIB", help="save such a guest first")
    parser.add_argument("--sparse", type=int, metavar="GIB", help="show a made file of this size")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="xenpv-bench-") as folder:
        if options.file:
            compare(options.file)
        for mib in options.guest:
            compare(saved_guest(mib, Path(folder)))
        if options.sparse:
            show_sparse(options.sparse, Path(folder))
        if not (options.file or options.guest or options.sparse):
            parser.error("say what to measure: a FILE, --guest MIB or --sparse GIB")


if __name__ == "__main__":
    main()
