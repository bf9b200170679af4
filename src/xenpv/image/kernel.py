"""KernelImage: what a domain builder needs to know of a kernel.

It says what to load where, and what the kernel's notes demand.

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
from xenpv.image.elf import EM_386, EM_X86_64, Elf, ElfSegment
from xenpv.image.notes import KernelNotes, Note, NoteSource, read_notes
from xenpv.image.parameters import Parameters
from xenpv.image.payload import Layer, unpack_kernel
from xenpv.image.symbols import Symbols

FILE_MAX = 1 << 30  # bytes of a kernel file; as libxc (xenguest.h XC_DOM_DECOMPRESS_MAX)
_ADDRESSES = 1 << 64


@dataclass(frozen=True, slots=True)
class KernelImage:
    """A kernel file. Its addresses are those of Xen's builders, modulo 2^64.

    Attributes:
        layers: The containers around the ELF file, outermost first.
        elf: The ELF file.
        xen_notes: Xen's notes, where they were found, and remarks.
        parameters: What the notes say.
        symbols: The symbol table to load after the kernel; None if it asks for none, or has none.

    Source: xen.git:xen/common/libelf/libelf-dominfo.c elf_xen_addr_calc_check()
    """

    layers: tuple[Layer, ...]
    elf: Elf = field(repr=False)
    xen_notes: KernelNotes = field(repr=False)
    parameters: Parameters
    symbols: Symbols | None = field(repr=False)

    @classmethod
    def parse(cls, data: bytes | bytearray | memoryview) -> Self:
        """Read a bzImage or an ELF file, with or without gzip around it.

        Whether the kernel can boot is verdict.py's question.

        Args:
            data: The file. It must not change: an ELF file that is not packed is not copied.

        Raises:
            ImageError: The file is no kernel, or it is damaged.
        """
        view = memoryview(data).cast("B")
        if len(view) > FILE_MAX:
            raise ImageError(f"a file of {len(view):#x} bytes is no kernel: at most {FILE_MAX:#x} bytes are read")
        unpacked, layers = unpack_kernel(view)
        try:
            elf = Elf.parse(unpacked)
            notes = read_notes(elf)
            parameters = Parameters.from_notes(notes.notes, notes.source)
            symbols = Symbols.from_elf(elf) if parameters.bsd_symtab else None
        except ImageError as e:
            if not layers:
                raise
            raise ImageError(f"in the unpacked kernel: {e.reason}", offset=e.offset, note=e.note) from None
        return cls(layers, elf, notes, parameters, symbols)

    @property
    def notes(self) -> tuple[Note, ...]:
        """Xen's notes."""
        return self.xen_notes.notes

    @property
    def note_source(self) -> NoteSource:
        """Where the notes were found."""
        return self.xen_notes.source

    @property
    def width(self) -> Width:
        """8 for a 64-bit kernel, 4 for a 32-bit one.

        The machine decides, whatever the class of the ELF file.
        """
        if self.elf.machine in {EM_386, EM_X86_64}:
            return 8 if self.elf.machine == EM_X86_64 else 4
        return self.elf.width

    @property
    def segments(self) -> tuple[ElfSegment, ...]:
        """The segments to load, in the order to load them."""
        return self.elf.load_segments

    def content(self, segment: ElfSegment) -> memoryview:
        """Return the ``filesz`` bytes of a segment that are in the file."""
        return self.elf.data[segment.offset : segment.offset + segment.filesz]

    def loads(self) -> Iterator[tuple[int, bytes | memoryview, int]]:
        """Yield what to load for PV, in order.

        Each item is a virtual address, its bytes, and the number of zeros after them.

        Later content overwrites earlier content.
        """
        for segment in self.segments:
            yield self.virtual(segment.paddr), self.content(segment), segment.memsz - segment.filesz
        if self.symbols is not None:
            for offset, data in self.symbols.pieces:
                yield self.virtual(self.symbols.start + offset), data, 0

    @property
    def virt_base(self) -> int:
        """The virtual address of pfn 0 (default: 0)."""
        return self.parameters.virt_base or 0

    @property
    def paddr_offset(self) -> int:
        """What to subtract from segments' paddrs.

        Default: 0, or virt_base for a legacy kernel.
        """
        if self.parameters.paddr_offset is not None:
            return self.parameters.paddr_offset
        return self.virt_base if self.note_source is NoteSource.LEGACY else 0

    @property
    def entry(self) -> int:
        """The virtual address at which vcpu 0 starts as PV (default: the ELF header's)."""
        return self.elf.entry if self.parameters.entry is None else self.parameters.entry

    @property
    def kernel_start(self) -> int:
        """The virtual address of the first loaded byte, as PV."""
        return self.virtual(self.elf.paddr_range.start)

    @property
    def kernel_end(self) -> int:
        """The virtual address after the last loaded byte, as PV.

        A symbol table counts as loaded.
        """
        return self.virtual(self.symbols.stop if self.symbols else self.elf.paddr_range.stop)

    def virtual(self, paddr: int) -> int:
        """Return the virtual address of a paddr, as PV.

        Xen's builders ignore a segment's vaddr.
        """
        return (paddr + self.virt_base - self.paddr_offset) % _ADDRESSES
