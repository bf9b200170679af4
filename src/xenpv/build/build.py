"""Builds a domain: carries a layout, which knows only pfns, out on a host.

The order of steps and the result, page for page, are libxc's. Cost follows the pages that are written: free pages are
only populated.

Source: xen.git:tools/libs/guest/xg_dom_boot.c xc_dom_boot_mem_init(), xc_dom_boot_image()
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from xenpv.abi.x86 import PAGE_SHIFT, PAGE_SIZE
from xenpv.errors import HostError, RequestError
from xenpv.frames import PAGES_PER_BATCH, U8, U64, DomId
from xenpv.host.protocol import Ring, Toolstack, destroy_unfinished
from xenpv.host.xenstore_nodes import MAX_MEM_SLACK
from xenpv.image import start
from xenpv.image.kernel import KernelImage
from xenpv.image.layout import Layout, Part
from xenpv.io.progress import Progress, ProgressCallback
from xenpv.memory.p2m_writer import encode_entries
from xenpv.memory.page_tables import frame_to_cr3, localise
from xenpv.memory.physmap import CHUNK, CHUNK_ORDER
from xenpv.runs import FrameMap, Runs, group_rows

_EXTENTS_PER_CALL = 4096  # 8 GiB in one populate_physmap()
_MFN_4G = 0x10_0000  # the frame at machine address 4 GiB


@dataclass(frozen=True, slots=True)
class Built:
    """A domain that was built and not started.

    Attributes:
        domid: The domain, which is paused.
        memory: The mfn of each pfn.
        console: Its console ring.
        xenstore: Its xenstore ring.
    """

    domid: DomId
    memory: FrameMap
    console: Ring
    xenstore: Ring


def build(
    host: Toolstack,
    image: KernelImage,
    layout: Layout,
    ramdisk: bytes | memoryview = b"",
    *,
    name: str | None = None,
    uuid: str | None = None,
    config: bytes | None = None,
    progress: ProgressCallback | None = None,
) -> Built:
    """Build a paused domain as planned; unpausing it starts its kernel.

    After an error nothing of it is left.

    Args:
        host: The host on which the domain is created.
        image: The kernel.
        layout: The plan for this kernel and this ramdisk.
        ramdisk: Content of the ramdisk.
        name: Name of the domain.
        uuid: Its uuid.
        config: Configuration that is kept for xl: source.config.libxl_config().
        progress: Called after each batch.

    Raises:
        RequestError: The host has too little memory, or the ramdisk has another size than planned.
        HostError: Xen refuses something.
    """
    _check(host, layout, ramdisk)
    domid = host.create(
        layout.width, vcpus=layout.vcpus, max_pages=layout.nr_pages + MAX_MEM_SLACK, name=name, uuid=uuid
    )
    try:
        report = progress or (lambda _progress: None)
        host.set_memory_map(domid, layout.p2m_entries)
        memory = _populate(host, domid, layout, report)
        built = _Builder(host, domid, memory, image=image, layout=layout, report=report).run(ramdisk)
        if config is not None:
            host.set_configuration(domid, config)
    except BaseException as failure:
        destroy_unfinished(host, domid, failure)
        raise
    return built


def _check(host: Toolstack, layout: Layout, ramdisk: bytes | memoryview) -> None:
    """Raise RequestError for an unplanned ramdisk, or for too little memory."""
    segment = layout.segment(Part.RAMDISK)
    planned = segment.size if segment else 0
    if len(ramdisk) != planned:
        problem = f"the ramdisk has {len(ramdisk)} bytes, and the layout was planned for {planned}"
        raise RequestError(f"{problem}: plan again with this ramdisk", needed=len(ramdisk), available=planned)
    free = host.free_pages()
    if free < layout.nr_pages:
        problem = f"the domain needs {layout.nr_pages:#x} pages, and the host has {free:#x} free"
        raise RequestError(problem, needed=layout.nr_pages, available=free)


# --- memory ----------------------------------------------------------------------------------------------------------


def _populate(host: Toolstack, domid: DomId, layout: Layout, report: ProgressCallback) -> FrameMap:
    """Populate all pfns of the layout.

    Uses extents while the host has some, then single pages.

    Raises:
        HostError: The host has too few pages.
    """
    runs: list[tuple[Runs, U64]] = []
    populated = 0
    for pfns in layout.ranges:
        for first, end, order in _populate_calls(pfns):
            pfn = first
            for try_order in (order, 0) if order else (0,):
                extent = 1 << try_order
                extents = np.arange(pfn, end, extent, dtype=np.uint64)
                mfns = host.populate_physmap(domid, extents, order=try_order)
                if len(mfns):
                    runs.append(_as_runs(extents[: len(mfns)], mfns, extent))
                pfn += len(mfns) * extent
                if pfn >= end:
                    break
            populated += pfn - first
            report(Progress(populated, layout.nr_pages, "populating memory", "pages"))
            if pfn < end:
                problem = f"dom{domid}: the host gave only {populated:#x} of {layout.nr_pages:#x} pages"
                raise HostError(problem, op="populate_physmap", domid=domid)
    return FrameMap(Runs.concatenate(pfns for pfns, _ in runs), np.concatenate([mfns for _, mfns in runs]))


def _populate_calls(pfns: range) -> Iterator[tuple[int, int, int]]:
    """Cut a range into calls of populate_physmap().

    Each call is its first pfn, the pfn after its last one, and its order.
    """
    extents_end = pfns.start + len(pfns) // CHUNK * CHUNK
    for first in range(pfns.start, extents_end, _EXTENTS_PER_CALL * CHUNK):
        yield first, min(first + _EXTENTS_PER_CALL * CHUNK, extents_end), CHUNK_ORDER
    if extents_end < pfns.stop:
        yield extents_end, pfns.stop, 0


def _as_runs(pfns: U64, mfns: U64, extent: int) -> tuple[Runs, U64]:
    """Join extents of ``extent`` pages that continue each other.

    Returns the runs, and the first mfn of each.
    """
    starts, extents = group_rows(np.diff(mfns) != extent, len(pfns))
    return Runs(pfns[starts], extents * extent), mfns[starts]


def _batches(pfns: range) -> Iterator[range]:
    """Cut a range into batches that are mapped at once."""
    for first in range(pfns.start, pfns.stop, PAGES_PER_BATCH):
        yield range(first, min(first + PAGES_PER_BATCH, pfns.stop))


class _Builder:
    """Fills the populated memory of one domain, and sets all other state."""

    def __init__(
        self,
        host: Toolstack,
        domid: DomId,
        memory: FrameMap,
        *,
        image: KernelImage,
        layout: Layout,
        report: ProgressCallback,
    ) -> None:
        self.host = host
        self.domid = domid
        self.memory = memory
        self.image = image
        self.layout = layout
        self.report = report

    def run(self, ramdisk: bytes | memoryview) -> Built:
        host, domid, layout = self.host, self.domid, self.layout
        self._load_kernel()
        self._load_ramdisk(ramdisk)
        self._write_p2m()
        self._write_page_tables()
        info = layout.start_info
        daemons = host.daemons()
        xenstore = Ring(self._mfn(info.store_pfn), host.alloc_event_channel(domid, daemons.xenstore))
        console = Ring(self._mfn(info.console_pfn), host.alloc_event_channel(domid, daemons.console))
        self._clear(range(info.store_pfn, info.store_pfn + 1))
        self._clear(range(info.console_pfn, info.console_pfn + 1))
        self._write_start_info(xenstore, console)
        if layout.hypercall_pfn is not None:
            host.init_hypercall_page(domid, self._mfn(layout.hypercall_pfn))
        top = self._mfn(layout.registers.cr3_pfn)
        host.pin_tables(domid, np.array([top], np.uint64), np.array([4 if layout.width == 8 else 3], np.uint8))
        host.write_shared_info(domid, start.shared_info(layout.width))
        host.set_vcpu_context(domid, 0, start.vcpu_context(layout, _cr3(top, layout)))
        host.seed_grants(domid, console=console.mfn, xenstore=xenstore.mfn)
        host.introduce(domid, console=console, xenstore=xenstore)
        return Built(domid, self.memory, console, xenstore)

    def _mfn(self, pfn: int) -> int:
        return int(self.memory.lookup_range(range(pfn, pfn + 1))[0])

    def _write(self, pfns: U64, pages: U8) -> None:
        """Write whole pages, uint8 of shape (n, 4096)."""
        self.host.write_frames(self.domid, self.memory.lookup(pfns), pages)

    def _clear(self, pfns: range) -> None:
        """Zero pages: a new frame still holds what its last owner wrote."""
        for batch in _batches(pfns):
            with self.host.map_writable(self.domid, self.memory.lookup_range(batch)) as pages:
                pages[:] = 0

    def _copy(self, address: int, content: U8) -> None:
        """Copy bytes to a pseudo-physical address, in bytes."""
        end = address + len(content)
        for batch in _batches(range(address >> PAGE_SHIFT, -(-end // PAGE_SIZE)) if len(content) else range(0)):
            batch_start = batch.start * PAGE_SIZE
            low, high = max(batch_start, address), min(batch.stop * PAGE_SIZE, end)
            with self.host.map_writable(self.domid, self.memory.lookup_range(batch)) as pages:
                pages.reshape(-1)[low - batch_start : high - batch_start] = content[low - address : high - address]

    # --- content -----------------------------------------------------------------------------------------------------

    def _load_kernel(self) -> None:
        layout = self.layout
        kernel = layout.segment(Part.KERNEL)
        assert kernel is not None
        self._clear(kernel.pfns)
        overlap = bool(self.image.elf.overlaps())  # otherwise the zeros after a segment are there already
        loads = list(self.image.loads())
        for number, (vaddr, content, zeros) in enumerate(loads):
            self.report(Progress(number, len(loads), "loading the kernel"))
            address = vaddr - layout.virt_base
            self._copy(address, np.frombuffer(content, np.uint8))
            if overlap:
                self._copy(address + len(content), np.broadcast_to(np.zeros(1, np.uint8), zeros))

    def _load_ramdisk(self, ramdisk: bytes | memoryview) -> None:
        segment = self.layout.segment(Part.RAMDISK)
        if segment is not None:
            self.report(Progress(0, segment.size, "loading the ramdisk", "bytes"))
            self._clear(range(segment.pfns.stop - 1, segment.pfns.stop))  # the rest of its last page
            self._copy(segment.first * PAGE_SIZE, np.frombuffer(ramdisk, np.uint8))

    def _write_p2m(self) -> None:
        """Write the linear p2m list in batches, without a second array of the whole."""
        layout, segment = self.layout, self.layout.segment(Part.P2M)
        assert segment is not None
        entries_per_page = PAGE_SIZE // layout.width
        for batch in _batches(segment.pfns):
            first = (batch.start - segment.first) * entries_per_page
            mfns = self.memory.lookup_range(range(first, first + len(batch) * entries_per_page))
            mfns[max(layout.p2m_entries - first, 0) :] = 0  # after the list's end, on its last page
            with self.host.map_writable(self.domid, self.memory.lookup_range(batch)) as pages:
                pages[:] = encode_entries(mfns.reshape(len(batch), entries_per_page), layout.width)
            self.report(Progress(batch.stop - segment.first, segment.pages, "writing the p2m", "pages"))

    def _write_page_tables(self) -> None:
        written, total = 0, sum(span.count for span in self.layout.tables)
        for _, pfns, entries in start.iter_page_tables(self.layout):
            tables, _ = localise(entries, self.memory.lookup)
            self._write(pfns, tables.view(np.uint8).reshape(-1, PAGE_SIZE))
            written += len(pfns)
            self.report(Progress(written, total, "writing page tables", "tables"))

    def _write_start_info(self, xenstore: Ring, console: Ring) -> None:
        page = start.start_info(
            self.layout,
            shared_info=self.host.info(self.domid).shared_info_mfn << PAGE_SHIFT,
            store_mfn=xenstore.mfn,
            store_evtchn=xenstore.port,
            console_mfn=console.mfn,
            console_evtchn=console.port,
        )
        pfn = np.array([self.layout.start_info.pfn], np.uint64)
        self._write(pfn, np.frombuffer(page, np.uint8).reshape(1, PAGE_SIZE))


def _cr3(top: int, layout: Layout) -> int:
    """Return the cr3 for a top table's mfn.

    Raises:
        RequestError: The kernel cannot use a top table at 4 GiB or above.
    """
    if layout.top_below_4g and top >= _MFN_4G:
        problem = (
            f"the top page table got mfn {top:#x}, at 4 GiB or above; this kernel (PAE without extended cr3) needs"
        )
        raise RequestError(f"{problem} one below mfn {_MFN_4G:#x}", needed=_MFN_4G, available=top)
    return frame_to_cr3(top, layout.width)
