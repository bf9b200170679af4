"""Lays out the symbol table that a BSD kernel expects after itself.

The note BSD_SYMTAB asks for it. The layout is libelf's.

After the kernel come a 32-bit size and a small ELF file: header, three section headers, symbols and strings.

Source: xen.git:xen/common/libelf/libelf-loader.c elf_parse_bsdsyms(), elf_load_bsdsyms()
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Self

from xenpv.abi.declare import Width
from xenpv.abi.x86 import PAGE_SIZE
from xenpv.errors import ImageError
from xenpv.image.elf import SHT_STRTAB, SHT_SYMTAB, Elf, Section

_SIZE = struct.Struct("<I")
_EHDR_ROOM = 64  # libelf reserves as much for both widths
_SECTIONS = 3  # none, symbols, strings
_SHDR_ROOM = 64
_EHDR: dict[Width, struct.Struct] = {8: struct.Struct("<24sQQQIHHHHHH"), 4: struct.Struct("<24sIIIIHHHHHH")}
_SHDR: dict[Width, struct.Struct] = {8: struct.Struct("<24sQQI20s"), 4: struct.Struct("<16sIII12s")}
_EV_CURRENT = 1
_STRINGS = 2  # number of the strings' section


@dataclass(frozen=True, slots=True)
class Symbols:
    """A symbol table to load.

    Attributes:
        start: paddr of its first byte.
        stop: paddr after the space that is reserved for it.
        pieces: The bytes to load, each with its offset from ``start``.
        truncated: Whether a piece does not fit and is left out. As in libelf, the space reserved for a 32-bit file is
            68 bytes too small.
    """

    start: int
    stop: int
    pieces: tuple[tuple[int, bytes | memoryview], ...]
    truncated: bool

    @classmethod
    def from_elf(cls, elf: Elf) -> Self | None:
        """Return the symbol table of a kernel; None if the file has none with strings.

        Raises:
            ImageError: The symbols or their strings lie beyond the file.
        """
        symtab = next((s for s in elf.sections[1:] if s.type == SHT_SYMTAB), None)
        if symtab is None or not 0 < symtab.link < len(elf.sections):
            return None
        strtab = elf.sections[symtab.link]
        if strtab.type != SHT_STRTAB:
            return None
        content, strings = _section_content(elf, symtab), _section_content(elf, strtab)
        width, base = elf.width, elf.paddr_range.start
        room = _align_up(_SIZE.size + _EHDR_ROOM + _SIZE.size + _SECTIONS * _SHDR[width].size, width)
        room = _align_up(room + len(content), width)
        room = _align_up(room + len(strings), width)
        start = _align_up(elf.paddr_range.stop, width)
        # Offsets are aligned in memory, the start by paddr, which differs for a kernel at an odd paddr.
        table_offset = start - base
        symbols_at = _align_up(table_offset + _SIZE.size + _EHDR_ROOM + _SECTIONS * _SHDR_ROOM, width)
        strings_at = _align_up(symbols_at + len(content), width)
        header = table_offset + _SIZE.size
        head = _SIZE.pack(strings_at + len(strings) - header) + _file_header(elf).ljust(_EHDR_ROOM, b"\0")
        head += bytes(_SHDR[width].size)
        head += _section_header(elf, symtab, symbols_at - header, _STRINGS)
        head += _section_header(elf, strtab, strings_at - header, strtab.link)
        end = -(-(table_offset + room) // PAGE_SIZE) * PAGE_SIZE
        placed = ((symbols_at, content), (strings_at, strings), (table_offset, head))
        pieces = tuple((offset - table_offset, data) for offset, data in placed if offset + len(data) <= end)
        return cls(start, start + room, pieces, len(pieces) < len(placed))


def _section_content(elf: Elf, section: Section) -> memoryview:
    if section.offset + section.size > len(elf.data):
        raise ImageError(
            f"section {section.name!r} lies beyond the file: sh_offset {section.offset:#x} and sh_size "
            f"{section.size:#x} of a file of {len(elf.data):#x} bytes; BSD_SYMTAB asks for it",
            note="BSD_SYMTAB",
        )
    return elf.data[section.offset : section.offset + section.size]


def _file_header(elf: Elf) -> bytes:
    """Return the file's own header, changed for three section headers only."""
    form = _EHDR[elf.width]
    head, entry, _, _, flags, *_ = form.unpack_from(elf.data)
    head = head[:20] + _SIZE.pack(_EV_CURRENT)
    return form.pack(head, entry, 0, _EHDR_ROOM, flags, form.size, 0, 0, _SHDR[elf.width].size, _SECTIONS, 0)


def _section_header(elf: Elf, section: Section, offset: int, link: int) -> bytes:
    """Return a section's header with another offset and link."""
    form = _SHDR[elf.width]
    head, _, size, _, tail = form.unpack_from(elf.data, section.header)
    return form.pack(head, offset, size, link, tail)


def _align_up(n: int, align: int) -> int:
    return -(-n // align) * align
