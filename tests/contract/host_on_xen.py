"""The checks of Host on real Xen, and XenHost compared with stock tools. Run it in dom0, as root.

    python3 -m tests.contract.host_on_xen DOMAIN CORE      # a paused domain, and `xl dump-core` of it

Prints JSON: results of the checks, of the comparisons, and speeds. It is one program, because starting Python takes
seconds under emulation. It destroys the domain.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
import traceback
from typing import Any

import numpy as np

from tests.contract import host_checks
from xenpv.abi.domctl import PageType
from xenpv.errors import HostError
from xenpv.frames import PAGE_SIZE, U8, U64, DomId
from xenpv.host.protocol import find_domain
from xenpv.host.xen.host import XenHost

BATCH = 1024


def sections(core: bytes) -> dict[str, tuple[int, int]]:
    """Return offset and size of an ELF64 file's sections."""
    [table] = struct.unpack_from("<Q", core, 40)
    size, count, names = struct.unpack_from("<3H", core, 58)
    headers = [struct.unpack_from("<IIQQQQ", core, table + n * size) for n in range(count)]
    text = headers[names][4]
    return {core[text + h[0] : core.index(b"\0", text + h[0])].decode(): (h[4], h[5]) for h in headers if h[5] or h[0]}


def against_core(host: XenHost, domid: DomId, path: str) -> dict[str, Any]:
    """Compare all memory, m2p and page types of the paused domain with the core."""
    with open(path, "rb") as file:
        core = file.read()
    where = sections(core)
    offset, size = where[".xen_p2m"]
    p2m: U64 = np.frombuffer(core, "<u8", size // 8, offset).reshape(-1, 2)
    offset, size = where[".xen_pages"]
    pages: U8 = np.frombuffer(core, np.uint8, size, offset).reshape(-1, PAGE_SIZE)
    pfns, mfns = p2m[:, 0].copy(), p2m[:, 1].copy()

    began = time.perf_counter()
    differ, unmapped = 0, 0
    reading = 0.0
    for at in range(0, len(mfns), BATCH):
        start = time.perf_counter()
        found, mapped = host.map_frames(domid, mfns[at : at + BATCH])
        reading += time.perf_counter() - start
        unmapped += int((mapped == 0).sum())
        differ += int((found != pages[at : at + BATCH]).any(axis=1).sum())
        del found
    whole = time.perf_counter() - began

    start = time.perf_counter()
    types = host.page_types(domid, mfns)
    typing = time.perf_counter() - start
    start = time.perf_counter()
    back = host.m2p(mfns)
    first_m2p = time.perf_counter() - start
    start = time.perf_counter()
    host.m2p(mfns)
    second_m2p = time.perf_counter() - start
    top = host_checks.top_table(host, domid)
    kinds = {PageType(kind).name: int(n) for kind, n in enumerate(np.bincount(types, minlength=16)) if n}
    return {
        "frames": len(mfns),
        "info_pages": host.info(domid).pages,
        "differ": differ,
        "unmapped": unmapped,
        "m2p_differ": int((back != pfns).sum()),
        "types": kinds,
        "cr3_among_pinned_l4": bool((mfns[types == PageType.L4TAB_PIN] == np.uint64(top)).any()),
        "frames_per_second_mapped": round(len(mfns) / reading),
        "frames_per_second_mapped_and_compared": round(len(mfns) / whole),
        "frames_per_second_typed": round(len(mfns) / typing),
        "m2p_first_seconds": round(first_m2p, 4),
        "m2p_entries_per_second": round(len(mfns) / second_m2p),
    }


def leaks(host: XenHost, domid: DomId) -> dict[str, int]:
    """Count mappings of Xen's device before, while and after an array of map_frames is held."""

    def mappings() -> int:
        with open("/proc/self/maps") as file:
            return sum("privcmd" in line for line in file)

    before = mappings()
    held, _ = host.map_frames(domid, np.full(4, host_checks.top_table(host, domid), np.uint64))
    kept = held[1:3]
    del held
    during = mappings()
    assert kept[0].any()
    del kept
    return {"before": before, "during": during, "after": mappings()}


def contract(host: XenHost, domid: DomId) -> dict[str, str]:
    """Run each check: its name, and "ok" or the traceback."""
    results = {}
    for check in host_checks.HOST_CHECKS:
        try:
            check(host, domid)
            results[check.__name__] = "ok"
        except Exception:  # reported; the other checks run
            results[check.__name__] = traceback.format_exc()
    return results


def without_root() -> str:
    """Return the error that a user without root gets. Gives up root for good."""
    os.setuid(65534)
    try:
        XenHost()
    except HostError as error:
        return str(error)
    return "opened"


def main(name: str, core: str) -> None:
    out: dict[str, Any] = {}
    try:
        run_all(name, core, out)
    finally:
        print(json.dumps(out, indent=1))


def run_all(name: str, core: str, out: dict[str, Any]) -> None:
    """Run everything; results go to ``out``."""
    with XenHost() as host:
        version = host.version()
        out["version"] = f"{version.major}.{version.minor}{version.extra}"
        out["max_mfn"] = host.max_mfn()
        domid = find_domain(host, name).domid
        out["contract"] = contract(host, domid)
        out["core"] = against_core(host, domid, core)
        out["leaks"] = leaks(host, domid)
        out["dom0"] = own_memory(host)
        kept, _ = host.map_frames(domid, np.array([host_checks.top_table(host, domid)], np.uint64))
        subprocess.run(["xl", "destroy", name], check=True)
        out["died"] = {"held": bool(kept.any())}  # its frames stay as long as somebody holds them
        del kept
        out["died"]["after"] = until_gone(host, domid)
        host_checks.assert_gone(host, domid)
        held, _ = host.map_frames(DomId(0), np.array([host.info(DomId(0)).shared_info_mfn], np.uint64))
    out["readable_after_close"] = bool(held.any())
    del held
    out["without_root"] = without_root()


def own_memory(host: XenHost) -> dict[str, int]:
    """Map frames from all over the host as dom0's. Those of others must be marked, not kill us or raise."""
    mfns = np.linspace(0, host.max_mfn(), 1024).astype(np.uint64)
    _, mapped = host.map_frames(DomId(0), mfns)
    return {"asked": len(mfns), "mapped": int(mapped.sum()), "dom0_pages": host.info(DomId(0)).pages}


def until_gone(host: XenHost, domid: DomId) -> str:
    """Wait until asking for a destroyed domain fails; the error."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            host.info(domid)
        except HostError as error:
            return str(error)
        time.sleep(0.2)
    return "still there"


if __name__ == "__main__":
    main(*sys.argv[1:3])
