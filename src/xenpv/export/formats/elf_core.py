"""An ELF core of a domain's memory by physical address (pfn << 12).

Debuggers of Linux open it.

The file has headers, notes, the domain's memory, and the tree of identity.py. Further headers show the same bytes once
more at the kernel's other virtual addresses, as a Linux vmcore does.

Source: System V ABI, "Program Header"; Linux, kernel/kexec_file.c crash_prepare_elf64_headers().
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xenpv.abi.declare import Width
from xenpv.abi.dumpcore import EM_386, EM_X86_64, ET_CORE
from xenpv.export.formats import notes
from xenpv.export.formats.content import Hole, Pages, Patch, Piece, padded
from xenpv.export.formats.identity import IdentityTree
from xenpv.export.formats.job import ExportJob
from xenpv.export.formats.mapped import NO_MAPPINGS, Mappings, find_direct_map, kernel_mappings
from xenpv.frames import PAGE_SHIFT, PAGE_SIZE, U8, U64
from xenpv.memory.vmcoreinfo import VMCOREINFO_BYTES, VmcoreinfoSearch
from xenpv.runs import Runs

EHDR = np.dtype([
    ("ident", "S16"), ("type", "<u2"), ("machine", "<u2"), ("version", "<u4"), ("entry", "<u8"), ("phoff", "<u8"),
    ("shoff", "<u8"), ("flags", "<u4"), ("ehsize", "<u2"), ("phentsize", "<u2"), ("phnum", "<u2"), ("shentsize", "<u2"),
    ("shnum", "<u2"), ("shstrndx", "<u2"),
])  # fmt: skip
PHDR = np.dtype([
    ("type", "<u4"), ("flags", "<u4"), ("offset", "<u8"), ("vaddr", "<u8"), ("paddr", "<u8"), ("filesz", "<u8"),
    ("memsz", "<u8"), ("align", "<u8"),
])  # fmt: skip
SHDR = np.dtype([
    ("name", "<u4"), ("type", "<u4"), ("flags", "<u8"), ("addr", "<u8"), ("offset", "<u8"), ("size", "<u8"),
    ("link", "<u4"), ("info", "<u4"), ("addralign", "<u8"), ("entsize", "<u8"),
])  # fmt: skip
IDENT = b"\x7fELF\x02\x01\x01"  # 64 bits, little-endian; also for a 32-bit guest, whose memory may exceed 4 GiB
MACHINE: dict[Width, int] = {8: EM_X86_64, 4: EM_386}
_PT_LOAD, _PT_NOTE = 1, 4
_RWX = 7
# The physical address of segments that show memory once more, as in /proc/kcore. Volatility wants segments in
# ascending order, and finds nothing after a segment that lies within another.
_NO_PADDR = np.uint64((1 << 64) - 1)
_PN_XNUM = 0xFFFF  # e_phnum: the number did not fit, and is in sh_info of section header 0


def pieces(job: ExportJob) -> Iterator[Piece]:
    """Yield the file.

    VMCOREINFO may lie on any page. A file that can seek is read through once: the headers follow when all pages were
    seen. A pipe needs the headers first, so all pages are read twice.
    """
    domain, pages, identity = job.domain, job.pages, job.identity

    def all_notes(vmcoreinfo: bytes | None) -> bytes:
        vcpus_and_vmcoreinfo = notes.prstatus_notes(job.registers, domain.width) + notes.vmcoreinfo_note(vmcoreinfo)
        return vcpus_and_vmcoreinfo + (identity.note() if identity is not None else b"")

    direct_map = find_direct_map(domain, pages)
    mappings = kernel_mappings(job, direct_map)
    headers = Headers(pages, domain.width, len(all_notes(bytes(VMCOREINFO_BYTES))), direct_map, mappings, identity)
    if job.seekable:
        search = VmcoreinfoSearch(domain)

        def search_pages(pfns: U64, content: U8) -> U8:
            search.add_pages(pfns, content)
            return content

        yield Hole(headers.size)
        yield Pages(pages, search_pages)
    else:
        yield headers.pack(all_notes(job.vmcoreinfo))
        yield Pages(pages)
    yield from identity.content() if identity is not None else ()
    if job.seekable:
        yield Patch(0, headers.pack(all_notes(job.checked_vmcoreinfo(search.text))))


@dataclass(frozen=True)
class Headers:
    """The headers and notes in front of memory. Each run of pages is one segment.

    Attributes:
        pages: The pages in the file.
        width: Bytes of the guest's unsigned long.
        notes_max: Bytes to reserve for notes: memory can be written before all notes are known.
        direct_map: The virtual address of pfn 0; None gives segments of memory the virtual address 0.
        mappings: Further virtual addresses of some of ``pages``.
        identity: The tree after memory, or None.
    """

    pages: Runs
    width: Width
    notes_max: int
    direct_map: int | None = None
    mappings: Mappings = NO_MAPPINGS
    identity: IdentityTree | None = None

    @property
    def _segments(self) -> int:
        return 1 + len(self.pages) + len(self.mappings.first) + (self.identity is not None)

    @property
    def _notes_offset(self) -> int:
        """The offset of the notes, after the segments.

        A section that counts the segments comes before, if they are too many for the header.
        """
        section = SHDR.itemsize if self._segments >= _PN_XNUM else 0
        return EHDR.itemsize + self._segments * PHDR.itemsize + section

    @property
    def size(self) -> int:
        """Bytes in front of memory, a multiple of 4096."""
        return len(padded(bytes(self._notes_offset + self.notes_max)))

    def pack(self, notes: bytes) -> bytes:
        """Return ``size`` bytes: the headers and these notes."""
        assert len(notes) <= self.notes_max
        segment_count, notes_offset = self._segments, self._notes_offset
        ehdr = np.zeros((), EHDR)
        ehdr["ident"], ehdr["type"], ehdr["machine"], ehdr["version"] = IDENT, ET_CORE, MACHINE[self.width], 1
        ehdr["ehsize"], ehdr["phoff"], ehdr["phentsize"] = EHDR.itemsize, EHDR.itemsize, PHDR.itemsize
        ehdr["phnum"] = min(segment_count, _PN_XNUM)
        section = b""
        if segment_count >= _PN_XNUM:
            ehdr["shoff"], ehdr["shentsize"], ehdr["shnum"] = notes_offset - SHDR.itemsize, SHDR.itemsize, 1
            shdr = np.zeros((), SHDR)
            shdr["info"] = segment_count
            section = shdr.tobytes()
        segments = np.zeros(segment_count, PHDR)
        segments[0]["type"], segments[0]["offset"], segments[0]["align"] = _PT_NOTE, notes_offset, 4
        segments[0]["filesz"] = segments[0]["memsz"] = len(notes)
        self._fill_memory_segments(segments)
        return (ehdr.tobytes() + segments.tobytes() + section + notes).ljust(self.size, b"\0")

    def _fill_memory_segments(self, segments: npt.NDArray[Any]) -> None:
        """Fill in all segments but the first, which has the notes."""
        pages, mappings, identity, memory_offset = self.pages, self.mappings, self.identity, self.size
        vaddr = np.zeros(len(pages), np.uint64)
        if self.direct_map is not None:
            direct_map_pages = np.uint64((1 << 8 * self.width) - self.direct_map >> PAGE_SHIFT)
            inside = pages.first < direct_map_pages
            vaddr[inside] = (pages.first[inside] << np.uint64(PAGE_SHIFT)) + np.uint64(self.direct_map)
        pages_end, mappings_begin = 1 + len(pages), len(segments) - len(mappings.first)
        for part, runs, paddr in (
            (segments[1:pages_end], Mappings(vaddr, pages.first, pages.pages), pages.first << np.uint64(PAGE_SHIFT)),
            (segments[mappings_begin:], mappings, np.full(len(mappings.first), _NO_PADDR)),
        ):
            part["type"], part["flags"], part["align"] = _PT_LOAD, _RWX, PAGE_SIZE
            part["offset"] = memory_offset + pages.positions(runs.first) * PAGE_SIZE
            part["vaddr"], part["paddr"] = runs.vaddr, paddr
            part["filesz"] = part["memsz"] = runs.pages * PAGE_SIZE
        if identity is not None:
            tree_size = identity.pages * PAGE_SIZE
            segments[pages_end] = (_PT_LOAD, _RWX, memory_offset + pages.total * PAGE_SIZE, 0,
                                   identity.first << PAGE_SHIFT, tree_size, tree_size, PAGE_SIZE)  # fmt: skip
