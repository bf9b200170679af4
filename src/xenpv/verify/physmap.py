"""The p2m of a running domain held against Xen's m2p, both ways. The two of them are the physmap.

A running domain changes what we look at: what disagrees is read again, and is only a finding if it still does.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from xenpv.errors import GuestError
from xenpv.findings import Findings, Rule, Severity
from xenpv.frames import NO_FRAME, PAGE_SIZE, PFNS_PER_SCAN, U64, PageType
from xenpv.io.progress import Progress, ProgressCallback
from xenpv.memory.anchors import ROOTED_TREE_LEVELS, P2MForm, P2MRoot, tree_capacity
from xenpv.memory.p2m import P2M, Leaves, names_local_frame
from xenpv.memory.pagetables import BITS_PER_LEVEL
from xenpv.memory.survey import Kind, Survey, survey
from xenpv.runs import FrameRuns
from xenpv.source.live import LiveDomain

_M2P = "arch-x86/xen.h; mfn_in_pseudophysmap()"
_SHARED_INFO = "arch-x86/xen.h arch_shared_info"
_NOTE = Severity.NOTE
REACH = Rule("physmap-reach", "the guest's anchors lead to a p2m, and to all of it", _SHARED_INFO)
TABLE = Rule("physmap-table", "every table of the p2m is a frame of the domain", _SHARED_INFO)
LEAF = Rule("physmap-leaf", "every leaf of the p2m is a frame of the domain", _SHARED_INFO)
BEYOND = Rule("physmap-beyond", "no entry is above the host's last frame", _M2P)
NOT_OWN = Rule("physmap-not-own", "every entry is a frame of the domain", _M2P)
TWICE = Rule("physmap-twice", "no two pfns have one mfn", _M2P)
STALE = Rule("physmap-stale", "m2p of an entry's mfn gives the pfn back", _M2P)
LOST = Rule("physmap-lost", "every frame of the domain is the entry of the pfn that m2p says", _M2P)
SHARED = Rule("physmap-shared", "a leaf that stands in several places maps nothing", "else its pfns have one mfn")
GENERATION = Rule("physmap-generation", "p2m_generation is even, and the p2m the same after as before", _SHARED_INFO)
CHANGED = Rule("physmap-changed", "no entry changes while it is looked at", "look again, or pause it", Severity.WARNING)
PARTIAL = Rule("physmap-partial", "every way leads to all of the p2m", _SHARED_INFO, _NOTE)
_KINDS = {
    Kind.HOLE: (Rule("physmap-hole", "every part of the p2m has a leaf", _SHARED_INFO, _NOTE), "are in no leaf"),
    Kind.INVALID: (Rule("physmap-invalid", "every pfn has a frame", _SHARED_INFO, _NOTE), "have none (INVALID_MFN)"),
    Kind.FOREIGN: (
        Rule("physmap-foreign", "no entry is another domain's frame", "Linux's FOREIGN_FRAME_BIT", _NOTE),
        "are mapped from another domain (FOREIGN)",
    ),
    Kind.IDENTITY: (
        Rule("physmap-identity", "no entry is a machine frame of its own number", "Linux's IDENTITY_FRAME_BIT", _NOTE),
        "stand for machine frames of their own number (IDENTITY)",
    ),
}
_ASKED = 1 << 16  # stale entries of which the other pfn is looked up, which may be anywhere; more are only called stale


@dataclass
class PhysmapCheck:
    """One pass over the p2m of a domain, by every way that is open; ``run`` it.

    ``owner``: whether to ask of every entry who owns its frame. Without, a frame of another domain that has the same
    pfn there goes unseen; with, Xen is asked once for every 1024 frames.
    """

    live: LiveDomain
    findings: Findings
    owner: bool = True
    progress: ProgressCallback | None = None
    _asked: int = field(default=0, init=False)

    def run(self) -> None:
        """Check everything. Raises HostError when the domain goes meanwhile."""
        live, findings = self.live, self.findings
        if not live.anchors.roots:
            findings.add(REACH, f"dom{live.info.domid} exposes no p2m: {live.anchors.explain_no_root()}")
            return
        walked: P2M | None = None
        for root in live.anchors.roots:
            try:
                p2m = live.p2m if root == live.anchors.roots[0] else live.walk_p2m(root, self._reach(root))
            except GuestError as e:
                findings.add(REACH, f"{root.name}: {e}")
                continue
            for lost in p2m.unreadable:
                bits = BITS_PER_LEVEL if root.form is P2MForm.LINEAR else p2m.per_leaf.bit_length() - 1
                first = max((lost.place << bits * lost.level) - root.first_place, 0)
                what = f"the table at mfn {lost.frame:#x}, {lost.level} above the leaves, is not the domain's"
                findings.add(TABLE, f"{root.name}: {what}", pfn=first * p2m.per_leaf)
            if root == live.anchors.roots[0]:
                confirmed = self._entries(p2m, root)
                if confirmed < p2m.entries:
                    notes(survey(p2m), findings)
                self._lost(p2m, confirmed)
                walked = p2m
            elif walked is None:
                self._entries(p2m, root)
            else:  # leaves that the best way leads to are checked
                self._entries(replace(p2m, leaves=p2m.leaves.difference(walked.leaves)), root)
        changed = live.changed() if walked is not None else None
        if changed is not None:
            findings.add(GENERATION, changed)

    def _reach(self, root: P2MRoot) -> int:
        """How many entries to look at by this way.

        A tree beside the list may show less than all, as Linux's does beyond 512 GiB; alone it may not.
        """
        anchors = self.live.anchors
        if root.form is P2MForm.LINEAR or root == anchors.roots[0] or root.levels not in ROOTED_TREE_LEVELS:
            return anchors.max_pfn
        reach = tree_capacity(root.levels, anchors.width)
        if reach < anchors.max_pfn:
            what = f"{root.name}: reaches pfn {reach - 1:#x} only, the {anchors.roots[0].name} {anchors.max_pfn - 1:#x}"
            self.findings.add(PARTIAL, f"{what}: tools that know no other refuse this domain")
        return min(reach, anchors.max_pfn)

    # --- p2m to m2p --------------------------------------------------------------------------------------------------

    def _entries(self, p2m: P2M, root: P2MRoot) -> int:
        """Check every entry; how many are frames of the domain of which m2p gives the pfn back."""
        host, max_mfn = self.live.host, np.uint64(self.live.host.max_mfn())
        confirmed, seen = 0, 0
        for leaves in p2m.content(lost=partial(self._lost_leaves, root)):
            pfns, mfns = leaves.pfns.reshape(-1), leaves.mfns.reshape(-1)
            inside = mfns <= max_mfn  # INVALID_MFN, FOREIGN and IDENTITY are above any frame
            if not inside.all():
                wrong = ~inside & names_local_frame(mfns)
                self._wrong(p2m, pfns[wrong])
                pfns, mfns = pfns[inside], mfns[inside]
            right = host.m2p(mfns) == pfns
            if not right.all():
                self._wrong(p2m, pfns[~right])
                pfns, mfns = pfns[right], mfns[right]
            confirmed += self._owned(p2m, pfns, mfns)
            self._shared(leaves)
            seen += int(leaves.times.sum())
            if self.progress is not None:
                self.progress(Progress(seen, p2m.places, "checking the p2m", "leaves"))
        return confirmed

    def _owned(self, p2m: P2M, pfns: U64, mfns: U64) -> int:
        if not self.owner:
            return len(mfns)
        others = self.live.host.page_types(self.live.info.domid, mfns) == PageType.XTAB
        if others.any():
            self._wrong(p2m, pfns[others])
        return len(mfns) - int(np.count_nonzero(others))

    def _wrong(self, p2m: P2M, pfns: U64) -> None:
        """Say of each pfn what is wrong with its entry: the "m2p doesn't match p2m" of old, in words."""
        if not len(pfns):
            return
        host, domid = self.live.host, self.live.info.domid
        mfns = p2m.lookup(pfns)
        back = host.m2p(mfns)
        own, beyond = names_local_frame(mfns), mfns > np.uint64(host.max_mfn())
        others = own & ~beyond
        others[others] = host.page_types(domid, mfns[others]) == PageType.XTAB
        stale = own & ~beyond & ~others & (back != pfns)
        twice = np.zeros_like(stale)
        asked = np.flatnonzero(stale)[: max(0, _ASKED - self._asked)]
        twice[asked] = p2m.lookup(back[asked]) == mfns[asked]
        self._asked += len(asked)
        moving = p2m.lookup(pfns) != mfns  # since we read it just now
        wrong = (own & beyond | others | stale) & ~moving
        found = np.column_stack([pfns, mfns, back])
        for rule, which, says in (
            (BEYOND, wrong & beyond, "pfn {0:#x} has mfn {1:#x}, the host's last is {last:#x}"),
            (NOT_OWN, wrong & others, "pfn {0:#x} has mfn {1:#x}, which is not a frame of the domain"),
            (TWICE, wrong & twice, "pfns {0:#x} and {2:#x} both have mfn {1:#x}; m2p says {2:#x}"),
            (STALE, wrong & stale & ~twice, "pfn {0:#x} has mfn {1:#x}, of which m2p says pfn {2:#x}"),
            (CHANGED, ~wrong, "the entry of pfn {0:#x} changed while it was looked at"),
        ):

            def describe(one: U64, says: str = says) -> tuple[str, dict[str, int]]:
                return says.format(*one.tolist(), last=host.max_mfn()), {"pfn": int(one[0])}

            self.findings.add_each(rule, found[which], describe)

    def _shared(self, leaves: Leaves) -> None:
        several = leaves.times > 1
        if several.any():
            mapping = np.flatnonzero(several)[names_local_frame(leaves.mfns[several]).any(axis=1)]

            def describe(row: np.int64) -> tuple[str, dict[str, int]]:
                pfn = int(leaves.pfns[row, 0])
                what = f"the leaf of pfn {pfn:#x} stands in {int(leaves.times[row])} places, and maps pages"
                return what, {"pfn": pfn}

            self.findings.add_each(SHARED, mapping, describe)

    def _lost_leaves(self, root: P2MRoot, leaves: FrameRuns) -> None:
        per_leaf = PAGE_SIZE // self.live.info.width

        def describe(row: np.int64) -> tuple[str, dict[str, int]]:
            pfn, mfn = int(leaves.first[row]) * per_leaf, int(leaves.frame[row])
            return f"{root.name}: the leaf of pfn {pfn:#x}, mfn {mfn:#x}, is not the domain's", {"pfn": pfn}

        self.findings.add_each(LEAF, np.arange(len(leaves)), describe)

    # --- m2p to p2m --------------------------------------------------------------------------------------------------

    def _lost(self, p2m: P2M, confirmed: int) -> None:
        """Find the frames of the domain that are no pfn's entry. Only if it has more than were confirmed."""
        host, domid = self.live.host, self.live.info.domid
        lost = host.info(domid).pages - confirmed
        frames = host.max_mfn() + 1
        for first in range(0, frames, PFNS_PER_SCAN):
            if lost <= 0:
                return
            mfns = np.arange(first, min(first + PFNS_PER_SCAN, frames), dtype=np.uint64)
            pfns = host.m2p(mfns)
            inside = pfns < np.uint64(p2m.entries)
            inside[inside] = host.page_types(domid, mfns[inside]) != PageType.XTAB
            mfns, pfns = mfns[inside], pfns[inside]  # only what is ours: others' pfns would have us read all the p2m
            entries = p2m.lookup(pfns)
            found = np.column_stack([mfns, pfns, entries])[entries != mfns]
            self.findings.add_each(LOST, found, _describe_lost)
            lost -= len(found)
            if self.progress is not None:
                self.progress(Progress(first, frames, "checking the m2p", "frames"))
        if lost > 0:
            self.findings.add(LOST, f"{lost} frames of the domain are no pfn's entry, and m2p has no pfn for them")


def notes(found: Survey, findings: Findings) -> None:
    """Say how many pfns have no frame of the domain, and why: nothing of it need be wrong."""
    for kind, (rule, what) in _KINDS.items():
        if found.pages[kind]:
            first = found.first.get(kind)
            where = "" if first is None else f", the first is {first:#x}"
            findings.add(rule, f"{found.pages[kind]} pfns {what}{where}", pfn=first)


def _describe_lost(one: U64) -> tuple[str, dict[str, int]]:
    mfn, pfn, entry = one.tolist()
    has = "has none" if entry == int(NO_FRAME) else f"has {entry:#x}"
    return f"mfn {mfn:#x} is the domain's, m2p says as pfn {pfn:#x}, which {has}", {"pfn": pfn}
