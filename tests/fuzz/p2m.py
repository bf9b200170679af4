"""Fuzz what reads a p2m. One invariant: whatever a guest's memory and anchors say, there are findings or a GuestError.

In bounded time and memory. A few frames name each other at random, at any level, width and number, and in every other
case they change while they are read. The bytes that the loop hands in are the seed of all that.

python -m tests.fuzz.p2m [--seconds N] [--seed N] [--only N]
"""

from __future__ import annotations

import errno
import sys
from random import Random

import numpy as np

from tests.fuzz.run import MIB, bounded, main
from xenpv.abi.declare import Width
from xenpv.abi.x86 import VCPU_GUEST_CONTEXT
from xenpv.abi.xen import INVALID_MFN
from xenpv.errors import GuestError, HostError, XenPVError
from xenpv.findings import Findings
from xenpv.frames import NO_FRAME, PAGE_SIZE, U8, U64, DomId, PageType
from xenpv.host.protocol import DomainInfo, XenVersion
from xenpv.memory.p2m_anchors import MARKED_TREE_BIT, MARKED_TREE_LEVELS, Anchors, P2MForm, tree_capacity
from xenpv.memory.p2m_reader import P2M
from xenpv.memory.p2m_survey import EntryKind, survey
from xenpv.source.live import LiveDomain
from xenpv.verify.physmap import PhysmapCheck

FRAMES = 32  # of the host; the domain has the first 24, the last is its shared info
OWN = 24
MEMORY = 512 * MIB  # what frame_tree.SHARED_RUNS_MAX runs take, a few times over


class TinyHost:
    """A host of a few frames, with one domain. ``flicker``: whether the guest writes while it is read."""

    def __init__(self, rng: Random, width: Width, form: P2MForm) -> None:
        self.rng, self.width, self.ptes = rng, width, (form is P2MForm.LINEAR) == (rng.random() < 0.9)
        self.content = np.array([page(rng, width, ptes=self.ptes) for _ in range(FRAMES)])
        self.flicker = rng.random() < 0.5
        self.pfns = np.array([rng.choice([mfn, mfn, mfn, number(rng, 8)]) for mfn in range(FRAMES)], np.uint64)
        kinds = [0] * 10 + list(PageType)
        self.kinds = np.array([rng.choice(kinds) for _ in range(FRAMES)], np.uint8)
        self.kinds[OWN:] = PageType.XTAB

    def version(self) -> XenVersion:
        return XenVersion(4, 17, "")

    def info(self, domid: DomId) -> DomainInfo:
        none = (False, False, None, False)
        return DomainInfo(domid, None, None, False, self.width, OWN, OWN, FRAMES - 1, 0, *none)

    def domains(self) -> list[DomainInfo]:
        return [self.info(DomId(1))]

    def max_mfn(self) -> int:
        return FRAMES - 1

    def map_frames(self, domid: DomId, mfns: U64) -> tuple[U8, U8]:  # noqa: ARG002
        if self.flicker and self.rng.random() < 0.5:
            self.content[self.rng.randrange(OWN)] = page(self.rng, self.width, ptes=self.ptes)
        mapped = mfns < np.uint64(OWN)
        pages = self.content[np.where(mapped, mfns, np.uint64(0)).astype(np.int64)]
        pages[~mapped] = 0
        return pages, mapped.astype(np.uint8)

    def m2p(self, mfns: U64) -> U64:
        valid = mfns < np.uint64(FRAMES)
        return np.where(valid, self.pfns[np.where(valid, mfns, np.uint64(0)).astype(np.int64)], NO_FRAME)

    def page_types(self, domid: DomId, mfns: U64) -> U8:  # noqa: ARG002
        valid = mfns < np.uint64(FRAMES)
        kinds = self.kinds[np.where(valid, mfns, np.uint64(0)).astype(np.int64)]
        return np.where(valid, kinds, np.uint8(PageType.XTAB)).astype(np.uint8)

    def vcpu_context(self, domid: DomId, vcpu: int) -> bytes:
        if vcpu:
            raise HostError("no such vcpu", op="getvcpucontext", domid=domid, errno=errno.EINVAL)
        context = np.zeros(1, VCPU_GUEST_CONTEXT[self.width])
        context["ctrlreg"][0, [1, 3]] = number(self.rng, self.width), number(self.rng, self.width)
        return bytes(context.tobytes())

    def shared_info(self, domid: DomId) -> bytes:  # noqa: ARG002
        return bytes(self.content[FRAMES - 1])

    def pause(self, domid: DomId) -> None:
        raise NotImplementedError

    unpause = pause


def number(rng: Random, width: Width) -> int:
    """Return a value of a table or an anchor: a frame, a page-table entry, a mark, all ones, a power of two."""
    mfn = rng.randrange(FRAMES + 1)
    bits = 8 * width
    numbers = (
        mfn,
        mfn,
        mfn << 12 | rng.choice([1, 0x67, 0xE7, 0]),
        mfn | 1 << bits - rng.randint(1, 3),
        INVALID_MFN[width],
        0,
        (1 << rng.randint(0, bits)) + rng.randint(-2, 2),
        rng.getrandbits(bits),
    )
    return rng.choice(numbers) & (1 << bits) - 1


def page(rng: Random, width: Width, *, ptes: bool) -> U8:
    """Return a random table: one entry repeated, or several in turn, with others strewn in."""
    entry_width: Width = 8 if ptes else width

    def entry() -> int:
        mfn = rng.randrange(1, OWN)
        return mfn << 12 | 0x67 if ptes else mfn

    make_entry = entry if rng.random() < 0.8 else lambda: number(rng, entry_width)
    turn = [make_entry() for _ in range(rng.choice([1, 1, 1, 2, 3, 7, 500]))]
    table = np.resize(np.array(turn, f"<u{entry_width}"), PAGE_SIZE // entry_width)
    for _ in range(rng.choice([0, 0, 1, 3, 20])):
        table[rng.choice([0, 1, 2, 511, rng.randrange(len(table))])] = rng.choice([entry(), number(rng, entry_width)])
    return table.view(np.uint8)


def anchors(rng: Random, width: Width, form: P2MForm) -> Anchors:
    """Of one form, to as many pfns as it reaches, or fewer."""
    full, mfn = INVALID_MFN[width], rng.randrange(1, OWN)
    levels = rng.randint(2, 8)
    depth = {P2MForm.ROOTED: levels, P2MForm.MARKED: MARKED_TREE_LEVELS}.get(form, 3)
    reach = (
        1 << 43
        if form is P2MForm.LINEAR and width == 8
        else 1 << 28
        if form is P2MForm.LINEAR
        else tree_capacity(depth, width)
    )
    most = min(reach, full)
    frame_list_list = {P2MForm.TREE: mfn, P2MForm.MARKED: (mfn | MARKED_TREE_BIT) & full}.get(form, full)
    vaddr = {8: 0xFFFF_8800_0000_0000, 4: 0x4000_0000}[width] + rng.randrange(1 << 15) * PAGE_SIZE
    return Anchors(
        width,
        rng.choice([most, most - rng.randrange(min(most, 2000)), rng.randint(0, most), rng.randrange(5000)]),
        frame_list_list,
        p2m_cr3=mfn << 12 if form is P2MForm.LINEAR else 0,
        p2m_vaddr=vaddr,
        p2m_levels=levels,
        p2m_root=mfn,
    )


def target(data: bytes, n: int) -> None:
    """Check one random domain, in bounded time and memory."""
    rng = Random(data)
    with bounded(n, len(data), memory=MEMORY, seconds=20):
        check_domain(rng, 8 if rng.random() < 0.7 else 4)


def check_domain(rng: Random, width: Width) -> None:
    """Check a domain whose p2m, anchors and frames are random: findings or a GuestError."""
    form = rng.choice(list(P2MForm))
    host = TinyHost(rng, width, form)
    shared = bytearray(PAGE_SIZE)
    stores = anchors(rng, width, form).shared_info_writes()
    if rng.random() < 0.3:
        stores.append((rng.choice(stores)[0], number(rng, width).to_bytes(width, "little")))
    for at, store in stores:
        shared[at : at + width] = store
    host.content[FRAMES - 1] = np.frombuffer(shared, np.uint8)
    live = LiveDomain(host, host.info(DomId(1)))
    for root in live.anchors.roots:
        for resolve in (None, lambda mfns: np.where(mfns < np.uint64(OWN), mfns ^ np.uint64(1), NO_FRAME)):
            try:
                p2m = P2M.from_root(live.anchors, root, live.read_p2m_frames, resolve)
            except GuestError:
                continue
            check_p2m(p2m, rng, changes=host.flicker)
    findings = Findings()
    PhysmapCheck(live, findings, owner=rng.random() < 0.5).run()
    for finding in findings:
        assert str(finding)
        assert finding.pfn is None or 0 <= finding.pfn < 1 << 64
    read_memory(live, rng)


def check_p2m(p2m: P2M, rng: Random, *, changes: bool) -> None:
    """Assert that the answers of a p2m agree with each other."""
    result = survey(p2m, rng.choice([1, 2, 7, 512, 4096]))
    assert sum(result.pages.values()) == p2m.entries
    assert min(result.pages.values()) >= 0
    assert {kind for kind in EntryKind if result.pages[kind]} == set(result.first)
    assert all(0 <= first < p2m.entries for first in result.first.values())
    assert 0 <= p2m.used_entries <= p2m.entries
    assert int(p2m.distinct_leaves.count.sum()) + int(p2m.holes.count.sum()) == p2m.leaf_count
    pfns = np.array([result.first.get(kind, 0) for kind in EntryKind] + [number(rng, 8) for _ in range(20)], np.uint64)
    mfns = p2m.lookup(pfns)
    assert (mfns[pfns >= np.uint64(p2m.entries)] == NO_FRAME).all()
    back = p2m.pfns_of(mfns)
    if not changes:
        assert np.array_equal(back == NO_FRAME, mfns == NO_FRAME)
        known = back != NO_FRAME
        assert np.array_equal(p2m.lookup(back[known]), mfns[known])


def read_memory(live: LiveDomain, rng: Random) -> None:
    """Read by pfn and by address: this gives bytes or raises XenPVError."""
    for _ in range(4):
        pfns = np.array([rng.choice([rng.randrange(64), number(rng, 8)]) for _ in range(3)], np.uint64)
        try:
            assert live.frames.types(pfns).shape == pfns.shape
            assert live.frames.pages(pfns).shape == (3, PAGE_SIZE)
            assert len(live.memory.read_virtual(number(rng, 8), rng.randrange(1 << 14))) < 1 << 14
        except XenPVError:
            continue


if __name__ == "__main__":
    sys.exit(main(target, "tests.fuzz.p2m"))
