"""Domains built by xl and by xenpv, held against each other page for page; to be run in dom0.

    python3 -m tests.support.lab.equal_domains CASES  # JSON: name, kernel, ramdisk, MiB, command line

What differs by nature is put in one form: machine frames in page tables, in the p2m list and in start info become pfns,
event channels stay as they are. Pages that nobody writes hold whatever their frames' last owner left, and are not
compared. Prints JSON: for each case how many pages of each kind are equal, what differs, where, and what it took. One
program for all, since starting Python takes seconds under emulation.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from xenpv.abi.x86 import PAGE_SIZE, VCPU_GUEST_CONTEXT
from xenpv.abi.xen import SHARED_INFO, START_INFO
from xenpv.build.build import build
from xenpv.frames import IS_TABLE, U8, U64, Mask, PageType
from xenpv.host.protocol import DomainInfo, find_domain
from xenpv.host.xen.host import XenHost
from xenpv.image.kernel import KernelImage
from xenpv.image.layout import Part, plan
from xenpv.image.request import Request
from xenpv.memory import frame_tree
from xenpv.memory.page_tables import as_ptes, decode_page_tables, is_xen_slot, normalise

BATCH = 4096
SHOWN = 5
UNUSED = {Part.GAP, Part.STACK, Part.PADDING, Part.FREE}  # nobody writes there


class Side:
    """One of the two, by pfn. Nobody has run it: its p2m is the list that start info names."""

    def __init__(self, host: XenHost, info: DomainInfo) -> None:
        self.host, self.info = host, info
        self.context = VCPU_GUEST_CONTEXT.read(host.vcpu_context(info.domid, 0), 8)
        start_info = self.frames_at(int(self.context["user_regs"]["rsi"]), 1)
        self.start = START_INFO.read(self.read(start_info)[0].tobytes(), 8)
        pages = self.frames_at(int(self.start["mfn_list"]), -(-info.pages * 8 // PAGE_SIZE))
        self.mfns: U64 = self.read(pages)[0].reshape(-1).view("<u8")[: info.pages].copy()
        assert (host.m2p(self.mfns) == np.arange(info.pages, dtype=np.uint64)).all()
        assert (host.page_types(info.domid, self.mfns) != PageType.XTAB).all()
        first = int(host.m2p(pages[:1])[0])
        self.list = range(first, first + len(pages))
        self.start_info = int(host.m2p(start_info)[0])

    def read(self, mfns: U64) -> tuple[U8, Mask]:
        pages, mapped = self.host.map_frames(self.info.domid, mfns)
        return pages.copy(), mapped.astype(np.bool_)

    def frames_at(self, vaddr: int, pages: int) -> U64:
        """The machine frames behind virtual pages, by the domain's own page tables."""
        place = vaddr >> 12 & (1 << 36) - 1
        top = int(self.context["ctrlreg"][3]) >> 12
        runs, _ = frame_tree.walk_tree(self.read, top, 4, range(place, place + pages), decode_page_tables)
        return runs.frame_of(np.arange(place, place + pages))

    def normal(self, pfns: range) -> tuple[U8, U8]:
        """Pages without machine frames, and what kind each is: its page type, 0xfe for the p2m, 0xfd for start info."""
        mfns = self.mfns[pfns.start : pfns.stop]
        kinds = self.host.page_types(self.info.domid, mfns) & np.uint8(7)
        pages = self.host.map_frames(self.info.domid, mfns)[0].copy()
        for level in (1, 2, 3, 4):
            of_level = IS_TABLE[kinds] & (kinds == level)
            if of_level.any():
                tables, bad = normalise(as_ptes(pages[of_level]), self.host.m2p, is_xen_slot(level, 8))
                assert not bad.any()
                pages[of_level] = tables.view(np.uint8).reshape(-1, PAGE_SIZE)
        for pfn in range(max(pfns.start, self.list.start), min(pfns.stop, self.list.stop)):
            row = pfn - pfns.start
            entries = pages[row].view("<u8")
            first = (pfn - self.list.start) * 512
            entries[: min(512, self.info.pages - first)] = self.host.m2p(
                entries[: min(512, self.info.pages - first)].copy()
            )
            kinds[row] = 0xFE
        if self.start_info in pfns:
            row = self.start_info - pfns.start
            kinds[row] = 0xFD
            info = pages[row, : START_INFO.size(8)].view(START_INFO[8])
            for field in (info["store_mfn"], info["console"]["domU"]["mfn"]):
                field[...] = self.host.m2p(field.astype(np.uint64))
            info["shared_info"] = 0
        return pages, kinds


def compare(theirs: Side, ours: Side, used: list[range]) -> dict[str, Any]:
    equal: dict[str, int] = {}
    differ: list[dict[str, Any]] = []
    names = {0: "ordinary", 1: "L1", 2: "L2", 3: "L3", 4: "L4", 0xFE: "p2m", 0xFD: "start info"}
    for pfns in (range(first, min(first + BATCH, some.stop)) for some in used for first in some[::BATCH]):
        (a, kinds), (b, other) = theirs.normal(pfns), ours.normal(pfns)
        same = (a == b).all(axis=1) & (kinds == other)
        for kind in np.unique(kinds).tolist():
            equal[names[kind]] = equal.get(names[kind], 0) + int(np.count_nonzero(same & (kinds == kind)))
        for row in np.flatnonzero(~same).tolist():
            at = np.flatnonzero(a[row] != b[row])
            where = [int(at[0]), int(at[-1])] if len(at) else []
            what = [a[row, where[0] :][:16].tobytes().hex(), b[row, where[0] :][:16].tobytes().hex()] if where else []
            differ.append({"pfn": pfns[row], "kind": names[int(kinds[row])], "ours": names[int(other[row])],
                           "bytes": where, "content": what})  # fmt: skip
    return {"equal": equal, "differing": len(differ), "differ": differ[:SHOWN]}


def contexts(theirs: Side, ours: Side) -> list[str]:
    """The fields of vcpu 0 that differ, machine frames aside."""
    out = []
    for name in VCPU_GUEST_CONTEXT[8].names or ():
        a, b = theirs.context[name], ours.context[name]
        if name == "ctrlreg":
            a, b = (side.copy() for side in (a, b))
            a[3], b[3] = (
                side.host.m2p(np.array([int(c[3]) >> 12], np.uint64))[0] for side, c in ((theirs, a), (ours, b))
            )
        if a.tobytes() != b.tobytes():
            out.append(f"{name}: {a} {b}")
    return out


def without_time(shared_info: bytes) -> bytes:
    page = np.frombuffer(shared_info, np.uint8).copy()
    fields = page[: SHARED_INFO.size(8)].view(SHARED_INFO[8])
    for name in ("wc_version", "wc_sec", "wc_nsec", "wc_sec_hi"):
        fields[name] = 0
    fields["vcpu_info"]["time"] = 0
    return page.tobytes()


def one(host: XenHost, name: str, case: tuple[str, str, int, str]) -> dict[str, Any]:
    """Build a domain twice, compare, and end both."""
    kernel, ramdisk, memory, cmdline = case
    boot = {"kernel": kernel, "ramdisk": ramdisk, "cmdline": cmdline}
    lines = ['type = "pv"', f'name = "xl-{name}"', f"memory = {memory}", f"maxmem = {memory}", "vcpus = 2"]
    lines += [f'{key} = "{value}"' for key, value in boot.items() if value]
    config = Path(f"{name}.cfg")
    config.write_text("\n".join(lines) + "\n", encoding="ascii")
    start = time.monotonic()
    subprocess.run(["xl", "create", "-p", str(config)], check=True, stdout=sys.stderr)
    theirs_took = time.monotonic() - start
    image = KernelImage.parse(Path(kernel).read_bytes())
    content = Path(ramdisk).read_bytes() if ramdisk else b""
    start = time.monotonic()
    layout = plan(image, Request(memory << 20, len(content), 2, cmdline, virt_p2m_4tools=False))
    built = build(host, image, layout, content, name=f"our-{name}")
    ours_took = time.monotonic() - start
    used = [s.pfns for s in layout.segments if s.part not in UNUSED]
    theirs, ours = (Side(host, find_domain(host, f"{who}-{name}")) for who in ("xl", "our"))
    found = compare(theirs, ours, used)
    start_info = {
        field: [str(theirs.start[field]), str(ours.start[field])]
        for field in START_INFO[8].names or ()
        if theirs.start[field].tobytes() != ours.start[field].tobytes()
    }
    shared = [without_time(host.shared_info(side.info.domid)) for side in (theirs, ours)]
    domid = theirs.info.domid
    subprocess.run(["xl", "destroy", str(domid)], check=True, stdout=sys.stderr)
    host.destroy(built.domid)
    return found | {
        "used": sum(map(len, used)),
        "vcpu": contexts(theirs, ours),
        "start_info": start_info,
        "shared_info": [hex(at) for at, (a, b) in enumerate(zip(*shared, strict=True)) if a != b],
        "seconds": [theirs_took, ours_took],
    }


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with XenHost() as host:
        print(json.dumps({name: one(host, name, case) for name, case in cases.items()}))


if __name__ == "__main__":
    main()
