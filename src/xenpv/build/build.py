"""Building a domain: a layout, which is pfns only, carried out on a host.

The order is libxc's (xen.git:tools/libs/guest/xg_dom_boot.c xc_dom_boot_mem_init(), xc_dom_boot_image()), and so is
what comes out, page for page. Cost follows what is used: free pages are given, and never touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from xenpv.abi.x86 import PAGE_SHIFT, PAGE_SIZE
from xenpv.errors import HostError, RequestError
from xenpv.frames import I64, NO_FRAME, PAGES_PER_BATCH, U8, U64, DomId
from xenpv.host.protocol import Ring, Toolstack
from xenpv.host.xenstore_nodes import SLACK
from xenpv.image import start
from xenpv.image.kernel import KernelImage
from xenpv.image.layout import Layout, Part
from xenpv.io.progress import Progress, ProgressCallback
from xenpv.memory.pagetables import cr3_of, localise
from xenpv.memory.publish import words
from xenpv.memory.radix import counting

_EXTENT = 512  # pages of 2 MiB
_ORDER = 9
_EXTENTS_AT_ONCE = 4096  # 8 GiB
_BELOW_4G = 0x10_0000


@dataclass(frozen=True, slots=True)
class Memory:
    """The frames that a domain was given: ``count`` pages from pfn ``first`` on have the mfns from ``mfn`` on.

    Ascending. As runs, since a list of all would be as large as the p2m: 512 times what extents of 2 MiB take.
    """

    first: I64
    count: I64
    mfn: U64

    def mfns(self, pfns: U64) -> U64:
        """The mfn of each pfn, NO_FRAME where there is no memory."""
        if not len(self.first):
            return np.full(pfns.shape, NO_FRAME)
        at = pfns.astype(np.int64)
        row = np.searchsorted(self.first, at, "right") - 1
        inside = (row >= 0) & (at < self.first[row] + self.count[row])
        return np.where(inside, self.mfn[row] + (at - self.first[row]).astype(np.uint64), NO_FRAME)

    def of(self, pfns: range) -> U64:
        """The mfns of consecutive pfns, which takes no search for each."""
        rows = slice(
            max(int(np.searchsorted(self.first, pfns.start, "right")) - 1, 0),
            int(np.searchsorted(self.first, pfns.stop)),
        )
        first, count, mfn = self.first[rows], self.count[rows], self.mfn[rows].astype(np.int64)
        begin: I64 = np.maximum(first, pfns.start)
        length: I64 = np.maximum(np.minimum(first + count, pfns.stop) - begin, 0)
        found = counting(mfn + begin - first, length).view(np.uint64)
        if len(found) == len(pfns):
            return found
        out = np.full(len(pfns), NO_FRAME)
        out[counting(begin - pfns.start, length)] = found
        return out


@dataclass(frozen=True, slots=True)
class Built:
    """A domain as the builder leaves it: paused, ready to start."""

    domid: DomId
    memory: Memory
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
    """Make a domain as planned, paused; unpausing it starts its kernel.

    ``ramdisk`` is what ``layout`` was planned for, ``config`` is kept for xl (domain.config.as_libxl()). Raises
    RequestError when the host has too little memory, HostError when Xen refuses something: there is no domain then, and
    nothing of it.
    """
    _check(host, layout, ramdisk)
    domid = host.create(layout.width, vcpus=layout.vcpus, max_pages=layout.nr_pages + SLACK, name=name, uuid=uuid)
    try:
        built = _Builder(host, domid, image, layout, progress or (lambda _: None)).run(ramdisk)
        if config is not None:
            host.set_configuration(domid, config)
        return built
    except BaseException:
        host.destroy(domid)
        raise


def _check(host: Toolstack, layout: Layout, ramdisk: bytes | memoryview) -> None:
    planned = layout.segment(Part.RAMDISK)
    if (planned.size if planned else 0) != len(ramdisk):
        have = planned.size if planned else 0
        raise RequestError(f"a ramdisk of {len(ramdisk)} bytes, where one of {have} was planned for", available=have)
    free = host.free_pages()
    if free < layout.nr_pages:
        what = f"the domain takes {layout.nr_pages:#x} pages, and the host has {free:#x} left"
        raise RequestError(what, needed=layout.nr_pages, available=free)


class _Builder:
    """One build of one domain."""

    def __init__(
        self, host: Toolstack, domid: DomId, image: KernelImage, layout: Layout, progress: ProgressCallback
    ) -> None:
        self.host = host
        self.domid = domid
        self.image = image
        self.layout = layout
        self.progress = progress
        self.memory = Memory(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint64))

    def run(self, ramdisk: bytes | memoryview) -> Built:
        host, domid, layout = self.host, self.domid, self.layout
        host.set_memory_map(domid, layout.p2m_entries)
        self._populate()
        self._load(ramdisk)
        self._p2m()
        self._tables()
        info = layout.start_info
        daemons = host.daemons()
        store = Ring(self._mfn(info.store_pfn), host.alloc_event_channel(domid, daemons.xenstore))
        console = Ring(self._mfn(info.console_pfn), host.alloc_event_channel(domid, daemons.console))
        self._clear(range(info.store_pfn, info.store_pfn + 1))
        self._clear(range(info.console_pfn, info.console_pfn + 1))
        self._start_info(store, console)
        if layout.hypercall_pfn is not None:
            host.init_hypercall_page(domid, self._mfn(layout.hypercall_pfn))
        top = self._mfn(layout.registers.cr3_pfn)
        host.pin_tables(domid, np.array([top], np.uint64), np.array([4 if layout.width == 8 else 3], np.uint8))
        host.write_shared_info(domid, start.shared_info(layout.width))
        host.set_vcpu_context(domid, 0, start.vcpu_context(layout, _cr3(top, layout)))
        host.seed_grants(domid, console=console.mfn, xenstore=store.mfn)
        host.introduce(domid, console=console, xenstore=store)
        return Built(domid, self.memory, console, store)

    # --- memory ------------------------------------------------------------------------------------------------------

    def _populate(self) -> None:
        """Frames for every range: extents of 2 MiB as far as they go and the host has them, then single pages."""
        runs: list[tuple[I64, I64, U64]] = []
        given = 0
        for pfns in self.layout.ranges:
            for first, stop, order in _batches(pfns):
                at = first
                for way in (order, 0) if order else (0,):
                    size = 1 << way
                    wanted = np.arange(at, stop, size, dtype=np.uint64)
                    mfns = self.host.populate_physmap(self.domid, wanted, order=way)
                    if len(mfns):
                        runs.append(_runs(wanted[: len(mfns)].astype(np.int64), mfns, size))
                    at += len(mfns) * size
                    if at >= stop:
                        break
                given += at - first
                self.progress(Progress(given, self.layout.nr_pages, "populating memory", "pages"))
                if at < stop:
                    what = f"the host gave {given:#x} of {self.layout.nr_pages:#x} pages"
                    raise HostError(f"dom{self.domid}: {what}", op="populate_physmap", domid=self.domid)
        self.memory = Memory(
            np.concatenate([firsts for firsts, _, _ in runs]),
            np.concatenate([counts for _, counts, _ in runs]),
            np.concatenate([mfns for _, _, mfns in runs]),
        )

    def _mfn(self, pfn: int) -> int:
        return int(self.memory.of(range(pfn, pfn + 1))[0])

    def _write(self, pfns: U64, pages: U8) -> None:
        self.host.write_frames(self.domid, self.memory.mfns(pfns), pages)

    def _clear(self, pfns: range) -> None:
        """Zero some pages: what a frame holds is whatever its last owner left."""
        for some in _pieces(pfns):
            with self.host.map_writable(self.domid, self.memory.of(some)) as pages:
                pages[:] = 0

    def _copy(self, at: int, content: U8) -> None:
        """Bytes to a pseudo-physical address, in bytes."""
        pfns = range(at >> PAGE_SHIFT, (at + len(content) - 1 >> PAGE_SHIFT) + 1 if len(content) else at >> PAGE_SHIFT)
        for some in _pieces(pfns):
            begin, end = max(some.start * PAGE_SIZE, at), min(some.stop * PAGE_SIZE, at + len(content))
            with self.host.map_writable(self.domid, self.memory.of(some)) as pages:
                flat = pages.reshape(-1)
                into = slice(begin - some.start * PAGE_SIZE, end - some.start * PAGE_SIZE)
                flat[into] = content[begin - at : end - at]

    # --- content -----------------------------------------------------------------------------------------------------

    def _load(self, ramdisk: bytes | memoryview) -> None:
        layout, image = self.layout, self.image
        kernel, place = layout.segment(Part.KERNEL), layout.segment(Part.RAMDISK)
        assert kernel is not None
        self._clear(kernel.pfns)
        overlap = bool(image.elf.overlaps())  # if not, the zeroes behind a segment are there already
        for number, (vaddr, content, zeroes) in enumerate(loads := list(image.loads())):
            self.progress(Progress(number, len(loads), "loading the kernel"))
            self._copy(vaddr - layout.virt_base, np.frombuffer(content, np.uint8))
            if overlap:
                at = vaddr - layout.virt_base + len(content)
                self._copy(at, np.broadcast_to(np.zeros(1, np.uint8), zeroes))
        if place is not None:
            self.progress(Progress(0, place.size, "loading the ramdisk", "bytes"))
            self._clear(range(place.pfns.stop - 1, place.pfns.stop))  # what is behind its end
            self._copy(place.first * PAGE_SIZE, np.frombuffer(ramdisk, np.uint8))

    def _p2m(self) -> None:
        """The linear list, some pages at a time: never a second array of the whole."""
        layout, segment = self.layout, self.layout.segment(Part.P2M)
        assert segment is not None
        per_page = PAGE_SIZE // layout.width
        for some in _pieces(segment.pfns):
            first = (some.start - segment.first) * per_page
            mfns = self.memory.of(range(first, first + len(some) * per_page))
            mfns[max(layout.p2m_entries - first, 0) :] = 0  # of the last page, what is behind the list's end
            with self.host.map_writable(self.domid, self.memory.of(some)) as pages:
                pages[:] = words(mfns.reshape(len(some), per_page), layout.width)
            self.progress(Progress(some.stop - segment.first, segment.pages, "writing the p2m", "pages"))

    def _tables(self) -> None:
        done, in_all = 0, sum(span.count for span in self.layout.tables)
        for _, pfns, entries in start.tables(self.layout):
            tables, _ = localise(entries, self.memory.mfns)
            self._write(pfns, tables.view(np.uint8).reshape(-1, PAGE_SIZE))
            done += len(pfns)
            self.progress(Progress(done, in_all, "making page tables", "tables"))

    def _start_info(self, store: Ring, console: Ring) -> None:
        page = start.start_info(
            self.layout,
            shared_info=self.host.info(self.domid).shared_info_mfn << PAGE_SHIFT,
            store_mfn=store.mfn,
            store_evtchn=store.port,
            console_mfn=console.mfn,
            console_evtchn=console.port,
        )
        pfn = np.array([self.layout.start_info.pfn], np.uint64)
        self._write(pfn, np.frombuffer(page, np.uint8).reshape(1, PAGE_SIZE))


def _batches(pfns: range) -> Iterator[tuple[int, int, int]]:
    """A range in parts that are populated at once: first and end, and of which order."""
    whole = pfns.start + len(pfns) // _EXTENT * _EXTENT
    for first in range(pfns.start, whole, _EXTENTS_AT_ONCE * _EXTENT):
        yield first, min(first + _EXTENTS_AT_ONCE * _EXTENT, whole), _ORDER
    if whole < pfns.stop:
        yield whole, pfns.stop, 0


def _pieces(pfns: range) -> Iterator[range]:
    for first in range(pfns.start, pfns.stop, PAGES_PER_BATCH):
        yield range(first, min(first + PAGES_PER_BATCH, pfns.stop))


def _runs(pfns: I64, mfns: U64, size: int) -> tuple[I64, I64, U64]:
    """Extents of ``size`` pages, those joined that follow each other in both numbers."""
    new = np.ones(len(pfns), np.bool_)
    new[1:] = mfns[1:] != mfns[:-1] + np.uint64(size)
    starts = np.flatnonzero(new)
    return pfns[starts], np.diff(np.append(starts, len(pfns))) * size, mfns[starts]


def _cr3(top: int, layout: Layout) -> int:
    if layout.top_below_4g and top >= _BELOW_4G:
        what = f"the top page table got mfn {top:#x}, and this kernel (PAE without extended cr3) needs one below 4 GiB"
        raise RequestError(what, needed=_BELOW_4G, available=top)
    return cr3_of(top, layout.width)
