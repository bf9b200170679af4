"""Time to open a large save file: without an index, while the index is made, and with it.

    python -m benchmarks.opening            100 GiB of pages
    python -m benchmarks.opening 10         10 GiB

The file is sparse and takes some 3 MB of disk for each GiB, in a temporary folder. Wall and processor seconds are the
least of three runs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import xenpv
from tests.support.writers.sparse import write_sparse
from xenpv.source.index_file import SUFFIX

RUNS = 3


def measure(path: Path, *, index: bool, remove_index: bool) -> tuple[float, float]:
    """Return wall and processor seconds of opening a file, with writing the index if there is none."""
    if remove_index:
        Path(f"{path}{SUFFIX}").unlink(missing_ok=True)
    wall, processor = time.perf_counter(), time.process_time()
    xenpv.open_domain(str(path), index=index).close()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gib", nargs="?", type=int, default=100, help="GiB of pages (default: %(default)s)")
    gib = parser.parse_args().gib
    cases = {"no index": (False, True), "making one": (True, True), "with index": (True, False)}
    with tempfile.TemporaryDirectory(prefix="xenpv-bench-") as folder:
        path = Path(folder) / "large.save"
        pages = write_sparse(path, gib << 30)
        print(f"{gib} GiB, {pages} pages, least of {RUNS} runs")
        for name, (index, remove_index) in cases.items():
            wall, processor = min(measure(path, index=index, remove_index=remove_index) for _ in range(RUNS))
            print(f"{name:<12}{wall:8.3f} s  {processor:8.3f} s of processor")
        print(f"index       {Path(f'{path}{SUFFIX}').stat().st_size:8} bytes")


if __name__ == "__main__":
    main()
