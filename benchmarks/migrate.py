"""xl migrate between two hosts on real Xen: xenpv's save helper beside stock's, in turns, in the same boots.

    python -m benchmarks.migrate                    a litmus of 128 MiB that writes 500 pages a second, on Xen 4.14
    python -m benchmarks.migrate --dirty 5000       ten times as many pages
    python -m benchmarks.migrate --debian 512       a Debian guest of 512 MiB that only counts seconds

Ratios are ours to stock: wall time of xl, downtime, and the bytes that left the sending host, including those of TCP
and IP. The downtime lasts from "guest has suspended" of the sending libxl until it hears that the guest was started.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from lab import guests
from tests.support.lab.guest import BEATS, OURS, STOCK, Guest, start
from tests.support.lab.pair import LINK, Pair, booted

RUNS = 3
# Runs in the sending dom0. It notes the time at which xl prints each line that matters.
_MIGRATION = """
import json, subprocess, sys, time
name, where, link = sys.argv[1:]
SENT = "/sys/class/net/eth0/statistics/tx_bytes"

def sent():
    with open(SENT) as file:
        return int(file.read())

seen = {}
before, start = sent(), time.monotonic()
xl = subprocess.Popen(["xl", "-vvv", "migrate", "-s", link, name, where], stderr=subprocess.PIPE)
with open("/share/xl.log", "wb") as log:
    for line in xl.stderr:
        log.write(b"%8.2f " % (time.monotonic() - start) + line)
        for event in (b"guest has suspended", b"Target reports successful startup"):
            if event in line:
                seen[event] = time.monotonic()
if xl.wait():
    sys.exit(f"xl migrate: {xl.returncode}")
suspended, started = seen[b"guest has suspended"], seen[b"Target reports successful startup"]
print(json.dumps({"wall": time.monotonic() - start, "downtime": started - suspended, "bytes": sent() - before}))
"""
UNITS = {"wall": "s", "downtime": "s", "bytes": "bytes"}


def measure(pair: Pair, config: str, name: str, up: str, environment: str) -> dict[str, float]:
    """Start a guest, migrate it, and return the figures; the guest must live on the target."""
    start(pair.here, name, config, up)
    there = pair.receiver(environment)
    arrived = Guest.expected(pair.there, f"{name}--incoming")
    script = pair.here.write("migration.py", _MIGRATION)
    ran = pair.here.run(f"env {environment} python3 {script} {name} {pair.address} '{LINK}'", timeout=1800)
    if ran.status:
        log = pair.here.get("/share/xl.log")
        raise SystemExit(f"{ran.stderr.decode()}\n{log.read_text() if log.exists() else ''}")
    there.wait().check()
    arrived.beats(BEATS if up == BEATS else guests.BEAT)
    pair.there.run(f"xl destroy {name}").check()
    figures: dict[str, float] = json.loads(ran.text)
    return figures


def main() -> None:
    """Run the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", metavar="XEN", default="4.14", help="Xen version in the lab: 4.14 (default) or 4.17")
    parser.add_argument("--guest", type=int, default=128, metavar="MIB", help="memory of the litmus guest")
    parser.add_argument(
        "--dirty", type=int, default=500, metavar="PAGES", help="pages that the litmus guest writes each second"
    )
    parser.add_argument("--debian", type=int, metavar="MIB", help="migrate a Debian guest of this size instead")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"runs of each (default: {RUNS})")
    args = parser.parse_args()
    if args.debian:
        name, up, config = "debian", guests.UP, guests.config("debian", args.debian)
    else:
        name, up = "litmus", BEATS
        config = guests.litmus_config(name, args.guest, options=f"p2m=both dirty={args.dirty}")
    figures: list[dict[str, Any]] = []
    with booted(args.lab, mem=f"{2048 + 2 * (args.debian or args.guest)}M") as pair:
        for _ in range(args.runs):
            for by, environment in (("stock", STOCK), ("ours", OURS)):
                figures.append({"by": by} | measure(pair, config, name, up, environment))
                print(json.dumps(figures[-1]), flush=True)
    guest = f"{args.debian} MiB" if args.debian else f"{args.guest} MiB, {args.dirty} pages written each second"
    print(f"{name} of {guest}, between two hosts of Xen {args.lab}, emulated; the median of {args.runs}:")
    for figure, unit in UNITS.items():
        stock, ours = (statistics.median(run[figure] for run in figures if run["by"] == by) for by in ("stock", "ours"))
        print(f"  {figure:9}stock {stock:.2f}, ours {ours:.2f} {unit}  ours is {ours / stock:.3f} of stock")


if __name__ == "__main__":
    main()
