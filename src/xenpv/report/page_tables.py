"""Statistics of page tables: tables by level, flags of entries, mapped pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from xenpv.abi.x86 import PTE_A, PTE_D, PTE_NX, PTE_P, PTE_PSE, PTE_RW, PTE_US
from xenpv.frames import IS_POPULATED, IS_TABLE, PAGES_PER_BATCH, PINNED, U64, Frames, Mask
from xenpv.memory.p2m_reader import frame_reader
from xenpv.memory.page_tables import NO_PFN, PTE_GLOBAL, as_ptes, pte_frames
from xenpv.runs import Extents, Runs

FLAGS = {"RW": PTE_RW, "US": PTE_US, "A": PTE_A, "D": PTE_D, "G": PTE_GLOBAL, "PSE": PTE_PSE, "NX": PTE_NX}
TABLES_MAX = 1 << 22  # tables to read: 16 GiB of them map 8 TiB
PAGES_MAX = 1 << 28  # pages to count mappings of: a byte each


@dataclass
class LevelStats:
    """The tables of one level.

    Attributes:
        level: 1 to 4.
        tables: How many there are.
        pinned: How many of them are pinned; None if that is not known.
        unread: How many have no content.
        empty: How many have no present entry.
        entries: Present entries.
        other: Present entries whose frame is not the domain's, but another's or Xen's.
        flags: How many present entries have each flag.
    """

    level: int
    tables: int = 0
    pinned: int | None = 0
    unread: int = 0
    empty: int = 0
    entries: int = 0
    other: int = 0
    flags: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FLAGS, 0))


@dataclass
class PageTableStats:
    """Statistics of all page tables.

    Counts of mapped pages are None if the domain is too large.

    Attributes:
        levels: The levels that have tables, the highest first.
        populated: Pages of the domain.
        mapped: Pages that an L1 entry maps.
        writable: Pages that an L1 entry maps writable.
        several: Pages that more than one L1 entry maps.
        loose: L1 entries that are both writable and executable.
        left_out: Tables beyond TABLES_MAX, which were not read.
    """

    levels: list[LevelStats]
    populated: int
    mapped: int | None = None
    writable: int | None = None
    several: int | None = None
    loose: int = 0
    left_out: int = 0


def count_page_tables(
    memory: Frames, extents: Extents, step: Callable[[int, int], None] | None = None, *, pins: bool = True
) -> PageTableStats:
    """Read every page table once, and count.

    Args:
        memory: The pages.
        extents: All pages of the domain.
        step: Called with the tables done and their number in all, after each batch.
        pins: Whether page types tell which tables are pinned.
    """
    is_table = IS_TABLE[extents.type]
    levels = {n: LevelStats(n, pinned=0 if pins else None) for n in range(1, 5)}
    for kind, pages in zip(extents.type[is_table].tolist(), extents.pages[is_table].tolist(), strict=True):
        level = levels[kind & 7]
        level.tables += pages
        if level.pinned is not None:
            level.pinned += pages if kind & PINNED else 0
    populated = IS_POPULATED[extents.type]
    total = extents[is_table].total
    stats = PageTableStats([levels[n] for n in (4, 3, 2, 1)], extents[populated].total)
    stats.left_out = max(0, total - TABLES_MAX)
    mapping = _MappedPages(extents[populated]) if stats.populated <= PAGES_MAX else None
    read, tables_read = frame_reader(memory), 0
    for number, tables in _batches(extents[is_table]):
        pages, readable = read(tables)
        _count_entries(levels[number], as_ptes(pages[readable]), stats, mapping)
        levels[number].unread += int(np.count_nonzero(~readable))
        tables_read += len(tables)
        if step is not None:
            step(tables_read, min(total, TABLES_MAX))
    if mapping is not None:
        stats.mapped = int(np.count_nonzero(mapping.flags))
        stats.several = int(np.count_nonzero(mapping.flags & 2))
        stats.writable = int(np.count_nonzero(mapping.flags & 4))
    stats.levels = [level for level in stats.levels if level.tables]
    return stats


def _batches(tables: Extents) -> Iterator[tuple[int, U64]]:
    """Yield a level and pfns of tables of that level, in batches, TABLES_MAX in all."""
    room = TABLES_MAX
    for n in range(4, 0, -1):
        for pfns in tables[tables.type & np.uint8(7) == n].batches(PAGES_PER_BATCH, room):
            yield n, pfns
            room -= len(pfns)


def _count_entries(level: LevelStats, entries: U64, stats: PageTableStats, mapping: _MappedPages | None) -> None:
    present = (entries & np.uint64(PTE_P)) != 0
    level.empty += int(np.count_nonzero(~present.any(axis=1)))
    ptes = entries[present]
    level.entries += len(ptes)
    for name, bit in FLAGS.items():
        level.flags[name] += int(np.count_nonzero(ptes & np.uint64(bit)))
    named = pte_frames(ptes)
    level.other += int(np.count_nonzero(named == np.uint64(NO_PFN)))
    if level.level == 1:
        writable = (ptes & np.uint64(PTE_RW)) != 0
        stats.loose += int(np.count_nonzero(writable & ((ptes & np.uint64(PTE_NX)) == 0)))
        if mapping is not None:
            mapping.add(named, writable)


class _MappedPages:
    """How page tables map each page of a domain.

    ``flags`` has a byte for each page: bit 0 mapped, bit 1 more than once, bit 2 writable.
    """

    def __init__(self, pages: Runs) -> None:
        self._pages = pages
        self.flags = np.zeros(pages.total, np.uint8)

    def add(self, pfns: U64, writable: Mask) -> None:
        position = self._pages.positions(pfns)
        present = position >= 0
        position = position[present]
        self.flags[position[writable[present]]] |= 4
        once, count = np.unique(position, return_counts=True)
        self.flags[once[(count > 1) | (self.flags[once] & 1 != 0)]] |= 2
        self.flags[once] |= 1
