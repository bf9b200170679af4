"""The headers and page compression of makedumpfile's kdump-compressed format.

It writes version 6 ("KDUMP   ").

In order, in blocks of 4096 bytes: a header; a sub-header followed by the notes; a bitmap of the pages in memory and one
of those in the file, which are equal here; a descriptor for each page; the pages.

Source: makedumpfile, IMPLEMENTATION ("The kdump-compressed format"), diskdump_mod.h.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from xenpv.export.formats import notes
from xenpv.export.formats.content import Hole, padded
from xenpv.export.formats.job import UTSNAME_SIZE, ExportJob
from xenpv.frames import PAGE_SIZE, U8, U64, nonzero_pages
from xenpv.memory.vmcoreinfo import vmcoreinfo_value
from xenpv.runs import Runs

DESCRIPTOR = np.dtype([("offset", "<i8"), ("size", "<u4"), ("flags", "<u4"), ("page_flags", "<u8")])
COMPRESSION_FLAGS = {"zlib": 0x1, "zstd": 0x20}  # DUMP_DH_COMPRESSED_*, in the header and in each smaller page's flags
_HEADER = struct.Struct("<8si390s6xqqIiiIIIIIIi4x")  # … status, block size, sub-header's and bitmaps' blocks, …, cpus
_SUB_HEADER = struct.Struct("<QiiQQqQqQqQQQQ")
_BLOCKS_PER_PIECE = 256  # 1 MiB of a bitmap
_BITS = PAGE_SIZE * 8  # bits in a block of a bitmap, one for each pfn
PFNS_MAX = (1 << 31) * _BITS - _BITS  # the header counts the blocks of both bitmaps in 32 bits


@dataclass(frozen=True)
class Header:
    """The values in front of the pages.

    Attributes:
        notes: All ELF notes.
        vmcoreinfo: The text of VMCOREINFO, which is in one of the notes; None if there is none.
        vcpus: How many of the notes are NT_PRSTATUS.
        utsname: The guest's struct new_utsname.
        compression: One of COMPRESSION_FLAGS.
        phys_base: Linux's phys_base.
    """

    notes: bytes
    vmcoreinfo: bytes | None
    vcpus: int
    utsname: bytes
    compression: str
    phys_base: int = 0

    @classmethod
    def for_job(cls, job: ExportJob, compression: str) -> Header:
        """Return the header of an export's file."""
        vmcoreinfo = job.vmcoreinfo
        all_notes = notes.prstatus_notes(job.registers, job.domain.width) + notes.vmcoreinfo_note(vmcoreinfo)
        if job.identity is not None:
            all_notes += job.identity.note()
        try:
            phys_base = int(vmcoreinfo_value(vmcoreinfo or b"", "NUMBER(phys_base)") or "0")
        except ValueError:
            phys_base = 0
        vcpus = notes.prstatus_count(job.registers)
        return cls(all_notes, vmcoreinfo, vcpus, job.utsname, compression, phys_base % (1 << 64))

    def pack(self, pages: Runs) -> bytes:
        """Return both headers and the notes."""
        text, end = self.vmcoreinfo or b"", pages.stop
        sub_header_blocks = len(padded(bytes(_SUB_HEADER.size) + self.notes)) // PAGE_SIZE
        notes_offset = PAGE_SIZE + _SUB_HEADER.size
        text_offset = notes_offset + self.notes.index(text) if text else 0
        header = _HEADER.pack(b"KDUMP   ", 6, self.utsname.ljust(UTSNAME_SIZE, b"\0"), 0, 0,
                              COMPRESSION_FLAGS[self.compression], PAGE_SIZE, sub_header_blocks, 2 * _blocks(end),
                              min(end, (1 << 32) - 1), 0, 0, 0, 0, self.vcpus)  # fmt: skip
        notes_offset = notes_offset if self.notes else 0
        sub_header = _SUB_HEADER.pack(
            self.phys_base, 0, 0, 0, 0, text_offset, len(text), notes_offset, len(self.notes), 0, 0, 0, end, end
        )
        return padded(header) + padded(sub_header + self.notes)


def bitmap(pages: Runs) -> Iterator[bytes | Hole]:
    """Yield a bit for each pfn, lowest first, up to whole blocks.

    Blocks without a page are holes.
    """
    first = pages.first.astype(np.int64)
    end, written_end = first + pages.pages, 0
    block_runs = Runs((first // _BITS).astype(np.uint64), (end - 1) // _BITS - first // _BITS + 1)
    blocks = np.unique(block_runs.pfns).astype(np.int64)
    breaks = (np.diff(blocks) != 1) | (np.arange(1, len(blocks)) % _BLOCKS_PER_PIECE == 0)
    for part in np.split(blocks, np.flatnonzero(breaks) + 1):
        low, high = int(part[0]) * _BITS, (int(part[-1]) + 1) * _BITS
        rows = slice(int(np.searchsorted(end, low, "right")), int(np.searchsorted(first, high, "left")))
        edges = np.zeros(high - low + 1, np.int8)
        edges[np.maximum(first[rows], low) - low] += 1  # runs do not touch, so no edge comes twice
        edges[np.minimum(end[rows], high) - low] -= 1
        if low > written_end:
            yield Hole((low - written_end) // 8)
        yield np.packbits(np.cumsum(edges[:-1], dtype=np.int8).view(np.bool_), bitorder="little").tobytes()
        written_end = high


def _blocks(end: int) -> int:
    return -(-end // _BITS)


def compress_pages(pages: U8, compression: str) -> tuple[list[bytes | None], U64]:
    """Compress pages one by one.

    Args:
        pages: uint8 of shape (n, 4096).
        compression: One of COMPRESSION_FLAGS.

    Returns:
        The bytes of each page, None for a page of zeros; and the flags of each descriptor, uint64 of shape (n,).
    """
    compress: Callable[[memoryview], bytes] = partial(zlib.compress, level=1)
    if compression == "zstd":
        import zstandard  # noqa: PLC0415  no other format needs it

        compress = zstandard.ZstdCompressor(level=1).compress
    not_zero = nonzero_pages(pages)
    contents: list[bytes | None] = []
    flags = np.zeros(len(pages), np.uint64)
    for row, page in enumerate(pages):
        content = compress(page.data) if not_zero[row] else None
        if content is not None and len(content) < PAGE_SIZE:
            flags[row] = COMPRESSION_FLAGS[compression]
        elif content is not None:
            content = page.tobytes()
        contents.append(content)
    return contents, flags
