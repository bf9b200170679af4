"""Cross-checks a running domain's p2m against Xen's m2p.

Both together are the physmap.

A running domain may change an entry during the check. An entry that disagrees is read again, and is a finding only if
it still disagrees.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from xenpv.errors import GuestError
from xenpv.findings import Findings, Rule, Severity
from xenpv.frames import NO_FRAME, PAGE_SIZE, PFNS_PER_SCAN, U64, PageType
from xenpv.io.progress import Progress, ProgressCallback
from xenpv.memory.p2m_anchors import ROOTED_TREE_LEVELS, P2MForm, P2MRoot, tree_capacity
from xenpv.memory.p2m_reader import P2M, Leaves, names_local_frame
from xenpv.memory.p2m_survey import EntryKind, Survey, survey
from xenpv.memory.page_tables import BITS_PER_LEVEL
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
LOST = Rule("physmap-lost", "every frame of the domain is the p2m entry of its m2p pfn", _M2P)
SHARED = Rule("physmap-shared", "a leaf in several places of the p2m maps nothing", "otherwise its pfns share mfns")
GENERATION = Rule(
    "physmap-generation", "p2m_generation is even, and the p2m does not change during the check", _SHARED_INFO
)
CHANGED = Rule(
    "physmap-changed", "no entry changes during the check", "check again, or pause the domain", Severity.WARNING
)
PARTIAL = Rule("physmap-partial", "every root leads to all of the p2m", _SHARED_INFO, _NOTE)
_KINDS = {
    EntryKind.HOLE: (Rule("physmap-hole", "every part of the p2m has a leaf", _SHARED_INFO, _NOTE), "are in no leaf"),
    EntryKind.INVALID: (
        Rule("physmap-invalid", "every pfn has a frame", _SHARED_INFO, _NOTE),
        "have none (INVALID_MFN)",
    ),
    EntryKind.FOREIGN: (
        Rule("physmap-foreign", "no entry is another domain's frame", "Linux's FOREIGN_FRAME_BIT", _NOTE),
        "are mapped from another domain (FOREIGN)",
    ),
    EntryKind.IDENTITY: (
        Rule("physmap-identity", "no entry is a machine frame of the same number", "Linux's IDENTITY_FRAME_BIT", _NOTE),
        "stand for machine frames of the same number (IDENTITY)",
    ),
}
_LOOKUPS_MAX = 1 << 16  # stale entries whose m2p pfn is looked up, anywhere in the p2m; further ones are only STALE


class PhysmapCheck:
    """Checks the p2m of a running domain by all its roots, and the m2p of its frames.

    Args:
        live: The domain.
        findings: Gets the findings.
        owner: Ask Xen for the owner of every frame, in batches. Otherwise another domain's frame is overlooked if it
            has the same pfn there.
        progress: Called after each batch.
    """

    def __init__(
        self, live: LiveDomain, findings: Findings, *, owner: bool = True, progress: ProgressCallback | None = None
    ) -> None:
        self.live = live
        self.findings = findings
        self.owner = owner
        self.progress = progress
        self._host = live.host
        self._domid = live.info.domid
        self._lookups = 0

    def run(self) -> None:
        """Check everything.

        Raises:
            HostError: The domain is destroyed during the check.
        """
        live, findings = self.live, self.findings
        roots = live.anchors.roots
        if not roots:
            findings.add(REACH, f"dom{self._domid} exposes no p2m: {live.anchors.explain_no_root()}")
            return
        best: P2M | None = None
        for root in roots:
            try:
                p2m = live.p2m if root == roots[0] else live.walk_p2m(root, self._entries_to_check(root))
            except GuestError as e:
                findings.add(REACH, f"{root.name}: {e}")
                continue
            self._report_unreadable_tables(p2m, root)
            if root == roots[0]:
                confirmed = self._check_entries(p2m, root)
                if confirmed < p2m.entries:
                    add_survey_notes(survey(p2m), findings)
                self._check_m2p(p2m, confirmed)
                best = p2m
            elif best is None:
                self._check_entries(p2m, root)
            else:  # the leaves that both roots lead to are checked already
                self._check_entries(replace(p2m, leaves=p2m.leaves.difference(best.leaves)), root)
        change = live.p2m_change() if best is not None else None
        if change is not None:
            findings.add(GENERATION, change.message)

    def _entries_to_check(self, root: P2MRoot) -> int:
        """Return how many entries a root must lead to.

        A tree beside a linear list may reach less than max_pfn, as Linux's does beyond 512 GiB. An only root may not.
        """
        anchors = self.live.anchors
        best = anchors.roots[0]
        if root.form is P2MForm.LINEAR or root == best or root.levels not in ROOTED_TREE_LEVELS:
            return anchors.max_pfn
        capacity = tree_capacity(root.levels, anchors.width)
        if capacity < anchors.max_pfn:
            problem = f"{root.name}: reaches only pfn {capacity - 1:#x}, the {best.name} {anchors.max_pfn - 1:#x}"
            self.findings.add(PARTIAL, f"{problem}: tools that know no other form refuse this domain")
        return min(capacity, anchors.max_pfn)

    def _report_unreadable_tables(self, p2m: P2M, root: P2MRoot) -> None:
        bits = BITS_PER_LEVEL if root.form is P2MForm.LINEAR else p2m.entries_per_leaf.bit_length() - 1
        for table in p2m.unreadable:
            first = max((table.place << bits * table.level) - root.first_place, 0)
            problem = f"the table at mfn {table.frame:#x}, {table.level} above the leaves, is not the domain's"
            self.findings.add(TABLE, f"{root.name}: {problem}", pfn=first * p2m.entries_per_leaf)

    # --- p2m to m2p --------------------------------------------------------------------------------------------------

    def _check_entries(self, p2m: P2M, root: P2MRoot) -> int:
        """Check every entry; return how many agree with the m2p and are the domain's."""
        max_mfn = np.uint64(self._host.max_mfn())
        confirmed, checked = 0, 0
        for leaves in p2m.iter_leaves(on_unreadable=partial(self._report_unreadable_leaves, root)):
            pfns, mfns = leaves.pfns.reshape(-1), leaves.mfns.reshape(-1)
            in_host = mfns <= max_mfn  # INVALID_MFN, FOREIGN and IDENTITY are above any frame
            if not in_host.all():
                self._report_entries(p2m, pfns[~in_host & names_local_frame(mfns)])
                pfns, mfns = pfns[in_host], mfns[in_host]
            agrees = self._host.m2p(mfns) == pfns
            if not agrees.all():
                self._report_entries(p2m, pfns[~agrees])
                pfns, mfns = pfns[agrees], mfns[agrees]
            confirmed += self._check_owner(p2m, pfns, mfns)
            self._check_shared_leaves(leaves)
            checked += int(leaves.place_count.sum())
            if self.progress is not None:
                self.progress(Progress(checked, p2m.leaf_count, "checking the p2m", "leaves"))
        return confirmed

    def _check_owner(self, p2m: P2M, pfns: U64, mfns: U64) -> int:
        """Check that the domain owns each frame; return how many it owns."""
        if not self.owner:
            return len(mfns)
        not_own = self._host.page_types(self._domid, mfns) == PageType.XTAB
        if not_own.any():
            self._report_entries(p2m, pfns[not_own])
        return len(mfns) - int(np.count_nonzero(not_own))

    def _report_entries(self, p2m: P2M, pfns: U64) -> None:
        """Read entries that disagree once more, and report what is wrong.

        These are libxenguest's "m2p doesn't match p2m".
        """
        if not len(pfns):
            return
        host = self._host
        mfns = p2m.lookup(pfns)
        m2p_pfns = host.m2p(mfns)
        local, beyond = names_local_frame(mfns), mfns > np.uint64(host.max_mfn())
        not_own = local & ~beyond
        not_own[not_own] = host.page_types(self._domid, mfns[not_own]) == PageType.XTAB
        stale = local & ~beyond & ~not_own & (m2p_pfns != pfns)
        twice = np.zeros_like(stale)
        looked_up = np.flatnonzero(stale)[: max(0, _LOOKUPS_MAX - self._lookups)]
        twice[looked_up] = p2m.lookup(m2p_pfns[looked_up]) == mfns[looked_up]
        self._lookups += len(looked_up)
        is_stable = p2m.lookup(pfns) == mfns
        wrong = (local & beyond | not_own | stale) & is_stable
        rows = np.column_stack([pfns, mfns, m2p_pfns])
        for rule, mask, text in (
            (BEYOND, wrong & beyond, "pfn {0:#x} has mfn {1:#x}, the host's last is {last:#x}"),
            (NOT_OWN, wrong & not_own, "pfn {0:#x} has mfn {1:#x}, which is not a frame of the domain"),
            (TWICE, wrong & twice, "pfns {0:#x} and {2:#x} both have mfn {1:#x}; m2p says {2:#x}"),
            (STALE, wrong & stale & ~twice, "pfn {0:#x} has mfn {1:#x}, and m2p gives pfn {2:#x} for it"),
            (CHANGED, ~wrong, "the entry of pfn {0:#x} changed during the check"),
        ):

            def describe(row: U64, text: str = text) -> tuple[str, dict[str, int]]:
                return text.format(*row.tolist(), last=host.max_mfn()), {"pfn": int(row[0])}

            self.findings.add_each(rule, rows[mask], describe)

    def _check_shared_leaves(self, leaves: Leaves) -> None:
        """Report leaves that are at several places of the p2m and map pages."""
        shared = leaves.place_count > 1
        if shared.any():
            mapping = np.flatnonzero(shared)[names_local_frame(leaves.mfns[shared]).any(axis=1)]

            def describe(row: np.int64) -> tuple[str, dict[str, int]]:
                pfn = int(leaves.pfns[row, 0])
                message = (
                    f"the leaf of pfn {pfn:#x} is at {int(leaves.place_count[row])} places of the p2m, and maps pages"
                )
                return message, {"pfn": pfn}

            self.findings.add_each(SHARED, mapping, describe)

    def _report_unreadable_leaves(self, root: P2MRoot, leaves: FrameRuns) -> None:
        per_leaf = PAGE_SIZE // self.live.info.width

        def describe(row: np.int64) -> tuple[str, dict[str, int]]:
            pfn, mfn = int(leaves.first[row]) * per_leaf, int(leaves.frame[row])
            return f"{root.name}: the leaf of pfn {pfn:#x}, mfn {mfn:#x}, is not the domain's", {"pfn": pfn}

        self.findings.add_each(LEAF, np.arange(len(leaves)), describe)

    # --- m2p to p2m --------------------------------------------------------------------------------------------------

    def _check_m2p(self, p2m: P2M, confirmed: int) -> None:
        """Find the domain's frames that no entry names.

        Searches only if it has more frames than entries were confirmed.
        """
        host = self._host
        remaining = host.info(self._domid).pages - confirmed
        frames = host.max_mfn() + 1
        for first in range(0, frames, PFNS_PER_SCAN):
            if remaining <= 0:
                return
            mfns = np.arange(first, min(first + PFNS_PER_SCAN, frames), dtype=np.uint64)
            pfns = host.m2p(mfns)
            own = pfns < np.uint64(p2m.entries)
            own[own] = host.page_types(self._domid, mfns[own]) != PageType.XTAB
            mfns, pfns = mfns[own], pfns[own]  # other domains' pfns would make us read all of the p2m
            entries = p2m.lookup(pfns)
            lost = np.column_stack([mfns, pfns, entries])[entries != mfns]
            self.findings.add_each(LOST, lost, _describe_lost)
            remaining -= len(lost)
            if self.progress is not None:
                self.progress(Progress(first, frames, "checking the m2p", "frames"))
        if remaining > 0:
            message = f"{remaining} frames of the domain are in no entry, and m2p has no pfn for them"
            self.findings.add(LOST, message)


def _describe_lost(row: U64) -> tuple[str, dict[str, int]]:
    mfn, pfn, entry = row.tolist()
    contradiction = "has none" if entry == int(NO_FRAME) else f"has {entry:#x}"
    return f"mfn {mfn:#x} is the domain's, m2p gives pfn {pfn:#x} for it, which {contradiction}", {"pfn": pfn}


def add_survey_notes(result: Survey, findings: Findings) -> None:
    """Add a note for each kind of pfn without a frame of the domain.

    None of them need be wrong.
    """
    for kind, (rule, description) in _KINDS.items():
        if result.pages[kind]:
            first = result.first.get(kind)
            suffix = "" if first is None else f", the first is {first:#x}"
            findings.add(rule, f"{result.pages[kind]} pfns {description}{suffix}", pfn=first)
