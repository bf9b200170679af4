"""Trees of frames, walked and built.

A tree is a p2m tree of any depth, or the page tables over a linear list.

Cost follows distinct tables, not the places that they span. A table in a thousand places is read once.
Entries that name one frame stay one run at all levels below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from xenpv.errors import GuestError
from xenpv.frames import I64, NO_FRAME, PAGES_PER_BATCH, U8, U64, Mask
from xenpv.runs import FrameRuns, expand_runs

RUNS_MAX = 1 << 24  # runs of leaves: twice what 16 TiB of pages in no order take
SHARED_RUNS_MAX = 1 << 20  # of them below tables that stand in several places: more only a hostile guest has
UNREADABLE_MAX = 1 << 16  # tables: more than a p2m of 16 TiB has

ReadFrames = Callable[[U64], tuple[U8, Mask]]
"""read(frames): their content, uint8 (n, 4096), and for each whether it could be read."""

StorePages = Callable[[U8], U64]
"""store(pages): write pages, uint8 (n, 4096), to new frames; the frame of each."""


class UnreadableTable(NamedTuple):
    """A table that could not be read.

    It has its frame, its level above the leaves, and the first of its places.
    """

    frame: int
    level: int
    place: int


def walk_tree(
    read: ReadFrames, root: int, levels: int, places: range, decode: Callable[[U8, int], U64]
) -> tuple[FrameRuns, list[UnreadableTable]]:
    """Find the leaves of a tree of tables.

    Args:
        read: reads tables.
        root: the frame of the top table.
        levels: levels of tables above the leaves.
        places: the places of the leaves to find.
        decode: ``decode(pages, level)`` turns tables, uint8 (n, 4096), into the frames that their entries name, uint64
            (n, entries), NO_FRAME for none. Level 1 is just above the leaves.

    Returns:
        The leaves, and the tables that could not be read, the highest first.

    Raises:
        GuestError: the tables name more than RUNS_MAX runs, or SHARED_RUNS_MAX by sharing tables, or more than
            UNREADABLE_MAX tables cannot be read.
    """
    nodes = FrameRuns(np.zeros(1, np.int64), np.ones(1, np.int64), np.array([root], np.uint64))
    unreadable: list[UnreadableTable] = []
    for level in range(levels, 0, -1):
        by_frame = np.argsort(nodes.frame, kind="stable")
        frames, start = np.unique(nodes.frame[by_frame], return_index=True)
        bounds = np.append(start, len(nodes))
        pieces, rows = [FrameRuns.empty()], 0
        for i in range(0, len(frames), PAGES_PER_BATCH):
            tables = frames[i : i + PAGES_PER_BATCH]
            table_nodes = nodes[by_frame[bounds[i] : bounds[i + len(tables)]]]
            table_of = np.repeat(np.arange(len(tables)), np.diff(bounds[i : i + len(tables) + 1]))
            pages, readable = read(tables)
            entries = np.where(readable[:, None], decode(pages, level), NO_FRAME)
            failed = np.flatnonzero(~readable)
            if len(unreadable) + len(failed) > UNREADABLE_MAX:
                raise GuestError(f"more than {UNREADABLE_MAX} tables below frame {root:#x} cannot be read")
            first_place = table_nodes.first[bounds[i : i + len(tables)] - bounds[i]]
            unreadable += [UnreadableTable(int(tables[row]), level, int(first_place[row])) for row in failed]
            shift = (entries.shape[1].bit_length() - 1) * (level - 1)
            level_places = range(places.start >> shift, (places.stop - 1 >> shift) + 1)
            pieces.append(_next_level(table_nodes, entries, table_of, level_places))
            rows += len(pieces[-1])
            if rows > RUNS_MAX:
                raise GuestError(f"the tables below frame {root:#x} name more than {RUNS_MAX} runs of frames")
        nodes = FrameRuns.in_order(pieces)
    unreadable.sort(key=lambda table: (-table.level, table.place))
    return nodes, unreadable


def _next_level(nodes: FrameRuns, entries: U64, table_of: I64, places: range) -> FrameRuns:
    """Return the frames that tables name, as runs of places of the next level down.

    The runs within each table are found once; then they are unrolled for all places of the table.

    Args:
        nodes: the places of the tables.
        entries: the frames that each table names, uint64 of shape (tables, entries).
        table_of: for each node, its row in ``entries``, ascending.
        places: the places of the next level to keep.
    """
    size = entries.shape[1]
    begins = np.ones(entries.shape, np.bool_)
    begins[:, 1:] = entries[:, 1:] != entries[:, :-1]
    table, first_entry = np.nonzero(begins)
    end_entry = np.append(np.where(table[1:] == table[:-1], first_entry[1:], size), size)
    runs = np.count_nonzero(begins, axis=1)
    uniform = runs[table_of] == 1
    times = np.where(uniform, 1, nodes.count)  # a run of uniform tables stays one run, any other is unrolled
    shared = int((times * runs[table_of]).sum() - runs.sum())
    if shared > SHARED_RUNS_MAX:
        place_counts = np.bincount(table_of, times)
        worst = int(nodes.frame[np.searchsorted(table_of, np.argmax(place_counts))])
        problem = f"tables that are shared name more than {SHARED_RUNS_MAX} runs of frames"
        raise GuestError(f"{problem}: frame {worst:#x}, a table, stands in {int(place_counts.max())} places")
    node = np.repeat(np.arange(len(nodes)), times)
    table_place = expand_runs(nodes.first, times)
    table_count = np.where(uniform, nodes.count, 1)[node]
    node_runs = runs[table_of[node]]
    row = expand_runs((np.cumsum(runs) - runs)[table_of[node]], node_runs)
    start = np.repeat(table_place, node_runs) * size + first_entry[row]
    count = (end_entry - first_entry)[row] * np.repeat(table_count, node_runs)
    frame = entries[table, first_entry][row]
    low = np.maximum(start, places.start)
    high = np.minimum(start + count, places.stop)
    is_within = (frame != NO_FRAME) & (low < high)
    return FrameRuns(low[is_within], (high - low)[is_within], frame[is_within])


def build_tree(nodes: FrameRuns, levels: int, size: int, encode: Callable[[U64], U8], store: StorePages) -> FrameRuns:
    """Write the tables above some nodes, level by level: the inverse of walk_tree.

    A run that fills tables from end to end gets one table for all of them.

    Args:
        nodes: what the lowest tables name.
        levels: levels of tables to write.
        size: entries in a table.
        encode: turns the frames that tables name, uint64 (n, size), NO_FRAME for none, into pages.
        store: writes the pages.

    Returns:
        The tables of the highest level written.
    """
    for _ in range(levels):
        nodes = _write_level(nodes, size, encode, store)
    return nodes


def _write_level(nodes: FrameRuns, size: int, encode: Callable[[U64], U8], store: StorePages) -> FrameRuns:
    """Write the tables just above some nodes, and return them."""
    end = nodes.end
    low, high = -(-nodes.first // size), end // size  # the tables that a run fills from end to end
    fills = low < high
    filling, table_of = np.unique(nodes.frame[fills], return_inverse=True)
    shared = np.empty(len(filling), np.uint64)
    for i in range(0, len(filling), PAGES_PER_BATCH):
        batch = filling[i : i + PAGES_PER_BATCH]
        shared[i : i + len(batch)] = store(encode(np.repeat(batch[:, None], size, axis=1)))
    uniform = FrameRuns(low[fills], (high - low)[fills], shared[table_of])
    # The rest of each run lies before its first whole table, after its last, or all within one table.
    head = np.where(fills, low * size, np.minimum(end, low * size))
    tail = np.maximum(np.where(fills, high * size, nodes.first), head)
    pieces = FrameRuns.in_order(
        [
            FrameRuns(nodes.first, head - nodes.first, nodes.frame),
            FrameRuns(tail, np.maximum(end - tail, 0), nodes.frame),
        ]
    )
    pieces = pieces[pieces.count > 0]
    tables, first_piece = np.unique(pieces.first // size, return_index=True)
    bounds = np.append(first_piece, len(pieces))
    frames = np.empty(len(tables), np.uint64)
    for i in range(0, len(tables), PAGES_PER_BATCH):
        named = tables[i : i + PAGES_PER_BATCH]
        batch_pieces = pieces[bounds[i] : bounds[i + len(named)]]
        entries = np.full((len(named), size), NO_FRAME)
        row = np.searchsorted(named, batch_pieces.first // size)
        position = expand_runs(row * size + batch_pieces.first % size, batch_pieces.count)
        entries.reshape(-1)[position] = np.repeat(batch_pieces.frame, batch_pieces.count)
        frames[i : i + len(named)] = store(encode(entries))
    return FrameRuns.in_order([uniform, FrameRuns(tables, np.ones(len(tables), np.int64), frames)])
