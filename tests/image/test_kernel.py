"""KernelImage: segments, notes and addresses of synthetic kernels and of litmus, compared with pyelftools."""

from __future__ import annotations

import gzip
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile

from tests.support.requirements import litmus_folder
from tests.support.writers.kernel import (
    BASE,
    LEGACY,
    PV32,
    PV64,
    Kernel,
    Load,
    Section,
    kernel32,
    note,
    quad,
    text,
    word,
)
from xenpv.image.kernel import KernelImage
from xenpv.image.notes import NOTES, NoteSource
from xenpv.image.parameters import Pae, feature_names


def parse(kernel: Kernel) -> KernelImage:
    return KernelImage.parse(kernel.to_bytes())


def with_notes(*more: bytes) -> KernelImage:
    return parse(Kernel(notes=[*PV64, *more]))


@pytest.mark.parametrize("place", ["PT_NOTE", "SHT_NOTE"])
@pytest.mark.parametrize("width", [8, 4])
def test_parse_kernel(width: int, place: str) -> None:
    image = parse(Kernel(place=place) if width == 8 else kernel32(place=place))
    base = BASE if width == 8 else 0xC000_0000
    assert (image.width, image.note_source, image.layers) == (width, NoteSource(place), ())
    assert (image.virt_base, image.paddr_offset, image.entry) == (base, 0, base + 0x10_0000)
    assert (image.kernel_start, image.kernel_end) == (base + 0x10_0000, base + 0x10_6000)
    assert [(s.paddr, s.filesz, s.memsz, s.flag_names) for s in image.segments] == [
        (0x10_0000, 0x234, 0x234, "R E"),
        (0x10_1000, 4, 0x5000, "RW "),
    ]
    assert bytes(image.content(image.segments[1])) == b"data"
    assert len(image.notes) == len(PV64 if width == 8 else PV32)
    assert (image.parameters.loader, image.parameters.guest_os) == ("generic", "made")


# Every number of elfnote.h, with a content and its value.
ALL = {
    0: (text("colour=red"), "colour=red"),
    1: (quad(BASE + 0x10_0010), BASE + 0x10_0010),
    2: (quad(BASE + 0x10_2000), BASE + 0x10_2000),
    3: (quad(BASE), BASE),
    4: (quad(0x20_0000), 0x20_0000),
    5: (text("xen-3.0"), "xen-3.0"),
    6: (text("NetBSD"), "NetBSD"),
    7: (text("10.1"), "10.1"),
    8: (text("generic"), "generic"),
    9: (text("yes,bimodal"), "yes,bimodal"),
    10: (text("!writable_page_tables|pae_pgdir_above_4gb"), "!writable_page_tables|pae_pgdir_above_4gb"),
    11: (text("yes"), "yes"),
    12: (quad(0xFFFF_8000_0000_0000), 0xFFFF_8000_0000_0000),
    13: (quad(1) + quad(1) + quad(3) + quad(2), (1, 1, 3, 2)),
    14: (word(1), 1),
    15: (quad(1 << 39), 1 << 39),
    16: (word(1), 1),
    17: (word(1 | 1 << 11), 0x801),
    18: (word(0x10_0020), 0x10_0020),
    19: (word(0x20_0000) + word(0x100_0000) + word(0x3FFF_FFFF), (0x20_0000, 0x100_0000, 0x3FFF_FFFF)),
    0x1000001: (b"crash", b"crash"),
    0x1000002: (b"regs", b"regs"),
    0x2000000: (b"", b""),
    0x2000001: (b"head", b"head"),
    0x2000002: (b"xen", b"xen"),
    0x2000003: (b"form", b"form"),
}


def test_parse_reads_every_note() -> None:
    assert set(ALL) == set(NOTES)
    image = parse(Kernel(notes=[note(type_, desc) for type_, (desc, _) in ALL.items()]))
    data = image.elf.data
    for parsed, (type_, (desc, value)) in zip(image.notes, ALL.items(), strict=True):
        assert (parsed.type, parsed.value, parsed.size) == (type_, value, len(desc))
        assert bytes(data[parsed.offset : parsed.offset + parsed.size]) == desc
        assert parsed.name == NOTES[type_].name
        assert parsed.meaning
    p = image.parameters
    assert (p.virt_base, p.entry, p.paddr_offset) == (BASE, BASE + 0x10_0010, 0x20_0000)
    assert (p.hypercall_page, p.hv_start_low, p.init_p2m) == (BASE + 0x10_2000, 0xFFFF_8000_0000_0000, 1 << 39)
    assert (p.mod_start_pfn, p.suspend_cancel, p.bsd_symtab, p.pae) == (True, True, True, Pae.BIMODAL)
    assert (p.loader, p.guest_os, p.guest_version, p.xen_version) == ("generic", "NetBSD", "10.1", "xen-3.0")
    assert (p.phys32_entry, p.phys32_reloc) == (0x10_0020, (0x20_0000, 0x100_0000, 0x3FFF_FFFF))
    assert feature_names(p.features.supported) == ["writable_page_tables", "pae_pgdir_above_4gb", "dom0"]
    assert feature_names(p.features.required) == ["writable_page_tables"]
    assert image.kernel_start == BASE + 0x10_0000 - 0x20_0000


def test_parse_keeps_unknown_notes_and_drops_other_owners() -> None:
    image = with_notes(note(77, b"\1\2\3"), note(1, quad(5), b"GNU\0"), note(1, quad(6), b"Xenon\0"))
    assert [n.name for n in image.notes[len(PV64) :]] == ["0x4d"]
    assert (image.notes[-1].value, image.notes[-1].meaning) == (b"\1\2\3", "")
    assert image.entry == BASE + 0x10_0000


def test_parse_two_notes_of_a_type_last_counts_and_features_add_up() -> None:
    image = with_notes(
        note(1, quad(BASE + 0x10_0008)),
        note(10, text("!writable_page_tables|frobnicate")),
        note(17, word(1 << 20 | 1 << 27)),
        note(10, text("pae_pgdir_above_4gb|!teleport")),
    )
    features = image.parameters.features
    assert image.entry == BASE + 0x10_0008
    assert feature_names(features.supported) == [
        "writable_page_tables", "pae_pgdir_above_4gb", "dm_msix_all_writes", "bit 27",
    ]  # fmt: skip
    assert (features.unknown, features.unknown_required) == (("frobnicate",), ("teleport",))


def test_parse_address_of_all_ones_is_none() -> None:
    image = with_notes(note(15, quad((1 << 64) - 1)), note(18, word(0xFFFF_FFFF)), note(1, quad((1 << 64) - 1)))
    p = image.parameters
    assert (p.init_p2m, p.phys32_entry, p.entry) == (None, None, None)
    assert image.entry == image.elf.entry


def test_parse_string_ends_at_its_zero_even_after_the_note() -> None:
    image = with_notes(note(7, b"abc", descsz=2))
    assert image.parameters.guest_version == "abc"


def test_parse_prefers_notes_in_segments() -> None:
    kernel = Kernel(sections=[Section(".note.Xen", 7, note(1, quad(1)))])
    assert parse(kernel).entry == BASE + 0x10_0000
    kernel.note_offset = 0  # an error of old binutils: ignored, so the sections count
    image = parse(kernel)
    assert (image.note_source, [n.value for n in image.notes]) == (NoteSource.SECTION, [1])


# --- the legacy string -----------------------------------------------------------------------------------------------


def test_parse_legacy_string() -> None:
    string = f"{LEGACY},GUEST_VER=2.6,VIRT_ENTRY=0xC0100000,HYPERCALL_PAGE=0x102,FEATURES=!dom0|x,BSD_SYMTAB,WHAT=ever"
    image = parse(kernel32(place="__xen_guest", legacy=string, loads=[Load(0xC010_0000, b"x", 0x3000)]))
    p = image.parameters
    assert image.note_source is NoteSource.LEGACY
    assert (p.virt_base, p.entry, p.hypercall_page) == (0xC000_0000, 0xC010_0000, 0xC010_2000)
    assert (p.guest_os, p.guest_version, p.xen_version, p.loader) == ("linux", "2.6", "xen-3.0", "generic")
    assert (p.pae, p.bsd_symtab) == (Pae.EXTENDED_CR3, True)
    assert feature_names(p.features.required) == ["dom0"]
    # Without ELF_PADDR_OFFSET, segments' paddrs are virtual addresses.
    assert (image.paddr_offset, image.kernel_start, image.kernel_end) == (0xC000_0000, 0xC010_0000, 0xC010_3000)
    assert [(n.type, n.name) for n in image.notes][-1] == (None, "WHAT")
    data = bytes(image.elf.data)
    for n in image.notes:
        assert data[: n.offset].endswith(n.name.encode() + (b"," if n.name == "BSD_SYMTAB" else b"=")), n


@pytest.mark.parametrize(
    ("value", "number"),
    [("0x10", 16), ("010", 8), ("0", 0), ("16", 16), (" 16 ", 16), ("16k", 16), ("0XfF", 255),
     ("99999999999999999999999", None)],
)  # fmt: skip
def test_parse_legacy_number_as_strtoull(value: str, number: int | None) -> None:
    image = parse(kernel32(place="__xen_guest", legacy=f"VIRT_BASE={value}"))
    assert image.parameters.virt_base == number


@pytest.mark.parametrize(("value", "pae"), [("no", Pae.NO), ("yes", Pae.YES), ("yes[extended-cr3]", Pae.EXTENDED_CR3)])
def test_parse_legacy_pae(value: str, pae: Pae) -> None:
    assert parse(kernel32(place="__xen_guest", legacy=f"PAE={value}")).parameters.pae is pae


# --- addresses -------------------------------------------------------------------------------------------------------


def test_parse_bsd_symbol_table_extends_the_kernel() -> None:
    symbols = [Section(".symtab", 2, bytes(24 * 5), link=2), Section(".strtab", 3, b"\0abc\0")]
    kernel = Kernel(notes=[*PV64, note(11, text("yes"))], sections=symbols)
    # 4 + 64 + 3 * 64 = 260, up to 264; 120 of symbols; 5 of strings, up to 8
    assert parse(kernel).kernel_end == BASE + 0x10_6000 + 264 + 120 + 8
    kernel.notes[-1] = note(11, text("no"))
    assert parse(kernel).kernel_end == BASE + 0x10_6000


def test_parse_64_bit_kernel_in_32_bit_file() -> None:
    image = parse(kernel32(machine=62))
    assert (image.width, image.elf.width) == (8, 4)


def test_parse_ignores_segments_without_permission() -> None:
    loads = [Load(0x10_0000, b"code", 0x1000), Load(1 << 63, b"", 1 << 63, flags=0, filesz=5)]
    assert parse(Kernel(loads=loads)).elf.paddr_range == range(0x10_0000, 0x10_1000)


# --- a real kernel, compared with pyelftools -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["litmus.elf", "litmus-nop2m.elf"])
def test_parse_litmus_as_pyelftools(name: str) -> None:
    path = litmus_folder() / name
    image = KernelImage.parse(path.read_bytes())
    with path.open("rb") as file:
        elf: Any = ELFFile(file)  # type: ignore[no-untyped-call]
        [segment] = [s for s in elf.iter_segments() if s["p_type"] == "PT_NOTE"]
        notes = [(n["n_offset"], n["n_descsz"], bytes(n["n_descdata"])) for n in segment.iter_notes()]
        loads = [s for s in elf.iter_segments() if s["p_type"] == "PT_LOAD"]
        assert [(s.offset, s.vaddr, s.paddr, s.filesz, s.memsz, s.flags) for s in image.segments] == [
            tuple(s[key] for key in ("p_offset", "p_vaddr", "p_paddr", "p_filesz", "p_memsz", "p_flags")) for s in loads
        ]
        assert [bytes(image.content(s)) for s in image.segments] == [s.data() for s in loads]
        assert [(s.name, s.offset, s.size) for s in image.elf.sections] == [
            (s.name, s["sh_offset"], s["sh_size"]) for s in elf.iter_sections()
        ]
        assert image.elf.entry == elf["e_entry"]
    assert [(n.offset - 16, n.size, bytes(image.elf.data[n.offset :][: n.size])) for n in image.notes] == notes
    assert ("INIT_P2M" in [n.name for n in image.notes]) == (name == "litmus.elf")
    assert {n.name: n.value for n in image.notes}["ENTRY"] == image.elf.entry


def test_all_that_can_be_handed_in() -> None:
    data = gzip.compress(Kernel().to_bytes())
    for kind in (bytes, bytearray, memoryview):
        assert KernelImage.parse(kind(data)).entry == BASE + 0x10_0000
