"""Plans the start of day of a PV domain, in pfns.

A plan has the place of everything before the domain's first instruction.

>>> layout = plan(KernelImage.parse(kernel), Request(memory=640 << 30))
>>> layout.start_info.mfn_list, layout.start_info.first_p2m_pfn

A plan knows no mfns. It is arithmetic on the kernel's numbers, takes as long for 16 TiB as for 32 MiB, and equals
libxc's pfn for pfn. start.py turns it into the bytes of page tables, start info and vcpu 0.

Units: ``size`` and ``memory`` are bytes, other amounts are 4 KiB pages. Frames are pfns. Addresses are virtual.

Source: xen.git:tools/libs/guest/xg_dom_core.c xc_dom_build_image(), xg_dom_x86.c
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from xenpv.abi.declare import Width
from xenpv.abi.x86 import PAGE_SHIFT, PAGE_SIZE, VGCF_IN_KERNEL, VGCF_ONLINE
from xenpv.abi.xen import SIF_MOD_START_PFN, SIF_VIRT_P2M_4TOOLS, START_INFO_MAGIC
from xenpv.image.capacity import mapped_initrd_size
from xenpv.image.kernel import KernelImage
from xenpv.image.mapping import InitialMapping, address, initial_mapping, p2m_tables, place, whole_pages
from xenpv.image.parameters import Pae
from xenpv.image.request import Request, check_fits, check_request, hypercall_pfn, remarks
from xenpv.image.verdict import guest_type, p2m_obstacle

_CS = {8: 0xE033, 4: 0xE019}  # FLAT_KERNEL_CS, _SS and _DS of xen.git:xen/include/public/arch-x86/xen-x86_64.h, _32.h
_SS = {8: 0xE02B, 4: 0xE021}
_DS = {8: 0, 4: 0xE021}
_INTERRUPTS_ENABLED = 1 << 9
_PAE_EXTENDED_CR3 = 1 << 3  # VMASST_TYPE_pae_extended_cr3
_DR6, _DR7 = 0xFFFF_0FF0, 0x400  # what a processor has after a reset


class Part(StrEnum):
    """The purpose of a segment."""

    GAP = "gap"  # between virt_base and the kernel; mapped and empty
    KERNEL = "kernel"
    RAMDISK = "ramdisk"
    P2M = "p2m list"
    START_INFO = "start info"
    XENSTORE = "xenstore"
    CONSOLE = "console"
    TABLES = "page tables"
    STACK = "boot stack"
    PADDING = "padding"
    P2M_TABLES = "p2m's page tables"
    FREE = "free"


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive pages that serve one purpose.

    Attributes:
        part: The purpose.
        first: Their first pfn.
        pages: How many they are.
        vaddr: Virtual address of the first page, None if they are not mapped.
        size: Bytes that are used, from the first page on; zeros follow.
        level: Level of page tables, otherwise None.
    """

    part: Part
    first: int
    pages: int
    vaddr: int | None
    size: int
    level: int | None = None

    @property
    def pfns(self) -> range:
        """The pfns of the segment."""
        return range(self.first, self.first + self.pages)


@dataclass(frozen=True, slots=True)
class Span:
    """Pages (level 0) or page tables, consecutive both in pfns and in addresses.

    The n-th of ``count`` is pfn ``first + n`` and has the place ``place + n`` in its level (mapping.py). So it is entry
    ``(place + n) % 512`` of the table at place ``(place + n) // 512`` one level up. No array: a plan needs no NumPy.
    """

    level: int
    place: int
    first: int
    count: int
    width: Width

    @property
    def places(self) -> range:
        """The places of the span in its level."""
        return range(self.place, self.place + self.count)

    @property
    def pfns(self) -> range:
        """The pfns of the span."""
        return range(self.first, self.first + self.count)

    @property
    def vaddr(self) -> int:
        """The first virtual address that they translate."""
        return address(self.place, self.level, self.width)

    @property
    def end(self) -> int:
        """The virtual address after the last one that they translate, mapped or not."""
        return self.vaddr + (self.count << PAGE_SHIFT + 9 * self.level)


@dataclass(frozen=True, slots=True)
class StartInfo:
    """The members of start info that are known without a host, by their names in C.

    Missing are shared_info, the event channels, and the mfns of the rings, which are pfns here.

    Source: xen.git:xen/include/public/xen.h
    """

    pfn: int
    magic: bytes
    nr_pages: int
    flags: int
    store_pfn: int
    console_pfn: int
    pt_base: int
    nr_pt_frames: int
    mfn_list: int
    mod_start: int
    mod_len: int
    cmd_line: bytes
    first_p2m_pfn: int
    nr_p2m_frames: int


@dataclass(frozen=True, slots=True)
class Registers:
    """The registers of vcpu 0 at its start; all others are 0.

    ``ip`` is the kernel's entry, ``sp`` the end of the stack's page, ``si`` start info: virtual addresses. ``cr3_pfn``
    is the top table. es, fs and gs equal ``ds``.

    Source: xen.git:tools/libs/guest/xg_dom_x86.c vcpu_x86_64(), vcpu_x86_32()
    """

    ip: int
    sp: int
    si: int
    eflags: int
    cs: int
    ss: int
    ds: int
    cr3_pfn: int
    vgcf: int
    dr6: int
    dr7: int
    vm_assist: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A plan. A builder does the following with it:

    - populate each pfn in ``ranges``;
    - load ``image.loads()``, where an address minus ``virt_base`` is the pseudo-physical address;
    - load the ramdisk at the start of ``segment(Part.RAMDISK)``;
    - write the p2m into ``segment(Part.P2M)``: ``p2m_entries`` mfns of ``width`` bytes, all ones for a pfn in no range;
    - write the page tables and start info (start.py), pin the top table, and set vcpu 0.

    Attributes:
        ranges: The pfns that have memory.
        segments: Every pfn of ``ranges`` exactly once, ascending.
        mapped: What the tables map: the initial mapping, then a p2m list outside it.
        tables: All page tables, from the top level down. Those of one level have different places.
        hypercall_pfn: The page that Xen fills with hypercalls (XEN_DOMCTL_hypercall_init), or None.
        top_below_4g: Whether the top table's mfn must be below 0x100000.
        remarks: Warnings, in words.
    """

    width: Width
    guest_type: str
    vcpus: int
    nr_pages: int
    p2m_entries: int
    ranges: tuple[range, ...]
    segments: tuple[Segment, ...]
    virt_base: int
    mapping_end: int
    mapped: tuple[Span, ...]
    tables: tuple[Span, ...]
    start_info: StartInfo
    registers: Registers
    hypercall_pfn: int | None
    top_below_4g: bool
    remarks: tuple[str, ...]

    def segment(self, part: Part) -> Segment | None:
        """Return the first segment of that part, None if there is none."""
        return next((s for s in self.segments if s.part is part), None)

    @property
    def p2m_outside(self) -> bool:
        """Whether the p2m list lies outside the initial mapping."""
        return len(self.mapped) > 1

    @property
    def used(self) -> int:
        """Number of pages from pfn 0 on that are in use at the start."""
        return next((s.first for s in self.segments if s.part is Part.FREE), self.segments[-1].pfns.stop)

    @property
    def read_only(self) -> tuple[range, ...]:
        """The pfns of page tables, which must be mapped read-only.

        There are at most two ranges, ascending.
        """
        initial = [span.pfns for span in self.tables if span.first < self.mapped[0].count]
        outside = [span.pfns for span in self.tables if span.first >= self.mapped[0].count]
        return tuple(range(part[0].start, part[-1].stop) for part in (initial, outside) if part)

    def spans(self, level: int) -> tuple[Span, ...]:
        """Return the tables of a level, or the mapped pages for level 0."""
        return self.mapped if level == 0 else tuple(span for span in self.tables if span.level == level)

    def pfn_of(self, vaddr: int) -> int | None:
        """Return the pfn that an address maps to at the start, None if unmapped."""
        if (self.width == 8 and vaddr >> 47 not in {0, 0x1FFFF}) or (self.width == 4 and vaddr >> 32):
            return None
        page = place(vaddr, 0, self.width)
        return next((span.first + page - span.place for span in self.mapped if page in span.places), None)


def plan(image: KernelImage, request: Request) -> Layout:
    """Plan a domain as libxc does.

    Args:
        image: The kernel.
        request: What the domain should have.

    Raises:
        ImageError: The kernel cannot be started as PV.
        RequestError: The request does not fit. Its numbers are pages, unless the message names another unit.
    """
    ranges = check_request(image, request)
    entries = ranges[-1].stop
    outside = p2m_obstacle(image) is None
    mapping = initial_mapping(image, entries, initrd=mapped_initrd_size(image, request.ramdisk), p2m_outside=outside)
    pfns = _PfnAllocator(image.width)
    _allocate_initial_mapping(pfns, image, request, mapping, 0 if outside else entries)
    if request.ramdisk and not mapped_initrd_size(image, request.ramdisk):
        pfns.allocate(Part.RAMDISK, request.ramdisk)
    if outside:
        _allocate_p2m(pfns, image, mapping, entries)
    check_fits(image, request, ranges, pfns.end)
    used = tuple(pfns.segments)
    free = tuple(
        Segment(Part.FREE, first, memory.stop - first, None, 0)
        for memory in ranges
        if (first := max(memory.start, pfns.end)) < memory.stop
    )
    return Layout(
        width=image.width,
        guest_type=guest_type(image) or "",
        vcpus=request.vcpus,
        nr_pages=request.pages,
        p2m_entries=entries,
        ranges=ranges,
        segments=used + free,
        virt_base=image.virt_base,
        mapping_end=mapping.end,
        mapped=tuple(pfns.mapped),
        tables=tuple(sorted(pfns.tables, key=lambda span: -span.level)),
        start_info=_start_info(image, request, used, mapping),
        registers=_registers(image, used),
        hypercall_pfn=hypercall_pfn(image),
        top_below_4g=image.width == 4 and image.parameters.pae is Pae.YES,
        remarks=remarks(image, request, entries),
    )


class _PfnAllocator:
    """Allocates pfns from 0 on, and records their mapping and its tables."""

    def __init__(self, width: Width) -> None:
        self.width = width
        self.end = 0
        self.segments: list[Segment] = []
        self.mapped: list[Span] = []
        self.tables: list[Span] = []

    def allocate(self, part: Part, size: int, vaddr: int | None = None, level: int | None = None) -> Segment:
        """Allocate the pages for ``size`` bytes."""
        self.segments.append(Segment(part, self.end, whole_pages(size), vaddr, size, level))
        self.end += self.segments[-1].pages
        return self.segments[-1]

    def allocate_tables(self, part: Part, places: tuple[range, ...], virt_base: int | None) -> None:
        """Allocate tables, whose places come L1 first.

        The highest level gets the lowest pfns.
        """
        for level in range(len(places), 0, -1):
            if level_places := places[level - 1]:
                vaddr = None if virt_base is None else virt_base + self.end * PAGE_SIZE
                tables = self.allocate(part, len(level_places) * PAGE_SIZE, vaddr, level)
                self.tables.append(Span(level, level_places.start, tables.first, tables.pages, self.width))


def _allocate_initial_mapping(
    pfns: _PfnAllocator, image: KernelImage, request: Request, mapping: InitialMapping, entries: int
) -> None:
    """Allocate the initial mapping, with a p2m list of ``entries`` entries in it."""
    base = image.virt_base
    for part, size in (
        (Part.GAP, image.kernel_start - base),
        (Part.KERNEL, image.kernel_end - image.kernel_start),
        (Part.RAMDISK, mapped_initrd_size(image, request.ramdisk)),
        (Part.P2M, entries * image.width),
        (Part.START_INFO, PAGE_SIZE),
        (Part.XENSTORE, PAGE_SIZE),
        (Part.CONSOLE, PAGE_SIZE),
    ):
        if size:
            pfns.allocate(part, size, base + pfns.end * PAGE_SIZE)
    pfns.allocate_tables(Part.TABLES, mapping.tables, base)
    pfns.allocate(Part.STACK, PAGE_SIZE, base + pfns.end * PAGE_SIZE)
    pfns.allocate(Part.PADDING, (mapping.pages - pfns.end) * PAGE_SIZE, base + pfns.end * PAGE_SIZE)
    pfns.mapped.append(Span(0, place(base, 0, image.width), 0, mapping.pages, image.width))


def _allocate_p2m(pfns: _PfnAllocator, image: KernelImage, mapping: InitialMapping, entries: int) -> None:
    """Allocate a p2m list at INIT_P2M, then the tables that it still lacks."""
    base = image.parameters.init_p2m
    assert base is not None
    pages = pfns.allocate(Part.P2M, entries * image.width, base)
    pfns.mapped.append(Span(0, place(base, 0, image.width), pages.first, pages.pages, image.width))
    pfns.allocate_tables(Part.P2M_TABLES, p2m_tables(image, mapping, entries), None)


def _start_info(
    image: KernelImage, request: Request, segments: tuple[Segment, ...], mapping: InitialMapping
) -> StartInfo:
    by_part = {segment.part: segment for segment in reversed(segments)}  # of tables the first, which is the top
    flags = SIF_VIRT_P2M_4TOOLS if request.virt_p2m_4tools else 0
    mod_start, mod_len = 0, 0
    if (ramdisk := by_part.get(Part.RAMDISK)) is not None:
        mod_start, mod_len = ramdisk.vaddr or 0, ramdisk.size
        if ramdisk.vaddr is None:  # libxc counts such a ramdisk in whole pages
            mod_start, mod_len = ramdisk.first, ramdisk.pages * PAGE_SIZE
            flags |= SIF_MOD_START_PFN
    p2m_frames = [s for s in segments if s.first >= mapping.pages and s.part in {Part.P2M, Part.P2M_TABLES}]
    return StartInfo(
        pfn=by_part[Part.START_INFO].first,
        magic=START_INFO_MAGIC[image.width],
        nr_pages=request.pages,
        flags=flags,
        store_pfn=by_part[Part.XENSTORE].first,
        console_pfn=by_part[Part.CONSOLE].first,
        pt_base=image.virt_base + by_part[Part.TABLES].first * PAGE_SIZE,
        nr_pt_frames=mapping.nr_tables,
        mfn_list=by_part[Part.P2M].vaddr or 0,
        mod_start=mod_start,
        mod_len=mod_len,
        cmd_line=request.cmd_line,
        first_p2m_pfn=p2m_frames[0].first if p2m_frames else 0,
        nr_p2m_frames=sum(s.pages for s in p2m_frames),
    )


def _registers(image: KernelImage, segments: tuple[Segment, ...]) -> Registers:
    by_part = {segment.part: segment for segment in reversed(segments)}
    extended = image.width == 4 and image.parameters.pae in {Pae.EXTENDED_CR3, Pae.BIMODAL}
    return Registers(
        ip=image.entry,
        sp=image.virt_base + by_part[Part.STACK].pfns.stop * PAGE_SIZE,
        si=image.virt_base + by_part[Part.START_INFO].first * PAGE_SIZE,
        eflags=_INTERRUPTS_ENABLED,
        cs=_CS[image.width],
        ss=_SS[image.width],
        ds=_DS[image.width],
        cr3_pfn=by_part[Part.TABLES].first,
        vgcf=VGCF_IN_KERNEL | VGCF_ONLINE,
        dr6=_DR6,
        dr7=_DR7,
        vm_assist=_PAE_EXTENDED_CR3 if extended else 0,
    )
