"""Trees of frames, walked and built: a p2m tree of any depth, or the page tables over a linear list.

Cost follows distinct tables, not what they span: a table that stands in a thousand places is read once, a run of
entries that name one frame stays one row all the way down, and a run of one shared table without content of its own
is never unrolled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from xenpv.errors import GuestError
from xenpv.frames import I64, NO_FRAME, PAGES_PER_BATCH, U8, U64, Mask
from xenpv.runs import FrameRuns, expand_runs

ROWS_MAX = 1 << 24  # runs of leaves: twice what 16 TiB of pages in no order take
SHARED_MAX = 1 << 20  # of them by way of tables that stand in several places: such tables map nothing, or are wrong
UNREADABLE_MAX = 1 << 16  # tables: more than a p2m of 16 TiB has

ReadFrames = Callable[[U64], tuple[U8, Mask]]
"""read(frames): their content, uint8 (n, 4096), and for each whether it could be read."""

StorePages = Callable[[U8], U64]
"""put(pages): keep pages, uint8 (n, 4096), somewhere; the frame of each."""


class UnreadableTable(NamedTuple):
    """A table that could not be read: its frame, its level above the leaves, and the first of its places."""

    frame: int
    level: int
    place: int


def walk_tree(
    read: ReadFrames, root: int, levels: int, places: range, frames_of: Callable[[U8, int], U64]
) -> tuple[FrameRuns, list[UnreadableTable]]:
    """The leaves behind ``places`` of a tree whose top table is ``root``, ``levels`` tables above the leaves.

    ``frames_of(pages, level)`` turns pages of tables, uint8 (n, 4096), into the frames that their entries name, uint64
    (n, entries), NO_FRAME for none; level 1 is the one above the leaves. Raises GuestError when there are more than
    ROWS_MAX runs, more than SHARED_MAX by sharing tables, or more than UNREADABLE_MAX tables that cannot be read.
    """
    nodes = FrameRuns(np.zeros(1, np.int64), np.ones(1, np.int64), np.array([root], np.uint64))
    unreadable: list[UnreadableTable] = []
    for level in range(levels, 0, -1):
        by_frame = np.argsort(nodes.frame, kind="stable")
        distinct, start = np.unique(nodes.frame[by_frame], return_index=True)
        bounds = np.append(start, len(nodes))
        parts, rows = [FrameRuns.empty()], 0
        for i in range(0, len(distinct), PAGES_PER_BATCH):
            tables = distinct[i : i + PAGES_PER_BATCH]
            of_them = slice(bounds[i], bounds[i + len(tables)])
            some = nodes[by_frame[of_them]]
            which = np.repeat(np.arange(len(tables)), np.diff(bounds[i : i + len(tables) + 1]))
            pages, readable = read(tables)
            entries = np.where(readable[:, None], frames_of(pages, level), NO_FRAME)
            lost = np.flatnonzero(~readable)
            if len(unreadable) + len(lost) > UNREADABLE_MAX:
                raise GuestError(f"more than {UNREADABLE_MAX} tables below frame {root:#x} cannot be read")
            first = some.first[bounds[i : i + len(tables)] - bounds[i]]
            unreadable += [UnreadableTable(int(tables[at]), level, int(first[at])) for at in lost]
            shift = (entries.shape[1].bit_length() - 1) * (level - 1)
            parts.append(_below(some, entries, which, range(places.start >> shift, (places.stop - 1 >> shift) + 1)))
            rows += len(parts[-1])
            if rows > ROWS_MAX:
                raise GuestError(f"the tables below frame {root:#x} name more than {ROWS_MAX} runs of frames")
        nodes = FrameRuns.in_order(parts)
    unreadable.sort(key=lambda table: (-table.level, table.place))
    return nodes, unreadable


def _below(nodes: FrameRuns, entries: U64, which: I64, places: range) -> FrameRuns:
    """What the tables at some nodes name, as runs within ``places`` of the next level.

    ``which`` of the tables each node is, ascending. Of each table its own runs are found once; they are unrolled for
    the places in which it stands.
    """
    size = entries.shape[1]
    starts = np.ones(entries.shape, np.bool_)
    starts[:, 1:] = entries[:, 1:] != entries[:, :-1]
    table, at = np.nonzero(starts)
    end = np.append(np.where(table[1:] == table[:-1], at[1:], size), size)
    runs = np.count_nonzero(starts, axis=1)
    uniform = runs[which] == 1
    times = np.where(uniform, 1, nodes.count)  # a run of tables that differ inside is unrolled, one of uniform ones not
    shared = int((times * runs[which]).sum() - runs.sum())
    if shared > SHARED_MAX:
        stands = np.bincount(which, times)
        worst = int(nodes.frame[np.searchsorted(which, np.argmax(stands))])
        what = f"tables that are shared name more than {SHARED_MAX} runs of frames"
        raise GuestError(f"{what}: frame {worst:#x}, a table, stands in {int(stands.max())} places")
    node = np.repeat(np.arange(len(nodes)), times)
    first = expand_runs(nodes.first, times)
    spans = np.where(uniform, nodes.count, 1)[node]
    of_node = runs[which[node]]
    row = expand_runs((np.cumsum(runs) - runs)[which[node]], of_node)
    start = np.repeat(first, of_node) * size + at[row]
    count = (end - at)[row] * np.repeat(spans, of_node)
    frame = entries[table, at][row]
    low = np.maximum(start, places.start)
    high = np.minimum(start + count, places.stop)
    keep = (frame != NO_FRAME) & (low < high)
    return FrameRuns(low[keep], (high - low)[keep], frame[keep])


def build_tree(nodes: FrameRuns, levels: int, size: int, encode: Callable[[U64], U8], put: StorePages) -> FrameRuns:
    """The tables above some nodes, level by level; the runs of tables of the last level. The inverse of walk.

    ``encode`` turns the frames that tables of ``size`` entries name, uint64 (n, size), NO_FRAME for none, into pages.
    A run that fills tables from end to end gets one table for all of them.
    """
    for _ in range(levels):
        nodes = _above(nodes, size, encode, put)
    return nodes


def _above(nodes: FrameRuns, size: int, encode: Callable[[U64], U8], put: StorePages) -> FrameRuns:
    stop = nodes.first + nodes.count
    low, high = -(-nodes.first // size), stop // size  # the tables that a run fills from end to end
    whole = low < high
    filling, which = np.unique(nodes.frame[whole], return_inverse=True)
    shared = np.empty(len(filling), np.uint64)
    for i in range(0, len(filling), PAGES_PER_BATCH):
        some = filling[i : i + PAGES_PER_BATCH]
        shared[i : i + len(some)] = put(encode(np.repeat(some[:, None], size, axis=1)))
    uniform = FrameRuns(low[whole], (high - low)[whole], shared[which])
    # What is left of each run lies before its first whole table, behind its last, or all within one table.
    head = np.where(whole, low * size, np.minimum(stop, low * size))
    tail = np.maximum(np.where(whole, high * size, nodes.first), head)
    pieces = FrameRuns.in_order(
        [
            FrameRuns(nodes.first, head - nodes.first, nodes.frame),
            FrameRuns(tail, np.maximum(stop - tail, 0), nodes.frame),
        ]
    )
    pieces = pieces[pieces.count > 0]
    tables, first_piece = np.unique(pieces.first // size, return_index=True)
    bounds = np.append(first_piece, len(pieces))
    frames = np.empty(len(tables), np.uint64)
    for i in range(0, len(tables), PAGES_PER_BATCH):
        named, mine = tables[i : i + PAGES_PER_BATCH], pieces[bounds[i] : bounds[min(i + PAGES_PER_BATCH, len(tables))]]
        content = np.full((len(named), size), NO_FRAME)
        row = np.searchsorted(named, mine.first // size)
        at = expand_runs(row * size + mine.first % size, mine.count)
        content.reshape(-1)[at] = np.repeat(mine.frame, mine.count)
        frames[i : i + len(named)] = put(encode(content))
    return FrameRuns.in_order([uniform, FrameRuns(tables, np.ones(len(tables), np.int64), frames)])
