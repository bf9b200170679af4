"""The p2m of a domain that is saved: looked at before a byte is written, sent, followed while the guest changes it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from xenpv.errors import GuestError, RequestError
from xenpv.frames import FOREIGN, I64, IDENTITY, NO_FRAME, PFNS_PER_BATCH, U64, DomId, first_bad
from xenpv.host.protocol import Mover
from xenpv.memory.p2m import P2M, Leaves, names_local_frame
from xenpv.runs import FrameRuns
from xenpv.save.state_records import bad_mfn
from xenpv.source.live import LiveDomain
from xenpv.stream.records import P2MLeaves, X86PVP2MFrames

PFNS_MAX = 1 << 32  # X86_PV_P2M_FRAMES counts them in 32 bits

_TRIES, _NAP = 50, 0.002  # looks at a p2m that is being changed, and seconds between them
_TRIES_OTHERWISE = 3  # at one that is wrong in another way: a tree is changed without a word

U32or64 = npt.NDArray[np.uint32] | npt.NDArray[np.uint64]
Named = tuple[U64, U64]
"""Pfns, and the mfn that the p2m has for each."""


class _Unsettled(GuestError):
    """The guest is just changing its p2m."""


class SavedP2M:
    """A domain's p2m up to where its leaves are all one to the end: nothing is there, or they would be in two places.

    ``look`` at it before anything else. ``named``: what it names, all of it. With ``follows``, ``changes``: what it
    names that it did not when its leaves were read last, ``gone`` has the pfns that have lost their frame since, and
    ``frames_moved`` says that a frame has another pfn, which all page tables that name it are to say, too. What is
    remembered for that is 4 bytes for each entry of a leaf, one in 1024 of the domain's memory; 8 on a host of 16 TiB
    and more, whose mfns need them.
    """

    live: LiveDomain
    p2m: P2M

    def __init__(self, host: Mover, domid: DomId, *, follows: bool = False, stock: bool = True) -> None:
        """``stock``: that any restorer is to understand it, not only ours."""
        self.host = host
        self.domid = domid
        self.follows = follows
        self.stock = stock
        self.foreign = self.identity = self.total = 0
        self.gone = np.empty(0, np.uint64)
        self.frames_moved = False
        self.told = 0  # entries that a receiver knows of: it cannot know of fewer again
        self._as_runs = False
        self._told = FrameRuns.from_frames(np.empty(0, np.uint64))  # the pfn of each leaf that it knows
        wide = np.dtype(np.uint32 if host.max_mfn() < 0xFFFF_FFFF else np.uint64)
        self._nothing = np.uint64((1 << 8 * wide.itemsize) - 1)  # in what is remembered of an entry: it named no frame
        self._remembered: U32or64 = np.empty((0, 0), wide)  # of the leaves of p2m.distinct, in their order
        self._left: U32or64 = np.empty(0, wide)  # frames that some pfn has lost
        self._moved = np.empty(0, np.int64)  # places whose leaf is another since it was last read

    # --- looking -----------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Find the p2m and walk it. GuestError or RequestError for one that cannot be saved, in words.

        That of a running guest is looked at again for a while when it is just being changed.
        """
        for tried in range(1, _TRIES + 1):
            live = LiveDomain(self.host, self.host.info(self.domid))
            try:
                self._take(live)
            except GuestError as e:
                if tried == _TRIES or live.info.is_stopped:
                    raise
                if tried >= _TRIES_OTHERWISE and not isinstance(e, _Unsettled) and live.read_anchors() == live.anchors:
                    raise
                time.sleep(_NAP)
            else:
                break

    def changed(self) -> bool:
        """Whether its anchors or its tables are others than when they were last looked at."""
        return self.live.changed() is not None

    def _take(self, live: LiveDomain) -> None:
        anchors, name = live.anchors, live.name
        if anchors.p2m_cr3 and anchors.p2m_generation & 1:
            why = (
                "it was stopped while it changed its p2m"
                if live.info.is_stopped
                else "it is changing its p2m, and does not end"
            )
            raise _Unsettled(f"{name}: p2m_generation {anchors.p2m_generation:#x} is odd: {why}")
        if not anchors.max_pfn:
            raise GuestError(f"{name}: its p2m has no entries: arch.max_pfn is 0")
        p2m = self._up_to_its_end(live)
        _check(live, p2m, stock=self.stock or (self.told > 0 and not self._as_runs))
        leaf_pfns = _leaf_pfns(live, p2m)
        if live.read_anchors() != anchors:
            raise _Unsettled(f"{name}: its p2m was changed while it was walked, and does not settle")
        if self.follows:
            self._remember_for(p2m)
        self.live, self.p2m, self._leaf_pfns = live, p2m, leaf_pfns

    def _up_to_its_end(self, live: LiveDomain) -> P2M:
        whole = live.p2m
        entries = max(whole.used, self.told)
        if entries > whole.entries:
            what = f"{live.name}: its p2m ends at pfn {whole.entries - 1:#x} now, and went to {self.told - 1:#x} when"
            raise GuestError(f"{what} it was sent, which what restores it cannot take back: begin anew")
        return replace(whole, entries=entries, leaves=whole.leaves.below(-(-entries // whole.per_leaf)))

    # --- what it names -----------------------------------------------------------------------------------------------

    def count(self) -> None:
        """One pass over it: how much it names, and that no leaf which names a page stands in two places."""
        self.foreign = self.identity = self.total = 0
        for leaves in self._read(None):
            mfns, times = leaves.mfns, leaves.times
            self.total += int(np.count_nonzero(names_local_frame(mfns)))
            marked = mfns != NO_FRAME
            foreign = marked & (mfns & FOREIGN != 0)
            identity = marked & ~foreign & (mfns & IDENTITY != 0)
            self.foreign += int(np.count_nonzero(foreign, axis=1) @ times)
            self.identity += int(np.count_nonzero(identity, axis=1) @ times)

    def named(self) -> Iterator[Named]:
        """All that it names, ascending, some leaves at a time."""
        for leaves in self._read(None):
            own = names_local_frame(leaves.mfns)
            yield leaves.pfns[own], leaves.mfns[own]

    def changes(self, dirty: U64 | None = None) -> Iterator[Named]:
        """What it names and did not, or with another frame, when its leaves were last read: all of them without
        ``dirty``; else those that moved, and those whose page is among these pfns.
        """
        places = None if dirty is None else self._to_be_read(dirty)
        first = self.p2m.distinct.first
        for leaves in self._read(places):
            row = np.searchsorted(first, leaves.first)
            own = names_local_frame(leaves.mfns)
            now = np.where(own, leaves.mfns, self._nothing).astype(self._left.dtype)
            then = self._remembered[row]
            self._remembered[row] = now
            new = own & (now != then)
            self.gone = np.union1d(self.gone, leaves.pfns[(then != self._nothing) & ~own])
            self.frames_moved |= bool(np.isin(now[new], self._left).any())
            self._leave(then[(then != self._nothing) & (then != now)])
            yield leaves.pfns[new], leaves.mfns[new]
        self._moved = self._moved[:0]

    def lookup(self, pfns: U64) -> Iterator[Named]:
        """Those of some pfns that have a frame, and it."""
        for i in range(0, len(pfns), PFNS_PER_BATCH):
            some = pfns[i : i + PFNS_PER_BATCH]
            mfns = self.p2m.lookup(some)
            own = names_local_frame(mfns)
            yield some[own], mfns[own]

    def _read(self, places: I64 | None) -> Iterator[Leaves]:
        """Leaves read once each; refuses one that cannot be, or that holds pages and stands in two places."""
        name, distinct = self.live.name, self.p2m.distinct

        def lost(leaves: FrameRuns) -> None:
            what = f"{name}: p2m_frame_list[{int(leaves.first[0])}], mfn {int(leaves.frame[0]):#x},"
            raise GuestError(f"{what} cannot be read")

        for leaves in self.p2m.content(places, lost=lost):
            times = distinct.count[np.searchsorted(distinct.first, leaves.first)]
            own = np.count_nonzero(names_local_frame(leaves.mfns), axis=1)
            if (at := first_bad((own > 0) & (times > 1))) is not None:
                what = f"{name}: p2m_frame_list[{int(leaves.first[at])}] holds {own[at]} pages, and stands in"
                raise GuestError(f"{what} {int(times[at])} places: after a restore one would overwrite the other")
            yield leaves

    # --- what is remembered of it ------------------------------------------------------------------------------------

    def _remember_for(self, p2m: P2M) -> None:
        """Put what is remembered in the order of another walk's leaves."""
        now = p2m.distinct.first
        if not len(self._remembered):
            self._remembered = self._table(len(now), p2m.per_leaf)
            return
        before = self.p2m.distinct.first
        if not np.array_equal(now, before):
            self._rearrange(before, now)
        moved = p2m.leaves.frame_of(now) != self.p2m.leaves.frame_of(now)
        moved |= p2m.distinct.count > 1  # few do, and what holds pages may not
        moved |= now >= min(self.p2m.entries, p2m.entries) // p2m.per_leaf  # what was, or is, beyond its end
        self._moved = np.intersect1d(np.union1d(self._moved, now[moved]), now, assume_unique=True)

    def _table(self, leaves: int, per_leaf: int) -> U32or64:
        return np.full((leaves, per_leaf), self._nothing, self._left.dtype)

    def _rearrange(self, before: I64, now: I64) -> None:
        """From leaves at these first places to leaves at those. A GiB for each TiB of the domain: not for nothing."""
        per_leaf = self._remembered.shape[1]
        table = self._table(len(now), per_leaf)
        row = np.minimum(np.searchsorted(now, before), len(now) - 1)
        kept = now[row] == before
        table[row[kept]] = self._remembered[kept]
        dropped = self._remembered[~kept]  # what leaves named that are no more
        self._leave(dropped[dropped != self._nothing])
        place, at = np.nonzero(dropped != self._nothing)
        self.gone = np.union1d(self.gone, (before[~kept][place] * per_leaf + at).astype(np.uint64))
        self._remembered = table

    def _leave(self, frames: U32or64) -> None:
        """Some pfns have lost these frames. Where the domain has one still, or will again, it is another pfn's."""
        if not len(frames):
            return
        self._left = np.union1d(self._left, frames)
        if not self.frames_moved:
            mfns = frames.astype(np.uint64)
            self.frames_moved = bool((self.p2m.lookup(self.host.m2p(mfns)) == mfns).any())

    def _to_be_read(self, dirty: U64) -> I64:
        order = np.argsort(self._leaf_pfns)
        at = np.minimum(np.searchsorted(self._leaf_pfns, dirty, sorter=order), len(order) - 1)
        rows = order[at[self._leaf_pfns[order[at]] == dirty]] if len(order) else order
        return np.union1d(self._moved, self.p2m.distinct.first[rows])

    # --- where its leaves are ----------------------------------------------------------------------------------------

    def record(self) -> X86PVP2MFrames | P2MLeaves | None:
        """The pfns of its leaves from the first to the last that is news to a receiver; None when nothing is.

        It may come any number of times: what names a place last counts (xen.git:tools/libs/guest/xg_sr_restore_x86_pv.c
        handle_x86_pv_p2m_frames(), expand_p2m()). Where stock restorers need not understand it, it is the record that
        names leaves by runs, always whole, unless the other is shorter.
        """
        p2m, distinct = self.p2m, self.p2m.distinct
        order = np.argsort(distinct.frame)
        pfns = self._leaf_pfns[order][np.searchsorted(distinct.frame[order], p2m.leaves.frame)]
        leaves = FrameRuns(p2m.leaves.first, p2m.leaves.count, pfns)
        news = leaves.difference(self._told)
        begin, end = (int(news.first[0]), int(news.first[-1] + news.count[-1])) if len(news) else (p2m.places, 0)
        if p2m.entries > self.told:
            begin, end = min(begin, p2m.places - 1), p2m.places
        if begin >= end:
            return None
        runs = None if self.stock else _runs(leaves)
        if runs is not None and not self.told:  # a stream has the one or the other
            self._as_runs = p2m.entries > PFNS_MAX or runs.nbytes < 8 * p2m.places
        self._told, self.told = leaves, p2m.entries
        if runs is not None and self._as_runs:
            return P2MLeaves(entries=p2m.entries, raw=runs.astype("<u8").reshape(-1).view(np.uint8).data)
        some = leaves.below(end)
        counts = np.minimum(some.count, np.maximum(some.first + some.count - begin, 0))
        raw = np.repeat(some.frame, counts).astype("<u8", copy=False)  # 64 MiB of a domain that reaches 16 TiB
        last = min(p2m.entries, end * p2m.per_leaf) - 1
        return X86PVP2MFrames(start_pfn=begin * p2m.per_leaf, end_pfn=last, raw=raw.view(np.uint8).data)


def _check(live: LiveDomain, p2m: P2M, *, stock: bool) -> None:
    name = live.name
    if stock and p2m.entries > PFNS_MAX:
        what = f"{name}: its p2m reaches pfn {p2m.entries - 1:#x}; a stream has pfns up to {PFNS_MAX - 1:#x} (16 TiB)"
        way = "a record of xenpv's own holds more, for xenpv to restore and nobody else (xenpv save --xenpv-only)"
        raise RequestError(f"{what}: {way}", needed=p2m.entries, available=PFNS_MAX)
    for table in p2m.unreadable:
        where = f"the table at mfn {table.frame:#x}, {table.level} above the leaves"
        raise GuestError(f"{name}: its p2m cannot be read: {where}")
    holes = p2m.holes
    if len(holes):
        first, count = int(holes.first[0]), int(holes.count[0])
        what = f"{name}: its p2m has no leaf for pfns {first * p2m.per_leaf:#x} to "
        raise GuestError(what + f"{(first + count) * p2m.per_leaf - 1:#x}, and a stream has to name one")


def _leaf_pfns(live: LiveDomain, p2m: P2M) -> U64:
    """The pfn of each distinct leaf. GuestError for one that is no page of the domain."""
    distinct = p2m.distinct
    pfns = live.pfns_of(distinct.frame)
    if (bad := first_bad(pfns == NO_FRAME)) is not None:
        raise bad_mfn(live, f"p2m_frame_list[{int(distinct.first[bad])}]", int(distinct.frame[bad]))
    return pfns


def _runs(leaves: FrameRuns) -> U64:
    """As XENPV_P2M_LEAVES has them."""
    begins = np.flatnonzero(np.append(True, leaves.frame[1:] != leaves.frame[:-1]))  # a walk ends runs with its tables
    count = np.add.reduceat(leaves.count, begins).astype(np.uint64)
    return np.column_stack([leaves.first[begins].astype(np.uint64), count, leaves.frame[begins]])
