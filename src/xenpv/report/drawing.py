"""The drawing of a p2m tree: the positions of its boxes and lines."""

from __future__ import annotations

from dataclasses import dataclass

from xenpv.frames import PAGE_SIZE
from xenpv.report.p2m_trees import Level, Node, P2MTree

_WIDTH, _LEFT, _ROW_HEIGHT, _BOX_HEIGHT = 1100, 140, 62, 38
_BOX_GAP = 10
_BOX_WIDTH_MAX = 160


@dataclass(frozen=True, slots=True)
class Box:
    """A box with lines of text.

    Edges end at its middle. It represents the pfns ``first`` to ``last``.
    """

    x: float
    y: float
    w: float
    h: float
    lines: list[str]
    style: str  # "anchor", "table", "leaf", "list", "more"
    title: str
    first: int | None = None
    last: int | None = None

    @property
    def middle(self) -> float:
        """The x coordinate of its middle."""
        return self.x + self.w / 2


@dataclass(frozen=True, slots=True)
class Edge:
    """A line from a box down to another."""

    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True, slots=True)
class Row:
    """The label of a level."""

    y: float
    name: str
    note: str


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawing: its size, boxes, edges and labels."""

    width: float
    height: float
    boxes: list[Box]
    edges: list[Edge]
    rows: list[Row]


def draw_p2m_tree(tree: P2MTree) -> Picture:
    """Draw one form: its anchor, and a row of boxes for each level.

    Leaves of a list show their virtual address.
    """
    fields = [f"{name} {value}" for name, value in tree.anchors.items()]
    width = max(180.0, 7.2 * max(map(len, fields)) + 20)
    anchor = Box(_LEFT, 0, width, 10 + 15 * len(fields), fields, "anchor", "shared info")
    rows, boxes, edges = [Row(0, "shared info", "")], [anchor], []
    y = anchor.h + _ROW_HEIGHT - _BOX_HEIGHT
    above = [anchor]
    for number, level in enumerate(tree.levels):
        last = number == len(tree.levels) - 1
        level_boxes = _draw_level(tree, level, y, last)
        rows.append(Row(y, _level_name(level, last), _note(tree, level, last)))
        edges += [Edge(_parent(box, above).middle, _bottom(above), box.middle, y) for box in level_boxes]
        boxes += level_boxes
        above = level_boxes
        y += _ROW_HEIGHT
    return Picture(_WIDTH + 2, y - _ROW_HEIGHT + _BOX_HEIGHT + 4 if tree.levels else anchor.h, boxes, edges, rows)


def _draw_level(tree: P2MTree, level: Level, y: float, last: bool) -> list[Box]:
    style = ("list" if tree.linear else "leaf") if last else "table"
    gap = 0 if style == "list" else _BOX_GAP
    nodes: list[Node | None] = list(level.nodes)
    skips = [
        i for i in range(1, len(level.nodes)) if level.nodes[i].at > level.nodes[i - 1].at + level.nodes[i - 1].times
    ]
    for i in reversed(skips[:3]):
        nodes.insert(i, None)
    cells = sum(0.4 if node is None else 1 for node in nodes) or 1
    width = min((_WIDTH - _LEFT - gap * (len(nodes) - 1)) / cells, _BOX_WIDTH_MAX)
    x, boxes = float(_LEFT), []
    for node in nodes:
        if node is None:
            boxes.append(Box(x, y, width * 0.4, _BOX_HEIGHT, ["…"], "more", "more"))
            x += width * 0.4 + gap
            continue
        times = f" ×{node.times:,}" if node.times > 1 else ""
        line = f"{node.first:x}–{node.last:x}"
        if style == "list" and tree.vaddr is not None:
            line = f"…{(tree.vaddr + node.at * PAGE_SIZE) & 0xFFFF_FFFF_FFFF:x}"
        title = f"{level.name} in frame {node.frame:#x}, pfns {node.first:#x} to {node.last:#x}"
        boxes.append(
            Box(
                round(x, 1),
                y,
                round(width, 1),
                _BOX_HEIGHT,
                [f"{node.frame:#x}{times}", line],
                style,
                title,
                node.first,
                node.last,
            )
        )
        x += width + gap
    return boxes


def _parent(box: Box, above: list[Box]) -> Box:
    """Return the box above that has the first pfn of this box."""
    for parent in above:
        if (
            parent.first is not None
            and parent.last is not None
            and box.first is not None
            and parent.first <= box.first <= parent.last
        ):
            return parent
    more = [parent for parent in above if parent.style == "more"]
    return (more or above)[0]


def _bottom(above: list[Box]) -> float:
    return above[0].y + above[0].h


def _level_name(level: Level, last: bool) -> str:
    if last:
        return f"{level.frames:,} " + ("leaf" if level.frames == 1 else "leaves")
    return level.name if level.frames == 1 else f"{level.frames:,} {level.name}s"


def _note(tree: P2MTree, level: Level, last: bool) -> str:
    if level.places != level.frames:
        return f"in {level.places:,} places"
    return f"of {tree.per_leaf:,} entries" if last else ""
