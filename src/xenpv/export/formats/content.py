"""The pieces of an exported file: bytes, holes, pages, corrections."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

from xenpv.frames import IS_POPULATED, PAGE_SIZE, U8, U64
from xenpv.runs import Extents, Runs

PageFilter: TypeAlias = Callable[[U64, U8], U8]
"""filter(pfns, pages) returns what the file gets of some pages, both uint8 of shape (n, 4096)."""


class Hole(NamedTuple):
    """Zeros that take no room in a file: their number of bytes."""

    length: int


class Pages(NamedTuple):
    """The content of pages in the order of their pfns.

    Each batch goes through a filter if there is one.
    """

    runs: Runs
    page_filter: PageFilter | None = None


class Patch(NamedTuple):
    """Bytes that replace those at an offset which was written before.

    Only files that can seek take it.
    """

    offset: int
    data: bytes


Piece: TypeAlias = bytes | Hole | Pages | Patch


def populated_runs(extents: Iterable[Extents]) -> Runs:
    """Return the pages that a domain has.

    They have content, or are zeros that were sent without.

    Adjacent runs are joined whatever their types.
    """
    return Runs.concatenate(piece[IS_POPULATED[piece.type]].merged() for piece in extents).merged()


def padded(data: bytes, alignment: int = PAGE_SIZE) -> bytes:
    """Return data with zeros up to a multiple of ``alignment`` bytes."""
    return data + bytes(-len(data) % alignment)
