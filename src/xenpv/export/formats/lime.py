"""LiME's format, version 1: each run of pages behind a header of its physical addresses.

https://github.com/504ensicsLabs/LiME, src/lime.h: lime_mem_range_header.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from xenpv.export.formats.content import Piece
from xenpv.frames import PAGE_SHIFT
from xenpv.runs import Runs

HEADER = struct.Struct("<4sIQQ8x")  # magic, version, first and last byte
MAGIC = b"EMiL"


def dump(pages: Runs) -> Iterator[Piece]:
    """The file: what is not there is in no range."""
    for row, (first, count) in enumerate(zip(pages.first.tolist(), pages.pages.tolist(), strict=True)):
        yield HEADER.pack(MAGIC, 1, first << PAGE_SHIFT, (first + count << PAGE_SHIFT) - 1)
        yield pages[row : row + 1]
