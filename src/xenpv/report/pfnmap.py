"""The map of a domain's pfns: lanes of what lies where, as rows that a picture is drawn from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from xenpv.frames import ABSENT, HAS_DATA, IS_POPULATED, IS_TABLE, PINNED, U64, PageType
from xenpv.report.parts import NOTHING, Collector, Parts, axis
from xenpv.runs import Extents

_ROWS = 4096  # of each kind


@dataclass(frozen=True, slots=True)
class Layer:
    """Pages of one kind: in ``lane``, by what it is called there, and ``parts`` of the pfns."""

    lane: str
    kind: str
    what: str
    pages: int
    parts: Parts


@dataclass(frozen=True, slots=True)
class PfnMap:
    """``end``: one more than the last pfn of the map. ``axis``: see parts.axis."""

    end: int
    axis: list[tuple[int, float]]
    layers: list[Layer]


def whole(pieces: Iterable[Extents]) -> tuple[Extents, dict[int, Parts]]:
    """All pages of a domain: their extents, and the parts of each page type that there is."""
    exact: list[Extents] = []
    by_type: dict[int, Collector] = {}
    for piece in pieces:
        there = IS_POPULATED[piece.type] | (piece.type == PageType.BROKEN)
        extents = piece[there]
        for kind in np.unique(extents.type).tolist():
            mine = extents.type == kind
            by_type.setdefault(kind, Collector()).add(Parts.of(extents.first[mine], extents.pages[mine]))
        exact.append(extents)
    return Extents.concatenate(exact), {kind: found.all for kind, found in sorted(by_type.items())}


def pfn_map(
    by_type: dict[int, Parts], others: Iterable[tuple[str, str, str, Parts]], named: U64, entries: int
) -> PfnMap:
    """The map. ``others``: layers beside those of page types: lane, kind, what it is, which pfns. ``named``: pfns of
    which something is said, there or not; the map ends behind the last of all, and ``entries`` of the p2m.
    """
    layers = [_layer(*_of_type(kind), parts) for kind, parts in by_type.items()]
    layers += [_layer(lane, kind, what, parts) for lane, kind, what, parts in others if len(parts)]
    there, last = NOTHING, int(named.max(initial=0)) + 1
    for layer in layers:
        there = there.and_also(layer.parts.coarse(_ROWS))
        last = max(last, int(layer.parts.end[-1]))
    end = max(last, entries)
    return PfnMap(end, axis(there.and_also(Parts.of_pfns(named)), end), layers)


def _layer(lane: str, kind: str, what: str, parts: Parts) -> Layer:
    return Layer(lane, kind, what, int(parts.pages.sum()), parts.coarse(_ROWS))


def _of_type(kind: int) -> tuple[str, str, str]:
    """Lane, kind and words of a page type."""
    if IS_TABLE[kind]:
        level, pinned = kind & 7, bool(kind & PINNED)
        return "tables", f"l{level}" + ("p" if pinned else ""), f"L{level} tables" + (", pinned" if pinned else "")
    if kind == PageType.BROKEN:
        return "pages", "broken", "lost to a memory error"
    if kind == ABSENT or not HAS_DATA[kind]:
        return "pages", "empty", "populated, without content"
    return "pages", "data", "ordinary pages"
