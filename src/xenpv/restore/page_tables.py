"""Page tables of a domain that is being filled: mfns in the place of pfns, as soon as all that they name is there.

A table that comes while the sender's guest still runs is translated then, so that it costs no downtime; what is left,
for it named what had not come yet, waits for the highest pfn that it lacks, and at last for the end.
xen.git:tools/libs/guest/xg_sr_restore_x86_pv.c x86_pv_localise_page() gives a frame to whatever a table names when it
comes; here nothing gets one by itself that may still come with others, in an extent.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import LEVELS, PTE_P
from xenpv.frames import ENTRIES, IS_TABLE, PAGES_IN_CACHE, U8, U64, DomId, first_bad
from xenpv.host.protocol import DomainInfo, Toolstack
from xenpv.memory.pagetables import as_entries, bad_entry, frames, localise, superpages
from xenpv.memory.physmap import Physmap

Populate = Callable[[U64], None]
"""populate(pfns): frames for those that have none."""


class TablesIn:
    """The page tables of a domain that is being filled. All that comes is in ``physmap``: whether it is a table still,
    and whether mfns are in it.
    """

    def __init__(self, host: Toolstack, info: DomainInfo, physmap: Physmap) -> None:
        self.host = host
        self.domid: DomId = info.domid
        self.name = info.label
        self.width: Width = info.width
        self.physmap = physmap
        self._fresh: list[U64] = []
        self._waiting = np.empty(0, np.uint64)  # tables that name what has not come
        self._lacks = np.empty(0, np.uint64)  # the highest pfn that each of them lacks, ascending

    def came(self, pfns: U64, highest: int, coming: U64) -> None:
        """These pages lie in the domain's memory, and some are tables with pfns in them. Of pages up to ``highest``
        nearly all have come; ``coming`` are just being read anew, and will be told of later. HostError.
        """
        if len(pfns):
            self._fresh.append(pfns)
        if sum(map(len, self._fresh)) >= PAGES_IN_CACHE:
            fresh, self._fresh = np.concatenate(self._fresh), []
            self._try(fresh, highest, coming)
        ready = int(np.searchsorted(self._lacks, np.uint64(highest), side="right"))
        if ready >= PAGES_IN_CACHE:
            pfns, self._waiting, self._lacks = self._waiting[:ready], self._waiting[ready:], self._lacks[ready:]
            self._try(pfns, highest, coming)

    def _try(self, pfns: U64, highest: int, coming: U64) -> None:
        pfns = self._still(np.setdiff1d(pfns, coming))
        for i in range(0, len(pfns), PAGES_IN_CACHE):
            some = pfns[i : i + PAGES_IN_CACHE]
            levels = self.physmap.types(some) & np.uint8(7)
            with self.host.map_writable(self.domid, self.physmap.mfns(some)) as pages:
                ptes = as_entries(pages)
                local, lacking = localise(ptes, self.physmap.mfns)
                wrong = lacking.any(axis=1) | superpages(ptes, levels).any(axis=1) | (levels > LEVELS[self.width])
                ptes[~wrong] = local[~wrong]
                lacks = np.where(lacking[wrong], frames(ptes[wrong]), np.uint64(0)).max(axis=1, initial=0)
            self.physmap.put_local(some[~wrong])
            waits = lacks > np.uint64(highest)  # else it never comes, or is not to be had: that is the end's to say
            if waits.any():
                waiting = np.append(self._waiting, some[wrong][waits])
                lacks = np.append(self._lacks, lacks[waits])
                order = np.argsort(lacks, kind="stable")
                self._waiting, self._lacks = waiting[order], lacks[order]

    def _still(self, pfns: U64) -> U64:
        """Those that are tables with pfns in them: who waits may have come again."""
        tables = pfns[IS_TABLE[self.physmap.types(pfns)]]
        return tables[~self.physmap.is_local(tables)]

    def finish(self, end_pfn: int, populate: Populate) -> tuple[U64, U8]:
        """All has come: put mfns into the tables that are left; pfns that only entries name get a frame.

        All page tables that the domain has: their pfns, ascending, and types. Raises Fault for an entry that Xen would
        not take, and as ``populate``.
        """
        pfns, kinds = self.physmap.tables()
        left = ~self.physmap.is_local(pfns)
        todo, levels = pfns[left], kinds[left] & np.uint8(7)
        for i in range(0, len(todo), PAGES_IN_CACHE):
            some, level = todo[i : i + PAGES_IN_CACHE], levels[i : i + PAGES_IN_CACHE]
            if (row := first_bad(level > LEVELS[self.width])) is not None:
                why = "a table of that level in a 32-bit guest"
                raise bad_entry(self.name, why, int(some[row]), int(level[row]), None)
            with self.host.map_writable(self.domid, self.physmap.mfns(some)) as pages:
                ptes = as_entries(pages)
                self._check_entries(ptes, some, level, end_pfn)
                local, lacking = localise(ptes, self.physmap.mfns)
                if lacking.any():
                    populate(np.unique(frames(ptes[lacking])))
                    local, _ = localise(ptes, self.physmap.mfns)
                ptes[:] = local
        return pfns, kinds

    def _check_entries(self, ptes: U64, pfns: U64, levels: U8, end_pfn: int) -> None:
        large = superpages(ptes, levels)
        beyond = (ptes & np.uint64(PTE_P) != 0) & (frames(ptes) > np.uint64(end_pfn))
        if (bad := first_bad(large | beyond)) is not None:
            row, slot = divmod(bad, ENTRIES)
            named = int(frames(ptes[row, slot : slot + 1])[0])
            why = f"pfn {named:#x} is beyond the end of its p2m ({end_pfn:#x})"
            if large[row, slot]:
                why = f"superpage ({int(ptes[row, slot]):#x}), which PV has not"
            raise bad_entry(self.name, why, int(pfns[row]), int(levels[row]), slot)
