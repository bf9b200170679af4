"""Memory as it is, each page at its physical address, with holes where there is none."""

from __future__ import annotations

from collections.abc import Iterator

from xenpv.export.formats.content import Hole, Piece
from xenpv.frames import PAGE_SIZE
from xenpv.runs import Runs


def dump(pages: Runs) -> Iterator[Piece]:
    """The file: it ends behind the last page."""
    at = 0
    for row, (first, count) in enumerate(zip(pages.first.tolist(), pages.pages.tolist(), strict=True)):
        if first > at:
            yield Hole((first - at) * PAGE_SIZE)
        yield pages[row : row + 1]
        at = first + count
