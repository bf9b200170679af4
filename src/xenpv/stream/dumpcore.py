"""The headers of a core that `xl dump-core` wrote, parsed without I/O.

They are ELF sections and Xen's notes, which may be hostile.

xen.git:docs/misc/dump-core-format.txt; the writer is tools/libs/guest/xg_core.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xenpv.abi import dumpcore as abi
from xenpv.abi.declare import Width
from xenpv.abi.x86 import PAGE_SIZE
from xenpv.errors import Unsupported
from xenpv.findings import Rule, Severity
from xenpv.stream import rules

FORMAT = "docs/misc/dump-core-format.txt"
SECTION = Rule("core-section", "a core has its sections, each within the file", FORMAT)
COUNTS = Rule("core-counts", "sections are as large as the numbers of pages and vcpus demand", FORMAT)
NOTES = Rule("core-notes", "a core has the notes that say what it is", FORMAT)
ORDER = Rule("core-order", "pages are listed in ascending order of pfn", FORMAT, Severity.WARNING)
REPEATED = Rule("core-repeated", "no pfn and no mfn is listed twice", FORMAT, Severity.WARNING)
RANGE = Rule("core-range", "pfns and mfns are numbers that a page-table entry can hold", FORMAT, Severity.WARNING)

_NOTES_MAX = 1 << 16
_HEADERS_MAX = 1 << 22  # bytes of section headers: the 65535 that ELF allows, of 64 bytes each
_STRINGS_MAX = 1 << 16

Report = Callable[[Rule, str, int], None]
"""report(rule, message, offset): called for each breach of a rule; raises if reading shall end there."""

ReadAt = Callable[[int, int], bytes]
"""read_at(offset, size): those bytes of the file; fewer where it ends."""


@dataclass(frozen=True, slots=True)
class Section:
    """A section of a core, as far as it lies within the file.

    Attributes:
        offset: where it begins.
        size: bytes.
        entry_size: bytes of an element, by its header; 0 if the header does not say.
    """

    offset: int
    size: int
    entry_size: int = 0


_NO_SECTION = Section(0, 0)


@dataclass(frozen=True, slots=True)
class CoreLayout:
    """The facts in the headers of a core.

    Attributes:
        width: bytes of the guest's unsigned long.
        hvm: whether it is an HVM domain.
        xen: the version of Xen.
        vcpus: vcpus whose contexts lie within the file.
        context_size: bytes of one vcpu's context.
        announced: pages by the header note.
        listed: pages of the list that lie within the file.
        present: listed pages whose content lies within the file.
        prstatus: the vcpus' contexts.
        shared_info: the shared info page.
        table: the list of pages.
        content: the pages.
    """

    width: Width
    hvm: bool
    xen: str
    vcpus: int
    context_size: int
    announced: int
    listed: int
    present: int
    prstatus: Section
    shared_info: Section
    table: Section
    content: Section

    @property
    def entry_size(self) -> int:
        """Bytes of an entry of ``table``: pfn and mfn for PV, pfn for HVM."""
        return abi.PFN_ENTRY if self.hvm else abi.P2M_ENTRY


def is_core(head: bytes) -> bool:
    """Return whether a file that begins so is an ELF core of any kind.

    ``head``: 18 bytes or more.
    """
    return head[:4] == abi.ELF_MAGIC and head[16:18] == abi.ET_CORE.to_bytes(2, "little")


def read_core_layout(read_at: ReadAt, size: int, report: Report) -> CoreLayout:
    """Read the headers of a core.

    Args:
        read_at: reads the file.
        size: bytes of the file.
        report: called for each breach of a rule.

    Raises:
        Unsupported: the file is no core of `xl dump-core`.
        StreamError: the section headers cannot be read.
    """
    width, sections = _read_sections(read_at, size, report)
    note_offset = sections[abi.SEC_NOTE].offset
    header, xen = _read_notes(read_at, sections[abi.SEC_NOTE])
    if header is None:
        report(NOTES, "the note with the numbers of pages and vcpus (XEN_ELFNOTE_DUMPCORE_HEADER) is missing", 0)
        raise Unsupported("a core without its header note cannot be read", offset=note_offset)
    magic, vcpus, pages, page_size = header
    if magic not in {abi.XC_CORE_MAGIC, abi.XC_CORE_MAGIC_HVM}:
        raise Unsupported(f"xch_magic is {magic:#x}: neither a PV nor an HVM core", offset=note_offset)
    if page_size != PAGE_SIZE:
        raise Unsupported(f"a core with pages of {page_size} bytes", offset=note_offset)
    hvm = magic == abi.XC_CORE_MAGIC_HVM
    table_name, entry_size = (abi.SEC_PFN, abi.PFN_ENTRY) if hvm else (abi.SEC_P2M, abi.P2M_ENTRY)
    table, content = sections.get(table_name, _NO_SECTION), sections.get(abi.SEC_PAGES, _NO_SECTION)
    for name, section in ((table_name, table), (abi.SEC_PAGES, content)):
        if not section.offset:
            report(SECTION, f"section {name} is missing, so no page has a pfn and content", 0)
    listed = min(pages, table.size // entry_size)
    present = min(listed, content.size // PAGE_SIZE)
    if listed < pages:
        report(COUNTS, f"{pages} pages are announced, and {listed} are listed", table.offset)
    if present < pages:
        report(COUNTS, f"{pages} pages are announced, and {present} have content", content.offset)
    prstatus = sections.get(abi.SEC_PRSTATUS, _NO_SECTION)
    context_size = prstatus.entry_size or (prstatus.size // vcpus if vcpus else 0)
    contexts = prstatus.size // context_size if context_size else 0
    if contexts < vcpus:
        report(COUNTS, f"{vcpus} vcpus are announced, and {contexts} have a context", prstatus.offset)
    return CoreLayout(
        width=width,
        hvm=hvm,
        xen=xen,
        vcpus=min(vcpus, contexts),
        context_size=context_size,
        announced=pages,
        listed=listed,
        present=present,
        prstatus=prstatus,
        shared_info=sections.get(abi.SEC_SHARED_INFO, _NO_SECTION),
        table=table,
        content=content,
    )


def _read_sections(read_at: ReadAt, size: int, report: Report) -> tuple[Width, dict[str, Section]]:
    """Return the guest's width, and the sections by name."""
    head = read_at(0, abi.EHDR.size)
    if len(head) < abi.EHDR.size:
        raise rules.breach(rules.TRUNCATED, f"the ELF header is cut short at {len(head)} bytes", offset=0, record=None)
    if head[4] != abi.ELFCLASS64 or head[5] != abi.ELFDATA2LSB:
        message = f"an ELF file of class {head[4]} and encoding {head[5]}; cores of xl are 64-bit and little-endian"
        raise Unsupported(message, offset=4)
    kind, machine, _, _, _, sections_offset, _, _, _, _, stride, count, strings = abi.EHDR.unpack(head)
    widths: dict[int, Width] = {abi.EM_X86_64: 8, abi.EM_386: 4}
    if kind != abi.ET_CORE or machine not in widths:
        raise Unsupported(f"an ELF file of type {kind} for machine {machine}, not a core of an x86 domain", offset=16)
    raw = read_at(sections_offset, min(stride * count, _HEADERS_MAX))
    if stride < abi.SHDR.size or len(raw) < stride * count or strings >= count:
        if not count:
            raise Unsupported("an ELF core without sections: no core of xl dump-core", offset=0x3C)
        message = f"{count} section headers of {stride} bytes at {sections_offset:#x}, names in section {strings}"
        raise rules.breach(
            SECTION, f"{message}, are not within the file of {size:#x} bytes", offset=sections_offset, record=None
        )
    headers = [abi.SHDR.unpack_from(raw, i * stride) for i in range(count)]
    names = read_at(headers[strings][4], min(headers[strings][5], _STRINGS_MAX))
    if not names:
        message = (
            f"the core is cut short at {size:#x}: the names of its sections should be at {headers[strings][4]:#x}, "
            "and it has no list of its pages"
        )
        raise rules.breach(rules.TRUNCATED, message, offset=size, record=None)
    sections: dict[str, Section] = {}
    for i, (name_at, _, _, _, offset, length, _, _, _, entry_size) in enumerate(headers):
        name = names[name_at : name_at + 32].partition(b"\0")[0].decode("latin-1")
        if name not in _KNOWN_SECTIONS or name in sections:
            continue
        available = max(0, min(length, size - offset))
        if available < length:
            message = f"{name} is at {offset:#x} and has {length:#x} bytes, and the file ends at {size:#x}"
            report(SECTION, message, sections_offset + i * stride)
        sections[name] = Section(min(offset, size), available, entry_size)
    if abi.SEC_NOTE not in sections:
        raise Unsupported(f"an ELF core without {abi.SEC_NOTE}: no core of xl dump-core", offset=sections_offset)
    return widths[machine], sections


_KNOWN_SECTIONS = {
    abi.SEC_NOTE,
    abi.SEC_PRSTATUS,
    abi.SEC_SHARED_INFO,
    abi.SEC_P2M,
    abi.SEC_PFN,
    abi.SEC_PAGES,
}


def _read_notes(read_at: ReadAt, section: Section) -> tuple[tuple[int, ...] | None, str]:
    """Return the numbers of the header note, and the version of Xen.

    The numbers are None if the note is missing.
    """
    data = read_at(section.offset, min(section.size, _NOTES_MAX))
    header, xen, offset = None, "", 0
    while offset + abi.NOTE.size <= len(data):
        name_size, size, kind = abi.NOTE.unpack_from(data, offset)
        desc_offset = offset + abi.NOTE.size + -(-name_size // 4) * 4
        desc = data[desc_offset : desc_offset + size]
        offset = desc_offset + -(-size // 4) * 4
        if len(desc) < size:
            break
        if kind == abi.XEN_ELFNOTE_DUMPCORE_HEADER and size >= abi.HEADER_DESC.size:
            header = abi.HEADER_DESC.unpack_from(desc)
        elif kind == abi.XEN_ELFNOTE_DUMPCORE_XEN_VERSION and size >= abi.XEN_VERSION_DESC.size:
            major, minor, extra = abi.XEN_VERSION_DESC.unpack_from(desc)
            xen = f"{major}.{minor}" + extra.partition(b"\0")[0].decode("latin-1")
        elif kind == abi.XEN_ELFNOTE_DUMPCORE_FORMAT_VERSION and size >= abi.FORMAT_VERSION_DESC.size:
            (version,) = abi.FORMAT_VERSION_DESC.unpack_from(desc)
            if version >> 32:
                message = f"dump-core format {version >> 32}.{version & 0xFFFF_FFFF}; only 0.1 is known"
                raise Unsupported(message, offset=section.offset)
    return header, xen
