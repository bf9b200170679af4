"""A domain built into a file, with no hypervisor: what xl restores begins life at its kernel's entry point.

It is built on the model host and saved from there. A restorer gives every page a frame, puts that into the page tables
and into the p2m list, fills in start info, and lets vcpu 0 run on where it stands, which is where it starts.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from xenpv.abi.x86 import VCPU_GUEST_CONTEXT
from xenpv.abi.xen import INVALID_MFN, START_INFO
from xenpv.build.build import build
from xenpv.host.model.host import ModelHost
from xenpv.image.kernel import KernelImage
from xenpv.image.layout import Layout, plan
from xenpv.image.request import Request
from xenpv.io.progress import Progress, ProgressCallback
from xenpv.io.sink import Sink
from xenpv.memory.anchors import Anchors
from xenpv.memory.pagetables import cr3_of
from xenpv.save.save import Summary, save
from xenpv.source.config import as_libxl

_ROOM = 8 << 30  # bytes of the host that are not the domain's


def plan_file(image: KernelImage, request: Request) -> Layout:
    """The plan of a domain that a restorer will start.

    Restorers clear start info's flags, and with them SIF_MOD_START_PFN: so a ramdisk is mapped, whether or not the
    kernel could find it by its pfn. Raises as image.layout.plan().
    """
    mapped = replace(image, parameters=replace(image.parameters, mod_start_pfn=False))
    return plan(mapped, request)


def build_file(
    image: KernelImage,
    layout: Layout,
    ramdisk: bytes | memoryview,
    sink: Sink,
    *,
    name: str,
    uuid: str,
    progress: ProgressCallback | None = None,
) -> Summary:
    """Write an xl save file of a domain as ``plan_file`` has it. Raises as build() and save()."""
    host = ModelHost((layout.nr_pages << 12) + _ROOM, sparse=True)
    built = build(host, image, layout, ramdisk, name=name, uuid=uuid, progress=progress)
    domid, width = built.domid, layout.width
    top = int(built.memory.of(range(layout.registers.cr3_pfn, layout.registers.cr3_pfn + 1))[0])
    # The list that the kernel will find in start info is the p2m that the restorer fills in.
    where = cr3_of(top, width), layout.start_info.mfn_list
    for offset, store in Anchors(width, layout.p2m_entries, INVALID_MFN[width], *where).stores():
        host.write_shared_info(domid, store, offset)
    # As a guest leaves start info when it suspends: pfns of the two rings, and in vcpu 0's third argument where it is.
    info = layout.start_info
    mfn = built.memory.of(range(info.pfn, info.pfn + 1))
    page = host.map_frames(domid, mfn)[0].copy()
    fields = page[0, : START_INFO.size(width)].view(START_INFO[width])
    fields["store_mfn"], fields["console"]["domU"]["mfn"] = info.store_pfn, info.console_pfn
    host.write_frames(domid, mfn, page)
    data = bytearray(host.vcpu_context(domid, 0))
    context = np.frombuffer(data, VCPU_GUEST_CONTEXT[width])
    context["user_regs"]["rdx" if width == 8 else "edx"] = mfn[0]
    host.set_vcpu_context(domid, 0, bytes(data))
    text = as_libxl(name, uuid, pages=layout.nr_pages, vcpus=layout.vcpus)

    def writing(status: Progress) -> None:
        if progress is not None:
            progress(status._replace(step="writing the file"))

    return save(host, domid, sink, config=text, progress=writing)
