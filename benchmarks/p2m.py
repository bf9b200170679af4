"""Checks and walks of large p2ms: beside a copy of the same bytes, sparse, and live beside xen-mfndump.

    python -m benchmarks.p2m                        a check of 128 Mi entries, and a walk of 16 TiB
    python -m benchmarks.p2m --entries 16777216     a smaller check
    python -m benchmarks.p2m --lab 4.17             also live in the lab: a Debian guest, and a litmus spread over 4 GiB
    python -m benchmarks.p2m --linux 516            a Linux guest of 516 GiB on a host of 700 GiB (24 GiB, 20 min)

Ratios are to the peer in the same run.
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable

import numpy as np

import lab
from lab import guests
from xenpv.findings import Findings
from xenpv.frames import NO_FRAME, PAGE_SIZE, U8, U64, DomId, Mask
from xenpv.host.protocol import DomainInfo, XenVersion
from xenpv.memory.p2m_anchors import P2MForm
from xenpv.memory.p2m_reader import P2M
from xenpv.memory.p2m_survey import EntryKind, survey
from xenpv.memory.p2m_writer import write_leaves, write_tree_anchors
from xenpv.runs import FrameRuns
from xenpv.source.live import LiveDomain
from xenpv.verify.physmap import PhysmapCheck

PER_LEAF = 512
EXTENT = 512  # pages of 2 MiB, as a domain is populated
RUNS = 3


class FlatHost:
    """A host whose p2m and m2p are arrays in memory; the m2p is twice as large as the p2m.

    The domain consists of extents of 2 MiB in random order. The frames of the p2m itself are indices of ``pages``.
    """

    def __init__(self, entries: int) -> None:
        random = np.random.default_rng(1)
        extents = random.permutation(entries * 2 // EXTENT)[: entries // EXTENT].astype(np.uint64)
        leaves = entries // PER_LEAF
        self.pages: U8 = np.empty((leaves + leaves // 256 + 8, PAGE_SIZE), np.uint8)
        self.used = leaves + 1  # in a tree, frame 0 means that there is none
        self.list: U64 = self.pages[1 : self.used].reshape(-1).view(np.uint64)
        self.list.reshape(-1, EXTENT)[:] = extents[:, None] * np.uint64(EXTENT) + np.arange(EXTENT, dtype=np.uint64)
        self.table: U64 = np.full(entries * 2, NO_FRAME)
        self.table[self.list] = np.arange(entries, dtype=np.uint64)
        frames = np.arange(1, leaves + 1, dtype=np.uint64)
        runs = FrameRuns(np.arange(leaves), np.ones(leaves, np.int64), frames)
        shared = bytearray(PAGE_SIZE)
        for offset, store in write_tree_anchors(
            P2MForm.ROOTED, runs, entries, 8, self.put, levels=4
        ).shared_info_writes():
            shared[offset : offset + len(store)] = store
        self.shared = bytes(shared)

    def put(self, pages: U8) -> U64:
        first, self.used = self.used, self.used + len(pages)
        self.pages[first : self.used] = pages
        return np.arange(first, self.used, dtype=np.uint64)

    def version(self) -> XenVersion:
        return XenVersion(4, 17, "")

    def domains(self) -> list[DomainInfo]:
        return [self.info(DomId(1))]

    def info(self, domid: DomId) -> DomainInfo:
        n = len(self.list)
        return DomainInfo(domid, None, None, False, 8, n, n, 0, 0, False, False, None, False)

    def max_mfn(self) -> int:
        return len(self.table) - 1

    def map_frames(self, _domid: DomId, mfns: U64) -> tuple[U8, U8]:
        first, last = int(mfns[0]), int(mfns[-1])
        if last - first == len(mfns) - 1:
            return self.pages[first : last + 1], np.ones(len(mfns), np.uint8)
        return self.pages[mfns], np.ones(len(mfns), np.uint8)

    def m2p(self, mfns: U64) -> U64:
        return self.table.take(mfns.view(np.int64))

    def page_types(self, _domid: DomId, mfns: U64) -> U8:
        return np.zeros(len(mfns), np.uint8)

    def vcpu_context(self, _domid: DomId, _vcpu: int) -> bytes:
        raise NotImplementedError

    def shared_info(self, _domid: DomId) -> bytes:
        return self.shared

    def pause(self, _domid: DomId) -> None:
        raise NotImplementedError

    def unpause(self, _domid: DomId) -> None:
        raise NotImplementedError


def least_seconds(call: Callable[[], object]) -> float:
    """Return the least wall time of RUNS calls."""
    best = float("inf")
    for _ in range(RUNS):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def check(entries: int) -> None:
    """Measure a check of the p2m against the m2p, and NumPy's copy of the p2m's bytes."""
    host = FlatHost(entries)
    live = LiveDomain(host, host.info(DomId(1)))
    findings = Findings()

    def run() -> None:
        PhysmapCheck(live, findings, owner=False).run()

    copied, checked = least_seconds(host.list.copy), least_seconds(run)
    if list(findings):
        raise SystemExit(f"the check has false findings: {[str(f) for f in findings]}")
    print(f"check of {entries} entries ({entries * PAGE_SIZE >> 30} GiB of pages): {checked:.2f} s")
    print(f"  {checked / copied:.1f} times NumPy's copy of the same {entries * 8 >> 20} MiB ({copied:.2f} s)")
    walked = least_seconds(lambda: live.walk_p2m(live.anchors.roots[0]))
    surveyed = least_seconds(lambda: survey(live.p2m))
    print(f"  walk of the tables alone: {walked:.3f} s; survey of the leaves: {surveyed:.2f} s")


class Sparse:
    """The p2m frames of a guest whose 64 MiB lie at 64 places of 16 TiB."""

    def __init__(self) -> None:
        self.frames: dict[int, U8] = {}
        total, entries = 64 << 8, 16 << 28
        pfns = np.concatenate([np.arange(256, dtype=np.uint64) + np.uint64(i * (entries // 64)) for i in range(64)])
        leaves = write_leaves(pfns, pfns[::-1].copy() + np.uint64(1 << 33), entries, 8, self.put)
        assert len(pfns) == total
        self.anchors = write_tree_anchors(P2MForm.ROOTED, leaves, entries, 8, self.put, levels=5)

    def put(self, pages: U8) -> U64:
        first = len(self.frames) + 1  # in a tree, frame 0 means that there is none
        self.frames |= {first + i: page.copy() for i, page in enumerate(pages)}
        return np.arange(first, first + len(pages), dtype=np.uint64)

    def read(self, frames: U64) -> tuple[U8, Mask]:
        return np.array([self.frames[frame] for frame in frames.tolist()]), np.ones(len(frames), np.bool_)

    def walk(self) -> int:
        """Walk and survey the p2m; return the number of populated pages."""
        p2m = P2M.from_root(self.anchors, self.anchors.roots[0], self.read)
        return survey(p2m).pages[EntryKind.LOCAL]


def sparse() -> None:
    """Measure time and memory of a walk and survey of 16 TiB of pfns, of which 64 MiB are populated."""
    guest = Sparse()
    seconds = least_seconds(guest.walk)
    tracemalloc.start()
    pages = guest.walk()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(
        f"16 TiB of pfns, {pages * PAGE_SIZE >> 20} MiB populated, rooted tree of 5 levels, {len(guest.frames)} frames:"
    )
    print(f"  walked and surveyed in {seconds * 1000:.1f} ms, {peak / (1 << 20):.1f} MiB at most")


# Runs in dom0, in one process, so that the import of NumPy under emulation is not measured.
_LIVE = """
import json, subprocess, sys, time
from xenpv.verify.physmap import PhysmapCheck
from xenpv.source.live import LiveDomain
from xenpv.findings import Findings
from xenpv.host.protocol import find_domain
from xenpv.host.xen.host import XenHost

def least_seconds(call, runs=3):
    best = float("inf")
    for _ in range(runs):
        start = time.monotonic()
        call()
        best = min(best, time.monotonic() - start)
    return best

out = {}
with XenHost() as host:
    for name in sys.argv[2:]:
        live = LiveDomain(host, find_domain(host, name))
        root = live.anchors.roots[-1]

        def walk():
            p2m = live.walk_p2m(root)
            return sum(len(leaves.first) for leaves in p2m.iter_leaves())

        def check():
            PhysmapCheck(live, Findings()).run()

        def dump():
            with open("/dev/null", "w") as null:
                command = [sys.argv[1], "dump-p2m", str(live.info.domid)]
                subprocess.run(command, stdout=null, stderr=null, check=True)

        out[name] = {"leaves": walk(), "walk": least_seconds(walk), "check": least_seconds(check),
                     "dump-p2m": least_seconds(dump)}
print(json.dumps(out))
"""


def live(xen: str) -> None:
    """Compare a walk of running domains' p2m with `xen-mfndump dump-p2m`, which also prints it, in the same boot."""
    names = {"debian": guests.config("debian"), "spread": guests.litmus_config("spread", options="p2m=tree spread=4G")}
    with lab.Host(xen, mem="3G", dom0_mem="2G") as host:
        for name, config in names.items():
            host.run(f"xl create {host.write(f'{name}.cfg', config)}").check()
        host.wait_for_guest("debian", guests.UP)
        host.wait_for_guest("spread", "litmus: up")
        tool = host.run("ls /usr/lib/xen-*/bin/xen-mfndump").check().text.split()[0]
        script = host.write("live.py", _LIVE)
        figures = json.loads(host.run(f"python3 {script} {tool} {' '.join(names)}", timeout=600).check().stdout)
    print(f"live on Xen {xen}, emulated:")
    for name, figure in figures.items():
        ratio = figure["walk"] / figure["dump-p2m"]
        print(f"  {name}: {figure['leaves']} leaf frames; walked and read in {figure['walk'] * 1000:.1f} ms,", end=" ")
        print(f"{ratio:.2f} of xen-mfndump dump-p2m ({figure['dump-p2m'] * 1000:.0f} ms);", end=" ")
        print(f"checked in {figure['check'] * 1000:.0f} ms")


_LINUX = """
import json, resource, sys, time
from xenpv.verify.physmap import PhysmapCheck
from xenpv.source.live import LiveDomain
from xenpv.findings import Findings
from xenpv.host.protocol import find_domain
from xenpv.host.xen.host import XenHost

with XenHost() as host:
    for owner in (False, True):
        live = LiveDomain(host, find_domain(host, "large"))
        findings = Findings()
        start = time.monotonic()
        PhysmapCheck(live, findings, owner=owner).run()
        seconds = time.monotonic() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        mode = "with the owner of each frame" if owner else "quick"
        print(f"  {live.anchors.form_names}, max_pfn {live.anchors.max_pfn:#x}:", end=" ")
        print(f"checked ({mode}) in {seconds:.0f} s, {peak} MiB")
        for finding in findings:
            print(f"    {finding.severity}: {finding}")
"""


def linux(size: int) -> None:
    """Check a Linux guest of so many GiB on a sparse host of 700 GiB."""
    with lab.Host("4.17", mem="700G", dom0_mem="6G") as host:
        config = guests.config("large", memory=size << 10, kernel_options="xen_512gb_limit=0 nowatchdog")
        created = host.run(f"xl create {host.write('large.cfg', config)}", timeout=1800).check()
        host.wait_for_guest("large", guests.UP, timeout=3600)
        print(f"a Linux guest of {size} GiB on Xen 4.17, emulated; xl create took {created.seconds:.0f} s")
        print(host.run(f"python3 {host.write('check.py', _LINUX)}", timeout=1800).check().text, end="")


def main() -> None:
    """Run the benchmarks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=128 << 20, help="entries of the checked p2m (default: 128 Mi)")
    parser.add_argument("--lab", metavar="XEN", help="also live beside xen-mfndump, on this Xen in the lab")
    parser.add_argument("--linux", type=int, metavar="GIB", help="check a Linux guest of this size in the lab instead")
    args = parser.parse_args()
    if args.linux:
        linux(args.linux)
        return
    sparse()
    check(args.entries)
    if args.lab:
        live(args.lab)


if __name__ == "__main__":
    main()
