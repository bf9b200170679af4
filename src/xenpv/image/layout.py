"""The start of day: where everything of a PV domain lies before its first instruction, in pfns.

>>> layout = plan(KernelImage.parse(kernel), Request(memory=640 << 30))
>>> layout.start_info.mfn_list, layout.start_info.first_p2m_pfn

Left of the host there are no mfns: a plan is pure arithmetic on the kernel's numbers, takes as long for 16 TiB as for
32 MiB, and comes out as libxc's (xen.git:tools/libs/guest/xg_dom_core.c xc_dom_build_image(), xg_dom_x86.c), pfn for
pfn. start.py turns it into the bytes of page tables, start info and vcpu 0, whole arrays at a time.

Units: sizes in bytes where a name says ``size`` or ``memory``, else counts of 4 KiB pages; frames are pfns, addresses
virtual and in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from xenpv.abi.declare import Width
from xenpv.abi.x86 import PAGE_SHIFT, PAGE_SIZE, VGCF_IN_KERNEL, VGCF_ONLINE
from xenpv.abi.xen import SIF_MOD_START_PFN, SIF_VIRT_P2M_4TOOLS, START_INFO_MAGIC
from xenpv.image.capacity import mapped_initrd
from xenpv.image.kernel import KernelImage
from xenpv.image.mapping import InitialMapping, address, initial_mapping, p2m_tables, place, whole_pages
from xenpv.image.parameters import Pae
from xenpv.image.request import Request, check, fits, hypercall_pfn, remarks
from xenpv.image.verdict import guest_type, p2m_obstacle

_CS = {8: 0xE033, 4: 0xE019}  # FLAT_KERNEL_CS, _SS and _DS of xen.git:xen/include/public/arch-x86/xen-x86_64.h, _32.h
_SS = {8: 0xE02B, 4: 0xE021}
_DS = {8: 0, 4: 0xE021}
_INTERRUPTS_ENABLED = 1 << 9
_PAE_EXTENDED_CR3 = 1 << 3  # VMASST_TYPE_pae_extended_cr3
_DR6, _DR7 = 0xFFFF_0FF0, 0x400  # what a processor has after a reset


class Part(StrEnum):
    """What a segment is."""

    GAP = "gap"  # between virt_base and the kernel; mapped, holds nothing
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
    """Pages that serve one purpose: the pfns from ``first`` on, ``pages`` of them.

    ``vaddr`` is the virtual address at which the first of them is mapped, None where they are not mapped. ``size`` is
    how many bytes are used, from the first page's begin on; what is behind them is zeroes. ``level`` is that of tables.
    """

    part: Part
    first: int
    pages: int
    vaddr: int | None
    size: int
    level: int | None = None

    @property
    def pfns(self) -> range:
        return range(self.first, self.first + self.pages)


@dataclass(frozen=True, slots=True)
class Span:
    """Pages (level 0) or page tables (level 1 and up) that follow each other, in pfns and in addresses alike.

    The n-th of ``count`` is pfn ``first`` + n and stands at place ``place`` + n of its level, counted from address 0;
    so in a table of the level above it is entry (place + n) % 512 of the table at place (place + n) // 512.
    """

    level: int
    place: int
    first: int
    count: int
    width: Width

    @property
    def pfns(self) -> range:
        return range(self.first, self.first + self.count)

    @property
    def vaddr(self) -> int:
        """The first virtual address that is translated by these."""
        return address(self.place, self.level, self.width)

    @property
    def end(self) -> int:
        """The virtual address behind the last that is translated by these; of tables, whether or not it is mapped."""
        return self.vaddr + (self.count << PAGE_SHIFT + 9 * self.level)


@dataclass(frozen=True, slots=True)
class StartInfo:
    """Start info, as far as it is known without a host; members by their names in C (xen.git:xen/include/public/xen.h).

    What it lacks: shared_info, the event channels, and the mfns of the two pages that are pfns here.
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
    """Vcpu 0 as it starts; what is not named here is 0 (xg_dom_x86.c vcpu_x86_64(), vcpu_x86_32()).

    ``ip``, ``sp`` and ``si`` are virtual addresses: the kernel's entry, the end of the stack's page, start info.
    ``cr3_pfn`` is the top table; ds serves for es, fs and gs, too.
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
    """A plan. Whoever builds it

    - gives the domain a frame for each pfn in ``ranges``;
    - loads what ``image.loads()`` says, an address less ``virt_base`` being the byte of pseudo-physical memory; the
      ramdisk to where ``segment(Part.RAMDISK)`` begins;
    - writes ``p2m_entries`` entries of ``width`` bytes, mfns by pfn and all ones for a pfn in no range, into the pages
      of ``segment(Part.P2M)``;
    - fills the tables (start.py), which is all of ``tables``, and writes start info and, once pinned, vcpu 0.

    ``segments`` cover every pfn of ``ranges`` exactly once, ascending. ``mapped`` is what the tables map: the initial
    mapping, then a p2m list that lies outside it. ``tables`` are all page tables, the top table first and each level
    above the one that it maps; those of one level stand at different places. ``hypercall_pfn`` is the page that Xen
    fills with hypercalls (XEN_DOMCTL_hypercall_init), or None. Where ``top_below_4g``, the top table's mfn has to be
    below 0x100000. ``remarks`` say in words what is odd and stops nothing.
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
        """The first segment that is that, None where there is none."""
        return next((s for s in self.segments if s.part is part), None)

    @property
    def p2m_outside(self) -> bool:
        """Whether the p2m list lies outside the initial mapping."""
        return len(self.mapped) > 1

    @property
    def used(self) -> int:
        """Pages from pfn 0 on that are no free memory at the start."""
        return next((s.first for s in self.segments if s.part is Part.FREE), self.segments[-1].pfns.stop)

    @property
    def read_only(self) -> tuple[range, ...]:
        """The pfns of page tables, which no entry may map writable: at most two ranges, ascending."""
        initial = [span.pfns for span in self.tables if span.first < self.mapped[0].count]
        outside = [span.pfns for span in self.tables if span.first >= self.mapped[0].count]
        return tuple(range(part[0].start, part[-1].stop) for part in (initial, outside) if part)

    def spans(self, level: int) -> tuple[Span, ...]:
        """What a table of the next level up maps: the tables of that level, or for level 0 the mapped pages."""
        return self.mapped if level == 0 else tuple(span for span in self.tables if span.level == level)

    def pfn(self, vaddr: int) -> int | None:
        """The pfn that an address is mapped to at the start, None where it is not."""
        if (self.width == 8 and vaddr >> 47 not in {0, 0x1FFFF}) or (self.width == 4 and vaddr >> 32):
            return None
        at = place(vaddr, 0, self.width)
        return next((s.first + at - s.place for s in self.mapped if s.place <= at < s.place + s.count), None)


def plan(image: KernelImage, request: Request) -> Layout:
    """The layout of a domain with that kernel, as libxc would have it.

    Raises ImageError for a kernel that cannot be started as PV, RequestError for what does not fit, its numbers in
    pages where the message names no other unit.
    """
    ranges = check(image, request)
    entries = ranges[-1].stop
    outside = p2m_obstacle(image) is None
    mapping = initial_mapping(image, entries, initrd=mapped_initrd(image, request.ramdisk), p2m_outside=outside)
    room = _Room(image.width)
    _put_initial(room, image, request, mapping, 0 if outside else entries)
    if request.ramdisk and not mapped_initrd(image, request.ramdisk):
        room.put(Part.RAMDISK, request.ramdisk)
    if outside:
        _put_p2m(room, image, mapping, entries)
    fits(image, request, ranges, room.end)
    used = tuple(room.segments)
    free = tuple(
        Segment(Part.FREE, first, some.stop - first, None, 0)
        for some in ranges
        if (first := max(some.start, room.end)) < some.stop
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
        mapped=tuple(room.mapped),
        tables=tuple(sorted(room.tables, key=lambda span: -span.level)),
        start_info=_start_info(image, request, used, mapping),
        registers=_registers(image, used),
        hypercall_pfn=hypercall_pfn(image),
        top_below_4g=image.width == 4 and image.parameters.pae is Pae.YES,
        remarks=remarks(image, request, entries),
    )


class _Room:
    """Pseudo-physical memory, which is given out from pfn 0 on; and what of it is mapped, by which tables."""

    def __init__(self, width: Width) -> None:
        self.width = width
        self.end = 0
        self.segments: list[Segment] = []
        self.mapped: list[Span] = []
        self.tables: list[Span] = []

    def put(self, part: Part, size: int, vaddr: int | None = None, level: int | None = None) -> Segment:
        """Give out the pages for so many bytes."""
        self.segments.append(Segment(part, self.end, whole_pages(size), vaddr, size, level))
        self.end += self.segments[-1].pages
        return self.segments[-1]

    def put_tables(self, part: Part, places: tuple[range, ...], virt_base: int | None) -> None:
        """Give out pages for tables, whose places come L1 first: the highest level lies in front."""
        for level in range(len(places), 0, -1):
            if at := places[level - 1]:
                vaddr = None if virt_base is None else virt_base + self.end * PAGE_SIZE
                tables = self.put(part, len(at) * PAGE_SIZE, vaddr, level)
                self.tables.append(Span(level, at.start, tables.first, tables.pages, self.width))


def _put_initial(room: _Room, image: KernelImage, request: Request, mapping: InitialMapping, entries: int) -> None:
    """All that is in the initial mapping, with a p2m list of so many entries in it."""
    base = image.virt_base
    for part, size in (
        (Part.GAP, image.kernel_start - base),
        (Part.KERNEL, image.kernel_end - image.kernel_start),
        (Part.RAMDISK, mapped_initrd(image, request.ramdisk)),
        (Part.P2M, entries * image.width),
        (Part.START_INFO, PAGE_SIZE),
        (Part.XENSTORE, PAGE_SIZE),
        (Part.CONSOLE, PAGE_SIZE),
    ):
        if size:
            room.put(part, size, base + room.end * PAGE_SIZE)
    room.put_tables(Part.TABLES, mapping.tables, base)
    room.put(Part.STACK, PAGE_SIZE, base + room.end * PAGE_SIZE)
    room.put(Part.PADDING, (mapping.pages - room.end) * PAGE_SIZE, base + room.end * PAGE_SIZE)
    room.mapped.append(Span(0, place(base, 0, image.width), 0, mapping.pages, image.width))


def _put_p2m(room: _Room, image: KernelImage, mapping: InitialMapping, entries: int) -> None:
    """A p2m list at INIT_P2M, and behind it the tables that map it, as far as the initial mapping has them not."""
    base = image.parameters.init_p2m
    assert base is not None
    pages = room.put(Part.P2M, entries * image.width, base)
    room.mapped.append(Span(0, place(base, 0, image.width), pages.first, pages.pages, image.width))
    room.put_tables(Part.P2M_TABLES, p2m_tables(image, mapping, entries), None)


def _start_info(
    image: KernelImage, request: Request, segments: tuple[Segment, ...], mapping: InitialMapping
) -> StartInfo:
    where = {segment.part: segment for segment in reversed(segments)}  # of the tables' the first, which is the top
    flags = SIF_VIRT_P2M_4TOOLS if request.virt_p2m_4tools else 0
    mod_start, mod_len = 0, 0
    if (ramdisk := where.get(Part.RAMDISK)) is not None:
        mod_start, mod_len = ramdisk.vaddr or 0, ramdisk.size
        if ramdisk.vaddr is None:  # of such a one libxc tells whole pages
            mod_start, mod_len = ramdisk.first, ramdisk.pages * PAGE_SIZE
            flags |= SIF_MOD_START_PFN
    p2m_frames = [s for s in segments if s.first >= mapping.pages and s.part in {Part.P2M, Part.P2M_TABLES}]
    return StartInfo(
        pfn=where[Part.START_INFO].first,
        magic=START_INFO_MAGIC[image.width],
        nr_pages=request.pages,
        flags=flags,
        store_pfn=where[Part.XENSTORE].first,
        console_pfn=where[Part.CONSOLE].first,
        pt_base=image.virt_base + where[Part.TABLES].first * PAGE_SIZE,
        nr_pt_frames=mapping.nr_tables,
        mfn_list=where[Part.P2M].vaddr or 0,
        mod_start=mod_start,
        mod_len=mod_len,
        cmd_line=request.cmd_line,
        first_p2m_pfn=p2m_frames[0].first if p2m_frames else 0,
        nr_p2m_frames=sum(s.pages for s in p2m_frames),
    )


def _registers(image: KernelImage, segments: tuple[Segment, ...]) -> Registers:
    where = {segment.part: segment for segment in reversed(segments)}
    extended = image.width == 4 and image.parameters.pae in {Pae.EXTENDED_CR3, Pae.BIMODAL}
    return Registers(
        ip=image.entry,
        sp=image.virt_base + where[Part.STACK].pfns.stop * PAGE_SIZE,
        si=image.virt_base + where[Part.START_INFO].first * PAGE_SIZE,
        eflags=_INTERRUPTS_ENABLED,
        cs=_CS[image.width],
        ss=_SS[image.width],
        ds=_DS[image.width],
        cr3_pfn=where[Part.TABLES].first,
        vgcf=VGCF_IN_KERNEL | VGCF_ONLINE,
        dr6=_DR6,
        dr7=_DR7,
        vm_assist=_PAE_EXTENDED_CR3 if extended else 0,
    )
