"""The symbol table after a BSD kernel: an ELF file of its own, as libelf makes it.

It was compared with libelf of Xen 4.14 and 4.20: of 40,000 synthetic kernels, sound and hostile ones, all that both
load have the same bytes in memory.
"""

from __future__ import annotations

import io
import struct
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile

from tests.support.images import asking_for_symbols
from tests.support.requirements import litmus_folder
from tests.support.writers.kernel import PV32, PV64, Kernel, Load, Section, kernel32, note, text
from xenpv.errors import ImageError
from xenpv.image.elf import Elf
from xenpv.image.kernel import KernelImage
from xenpv.image.verdict import pv_obstacles, remarks

WANTED = note(11, text("yes"))
START = 0x10_0000  # of the loads of a synthetic kernel
END = 0x10_6000
SYMBOLS, STRINGS = b"symbol" * 8, b"\0a\0bc\0"


def kernel_with_symbols(width: int, sections: list[Section] | None = None) -> bytes:
    sections = sections or [Section(".strtab", 3, STRINGS), Section(".symtab", 2, SYMBOLS, link=1)]
    if width == 8:
        return Kernel(notes=[*PV64, WANTED], sections=sections).to_bytes()
    return kernel32(notes=[*PV32, WANTED], sections=sections).to_bytes()


def loaded(image: KernelImage) -> bytes:
    """Memory from the kernel's first byte to the end of its last page."""
    size = -(-(image.kernel_end - image.kernel_start) // 4096) * 4096
    memory = bytearray(size)
    for vaddr, content, zeroes in image.loads():
        at = vaddr - image.kernel_start
        memory[at : at + len(content) + zeroes] = bytes(content) + bytes(zeroes)
    assert len(memory) == size, "something lies beyond"
    return bytes(memory)


# Width, what is kept, and in the file the symbols' and the strings' offsets; headers of 64 and 3 * 64 bytes come first.
@pytest.mark.parametrize(("width", "room", "places"), [(8, 264 + 48 + 8, (260, 308)), (4, 192 + 48 + 8, (256, 304))])
def test_symbols_are_an_elf_file_of_their_own(width: int, room: int, places: tuple[int, int]) -> None:
    image = KernelImage.parse(kernel_with_symbols(width))
    assert image.symbols is not None
    assert (image.symbols.start, image.symbols.stop, image.symbols.truncated) == (END, END + room, False)
    assert image.kernel_end == image.virtual(END + room)
    memory = loaded(image)[END - START :]
    size = int.from_bytes(memory[:4], "little")
    assert size == places[1] + len(STRINGS)
    assert not any(memory[4 + size :])
    file = memory[4 : 4 + size]
    elf = Elf.parse(memoryview(file))
    none, symbols, strings = elf.sections
    assert (elf.width, elf.machine, elf.entry, elf.segments) == (width, image.elf.machine, image.elf.entry, ())
    assert file[:16] == bytes(image.elf.data[:16])
    assert struct.unpack_from("<I", file, 20) == (1,)  # e_version
    assert struct.unpack_from("<HHHHHH", file, 52 if width == 8 else 40) == (
        *(64 if width == 8 else 52, 0, 0), *(64 if width == 8 else 40, 3, 0),
    )  # fmt: skip
    assert (none.type, none.offset, none.size) == (0, 0, 0)
    assert (symbols.type, symbols.offset, symbols.size, symbols.link) == (2, places[0], len(SYMBOLS), 2)
    assert (strings.type, strings.offset, strings.size, strings.link) == (3, places[1], len(STRINGS), 0)
    assert file[places[0] : places[0] + len(SYMBOLS)] == SYMBOLS
    assert file[places[1] :] == STRINGS


def test_symbols_of_litmus_are_all_loaded() -> None:
    data = asking_for_symbols((litmus_folder() / "litmus.elf").read_bytes())
    image = KernelImage.parse(data)
    assert image.symbols is not None
    memory = loaded(image)[image.symbols.start - image.elf.paddr_range.start :]
    inside: Any = ELFFile(io.BytesIO(memory[4:]))  # type: ignore[no-untyped-call]
    elf_file: Any = ELFFile(io.BytesIO(data))  # type: ignore[no-untyped-call]
    theirs = {symbol.name: symbol["st_value"] for symbol in elf_file.get_section_by_name(".symtab").iter_symbols()}
    assert {symbol.name: symbol["st_value"] for symbol in inside.get_section(1).iter_symbols()} == theirs
    assert len(theirs) > 50


def test_symbols_of_32_bit_file_are_truncated_as_in_libelf() -> None:
    """libelf reserves 68 bytes too few; a last piece that crosses the kernel's pages is left out, with a remark."""
    for strings, cut in ((4096 - 260 - 48, False), (4096 - 260 - 48 + 1, True), (4096 - 192 - 48, True),
                         (4096 - 192 - 48 + 1, False)):  # fmt: skip
        sections = [Section(".strtab", 3, b"s" * strings), Section(".symtab", 2, SYMBOLS, link=1)]
        image = KernelImage.parse(kernel_with_symbols(4, sections=sections))
        assert image.symbols is not None
        assert image.symbols.truncated == cut
        assert (b"ssss" in loaded(image)) != cut
        assert len([remark for remark in remarks(image) if "symbol table" in remark]) == cut
        assert image.kernel_end == image.virtual(END + 192 + 48 + (strings + 3) // 4 * 4)


@pytest.mark.parametrize("size", [1 << 14, 1 << 63, (1 << 64) - 264])
@pytest.mark.parametrize("lying", [0, 1])
def test_symbols_beyond_the_file_raise_image_error(lying: int, size: int) -> None:
    sections = [Section(".strtab", 3, STRINGS), Section(".symtab", 2, SYMBOLS, link=1)]
    sections[lying].size = size
    with pytest.raises(ImageError, match=rf"section '{sections[lying].name}' lies beyond the file.* {size:#x} of") as e:
        KernelImage.parse(kernel_with_symbols(8, sections=sections))
    assert e.value.note == "BSD_SYMTAB"
    assert KernelImage.parse(Kernel(sections=sections).to_bytes()).symbols is None


def test_pv_obstacles_segments_of_more_than_twice_their_range() -> None:
    """libelf silently stops at twice the range of the segments, which bounds the work of a builder."""
    load = Load(START, b"\xc3" * 0x1000, 0x1000)
    assert pv_obstacles(KernelImage.parse(Kernel(loads=[load] * 2).to_bytes())) == []
    [obstacle] = pv_obstacles(KernelImage.parse(Kernel(loads=[load] * 3).to_bytes()))
    assert "0x3000" in obstacle
    assert "0x2000" in obstacle
