"""LiME's format, version 1: a header with addresses before each run of pages.

Source: https://github.com/504ensicsLabs/LiME, src/lime.h, lime_mem_range_header.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from xenpv.export.formats.content import Pages, Piece
from xenpv.export.formats.job import ExportJob
from xenpv.frames import PAGE_SHIFT

HEADER = struct.Struct("<4sIQQ8x")  # magic, version, first and last byte
MAGIC = b"EMiL"


def pieces(job: ExportJob) -> Iterator[Piece]:
    """Yield the file. Pages that are not there are in no run."""
    pages = job.pages
    for row, (first, count) in enumerate(zip(pages.first.tolist(), pages.pages.tolist(), strict=True)):
        yield HEADER.pack(MAGIC, 1, first << PAGE_SHIFT, (first + count << PAGE_SHIFT) - 1)
        yield Pages(pages[row : row + 1])
