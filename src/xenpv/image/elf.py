"""Reads the headers of an ELF file as a kernel loader does.

These are the file header, program headers and section headers.

Offsets, addresses and sizes are in bytes. Nothing in the file is trusted: a header or a segment beyond the file's end
is an ImageError. As in Xen, both header tables must be in the file, even if nothing needs them.

Source: xen.git:xen/common/libelf/libelf-loader.c elf_init()
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from dataclasses import dataclass
from typing import Self

from xenpv.abi.declare import Width
from xenpv.errors import ImageError

EM_386 = 3
EM_X86_64 = 62
_MACHINES = {EM_386: "i386", 8: "MIPS", 21: "PowerPC64", 22: "S390", 40: "ARM", EM_X86_64: "x86-64", 183: "AArch64",
             243: "RISC-V", 258: "LoongArch"}  # fmt: skip

ET_CORE = 4
PT_LOAD = 1
PT_NOTE = 4
PF_X, PF_W, PF_R = 1, 2, 4
SHT_SYMTAB = 2
SHT_STRTAB = 3
SHT_NOTE = 7
SHT_NOBITS = 8
_NAME_MAX = 64  # bytes of a section's name that are read; the one that Xen looks for has 11

# After e_ident: type machine version entry phoff shoff flags ehsize phentsize phnum shentsize shnum shstrndx
_EHDR: dict[Width, struct.Struct] = {8: struct.Struct("<16xHHIQQQIHHHHHH"), 4: struct.Struct("<16xHHIIIIIHHHHHH")}
_PHDR: dict[Width, struct.Struct] = {8: struct.Struct("<IIQQQQQQ"), 4: struct.Struct("<8I")}
_SHDR: dict[Width, struct.Struct] = {8: struct.Struct("<IIQQQQIIQQ"), 4: struct.Struct("<10I")}


@dataclass(frozen=True, slots=True)
class ElfSegment:
    """A program header. ``filesz`` bytes at ``offset`` go to ``paddr``.

    Up to ``memsz`` zeroes follow.
    """

    type: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    flags: int
    align: int

    @property
    def loadable(self) -> bool:
        """Whether Xen's loaders load it.

        They load PT_LOAD segments with any permission, as elf_phdr_is_loadable().
        """
        return self.type == PT_LOAD and bool(self.flags & (PF_R | PF_W | PF_X))

    @property
    def flag_names(self) -> str:
        """The permissions, for a table: "R E", "RW "."""
        return "".join(name if self.flags & bit else " " for bit, name in ((PF_R, "R"), (PF_W, "W"), (PF_X, "E")))


@dataclass(frozen=True, slots=True)
class Section:
    """A section header. ``header`` is its own offset in the file.

    Names are cut after 64 bytes.
    """

    header: int
    name: str
    type: int
    addr: int
    offset: int
    size: int
    link: int


@dataclass(frozen=True, slots=True)
class Elf:
    """The headers of an ELF file.

    Attributes:
        data: The file.
        width: 8 for a 64-bit file, 4 for a 32-bit file.
        machine: e_machine.
        entry: e_entry.
        segments: All program headers.
        sections: All section headers.
        load_segments: The program headers that Xen's loaders load.
        paddr_range: The paddrs from the first to the last byte of these; empty if there are none.
    """

    data: memoryview
    width: Width
    machine: int
    entry: int
    segments: tuple[ElfSegment, ...]
    sections: tuple[Section, ...]
    load_segments: tuple[ElfSegment, ...]
    paddr_range: range

    @classmethod
    def parse(cls, data: memoryview) -> Self:
        """Read the headers of a file that begins with the ELF magic.

        Raises:
            ImageError: A header is damaged, or lies beyond the file.
        """
        if len(data) < 16:
            raise ImageError(f"the ELF header is cut short: {len(data)} bytes of 52 or more", offset=0)
        if data[5] != 1:
            raise ImageError(f"ELF data encoding {data[5]} (EI_DATA); x86 kernels are little-endian, 1", offset=5)
        if data[4] not in {1, 2}:
            raise ImageError(f"ELF class {data[4]} (EI_CLASS) is neither 1 (32-bit) nor 2 (64-bit)", offset=4)
        width: Width = 8 if data[4] == 2 else 4
        header = _EHDR[width]
        if len(data) < header.size:
            raise ImageError(f"the ELF header is cut short: {len(data)} bytes of {header.size}", offset=0)
        elf_type, machine, _, entry, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, shstrndx = (
            header.unpack_from(data)
        )
        if elf_type == ET_CORE:
            raise ImageError("the file is a core dump (ELF type ET_CORE), not a kernel", offset=16)
        segments = tuple(
            _to_segment(width, _PHDR[width].unpack_from(data, header_offset))
            for header_offset in _header_offsets("program", data, phoff, phentsize, phnum, size=_PHDR[width].size)
        )
        headers = _header_offsets("section", data, shoff, shentsize, shnum, size=_SHDR[width].size)
        raw = [_SHDR[width].unpack_from(data, header_offset) for header_offset in headers]
        strings = raw[shstrndx][4] if shstrndx < len(raw) else len(data)
        sections = tuple(
            Section(header_offset, _section_name(data, strings + name), type_, addr, offset, size, link)
            for header_offset, (name, type_, _, addr, offset, size, link, *_) in zip(headers, raw, strict=True)
        )
        for i, segment in enumerate(segments):
            _check_segment(i, segment, width, len(data))
        loads = tuple(segment for segment in segments if segment.loadable)
        start = min((s.paddr for s in loads), default=0)
        paddrs = range(start, max((s.paddr + s.memsz for s in loads), default=0))
        return cls(data, width, machine, entry, segments, sections, loads, paddrs)

    @property
    def machine_name(self) -> str:
        """The name of the machine: "x86-64"."""
        return _MACHINES.get(self.machine, f"machine {self.machine}")

    def overlaps(self) -> list[tuple[ElfSegment, ElfSegment]]:
        """Return pairs of load segments that overlap in memory."""
        loads = sorted((s for s in self.load_segments if s.memsz), key=lambda s: s.paddr)
        starts = [s.paddr for s in loads]
        pairs = []
        for i, segment in enumerate(loads):
            end = bisect_right(starts, segment.paddr + segment.memsz - 1)
            if end > i + 1:
                pairs.append((segment, loads[i + 1]))
        return pairs

    def section(self, name: str) -> Section | None:
        """Return the first section of that name, not counting number 0."""
        return next((section for section in self.sections[1:] if section.name == name), None)


def _to_segment(width: Width, raw: tuple[int, ...]) -> ElfSegment:
    if width == 8:
        type_, flags, offset, vaddr, paddr, filesz, memsz, align = raw
    else:
        type_, offset, vaddr, paddr, filesz, memsz, flags, align = raw
    return ElfSegment(type_, offset, vaddr, paddr, filesz, memsz, flags, align)


def _check_segment(i: int, segment: ElfSegment, width: Width, size: int) -> None:
    """Check that a segment to load lies within the file and does not wrap around."""
    if not segment.loadable:
        return
    name = f"program header {i} (PT_LOAD)"
    if segment.filesz and segment.offset + segment.filesz > size:
        raise ImageError(
            f"{name} lies beyond the file: p_offset {segment.offset:#x} and p_filesz {segment.filesz:#x} of a file of "
            f"{size:#x} bytes"
        )
    if segment.filesz > segment.memsz:
        raise ImageError(f"{name}: p_filesz {segment.filesz:#x} is more than p_memsz {segment.memsz:#x}")
    if segment.paddr + segment.memsz > 1 << 8 * width:
        raise ImageError(
            f"{name} wraps around the end of addresses: p_paddr {segment.paddr:#x} and p_memsz {segment.memsz:#x}"
        )


def _header_offsets(name: str, data: memoryview, offset: int, stride: int, count: int, *, size: int) -> range:
    """Return the offset of each header of a table, which must lie in the file."""
    if count == 0:
        return range(0)
    if stride < size:
        raise ImageError(f"{name} headers have {stride} bytes, and need {size}", offset=offset)
    if offset + stride * count > len(data):
        raise ImageError(
            f"the {name} headers lie beyond the file: {count} of {stride} bytes from {offset:#x} on, in a file of "
            f"{len(data):#x} bytes; is it cut short?"
        )
    return range(offset, offset + stride * count, stride)


def _section_name(data: memoryview, offset: int) -> str:
    """Return the string at a byte offset."""
    return bytes(data[offset : offset + _NAME_MAX]).partition(b"\0")[0].decode("latin-1")
