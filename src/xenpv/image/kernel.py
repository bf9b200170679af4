"""A kernel as whoever builds its domain needs it: what to load where, what its notes ask, and where it will lie.

>>> image = KernelImage.parse(Path("vmlinuz").read_bytes())
>>> hex(image.virt_base), image.parameters.mod_start_pfn
('0xffffffff80000000', True)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

from xenpv.abi.declare import Width
from xenpv.errors import ImageError
from xenpv.image.elf import EM_386, EM_X86_64, Elf, Segment
from xenpv.image.notes import Note, Source, read_notes
from xenpv.image.parameters import Parameters
from xenpv.image.payload import Layer, unwrap
from xenpv.image.symbols import Symbols

FILE_MAX = 1 << 30  # bytes of a kernel file; what libxc takes (xenguest.h XC_DOM_DECOMPRESS_MAX)
_ADDRESSES = 1 << 64


@dataclass(frozen=True, slots=True)
class KernelImage:
    """A kernel file, read.

    ``layers`` are the wrappings that it came in, outermost first; ``elf`` is the ELF file inside them, ``notes`` are
    Xen's in it and ``source`` where they were found, ``parameters`` what they come to, ``symbols`` the symbol table to
    be loaded behind it, None where it wants or has none. ``width`` is that of its addresses in bytes. All addresses are
    computed as Xen's builders compute them, modulo 2^64 (xen.git:xen/common/libelf/libelf-dominfo.c
    elf_xen_addr_calc_check()).
    """

    layers: tuple[Layer, ...]
    elf: Elf = field(repr=False)
    notes: tuple[Note, ...] = field(repr=False)
    source: Source
    parameters: Parameters
    symbols: Symbols | None = field(repr=False)

    @classmethod
    def parse(cls, data: bytes | bytearray | memoryview) -> Self:
        """Read a bzImage or an ELF file, either of them in gzip or not.

        The bytes are not copied where they need not be unpacked, so they must stay as they are. Raises ImageError for
        whatever is no kernel, is damaged or claims more than it has; whether one that can be read can boot is another
        question: verdict.py.
        """
        view = memoryview(data).cast("B")
        if len(view) > FILE_MAX:
            raise ImageError(f"{len(view):#x} bytes are no kernel; more than {FILE_MAX:#x} are not looked at")
        unpacked, layers = unwrap(view)
        try:
            elf = Elf.parse(unpacked)
            notes, source = read_notes(elf)
            parameters = Parameters.of(notes, source)
            symbols = Symbols.of(elf) if parameters.bsd_symtab else None
        except ImageError as e:
            if not layers:
                raise
            raise ImageError(f"in the unpacked kernel: {e.reason}", offset=e.offset, note=e.note) from None
        return cls(layers, elf, notes, source, parameters, symbols)

    @property
    def width(self) -> Width:
        """8 for a 64-bit kernel, 4 for a 32-bit one: as the machine says, in whichever class of ELF file it comes."""
        if self.elf.machine in {EM_386, EM_X86_64}:
            return 8 if self.elf.machine == EM_X86_64 else 4
        return self.elf.width

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What is to be loaded, in the file's order, which is the order to load it in."""
        return self.elf.loads

    def content(self, segment: Segment) -> memoryview:
        """The bytes of a segment that the file has, ``filesz`` of them."""
        return self.elf.data[segment.offset : segment.offset + segment.filesz]

    def loads(self) -> Iterator[tuple[int, bytes | memoryview, int]]:
        """What to load as PV, in this order: a virtual address, the bytes that go there, how many zeroes behind them.

        What comes later overwrites what was there.
        """
        for segment in self.segments:
            yield self.virtual(segment.paddr), self.content(segment), segment.memsz - segment.filesz
        if self.symbols is not None:
            for at, data in self.symbols.pieces:
                yield self.virtual(self.symbols.start + at), data, 0

    @property
    def virt_base(self) -> int:
        """The virtual address of pfn 0; 0 where no note says it."""
        return self.parameters.virt_base or 0

    @property
    def paddr_offset(self) -> int:
        """What the segments' paddr are too high by; where nothing says it 0, and virt_base for a legacy kernel."""
        if self.parameters.paddr_offset is not None:
            return self.parameters.paddr_offset
        return self.virt_base if self.source is Source.LEGACY else 0

    @property
    def entry(self) -> int:
        """The virtual address at which vcpu 0 starts as PV; the ELF header's where no note says it."""
        return self.elf.entry if self.parameters.entry is None else self.parameters.entry

    @property
    def kernel_start(self) -> int:
        """The virtual address of the first byte that is loaded, as PV."""
        return self.virtual(self.elf.paddr_range.start)

    @property
    def kernel_end(self) -> int:
        """The virtual address behind what is loaded, as PV, and the symbol table where BSD_SYMTAB asks for it."""
        return self.virtual(self.symbols.stop if self.symbols else self.elf.paddr_range.stop)

    def virtual(self, paddr: int) -> int:
        """The virtual address at which Xen's builders load a paddr, as PV; a segment's vaddr counts for nothing."""
        return (paddr + self.virt_base - self.paddr_offset) % _ADDRESSES
