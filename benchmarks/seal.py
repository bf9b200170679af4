"""What a seal costs: saves of one model domain, with and without, in turns; time to memory and to a file on disk.

    python -m benchmarks.seal --memory 512

Ratios are of the least times of five turns, in the same run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from tests.support.kernel_guest import Guest
from xenpv.io.atomic_output import Output
from xenpv.save.save import save
from xenpv.stream.seal import Algorithm, Sealer

RUNS = 5
KEY = b"0123456789abcdef"


def measure(pages: int, folder: str | None) -> dict[str, float]:
    """Return the least seconds of each kind of save of a domain with that many pages."""
    guest = Guest.boot("linear", pages=pages)
    mfns = guest.do("free_pfns")
    guest.do("write_pattern", mfns, 7)
    guest.do("suspend")
    kinds: dict[str, Algorithm | None] = {"plain": None} | {a.name: a for a in Algorithm}
    best = dict.fromkeys(kinds, float("inf"))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for run in range(RUNS):
            for name, algorithm in kinds.items():
                sealer = None if algorithm is None else Sealer(KEY, algorithm)
                start = time.perf_counter()
                with Output.open(str(Path(place) / f"{name}{run}")) as out:
                    save(guest.host, guest.domid, out, seal=sealer)
                best[name] = min(best[name], time.perf_counter() - start)
                (Path(place) / f"{name}{run}").unlink()
    return best


def main() -> None:
    """Print seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=int, default=512, metavar="MIB", help="memory of the domain")
    parser.add_argument("--in", dest="folder", help="folder for the files, for example in memory")
    options = parser.parse_args()
    best = measure(options.memory << 8, options.folder)
    for name, seconds in best.items():
        print(f"{name:<12}{seconds:8.3f} s{seconds / best['plain']:8.2f}")


if __name__ == "__main__":
    main()
