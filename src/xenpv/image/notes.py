"""Reads a kernel's Xen ELF notes, or the older __xen_guest string.

Source: xen.git:xen/include/public/elfnote.h for numbers, names and meanings,
xen.git:xen/common/libelf/libelf-dominfo.c elf_xen_parse() for places and formats
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from xenpv.errors import ImageError
from xenpv.image.elf import PT_NOTE, SHT_NOBITS, SHT_NOTE, Elf, Section

NOTES_MAX = 65536  # ELF_MAX_TOTAL_NOTE_COUNT
STRING_MAX = 4096  # ELF_MAX_STRING_LENGTH
OWNER = b"Xen\0"


class NoteForm(StrEnum):
    """The format of a note's content."""

    NUMBER = "number"
    STRING = "string"
    PAIRS = "mask and value pairs"
    WORDS = "32-bit words"
    BYTES = "bytes"


@dataclass(frozen=True, slots=True)
class NoteType:
    """A type of note: name in elfnote.h without ``XEN_ELFNOTE_``, format and meaning."""

    name: str
    form: NoteForm
    meaning: str


INFO, ENTRY, HYPERCALL_PAGE, VIRT_BASE, PADDR_OFFSET, XEN_VERSION, GUEST_OS, GUEST_VERSION, LOADER = range(9)
PAE_MODE, FEATURES, BSD_SYMTAB, HV_START_LOW, L1_MFN_VALID, SUSPEND_CANCEL, INIT_P2M, MOD_START_PFN = range(9, 17)
SUPPORTED_FEATURES, PHYS32_ENTRY, PHYS32_RELOC = range(17, 20)

NOTES = {
    INFO: NoteType("INFO", NoteForm.STRING, "a NAME=VALUE pair"),
    ENTRY: NoteType("ENTRY", NoteForm.NUMBER, "virtual address where vcpu 0 starts as PV"),
    HYPERCALL_PAGE: NoteType(
        "HYPERCALL_PAGE", NoteForm.NUMBER, "virtual address of the page that Xen fills with calls"
    ),
    VIRT_BASE: NoteType("VIRT_BASE", NoteForm.NUMBER, "virtual address at which pfn 0 is mapped"),
    PADDR_OFFSET: NoteType("PADDR_OFFSET", NoteForm.NUMBER, "what to subtract from the segments' paddr"),
    XEN_VERSION: NoteType("XEN_VERSION", NoteForm.STRING, "the Xen ABI that the kernel is for"),
    GUEST_OS: NoteType("GUEST_OS", NoteForm.STRING, "name of the operating system"),
    GUEST_VERSION: NoteType("GUEST_VERSION", NoteForm.STRING, "version of the operating system"),
    LOADER: NoteType("LOADER", NoteForm.STRING, "the loader that the kernel expects"),
    PAE_MODE: NoteType("PAE_MODE", NoteForm.STRING, "32-bit: whether the kernel uses PAE page tables"),
    FEATURES: NoteType("FEATURES", NoteForm.STRING, "features that it supports, and with ! requires"),
    BSD_SYMTAB: NoteType("BSD_SYMTAB", NoteForm.STRING, "whether to load the symbol table after the kernel"),
    HV_START_LOW: NoteType("HV_START_LOW", NoteForm.NUMBER, "lowest address at which Xen's own area may begin"),
    L1_MFN_VALID: NoteType("L1_MFN_VALID", NoteForm.PAIRS, "how to tell L1 entries that hold mfns from others"),
    SUSPEND_CANCEL: NoteType("SUSPEND_CANCEL", NoteForm.NUMBER, "whether a suspend may be cancelled"),
    INIT_P2M: NoteType("INIT_P2M", NoteForm.NUMBER, "virtual address for the p2m list, outside the initial mapping"),
    MOD_START_PFN: NoteType("MOD_START_PFN", NoteForm.NUMBER, "whether the initrd may be left unmapped"),
    SUPPORTED_FEATURES: NoteType("SUPPORTED_FEATURES", NoteForm.NUMBER, "features that it supports, as bits"),
    PHYS32_ENTRY: NoteType("PHYS32_ENTRY", NoteForm.NUMBER, "physical address where vcpu 0 starts as PVH"),
    PHYS32_RELOC: NoteType("PHYS32_RELOC", NoteForm.WORDS, "PVH: may be loaded elsewhere; alignment, lowest, highest"),
    0x1000001: NoteType("CRASH_INFO", NoteForm.BYTES, "of a crash dump: the state of Xen"),
    0x1000002: NoteType("CRASH_REGS", NoteForm.BYTES, "of a crash dump: a processor's registers"),
    0x2000000: NoteType("DUMPCORE_NONE", NoteForm.BYTES, "of a domain's dump: that it is one"),
    0x2000001: NoteType("DUMPCORE_HEADER", NoteForm.BYTES, "of a domain's dump: its header"),
    0x2000002: NoteType("DUMPCORE_XEN_VERSION", NoteForm.BYTES, "of a domain's dump: the version of Xen"),
    0x2000003: NoteType("DUMPCORE_FORMAT_VERSION", NoteForm.BYTES, "of a domain's dump: the version of its format"),
}

Value = int | str | bytes | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Note:
    """One note, or one NAME=VALUE of the legacy string.

    Attributes:
        type: Number in elfnote.h; of a legacy name, that of the note that replaced it, or None.
        name: Name of the type.
        value: The content, as the type's form says.
        offset: Byte offset of the content in the ELF file.
        size: Bytes of content.
    """

    type: int | None
    name: str
    value: Value
    offset: int
    size: int

    @property
    def meaning(self) -> str:
        """The meaning of the type; "" for one that elfnote.h does not have."""
        known = None if self.type is None else NOTES.get(self.type)
        return known.meaning if known else ""


class NoteSource(StrEnum):
    """Where a kernel has its notes."""

    SEGMENT = "PT_NOTE"
    SECTION = "SHT_NOTE"
    LEGACY = "__xen_guest"
    NONE = ""


class KernelNotes(NamedTuple):
    """Xen's notes of a kernel, where they are, and remarks about damaged ones."""

    notes: tuple[Note, ...]
    source: NoteSource
    remarks: tuple[str, ...] = ()


def read_notes(elf: Elf) -> KernelNotes:
    """Return Xen's notes from the first of three places that has any.

    The places are PT_NOTE segments, SHT_NOTE sections, and the section __xen_guest. A PT_NOTE segment at offset 0 is an
    error of old binutils, and is ignored. No note refuses a kernel: libelf takes what it can read.

    Raises:
        ImageError: A number in __xen_guest is none.
    """
    segments = [(s.offset, s.filesz) for s in elf.segments if s.type == PT_NOTE and s.offset]
    sections = [(s.offset, s.size) for s in elf.sections[1:] if s.type == SHT_NOTE]
    walk = _NoteWalk(elf.data)
    for places, source in ((segments, NoteSource.SEGMENT), (sections, NoteSource.SECTION)):
        if notes := tuple(walk.iter_notes(places)):
            return KernelNotes(notes, source, tuple(walk.remarks))
    legacy = elf.section("__xen_guest")
    if legacy is not None and legacy.type != SHT_NOBITS:
        return KernelNotes(_parse_legacy_string(elf.data, legacy), NoteSource.LEGACY, tuple(walk.remarks))
    return KernelNotes((), NoteSource.NONE, tuple(walk.remarks))


class _NoteWalk:
    """Walks notes as libelf does.

    Source: xen.git:xen/common/libelf/libelf-dominfo.c elf_xen_parse_notes(), elf_xen_parse_note(), libelf-tools.c
    elf_note_next(), elf_note_numeric(), elf_strval()
    """

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._count = 0
        self.remarks: list[str] = []

    def iter_notes(self, places: list[tuple[int, int]]) -> Iterator[Note]:
        """Yield Xen's notes in places of (byte offset, size)."""
        for start, size in places:
            offset, end = start, start + size
            while offset < end:
                if self._count == NOTES_MAX:
                    self.remarks.append(f"only the first {NOTES_MAX} notes count")
                    return
                self._count += 1
                header = self._data[offset : offset + 12]
                if len(header) < 12:
                    self.remarks.append(f"the notes at {start:#x} go beyond the end of the file")
                    break
                namesz, descsz, type_ = struct.unpack("<III", header)
                content = offset + 12 + _align4(namesz)
                if bytes(self._data[offset + 12 : offset + 16]) == OWNER and content < len(self._data):
                    note = self._parse(type_, content, descsz)
                    if note is not None:
                        yield note
                after = content + _align4(descsz)
                if content + descsz > end:
                    self.remarks.append(
                        f"the note at {offset:#x} has namesz {namesz:#x} and descsz {descsz:#x}, which goes beyond "
                        f"{end:#x}, the end of the notes; none can follow"
                    )
                offset = after

    def _parse(self, type_: int, offset: int, size: int) -> Note | None:
        """Return a note; None for a string that has no end."""
        data, known = self._data, NOTES.get(type_, NoteType(f"{type_:#x}", NoteForm.BYTES, ""))
        value: Value | None
        match known.form:
            case NoteForm.NUMBER:
                content = data[offset : offset + size]
                value = int.from_bytes(content, "little") if len(content) == size and size in {1, 2, 4, 8} else 0
                if size not in {1, 2, 4, 8}:
                    self.remarks.append(f"{known.name} has a number of {size} bytes, which counts as 0")
            case NoteForm.STRING:
                value = _read_string(data, offset)
                if value is None:
                    self.remarks.append(f"{known.name} is left out: its string does not end within {STRING_MAX} bytes")
                    return None
            case NoteForm.PAIRS if (
                size and size % 8 == 0
            ):  # of maddr_t, which has 4 bytes only in an i386 kernel without PAE
                value = tuple(
                    int.from_bytes(data[i : i + 8], "little") for i in range(offset, offset + min(size, STRING_MAX), 8)
                )
            case NoteForm.WORDS if size % 4 == 0:
                value = tuple(
                    int.from_bytes(data[i : i + 4], "little") for i in range(offset, offset + min(size, 12), 4)
                )
            case _:
                value = bytes(data[offset : offset + min(size, STRING_MAX)])
        return Note(type_, known.name, value, offset, size)


def _align4(n: int) -> int:
    """Return a size rounded up to 4, in 32 bits as libelf's."""
    return n + 3 & 0xFFFF_FFFC


def _read_string(data: memoryview, offset: int) -> str | None:
    """Read a string up to a 0, even after the end of the note.

    None if there is no 0 within STRING_MAX bytes.
    """
    text, zero, _ = bytes(data[offset : offset + STRING_MAX + 1]).partition(b"\0")
    return text.decode("latin-1") if zero else None


# --- the legacy string -----------------------------------------------------------------------------------------------

# The note type of each name, and whether its value is a number; by the "LEGACY:" comments of elfnote.h.
_LEGACY: dict[str, tuple[int, bool]] = {
    "VIRT_ENTRY": (ENTRY, True),
    "HYPERCALL_PAGE": (HYPERCALL_PAGE, True),
    "VIRT_BASE": (VIRT_BASE, True),
    "ELF_PADDR_OFFSET": (PADDR_OFFSET, True),
    "XEN_VER": (XEN_VERSION, False),
    "GUEST_OS": (GUEST_OS, False),
    "GUEST_VER": (GUEST_VERSION, False),
    "LOADER": (LOADER, False),
    "PAE": (PAE_MODE, False),
    "FEATURES": (FEATURES, False),
    "BSD_SYMTAB": (BSD_SYMTAB, False),
}
_NUMBER = re.compile(r"\s*(?:0[xX](?P<hex>[0-9a-fA-F]+)|(?P<octal>0[0-7]*)|(?P<decimal>[1-9][0-9]*))", re.ASCII)


def _parse_legacy_string(data: memoryview, section: Section) -> tuple[Note, ...]:
    """Parse NAME=VALUE,NAME=VALUE… up to a 0 or the section's end."""
    text = bytes(data[section.offset : section.offset + min(section.size, STRING_MAX)]).partition(b"\0")[0]
    notes, offset = [], section.offset
    for item in text.decode("latin-1").split(","):
        name, _, value = item.partition("=")
        if name:
            type_, is_number = _LEGACY.get(name, (None, False))
            content = offset + len(name) + 1
            parsed: Value = _parse_number(value, content, name) if is_number else value
            notes.append(Note(type_, name, parsed, content, len(value)))
        offset += len(item) + 1
    return tuple(notes)


def _parse_number(text: str, offset: int, name: str) -> int:
    """Parse a number as C's strtoull() does with base 0.

    An empty text is an error, however.
    """
    match = _NUMBER.match(text)
    if match is None:
        raise ImageError(f"{text!a} is not a number", offset=offset, note=name)
    for digits, base in ((match["hex"], 16), (match["octal"], 8), (match["decimal"], 10)):
        if digits is not None and len(digits) <= 64:
            return min(int(digits, base), (1 << 64) - 1)
    raise ImageError(f"a number of {len(text)} digits", offset=offset, note=name)
