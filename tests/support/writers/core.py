"""A domain as the file that `xl dump-core` would write of it (xen.git:docs/misc/dump-core-format.txt).

For tests only; it shares nothing with xenpv.stream.dumpcore, and checks nothing. A Core is open to be broken before it
is written:

>>> from tests.support.writers.build import pv_domain
>>> core = core_of(pv_domain(vcpus=2))
>>> core.p2m[0, 0]
0
>>> bytes(core)[:4]
b'\\x7fELF'
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tests.support.writers.domain import FRAME, Domain, P
from tests.support.writers.stream import PAGE
from xenpv.abi.declare import Width
from xenpv.abi.x86 import VCPU_GUEST_CONTEXT

U64 = npt.NDArray[np.uint64]
PV_MAGIC, HVM_MAGIC = 0xF00FEBED, 0xF00FEBEE
CONTEXT = 5168  # of a 64-bit toolstack, whatever the guest is


@dataclass
class Core:
    """What a core is made of. ``p2m``: pairs of pfn and mfn, (n, 2); of an HVM domain ``pfns`` take its place."""

    width: Width
    pages: list[bytes]
    p2m: U64
    contexts: list[bytes]
    shared_info: bytes | None
    hvm: bool = False
    nr_pages: int | None = None
    nr_vcpus: int | None = None
    page_size: int = PAGE
    magic: int | None = None
    version: int = 1
    sizes: dict[str, int] = field(default_factory=dict)  # what section headers say instead of the truth
    offsets: dict[str, int] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)

    def parts(self) -> dict[str, tuple[int, bytes, int, int]]:
        """The sections: type, content, alignment and size of an element; without the names."""
        table = self.p2m[:, 0] if self.hvm else self.p2m
        shared = {} if self.shared_info is None else {".xen_shared_info": (1, self.shared_info, 8, PAGE)}
        contexts = b"".join(context.ljust(CONTEXT, b"\0") for context in self.contexts)
        parts = {
            ".note.Xen": (7, self.notes(), 0, 0),
            ".xen_prstatus": (1, contexts, 8, CONTEXT),
            **shared,
            ".xen_pages": (1, b"".join(self.pages), PAGE, PAGE),
            ".xen_pfn" if self.hvm else ".xen_p2m": (1, table.astype("<u8").tobytes(), 8, 8 if self.hvm else 16),
        }
        return {name: part for name, part in parts.items() if name not in self.left_out}

    def notes(self) -> bytes:
        pages = len(self.pages) if self.nr_pages is None else self.nr_pages
        vcpus = len(self.contexts) if self.nr_vcpus is None else self.nr_vcpus
        magic = self.magic if self.magic is not None else HVM_MAGIC if self.hvm else PV_MAGIC
        xen = struct.pack("<QQ16s", 4, 17, b".5-test").ljust(1280, b"\0")
        return b"".join(
            struct.pack("<III4s", 4, len(desc), 0x2000000 + kind, b"Xen\0") + desc
            for kind, desc in enumerate(
                [b"", struct.pack("<QQQQ", magic, vcpus, pages, self.page_size), xen, struct.pack("<Q", self.version)]
            )
        )

    def __bytes__(self) -> bytes:
        parts = self.parts()
        names = [".shstrtab", *parts]
        strings = b"\0" + b"".join(name.encode() + b"\0" for name in names)
        out = bytearray(64 + 64 * (1 + len(names)))
        headers = [bytes(64)]
        for name, (kind, data, align, entry) in parts.items():
            if name == ".xen_pages":
                out += bytes(-len(out) % PAGE)
            offset = self.offsets.get(name, len(out))
            size = self.sizes.get(name, len(data))
            at = strings.index(name.encode())
            headers.append(struct.pack("<IIQQQQIIQQ", at, kind, 0, 0, offset, size, 0, 0, align, entry))
            out += data
        headers.insert(1, struct.pack("<IIQQQQIIQQ", 1, 3, 0, 0, len(out), len(strings), 0, 0, 0, 0))
        out += strings
        machine = 62 if self.width == 8 else 3
        ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
        ehdr = ident + struct.pack("<HHIQQQIHHHHHH", 4, machine, 1, 0, 0, 64, 0, 64, 56, 0, 64, len(headers), 1)
        out[: 64 * (1 + len(headers))] = ehdr + b"".join(headers)
        return bytes(out)


def core_of(domain: Domain) -> Core:
    """A core of a PV domain: frames in page tables and contexts are mfns again, and Xen's entries are there."""
    pfns = sorted(domain.pages)
    return Core(
        domain.width,
        [_as_on_the_host(domain, pfn) for pfn in pfns],
        np.array([[pfn, domain.mfns[pfn]] for pfn in pfns], np.uint64),
        [_context(domain, vcpu) for vcpu in sorted(domain.vcpus)],
        bytes(domain.shared_page),
    )


def _as_on_the_host(domain: Domain, pfn: int) -> bytes:
    if not domain.is_table(pfn):
        return bytes(domain.pages[pfn])
    entries = domain.table(pfn).copy()
    for at in np.flatnonzero(entries & np.uint64(P)).tolist():
        entry = int(entries[at])
        entries[at] = entry & ~FRAME | domain.mfns[(entry & FRAME) >> 12] << 12
    if domain.types[pfn] & 7 == 4:
        entries[256:272] = 0xFEDC_B000 << 12 | 0x63  # Xen's own frames
        entries[258] = domain.mfns[pfn] << 12 | 0x63  # the linear page table
    if domain.width == 4 and pfn in {int(domain.table(top)[3]) >> 12 for top in domain.tables(3)}:
        entries[0x1AC:] = 0xFEDC_B000 << 12 | 0xE1
    return entries.tobytes()


def _context(domain: Domain, vcpu: int) -> bytes:
    context = np.array(domain.vcpus[vcpu], VCPU_GUEST_CONTEXT[domain.width])
    context["ctrlreg"][3] = domain.cr3(domain.mfns[domain.places.top])
    if domain.places.user_top >= 0:
        context["ctrlreg"][1] = domain.mfns[domain.places.user_top] << 12
    return context.tobytes()


def hvm_core(pages: dict[int, bytes], contexts: list[bytes]) -> Core:
    """A core of an HVM domain."""
    pfns = sorted(pages)
    table = np.repeat(np.array(pfns, np.uint64)[:, None], 2, axis=1)
    return Core(8, [pages[pfn] for pfn in pfns], table, contexts, None, hvm=True)
