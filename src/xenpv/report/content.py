"""Pages that hold nothing, and pages that hold the same: what a domain's memory could do without."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from xenpv.frames import HAS_DATA, IS_TABLE, PAGE_SIZE, U8, U64, Frames, Mask, filled
from xenpv.memory.p2m import frame_reader
from xenpv.report.parts import NOTHING, Collector, Parts
from xenpv.runs import Extents

_AT_ONCE = 256  # pages: 1 MiB, which stays in the processor's cache
_TABLE = np.uint64(1 << 63)  # beside a pfn: the page is a page table
_GROUPS = 8  # of the largest that are told one by one


@dataclass(frozen=True, slots=True)
class Group:
    """``pages`` pages of one content; ``first``: the lowest pfn of them, ``table``: whether that is a page table."""

    pages: int
    first: int
    table: bool


@dataclass(frozen=True)
class Content:
    """Of ``looked_at`` pages (``left_out`` were not, ``unread`` could not be read): ``zero`` hold nothing,
    ``duplicate`` hold something that others hold too, in ``contents`` different ones. One page of each would do.
    """

    looked_at: int
    left_out: int
    unread: int
    zero: int
    duplicate: int = 0
    contents: int = 0
    groups: list[Group] = field(default_factory=list)
    zero_at: Parts = field(default=NOTHING, repr=False)
    duplicate_at: Parts = field(default=NOTHING, repr=False)

    @property
    def saving(self) -> int:
        """Pages that could go, if those that hold the same were one, and those that hold nothing none."""
        return self.zero + self.duplicate - self.contents


def content_of(
    memory: Frames,
    extents: Extents,
    limit: int,
    step: Callable[[int], None] | None = None,
    *,
    kept: Callable[[U64], Mask] | None = None,
) -> Content:
    """Read pages, ``limit`` of them at most, from the lowest pfn on; 24 bytes of memory each. ``step``: (pages done).
    ``kept``: which pages can be read, where that is known.

    Pages are told apart by a hash under keys of this moment, so that no guest can have two of its pages taken for one.
    """
    keys, read = _Hash(), frame_reader(memory)
    zero_at, looked_at, unread = Collector(), 0, 0
    seen: list[tuple[U64, U64]] = []  # pfns, bit 63: a table; and hashes
    with_data = extents[HAS_DATA[extents.type]]
    for every, types in with_data.typed_batches(_AT_ONCE, limit):
        marks = np.where(IS_TABLE[types], _TABLE, np.uint64(0))
        there = np.ones(len(every), np.bool_) if kept is None else kept(every)
        content, readable = read(every[there])
        pfns, content = every[there][readable], content[readable]
        held = filled(content)
        zero_at.add(Parts.of_pfns(pfns[~held]))
        seen.append(((every | marks)[there][readable][held], keys(content[held])))
        unread += len(every) - len(pfns)
        looked_at += len(every)
        if step is not None:
            step(looked_at)
    marked = np.concatenate([np.empty(0, np.uint64), *(some for some, _ in seen)])
    hashes = np.concatenate([np.empty((0, 2), np.uint64), *(some for _, some in seen)])
    found = zero_at.all
    zero = int(found.pages.sum())
    return _alike(marked, hashes, Content(looked_at, with_data.total - looked_at, unread, zero, zero_at=found))


def _alike(marked: U64, hashes: U64, so_far: Content) -> Content:
    """With what is alike among pages of these hashes."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: in a group the lowest pfn stays first
    hashes, marked = hashes[order], marked[order]
    first = np.flatnonzero(np.append(True, (hashes[1:] != hashes[:-1]).any(axis=1))[: len(hashes)])
    size = np.diff(np.append(first, len(hashes)))
    alike = np.repeat(size > 1, size)
    first, size = first[size > 1], size[size > 1]
    groups = [
        Group(int(size[row]), int(marked[first[row]] & ~_TABLE), bool(marked[first[row]] & _TABLE))
        for row in np.argsort(-size, kind="stable")[:_GROUPS].tolist()
    ]
    where = Parts.of_pfns(marked[alike] & ~_TABLE)
    return replace(so_far, duplicate=int(size.sum()), contents=len(size), groups=groups, duplicate_at=where)


class _Hash:
    """NH of two keys (Black, Halevi, Krawczyk, Krovetz, Rogaway: UMAC, 1999): two pages that differ have one hash with
    a probability of 2^-32 for each key, whatever is in them.
    """

    def __init__(self) -> None:
        keys = np.frombuffer(secrets.token_bytes(2 * PAGE_SIZE), np.uint32).reshape(2, -1)
        self._keys = [key.copy() for key in keys]

    def __call__(self, pages: U8) -> U64:
        """Both hashes of each page, uint8 (n, 4096): uint64 (n, 2)."""
        words, out = pages.view("<u4"), np.empty((len(pages), 2), np.uint64)
        for i, key in enumerate(self._keys):
            pairs = (words + key).view(np.uint64)
            out[:, i] = ((pairs >> np.uint64(32)) * (pairs & np.uint64(0xFFFF_FFFF))).sum(axis=1)
        return out
