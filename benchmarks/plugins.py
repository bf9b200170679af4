"""xenpv's layer for Volatility 3 beside Volatility's own layer for Xen cores: in one process, in turns.

    python -m benchmarks.plugins                   a generated HVM core, PV core and save file of 1 GiB each
    python -m benchmarks.plugins --made 4096       of 4096 MiB each
    python -m benchmarks.plugins dom.core dom.save your own files

Volatility opens a file twice for each run of a plug-in. Measured are opening, a scan of all memory for a string that is
not there, and 100,000 reads of 8 bytes in 2,000 pages, like walks of page tables and lists. Seconds are the least of
three runs; ratios are to Volatility's own layer on the same file.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from volatility3.framework import contexts, exceptions, interfaces
from volatility3.framework.layers import physical, scanners, xen

from tests.support.writers.core import Core
from tests.support.writers.sparse import write_sparse
from xenpv.frames import PAGE_SIZE
from xenpv.plugins.volatility.domain_layer import DomainLayer
from xenpv.stream.dumpcore import is_core

RUNS = 3
READS, PAGES = 100_000, 2_000


def write_core(path: Path, mib: int, *, hvm: bool) -> None:
    """Write the core of a domain of so many MiB, whose pages are all holes of the file."""
    pages = (mib << 20) // PAGE_SIZE
    pfns = np.arange(pages, dtype=np.uint64)
    table = np.stack([pfns, pfns + np.uint64(1 << 20)], axis=1)
    at = 1 << 26
    place = {".xen_pages": at}
    core = Core(8, [], table, [], None, hvm, pages, sizes={".xen_pages": pages * PAGE_SIZE}, offsets=place)
    path.write_bytes(bytes(core))
    with path.open("r+b") as file:
        file.truncate(at + pages * PAGE_SIZE)


def open_volatility_layer(context: contexts.Context, path: Path) -> interfaces.layers.DataLayerInterface:
    """Return Volatility's own layer, as its stacker makes it."""
    context.config["file.location"] = path.as_uri()
    context.add_layer(physical.FileLayer(context, "file", "file"))
    context.config["layer.base_layer"] = "file"
    return xen.XenCoreDumpLayer(context, "layer", "layer")


def open_xenpv_layer(context: contexts.Context, path: Path) -> interfaces.layers.DataLayerInterface:
    """Return xenpv's layer, as its stacker makes it."""
    context.config["layer.location"] = path.as_uri()
    return DomainLayer(context, "layer", "layer")


Opener = Callable[[contexts.Context, Path], interfaces.layers.DataLayerInterface]


def measure(opener: Opener, path: Path) -> list[float]:
    """Return seconds to open, to scan, and to read at random places, of one run."""
    context = contexts.Context()
    start = time.perf_counter()
    layer = opener(context, path)
    opened = time.perf_counter()
    context.add_layer(layer)
    assert not list(layer.scan(context, scanners.BytesScanner(b"no such string")))
    scanned = time.perf_counter()
    rng = random.Random(1)
    last = (layer.maximum_address + 1) // PAGE_SIZE
    pages = [page for page in rng.choices(range(last), k=PAGES) if layer.is_valid(page * PAGE_SIZE)]
    addresses = [page * PAGE_SIZE + rng.randrange(512) * 8 for page in rng.choices(pages, k=READS)]
    ready = time.perf_counter()
    for address in addresses:
        layer.read(address, 8)
    read = time.perf_counter()
    for name in context.layers:
        context.layers[name].destroy()
    return [opened - start, scanned - opened, read - ready]


def compare(path: Path) -> None:
    """Compare the layers on one file."""
    print(f"\n{path.name}: {path.stat().st_size / (1 << 20):.1f} MiB, least of {RUNS} runs\n")
    print(f"{'layer':<22}{'open':>9}{'scan':>9}{'reads':>9}  seconds; times as fast as Volatility's own")
    figures: dict[str, list[float]] = {}
    with path.open("rb") as file:
        core = is_core(file.read(64))
    openers: dict[str, Opener] = {"Volatility's": open_volatility_layer, "xenpv's": open_xenpv_layer}
    if not core:  # Volatility has no layer for save files
        del openers["Volatility's"]
    for _ in range(RUNS):
        for name, opener in list(openers.items()):
            try:
                seconds = measure(opener, path)
            except (exceptions.VolatilityException, AttributeError) as e:
                print(f"{name:<22}{type(e).__name__}: {e}"[:110])
                del openers[name]
            else:
                figures[name] = np.minimum(figures.get(name, seconds), seconds).tolist()
    for name, seconds in figures.items():
        ratios = ""
        if name != "Volatility's" and "Volatility's" in figures:
            ratios = "".join(f"{a / b:9.1f}" for a, b in zip(figures["Volatility's"], seconds, strict=True))
        print(f"{name:<22}" + "".join(f"{s:9.3f}" for s in seconds) + ratios)


def main() -> None:
    """Run the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="a core or a save file")
    parser.add_argument(
        "--made", type=int, default=1024, metavar="MIB", help="size of the generated files (default: %(default)s)"
    )
    options = parser.parse_args()
    if options.files:
        for file in options.files:
            compare(file.absolute())
        return
    with tempfile.TemporaryDirectory(prefix="xenpv-bench-") as folder:
        for name, hvm in (("hvm", True), ("pv", False)):
            path = Path(folder) / f"{name}-{options.made}.core"
            write_core(path, options.made, hvm=hvm)
            compare(path)
        path = Path(folder) / f"pv-{options.made}.save"
        write_sparse(path, options.made << 20)
        compare(path)


if __name__ == "__main__":
    main()
