"""Saving and restoring under xl on real Xen: our save helper beside libxl's own, by turns, in the same boot.

    python -m benchmarks.live                           a Debian guest of 512 MiB on Xen 4.14
    python -m benchmarks.live --lab 4.17 --guest 1024   another Xen, a larger guest
    python -m benchmarks.live --sparse 1T --runs 1      litmus of 64 MiB spread so far (stock takes 16 minutes)
    python -m benchmarks.live --sparse 16T --ours       where stock would take hours

Figures are ratios: xl's wall time, the stream's length and the helper's peak memory, ours to stock's. Beside them, how
long our helper takes to start: what it imports.
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
# What libxl starts in the helper's place: the helper, and beside it a line of what it took.
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
# In dom0: saves and restores the domain with each helper in turn, and prints what it took.
_TURNS = """
import json, os, subprocess, sys, time
name, runs, helpers = sys.argv[1], int(sys.argv[2]), sys.argv[3:]

def xl(what, helper, *command):
    start = time.monotonic()
    subprocess.run(["xl", *command], check=True, env=os.environ | {"LIBXL_SAVE_HELPER": helper}, stderr=log, stdout=log)
    took = time.monotonic() - start
    with open("/tmp/measured") as file:
        return json.load(file) | {"what": what, "by": os.path.basename(helper), "xl": took}

with open("/share/xl.log", "w") as log:
    for _ in range(runs):
        for helper in helpers:
            said = xl("save", helper, "save", name, "/tmp/it.save")
            print(json.dumps(said | {"bytes": os.path.getsize("/tmp/it.save")}), flush=True)
            print(json.dumps(xl("restore", helper, "restore", "/tmp/it.save")), flush=True)
            os.unlink("/tmp/it.save")
"""
STOCK_A_PFN = 16  # bytes that libxl-save-helper has for each pfn up to max_pfn, a page there or not
UNITS = {"xl": "s", "helper": "s", "start": "s", "cpu": "s", "MiB": "MiB", "bytes": "bytes"}


def turns(host: lab.Host, name: str, who: Iterable[str], runs: int, timeout: float) -> list[dict[str, Any]]:
    """What each turn took. The guest has to be up."""
    stock = host.run("ls /usr/lib/xen-*/bin/libxl-save-helper /usr/lib/xen/bin/libxl-save-helper 2>/dev/null | head -1")
    ours = host.write("xenpv-save-helper", '#!/bin/sh\nexec python3 -m xenpv.save_helper.program "$@"\n')
    programs = {"stock": stock.check().text.strip(), "ours": ours}
    helpers = [host.write(by, _MEASURED.format(program=programs[by])) for by in who]
    host.run(f"chmod +x {ours} {' '.join(helpers)}").check()
    script = host.write("turns.py", _TURNS)
    ran = host.run(f"python3 {script} {name} {runs} {' '.join(helpers)}", timeout=timeout)
    if ran.status:
        log = host.get("/share/xl.log")
        raise SystemExit(f"{ran.text}{ran.stderr.decode()}\n{log.read_text() if log.exists() else ''}")
    said = [json.loads(line) for line in ran.text.splitlines()]
    for what in ("save", "restore"):
        for _ in range(runs):
            start = host.run(
                f"time -p python3 -c 'import xenpv.save_helper.program, xenpv.host.xen.host, xenpv.{what}.{what}'"
            )
            seconds = float(start.check().stderr.split()[1])
            said.append({"what": what, "by": "ours", "start": seconds})
    return said


def table(said: list[dict[str, Any]]) -> None:
    """The median of each figure, ours beside stock's."""
    for what in ("save", "restore"):
        for figure, unit in UNITS.items():
            values: dict[str, list[float]] = {}
            for line in said:
                if line["what"] == what and figure in line:
                    values.setdefault(line["by"], []).append(line[figure])
            by = {who: statistics.median(each) for who, each in values.items()}
            if not by:
                continue
            text = ", ".join(f"{who} {value:.2f}" for who, value in by.items())
            ratio = f"  ours is {by['ours'] / by['stock']:.3f} of stock" if len(by) > 1 else ""
            print(f"  {what:8}{figure:7}{text} {unit}{ratio}")


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", metavar="XEN", default="4.14", help="which Xen (default: 4.14)")
    parser.add_argument("--guest", type=int, default=512, metavar="MIB", help="memory of the Debian guest")
    parser.add_argument("--sparse", metavar="SIZE", help="litmus of 64 MiB, its pfns spread up to there")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"of each (default: {RUNS})")
    parser.add_argument("--ours", action="store_true", help="without stock")
    args = parser.parse_args()
    name = "litmus" if args.sparse else "debian"
    config = (
        guests.litmus_config(name, 64, options=f"p2m=linear spread={args.sparse}")
        if args.sparse
        else guests.config(name, args.guest)
    )
    room = max(2 * args.guest, 2048 + 1024)
    if args.sparse and not args.ours:
        room += STOCK_A_PFN * NUMBER(args.sparse) // PAGE_SIZE >> 20  # with less, the kernel kills its restore helper
    with lab.Host(args.lab, mem=f"{room + args.guest * 2 + 1024}M", dom0_mem=f"{room}M", dom0_vcpus=2) as host:
        host.run(f"xl create {host.write(f'{name}.cfg', config)}").check()
        host.wait_for_guest(name, "litmus: up " if args.sparse else guests.UP)
        said = turns(host, name, ["ours"] if args.ours else ["stock", "ours"], args.runs, 7200)
    print(f"{name} on Xen {args.lab}, emulated; the median of {args.runs}:")
    table(said)


if __name__ == "__main__":
    main()
