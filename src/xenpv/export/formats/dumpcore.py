"""A core as `xl dump-core` writes it.

It has the same sections in the same order at the same offsets.

Source: xen.git:tools/libs/guest/xg_core.c xc_domain_dumpcore_via_callback(), docs/misc/dump-core-format.txt
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from xenpv.abi import dumpcore as abi
from xenpv.abi.declare import Width
from xenpv.abi.x86 import VCPU_GUEST_CONTEXT, XEN_VIRT_64
from xenpv.export.formats.content import Pages, Piece, padded
from xenpv.export.formats.elf_core import IDENT, MACHINE
from xenpv.export.formats.job import ExportJob
from xenpv.export.formats.notes import note
from xenpv.export.machine_frames import MachineFrames
from xenpv.frames import PAGE_SIZE, PFNS_PER_BATCH
from xenpv.runs import Runs

CONTEXT_SIZE = VCPU_GUEST_CONTEXT.size(8)  # of either width: xl writes a union of both
_SHT_PROGBITS, _SHT_STRTAB = 1, 3
# major, minor, extraversion, compile_info (four texts), capabilities, changeset, virt_start, page size
_XEN_VERSION = struct.Struct("<QQ16s144x1024s64xQQ")
_IDENT = IDENT + b"\0\1"  # xl gives an ABI version
_FORMAT_VERSION = 1  # major 0, minor 1


@dataclass(frozen=True)
class Header:
    """The values in front of the pages.

    Attributes:
        hvm: Whether the domain is HVM or PVH.
        width: Bytes of the guest's unsigned long.
        contexts: The vcpu_guest_context of each vcpu that is known.
        shared_info: The shared info page, or None.
        xen_version: Major and minor version of Xen.
    """

    hvm: bool
    width: Width
    contexts: list[bytes]
    shared_info: bytes | None
    xen_version: tuple[int, int]


class _Section(NamedTuple):
    name: str
    type: int
    size: int
    align: int = 0
    entry_size: int = 0

    def header(self, names: bytes, offset: int) -> bytes:
        name = names.index(f"\0{self.name}\0".encode()) + 1
        return abi.SHDR.pack(name, self.type, 0, 0, offset, self.size, 0, 0, self.align, self.entry_size)


def pieces(job: ExportJob) -> Iterator[Piece]:
    """Yield the file.

    Raises:
        RequestError: A PV domain from a stream that names no p2m: the mfns are not known.
        GuestError: The domain's p2m is damaged.
    """
    domain, machine = job.domain, None
    if not domain.hvm:
        machine = MachineFrames(domain)
        job.remarks.append("page tables are as xl's, except Xen's own entries and those that name a foreign frame")
    contexts = [] if machine is None else machine.vcpu_contexts()
    if not contexts:
        job.remarks.append("no vcpu's context is known")
    header = Header(domain.hvm, domain.width, contexts, domain.shared_info(), domain.saved_by or (0, 0))
    yield from core_pieces(job.pages, header, machine)
    if machine is not None and machine.pages_without_mfn:
        job.remarks.append(f"{machine.pages_without_mfn} pages have no mfn in its p2m, nor in the core's list of pages")


def core_pieces(pages: Runs, header: Header, machine: MachineFrames | None) -> Iterator[Piece]:
    """Yield the file.

    ``machine`` gives the machine frames of a PV domain; None for HVM and PVH.
    """
    list_section, entry_size = (abi.SEC_PFN, abi.PFN_ENTRY) if machine is None else (abi.SEC_P2M, abi.P2M_ENTRY)
    note_content = _notes(header, pages.total)
    contexts = b"".join(context.ljust(CONTEXT_SIZE, b"\0") for context in header.contexts)
    shared_info = header.shared_info or b""
    sections = [
        _Section(".shstrtab", _SHT_STRTAB, 0),
        _Section(abi.SEC_NOTE, abi.SHT_NOTE, len(note_content)),
        _Section(abi.SEC_PRSTATUS, _SHT_PROGBITS, len(contexts), 8, CONTEXT_SIZE),
        _Section(abi.SEC_SHARED_INFO, _SHT_PROGBITS, len(shared_info), 8, PAGE_SIZE),
        _Section(abi.SEC_PAGES, _SHT_PROGBITS, pages.total * PAGE_SIZE, PAGE_SIZE, PAGE_SIZE),
        _Section(list_section, _SHT_PROGBITS, pages.total * entry_size, 8, entry_size),
    ]
    if not shared_info:
        sections.pop(3)
    names = b"\0" + b"".join(section.name.encode() + b"\0" for section in sections)
    offset = abi.EHDR.size + (1 + len(sections)) * abi.SHDR.size
    headers = []
    for section in sections[1:]:
        offset = -(-offset // PAGE_SIZE) * PAGE_SIZE if section.name == abi.SEC_PAGES else offset
        headers.append(section.header(names, offset))
        offset += section.size
    headers[:0] = [bytes(abi.SHDR.size), sections[0]._replace(size=len(names)).header(names, offset)]
    ehdr = bytearray(abi.EHDR.pack(abi.ET_CORE, MACHINE[header.width], 1, 0, 0, abi.EHDR.size, 0, abi.EHDR.size, 56, 0,
                                   abi.SHDR.size, len(headers), 1))  # fmt: skip
    ehdr[: len(_IDENT)] = _IDENT
    yield padded(bytes(ehdr) + b"".join(headers) + note_content + contexts + shared_info)
    yield Pages(pages, None if machine is None else machine.localise_pages)
    for pfns in pages.batches(PFNS_PER_BATCH):
        yield pfns.tobytes() if machine is None else np.column_stack([pfns, machine.mfns_of(pfns)]).tobytes()
    yield names


def _notes(header: Header, pages: int) -> bytes:
    magic = abi.XC_CORE_MAGIC_HVM if header.hvm else abi.XC_CORE_MAGIC
    version = _XEN_VERSION.pack(*header.xen_version, b"", b"", XEN_VIRT_64.start, PAGE_SIZE)
    return b"".join([
        note(b"Xen", abi.XEN_ELFNOTE_DUMPCORE_NONE, b""),
        note(b"Xen", abi.XEN_ELFNOTE_DUMPCORE_HEADER,
             abi.HEADER_DESC.pack(magic, len(header.contexts), pages, PAGE_SIZE)),
        note(b"Xen", abi.XEN_ELFNOTE_DUMPCORE_XEN_VERSION, version),
        note(b"Xen", abi.XEN_ELFNOTE_DUMPCORE_FORMAT_VERSION, abi.FORMAT_VERSION_DESC.pack(_FORMAT_VERSION)),
    ])  # fmt: skip
