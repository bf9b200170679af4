"""An ELF core of a domain's memory by physical address, which is pfn << 12: what debuggers of Linux open.

The headers are those of a Linux vmcore (System V ABI, "Program Header"; Linux, kernel/kexec_file.c
crash_prepare_elf64_headers()): notes, the domain's memory, and the same bytes again at the kernel's other addresses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from xenpv.abi.declare import Width
from xenpv.abi.dumpcore import EM_386, EM_X86_64, ET_CORE
from xenpv.export.formats.content import padded
from xenpv.export.formats.identity import Identity
from xenpv.export.formats.mapped import NOTHING, Mapped
from xenpv.frames import PAGE_SHIFT, PAGE_SIZE
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
IDENT = b"\x7fELF\x02\x01\x01"  # 64 bits, little-endian; also of a 32-bit guest, whose memory may go beyond 4 GiB
MACHINE: dict[Width, int] = {8: EM_X86_64, 4: EM_386}
_PT_LOAD, _PT_NOTE = 1, 4
_RWX = 7
# The physical address of segments that show memory once more, as /proc/kcore has it. Volatility wants segments in
# ascending order, and finds nothing that is behind one which lies within another.
_NO_PADDR = np.uint64((1 << 64) - 1)
_PN_XNUM = 0xFFFF  # e_phnum: the number did not fit, and is in sh_info of section header 0


@dataclass(frozen=True)
class Headers:
    """What stands in front of memory. ``room``: bytes of notes that there is place for, so that memory can be written
    before all notes are known. ``direct``: the virtual address of pfn 0; without one, segments of memory have virtual
    address 0. ``mapped``, which must lie within ``pages``: where else they are. ``identity``: a tree that goes along
    behind memory, and needs its note.

    Every run of pages is one segment, however many there are: a page that is not there is in none.
    """

    pages: Runs
    width: Width
    room: int
    direct: int | None = None
    mapped: Mapped = NOTHING
    identity: Identity | None = None

    @property
    def _segments(self) -> int:
        return 1 + len(self.pages.first) + len(self.mapped.first) + (self.identity is not None)

    @property
    def _notes(self) -> int:
        """Where the notes are: behind segments, and the section that counts them if they are too many."""
        many = self._segments >= _PN_XNUM
        return EHDR.itemsize + self._segments * PHDR.itemsize + (SHDR.itemsize if many else 0)

    @property
    def length(self) -> int:
        """Bytes in front of memory."""
        return len(padded(bytes(self._notes + self.room)))

    def packed(self, notes: bytes) -> bytes:
        """All of it, with these notes."""
        assert len(notes) <= self.room
        number, at = self._segments, self._notes
        head = np.zeros((), EHDR)
        head["ident"], head["type"], head["machine"], head["version"] = IDENT, ET_CORE, MACHINE[self.width], 1
        head["ehsize"], head["phoff"], head["phentsize"] = EHDR.itemsize, EHDR.itemsize, PHDR.itemsize
        head["phnum"] = min(number, _PN_XNUM)
        section = b""
        if number >= _PN_XNUM:
            head["shoff"], head["shentsize"], head["shnum"] = at - SHDR.itemsize, SHDR.itemsize, 1
            zeroth = np.zeros((), SHDR)
            zeroth["info"] = number
            section = zeroth.tobytes()
        segments = np.zeros(number, PHDR)
        segments[0]["type"], segments[0]["offset"], segments[0]["align"] = _PT_NOTE, at, 4
        segments[0]["filesz"] = segments[0]["memsz"] = len(notes)
        self._fill(segments)
        out = head.tobytes() + segments.tobytes() + section + notes
        return out.ljust(self.length, b"\0")

    def _fill(self, segments: npt.NDArray[Any]) -> None:
        """Fill in all segments but that of the notes."""
        pages, mapped, identity, content = self.pages, self.mapped, self.identity, self.length
        vaddr = np.zeros(len(pages.first), np.uint64)
        if self.direct is not None:
            room = np.uint64((1 << 8 * self.width) - self.direct >> PAGE_SHIFT)
            low = pages.first < room  # what is higher is in no direct map
            vaddr[low] = (pages.first[low] << np.uint64(PAGE_SHIFT)) + np.uint64(self.direct)
        split, end = 1 + len(pages.first), len(segments) - len(mapped.first)
        physical = pages.first << np.uint64(PAGE_SHIFT)
        elsewhere = np.full(len(mapped.first), _NO_PADDR)
        for some, runs, paddr in (
            (segments[1:split], Mapped(vaddr, pages.first, pages.pages), physical),
            (segments[end:], mapped, elsewhere),
        ):
            some["type"], some["flags"], some["align"] = _PT_LOAD, _RWX, PAGE_SIZE
            some["offset"] = content + pages.positions(runs.first) * PAGE_SIZE
            some["vaddr"], some["paddr"] = runs.vaddr, paddr
            some["filesz"] = some["memsz"] = runs.pages * PAGE_SIZE
        if identity is not None:
            segments[split] = (_PT_LOAD, _RWX, content + pages.total * PAGE_SIZE, 0, identity.first << PAGE_SHIFT,
                               identity.pages * PAGE_SIZE, identity.pages * PAGE_SIZE, PAGE_SIZE)  # fmt: skip
