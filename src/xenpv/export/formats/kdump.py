"""The headers of makedumpfile's kdump-compressed format ("KDUMP   ", version 6): pages packed one by one.

makedumpfile: IMPLEMENTATION ("The kdump-compressed format"), diskdump_mod.h. In order, in blocks of 4096 bytes: a
header; a sub-header with the notes behind it; two bitmaps, of the pages that there are and of those in the file, which
are the same here; a descriptor for each page; the pages.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from xenpv.export.formats.content import Hole, padded
from xenpv.frames import PAGE_SIZE, U8, U64, filled
from xenpv.runs import Runs

DESCRIPTOR = np.dtype([("offset", "<i8"), ("size", "<u4"), ("flags", "<u4"), ("page_flags", "<u8")])
FLAGS = {"zlib": 0x1, "zstd": 0x20}  # DUMP_DH_COMPRESSED_*: of the header, and of each page that got smaller
UTSNAME = 6 * 65  # bytes of Linux's struct new_utsname: sysname, nodename, release, version, machine, domainname
_HEADER = struct.Struct("<8si390s6xqqIiiIIIIIIi4x")  # … status, block size, sub-header's and bitmaps' blocks, …, cpus
_SUB_HEADER = struct.Struct("<QiiQQqQqQqQQQQ")
_AT_ONCE = 256  # blocks of a bitmap
_BITS = PAGE_SIZE * 8  # pages that a block of a bitmap tells of
PFNS_MAX = (1 << 31) * _BITS - _BITS  # the blocks of both bitmaps are counted in 32 bits


@dataclass(frozen=True)
class Header:
    """What stands in front of the pages. ``text``: VMCOREINFO, which is in one of the ``notes``; ``vcpus``: how many of
    those are NT_PRSTATUS; ``uts``: the guest's struct new_utsname, ``compression`` one of FLAGS.
    """

    notes: bytes
    text: bytes | None
    vcpus: int
    uts: bytes
    compression: str
    phys_base: int = 0

    def before(self, pages: Runs) -> bytes:
        """Both headers, and the notes."""
        text, end = self.text or b"", pages.stop
        room = padded(bytes(_SUB_HEADER.size) + self.notes)
        at = PAGE_SIZE + _SUB_HEADER.size
        of_text = at + self.notes.index(text) if text else 0
        head = _HEADER.pack(b"KDUMP   ", 6, self.uts.ljust(UTSNAME, b"\0"), 0, 0, FLAGS[self.compression], PAGE_SIZE,
                            len(room) // PAGE_SIZE, 2 * _blocks(end), min(end, (1 << 32) - 1), 0, 0, 0, 0,
                            self.vcpus)  # fmt: skip
        sub = _SUB_HEADER.pack(self.phys_base, 0, 0, 0, 0, of_text, len(text), at if self.notes else 0, len(self.notes),
                               0, 0, 0, end, end)  # fmt: skip
        return padded(head) + padded(sub + self.notes)


def bitmap(pages: Runs) -> Iterator[bytes | Hole]:
    """A bit for each pfn, lowest first, up to whole blocks. Blocks without a page are holes."""
    begin = pages.first.astype(np.int64)
    end, at = begin + pages.pages, 0
    runs = Runs((begin // _BITS).astype(np.uint64), (end - 1) // _BITS - begin // _BITS + 1)
    blocks = np.unique(runs.pfns).astype(np.int64)
    for some in np.split(
        blocks, np.flatnonzero((np.diff(blocks) != 1) | (np.arange(1, len(blocks)) % _AT_ONCE == 0)) + 1
    ):
        low, high = int(some[0]) * _BITS, (int(some[-1]) + 1) * _BITS
        rows = slice(int(np.searchsorted(end, low, "right")), int(np.searchsorted(begin, high, "left")))
        edges = np.zeros(high - low + 1, np.int8)
        edges[np.maximum(begin[rows], low) - low] += 1  # runs are apart and do not touch: no place comes twice
        edges[np.minimum(end[rows], high) - low] -= 1
        if low > at:
            yield Hole((low - at) // 8)
        yield np.packbits(np.cumsum(edges[:-1], dtype=np.int8).view(np.bool_), bitorder="little").tobytes()
        at = high


def _blocks(end: int) -> int:
    return -(-end // _BITS)


def pack(content: U8, compression: str) -> tuple[list[bytes | None], U64]:
    """Pages, uint8 (n, 4096), each as it goes into the file, None for one of zeros; and their flags."""
    shrink: Callable[[memoryview], bytes] = partial(zlib.compress, level=1)
    if compression == "zstd":
        import zstandard  # noqa: PLC0415  no other format needs it

        shrink = zstandard.ZstdCompressor(level=1).compress
    full = filled(content)
    out: list[bytes | None] = []
    flags = np.zeros(len(content), np.uint64)
    for row, page in enumerate(content):
        small = shrink(page.data) if full[row] else None
        if small is not None and len(small) < PAGE_SIZE:
            flags[row] = FLAGS[compression]
        elif small is not None:
            small = page.tobytes()
        out.append(small)
    return out, flags
