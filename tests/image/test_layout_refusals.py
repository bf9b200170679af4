"""What cannot be planned, each with the numbers and in words."""

from __future__ import annotations

import pytest

from tests.support.images import GIB, MIB, P2M, TIB, UNMAPPED, image, sized
from tests.support.writers.kernel import BASE, PV64, Kernel, kernel32, note, quad, text
from xenpv.errors import ImageError, RequestError
from xenpv.image.capacity import limits
from xenpv.image.layout import plan
from xenpv.image.request import Request

ROOM = 0x8000_0000 // 4096 - 1024 - 5120 - 3 - 1026 - 129  # 2 GiB, but for 4 MiB, a kernel, 3 pages, tables, the rest
CASES = {
    "half a page": (sized(2), Request(4097), "4097 bytes is not a whole number of pages of 4096", 8192, 4097),
    "no memory": (sized(2), Request(0), "memory of 0 bytes", 4096, 0),
    "no vcpus": (sized(2), Request(64 * MIB, vcpus=0), "0 vcpus", 1, 0),
    "many vcpus": (sized(2), Request(64 * MIB, vcpus=8193), "no more than 8192", 8193, 8192),
    "long line": (sized(2), Request(64 * MIB, cmdline="ä" * 512), "a command line of 1024 bytes", 1024, 1023),
    "zero in line": (sized(2), Request(64 * MIB, cmdline="a\0b"), "has a zero byte, at 1", None, None),
    "negative ramdisk": (sized(2), Request(64 * MIB, ramdisk=-1), "a ramdisk of -1 bytes", -1, 0),
    "too little": (
        sized(2),
        Request(3 * MIB),
        (
            "memory of 0x300 pages (3 MiB) is too little: what is there at the start takes 0x400 pages (4 MiB); "
            "the least that will do is 0x400 pages (4 MiB)"
        ),
        0x400,
        0x300,
    ),
    "ramdisk and the rest": (
        sized(2, UNMAPPED),
        Request(5 * MIB, ramdisk=2 * MIB),
        "takes 0x600 pages (6 MiB), 0x200 pages (2 MiB) of it the ramdisk",
        0x600,
        0x500,
    ),
    "ramdisk alone": (
        sized(2),
        Request(64 * MIB, ramdisk=65 * MIB),
        "a ramdisk of 0x4100 pages (65 MiB) is larger than the memory, 0x4000 pages (64 MiB)",
        0x4100,
        0x4000,
    ),
    "ramdisk beyond the mapping": (
        sized(20, P2M),
        Request(4 * GIB, ramdisk=2 * GIB),
        (
            "does not fit: it has to be mapped, for the kernel has no MOD_START_PFN note, within the addresses from "
            "0xffffffff80000000 to 0xffffffffffc00000, the end of all addresses"
        ),
        0x80000,
        ROOM,
    ),
    "without INIT_P2M": (
        sized(20),
        Request(1100 * GIB),
        (
            "this kernel can be started with no more than 0xfc6f400 pages (1033972 MiB); that is bounded by the "
            "addresses from 0xffffffff80000000 to 0xffffffffffc00000, the end of all addresses. Its p2m list has to "
            "lie inside the initial mapping, for it has no INIT_P2M note: take a kernel with that note, or "
            "give it less memory"
        ),
        1100 << 18,
        0xFC6_F400,
    ),
    "kernel too large": (sized(2046), Request(4 * GIB), "can be started with no memory at all", 1 << 20, 0),
    "m2p": (
        sized(2, P2M),
        Request(200 * TIB),
        "is bounded by the 0x800000000 entries of Xen's m2p table",
        200 << 28,
        1 << 35,
    ),
    "32 bits": (image(kernel32()), Request(200 * GIB), "table for 32-bit guests", 200 << 18, 0x298_0000),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit(case: str) -> None:
    kernel, request, words, needed, available = CASES[case]
    with pytest.raises(RequestError) as caught:
        plan(kernel, request)
    assert words in str(caught.value)
    assert (caught.value.needed, caught.value.available) == (needed, available)


def test_the_limit_is_that() -> None:
    kernel = sized(20)
    most = limits(kernel)[-1].pages
    assert plan(kernel, Request(most << 12)).mapping_end == (1 << 64) - 4 * MIB
    with pytest.raises(RequestError) as caught:
        plan(kernel, Request(most + 1 << 12))
    assert caught.value.available == most
    # The largest ramdisk that is said to fit does, and a page more does not.
    with pytest.raises(RequestError) as caught:
        plan(kernel, Request(4 * GIB, ramdisk=2 * GIB))
    assert caught.value.available is not None
    room = caught.value.available << 12
    assert limits(kernel, initrd=room)[-1].least is not None
    assert limits(kernel, initrd=room + 1)[-1].least is None


def test_the_least_is_that() -> None:
    for kernel in (sized(20), sized(20, P2M), sized(20, UNMAPPED)):
        for ramdisk in (0, 9 * MIB):
            least = limits(kernel, initrd=ramdisk)[0].least
            assert least is not None
            assert plan(kernel, Request(least << 12, ramdisk=ramdisk)).used == least
            with pytest.raises(RequestError, match="is too little") as caught:
                plan(kernel, Request(least - 1 << 12, ramdisk=ramdisk))
            assert (caught.value.needed, caught.value.available) == (least, least - 1)


def test_the_limit_counts_holes() -> None:
    ranges = (range(0x4000), range(1 << 28, (1 << 28) + 1))
    request = Request(64 * MIB + 4096, ranges=ranges)
    assert (
        plan(sized(2, P2M, UNMAPPED), Request(4 * GIB + 4096, ranges=(range(1 << 20), ranges[1]))).p2m_entries
        == (1 << 28) + 1
    )
    with pytest.raises(RequestError, match=r"a domain of 0x10000001 pages .* no more than 0xfc") as caught:
        plan(sized(20), request)
    assert caught.value.needed == (1 << 28) + 1


def test_a_kernel_that_cannot_be_started() -> None:
    with pytest.raises(ImageError, match="it cannot be started as PV: it has neither Xen ELF notes"):
        plan(image(Kernel(notes=[])), Request(64 * MIB))
    with pytest.raises(ImageError, match=r"for another loader: .*; it is for another Xen ABI"):
        plan(sized(2, note(8, text("x")), note(5, text("y"))), Request(64 * MIB))
    notes = [*PV64, note(3, quad(BASE - 0x800)), note(4, quad((1 << 64) - 0x800)), note(1, quad(BASE + 0x10_0000))]
    with pytest.raises(ImageError, match="VIRT_BASE 0xffffffff7ffff800 is not at the start of a page"):
        plan(image(Kernel(notes=notes)), Request(64 * MIB))
