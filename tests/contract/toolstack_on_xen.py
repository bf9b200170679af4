"""The write side's contract on real Xen, and the tiniest domain built and run; to be run in dom0, as root.

    python3 -m tests.contract.toolstack_on_xen NAME

Prints JSON. One program for all of it, since starting Python takes seconds under emulation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from tests.contract import tiny_guest
from tests.contract.toolstack_checks import TOOLSTACK_CHECKS, domain, eventually, is_gone, pfns
from xenpv.errors import HostError
from xenpv.frames import PAGE_SIZE
from xenpv.host.xen.host import XenHost

REASON = 5  # SHUTDOWN_soft_reset: no domain gets that by accident
UUID = "7117e7fe-0000-4000-8000-000000000001"

QUIET = 20  # times in a row that the same is found, 0.1 s apart


def text_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def contract(host: XenHost) -> dict[str, str]:
    """Run each check: its name, and "ok" or the traceback."""
    results = {}
    for check in TOOLSTACK_CHECKS:
        try:
            check(host, 8)
            results[check.__name__] = "ok"
        except Exception:  # reported; the other checks run
            results[check.__name__] = traceback.format_exc()
    return results


def run_tiny(host: XenHost, name: str) -> dict[str, Any]:
    """Build it, run it, and look at it with stock tools before it goes."""
    out: dict[str, Any] = {}
    started = time.monotonic()
    domid = host.create(max_pages=tiny_guest.PAGES, name=name, uuid=UUID)
    try:
        out["create_seconds"] = time.monotonic() - started
        tiny_guest.build(host, domid, text=f"hello from {name}\r\n".encode(), reason=REASON)
        out["build_seconds"] = time.monotonic() - started
        out["list_paused"] = text_of("xl", "list")
        host.unpause(domid)
        out["shut_down"] = eventually(lambda: host.info(domid).shutdown)
        out["reason"] = host.info(domid).shutdown_reason
        out["list_shutdown"] = text_of("xl", "list")
        out["domname"] = text_of("xl", "domname", str(domid)).strip()
        tty = f"/local/domain/{domid}/console/tty"
        out["tty"] = eventually(lambda: bool(text_of("xenstore-read", tty).strip()))
        out["nodes"] = text_of("xenstore-ls", "-fp", f"/local/domain/{domid}")
        log = Path(f"/share/consoles/guest-{name}.log")
        out["printed"] = eventually(lambda: log.exists() and f"hello from {name}" in log.read_text())
    finally:
        host.destroy(domid)
    out["gone"] = eventually(lambda: is_gone(host, domid))
    return out


def destroyed_by_xl(host: XenHost, name: str) -> bool:
    """What we built, `xl destroy` ends."""
    domid = host.create(max_pages=tiny_guest.PAGES, name=name, uuid=UUID)
    tiny_guest.build(host, domid)
    subprocess.run(["xl", "destroy", name], check=True)
    return eventually(lambda: is_gone(host, domid))


def speed(host: XenHost) -> dict[str, int]:
    """Pages a second, of 64 MiB in single frames; emulated."""
    count = 64 << 8
    out = {}
    with domain(host, 8, count) as domid:
        began = time.perf_counter()
        mfns = host.populate_physmap(domid, pfns(count))
        out["populated"] = round(count / (time.perf_counter() - began))
        assert len(mfns) == count
        content = np.ones((count, PAGE_SIZE), np.uint8)
        began = time.perf_counter()
        host.write_frames(domid, mfns, content)
        out["written"] = round(count / (time.perf_counter() - began))
    with domain(host, 8, count) as domid:
        began = time.perf_counter()
        host.populate_physmap(domid, pfns(count >> 9, 0, 512), 9)
        out["populated_in_extents"] = round(count / (time.perf_counter() - began))
    return out


def settled(host: XenHost) -> int:
    """Wait until the number of free pages is stable. Xen frees a domain's memory a moment after its end."""
    found = [host.free_pages()]
    while found[-QUIET:] != [found[-1]] * QUIET:
        time.sleep(0.1)
        found.append(host.free_pages())
    return found[-1]


def thirty_two_bit(host: XenHost) -> str:
    """What this Xen says to a 32-bit PV domain."""
    before = len(host.domains())
    try:
        with domain(host, 4):
            return "created"
    except HostError as error:
        nothing_left = eventually(lambda: len(host.domains()) == before)
        return str(error) if nothing_left else f"a domain was left: {error}"


def without_root() -> str:
    """What a user who is not root is told. Gives up root for good."""
    os.setuid(65534)
    try:
        XenHost()
    except HostError as error:
        return str(error)
    return "opened"


def run_all(name: str, out: dict[str, Any]) -> None:
    """Everything, into ``out``."""
    with XenHost() as host:
        out["version"] = f"{host.version().major}.{host.version().minor}{host.version().extra}"
        before, free = text_of("xenstore-ls", "-f"), settled(host)
        info = dict(line.split(":", 1) for line in text_of("xl", "info").splitlines() if ":" in line)
        keys = {key.strip(): value.strip() for key, value in info.items()}
        out["free_mib"] = [free >> 8, int(keys["free_memory"])]
        out["contract"] = contract(host)
        out["tiny"] = run_tiny(host, name)
        out["xl_destroyed"] = destroyed_by_xl(host, name)
        out["speed"] = speed(host)
        out["width_4"] = thirty_two_bit(host)
        out["free_pages"] = [free, settled(host)]
        after = text_of("xenstore-ls", "-f")
        # Where no domain was before, libxl's roots are new, and stay as they do after `xl destroy`.
        roots = ['/libxl = ""', '/vm = ""']
        out["left_in_xenstore"] = sorted(set(after.splitlines()) - set(before.splitlines()) - set(roots))
        out["domains"] = [d.domid for d in host.domains()]
    out["without_root"] = without_root()


def main(name: str) -> None:
    out: dict[str, Any] = {}
    try:
        run_all(name, out)
    finally:
        print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
