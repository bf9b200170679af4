"""How long it takes to open large files: a save file of 100 GiB, without an index and with one.

    python -m benchmarks.opening [GiB]

The file is sparse: it takes some 300 MB of disk, in a temporary folder. Processor and wall clock, best of three.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.support.writers.sparse import write_sparse
from xenpv.source.index_file import SUFFIX
from xenpv.source.open import open_domain


def measured(path: Path, *, index: bool, fresh: bool) -> tuple[float, float]:
    """Wall and processor seconds of one opening, the index that is asked of it included."""
    if fresh:
        Path(f"{path}{SUFFIX}").unlink(missing_ok=True)
    wall, cpu = time.perf_counter(), time.process_time()
    open_domain(str(path), index=index).close()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    gib = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.save"
        pages = write_sparse(path, gib << 30)
        print(f"{gib} GiB, {pages} pages")
        for what, index, fresh in (("no index", False, True), ("first time", True, True), ("with index", True, False)):
            wall, cpu = min(measured(path, index=index, fresh=fresh) for _ in range(3))
            print(f"{what:<12}{wall:8.3f} s  {cpu:8.3f} s of processor")
        print(f"index       {Path(f'{path}{SUFFIX}').stat().st_size:8} bytes")


if __name__ == "__main__":
    main()
