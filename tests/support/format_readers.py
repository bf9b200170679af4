"""Second readers of the formats that have no library: plain Python from the formats' own descriptions."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import zstandard
from elftools.elf.elffile import ELFFile

PAGE = 4096


def parse_elf(file: BinaryIO) -> Any:
    """Parse a file by pyelftools."""
    return ELFFile(file)  # type: ignore[no-untyped-call]


def parse_lime(data: bytes) -> dict[int, bytes]:
    """Return page content by pfn: ranges after headers of magic, version, first and last address."""
    out, at = {}, 0
    while at < len(data):
        magic, version, first, last, reserved = struct.unpack_from("<IIQQQ", data, at)
        assert (magic, version, reserved) == (0x4C694D45, 1, 0)
        at += 32
        for address in range(first, last + 1, PAGE):
            out[address // PAGE] = data[at : at + PAGE]
            at += PAGE
    return out


@dataclass
class Kdump:
    """A kdump-compressed file."""

    data: bytes

    def __post_init__(self) -> None:
        (signature, self.version) = struct.unpack_from("<8si", self.data)
        assert signature == b"KDUMP   "
        names = struct.unpack_from("<65s65s65s65s65s65s", self.data, 12)
        self.uts = [name.split(b"\0")[0].decode() for name in names]
        (self.status, size, self.sub_blocks, self.bitmap_blocks, self.max_mapnr) = struct.unpack_from(
            "<IiiII", self.data, 424
        )
        assert size == PAGE
        (self.vcpus,) = struct.unpack_from("<i", self.data, 460)
        sub = struct.unpack_from("<QiiQQqQqQqQQQQ", self.data, PAGE)
        self.text = self.data[sub[5] : sub[5] + sub[6]]
        self.notes = self.data[sub[7] : sub[7] + sub[8]]
        self.end = sub[13]

    def bitmap(self, which: int) -> list[int]:
        """The pfns whose bit is set."""
        half = self.bitmap_blocks // 2 * PAGE
        begin = (1 + self.sub_blocks) * PAGE + which * half
        bits = self.data[begin : begin + half]
        return [byte * 8 + bit for byte, value in enumerate(bits) if value for bit in range(8) if value >> bit & 1]

    def pages(self) -> Iterator[tuple[int, bytes]]:
        at = (1 + self.sub_blocks + self.bitmap_blocks) * PAGE
        for row, pfn in enumerate(self.bitmap(1)):
            offset, size, flags, page_flags = struct.unpack_from("<qIIQ", self.data, at + row * 24)
            assert page_flags == 0
            content = self.data[offset : offset + size]
            if flags == 1:
                content = zlib.decompress(content)
            elif flags == 0x20:
                content = zstandard.decompress(content, PAGE)
            assert len(content) == PAGE
            yield pfn, content


def look_up_identity(page: dict[int, bytes], root: int, pfn: int) -> int:
    """Look a pfn up in a tree of three levels, as crash does."""
    frame = root
    for index in (pfn >> 18, pfn >> 9 & 511, pfn & 511):
        (frame,) = struct.unpack_from("<Q", page[frame], index * 8)
        assert frame, "nothing"  # to libkdumpfile
    return frame if frame == (1 << 64) - 1 else frame & ~(1 << 63)
