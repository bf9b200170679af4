"""build_file(): the file verifies, holds what the builder writes, and costs what is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.images import GIB, MIB, P2M, UNMAPPED, image
from tests.support.saving import MemorySink
from tests.support.writers.kernel import PV64, Kernel, kernel32
from xenpv.abi.x86 import PAGE_SIZE
from xenpv.abi.xen import SIF_MOD_START_PFN, START_INFO
from xenpv.build.offline import HOST_BYTES, build_file, plan_file
from xenpv.frames import PageType
from xenpv.host.model.host import ModelHost
from xenpv.image.kernel import KernelImage
from xenpv.image.layout import Layout, Part
from xenpv.image.request import Request
from xenpv.save.save import Summary
from xenpv.source.config import Config, libxl_config
from xenpv.source.saved import SavedDomain
from xenpv.verify.stream import verify

UUID = "01234567-89ab-cdef-0123-456789abcdef"
RAMDISK = bytes(range(256)) * 40 + b"end"
KERNELS = {
    "64 bit, p2m outside": image(Kernel(notes=[*PV64, P2M, UNMAPPED])),
    "64 bit, p2m inside": image(Kernel()),
    "32 bit": image(kernel32()),
}


def built_file(image_: KernelImage, layout: Layout, ramdisk: bytes = b"") -> tuple[MemorySink, Summary]:
    """Build a file on a model host of its own."""
    sink, host = MemorySink(), ModelHost((layout.nr_pages << 12) + HOST_BYTES, sparse=True)
    return sink, build_file(host, image_, layout, ramdisk, sink, name="built", uuid=UUID)


@pytest.mark.parametrize("kernel", KERNELS)
def test_build_file_verifies_and_holds_start_of_day(kernel: str, tmp_path: Path) -> None:
    image_, file = KERNELS[kernel], tmp_path / "built.save"
    layout = plan_file(image_, Request(32 * MIB, ramdisk=len(RAMDISK), vcpus=2, cmdline="a=b"))
    sink, summary = built_file(image_, layout, RAMDISK)
    file.write_bytes(sink.data)
    report = verify(str(file))
    assert [str(finding) for finding in report.findings] == []
    with SavedDomain.open(str(file)) as saved:
        config = Config.from_contents(saved.contents)
        assert config is not None
        assert (config.name, config.max_vcpus, config.max_memkb) == ("built", 2, 32 << 10)
        index = saved.contents.index
        assert summary.pages + summary.without_content == sum(index.count().values()) == layout.nr_pages
        assert index.count()[PageType.XALLOC] == summary.without_content > layout.nr_pages // 2
        assert saved.p2m.leaf_count == layout.segment(Part.P2M).pages  # type: ignore[union-attr]
        memory = saved.memory
        for segment in image_.segments:
            content = bytes(image_.content(segment)).ljust(segment.memsz, b"\0")
            assert memory.read_virtual(image_.virtual(segment.paddr), segment.memsz) == content
        start = START_INFO.read(memory.page(layout.start_info.pfn), layout.width)
        assert (int(start["store_mfn"]), int(start["flags"]) & SIF_MOD_START_PFN) == (layout.start_info.store_pfn, 0)
        assert memory.read_virtual(int(start["mod_start"]), int(start["mod_len"])) == RAMDISK
        context = saved.vcpu_context(0)
        assert context is not None
        assert int(context["user_regs"]["rip" if layout.width == 8 else "eip"]) == layout.registers.ip
        assert saved.start_info_pfn == layout.start_info.pfn


def test_build_file_size_follows_written_pages() -> None:
    """Of 8 GiB the file holds the p2m list, the kernel, and 8 bytes for each page that was never written."""
    kernel = KERNELS["64 bit, p2m outside"]
    layout = plan_file(kernel, Request(8 * GIB))
    sink, summary = built_file(kernel, layout)
    assert summary.pages < layout.nr_pages // 512 + 100
    assert len(sink.data) < summary.pages * (PAGE_SIZE + 8) + layout.nr_pages * 9


def test_as_libxl_names_vcpus_and_memory() -> None:
    layout = plan_file(KERNELS["32 bit"], Request(64 * MIB, vcpus=3))
    text = json.loads(libxl_config("n", "u", pages=layout.nr_pages, vcpus=layout.vcpus))
    assert text["b_info"]["avail_vcpus"] == [0, 1, 2]
    assert text["b_info"]["max_memkb"] == np.int64(64 << 10)
