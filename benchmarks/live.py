"""xl save and xl restore on real Xen: xenpv's save helper beside libxl's own, in turns, in the same boot.

    python -m benchmarks.live                           a Debian guest of 512 MiB on Xen 4.14
    python -m benchmarks.live --lab 4.17 --guest 1024   another Xen and a larger guest
    python -m benchmarks.live --sparse 1T --runs 1      a litmus of 64 MiB with pfns up to 1 TiB (stock: 16 minutes)
    python -m benchmarks.live --sparse 16T --ours       without stock, which would take hours

Ratios are ours to stock: wall time of xl, length of the stream, peak memory of the helper. Beside them stands the time
that our helper takes to start.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from typing import Any

import lab
from lab import guests
from xenpv.cli.terminal import NUMBER
from xenpv.frames import PAGE_SIZE

RUNS = 3
# libxl starts this in place of the helper. It runs the helper and writes the figures to a file.
_MEASURED = """#!/usr/bin/python3 -IS
import json, os, sys, time
start = time.monotonic()
child = os.fork()
if not child:
    os.execv({program!r}, [{program!r}, *sys.argv[1:]])
_, status, usage = os.wait4(child, 0)
with open("/tmp/measured", "w") as file:
    json.dump({{"helper": time.monotonic() - start, "cpu": usage.ru_utime + usage.ru_stime,
               "MiB": usage.ru_maxrss / 1024}}, file)
os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
"""
# Runs in dom0: saves and restores the domain with each helper in turn, and prints the figures.
_TURNS = """
import json, os, subprocess, sys, time
name, runs, helpers = sys.argv[1], int(sys.argv[2]), sys.argv[3:]

def xl(verb, helper, *command):
    start = time.monotonic()
    subprocess.run(["xl", *command], check=True, env=os.environ | {"LIBXL_SAVE_HELPER": helper}, stderr=log, stdout=log)
    took = time.monotonic() - start
    with open("/tmp/measured") as file:
        return json.load(file) | {"verb": verb, "by": os.path.basename(helper), "xl": took}

with open("/share/xl.log", "w") as log:
    for _ in range(runs):
        for helper in helpers:
            figures = xl("save", helper, "save", name, "/tmp/it.save")
            print(json.dumps(figures | {"bytes": os.path.getsize("/tmp/it.save")}), flush=True)
            print(json.dumps(xl("restore", helper, "restore", "/tmp/it.save")), flush=True)
            os.unlink("/tmp/it.save")
"""
STOCK_BYTES_PER_PFN = 16  # memory of libxl-save-helper for each pfn up to max_pfn, populated or not
UNITS = {"xl": "s", "helper": "s", "start": "s", "cpu": "s", "MiB": "MiB", "bytes": "bytes"}


def measure(host: lab.Host, name: str, helpers: Iterable[str], runs: int, timeout: float) -> list[dict[str, Any]]:
    """Save and restore a guest, which must be up, with each helper in turns; return the figures of each call."""
    stock = host.run("ls /usr/lib/xen-*/bin/libxl-save-helper /usr/lib/xen/bin/libxl-save-helper 2>/dev/null | head -1")
    ours = host.write("xenpv-save-helper", '#!/bin/sh\nexec python3 -m xenpv.save_helper.program "$@"\n')
    programs = {"stock": stock.check().text.strip(), "ours": ours}
    scripts = [host.write(helper, _MEASURED.format(program=programs[helper])) for helper in helpers]
    host.run(f"chmod +x {ours} {' '.join(scripts)}").check()
    script = host.write("turns.py", _TURNS)
    ran = host.run(f"python3 {script} {name} {runs} {' '.join(scripts)}", timeout=timeout)
    if ran.status:
        log = host.get("/share/xl.log")
        raise SystemExit(f"{ran.text}{ran.stderr.decode()}\n{log.read_text() if log.exists() else ''}")
    figures = [json.loads(line) for line in ran.text.splitlines()]
    for verb in ("save", "restore"):
        for _ in range(runs):
            start = host.run(
                f"time -p python3 -c 'import xenpv.save_helper.program, xenpv.host.xen.host, xenpv.{verb}.{verb}'"
            )
            seconds = float(start.check().stderr.split()[1])
            figures.append({"verb": verb, "by": "ours", "start": seconds})
    return figures


def print_table(figures: list[dict[str, Any]]) -> None:
    """Print the median of each figure, ours beside stock's."""
    for verb in ("save", "restore"):
        for figure, unit in UNITS.items():
            values: dict[str, list[float]] = {}
            for line in figures:
                if line["verb"] == verb and figure in line:
                    values.setdefault(line["by"], []).append(line[figure])
            median = {helper: statistics.median(each) for helper, each in values.items()}
            if not median:
                continue
            text = ", ".join(f"{helper} {value:.2f}" for helper, value in median.items())
            ratio = f"  ours is {median['ours'] / median['stock']:.3f} of stock" if len(median) > 1 else ""
            print(f"  {verb:8}{figure:7}{text} {unit}{ratio}")


def main() -> None:
    """Run the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", metavar="XEN", default="4.14", help="Xen version in the lab (default: 4.14)")
    parser.add_argument("--guest", type=int, default=512, metavar="MIB", help="memory of the Debian guest")
    parser.add_argument("--sparse", metavar="SIZE", help="use a litmus of 64 MiB with pfns up to this size")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"runs of each (default: {RUNS})")
    parser.add_argument("--ours", action="store_true", help="leave out stock")
    args = parser.parse_args()
    name = "litmus" if args.sparse else "debian"
    config = (
        guests.litmus_config(name, 64, options=f"p2m=linear spread={args.sparse}")
        if args.sparse
        else guests.config(name, args.guest)
    )
    room = max(2 * args.guest, 2048 + 1024)
    if args.sparse and not args.ours:
        room += (
            STOCK_BYTES_PER_PFN * NUMBER(args.sparse) // PAGE_SIZE >> 20
        )  # with less, the kernel kills its restore helper
    with lab.Host(args.lab, mem=f"{room + args.guest * 2 + 1024}M", dom0_mem=f"{room}M", dom0_vcpus=2) as host:
        host.run(f"xl create {host.write(f'{name}.cfg', config)}").check()
        host.wait_for_guest(name, "litmus: up " if args.sparse else guests.UP)
        figures = measure(host, name, ["ours"] if args.ours else ["stock", "ours"], args.runs, 7200)
    print(f"{name} on Xen {args.lab}, emulated; the median of {args.runs}:")
    print_table(figures)


if __name__ == "__main__":
    main()
