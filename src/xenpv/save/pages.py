"""Sends pages as PAGE_DATA records.

Types are looked up and page tables normalised; other content is sent as it is mapped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from xenpv.abi.x86 import LEVELS, XEN_PAE_L2_FIRST
from xenpv.errors import Fault, HostError
from xenpv.frames import (
    HAS_DATA,
    I64,
    IS_KNOWN,
    IS_TABLE,
    PAGE_SHIFT,
    PAGES_IN_CACHE,
    PAGES_PER_BATCH,
    U8,
    U64,
    Mask,
    PageType,
    first_bad,
)
from xenpv.memory.page_tables import as_ptes, bad_entry_fault, find_superpages, is_xen_slot, normalise, pte_frames
from xenpv.save.p2m_tracker import P2MTracker
from xenpv.save.stream_output import StreamOutput
from xenpv.stream.fields import Buffer
from xenpv.stream.page_data import TYPE_SHIFT

ENTRIES_MAX = 1 << 16  # entries of a record; a restorer bounds them by the record's length alone
_WINDOW = 2 * PAGES_PER_BATCH  # pages mapped at once: takes a tenth less time than a record at a time


@dataclass
class SentPages:
    """What was sent so far, in all iterations.

    Attributes:
        pages: Pages with content.
        page_tables: Those among them that are page tables.
        not_owned: Entries that claim a frame which is not the domain's.
        without_content: Entries with a frame of which Xen gives no content.
        deferred: Pfns that could not be sent as they were while the guest changed them.
        page_table_pfns: Pfns sent as page tables while the guest ran; some repeat, some are none any more.
    """

    pages: int = 0
    page_tables: int = 0
    not_owned: int = 0
    without_content: int = 0
    deferred: list[U64] = field(default_factory=list)
    page_table_pfns: list[U64] = field(default_factory=list)

    def take_deferred(self) -> U64:
        """Return the deferred pfns and forget them."""
        pfns, self.deferred = self.deferred, []
        return _union(pfns)

    def all_page_tables(self) -> U64:
        """Return the pfns of all page tables that were sent, each once."""
        self.page_table_pfns = [_union(self.page_table_pfns)]
        return self.page_table_pfns[0]

    def count(self, types: U8) -> None:
        """Count pages by their types."""
        pages, not_owned = int(np.count_nonzero(HAS_DATA[types])), int(np.count_nonzero(types == PageType.XTAB))
        self.pages += pages
        self.page_tables += int(np.count_nonzero(IS_TABLE[types]))
        self.not_owned += not_owned
        self.without_content += len(types) - pages - not_owned


class PageSender:
    """Sends pages once, in records of limited size.

    A record has at most PAGES_PER_BATCH pages with content, and ENTRIES_MAX entries.

    Args:
        p2m: The p2m that the pages are found by.
        output: The stream.
        sent: Counts what is sent.
        guest_runs: The guest may be changing a page, so one that cannot be sent as it is, is deferred. Otherwise it
            is refused.
    """

    def __init__(self, p2m: P2MTracker, output: StreamOutput, sent: SentPages, *, guest_runs: bool) -> None:
        self._p2m = p2m
        self._live = p2m.live
        self._output = output
        self._sent = sent
        self._guest_runs = guest_runs
        self._pfns = self._mfns = np.empty(0, np.uint64)  # not yet sent
        self._types = np.empty(0, np.uint8)

    def add(self, pfns: U64, mfns: U64) -> None:
        """Send pages, keeping back the last ones, which fill no window.

        While the guest runs, what cannot be sent as it is gets deferred: a page whose frame it gave up since its p2m
        was read, one that cannot be mapped, and a page table with an entry that names no frame of the domain.

        Args:
            pfns: uint64 (n,).
            mfns: The frame of each, uint64 (n,).

        Raises:
            HostError: A page is of no known type; or the guest has stopped, and a page cannot be mapped.
            Fault: The guest has stopped, and a page table's entry names no frame of the domain, or a superpage.
        """
        pfns, mfns, types = self._select_owned(pfns, mfns)
        pfns, mfns = np.append(self._pfns, pfns), np.append(self._mfns, mfns)
        types = np.append(self._types, types)
        first = 0
        for end in _part_ends(HAS_DATA[types], _WINDOW):
            self._send_window(pfns[first:end], mfns[first:end], types[first:end])
            first = end
        self._pfns, self._mfns, self._types = pfns[first:], mfns[first:], types[first:]

    def flush(self) -> None:
        """Send what was kept back, and wait until all is written. Raises as ``add``."""
        pfns, mfns, types = self._pfns, self._mfns, self._types
        self._pfns, self._mfns, self._types = pfns[:0], mfns[:0], types[:0]
        if len(pfns):
            self._send_window(pfns, mfns, types)
        self._output.wait()

    def _select_owned(self, pfns: U64, mfns: U64) -> tuple[U64, U64, U8]:
        """Return pfns, mfns and types of the domain's own pages; defer the others.

        Only a running domain can have given up pages since its p2m was read.
        """
        types = self._live.host.page_types(self._live.info.domid, mfns)
        if (at := first_bad(~IS_KNOWN[types])) is not None:
            problem = f"Unknown type {int(types[at]):#x} for pfn {int(pfns[at]):#x} (mfn {int(mfns[at]):#x})"
            raise HostError(f"{self._live.name}: {problem}", op="getpageframeinfo3", domid=self._live.info.domid)
        if not self._guest_runs:
            return pfns, mfns, types
        owned = types != PageType.XTAB
        self._defer(pfns[~owned])
        return pfns[owned], mfns[owned], types[owned]

    def _defer(self, pfns: U64) -> None:
        if len(pfns):
            self._sent.deferred.append(pfns)

    def _send_window(self, pfns: U64, mfns: U64, types: U8) -> None:
        """Send pages as PAGE_DATA records, without those that cannot be read.

        While the guest runs, those are put off until it is suspended; of a suspended guest, they raise. Tables that are
        sent early are noted, because they may name frames that get another pfn, and are then sent again.
        """
        has_data, is_table = HAS_DATA[types], IS_TABLE[types]
        is_plain = has_data & ~is_table
        # Tables first: to normalise them reads the p2m, and the mapping of the others must outlive that.
        tables, normalised = self._normalised_tables(pfns[is_table], mfns[is_table], types[is_table])
        if self._guest_runs and is_table.any():
            self._sent.page_table_pfns.append(pfns[is_table])
        content, mapped = self._map(pfns[is_plain], mfns[is_plain])
        if not (normalised.all() and mapped.all()):
            sendable = np.ones(len(pfns), np.bool_)
            sendable[is_table], sendable[is_plain] = normalised, mapped
            self._defer(pfns[~sendable])
            tables, content = tables[normalised], content[mapped]
            pfns, types, has_data, is_table = pfns[sendable], types[sendable], has_data[sendable], is_table[sendable]
        self._sent.count(types)
        first = 0
        for end in dict.fromkeys([*_part_ends(has_data, PAGES_PER_BATCH), len(pfns)]):
            part = slice(first, end)
            table_pages = is_table[part][has_data[part]]
            n_tables = int(np.count_nonzero(table_pages))
            n_plain = len(table_pages) - n_tables
            if end > first:
                buffers = _interleave(table_pages, tables[:n_tables], content[:n_plain])
                self._output.send_pages(_encode_entries(types[part], pfns[part]), buffers, len(table_pages))
            tables, content, first = tables[n_tables:], content[n_plain:], end

    def _map(self, pfns: U64, mfns: U64) -> tuple[U8, Mask]:
        if not len(mfns):
            return np.empty((0, 1 << PAGE_SHIFT), np.uint8), np.empty(0, np.bool_)
        pages, mapped = self._live.read_p2m_frames(mfns)
        if not self._guest_runs and (at := first_bad(~mapped)) is not None:
            problem = f"pfn {int(pfns[at]):#x} (mfn {int(mfns[at]):#x}) cannot be mapped"
            raise HostError(f"{self._live.name}: {problem}", op="map_frames", domid=self._live.info.domid)
        return pages, mapped

    # --- page tables -------------------------------------------------------------------------------------------------

    def _normalised_tables(self, pfns: U64, mfns: U64, types: U8) -> tuple[U8, Mask]:
        """Return page tables with pfns for mfns, and whether each could be normalised.

        All can if the guest is stopped.
        """
        live = self._live
        mapping, normalised = self._map(pfns, mfns)
        pages, width = mapping.copy(), live.info.width
        for level, rows in _batches_by_level(types & np.uint8(7)):
            if level > LEVELS[width]:
                raise self._bad_entry(f"an L{level} table in a 32-bit guest", int(pfns[rows[0]]), level, None)
            ptes, bad = normalise(as_ptes(pages[rows]), live.pfns_of, is_xen_slot(level, width))
            if width == 4 and level == 2:
                # Xen's own entries are in one L2 of the guest's: that whose first of them is no frame of the guest.
                xens = bad[:, XEN_PAE_L2_FIRST, None] & is_xen_slot(2, 4, last_pae_l2=True)
                ptes[xens], bad[xens] = 0, False
            large = find_superpages(ptes, level)
            if not self._guest_runs and (at := first_bad(large | bad)) is not None:
                row, slot = divmod(at, ptes.shape[1])
                pte, pfn = as_ptes(pages[rows[row] : rows[row] + 1])[0, slot], int(pfns[rows[row]])
                if large[row, slot]:
                    raise self._bad_entry(f"superpage ({int(pte):#x})", pfn, level, slot)
                mfn = int(pte_frames(np.array([pte]))[0])
                raise self._bad_entry(f"mfn {mfn:#x} is no frame of the domain", pfn, level, slot)
            normalised[rows] &= ~(large | bad).any(axis=1)
            pages[rows] = ptes.view(np.uint8).reshape(len(rows), -1)
        return pages, normalised

    def _bad_entry(self, why: str, pfn: int, level: int, slot: int | None) -> Fault:
        foreign = self._p2m.counts.foreign
        hint = f"; its p2m maps {foreign} pages of other domains" if foreign else ""
        return bad_entry_fault(self._live.name, why + hint, pfn, level, slot)


def send_unmapped(pfns: U64, output: StreamOutput) -> None:
    """Send pages that were sent before and have no frame any more, as XTAB."""
    for i in range(0, len(pfns), ENTRIES_MAX):
        batch = pfns[i : i + ENTRIES_MAX]
        output.send_pages(_encode_entries(np.full(len(batch), PageType.XTAB, np.uint8), batch), [], 0)
    output.wait()


def _batches_by_level(levels: U8) -> Iterator[tuple[int, I64]]:
    """Yield each level with the rows of that level, in batches that stay in the cache."""
    for level in np.unique(levels).tolist():
        rows = np.flatnonzero(levels == level)
        for i in range(0, len(rows), PAGES_IN_CACHE):
            yield level, rows[i : i + PAGES_IN_CACHE]


def _union(pfns: list[U64]) -> U64:
    return np.unique(np.concatenate(pfns)) if pfns else np.empty(0, np.uint64)


def _encode_entries(types: U8, pfns: U64) -> bytes:
    return (types.astype(np.uint64) << np.uint64(TYPE_SHIFT) | pfns).astype("<u8", copy=False).tobytes()


def _part_ends(has_data: Mask, pages: int) -> list[int]:
    """Return the ends of parts of ``pages`` pages with content each.

    A part also ends at ENTRIES_MAX entries. The rest fills none.
    """
    full = np.flatnonzero(has_data)[pages - 1 :: pages] + 1
    ends: list[int] = np.union1d(full, np.arange(ENTRIES_MAX, len(has_data) + 1, ENTRIES_MAX)).tolist()
    return ends


def _interleave(is_table: Mask, tables: U8, content: U8) -> list[Buffer]:
    """Return pages of two arrays in the order of ``is_table``, in few buffers."""
    buffers: list[Buffer] = []
    used = {True: 0, False: 0}
    for run in np.split(is_table, np.flatnonzero(np.diff(is_table)) + 1):
        if len(run):
            kind = bool(run[0])
            pages, first = tables if kind else content, used[kind]
            used[kind] += len(run)
            buffers.append(pages[first : first + len(run)].reshape(-1).data)
    return buffers
