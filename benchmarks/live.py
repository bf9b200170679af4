"""Saving and restoring under xl on real Xen: our save helper beside libxl's own, by turns, in the same boot.

    python -m benchmarks.live                           a Debian guest of 512 MiB on Xen 4.14
    python -m benchmarks.live --lab 4.17 --guest 1024   another Xen, a larger guest
    python -m benchmarks.live --migrate --lab 4.17      live migration within the host of a litmus that writes meanwhile
    python -m benchmarks.live --sparse 1T               litmus of 64 MiB spread so far (stock takes 20 minutes)
    python -m benchmarks.live --sparse 16T --ours       where stock would take hours

Figures are ratios: xl's wall time, the stream's length and the helper's peak memory, ours to stock's. Downtime is from
when the guest is seen to have suspended here to when it is seen to run there, by looking every few milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from typing import Any

import lab
from lab import guests

RUNS = 3
_TIMEOUT = 7200  # seconds, of all turns
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
# In dom0: migrates the domain to the same host with each helper in turn, on both sides, and prints what it took.
_MIGRATIONS = """
import json, os, subprocess, sys, threading, time
from xenpv.host.xen import XenHost
name, runs, helpers = sys.argv[1], int(sys.argv[2]), sys.argv[3:]

def down(host, uuid, over):
    stopped = None
    while not over.is_set():
        mine = [domain for domain in host.domains() if domain.uuid == uuid]
        now = time.monotonic()
        if stopped is None:
            stopped = now if any(domain.shutdown for domain in mine) else None
        elif any(not domain.stands and not domain.dying for domain in mine):
            return now - stopped
        time.sleep(0.002)
    return None

def migrate(host, helper):
    uuid = next(domain.uuid for domain in host.domains() if domain.name == name)
    over, found = threading.Event(), []
    watcher = threading.Thread(target=lambda: found.append(down(host, uuid, over)))
    receive = "rm -f /tmp/f; mkfifo /tmp/f; wc -c < /tmp/f > /tmp/n & tee /tmp/f | xl migrate-receive"
    with open("/tmp/receive", "w") as file:
        file.write(receive)
    watcher.start()
    start = time.monotonic()
    done = subprocess.run(["xl", "migrate", "-s", "", name, "sh /tmp/receive"],
                          env=os.environ | {"LIBXL_SAVE_HELPER": helper}, stderr=log, stdout=log)
    took = time.monotonic() - start
    over.set()
    watcher.join()
    if done.returncode:
        raise SystemExit(f"xl migrate by {helper} ended with {done.returncode}")
    time.sleep(5)  # it writes again
    return {"what": "migrate", "by": os.path.basename(helper), "xl": took, "downtime": found[0],
            "bytes": int(open("/tmp/n").read())}

with open("/share/xl.log", "w") as log, XenHost() as host:
    for _ in range(runs):
        for helper in helpers:
            print(json.dumps(migrate(host, helper)), flush=True)
"""
UNITS = {"xl": "s", "helper": "s", "cpu": "s", "downtime": "s", "MiB": "MiB", "bytes": "bytes"}


def turns(host: lab.Host, name: str, who: Iterable[str], runs: int, program: str = _TURNS) -> list[dict[str, Any]]:
    """What each turn took. The guest has to be up."""
    stock = host.run("ls /usr/lib/xen-*/bin/libxl-save-helper /usr/lib/xen/bin/libxl-save-helper 2>/dev/null | head -1")
    ours = host.write("xenpv-save-helper", '#!/bin/sh\nexec python3 -m xenpv.cli.save_helper "$@"\n')
    programs = {"stock": stock.check().text.strip(), "ours": ours}
    helpers = [host.write(by, _MEASURED.format(program=programs[by])) for by in who]
    host.run(f"chmod +x {ours} {' '.join(helpers)}").check()
    script = host.write("turns.py", program)
    ran = host.run(f"python3 {script} {name} {runs} {' '.join(helpers)}", timeout=_TIMEOUT)
    if ran.status:
        log = host.get("/share/xl.log")
        raise SystemExit(f"{ran.stderr.decode()}\n{log.read_text() if log.exists() else ''}")
    return [json.loads(line) for line in ran.text.splitlines()]


def table(said: list[dict[str, Any]]) -> None:
    """The median of each figure, ours beside stock's."""
    for what in dict.fromkeys(line["what"] for line in said):
        for figure, unit in UNITS.items():
            by = {
                who: statistics.median(line[figure] for line in said if line["what"] == what and line["by"] == who)
                for who in ("stock", "ours")
                if any(line["what"] == what and line["by"] == who and figure in line for line in said)
            }
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
    parser.add_argument("--migrate", action="store_true", help="live migration of litmus, 256 MiB")
    parser.add_argument("--dirty", type=int, default=2000, metavar="N", help="pages that it writes in a second")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"of each (default: {RUNS})")
    parser.add_argument("--ours", action="store_true", help="without stock")
    args = parser.parse_args()
    name = "litmus" if args.sparse or args.migrate else "debian"
    if args.sparse:
        config = guests.litmus_config(name, 64, options=f"p2m=linear spread={args.sparse}")
    elif args.migrate:
        config = guests.litmus_config(name, 256, options=f"p2m=linear dirty={args.dirty}")
    else:
        config = guests.config(name, args.guest)
    room = max(2 * args.guest, 2048 + 1024)
    with lab.Host(args.lab, mem=f"{room + args.guest * 2 + 1024}M", dom0_mem=f"{room}M", dom0_vcpus=2) as host:
        host.run(f"xl create {host.write(f'{name}.cfg', config)}").check()
        host.wait_for_guest(name, "litmus: up " if name == "litmus" else guests.UP)
        who = ["ours"] if args.ours else ["stock", "ours"]
        said = turns(host, name, who, args.runs, _MIGRATIONS if args.migrate else _TURNS)
    print(f"{name} on Xen {args.lab}, emulated; the median of {args.runs}:")
    table(said)


if __name__ == "__main__":
    main()
