"""The map of a domain's pfns: layers of pages by kind, as rows for a picture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from xenpv.frames import ABSENT, HAS_DATA, IS_POPULATED, IS_TABLE, PINNED, U64, PageType
from xenpv.report.pfn_ranges import NO_RANGES, PfnRanges, RangeCollector, pfn_axis
from xenpv.runs import Extents

_ROWS_MAX = 4096  # of each layer


@dataclass(frozen=True, slots=True)
class Layer:
    """Pages of one kind.

    Attributes:
        lane: Which line of the map they are drawn in.
        kind: Their style there.
        what: What they are, for people.
        pages: How many there are.
        parts: Where they are.
    """

    lane: str
    kind: str
    what: str
    pages: int
    parts: PfnRanges


@dataclass(frozen=True, slots=True)
class PfnMap:
    """The map of a domain's pfns.

    Attributes:
        end: The pfn after the last one.
        axis: The corners that pfn_axis() returns.
        layers: The layers.
    """

    end: int
    axis: list[tuple[int, float]]
    layers: list[Layer]


def collect_extents(pieces: Iterable[Extents]) -> tuple[Extents, dict[int, PfnRanges]]:
    """Return all pages of a domain: their extents, and the ranges of each page type."""
    exact: list[Extents] = []
    by_type: dict[int, RangeCollector] = {}
    for piece in pieces:
        shown = IS_POPULATED[piece.type] | (piece.type == PageType.BROKEN)
        extents = piece[shown]
        for page_type in np.unique(extents.type).tolist():
            of_type = extents.type == page_type
            by_type.setdefault(page_type, RangeCollector()).add(
                PfnRanges.from_ranges(extents.first[of_type], extents.pages[of_type])
            )
        exact.append(extents)
    return Extents.concatenate(exact), {page_type: ranges.all for page_type, ranges in sorted(by_type.items())}


def build_map(
    by_type: dict[int, PfnRanges], extra_layers: Iterable[tuple[str, str, str, PfnRanges]], named: U64, entries: int
) -> PfnMap:
    """Build the map.

    Args:
        by_type: The pages of each page type.
        extra_layers: Further layers: lane, kind, what they are, their pfns.
        named: Pfns that the report mentions, present or not. The map reaches to the last.
        entries: Entries of the p2m. The map reaches to the last.
    """
    layers = [_layer(*_describe_page_type(page_type), parts) for page_type, parts in by_type.items()]
    layers += [_layer(lane, kind, what, parts) for lane, kind, what, parts in extra_layers if len(parts)]
    present, last = NO_RANGES, int(named.max(initial=0)) + 1
    for layer in layers:
        present = present.union(layer.parts.coarsen(_ROWS_MAX))
        last = max(last, int(layer.parts.end[-1]))
    end = max(last, entries)
    return PfnMap(end, pfn_axis(present.union(PfnRanges.from_pfns(named)), end), layers)


def _layer(lane: str, kind: str, what: str, parts: PfnRanges) -> Layer:
    return Layer(lane, kind, what, int(parts.pages.sum()), parts.coarsen(_ROWS_MAX))


def _describe_page_type(page_type: int) -> tuple[str, str, str]:
    """Return lane, kind and description of a page type."""
    if IS_TABLE[page_type]:
        level, pinned = page_type & 7, bool(page_type & PINNED)
        return "tables", f"l{level}" + ("p" if pinned else ""), f"L{level} tables" + (", pinned" if pinned else "")
    if page_type == PageType.BROKEN:
        return "pages", "broken", "lost to a memory error"
    if page_type == ABSENT or not HAS_DATA[page_type]:
        return "pages", "empty", "populated, without content"
    return "pages", "data", "ordinary pages"
