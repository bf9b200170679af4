"""xenpv verify and show beside Xen's verify-stream-v2 and `cat`: whole processes, in one run.

    python -m benchmarks.verify dom.save            your own save file, in xl's format
    python -m benchmarks.verify --guest 1024        a Debian guest of 1024 MiB, which the lab saves first
    python -m benchmarks.verify --sparse 100        `show` of a sparse file with 100 GiB of pages

Wall time and peak memory are the least of five runs in turns. Ratios are to the peer in the same run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import lab
from benchmarks.process import RUNS, SOURCES, XENPV, Command, Figure, run_in_turns
from lab import guests
from tests.support.writers.sparse import write_sparse


def compare(path: Path) -> None:
    """Compare the commands on one save file, first from the page cache, then from the disk."""
    tools = lab.peer_tools()
    peer = [sys.executable, str(tools.bin / "verify-stream-v2"), "-f", "xl", "-i", str(path)]
    commands: dict[str, Command] = {
        "cat": (["cat", str(path)], {}),
        "verify-stream-v2 (Xen's)": (peer, {"PYTHONPATH": str(tools.python)}),
        "xenpv verify --framing": ([*XENPV, "verify", "--framing", str(path)], SOURCES),
        "verify-stream-v2 (ours)": (
            [sys.executable, "-m", "xenpv.cli.verify_stream_v2", "-f", "xl", "-i", str(path)], SOURCES),
        "xenpv verify": ([*XENPV, "verify", str(path)], SOURCES),
        "xenpv show": ([*XENPV, "show", str(path)], SOURCES),
    }  # fmt: skip
    mib = path.stat().st_size / (1 << 20)
    print_figures(f"{path.name}: {mib:.1f} MiB, in the page cache, least of {RUNS} runs", run_in_turns(commands))
    print_figures(f"{path.name}: {mib:.1f} MiB, from the disk, least of {RUNS} runs", run_in_turns(commands, path))


def print_figures(title: str, figures: dict[str, Figure]) -> None:
    """Print a table of figures with ratios to the peer and to cat."""
    print(f"\n{title}\n")
    print(f"{'command':<28}{'seconds':>9}{'of peer':>9}{'of cat':>9}{'peak MiB':>10}{'of peer':>9}")
    peer, cat = figures["verify-stream-v2 (Xen's)"], figures["cat"]
    for name, f in figures.items():
        ratios = f"{f.seconds / peer.seconds:9.2f}{f.seconds / cat.seconds:9.1f}"
        print(f"{name:<28}{f.seconds:9.3f}{ratios}{f.peak / 1024:10.1f}{f.peak / peer.peak:9.2f}")


def saved_guest(mib: int, folder: Path) -> Path:
    """Save a Debian guest of so many MiB with stock xl on real Xen; return the file."""
    with lab.Host(mem=f"{mib * 2 + 4096}M", dom0_mem=f"{mib + 2048}M") as host:
        config = host.write("bench.cfg", guests.config("bench", memory=mib))
        host.run(f"xl create {config}", timeout=120).check()
        host.wait_for_guest("bench", f"{guests.BEAT} 1")
        result = host.run("xl save bench /tmp/saved && cp --sparse=never /tmp/saved .", timeout=600).check()
        path = folder / f"debian-{mib}.save"
        path.write_bytes((result.outputs / "saved").read_bytes())
    return path


def show_sparse(gib: int, folder: Path) -> None:
    """Measure `show` of a sparse file."""
    path = folder / f"sparse-{gib}.save"
    write_sparse(path, gib << 30)
    figure = run_in_turns({"show": ([*XENPV, "show", str(path)], SOURCES)})["show"]
    print(f"xenpv show of {gib} GiB: {figure.seconds:.3f} s, peak {figure.peak / 1024:.1f} MiB")


def main() -> None:
    """Run the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="a save file of xl")
    parser.add_argument(
        "--guest", type=int, action="append", default=[], metavar="MIB", help="save a guest of this size first"
    )
    parser.add_argument("--sparse", type=int, metavar="GIB", help="show a sparse file of this size")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="xenpv-bench-") as folder:
        if options.file:
            compare(options.file)
        for mib in options.guest:
            compare(saved_guest(mib, Path(folder)))
        if options.sparse:
            show_sparse(options.sparse, Path(folder))
        if not (options.file or options.guest or options.sparse):
            parser.error("name a FILE, --guest MIB or --sparse GIB")


if __name__ == "__main__":
    main()
