"""Which pages of a PV core are page tables: a core does not say, so they are those that are reached.

From each vcpu's top tables down, level by level, whole arrays at once. That finds the kernel's tables and those of the
processes that ran. All others hang from top tables of their own, and Xen gives each of these the same entries for
itself: in a 64-bit guest's, one that names the table (the linear page table); in a 32-bit guest's, those at the end of
the last L2. Only pages that the tables found so far map, and never writable, are looked at for it: Xen lets no page
table be mapped otherwise (xen.git:xen/arch/x86/mm.c get_page_type(), init_xen_l4_slots(), init_xen_pae_l2_slots()).

A domain that ran while it was dumped has pages of different moments: an entry may name a table that had ended, and been
given to somebody else, when its page was written. What is reached is therefore a table only if it looks like one, which
Xen has seen to of all that are (get_page_from_l1e() to get_page_from_l4e()), and if no table maps it writable.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import LEVELS, PAE_L3_ENTRIES, PTE_FRAME_MASK, PTE_P, PTE_PSE, PTE_RW, XEN_PAE_L2_FIRST
from xenpv.frames import NO_FRAME, PAGES_PER_BATCH, U8, U64, Frames, Mask
from xenpv.memory.pagetables import NO_PFN, Translate, allowed_flags, as_entries, frames, is_xen_slot
from xenpv.runs import Runs

LINEAR_PT_SLOT = 258  # of an L4: xen.git:xen/arch/x86/include/asm/config.h
_MFN_END = 1 << 35  # 128 TiB: Xen knows no memory beyond (xen/arch/x86/include/asm/config.h, with CONFIG_BIGMEM)
_NOT_IN_L3 = ~np.uint64(PTE_FRAME_MASK | allowed_flags(3, 4) & ~PTE_P)
_P, _RW, _PSE = np.uint64(PTE_P), np.uint64(PTE_RW), np.uint64(PTE_PSE)


class Tables(NamedTuple):
    """Page tables: their pfns, ascending, and the level of each. ``ended``: how many pages others name as tables that
    are none.
    """

    pfns: U64
    levels: U8
    ended: int = 0

    def level_of(self, pfns: U64) -> U8:
        """The level of each page, 0 for one that is none of these; of the same shape."""
        if not len(self.pfns):
            return np.zeros(pfns.shape, np.uint8)
        at = np.minimum(np.searchsorted(self.pfns, pfns), len(self.pfns) - 1)
        return np.where(self.pfns[at] == pfns, self.levels[at], np.uint8(0))

    def with_others(self, pfns: U64, level: int, ended: int) -> Tables:
        """These, and tables of that level, none of which is among them; and how many more have ended."""
        joined = np.concatenate([self.pfns, pfns])
        order = np.argsort(joined)
        levels = np.concatenate([self.levels, np.full(len(pfns), level, np.uint8)])
        return Tables(joined[order], levels[order], self.ended + ended)


@dataclass(frozen=True, slots=True)
class Search:
    """Looks for page tables. ``raw``: pages as they are in the core; ``pfn_of`` and ``mfn_of`` translate; ``runs``:
    the pfns that the core has.
    """

    raw: Frames
    width: Width
    pfn_of: Translate
    mfn_of: Translate
    runs: Runs

    def tables(self, tops: U64) -> Tables:
        """All page tables. ``tops``: pfns of the vcpus' top tables."""
        none = Tables(np.empty(0, np.uint64), np.empty(0, np.uint8))
        found = self._below(tops, none, None)
        mapped, writable = self._mapped(found.pfns[found.levels == 1])
        doubtful = writable.has(found.pfns)
        if doubtful.any():  # and so is what they say of others
            mapped, writable = self._mapped(found.pfns[~doubtful & (found.levels == 1)])
            found = self._below(tops, none, writable)
        candidates = mapped.pfns(but=writable)
        candidates = candidates[found.level_of(candidates) == 0]
        others = self._tops(candidates) if self.width == 8 else self._tops_32(candidates, found)
        return self._below(others, found, writable)

    def _below(self, tops: U64, known: Tables, never: _Marks | None) -> Tables:
        """All tables that are reached from some top tables, and those that are known; ``never``: what is none."""
        found, now = known, tops
        for level in range(LEVELS[self.width], 0, -1):
            now = np.unique(now)
            named = now[found.level_of(now) == 0]
            now = named if never is None else named[~never.has(named)]
            now = np.concatenate([now[:0], *(some[self._fit(some, level)] for some in _some(now))])
            found = found.with_others(now, level, len(named) - len(now))
            if level == 1:
                break
            below = [self._named(tables, level) for tables in _some(now)]
            now = np.unique(np.concatenate([np.empty(0, np.uint64), *below]))
        return found

    def _fit(self, pfns: U64, level: int) -> Mask:
        """Which of some pages can be tables of that level.

        Half of what they name must be the domain's. Not all: an L1 may map shared info, grants and devices, and a page
        may have come while the core was written, which the core's list then has not.
        """
        entries = as_entries(self.raw.pages(pfns))
        own_slots = ~is_xen_slot(level, self.width, last_pae_l2=True)
        there = (entries & _P != 0) & own_slots
        named = frames(entries)
        good = there.copy()
        good[there] = self.pfn_of(named[there]) != NO_FRAME
        if level > 1:
            good &= entries & ~np.uint64(PTE_FRAME_MASK | allowed_flags(level, self.width)) == 0
        fit = good.sum(axis=1) >= (there & ~good).sum(axis=1)
        fit &= ~(there & (named >= _MFN_END) & (named != NO_PFN)).any(axis=1)
        if level == 4:
            fit &= _is_l4(entries, self.mfn_of(pfns))
        if level == 3 and self.width == 4:
            fit &= (entries[:, PAE_L3_ENTRIES:] == 0).all(axis=1)
        return np.asarray(fit)

    def _named(self, tables: U64, level: int) -> U64:
        """The pfns of the tables that tables of that level name, each once."""
        entries = as_entries(self.raw.pages(tables))
        wanted = (entries & (_P | _PSE) == _P) & ~is_xen_slot(level, self.width)
        return self._pfns(frames(entries[wanted]))

    def _pfns(self, mfns: U64) -> U64:
        """Those of the mfns that are pages of the core, as pfns, each once."""
        pfns = self.pfn_of(np.unique(mfns))
        return np.unique(pfns[pfns != NO_FRAME])

    def _tops(self, candidates: U64) -> U64:
        """Which of some pages are top tables of a 64-bit guest, by Xen's entry in each."""
        found = (some[_is_l4(as_entries(self.raw.pages(some)), self.mfn_of(some))] for some in _some(candidates))
        return np.concatenate([candidates[:0], *found])

    def _tops_32(self, candidates: U64, known: Tables) -> U64:
        """Which of some pages are top tables of a 32-bit guest.

        Xen clears all behind their four entries, and demands a last one, whose L2 ends with Xen's own entries, the same
        for all (promote_l3_table()).
        """
        found, own = [np.empty(0, np.uint64)], None
        for some in (*_some(known.pfns[known.levels == 3]), *_some(candidates)):
            entries = as_entries(self.raw.pages(some))
            last = entries[:, PAE_L3_ENTRIES - 1]
            fits = (entries[:, PAE_L3_ENTRIES:] == 0).all(axis=1) & (last & _NOT_IN_L3 == _P)
            l2s = self.pfn_of(frames(last))
            at = np.flatnonzero(fits & (l2s != NO_FRAME))
            ends = as_entries(self.raw.pages(l2s[at]))[:, XEN_PAE_L2_FIRST:]
            if own is None:
                own = ends[:1]
            found.append(some[at[(ends == own).all(axis=1)]] if len(own) else some[:0])
        return np.concatenate(found)

    def _mapped(self, l1s: U64) -> tuple[_Marks, _Marks]:
        """The pages that tables of level 1 map, and those that they map writable."""
        mapped, writable = _Marks(self.runs), _Marks(self.runs)
        for tables in _some(l1s):
            entries = as_entries(self.raw.pages(tables))
            mapped.put(self._pfns(frames(entries[entries & _P != 0])))
            writable.put(self._pfns(frames(entries[entries & (_P | _RW) == _P | _RW])))
        return mapped, writable


class _Marks:
    """A mark for each page of the core: a byte, and none for pfns that it has not."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._marked = np.zeros(runs.total, np.bool_)

    def put(self, pfns: U64) -> None:
        """Mark pages of the core."""
        self._marked[self._runs.positions(pfns)] = True

    def has(self, pfns: U64) -> Mask:
        """Which pages of the core are marked."""
        return np.asarray(self._marked[self._runs.positions(pfns)])

    def pfns(self, *, but: _Marks) -> U64:
        """The pages that are marked here, and not there: ascending."""
        return self._runs.pfns_at(np.flatnonzero(self._marked & ~but._marked))


def _is_l4(entries: U64, mfns: U64) -> Mask:
    """Which pages are an L4, by Xen's entry that names the page itself."""
    slot = entries[:, LINEAR_PT_SLOT]
    return np.asarray((slot & _P != 0) & (frames(slot) == mfns))


def _some(pfns: U64) -> Iterator[U64]:
    for i in range(0, len(pfns), PAGES_PER_BATCH):
        yield pfns[i : i + PAGES_PER_BATCH]
