"""The contract of what moves domains on real Xen, in dom0, as root, with a litmus that dirties memory.

    python3 -m tests.contract.mover_on_xen NAME [STREAM]

STREAM is what `xl save -p` wrote of NAME, which is paused since: its state is held against what our calls give.
Prints JSON. One program for all of it, since starting Python takes seconds under emulation.
"""

from __future__ import annotations

import errno
import json
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from tests.contract.mover_checks import MOVER_CHECKS
from tests.contract.running_guest_checks import RUNNING_GUEST_CHECKS, log_dirty_logs_every_page_that_changes
from xenpv.errors import HostError
from xenpv.frames import DomId
from xenpv.host.protocol import find_domain
from xenpv.host.xen.host import XenHost
from xenpv.source.live import LiveDomain
from xenpv.source.saved import SavedDomain

GUEST_SECONDS = 1.0  # seconds that a guest runs


def run_check(check: Callable[..., object], *arguments: object) -> object:
    """Run a check: its result, "ok" if it returns None, or the traceback."""
    try:
        result = check(*arguments)
    except Exception:  # reported; the other checks run
        return traceback.format_exc()
    return "ok" if result is None else result


def running(host: XenHost, domid: DomId) -> dict[str, object]:
    out: dict[str, object] = {}
    for check in RUNNING_GUEST_CHECKS:
        if check is log_dirty_logs_every_page_that_changes and not can_log(host, domid):
            out[check.__name__] = "not on this Xen"
            continue
        out[check.__name__] = run_check(check, host, domid, lambda: time.sleep(GUEST_SECONDS))
    return out


def can_log(host: XenHost, domid: DomId) -> bool:
    try:
        host.log_dirty(domid, on=True)
    except HostError as error:
        return error.errno != errno.EOPNOTSUPP
    host.log_dirty(domid, on=False)
    return True


def compared(host: XenHost, domid: DomId, path: str) -> dict[str, Any]:
    """For each record of a stock stream, its size, and whether our call gives the same bytes."""
    out: dict[str, Any] = {}
    with SavedDomain.open(path) as saved:
        held = saved.contents
        for vcpu, blobs in held.vcpus.items():
            state = host.vcpu_state(domid, vcpu)
            for name in ("extended", "xsave", "msrs"):
                record = getattr(blobs, name)
                theirs = b"" if record is None else bytes(record.context)
                out[f"{name}{vcpu}"] = [len(theirs), theirs == getattr(state, name)]
        policy, tsc = host.cpu_policy(domid), host.tsc_info(domid)
        for name, record, ours in (
            ("cpuid", held.cpuid_policy, policy.leaves),
            ("msr policy", held.msr_policy, policy.msrs),
        ):
            theirs = b"" if record is None else bytes(record.data)
            out[name] = [len(theirs), theirs == ours]
        assert held.tsc
        out["tsc"] = [held.tsc.mode, held.tsc.khz, held.tsc.nsec, held.tsc.incarnation]
        out["our tsc"] = [tsc.mode, tsc.khz, tsc.nsec, tsc.incarnation]
    return out


def speed(host: XenHost, domid: DomId) -> dict[str, float]:
    """Milliseconds that calls take: of 1024 frames, and a look at the log, by how many pfns it is for. Emulated."""
    live = LiveDomain(host, host.info(domid))
    mfns = live.p2m.lookup(np.arange(1024, dtype=np.uint64))
    calls: dict[str, Callable[[], object]] = {
        "page_types": lambda: host.page_types(domid, mfns),
        "map_frames": lambda: host.map_frames(domid, mfns),
    }
    logs = can_log(host, domid)
    if logs:
        host.log_dirty(domid, on=True)
        for bits in (16, 20, 28):
            calls[f"dirty_pfns 2^{bits}"] = partial(host.dirty_pfns, domid, 1 << bits, clean=False)
    out = {name: min(timed(call) for _ in range(5)) for name, call in calls.items()}
    if logs:
        host.log_dirty(domid, on=False)
    return out


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return round((time.perf_counter() - began) * 1000, 3)


def run_all(name: str, stream: str | None, out: dict[str, Any]) -> None:
    """Everything, into ``out``."""
    with XenHost() as host:
        domid = find_domain(host, name).domid
        if stream is not None:
            out["stock"] = compared(host, domid, stream)
            return
        out["contract"] = {check.__name__: run_check(check, host, 8) for check in MOVER_CHECKS}
        out["running"] = running(host, domid)
        out["speed"] = speed(host, domid)
        out["domains"] = [d.domid for d in host.domains()]


def main(name: str, stream: str | None = None) -> None:
    out: dict[str, Any] = {}
    try:
        run_all(name, stream, out)
    finally:
        print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
