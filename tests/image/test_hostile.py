"""Hostile kernels: any bytes parse, or raise an ImageError that names the field and the numbers."""

from __future__ import annotations

import struct
from random import Random

import pytest

from tests.support.memory_limit import peak_memory_below
from tests.support.writers.kernel import PV64, Kernel, Load, Section, kernel32, note, quad, text, word
from xenpv.errors import ImageError
from xenpv.image.capacity import memory_limits
from xenpv.image.kernel import KernelImage
from xenpv.image.verdict import pv_obstacles, pvh_obstacles, remarks


def parse_and_use(data: bytes) -> KernelImage | ImageError:
    """Everything that is asked of a kernel; nothing but ImageError may come of it."""
    try:
        image = KernelImage.parse(data)
    except ImageError as e:
        return e
    obstacles = pv_obstacles(image)
    assert bool(memory_limits(image, initrd=1 << 20)) != bool(obstacles)
    pvh_obstacles(image)
    remarks(image)
    for segment in image.segments:
        assert len(image.content(segment)) == segment.filesz
    for note_ in image.notes:
        assert note_.offset <= len(image.elf.data)
    return image


def parse_error(data: bytes) -> ImageError:
    error = parse_and_use(data)
    assert isinstance(error, ImageError)
    assert "\n" not in str(error)
    return error


def noted(*more: bytes) -> bytes:
    return Kernel(notes=[*PV64, *more]).to_bytes()


def patched(at: int, form: str, value: int, kernel: Kernel | None = None) -> bytes:
    data = bytearray((kernel or Kernel()).to_bytes())
    struct.pack_into(form, data, at, value)
    return bytes(data)


CODE = b"\xc3" * 0x100
WRONG: dict[str, tuple[bytes, str, str | None]] = {
    "class": (patched(4, "B", 3), "ELF class 3 (EI_CLASS)", None),
    "big-endian": (patched(5, "B", 2), "ELF data encoding 2 (EI_DATA)", None),
    "a core": (Kernel(kind=4).to_bytes(), "a core dump (ELF type ET_CORE)", None),
    "phoff": (patched(32, "<Q", 1 << 63), "the program headers lie beyond the file: 3 of 56 bytes from 0x8000", None),
    "phnum": (patched(56, "<H", 0xFFFF), "the program headers lie beyond the file: 65535 of 56 bytes from 0x40", None),
    "phentsize": (patched(54, "<H", 55), "55 bytes, and need 56", None),
    "shoff": (patched(40, "<Q", (1 << 64) - 1), "the section headers lie beyond the file", None),
    "shentsize": (patched(58, "<H", 0), "0 bytes, and need 64", None),
    "a segment beyond": (
        Kernel(loads=[Load(0, CODE, 0x1000, offset=1 << 40)]).to_bytes(),
        "program header 0 (PT_LOAD) lies beyond the file: p_offset 0x10000000000 and p_filesz 0x100", None),
    "a segment that wraps in the file": (
        Kernel(loads=[Load(0, CODE, 1 << 63, offset=0x100, filesz=(1 << 64) - 0x100)]).to_bytes(),
        "p_offset 0x100 and p_filesz 0xffffffffffffff00", None),
    "more in the file": (
        Kernel(loads=[Load(0, CODE, 0xFF)]).to_bytes(), "p_filesz 0x100 is more than p_memsz 0xff", None),
    "a segment that wraps": (
        Kernel(loads=[Load((1 << 64) - 0x1000, CODE, 0x1001)]).to_bytes(),
        "wraps around the end of addresses: p_paddr 0xfffffffffffff000 and p_memsz 0x1001", None),
    "a 32-bit segment that wraps": (
        kernel32(loads=[Load(0xFFFF_F000, CODE, 0x1001)]).to_bytes(), "p_paddr 0xfffff000 and p_memsz 0x1001", None),
    "a legacy number": (
        kernel32(place="__xen_guest", legacy="VIRT_BASE=everywhere").to_bytes(), "'everywhere' is not a number",
        "VIRT_BASE"),
    "a legacy number of a thousand digits": (
        kernel32(place="__xen_guest", legacy="VIRT_ENTRY=" + "9" * 3000).to_bytes(), "a number of 3000 digits",
        "VIRT_ENTRY"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_parse_damaged_header_raises_image_error(kind: str) -> None:
    data, sentence, name = WRONG[kind]
    error = parse_error(data)
    assert sentence in error.reason
    assert error.note == name
    if name:
        assert str(error).endswith(f"(at {error.offset:#x} in note {name})")


# What libelf reads, and what it makes of it: "numbers of 1, 2, 4 or 8 bytes, else 0", strings to their 0, no refusals.
DAMAGED: dict[str, tuple[bytes, dict[str, object]]] = {
    "of Debian's PV GRUB: 12 bytes, and 4 are there": (noted(note(15, quad(1 << 39)[:4], descsz=12)), {"INIT_P2M": 0}),
    "descsz": (noted(note(7, b"abcd\0", descsz=0xFFFF_FFFF)), {"GUEST_VERSION": "abcd"}),
    "namesz, which wraps to 0": (noted(note(7, b"abcd\0", namesz=0xFFFF_FFFD)), {"GUEST_VERSION": "Xen"}),
    "a few bytes more": (noted(b"\1" * 8), {}),
    "a number of 3 bytes": (noted(note(15, b"abc")), {"INIT_P2M": 0}),
    "a number of none": (noted(note(15, b"")), {"INIT_P2M": 0}),
    "an endless string": (noted(note(7, b"a" * 8192)), {}),
    "beyond the file": (Kernel(note_offset=1 << 33).to_bytes(), {}),
    "a section beyond": (Kernel(notes=[], sections=[Section(".n", 7, b"", size=1 << 40)]).to_bytes(), {}),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_parse_damaged_note_is_read_as_libelf_reads_it(kind: str) -> None:
    """libelf loads every kernel whatever its notes: "elf_note_next() … terminate caller's loop"."""
    data, expected = DAMAGED[kind]
    image = KernelImage.parse(data)
    sound = len(PV64) if kind not in {"beyond the file", "a section beyond"} else 0
    assert {n.name: n.value for n in image.notes[sound:]} == expected
    assert remarks(image)


def test_parse_foreign_notes_and_gaps_have_no_remark() -> None:
    image = KernelImage.parse(noted(note(1, b"\1\2\3", b"GNU\0"), note(0x100, b"", b""), note(15, quad(1 << 39))))
    assert [n.name for n in image.notes[len(PV64) :]] == ["INIT_P2M"]
    assert remarks(image) == []


def test_parse_too_many_notes_reads_the_first_65536() -> None:
    data = Kernel(notes=[*PV64, *[note(0, b"", b"")] * 65536, note(15, quad(1))]).to_bytes()
    with peak_memory_below(64 << 20):
        image = KernelImage.parse(data)
    assert len(image.notes) == len(PV64)
    assert any("65536" in remark for remark in remarks(image))


def test_parse_many_huge_segments_allocates_little() -> None:
    data = bytearray(Kernel(loads=[Load(0, b"", 1 << 40)] * 10_000).to_bytes())
    with peak_memory_below(64 << 20):
        assert isinstance(parse_and_use(bytes(data)), KernelImage)


SMALL = [Load(0x10_0000, b"code", 0x1000), Load(0x10_1000, b"", 0x5000, 6)]
KERNELS: dict[str, bytes] = {
    "64-bit": Kernel(notes=[*PV64, note(15, quad(1 << 39)), note(18, word(0x10_0000))], loads=SMALL).to_bytes(),
    "32-bit": kernel32(loads=SMALL).to_bytes(),
    "sections": Kernel(place="SHT_NOTE", loads=SMALL).to_bytes(),
    "legacy": kernel32(place="__xen_guest", loads=[Load(0xC010_0000, b"x", 0x1000)]).to_bytes(),
    "symbols": Kernel(
        notes=[*PV64, note(11, text("yes"))],
        sections=[Section(".symtab", 2, bytes(24), link=2), Section(".strtab", 3, b"\0a\0")],
        loads=SMALL,
    ).to_bytes(),
}


@pytest.mark.parametrize("kind", KERNELS)
def test_parse_truncated_at_any_byte_raises_image_error(kind: str) -> None:
    data = KERNELS[kind]
    assert isinstance(parse_and_use(data), KernelImage)
    for cut in range(len(data)):
        parse_error(data[:cut])


@pytest.mark.parametrize("kind", KERNELS)
def test_parse_any_byte_changed_parses_or_raises_image_error(kind: str) -> None:
    data = bytearray(KERNELS[kind])
    for at in range(len(data)):
        original = data[at]
        for value in {0, original ^ 0xFF} - {original}:
            data[at] = value
            parse_and_use(bytes(data))
        data[at] = original


def test_parse_random_bytes_parses_or_raises_image_error() -> None:
    rng = Random(20140904)
    for _ in range(300):
        junk = rng.randbytes(rng.randrange(4096))
        parse_and_use(junk)
        parse_and_use(b"\x7fELF\2\1\1" + junk)
        parse_and_use(b"\x7fELF\1\1\1" + junk)


def test_parse_segment_of_a_whole_address_space_allocates_nothing() -> None:
    image = parse_and_use(Kernel(loads=[Load(0x10_0000, CODE, (1 << 64) - 0x20_0000)]).to_bytes())
    assert isinstance(image, KernelImage)
    assert pv_obstacles(image)
    low = Kernel(notes=[*PV64[:3], note(1, quad(0x10_0000))], loads=[Load(0x10_0000, CODE, (1 << 64) - 0x20_0000)])
    image = parse_and_use(low.to_bytes())
    assert isinstance(image, KernelImage)
    assert [(limit.max_pages, limit.min_pages) for limit in memory_limits(image)] == [(0, None), (0, None)]
