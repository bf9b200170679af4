"""The headers of a file that `xl dump-core` wrote, sans-IO: ELF sections and Xen's notes, none of them believed.

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
_HEADERS_MAX = 1 << 22  # bytes of section headers: 65535 of them, of the size that they have
_STRINGS_MAX = 1 << 16

Report = Callable[[Rule, str, int], None]
"""report(rule, message, offset): a rule was broken there; it raises where that shall end the reading."""

Read = Callable[[int, int], bytes]
"""read(offset, size): those bytes of the file, fewer where it ends."""


@dataclass(frozen=True, slots=True)
class Part:
    """A section: where it lies, how long it is as far as the file has it, and how large its elements are said to be."""

    offset: int
    size: int
    entry: int = 0


_NOTHING = Part(0, 0)


@dataclass(frozen=True, slots=True)
class Layout:
    """What the headers of a core say. ``announced``: how many pages by its header note; ``pages``: how many of them it
    lists, as far as the list lies within the file; ``present``: of how many of these it has the content, too.
    ``context``: bytes of one vcpu's context.
    """

    width: Width
    hvm: bool
    xen: str
    vcpus: int
    context: int
    announced: int
    pages: int
    present: int
    prstatus: Part
    shared_info: Part
    table: Part
    content: Part

    @property
    def entry(self) -> int:
        """Bytes of an entry in ``table``: pfn and mfn, or a pfn alone."""
        return abi.PFN_ENTRY if self.hvm else abi.P2M_ENTRY


def is_core(head: bytes) -> bool:
    """Whether a file that begins with these bytes, 18 or more, is an ELF core of any kind."""
    return head[:4] == abi.ELF_MAGIC and head[16:18] == abi.ET_CORE.to_bytes(2, "little")


def read_layout(read: Read, size: int, report: Report) -> Layout:
    """Read the headers of a core of ``size`` bytes. Raises Unsupported for what is none, and what ``report`` raises."""
    width, parts = _sections(read, size, report)
    numbers, xen = _notes(read, parts[abi.SEC_NOTE])
    if numbers is None:
        report(NOTES, "the note with the numbers of pages and vcpus (XEN_ELFNOTE_DUMPCORE_HEADER) is missing", 0)
        raise Unsupported("without its header note nothing of the core can be read", offset=parts[abi.SEC_NOTE].offset)
    magic, vcpus, pages, page_size = numbers
    if magic not in {abi.XC_CORE_MAGIC, abi.XC_CORE_MAGIC_HVM}:
        raise Unsupported(f"xch_magic is {magic:#x}: neither a PV nor an HVM core", offset=parts[abi.SEC_NOTE].offset)
    if page_size != PAGE_SIZE:
        raise Unsupported(f"a core with pages of {page_size} bytes", offset=parts[abi.SEC_NOTE].offset)
    hvm = magic == abi.XC_CORE_MAGIC_HVM
    which, entry = (abi.SEC_PFN, abi.PFN_ENTRY) if hvm else (abi.SEC_P2M, abi.P2M_ENTRY)
    table, content = parts.get(which, _NOTHING), parts.get(abi.SEC_PAGES, _NOTHING)
    for name, part in ((which, table), (abi.SEC_PAGES, content)):
        if not part.offset:
            report(SECTION, f"there is no section {name}: nobody can tell which page is which", 0)
    listed = min(pages, table.size // entry)
    present = min(listed, content.size // PAGE_SIZE)
    for what, found in (("list of pages", listed), ("page content", present)):
        if found < pages:
            part = table if what == "list of pages" else content
            report(COUNTS, f"{pages} pages are announced, and there is {what} for {found}", part.offset)
    prstatus = parts.get(abi.SEC_PRSTATUS, _NOTHING)
    context = prstatus.entry or (prstatus.size // vcpus if vcpus else 0)
    there = prstatus.size // context if context else 0
    if there < vcpus:
        report(COUNTS, f"{vcpus} vcpus are announced, and there is room for {there}", prstatus.offset)
    shared = parts.get(abi.SEC_SHARED_INFO, _NOTHING)
    return Layout(width, hvm, xen, min(vcpus, there), context, pages, listed, present, prstatus, shared, table, content)


def _sections(read: Read, size: int, report: Report) -> tuple[Width, dict[str, Part]]:
    head = read(0, abi.EHDR.size)
    if len(head) < abi.EHDR.size:
        raise rules.breach(rules.TRUNCATED, f"the ELF header is cut short at {len(head)} bytes", offset=0, record=None)
    if head[4] != abi.ELFCLASS64 or head[5] != abi.ELFDATA2LSB:
        what = f"an ELF file of class {head[4]} and encoding {head[5]}; cores of xl are 64-bit, little-endian ones"
        raise Unsupported(what, offset=4)
    kind, machine, _, _, _, at, _, _, _, _, stride, count, strings = abi.EHDR.unpack(head)
    widths: dict[int, Width] = {abi.EM_X86_64: 8, abi.EM_386: 4}
    if kind != abi.ET_CORE or machine not in widths:
        raise Unsupported(f"an ELF file of type {kind} for machine {machine}, not a core of an x86 domain", offset=16)
    raw = read(at, min(stride * count, _HEADERS_MAX))
    if stride < abi.SHDR.size or len(raw) < stride * count or strings >= count:
        if not count:
            raise Unsupported("an ELF core without sections: no core of xl dump-core", offset=0x3C)
        what = f"{count} section headers of {stride} bytes at {at:#x}, names in section {strings}"
        raise rules.breach(SECTION, f"{what}: they do not lie in the file of {size:#x} bytes", offset=at, record=None)
    headers = [abi.SHDR.unpack_from(raw, i * stride) for i in range(count)]
    names = read(headers[strings][4], min(headers[strings][5], _STRINGS_MAX))
    if not names:
        what = f"the names of the sections, at {headers[strings][4]:#x}, lie beyond the end of the file at {size:#x}"
        raise rules.breach(rules.TRUNCATED, f"{what}: the core is cut short, and has no list of its pages", offset=size,
                           record=None)  # fmt: skip
    parts: dict[str, Part] = {}
    for i, (name_at, _, _, _, offset, length, _, _, _, entry) in enumerate(headers):
        name = names[name_at : name_at + 32].partition(b"\0")[0].decode("latin-1")
        if name not in _KNOWN or name in parts:
            continue
        inside = max(0, min(length, size - offset))
        if inside < length:
            where = f"{name} lies at {offset:#x} and has {length:#x} bytes"
            report(SECTION, f"{where}; the file ends at {size:#x}: is it cut short?", at + i * stride)
        parts[name] = Part(min(offset, size), inside, entry)
    if abi.SEC_NOTE not in parts:
        raise Unsupported(f"an ELF core without {abi.SEC_NOTE}: no core of xl dump-core", offset=at)
    return widths[machine], parts


_KNOWN = {abi.SEC_NOTE, abi.SEC_PRSTATUS, abi.SEC_SHARED_INFO, abi.SEC_P2M, abi.SEC_PFN, abi.SEC_PAGES}


def _notes(read: Read, part: Part) -> tuple[tuple[int, ...] | None, str]:
    """The header note's numbers, and which Xen it was."""
    data = read(part.offset, min(part.size, _NOTES_MAX))
    numbers, xen, at = None, "", 0
    while at + abi.NOTE.size <= len(data):
        name_size, size, kind = abi.NOTE.unpack_from(data, at)
        begin = at + abi.NOTE.size + -(-name_size // 4) * 4
        desc = data[begin : begin + size]
        at = begin + -(-size // 4) * 4
        if len(desc) < size:
            break
        if kind == abi.XEN_ELFNOTE_DUMPCORE_HEADER and size >= abi.HEADER_DESC.size:
            numbers = abi.HEADER_DESC.unpack_from(desc)
        elif kind == abi.XEN_ELFNOTE_DUMPCORE_XEN_VERSION and size >= abi.XEN_VERSION_DESC.size:
            major, minor, extra = abi.XEN_VERSION_DESC.unpack_from(desc)
            xen = f"{major}.{minor}" + extra.partition(b"\0")[0].decode("latin-1")
        elif kind == abi.XEN_ELFNOTE_DUMPCORE_FORMAT_VERSION and size >= abi.FORMAT_VERSION_DESC.size:
            (version,) = abi.FORMAT_VERSION_DESC.unpack_from(desc)
            if version >> 32:
                what = f"dump-core format {version >> 32}.{version & 0xFFFF_FFFF}; known is 0.1"
                raise Unsupported(what, offset=part.offset)
    return numbers, xen
