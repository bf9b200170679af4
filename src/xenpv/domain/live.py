"""A running domain: its p2m found, walked, and held against Xen's m2p. Reads only, and pauses nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from xenpv.errors import GuestError
from xenpv.findings import Findings, Rule
from xenpv.frames import NO_FRAME, U8, U64, Mask, PageType
from xenpv.host import DomainInfo, Host
from xenpv.memory.p2m import Anchors
from xenpv.memory.physmap import Physmap, Way, is_own, ways

# --- rules of a physmap: the p2m and the m2p, checked both ways ------------------------------------------------------
_M2P = "arch-x86/xen.h; mfn_in_pseudophysmap()"
REACH = Rule("physmap-reach", "the guest's anchors lead to a p2m, and to all of it", "arch-x86/xen.h arch_shared_info")
TABLE = Rule("physmap-table", "every table of the p2m is a frame of the domain", "arch-x86/xen.h arch_shared_info")
BEYOND = Rule("physmap-beyond", "no entry is above the host's last frame", _M2P)
NOT_OWN = Rule("physmap-not-own", "every entry is a frame of the domain", _M2P)
TWICE = Rule("physmap-twice", "no two pfns have one mfn", _M2P)
STALE = Rule("physmap-stale", "m2p of an entry's mfn gives the pfn back", _M2P)
SHARED = Rule("physmap-shared", "a leaf that stands in several places maps nothing", "else its pfns have one mfn")
GENERATION = Rule("physmap-generation", "p2m_generation is even, and the same after as before", "arch-x86/xen.h")


@dataclass
class LiveDomain:
    """A domain on a host, as it is while one looks: nothing is paused."""

    host: Host
    info: DomainInfo
    shared_info: bytes = field(init=False, repr=False)
    anchors: Anchors = field(init=False)

    def __post_init__(self) -> None:
        self.shared_info = self.host.shared_info(self.info.domid)
        self.anchors = Anchors.of(self.shared_info, self.info.width)

    @property
    def ways(self) -> list[Way]:
        """The ways to its p2m, best first."""
        return ways(self.anchors, self.shared_info)

    def read(self, mfns: U64) -> tuple[U8, Mask]:
        """Machine frames of the domain, and whether each could be read."""
        pages, mapped = self.host.map_frames(self.info.domid, mfns)
        return pages, mapped.astype(np.bool_)

    def physmap(self, way: Way | None = None) -> Physmap:
        """Its p2m by one way, the best if none is named.

        Raises GuestError when there is none, or it cannot be right.
        """
        there = self.ways
        if way is None and not there:
            anchor = self.anchors.frame_list_list
            state = "not set up yet" if not anchor else "to be looked for elsewhere, and nothing else is published"
            raise GuestError(f"dom{self.info.domid} exposes no p2m: its anchor is {anchor:#x}, which is {state}")
        return Physmap.walk(way or there[0], self.anchors, self.read)


def check_physmap(domain: LiveDomain, findings: Findings) -> None:
    """Every entry of the p2m, by every way that is open, against the m2p and the frames' owner."""
    if not domain.ways:
        try:
            domain.physmap()
        except GuestError as e:
            findings.add(REACH, str(e))
    for way in domain.ways:
        try:
            physmap = domain.physmap(way)
        except GuestError as e:
            findings.add(REACH, f"{way.name}: {e}")
            continue
        for lost in physmap.unreadable:
            what = f"{way.name}: the table at mfn {lost.frame:#x}, {lost.level} above the leaves, is not the domain's"
            findings.add(TABLE, what)
        _check_entries(domain, physmap, findings)
    _check_generation(domain, findings)


def _check_entries(domain: LiveDomain, physmap: Physmap, findings: Findings) -> None:
    max_mfn = np.uint64(domain.host.max_mfn())
    for first, places, mfns in physmap.content():
        pfns = (first * physmap.per_leaf)[:, None] + np.arange(physmap.per_leaf)
        own = is_own(mfns) & (pfns < physmap.entries)
        for row in np.flatnonzero(own.any(axis=1) & (places > 1))[: findings.room(SHARED)].tolist():
            what = f"the leaf of pfn {int(pfns[row, 0]):#x} stands in {int(places[row])} places, and maps pages"
            findings.add(SHARED, what, pfn=int(pfns[row, 0]))
        beyond = own & (mfns > max_mfn)
        for pfn, mfn in zip(pfns[beyond].tolist(), mfns[beyond].tolist(), strict=True):
            findings.add(BEYOND, f"pfn {pfn:#x} has mfn {mfn:#x}, the host's last is {int(max_mfn):#x}", pfn=pfn)
        inside = own & ~beyond
        back = domain.host.m2p(mfns[inside])
        wrong = back != pfns[inside].astype(np.uint64)
        entries = np.column_stack([pfns[inside][wrong].astype(np.uint64), mfns[inside][wrong], back[wrong]])
        _explain(domain, physmap, findings, entries)


def _explain(domain: LiveDomain, physmap: Physmap, findings: Findings, entries: U64) -> None:
    """Say of each entry (pfn, mfn, m2p of the mfn) that m2p does not give back, why.

    The "m2p doesn't match p2m" of old, in words.
    """
    if not len(entries):
        return
    types = domain.host.page_types(domain.info.domid, entries[:, 1].copy())
    for (pfn, mfn, other), kind in zip(entries.tolist(), types.tolist(), strict=True):
        if kind == PageType.XTAB:
            findings.add(NOT_OWN, f"pfn {pfn:#x} has mfn {mfn:#x}, which is not a frame of the domain", pfn=pfn)
        elif other != int(NO_FRAME) and physmap.lookup([other]) == [mfn]:
            findings.add(TWICE, f"pfns {pfn:#x} and {other:#x} both have mfn {mfn:#x}; m2p says {other:#x}", pfn=pfn)
        else:
            findings.add(STALE, f"pfn {pfn:#x} has mfn {mfn:#x}, of which m2p says pfn {other:#x}", pfn=pfn)


def _check_generation(domain: LiveDomain, findings: Findings) -> None:
    if not domain.anchors.p2m_cr3:
        return
    before = domain.anchors.p2m_generation
    after = Anchors.of(domain.host.shared_info(domain.info.domid), domain.info.width).p2m_generation
    if before & 1:
        findings.add(GENERATION, f"p2m_generation {before:#x} is odd: the p2m is being changed, look again")
    elif before != after:
        findings.add(GENERATION, f"p2m_generation went from {before:#x} to {after:#x} meanwhile: look again")
