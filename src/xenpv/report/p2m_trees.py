"""The trees of a p2m: each form that a guest exposes, level by level."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from xenpv.errors import GuestError
from xenpv.frames import ENTRIES, NO_FRAME, PAGE_SIZE, U8, U64
from xenpv.memory.frame_tree import ReadFrames, walk_tree
from xenpv.memory.p2m_anchors import Anchors, P2MForm, P2MRoot
from xenpv.memory.p2m_reader import P2M, decode_entries
from xenpv.memory.page_tables import decode_page_tables
from xenpv.report.pfn_ranges import PfnRanges
from xenpv.runs import FrameRuns
from xenpv.source.domain import Domain

_NODES_SHOWN = 7  # of a level


@dataclass(frozen=True, slots=True)
class Node:
    """A table or leaf in the p2m.

    Attributes:
        frame: Its frame.
        times: How many consecutive places of its level it fills.
        at: The first of these places.
        first: The first pfn of its entries.
        last: The last pfn of its entries.
    """

    frame: int
    times: int
    at: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Level:
    """The tables or leaves of one level.

    Attributes:
        name: What Xen calls them.
        frames: How many different ones there are.
        places: How many places they fill.
        shared: How many fill several places.
        nodes: The first and the last of them.
    """

    name: str
    frames: int
    places: int
    shared: int
    nodes: list[Node]


@dataclass(frozen=True, slots=True)
class P2MTree:
    """One form of the p2m, from its anchor down.

    Attributes:
        form: The name of the form.
        linear: Whether it is the linear virtual list.
        anchors: The fields of shared info that lead to it, as text.
        levels: From the top table down to the leaves.
        entries: How many entries it has.
        per_leaf: Entries in a leaf.
        vaddr: The virtual address of a linear list.
        error: Why the walk ended early, or None.
    """

    form: str
    linear: bool
    anchors: dict[str, str]
    levels: list[Level]
    entries: int
    per_leaf: int
    vaddr: int | None = None
    error: str | None = None


def describe_p2m_trees(domain: Domain, anchors: Anchors) -> list[P2MTree]:
    """Return a tree for each root of the p2m that the anchors give, the best first."""
    resolve = None if domain.p2m_names_mfns else domain.p2m.pfns_of
    return [_describe_tree(anchors, root, domain.read_p2m_frames, resolve) for root in anchors.roots]


def leaf_ranges(p2m: P2M, *, mfns: bool) -> PfnRanges:
    """Return the pfns of the frames that hold the p2m's leaves.

    ``mfns``: whether the p2m names them by mfn.
    """
    frames = p2m.distinct_leaves.frame
    if mfns:
        frames = p2m.pfns_of(frames)
    return PfnRanges.from_pfns(frames[frames != NO_FRAME])


@dataclass(frozen=True, slots=True)
class _TreeWalk:
    """The walk of one form, level by level."""

    anchors: Anchors
    root: P2MRoot
    read: ReadFrames
    resolve: Callable[[U64], U64] | None

    @property
    def linear(self) -> bool:
        return self.root.form is P2MForm.LINEAR

    def levels(self) -> Iterator[Level]:
        """Yield the levels from the top table down.

        Raises GuestError if the p2m is damaged.
        """
        places, top = self.anchors.leaf_places(self.root), self.root.frame
        if self.resolve is not None:
            top = int(self.resolve(np.array([top], np.uint64))[0])
            if top == int(NO_FRAME):
                raise GuestError(f"no pfn has mfn {self.root.frame:#x}, which its anchor names")
        for depth in range(self.root.table_levels + 1):
            yield self._level(top, depth, places)

    def _level(self, top: int, depth: int, places: range) -> Level:
        above = self.root.table_levels - depth  # how many levels lie below it, leaves included
        per_table = ENTRIES if self.linear else PAGE_SIZE // self.anchors.width
        shift = (per_table.bit_length() - 1) * above
        level_places = range(places.start >> shift, (max(places.stop, places.start + 1) - 1 >> shift) + 1)
        if depth:
            runs, _ = walk_tree(self.read, top, depth, level_places, partial(self._decode_frames, above=above))
        else:
            runs = FrameRuns(np.array([level_places.start]), np.ones(1, np.int64), np.array([top], np.uint64))
        return Level(_name(self.root, above), *_counts(runs), _nodes(runs, shift, places, self.anchors))

    def _decode_frames(self, pages: U8, level: int, above: int) -> U64:
        if self.linear:
            return decode_page_tables(pages, level + above)
        table = decode_entries(pages, self.anchors.width)
        table = np.where(table == 0, NO_FRAME, table)
        return table if self.resolve is None else self.resolve(table)


def _describe_tree(anchors: Anchors, root: P2MRoot, read: ReadFrames, resolve: Callable[[U64], U64] | None) -> P2MTree:
    tree, levels, error = _TreeWalk(anchors, root, read, resolve), [], None
    try:
        for level in tree.levels():
            levels.append(level)  # noqa: PERF402  levels above a damaged one are shown
    except GuestError as e:
        error = str(e)
    fields = {"max_pfn": anchors.max_pfn, "frame_list_list": anchors.frame_list_list}
    if tree.linear:
        fields = {"p2m_cr3": anchors.p2m_cr3, "p2m_vaddr": anchors.p2m_vaddr, "p2m_generation": anchors.p2m_generation}
    elif root.form is P2MForm.ROOTED:
        fields = {"p2m_levels": anchors.p2m_levels, "p2m_root": anchors.p2m_root}
    anchor_texts = {name: f"{value:#x}" for name, value in fields.items()}
    vaddr = anchors.p2m_vaddr if tree.linear else None
    per_leaf = PAGE_SIZE // anchors.width
    return P2MTree(root.name, tree.linear, anchor_texts, levels, anchors.max_pfn, per_leaf, vaddr, error)


def _name(root: P2MRoot, above: int) -> str:
    if above == 0:
        return "leaf"
    if root.form is P2MForm.LINEAR:
        return f"L{above} table"
    names = ["frame list", "frame list list"]
    return names[above - 1] if above <= len(names) and root.form is P2MForm.TREE else f"level {above + 1}"


def _counts(runs: FrameRuns) -> tuple[int, int, int]:
    """Return how many distinct frames, places, and frames in several places there are."""
    frame, row = np.unique(runs.frame, return_inverse=True)
    times = np.bincount(row, runs.count, len(frame))
    return len(frame), int(runs.count.sum()), int(np.count_nonzero(times > 1))


def _nodes(runs: FrameRuns, shift: int, places: range, anchors: Anchors) -> list[Node]:
    rows = list(range(len(runs)))
    if len(runs) > _NODES_SHOWN:
        rows = [*rows[: _NODES_SHOWN - 2], *rows[-2:]]
    per_leaf, nodes = PAGE_SIZE // anchors.width, []
    for row in rows:
        first, count = int(runs.first[row]), int(runs.count[row])
        start = max(first << shift, places.start) - places.start
        stop = min((first + count) << shift, places.stop) - places.start
        last = min(stop * per_leaf, anchors.max_pfn) - 1
        nodes.append(Node(int(runs.frame[row]), count, first - (places.start >> shift), start * per_leaf, last))
    return nodes
