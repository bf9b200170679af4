"""The p2m as the tree or list that it is: each way that a guest exposes, level by level from its anchor down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from xenpv.errors import GuestError
from xenpv.frames import ENTRIES, NO_FRAME, PAGE_SIZE, U8, U64
from xenpv.memory.anchors import Anchors, P2MForm, P2MRoot
from xenpv.memory.p2m import P2M, decode_entries
from xenpv.memory.pagetables import frames_of_tables
from xenpv.memory.radix import ReadFrames, walk_tree
from xenpv.report.parts import Parts
from xenpv.runs import FrameRuns
from xenpv.source.domain import Domain

_SHOWN = 7  # nodes of a level that are told one by one


@dataclass(frozen=True, slots=True)
class Node:
    """A table or leaf in the p2m: ``frame`` that it is, in ``times`` places from the entry of pfn ``first`` on; they
    reach to ``last``. ``at``: its first place in its level.
    """

    frame: int
    times: int
    at: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Level:
    """Tables of one depth: ``frames`` different ones in ``places`` places; ``shared`` of them stand in several.

    ``nodes``: some of them, the first and the last.
    """

    name: str
    frames: int
    places: int
    shared: int
    nodes: list[Node]


@dataclass(frozen=True, slots=True)
class Shape:
    """One way to the p2m. ``anchors``: the fields that lead to it, as text; ``error``: why it leads nowhere.

    ``per_leaf`` entries a leaf; a linear list lies from ``vaddr`` on.
    """

    form: str
    linear: bool
    anchors: dict[str, str]
    levels: list[Level]
    entries: int
    per_leaf: int
    vaddr: int | None = None
    error: str | None = None


def shapes_of(domain: Domain, anchors: Anchors) -> list[Shape]:
    """Return every form in which the domain exposes its p2m by these anchors, the best first."""
    resolve = None if domain.p2m_names_mfns else domain.p2m.pfns_of
    return [_shape(anchors, root, domain.read_p2m_frames, resolve) for root in anchors.roots]


def leaves_at(p2m: P2M, *, mfns: bool) -> Parts:
    """The pfns of the frames that hold the p2m's leaves; ``mfns``: whether its frames are mfns."""
    frames = p2m.distinct_leaves.frame
    if mfns:
        frames = p2m.pfns_of(frames)
    return Parts.of_pfns(frames[frames != NO_FRAME])


@dataclass(frozen=True, slots=True)
class _Tree:
    """A way to the p2m, to be walked level by level."""

    anchors: Anchors
    root: P2MRoot
    read: ReadFrames
    resolve: Callable[[U64], U64] | None

    @property
    def linear(self) -> bool:
        return self.root.form is P2MForm.LINEAR

    def levels(self) -> Iterator[Level]:
        """From the top table down. Raises GuestError."""
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
        here = range(places.start >> shift, (max(places.stop, places.start + 1) - 1 >> shift) + 1)
        if depth:
            runs, _ = walk_tree(self.read, top, depth, here, partial(self._named, above=above))
        else:
            runs = FrameRuns(np.array([here.start]), np.ones(1, np.int64), np.array([top], np.uint64))
        return Level(_name(self.root, above), *_counts(runs), _nodes(runs, shift, places, self.anchors))

    def _named(self, pages: U8, level: int, above: int) -> U64:
        if self.linear:
            return frames_of_tables(pages, level + above)
        table = decode_entries(pages, self.anchors.width)
        table = np.where(table == 0, NO_FRAME, table)
        return table if self.resolve is None else self.resolve(table)


def _shape(anchors: Anchors, root: P2MRoot, read: ReadFrames, resolve: Callable[[U64], U64] | None) -> Shape:
    tree, levels, error = _Tree(anchors, root, read, resolve), [], None
    try:
        for level in tree.levels():
            levels.append(level)  # noqa: PERF402  those above the one that fails are kept
    except GuestError as e:
        error = str(e)
    fields = {"max_pfn": anchors.max_pfn, "frame_list_list": anchors.frame_list_list}
    if tree.linear:
        fields = {"p2m_cr3": anchors.p2m_cr3, "p2m_vaddr": anchors.p2m_vaddr, "p2m_generation": anchors.p2m_generation}
    elif root.form is P2MForm.ROOTED:
        fields = {"p2m_levels": anchors.p2m_levels, "p2m_root": anchors.p2m_root}
    told = {name: f"{value:#x}" for name, value in fields.items()}
    vaddr = anchors.p2m_vaddr if tree.linear else None
    per_leaf = PAGE_SIZE // anchors.width
    return Shape(root.name, tree.linear, told, levels, anchors.max_pfn, per_leaf, vaddr, error)


def _name(root: P2MRoot, above: int) -> str:
    if above == 0:
        return "leaf"
    if root.form is P2MForm.LINEAR:
        return f"L{above} table"
    names = ["frame list", "frame list list"]
    return names[above - 1] if above <= len(names) and root.form is P2MForm.TREE else f"level {above + 1}"


def _counts(runs: FrameRuns) -> tuple[int, int, int]:
    """How many different ones, in how many places, and how many of them in several."""
    frame, row = np.unique(runs.frame, return_inverse=True)
    times = np.bincount(row, runs.count, len(frame))
    return len(frame), int(runs.count.sum()), int(np.count_nonzero(times > 1))


def _nodes(runs: FrameRuns, shift: int, places: range, anchors: Anchors) -> list[Node]:
    rows = list(range(len(runs)))
    if len(runs) > _SHOWN:
        rows = [*rows[: _SHOWN - 2], *rows[-2:]]
    per_leaf, nodes = PAGE_SIZE // anchors.width, []
    for row in rows:
        first, count = int(runs.first[row]), int(runs.count[row])
        begin = max(first << shift, places.start) - places.start
        stop = min((first + count) << shift, places.stop) - places.start
        last = min(stop * per_leaf, anchors.max_pfn) - 1
        nodes.append(Node(int(runs.frame[row]), count, first - (places.start >> shift), begin * per_leaf, last))
    return nodes
