"""Pages of a domain as PAGE_DATA has them: types asked for, page tables normalised, content as it is mapped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

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
    U8,
    U64,
    Mask,
    PageType,
    first_bad,
)
from xenpv.memory.pagetables import as_entries, bad_entry, frames, is_xen_slot, normalise, superpages
from xenpv.save.p2m_tracker import Named, SavedP2M
from xenpv.stream.fields import Buffer
from xenpv.stream.pagedata import TYPE_SHIFT

BATCH = 1024  # pages with content in a record: MAX_BATCH_SIZE of libxenguest
_WINDOW = 2 * BATCH  # that are mapped at once: a tenth less time than a record at a time
ENTRIES_MAX = 1 << 16  # entries of a record; a restorer bounds them by the record's length alone


class Batch(NamedTuple):
    """What goes into one PAGE_DATA: entries, and the content of ``pages`` of them."""

    entries: bytes
    contents: list[Buffer]
    pages: int


@dataclass
class SavedPages:
    """Makes batches of pages, and counts them (see save.Summary for what is counted).

    ``running``: the guest runs on meanwhile. A page that cannot be sent as it is then, because it is being changed, is
    ``deferred`` to when the guest stands still; without, it is refused. ``tables_sent``: pfns of page tables that went
    out while it ran, some of them more than once, or of pages that are none any more.
    """

    p2m: SavedP2M
    running: bool = False
    pages: int = 0
    tables: int = 0
    lost: int = 0
    empty: int = 0
    deferred: list[U64] = field(default_factory=list)
    tables_sent: list[U64] = field(default_factory=list)

    def batches(self, named: Iterable[Named]) -> Iterator[Batch]:
        """Some pages, in their order: BATCH pages with content at a time, or ENTRIES_MAX without any.

        Content of pages that are no tables is the host's own mapping. Raises HostError
        for a page that cannot be mapped or is of no known type, Fault for an entry of a page table that names no frame
        of the domain.
        """
        pfns = mfns = np.empty(0, np.uint64)
        kinds = np.empty(0, np.uint8)
        for some in named:
            new = self._typed(*some)
            pfns, mfns, kinds = np.append(pfns, new[0]), np.append(mfns, new[1]), np.append(kinds, new[2])
            begin = 0
            for end in _ends(HAS_DATA[kinds], _WINDOW):
                yield from self._window(pfns[begin:end], mfns[begin:end], kinds[begin:end])
                begin = end
            pfns, mfns, kinds = pfns[begin:], mfns[begin:], kinds[begin:]
        if len(pfns):
            yield from self._window(pfns, mfns, kinds)

    def without_frames(self, pfns: U64) -> Iterator[Batch]:
        """Pages that were sent, and have no frame any more."""
        for i in range(0, len(pfns), ENTRIES_MAX):
            some = pfns[i : i + ENTRIES_MAX]
            yield Batch(_entries(np.full(len(some), PageType.XTAB, np.uint8), some), [], 0)

    def take_deferred(self) -> U64:
        """The pfns that were deferred, and defer none of them any longer."""
        pfns, self.deferred = self.deferred, []
        return _distinct(pfns)

    def all_tables(self) -> U64:
        """The pfns of all page tables that were sent."""
        self.tables_sent = [_distinct(self.tables_sent)]
        return self.tables_sent[0]

    def _defer(self, pfns: U64) -> None:
        if len(pfns):
            self.deferred.append(pfns)

    def _typed(self, pfns: U64, mfns: U64) -> tuple[U64, U64, U8]:
        """With the type of each, those that have left a running domain since its p2m was read left out."""
        live = self.p2m.live
        kinds = live.host.page_types(live.info.domid, mfns)
        if (at := first_bad(~IS_KNOWN[kinds])) is not None:
            what = f"Unknown type {int(kinds[at]):#x} for pfn {int(pfns[at]):#x} (mfn {int(mfns[at]):#x})"
            raise HostError(f"{live.name}: {what}", op="getpageframeinfo3", domid=live.info.domid)
        if not self.running:
            return pfns, mfns, kinds
        still = kinds != PageType.XTAB
        self._defer(pfns[~still])
        return pfns[still], mfns[still], kinds[still]

    def _window(self, pfns: U64, mfns: U64, kinds: U8) -> Iterator[Batch]:
        there, table = HAS_DATA[kinds], IS_TABLE[kinds]
        plain = there & ~table
        # Tables first: to translate them reads the p2m, and the mapping of the others must outlive that.
        tables, sound = self._tables(pfns[table], mfns[table], kinds[table])
        if self.running and table.any():
            self.tables_sent.append(pfns[table])
        content, mapped = self._mapped(pfns[plain], mfns[plain])
        if not (sound.all() and mapped.all()):
            good = np.ones(len(pfns), np.bool_)
            good[table], good[plain] = sound, mapped
            self._defer(pfns[~good])
            tables, content = tables[sound], content[mapped]
            pfns, kinds, there, table = pfns[good], kinds[good], there[good], table[good]
        self._count(kinds)
        begin = 0
        for end in dict.fromkeys([*_ends(there, BATCH), len(pfns)]):
            some = slice(begin, end)
            inside = table[some][there[some]]
            mine = int(np.count_nonzero(inside))
            of_tables, of_others = tables[:mine], content[: len(inside) - mine]
            yield Batch(_entries(kinds[some], pfns[some]), _interleaved(inside, of_tables, of_others), len(inside))
            tables, content, begin = tables[mine:], content[len(inside) - mine :], end

    def _count(self, kinds: U8) -> None:
        sent, lost = int(np.count_nonzero(HAS_DATA[kinds])), int(np.count_nonzero(kinds == PageType.XTAB))
        self.pages += sent
        self.tables += int(np.count_nonzero(IS_TABLE[kinds]))
        self.lost += lost
        self.empty += len(kinds) - sent - lost

    def _mapped(self, pfns: U64, mfns: U64) -> tuple[U8, Mask]:
        live = self.p2m.live
        if not len(mfns):
            return np.empty((0, 1 << PAGE_SHIFT), np.uint8), np.empty(0, np.bool_)
        pages, mapped = live.read_p2m_frames(mfns)
        for at in np.flatnonzero(~mapped)[: 0 if self.running else 1].tolist():
            what = f"pfn {int(pfns[at]):#x} (mfn {int(mfns[at]):#x}) cannot be mapped"
            raise HostError(f"{live.name}: {what}", op="map_frames", domid=live.info.domid)
        return pages, mapped

    # --- page tables -------------------------------------------------------------------------------------------------

    def _tables(self, pfns: U64, mfns: U64, kinds: U8) -> tuple[U8, Mask]:
        """Page tables with pfns for mfns, and which of them could be made so, all unless the guest runs.

        Fault for an entry that names no frame of the domain, or a superpage.
        """
        live = self.p2m.live
        mapping, sound = self._mapped(pfns, mfns)
        pages, width = mapping.copy(), live.info.width
        for level, rows in _some_of_each(kinds & np.uint8(7)):
            if level > LEVELS[width]:
                raise self._bad_entry(f"an L{level} table in a 32-bit guest", int(pfns[rows[0]]), level, None)
            ptes, bad = normalise(as_entries(pages[rows]), live.pfns_of, is_xen_slot(level, width))
            if width == 4 and level == 2:
                # Xen's own entries are in one L2 of the guest's: that whose first of them is no frame of the guest.
                xens = bad[:, XEN_PAE_L2_FIRST, None] & is_xen_slot(2, 4, last_pae_l2=True)
                ptes[xens], bad[xens] = 0, False
            large = superpages(ptes, level)
            for row, slot in np.argwhere(large | bad)[: 0 if self.running else 1].tolist():
                pte, pfn = as_entries(pages[rows[row] : rows[row] + 1])[0, slot], int(pfns[rows[row]])
                if large[row, slot]:
                    raise self._bad_entry(f"superpage ({int(pte):#x})", pfn, level, slot)
                mfn = int(frames(np.array([pte]))[0])
                raise self._bad_entry(f"mfn {mfn:#x} is no frame of the domain", pfn, level, slot)
            sound[rows] &= ~(large | bad).any(axis=1)
            pages[rows] = ptes.view(np.uint8).reshape(len(rows), -1)
        return pages, sound

    def _bad_entry(self, why: str, pfn: int, level: int, slot: int | None) -> Fault:
        count = self.p2m.foreign
        others = f"; its p2m has {count} of other domains' pages mapped" if count else ""
        return bad_entry(self.p2m.live.name, why + others, pfn, level, slot)


def _some_of_each(levels: U8) -> Iterator[tuple[int, I64]]:
    """Each level with the rows that are of it, so many at a time that what is computed on them stays in the cache."""
    for level in np.unique(levels).tolist():
        rows = np.flatnonzero(levels == level)
        for i in range(0, len(rows), PAGES_IN_CACHE):
            yield level, rows[i : i + PAGES_IN_CACHE]


def _distinct(pfns: list[U64]) -> U64:
    return np.unique(np.concatenate(pfns)) if pfns else np.empty(0, np.uint64)


def _entries(kinds: U8, pfns: U64) -> bytes:
    return (kinds.astype(np.uint64) << np.uint64(TYPE_SHIFT) | pfns).astype("<u8", copy=False).tobytes()


def _ends(there: Mask, pages: int) -> list[int]:
    """Where parts of these entries end that have so many pages with content, or ENTRIES_MAX; the rest fills none."""
    full = np.flatnonzero(there)[pages - 1 :: pages] + 1
    ends: list[int] = np.union1d(full, np.arange(ENTRIES_MAX, len(there) + 1, ENTRIES_MAX)).tolist()
    return ends


def _interleaved(is_table: Mask, tables: U8, content: U8) -> list[Buffer]:
    """Pages of two arrays in the order that ``is_table`` says, in as few buffers as it takes."""
    out: list[Buffer] = []
    taken = {True: 0, False: 0}
    for run in np.split(is_table, np.flatnonzero(np.diff(is_table)) + 1):
        if len(run):
            mine, of = bool(run[0]), tables if run[0] else content
            first, taken[mine] = taken[mine], taken[mine] + len(run)
            out.append(of[first : first + len(run)].reshape(-1).data)
    return out
