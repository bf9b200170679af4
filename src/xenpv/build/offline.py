"""Builds a domain into a save file, without a hypervisor.

``xl restore`` starts its kernel at the entry point.

The domain is built on a model host and saved from there. A restorer populates every page, localises page tables and
p2m, fills in start info, and lets vcpu 0 run at its registers, which are those of the start of day.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from xenpv.abi.x86 import VCPU_GUEST_CONTEXT
from xenpv.abi.xen import INVALID_MFN, START_INFO
from xenpv.build.build import Built, build
from xenpv.host.protocol import Mover
from xenpv.image.kernel import KernelImage
from xenpv.image.layout import Layout, plan
from xenpv.image.request import Request
from xenpv.io.progress import Progress, ProgressCallback
from xenpv.io.sink import Sink
from xenpv.memory.p2m_anchors import Anchors
from xenpv.memory.page_tables import frame_to_cr3
from xenpv.save.save import Summary, save
from xenpv.source.config import libxl_config
from xenpv.stream.seal import Sealer

HOST_BYTES = 8 << 30
"""Bytes of memory that the model host needs beyond the domain's own."""


def plan_file(image: KernelImage, request: Request) -> Layout:
    """Plan a domain that a restorer will start.

    Restorers clear SIF_MOD_START_PFN in start info, so a ramdisk is mapped even for kernels that can find it by pfn.

    Raises:
        ImageError, RequestError: As image.layout.plan().
    """
    mapped = replace(image, parameters=replace(image.parameters, mod_start_pfn=False))
    return plan(mapped, request)


def build_file(
    host: Mover,
    image: KernelImage,
    layout: Layout,
    ramdisk: bytes | memoryview,
    sink: Sink,
    *,
    name: str,
    uuid: str,
    seal: Sealer | None = None,
    progress: ProgressCallback | None = None,
) -> Summary:
    """Build a domain on a model host, and write it as an xl save file.

    Args:
        host: A sparse model host of its own, with HOST_BYTES more memory than the domain.
        image: The kernel.
        layout: What plan_file() returned for it.
        ramdisk: Content of the ramdisk.
        sink: Receives the file.
        name: Name of the domain.
        uuid: Its uuid.
        seal: Seals the file.
        progress: Called after each batch.

    Raises:
        RequestError, HostError: As build().
        OSError: The sink cannot be written.
    """
    built = build(host, image, layout, ramdisk, name=name, uuid=uuid, progress=progress)
    _publish_p2m(host, built, layout)
    _suspend(host, built, layout)
    config = libxl_config(name, uuid, pages=layout.nr_pages, vcpus=layout.vcpus)

    def report(status: Progress) -> None:
        if progress is not None:
            progress(status._replace(step="writing the file"))

    return save(host, built.domid, sink, config=config, seal=seal, progress=report)


def _publish_p2m(host: Mover, built: Built, layout: Layout) -> None:
    """Publish the p2m list that start info names, so that restorers fill it in."""
    top = int(built.memory.lookup_range(range(layout.registers.cr3_pfn, layout.registers.cr3_pfn + 1))[0])
    linear_list = frame_to_cr3(top, layout.width), layout.start_info.mfn_list
    anchors = Anchors(layout.width, layout.p2m_entries, INVALID_MFN[layout.width], *linear_list)
    for offset, store in anchors.shared_info_writes():
        host.write_shared_info(built.domid, store, offset)


def _suspend(host: Mover, built: Built, layout: Layout) -> None:
    """Leave start info and vcpu 0 as a guest does when it suspends.

    Start info names the pfns of both rings, and vcpu 0's third argument is the mfn of start info.
    """
    info, width, domid = layout.start_info, layout.width, built.domid
    mfn = built.memory.lookup_range(range(info.pfn, info.pfn + 1))
    page = host.map_frames(domid, mfn)[0].copy()
    fields = page[0, : START_INFO.size(width)].view(START_INFO[width])
    fields["store_mfn"], fields["console"]["domU"]["mfn"] = info.store_pfn, info.console_pfn
    host.write_frames(domid, mfn, page)
    data = bytearray(host.vcpu_context(domid, 0))
    context = np.frombuffer(data, VCPU_GUEST_CONTEXT[width])
    context["user_regs"]["rdx" if width == 8 else "edx"] = mfn[0]
    host.set_vcpu_context(domid, 0, bytes(data))
