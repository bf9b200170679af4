"""plan() refuses what does not fit, with needed and available numbers."""

from __future__ import annotations

import pytest

from tests.support.images import GIB, MIB, P2M, TIB, UNMAPPED, image, sized
from tests.support.writers.kernel import BASE, PV64, Kernel, kernel32, note, quad, text
from xenpv.errors import ImageError, RequestError
from xenpv.image.capacity import memory_limits
from xenpv.image.layout import plan
from xenpv.image.request import Request
from xenpv.image.verdict import pv_obstacles

ROOM = 0x8000_0000 // 4096 - 1024 - 5120 - 3 - 1026 - 129  # 2 GiB, but for 4 MiB, a kernel, 3 pages, tables, the rest
CASES = {
    "half a page": (sized(2), Request(4097), "4097 bytes", 8192, 4097),
    "no memory": (sized(2), Request(0), "memory of 0 bytes", 4096, 0),
    "no vcpus": (sized(2), Request(64 * MIB, vcpus=0), "0 vcpus", 1, 0),
    "many vcpus": (sized(2), Request(64 * MIB, vcpus=8193), "8192", 8193, 8192),
    "long line": (sized(2), Request(64 * MIB, cmdline="ä" * 512), "a command line of 1024 bytes", 1024, 1023),
    "zero in line": (sized(2), Request(64 * MIB, cmdline="a\0b"), "has a zero byte, at 1", None, None),
    "negative ramdisk": (sized(2), Request(64 * MIB, ramdisk=-1), "a ramdisk of -1 bytes", -1, 0),
    "too little": (
        sized(2),
        Request(3 * MIB),
        "0x400 pages (4 MiB)",
        0x400,
        0x300,
    ),
    "ramdisk and the rest": (
        sized(2, UNMAPPED),
        Request(5 * MIB, ramdisk=2 * MIB),
        "0x200 pages (2 MiB) of it the ramdisk",
        0x600,
        0x500,
    ),
    "ramdisk alone": (
        sized(2),
        Request(64 * MIB, ramdisk=65 * MIB),
        "0x4000 pages (64 MiB)",
        0x4100,
        0x4000,
    ),
    "ramdisk beyond the mapping": (
        sized(20, P2M),
        Request(4 * GIB, ramdisk=2 * GIB),
        "0xffffffff80000000 to 0xffffffffffc00000",
        0x80000,
        ROOM,
    ),
    "without INIT_P2M": (
        sized(20),
        Request(1100 * GIB),
        "INIT_P2M",
        1100 << 18,
        0xFC6_F400,
    ),
    "kernel too large": (sized(2046), Request(4 * GIB), "can be started with no memory at all", 1 << 20, 0),
    "m2p": (
        sized(2, P2M),
        Request(200 * TIB),
        "0x800000000 entries",
        200 << 28,
        1 << 35,
    ),
    "32 bits": (image(kernel32()), Request(200 * GIB), "table for 32-bit guests", 200 << 18, 0x298_0000),
}


@pytest.mark.parametrize("case", CASES)
def test_plan_what_does_not_fit_raises_request_error(case: str) -> None:
    kernel, request, number, needed, available = CASES[case]
    with pytest.raises(RequestError) as e:
        plan(kernel, request)
    assert number in str(e.value)
    assert (e.value.needed, e.value.available) == (needed, available)


def test_plan_at_the_limit_fits_and_one_page_more_does_not() -> None:
    kernel = sized(20)
    most = memory_limits(kernel)[-1].max_pages
    assert plan(kernel, Request(most << 12)).mapping_end == (1 << 64) - 4 * MIB
    with pytest.raises(RequestError) as e:
        plan(kernel, Request(most + 1 << 12))
    assert e.value.available == most
    # The same for the ramdisk that the error names as available.
    with pytest.raises(RequestError) as e:
        plan(kernel, Request(4 * GIB, ramdisk=2 * GIB))
    assert e.value.available is not None
    room = e.value.available << 12
    assert memory_limits(kernel, initrd=room)[-1].min_pages is not None
    assert memory_limits(kernel, initrd=room + 1)[-1].min_pages is None


def test_plan_with_min_pages_fits_and_one_page_less_does_not() -> None:
    for kernel in (sized(20), sized(20, P2M), sized(20, UNMAPPED)):
        for ramdisk in (0, 9 * MIB):
            least = memory_limits(kernel, initrd=ramdisk)[0].min_pages
            assert least is not None
            assert plan(kernel, Request(least << 12, ramdisk=ramdisk)).used == least
            with pytest.raises(RequestError) as e:
                plan(kernel, Request(least - 1 << 12, ramdisk=ramdisk))
            assert (e.value.needed, e.value.available) == (least, least - 1)


def test_plan_limit_counts_holes() -> None:
    ranges = (range(0x4000), range(1 << 28, (1 << 28) + 1))
    request = Request(64 * MIB + 4096, ranges=ranges)
    assert (
        plan(sized(2, P2M, UNMAPPED), Request(4 * GIB + 4096, ranges=(range(1 << 20), ranges[1]))).p2m_entries
        == (1 << 28) + 1
    )
    with pytest.raises(RequestError) as e:
        plan(sized(20), request)
    assert e.value.needed == (1 << 28) + 1


def test_plan_kernel_that_cannot_be_started_raises_image_error() -> None:
    for kernel, count in ((image(Kernel(notes=[])), 1), (sized(2, note(8, text("x")), note(5, text("y"))), 2)):
        obstacles = pv_obstacles(kernel)
        assert len(obstacles) == count
        with pytest.raises(ImageError) as e:
            plan(kernel, Request(64 * MIB))
        assert all(obstacle in str(e.value) for obstacle in obstacles)
    notes = [*PV64, note(3, quad(BASE - 0x800)), note(4, quad((1 << 64) - 0x800)), note(1, quad(BASE + 0x10_0000))]
    with pytest.raises(ImageError, match="0xffffffff7ffff800") as e:
        plan(image(Kernel(notes=notes)), Request(64 * MIB))
    assert e.value.note == "VIRT_BASE"
