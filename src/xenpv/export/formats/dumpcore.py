"""A core as `xl dump-core` writes it: sections in the same order at the same places.

xen.git:tools/libs/guest/xg_core.c xc_domain_dumpcore_via_callback(), docs/misc/dump-core-format.txt
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from xenpv.abi import dumpcore as abi
from xenpv.abi.declare import Width
from xenpv.abi.x86 import VCPU_GUEST_CONTEXT, XEN_VIRT_64
from xenpv.export.formats import notes
from xenpv.export.formats.content import Piece, padded
from xenpv.export.formats.elf import IDENT, MACHINE
from xenpv.frames import PAGE_SIZE, PFNS_PER_BATCH, U64
from xenpv.runs import Runs

CONTEXT_SIZE = VCPU_GUEST_CONTEXT.size(8)  # of either width: xl writes a union of both
_SHT_PROGBITS, _SHT_STRTAB = 1, 3
# major, minor, extraversion, compile_info (four texts), capabilities, changeset, virt_start, page size
_XEN_VERSION = struct.Struct("<QQ16s144x1024s64xQQ")
_IDENT = IDENT + b"\0\1"  # xl gives an ABI version
_FORMAT_VERSION = 1  # major 0, minor 1


@dataclass(frozen=True)
class Header:
    """What stands in front of the pages. ``contexts``: of each vcpu that is known, its vcpu_guest_context.
    ``version``: of Xen, major and minor.
    """

    hvm: bool
    width: Width
    contexts: list[bytes]
    shared_info: bytes | None
    version: tuple[int, int]


class _Section(NamedTuple):
    name: str
    kind: int
    size: int
    align: int = 0
    entry: int = 0

    def header(self, texts: bytes, offset: int) -> bytes:
        name = texts.index(f"\0{self.name}\0".encode()) + 1
        return abi.SHDR.pack(name, self.kind, 0, 0, offset, self.size, 0, 0, self.align, self.entry)


def core(pages: Runs, header: Header, mfn_of: Callable[[U64], U64] | None) -> Iterator[Piece]:
    """The file. ``mfn_of`` gives the machine frame of each pfn of a PV domain; None for one that is HVM or PVH."""
    table, entry = (abi.SEC_PFN, abi.PFN_ENTRY) if mfn_of is None else (abi.SEC_P2M, abi.P2M_ENTRY)
    described = _notes(header, pages.total)
    contexts = b"".join(context.ljust(CONTEXT_SIZE, b"\0") for context in header.contexts)
    shared = header.shared_info or b""
    parts = [
        _Section(".shstrtab", _SHT_STRTAB, 0),
        _Section(abi.SEC_NOTE, abi.SHT_NOTE, len(described)),
        _Section(abi.SEC_PRSTATUS, _SHT_PROGBITS, len(contexts), 8, CONTEXT_SIZE),
        _Section(abi.SEC_SHARED_INFO, _SHT_PROGBITS, len(shared), 8, PAGE_SIZE),
        _Section(abi.SEC_PAGES, _SHT_PROGBITS, pages.total * PAGE_SIZE, PAGE_SIZE, PAGE_SIZE),
        _Section(table, _SHT_PROGBITS, pages.total * entry, 8, entry),
    ]
    if not shared:
        parts.pop(3)
    texts = b"\0" + b"".join(part.name.encode() + b"\0" for part in parts)
    at = abi.EHDR.size + (1 + len(parts)) * abi.SHDR.size
    headers = []
    for part in parts[1:]:
        at = -(-at // PAGE_SIZE) * PAGE_SIZE if part.name == abi.SEC_PAGES else at
        headers.append(part.header(texts, at))
        at += part.size
    headers[:0] = [bytes(abi.SHDR.size), parts[0]._replace(size=len(texts)).header(texts, at)]
    ehdr = bytearray(abi.EHDR.pack(abi.ET_CORE, MACHINE[header.width], 1, 0, 0, abi.EHDR.size, 0, abi.EHDR.size, 56, 0,
                                   abi.SHDR.size, len(headers), 1))  # fmt: skip
    ehdr[: len(_IDENT)] = _IDENT
    yield padded(bytes(ehdr) + b"".join(headers) + described + contexts + shared)
    yield pages
    for pfns in pages.batches(PFNS_PER_BATCH):
        yield pfns.tobytes() if mfn_of is None else np.column_stack([pfns, mfn_of(pfns)]).tobytes()
    yield texts


def _notes(header: Header, pages: int) -> bytes:
    magic = abi.XC_CORE_MAGIC_HVM if header.hvm else abi.XC_CORE_MAGIC
    version = _XEN_VERSION.pack(*header.version, b"", b"", XEN_VIRT_64.start, PAGE_SIZE)
    return b"".join([
        notes.note(b"Xen", abi.XEN_ELFNOTE_DUMPCORE_NONE, b""),
        notes.note(b"Xen", abi.XEN_ELFNOTE_DUMPCORE_HEADER,
                   abi.HEADER_DESC.pack(magic, len(header.contexts), pages, PAGE_SIZE)),
        notes.note(b"Xen", abi.XEN_ELFNOTE_DUMPCORE_XEN_VERSION, version),
        notes.note(b"Xen", abi.XEN_ELFNOTE_DUMPCORE_FORMAT_VERSION, abi.FORMAT_VERSION_DESC.pack(_FORMAT_VERSION)),
    ])  # fmt: skip
