"""Localises page tables during a restore: puts mfns in the place of pfns.

A table is localised as soon as all pages that it names have been received. During a migration the sender's guest still
runs then, so this costs no downtime. A table that names a missing pfn waits for it, at most until the stream ends.
x86_pv_localise_page() populates whatever a table names at once; here pfns wait, to be populated as whole extents.

Source: xen.git:tools/libs/guest/xg_sr_restore_x86_pv.c
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import LEVELS
from xenpv.frames import ENTRIES, IS_TABLE, PAGES_IN_CACHE, U8, U64, DomId, first_bad
from xenpv.host.protocol import DomainInfo, Toolstack
from xenpv.memory.page_tables import as_ptes, bad_entry_fault, entries_beyond, find_superpages, localise, pte_frames
from xenpv.memory.physmap import Physmap

Populate = Callable[[U64], None]
"""populate(pfns): give a frame to each pfn that has none."""


class PageTableLocaliser:
    """Localises the page tables of one domain as their pages are received.

    Args:
        host: The host of the domain.
        info: The domain, which has its final width.
        physmap: Frames and types of all received pages, and which tables are localised already.
    """

    def __init__(self, host: Toolstack, info: DomainInfo, physmap: Physmap) -> None:
        self.host = host
        self.domid: DomId = info.domid
        self.name = info.label
        self.width: Width = info.width
        self.physmap = physmap
        self._received: list[U64] = []  # pfns of tables, none of which was tried yet
        self._waiting = np.empty(0, np.uint64)  # pfns of tables that name a missing pfn
        self._highest_missing_pfn = np.empty(0, np.uint64)  # of each table in _waiting; ascending

    def add_received(self, pfns: U64, highest_pfn: int, in_transit: U64) -> None:
        """Add tables whose content is complete, and localise batches that are ready.

        Args:
            pfns: Tables that hold pfns.
            highest_pfn: The highest pfn received so far. Savers send pages mostly in ascending order.
            in_transit: Tables that are being read again. They are added later.

        Raises:
            HostError: The host refuses to map a table.
        """
        if len(pfns):
            self._received.append(pfns)
        if sum(map(len, self._received)) >= PAGES_IN_CACHE:
            received, self._received = np.concatenate(self._received), []
            self._localise(received, highest_pfn, in_transit)
        ready = int(np.searchsorted(self._highest_missing_pfn, np.uint64(highest_pfn), side="right"))
        if ready >= PAGES_IN_CACHE:
            pfns, self._waiting = self._waiting[:ready], self._waiting[ready:]
            self._highest_missing_pfn = self._highest_missing_pfn[ready:]
            self._localise(pfns, highest_pfn, in_transit)

    def _localise(self, pfns: U64, highest_pfn: int, in_transit: U64) -> None:
        """Localise the tables that can be; the others wait, or are left to finish()."""
        pfns = self._not_yet_localised(np.setdiff1d(pfns, in_transit))
        for i in range(0, len(pfns), PAGES_IN_CACHE):
            batch = pfns[i : i + PAGES_IN_CACHE]
            levels = self.physmap.types(batch) & np.uint8(7)
            with self.host.map_writable(self.domid, self.physmap.lookup(batch)) as pages:
                ptes = as_ptes(pages)
                local, missing = localise(ptes, self.physmap.lookup)
                skip = missing.any(axis=1) | find_superpages(ptes, levels).any(axis=1) | (levels > LEVELS[self.width])
                ptes[~skip] = local[~skip]
                highest_missing = np.where(missing[skip], pte_frames(ptes[skip]), np.uint64(0)).max(axis=1, initial=0)
            self.physmap.mark_localised(batch[~skip])
            # A missing pfn below highest_pfn may never be received: finish() populates or refuses it.
            waits = highest_missing > np.uint64(highest_pfn)
            if waits.any():
                waiting = np.append(self._waiting, batch[skip][waits])
                highest_missing = np.append(self._highest_missing_pfn, highest_missing[waits])
                order = np.argsort(highest_missing, kind="stable")
                self._waiting, self._highest_missing_pfn = waiting[order], highest_missing[order]

    def check_range(self, ptes: U64, pfns: U64, levels: U8, end_pfn: int) -> None:
        """Refuse tables with an entry beyond the p2m's end: Fault names the first.

        A restorer does so each time that a table is sent, be it only to be sent again.
        """
        if (bad := first_bad(entries_beyond(ptes, end_pfn))) is not None:
            row, slot = divmod(bad, ENTRIES)
            target = int(pte_frames(ptes[row, slot : slot + 1])[0])
            reason = f"pfn {target:#x} is beyond the end of its p2m ({end_pfn:#x})"
            raise bad_entry_fault(self.name, reason, int(pfns[row]), int(levels[row]), slot)

    def check_before_resend(self, pfns: U64, end_pfn: int) -> None:
        """Check those page tables that will be overwritten and still hold pfns.

        Fault as check_range().
        """
        pfns = self._not_yet_localised(pfns)
        for i in range(0, len(pfns), PAGES_IN_CACHE):
            batch = np.unique(pfns[i : i + PAGES_IN_CACHE])
            with self.host.map_writable(self.domid, self.physmap.lookup(batch)) as pages:
                self.check_range(as_ptes(pages), batch, self.physmap.types(batch) & np.uint8(7), end_pfn)

    def _not_yet_localised(self, pfns: U64) -> U64:
        """Return the pfns that are tables and hold pfns.

        A waiting page may have been received again.
        """
        tables = pfns[IS_TABLE[self.physmap.types(pfns)]]
        return tables[~self.physmap.is_localised(tables)]

    def finish(self, end_pfn: int, populate: Populate) -> tuple[U64, U8]:
        """Localise all remaining tables; populate pfns that only their entries name.

        Args:
            end_pfn: The last pfn of the domain's p2m.
            populate: Gives frames to pfns.

        Returns:
            The pfns of all page tables, ascending, and their types.

        Raises:
            Fault: Xen would refuse an entry. The error names the table's pfn, the level and the entry.
        """
        pfns, types = self.physmap.page_tables()
        remaining = ~self.physmap.is_localised(pfns)
        tables, table_levels = pfns[remaining], types[remaining] & np.uint8(7)
        for i in range(0, len(tables), PAGES_IN_CACHE):
            batch, levels = tables[i : i + PAGES_IN_CACHE], table_levels[i : i + PAGES_IN_CACHE]
            with self.host.map_writable(self.domid, self.physmap.lookup(batch)) as pages:
                ptes = as_ptes(pages)
                self._check_tables(ptes, batch, levels, end_pfn)
                local, missing = localise(ptes, self.physmap.lookup)
                if missing.any():
                    populate(np.unique(pte_frames(ptes[missing])))
                    local, _ = localise(ptes, self.physmap.lookup)
                ptes[:] = local
        return pfns, types

    def _check_tables(self, ptes: U64, pfns: U64, levels: U8, end_pfn: int) -> None:
        """Refuse tables with an entry that Xen does not accept; Fault names the first."""
        if (row := first_bad(levels > LEVELS[self.width])) is not None:
            reason = "a table of that level in a 32-bit guest"
            raise bad_entry_fault(self.name, reason, int(pfns[row]), int(levels[row]), None)
        large = find_superpages(ptes, levels)
        beyond = entries_beyond(ptes, end_pfn)
        if (bad := first_bad(large | beyond)) is not None:
            row, slot = divmod(bad, ENTRIES)
            pfn = int(pte_frames(ptes[row, slot : slot + 1])[0])
            reason = f"pfn {pfn:#x} is beyond the end of its p2m ({end_pfn:#x})"
            if large[row, slot]:
                reason = f"superpage ({int(ptes[row, slot]):#x}); superpages are not valid in PV guests"
            raise bad_entry_fault(self.name, reason, int(pfns[row]), int(levels[row]), slot)
