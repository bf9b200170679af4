"""xenpv export beside `cp --sparse=always` of the same save file: whole processes, in one run.

    python -m benchmarks.export dom.save            your own save file
    python -m benchmarks.export --made 1024         a generated domain of 1024 MiB; half of its pages are zero
    python -m benchmarks.export --made 1024 --in /dev/shm

Wall time and peak memory are the least of five runs in turns. Ratios are to cp in the same run. An export is on the
disk when its file appears, so cp is measured twice: alone, and with the `sync` that gives the same guarantee.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.process import RUNS, SOURCES, XENPV, Command, run_in_turns
from tests.support.writers.sparse import write_sparse
from xenpv.frames import PAGE_SIZE
from xenpv.source.saved import SavedDomain

FORMATS = ["elf", "lime", "raw", "dumpcore", "kdump"]
_RUN = 16  # pages


def write_half_zero_domain(path: Path, mib: int) -> None:
    """Write the save file of a domain: runs of random pages alternate with runs of zero pages."""
    write_sparse(path, mib << 20)
    random = np.random.default_rng(1)
    with SavedDomain.open(str(path)) as domain, path.open("r+b") as file:
        last = domain.contents.index.last_pfn
        firsts = np.arange(1 << 12, last - _RUN, 2 * _RUN, dtype=np.uint64)
        for at in domain.contents.index.offsets(firsts).tolist():
            os.pwrite(file.fileno(), random.bytes(_RUN * PAGE_SIZE), at)


def compare(path: Path, folder: Path) -> None:
    """Compare each format with cp."""
    copy = ["cp", "--sparse=always", str(path), str(folder / "copy")]
    commands: dict[str, Command] = {
        "cp --sparse=always": (copy, {}),
        "cp --sparse=always, sync": (["sh", "-c", '"$@" && sync "$4"', "sh", *copy], {}),
        "import xenpv.cli.export": ([sys.executable, "-c", "import xenpv.cli.export"], SOURCES),
    }
    for form in FORMATS:
        out = str(folder / f"out.{form}")
        commands[f"xenpv export {form}"] = ([*XENPV, "export", "-f", form, str(path), out], SOURCES)
    kdump, environment = commands["xenpv export kdump"]
    commands["xenpv export kdump, zstd"] = ([*kdump, "--compression", "zstd"], environment)
    figures = run_in_turns(commands)
    print(f"\n{path.name}: {path.stat().st_size / (1 << 20):.1f} MiB, in the page cache, least of {RUNS} runs\n")
    print(f"{'command':<28}{'seconds':>9}{'of cp':>8}{'of cp+sync':>12}{'peak MiB':>10}")
    cp, synced = figures["cp --sparse=always"], figures["cp --sparse=always, sync"]
    for name, f in figures.items():
        ratios = f"{f.seconds / cp.seconds:8.2f}{f.seconds / synced.seconds:12.2f}"
        print(f"{name:<28}{f.seconds:9.3f}{ratios}{f.peak / 1024:10.1f}")


def main() -> None:
    """Run the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="a save file")
    parser.add_argument(
        "--made", type=int, action="append", default=[], metavar="MIB", help="generate a domain of this size first"
    )
    parser.add_argument("--in", dest="folder", type=Path, help="folder for all files, for example in memory")
    options = parser.parse_args()
    if not (options.file or options.made):
        parser.error("name a FILE or --made MIB")
    with tempfile.TemporaryDirectory(prefix="xenpv-bench-", dir=options.folder) as folder:
        if options.file:
            compare(options.file, Path(folder))
        for mib in options.made:
            path = Path(folder) / f"made-{mib}.save"
            write_half_zero_domain(path, mib)
            compare(path, Path(folder))


if __name__ == "__main__":
    main()
