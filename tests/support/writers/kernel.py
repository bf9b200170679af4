"""Writes kernels: ELF files with Xen's notes in each of their places, and the wrappings that they come in.

>>> linux = Kernel(notes=[*PV64, note(15, quad(1 << 39))])
>>> file = bzimage("xz", linux.to_bytes())
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from dataclasses import dataclass, field

import lz4.block
import zstandard

BASE = 0xFFFF_FFFF_8000_0000
COMPRESSIONS = ("gzip", "bzip2", "xz", "lzma", "zstd", "lz4")
LZ4_LEGACY = b"\x02\x21\x4c\x18"


def quad(value: int) -> bytes:
    return struct.pack("<Q", value)


def word(value: int) -> bytes:
    return struct.pack("<I", value)


def text(value: str) -> bytes:
    return value.encode() + b"\0"


def note(
    type_: int, desc: bytes, owner: bytes = b"Xen\0", *, namesz: int | None = None, descsz: int | None = None
) -> bytes:
    """One ELF note; the sizes may lie."""
    sizes = (len(owner) if namesz is None else namesz, len(desc) if descsz is None else descsz)
    return struct.pack("<III", *sizes, type_) + _pad4(owner) + _pad4(desc)


def _pad4(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


PV64 = (
    note(6, text("made")),
    note(8, text("generic")),
    note(5, text("xen-3.0")),
    note(3, quad(BASE)),
    note(1, quad(BASE + 0x10_0000)),
)
PV32 = (
    note(6, text("made")),
    note(8, text("generic")),
    note(5, text("xen-3.0")),
    note(9, text("yes")),
    note(3, word(0xC000_0000)),
    note(1, word(0xC010_0000)),
)
LEGACY = "GUEST_OS=linux,XEN_VER=xen-3.0,VIRT_BASE=0xC0000000,PAE=yes[extended-cr3],LOADER=generic"


@dataclass
class Load:
    """A PT_LOAD segment."""

    paddr: int
    content: bytes
    memsz: int
    flags: int = 5
    filesz: int | None = None
    offset: int | None = None


def _default_loads() -> list[Load]:
    return [Load(0x10_0000, b"\xc3" * 0x234, 0x234), Load(0x10_1000, b"data", 0x5000, 6)]


@dataclass
class Section:
    name: str
    type: int
    content: bytes
    link: int = 0
    offset: int | None = None
    size: int | None = None


@dataclass
class Kernel:
    """An ELF file with load segments, and notes in ``place``: "PT_NOTE", "SHT_NOTE" or, as text, "__xen_guest"."""

    notes: list[bytes] = field(default_factory=lambda: list(PV64))
    legacy: str = LEGACY
    place: str = "PT_NOTE"
    width: int = 8
    machine: int | None = None
    entry: int = BASE + 0x10_0000
    kind: int = 2
    loads: list[Load] = field(default_factory=_default_loads)
    sections: list[Section] = field(default_factory=list)
    note_offset: int | None = None

    def to_bytes(self) -> bytes:
        wide = self.width == 8
        ehsize, phentsize, shentsize = (64, 56, 64) if wide else (52, 32, 40)
        sections = list(self.sections)
        content = b"".join(self.notes)
        if self.place == "SHT_NOTE":
            sections.append(Section(".note.Xen", 7, content))
        elif self.place == "__xen_guest":
            sections.append(Section("__xen_guest", 1, text(self.legacy)))
        names = b"\0" + b"".join(text(s.name) for s in sections) + text(".shstrtab")
        sections.append(Section(".shstrtab", 3, names))
        phnum = len(self.loads) + (self.place == "PT_NOTE")
        body = bytearray()
        at = ehsize + phentsize * phnum

        def put(data: bytes) -> int:
            body.extend(bytes(-(at + len(body)) % 8) + data)
            return at + len(body) - len(data)

        headers = b""
        for load in self.loads:
            offset = put(load.content) if load.offset is None else load.offset
            filesz = len(load.content) if load.filesz is None else load.filesz
            headers += self._phdr(1, load.flags, offset, load.paddr, (filesz, load.memsz))
        if self.place == "PT_NOTE":
            offset = put(content) if self.note_offset is None else self.note_offset
            headers += self._phdr(4, 4, offset, 0, (len(content), len(content)))
        table, name = bytes(shentsize), 1
        for s in sections:
            offset = put(s.content) if s.offset is None else s.offset
            size = len(s.content) if s.size is None else s.size
            fields = (name, s.type, 0, 0, offset, size, s.link, 0, 1, 0)
            table += struct.pack("<IIQQQQIIQQ" if wide else "<10I", *fields)
            name += len(s.name) + 1
        shoff = put(table)
        machine = self.machine if self.machine is not None else 62 if wide else 3
        start = (self.kind, machine, 1, self.entry, ehsize, shoff, 0, ehsize, phentsize, phnum, shentsize)
        ident = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
        shnum = len(sections) + 1
        header = ident + struct.pack("<HHIQQQIHHHHHH" if wide else "<HHIIIIIHHHHHH", *start, shnum, shnum - 1)
        return header + headers + bytes(body)

    def _phdr(self, type_: int, flags: int, offset: int, paddr: int, sizes: tuple[int, int]) -> bytes:
        filesz, memsz = sizes
        vaddr = (paddr + (BASE if self.width == 8 else 0xC000_0000)) % (1 << 8 * self.width)
        if self.width == 8:
            return struct.pack("<IIQQQQQQ", type_, flags, offset, vaddr, paddr, filesz, memsz, 4096)
        return struct.pack("<8I", type_, offset, vaddr, paddr, filesz, memsz, flags, 4096)


def kernel32(**fields: object) -> Kernel:
    """A 32-bit PAE kernel."""
    return Kernel(**{"notes": list(PV32), "width": 4, "entry": 0xC010_0000, **fields})  # type: ignore[arg-type]


# --- wrappings -------------------------------------------------------------------------------------------------------


def pack(compression: str, data: bytes) -> bytes:
    """As the kernel's build packs it: but for gzip, which has it, the unpacked size is put behind."""
    size = word(len(data) % (1 << 32))
    match compression:
        case "gzip":
            return gzip.compress(data, 1)
        case "bzip2":
            return bz2.compress(data) + size
        case "xz":
            return lzma.compress(data, check=lzma.CHECK_CRC32, preset=0) + size
        case "lzma":
            return lzma.compress(data, lzma.FORMAT_ALONE, preset=0) + size
        case "zstd":
            return zstandard.ZstdCompressor().compress(data) + size
        case "lz4":
            return lz4_legacy(data) + size
    return data + size


def lz4_legacy(data: bytes, block: int = 8 << 20) -> bytes:
    """The legacy frame: blocks of 8 MiB, each behind its packed size."""
    out = LZ4_LEGACY
    for at in range(0, len(data), block):
        packed = lz4.block.compress(data[at : at + block], store_size=False)
        out += word(len(packed)) + packed
    return out


def bzimage(
    compression: str, kernel: bytes, *, payload: bytes | None = None, protocol: int = 0x20F, length: int | None = None
) -> bytes:
    """A bzImage of 4 setup sectors and a bit of code; ``payload`` and ``length`` may be others than what is right."""
    packed = pack(compression, kernel) if payload is None else payload
    setup = bytearray(5 * 512)
    setup[0:2] = b"MZ"
    setup[0x1F1] = 4
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, protocol)
    struct.pack_into("<H", setup, 0x20E, 0x400)
    setup[0x600:0x60D] = b"6.1.0-made #1"
    code = bytes(0x2CC)
    struct.pack_into("<II", setup, 0x248, len(code), len(packed) if length is None else length)
    return bytes(setup) + code + packed + b"tail"
