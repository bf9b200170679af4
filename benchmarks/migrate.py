"""xl migrate between two hosts on real Xen: our save helper on both sides beside stock's, by turns, in the same boots.

    python -m benchmarks.migrate                    litmus of 128 MiB that writes 500 pages a second, on Xen 4.14
    python -m benchmarks.migrate --dirty 5000       … ten times as many
    python -m benchmarks.migrate --debian 512       a Debian guest of 512 MiB that only counts seconds

Figures are ratios, ours to stock's: xl's wall time, the downtime (from "guest has suspended" of the sending libxl until
it hears that the guest was started), and the bytes that left the sending host, with those of TCP and IP.
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
# In the sending dom0. What xl says is read as it comes: each line that matters gets the time at which it came.
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
        for what in (b"guest has suspended", b"Target reports successful startup"):
            if what in line:
                seen[what] = time.monotonic()
if xl.wait():
    sys.exit(f"xl migrate: {xl.returncode}")
suspended, started = seen[b"guest has suspended"], seen[b"Target reports successful startup"]
print(json.dumps({"wall": time.monotonic() - start, "downtime": started - suspended, "bytes": sent() - before}))
"""
UNITS = {"wall": "s", "downtime": "s", "bytes": "bytes"}


def migrated(pair: Pair, config: str, name: str, up: str, environment: str) -> dict[str, float]:
    """What the migration of a new guest took: it is up before, and lives behind it."""
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
    took: dict[str, float] = json.loads(ran.text)
    return took


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", metavar="XEN", default="4.14", help="which Xen (4.14, 4.17; default: 4.14)")
    parser.add_argument("--guest", type=int, default=128, metavar="MIB", help="memory of the litmus guest")
    parser.add_argument("--dirty", type=int, default=500, metavar="PAGES", help="that it writes each second")
    parser.add_argument("--debian", type=int, metavar="MIB", help="a Debian guest of that size instead")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"of each (default: {RUNS})")
    args = parser.parse_args()
    if args.debian:
        name, up, config = "debian", guests.UP, guests.config("debian", args.debian)
    else:
        name, up = "litmus", BEATS
        config = guests.litmus_config(name, args.guest, options=f"p2m=both dirty={args.dirty}")
    took: list[dict[str, Any]] = []
    with booted(args.lab, mem=f"{2048 + 2 * (args.debian or args.guest)}M") as pair:
        for _ in range(args.runs):
            for by, environment in (("stock", STOCK), ("ours", OURS)):
                took.append({"by": by} | migrated(pair, config, name, up, environment))
                print(json.dumps(took[-1]), flush=True)
    what = f"{args.debian} MiB" if args.debian else f"{args.guest} MiB, {args.dirty} pages written each second"
    print(f"{name} of {what}, between two hosts of Xen {args.lab}, emulated; the median of {args.runs}:")
    for figure, unit in UNITS.items():
        stock, mine = (statistics.median(t[figure] for t in took if t["by"] == by) for by in ("stock", "ours"))
        print(f"  {figure:9}stock {stock:.2f}, ours {mine:.2f} {unit}  ours is {mine / stock:.3f} of stock")


if __name__ == "__main__":
    main()
