"""What an exported file is made of, in order: bytes, holes, and runs of the domain's pages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

from xenpv.frames import HAS_DATA, PAGE_SIZE
from xenpv.runs import Extents, Runs


class Hole(NamedTuple):
    """So many bytes of zeros that need no room."""

    length: int


Piece: TypeAlias = bytes | Hole | Runs


def runs_with_data(extents: Iterable[Extents]) -> Runs:
    """Return the pages with content of a domain's extents, adjacent runs joined whatever their types."""
    pieces = (some[HAS_DATA[some.type]].merged() for some in extents)
    return Runs.concatenate(pieces).merged()


def padded(data: bytes, to: int = PAGE_SIZE) -> bytes:
    """Data, and zeros up to a multiple of so many bytes."""
    return data + bytes(-len(data) % to)
