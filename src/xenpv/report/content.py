"""Zero pages and duplicate pages: how much memory a domain could do without."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from xenpv.frames import HAS_DATA, IS_TABLE, PAGE_SIZE, U8, U64, Frames, Mask, nonzero_pages
from xenpv.memory.p2m_reader import frame_reader
from xenpv.report.pfn_ranges import NO_RANGES, PfnRanges, RangeCollector
from xenpv.runs import Extents, group_rows

_BATCH = 256  # pages: 1 MiB, which stays in the processor's cache
_TABLE = np.uint64(1 << 63)  # added to a pfn: the page is a page table
_GROUPS_SHOWN = 8  # the largest


@dataclass(frozen=True, slots=True)
class Group:
    """``pages`` pages of one content.

    ``first`` is the lowest pfn. ``table``: whether that page is a page table.
    """

    pages: int
    first: int
    table: bool


@dataclass(frozen=True)
class ContentStats:
    """Counts of zero and duplicate pages.

    Attributes:
        looked_at: Pages that were compared.
        left_out: Pages beyond the limit.
        unread: Pages that could not be read.
        zero: Pages of zeros.
        duplicate: Pages with the content of another page, zeros aside.
        contents: How many different contents these have.
        groups: The contents that most pages share.
        zero_at: The pfns of the pages of zeros.
        duplicate_at: The pfns of the duplicate pages.
    """

    looked_at: int
    left_out: int
    unread: int
    zero: int
    duplicate: int = 0
    contents: int = 0
    groups: list[Group] = field(default_factory=list)
    zero_at: PfnRanges = field(default=NO_RANGES, repr=False)
    duplicate_at: PfnRanges = field(default=NO_RANGES, repr=False)

    @property
    def saving(self) -> int:
        """Pages that could go if each content were kept once, and zeros never."""
        return self.zero + self.duplicate - self.contents


def analyse_content(
    memory: Frames,
    extents: Extents,
    limit: int,
    step: Callable[[int], None] | None = None,
    *,
    has_content: Callable[[U64], Mask] | None = None,
) -> ContentStats:
    """Find zero and duplicate pages, from the lowest pfn on.

    Takes 24 bytes of memory for each page.

    Pages are compared by a hash with random keys, so that no guest can make two of its pages look alike.

    Args:
        memory: The pages.
        extents: All pages of the domain.
        limit: How many pages to read, at most.
        step: Called with the number of pages done, after each batch.
        has_content: Returns which pages have content; None if all have.
    """
    keys, read = _Hash(), frame_reader(memory)
    zero_at, looked_at, unread = RangeCollector(), 0, 0
    hashed: list[tuple[U64, U64]] = []  # pfns with _TABLE, and hashes, of each batch
    with_data = extents[HAS_DATA[extents.type]]
    for batch, types in with_data.typed_batches(_BATCH, limit):
        marks = np.where(IS_TABLE[types], _TABLE, np.uint64(0))
        present = np.ones(len(batch), np.bool_) if has_content is None else has_content(batch)
        content, readable = read(batch[present])
        pfns, content = batch[present][readable], content[readable]
        not_zero = nonzero_pages(content)
        zero_at.add(PfnRanges.from_pfns(pfns[~not_zero]))
        hashed.append(((batch | marks)[present][readable][not_zero], keys(content[not_zero])))
        unread += len(batch) - len(pfns)
        looked_at += len(batch)
        if step is not None:
            step(looked_at)
    marked = np.concatenate([np.empty(0, np.uint64), *(part for part, _ in hashed)])
    hashes = np.concatenate([np.empty((0, 2), np.uint64), *(part for _, part in hashed)])
    zero_ranges = zero_at.all
    zero = int(zero_ranges.pages.sum())
    stats = ContentStats(looked_at, with_data.total - looked_at, unread, zero, zero_at=zero_ranges)
    return _add_duplicates(stats, marked, hashes)


def _add_duplicates(stats: ContentStats, marked: U64, hashes: U64) -> ContentStats:
    """Return the statistics with the duplicates among pages of these hashes."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: in a group the lowest pfn stays first
    hashes, marked = hashes[order], marked[order]
    first, size = group_rows((hashes[1:] != hashes[:-1]).any(axis=1), len(hashes))
    alike = np.repeat(size > 1, size)
    first, size = first[size > 1], size[size > 1]
    groups = [
        Group(int(size[row]), int(marked[first[row]] & ~_TABLE), bool(marked[first[row]] & _TABLE))
        for row in np.argsort(-size, kind="stable")[:_GROUPS_SHOWN].tolist()
    ]
    duplicate_at = PfnRanges.from_pfns(marked[alike] & ~_TABLE)
    return replace(stats, duplicate=int(size.sum()), contents=len(size), groups=groups, duplicate_at=duplicate_at)


class _Hash:
    """The hash NH with two random keys.

    Two pages that differ have the same hash with a probability of 2^-32 for each key.

    Source: Black, Halevi, Krawczyk, Krovetz, Rogaway: UMAC, 1999.
    """

    def __init__(self) -> None:
        keys = np.frombuffer(secrets.token_bytes(2 * PAGE_SIZE), np.uint32).reshape(2, -1)
        self._keys = [key.copy() for key in keys]

    def __call__(self, pages: U8) -> U64:
        """Return both hashes of each page, uint64 of shape (n, 2).

        ``pages`` has shape (n, 4096).
        """
        words, hashes = pages.view("<u4"), np.empty((len(pages), 2), np.uint64)
        for i, key in enumerate(self._keys):
            pairs = (words + key).view(np.uint64)
            hashes[:, i] = ((pairs >> np.uint64(32)) * (pairs & np.uint64(0xFFFF_FFFF))).sum(axis=1)
        return hashes
