"""Verdicts: whether a kernel can boot; each case breaks one thing."""

from __future__ import annotations

import pytest

from tests.support.writers.kernel import (
    BASE,
    LEGACY,
    PV32,
    PV64,
    Kernel,
    Load,
    Section,
    bzimage,
    kernel32,
    note,
    quad,
    text,
    word,
)
from xenpv.image.kernel import KernelImage
from xenpv.image.request import _format_pages
from xenpv.image.verdict import guest_type, p2m_obstacle, pv_obstacles, pvh_obstacles, remarks


def parse(kernel: Kernel) -> KernelImage:
    return KernelImage.parse(kernel.to_bytes())


def noted(*more: bytes, without: int | None = None, **fields: object) -> Kernel:
    notes = [n for n in PV64 if without is None or n[8:12] != word(without)]
    return Kernel(notes=[*notes, *more], **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        (Kernel(), "xen-3.0-x86_64"),
        (Kernel(place="SHT_NOTE"), "xen-3.0-x86_64"),
        (kernel32(), "xen-3.0-x86_32p"),
        (kernel32(machine=62, notes=list(PV64)), "xen-3.0-x86_64"),
        (kernel32(place="__xen_guest", loads=[Load(0xC010_0000, b"", 5)], entry=0xC010_0000), "xen-3.0-x86_32p"),
        (noted(note(8, text("generic loader"))), "xen-3.0-x86_64"),
        (noted(note(6, text("linux")), without=8), "xen-3.0-x86_64"),
        (noted(note(1, quad(BASE + 0x10_6000))), "xen-3.0-x86_64"),  # the end itself is accepted
    ],
    ids=[
        "program-header-notes", "section-notes", "pae", "x86_64-machine-in-elf32", "xen-guest-section",
        "generic-loader", "linux-without-loader", "entry-at-the-end",
    ],
)  # fmt: skip
def test_pv_obstacles_of_bootable_kernel_are_none(kernel: Kernel, kind: str) -> None:
    image = parse(kernel)
    assert (pv_obstacles(image), guest_type(image)) == ([], kind)


EXTENT = "it would extend from 0xffffffff80100000 to 0xffffffff80106000"
NOT_PV: dict[str, tuple[Kernel, str]] = {
    "no notes": (Kernel(notes=[]), "it has neither Xen ELF notes nor a section __xen_guest"),
    "machine": (Kernel(machine=183), "it is for AArch64"),
    "nothing": (Kernel(loads=[]), "no segment to load"),
    "loader": (
        noted(note(8, text("special"))),
        "it is for another loader: LOADER 'special' does not begin with 'generic', nor GUEST_OS 'made' with 'linux'"),
    "no loader": (noted(without=8), "LOADER '' does not begin with 'generic'"),
    "version": (noted(note(5, text("xen-4"))), "XEN_VERSION 'xen-4' does not begin with 'xen-3.0'"),
    "no version": (noted(without=5), "XEN_VERSION '' does not begin with 'xen-3.0'"),
    "dom0": (noted(note(10, text("!dom0"))), "it requires the feature dom0"),
    "translated": (noted(note(10, text("!auto_translated_physmap"))), "requires the feature auto_translated_physmap"),
    "feature": (noted(note(10, text("!virtual_p2m"))), "it requires features that Xen does not know: virtual_p2m"),
    "no PAE": (kernel32(notes=[*PV32, note(9, text("no"))]), "it is a 32-bit kernel without PAE"),
    "paddr offset": (noted(note(4, quad(0)), without=3), "PADDR_OFFSET 0x0"),
    "below the base": (
        noted(note(4, quad(0x20_0000)), note(1, quad(BASE - 0x10_0000))),
        "0xffffffff7ff00000 to 0xffffffff7ff06000, and VIRT_BASE 0xffffffff80000000"),
    "entry below": (noted(note(1, quad(BASE + 0xF_FFFF))), f"{EXTENT}, and ENTRY 0xffffffff800fffff is outside"),
    "entry above": (noted(note(1, quad(BASE + 0x10_6001))), f"{EXTENT}, and ENTRY 0xffffffff80106001 is outside"),
    "around": (noted(note(3, quad((1 << 64) - 0x10_3000))), "around the end of addresses (VIRT_BASE 0xffffffffffef"),
    "not at a page": (
        Kernel(loads=[Load(0xF_FFF0, b"code", 0x1000)]),
        "0xffffffff800ffff0 to 0xffffffff80100ff0"),
    "p2m inside": (noted(note(15, quad(BASE + 0x10_5FFF))), f"{EXTENT}, and INIT_P2M 0xffffffff80105fff is inside"),
    "hypercalls": (noted(note(2, quad(BASE - 1))), "HYPERCALL_PAGE 0xffffffff7fffffff is below VIRT_BASE"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_PV)
def test_pv_obstacles_name_the_reason(kind: str) -> None:
    kernel, fragment = NOT_PV[kind]
    [obstacle] = (
        pv_obstacles(parse(kernel)) if kind not in {"paddr offset", "nothing"} else pv_obstacles(parse(kernel))[:1]
    )
    assert fragment in obstacle


def test_pv_obstacles_name_all_reasons() -> None:
    image = parse(noted(note(8, text("x")), note(5, text("y")), note(10, text("!dom0|!z")), note(1, quad(5))))
    assert len(pv_obstacles(image)) == 5


def test_pvh_obstacles() -> None:
    assert pvh_obstacles(parse(noted(note(18, word(0x10_0020))))) == []
    # PVH needs only the entry.
    assert pvh_obstacles(parse(Kernel(notes=[note(18, word(0x10_0020))], machine=3))) == []
    [obstacle] = pvh_obstacles(parse(Kernel()))
    assert "PHYS32_ENTRY" in obstacle
    [obstacle] = pvh_obstacles(parse(noted(note(18, word(0x20_0000)))))
    assert "0x200000" in obstacle
    assert "0x100000 to 0x106000" in obstacle
    assert len(pvh_obstacles(parse(noted(note(18, word(0x10_0020)), note(10, text("!dom0")))))) == 1


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (noted(note(15, quad(1 << 39))), None),
        (Kernel(), "it has no INIT_P2M note"),
        (noted(note(15, quad(BASE))), "INIT_P2M 0xffffffff80000000 is not below VIRT_BASE 0xffffffff80000000"),
        (noted(note(15, quad((1 << 39) + 8))), "INIT_P2M 0x8000000008 is not page-aligned"),
        (kernel32(notes=[*PV32, note(15, word(0x10_0000))]), "INIT_P2M 0x100000 is for 64-bit kernels only"),
    ],
    ids=["valid", "absent", "not-below-virt-base", "unaligned", "32-bit"],
)
def test_p2m_obstacle_names_the_reason_and_is_a_remark(kernel: Kernel, reason: str | None) -> None:
    image = parse(kernel)
    assert pv_obstacles(image) == []
    assert p2m_obstacle(image) == reason
    is_remark = reason is not None and image.parameters.init_p2m is not None
    assert [remark.startswith(str(reason)) for remark in remarks(image)] == [True] * is_remark


@pytest.mark.parametrize("compression", ["zstd", "xz"])
def test_remarks_name_what_older_loaders_cannot_unpack(compression: str) -> None:
    """libxenguest unpacks zstd from 4.15 on (xg_dom_bzimageloader.c), and PV GRUB's mini-os does not."""
    image = KernelImage.parse(bzimage(compression, Kernel(notes=[*PV64]).to_bytes()))
    assert ["4.15" in remark for remark in remarks(image)] == [True] * (compression == "zstd")


@pytest.mark.parametrize(
    ("pages", "text"), [(0x4C12, "76.07 MiB"), (0x400, "4 MiB"), (0x40000, "1 GiB"), (1, "0 MiB"), (0x180, "1.5 MiB")]
)
def test_format_pages_has_no_float_noise(pages: int, text: str) -> None:
    assert _format_pages(pages) == f"{pages:#x} pages ({text})"


def test_remarks_of_overlaps_features_and_symbols() -> None:
    overlapping = [Load(0x10_0000 + 0x100 * i, b"code", 0x200) for i in range(8)]
    image = parse(noted(note(10, text("a|b")), note(11, text("yes")), loads=overlapping))
    warnings = remarks(image)
    assert warnings[0].startswith("segments overlap: paddr 0x100000 with 0x200 bytes, and paddr 0x100100")
    assert warnings[4:] == [
        "3 more segments overlap",
        "FEATURES has names that Xen does not know: a, b",
        "BSD_SYMTAB asks for a symbol table, and the file has none with strings",
    ]
    assert pv_obstacles(image) == []


def test_pv_obstacles_ignore_unknown_features_of_legacy_string() -> None:
    legacy = kernel32(
        place="__xen_guest", legacy=f"{LEGACY},FEATURES=!z", loads=[Load(0xC010_0000, b"", 5)], entry=0xC010_0000
    )
    assert pv_obstacles(parse(legacy)) == []
    assert remarks(parse(legacy)) == ["FEATURES has names that Xen does not know: z"]


@pytest.mark.parametrize("link", [0, 1, 99])
def test_remarks_of_symbol_table_without_strings(link: int) -> None:
    kernel = noted(note(11, text("yes")), sections=[Section(".symtab", 2, bytes(24), link=link)])
    assert parse(kernel).kernel_end == BASE + 0x10_6000
    assert len(remarks(parse(kernel))) == 1
