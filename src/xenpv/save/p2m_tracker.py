"""The p2m of a domain during a save.

It is inspected before the first byte, sent, and followed while the guest changes it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from xenpv.errors import GuestError, RequestError
from xenpv.frames import FOREIGN, I64, IDENTITY, NO_FRAME, PFNS_PER_BATCH, U64, DomId, first_bad
from xenpv.host.protocol import Mover
from xenpv.memory.p2m_reader import P2M, Leaves, names_local_frame
from xenpv.runs import FrameRuns, group_rows
from xenpv.save.state_records import bad_mfn
from xenpv.source.live import LiveDomain
from xenpv.stream.records import P2MLeaves, X86PVP2MFrames

PFNS_MAX = 1 << 32  # X86_PV_P2M_FRAMES counts pfns in 32 bits

_UNSTABLE_TRIES, _NAP = 50, 0.002  # inspections of a p2m that the guest is changing, and seconds between them
_INVALID_TRIES = 3  # inspections of one that is invalid: a tree has no generation that would tell a change

_MFNs = npt.NDArray[np.uint32] | npt.NDArray[np.uint64]
PfnMfns = tuple[U64, U64]
"""Pfns, and the mfn that the p2m has for each."""


class _UnstableP2M(GuestError):
    """The guest is changing its p2m."""


class P2MCounts(NamedTuple):
    """Counts of a p2m's entries: local frames, and those marked foreign or identity."""

    populated: int
    foreign: int
    identity: int


class P2MChanges(NamedTuple):
    """How a p2m differs from what was sent.

    Attributes:
        remapped: Pfns with another frame than when their leaf was last read, or with one for the first time.
        page_tables_stale: Whether a frame has another pfn, so that page tables which name it must be sent again.
    """

    remapped: U64
    page_tables_stale: bool


class P2MTracker:
    """A domain's p2m, up to where all further leaves are one and the same.

    That leaf names nothing: otherwise its pages would have several pfns. Inspects the p2m at once; ``inspect`` does so
    again after the guest has changed it.

    Attributes:
        live: The domain as it was at the last inspection.
        p2m: Its p2m, walked then.
        counts: What its entries were at first.
        sent_entries: Entries that the receiver knows of; it cannot know of fewer again.
        unmapped_pfns: Pfns that lost their frame at some time since tracking began; some may have one again.

    Args:
        track_changes: Remember all entries, for ``record_leaves`` and ``changes``. This takes 4 bytes per entry of a
            leaf, 1/1024 of the domain's memory; 8 bytes on a host of 16 TiB and more.
        libxc_compatible: Refuse what only xenpv can restore.

    Raises:
        GuestError: The p2m is invalid, or the guest keeps changing it.
        RequestError: It does not fit into a stream.
    """

    def __init__(
        self, host: Mover, domid: DomId, *, track_changes: bool = False, libxc_compatible: bool = True
    ) -> None:
        self.host = host
        self.domid = domid
        self.track_changes = track_changes
        self.libxc_compatible = libxc_compatible
        self.unmapped_pfns = np.empty(0, np.uint64)
        self.sent_entries = 0
        self._sends_runs = False
        self._sent_leaves = FrameRuns.from_frames(np.empty(0, np.uint64))  # the pfn of each leaf, as sent
        entry = np.dtype(np.uint32 if host.max_mfn() < 0xFFFF_FFFF else np.uint64)
        self._no_mfn = np.uint64((1 << 8 * entry.itemsize) - 1)  # a remembered entry that named no frame
        self._remembered: _MFNs = np.empty((0, 0), entry)  # a row for each of p2m.distinct, in that order
        self._released_mfns: _MFNs = np.empty(0, entry)  # frames that some pfn has lost
        self._moved_places = np.empty(0, np.int64)  # places whose leaf is another since it was last read
        self._page_tables_stale = False
        self.live, self.p2m, self._leaf_pfns = self._inspect_once_stable()
        if track_changes:
            self._remembered = self._no_entries(len(self.p2m.distinct_leaves), self.p2m.entries_per_leaf)
        self.counts = self._count()

    # --- inspection --------------------------------------------------------------------------------------------------

    def inspect(self) -> None:
        """Find and walk the p2m again.

        Raises GuestError and RequestError as the constructor.
        """
        live, p2m, leaf_pfns = self._inspect_once_stable()
        if self.track_changes:
            self._realign(p2m)
        self.live, self.p2m, self._leaf_pfns = live, p2m, leaf_pfns

    def is_stale(self) -> bool:
        """Return whether anchors or tables differ from those of the last inspection."""
        return self.live.p2m_change() is not None

    def _inspect_once_stable(self) -> tuple[LiveDomain, P2M, U64]:
        """Inspect the p2m until the guest does not change it meanwhile."""
        tries = 0
        while True:
            tries += 1
            live = LiveDomain(self.host, self.host.info(self.domid))
            try:
                return live, *self._inspect_once(live)
            except GuestError as e:
                if tries == _UNSTABLE_TRIES or live.info.is_stopped:
                    raise
                if tries >= _INVALID_TRIES and not isinstance(e, _UnstableP2M) and live.read_anchors() == live.anchors:
                    raise
            time.sleep(_NAP)

    def _inspect_once(self, live: LiveDomain) -> tuple[P2M, U64]:
        anchors, name = live.anchors, live.name
        if anchors.p2m_cr3 and anchors.p2m_generation & 1:
            hint = (
                "the guest was stopped while it changed its p2m: resume it and save again"
                if live.info.is_stopped
                else "the guest never ends changing its p2m, and cannot be saved"
            )
            raise _UnstableP2M(f"{name}: p2m_generation {anchors.p2m_generation:#x} is odd: {hint}")
        if not anchors.max_pfn:
            raise GuestError(f"{name}: its p2m has no entries: arch.max_pfn is 0; wait until its kernel has started")
        p2m = self._without_uniform_end(live)
        receiver_needs_libxc_record = self.libxc_compatible or (self.sent_entries > 0 and not self._sends_runs)
        _check(live, p2m, libxc_compatible=receiver_needs_libxc_record)
        leaf_pfns = _leaf_pfns(live, p2m)
        if live.read_anchors() != anchors:
            raise _UnstableP2M(f"{name}: the p2m kept changing during the walk: try again, or pause the guest first")
        return p2m, leaf_pfns

    def _without_uniform_end(self, live: LiveDomain) -> P2M:
        p2m = live.p2m
        entries = max(p2m.used_entries, self.sent_entries)
        if entries > p2m.entries:
            problem = f"{live.name}: its p2m shrank to pfn {p2m.entries - 1:#x} after it was sent up to pfn"
            raise GuestError(
                f"{problem} {self.sent_entries - 1:#x}; a receiver cannot make it shorter: start again",
                pfn=p2m.entries - 1,
            )
        return replace(p2m, entries=entries, leaves=p2m.leaves.below(-(-entries // p2m.entries_per_leaf)))

    # --- entries -----------------------------------------------------------------------------------------------------

    def _count(self) -> P2MCounts:
        """Read all entries once. GuestError as ``iter_leaves``."""
        populated = foreign = identity = 0
        for leaves in self.iter_leaves():
            mfns, times = leaves.mfns, leaves.place_count
            populated += int(np.count_nonzero(names_local_frame(mfns)))
            marked = mfns != NO_FRAME
            is_foreign = marked & (mfns & FOREIGN != 0)
            is_identity = marked & ~is_foreign & (mfns & IDENTITY != 0)
            foreign += int(np.count_nonzero(is_foreign, axis=1) @ times)
            identity += int(np.count_nonzero(is_identity, axis=1) @ times)
        return P2MCounts(populated, foreign, identity)

    def iter_leaves(self, places: I64 | None = None) -> Iterator[Leaves]:
        """Yield leaves in batches, each leaf once: all, or those at ``places``.

        GuestError for one that cannot be read, or that names pages and is used in two places.
        """
        name, distinct = self.live.name, self.p2m.distinct_leaves

        def refuse(unreadable: FrameRuns) -> None:
            problem = f"{name}: p2m_frame_list[{int(unreadable.first[0])}], mfn {int(unreadable.frame[0]):#x},"
            raise GuestError(f"{problem} cannot be read", mfn=int(unreadable.frame[0]))

        for leaves in self.p2m.iter_leaves(places, on_unreadable=refuse):
            times = distinct.count[np.searchsorted(distinct.first, leaves.first_place)]
            own = np.count_nonzero(names_local_frame(leaves.mfns), axis=1)
            if (row := first_bad((own > 0) & (times > 1))) is not None:
                problem = f"{name}: p2m_frame_list[{int(leaves.first_place[row])}] names {own[row]} pages"
                times_used = int(times[row])
                raise GuestError(
                    f"{problem} and is used {times_used} times: a restore would overwrite one copy with the other",
                    pfn=int(leaves.first_place[row]) * self.p2m.entries_per_leaf,
                )
            yield leaves

    def iter_populated(self) -> Iterator[PfnMfns]:
        """Yield all pfns that have a frame, ascending, in batches."""
        for leaves in self.iter_leaves():
            own = names_local_frame(leaves.mfns)
            yield leaves.pfns[own], leaves.mfns[own]

    def lookup(self, pfns: U64) -> Iterator[PfnMfns]:
        """Yield those of ``pfns`` that have a frame, in batches."""
        for i in range(0, len(pfns), PFNS_PER_BATCH):
            batch = pfns[i : i + PFNS_PER_BATCH]
            mfns = self.p2m.lookup(batch)
            own = names_local_frame(mfns)
            yield batch[own], mfns[own]

    # --- changes -----------------------------------------------------------------------------------------------------

    def record_leaves(self, leaves: Leaves) -> PfnMfns:
        """Remember what leaves say now.

        Return the entries that have a frame, and had none or another before.
        """
        row = np.searchsorted(self.p2m.distinct_leaves.first, leaves.first_place)
        own = names_local_frame(leaves.mfns)
        now = np.where(own, leaves.mfns, self._no_mfn).astype(self._remembered.dtype)
        before = self._remembered[row]
        self._remembered[row] = now
        had_mfn = before != self._no_mfn
        new = own & (now != before)
        self.unmapped_pfns = np.union1d(self.unmapped_pfns, leaves.pfns[had_mfn & ~own])
        self._page_tables_stale |= bool(np.isin(now[new], self._released_mfns).any())
        self._release_mfns(before[had_mfn & (before != now)])
        return leaves.pfns[new], leaves.mfns[new]

    def changes(self, dirty: U64) -> P2MChanges:
        """Read the leaves that may have changed.

        They moved, or their page is among the ``dirty`` pfns.

        Each change is returned once.
        """
        remapped = [self.record_leaves(leaves)[0] for leaves in self.iter_leaves(self._places_to_read(dirty))]
        changes = P2MChanges(np.concatenate([dirty[:0], *remapped]), self._page_tables_stale)
        self._moved_places = self._moved_places[:0]
        self._page_tables_stale = False
        return changes

    def _places_to_read(self, dirty: U64) -> I64:
        order = np.argsort(self._leaf_pfns)
        at = np.minimum(np.searchsorted(self._leaf_pfns, dirty, sorter=order), len(order) - 1)
        rows = order[at[self._leaf_pfns[order[at]] == dirty]] if len(order) else order
        return np.union1d(self._moved_places, self.p2m.distinct_leaves.first[rows])

    def _realign(self, p2m: P2M) -> None:
        """Put the remembered entries into the order of another walk's leaves."""
        now, before = p2m.distinct_leaves.first, self.p2m.distinct_leaves.first
        if not np.array_equal(now, before):
            self._reorder(before, now)
        moved = p2m.leaves.frame_of(now) != self.p2m.leaves.frame_of(now)
        moved |= p2m.distinct_leaves.count > 1  # few are, and none of them may name pages
        moved |= now >= min(self.p2m.entries, p2m.entries) // p2m.entries_per_leaf  # beyond one of the two ends
        self._moved_places = np.intersect1d(np.union1d(self._moved_places, now[moved]), now, assume_unique=True)

    def _no_entries(self, leaves: int, per_leaf: int) -> _MFNs:
        return np.full((leaves, per_leaf), self._no_mfn, self._remembered.dtype)

    def _reorder(self, before: I64, now: I64) -> None:
        """Move rows from leaves at places ``before`` to leaves at places ``now``.

        That needs 1 GiB per TiB of the domain.
        """
        per_leaf = self._remembered.shape[1]
        table = self._no_entries(len(now), per_leaf)
        row = np.minimum(np.searchsorted(now, before), len(now) - 1)
        remains = now[row] == before
        table[row[remains]] = self._remembered[remains]
        dropped = self._remembered[~remains]
        leaf, entry = np.nonzero(dropped != self._no_mfn)
        dropped_pfns = (before[~remains][leaf] * per_leaf + entry).astype(np.uint64)
        self._release_mfns(dropped[dropped != self._no_mfn])
        self.unmapped_pfns = np.union1d(self.unmapped_pfns, dropped_pfns)
        self._remembered = table

    def _release_mfns(self, mfns: _MFNs) -> None:
        """Note that pfns lost these frames.

        If the domain still has one, or will again, it is another pfn's.
        """
        if not len(mfns):
            return
        self._released_mfns = np.union1d(self._released_mfns, mfns)
        if not self._page_tables_stale:
            wide = mfns.astype(np.uint64)
            self._page_tables_stale = bool((self.p2m.lookup(self.host.m2p(wide)) == wide).any())

    # --- leaves ------------------------------------------------------------------------------------------------------

    def next_record(self) -> X86PVP2MFrames | P2MLeaves | None:
        """Return a record of the leaves' pfns that the receiver lacks, or None.

        It goes from the first to the last of them.

        The receiver counts as having them then. The record may come any number of times; the last one that names a
        place counts. Without ``libxc_compatible`` it is the record that names leaves by runs, always of all leaves,
        unless the other is shorter.

        Source:
            xen.git:tools/libs/guest/xg_sr_restore_x86_pv.c handle_x86_pv_p2m_frames(), expand_p2m()
        """
        p2m, distinct = self.p2m, self.p2m.distinct_leaves
        order = np.argsort(distinct.frame)
        pfns = self._leaf_pfns[order][np.searchsorted(distinct.frame[order], p2m.leaves.frame)]
        leaves = FrameRuns(p2m.leaves.first, p2m.leaves.count, pfns)
        new = leaves.difference(self._sent_leaves)
        begin, end = (int(new.first[0]), int(new.first[-1] + new.count[-1])) if len(new) else (p2m.leaf_count, 0)
        if p2m.entries > self.sent_entries:
            begin, end = min(begin, p2m.leaf_count - 1), p2m.leaf_count
        if begin >= end:
            return None
        runs = None if self.libxc_compatible else _encode_runs(leaves)
        if runs is not None and not self.sent_entries:  # a stream has only one kind of record
            self._sends_runs = p2m.entries > PFNS_MAX or runs.nbytes < 8 * p2m.leaf_count
        self._sent_leaves, self.sent_entries = leaves, p2m.entries
        if runs is not None and self._sends_runs:
            return P2MLeaves(entries=p2m.entries, raw=runs.astype("<u8").reshape(-1).view(np.uint8).data)
        until_end = leaves.below(end)
        counts = np.minimum(until_end.count, np.maximum(until_end.first + until_end.count - begin, 0))
        raw = np.repeat(until_end.frame, counts).astype("<u8", copy=False)  # 64 MiB for a domain that reaches 16 TiB
        last = min(p2m.entries, end * p2m.entries_per_leaf) - 1
        return X86PVP2MFrames(start_pfn=begin * p2m.entries_per_leaf, end_pfn=last, raw=raw.view(np.uint8).data)


def _check(live: LiveDomain, p2m: P2M, *, libxc_compatible: bool) -> None:
    name = live.name
    if libxc_compatible and p2m.entries > PFNS_MAX:
        problem = (
            f"{name}: its p2m reaches pfn {p2m.entries - 1:#x}; a stream has pfns up to {PFNS_MAX - 1:#x} (16 TiB)"
        )
        hint = "xenpv save --xenpv-only writes a record that only xenpv restores, and that holds more"
        raise RequestError(f"{problem}: {hint}", needed=p2m.entries, available=PFNS_MAX)
    for table in p2m.unreadable:
        where = f"the table at mfn {table.frame:#x}, {table.level} above the leaves"
        raise GuestError(f"{name}: its p2m cannot be read: {where}", mfn=int(table.frame))
    holes = p2m.holes
    if len(holes):
        first, count = int(holes.first[0]), int(holes.count[0])
        problem = f"{name}: its p2m has no leaf for pfns {first * p2m.entries_per_leaf:#x} to "
        raise GuestError(
            problem + f"{(first + count) * p2m.entries_per_leaf - 1:#x}, but a stream must name a leaf for each",
            pfn=first * p2m.entries_per_leaf,
        )


def _leaf_pfns(live: LiveDomain, p2m: P2M) -> U64:
    """Return the pfn of each distinct leaf.

    GuestError for a leaf that is no page of the domain.
    """
    distinct = p2m.distinct_leaves
    pfns = live.pfns_of(distinct.frame)
    if (bad := first_bad(pfns == NO_FRAME)) is not None:
        raise bad_mfn(live, f"p2m_frame_list[{int(distinct.first[bad])}]", int(distinct.frame[bad]))
    return pfns


def _encode_runs(leaves: FrameRuns) -> U64:
    """Return the body of XENPV_P2M_LEAVES: uint64 (n, 3) of place, count, pfn."""
    begins, _ = group_rows(leaves.frame[1:] != leaves.frame[:-1], len(leaves))  # a walk ends runs with its tables
    count = np.add.reduceat(leaves.count, begins).astype(np.uint64)
    return np.column_stack([leaves.first[begins].astype(np.uint64), count, leaves.frame[begins]])
