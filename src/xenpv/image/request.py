"""What is asked of a plan, and whether that can be: every refusal has its numbers, and says what would do."""

from __future__ import annotations

from dataclasses import dataclass

from xenpv.abi.x86 import PAGE_SHIFT, PAGE_SIZE
from xenpv.errors import ImageError, RequestError
from xenpv.image.capacity import LIBXC_PAGES, Limit, libxc_limit, limits, mapped_initrd
from xenpv.image.kernel import KernelImage
from xenpv.image.mapping import whole_pages
from xenpv.image.verdict import p2m_obstacle, pv_obstacles

MAX_VCPUS = 8192  # of a PV domain: MAX_VIRT_CPUS of xen.git:xen/arch/x86/include/asm/config.h
COMMAND_LINE_MAX = 1023  # bytes; MAX_GUEST_CMDLINE of xen.git:xen/include/public/xen.h has the 0 behind them
_LIBXC_RAMDISK_MAX = 1 << 30  # bytes; XC_DOM_DECOMPRESS_MAX of xen.git:tools/include/xenguest.h


@dataclass(frozen=True, slots=True)
class Request:
    """What is wanted of a domain.

    ``memory`` and ``ramdisk`` are in bytes, a ramdisk of 0 is none. ``ranges`` are the pfns that have memory, as pages
    (vNUMA's vmemranges; ``memory`` is then what they come to); none are the pfns from 0 on. ``virt_p2m_4tools`` tells
    the kernel that its tools read the p2m by its linear list alone, as xenpv does and libxc from 4.7 on; xl never sets
    it (xen.git:tools/libs/light/libxl_dom.c libxl__build_pv()).
    """

    memory: int
    ramdisk: int = 0
    vcpus: int = 1
    cmdline: str = ""
    ranges: tuple[range, ...] = ()
    virt_p2m_4tools: bool = True

    @property
    def pages(self) -> int:
        """Pages of memory."""
        return self.memory >> PAGE_SHIFT

    @property
    def cmd_line(self) -> bytes:
        """The command line as the guest gets it; what the shell could not decode goes back to the bytes that it was."""
        return self.cmdline.encode("utf-8", "surrogateescape")


def check(image: KernelImage, request: Request) -> tuple[range, ...]:
    """Refuse what cannot be for any layout; the pfns that have memory, ascending, those that touch as one.

    Raises ImageError and RequestError, as layout.plan().
    """
    _check_request(request)
    if obstacles := pv_obstacles(image):
        raise ImageError("it cannot be started as PV: " + "; ".join(obstacles))
    if image.virt_base % PAGE_SIZE:
        raise ImageError(f"VIRT_BASE {image.virt_base:#x} is not at the start of a page", note="VIRT_BASE")
    ranges = _ranges(request)
    if (ramdisk := whole_pages(request.ramdisk)) > request.pages:
        what = f"a ramdisk of {_amount(ramdisk)} is larger than the memory, {_amount(request.pages)}"
        raise RequestError(what, needed=ramdisk, available=request.pages)
    limit = libxc_limit(image, initrd=request.ramdisk)
    if ranges[-1].stop > limit.pages:
        raise _beyond(image, request, limit, ranges[-1].stop)
    hypercalls = hypercall_pfn(image)
    if hypercalls is not None and not any(hypercalls in some for some in ranges):
        what = f"HYPERCALL_PAGE {image.parameters.hypercall_page:#x} would be pfn {hypercalls:#x}, which has no memory"
        raise ImageError(what, note="HYPERCALL_PAGE")
    return ranges


def fits(image: KernelImage, request: Request, ranges: tuple[range, ...], end: int) -> None:
    """Refuse a plan that takes the pfns from 0 to ``end``, where these have no memory. Raises RequestError."""
    available = ranges[0].stop if ranges[0].start == 0 else 0
    if end <= available:
        return
    takes = f"what is there at the start takes {_amount(end)}"
    if request.ramdisk:
        takes += f", {_amount(whole_pages(request.ramdisk))} of it the ramdisk"
    if len(ranges) > 1 or not available:
        what = f"{takes}, and from pfn 0 on without a hole there are {_amount(available)}"
        raise RequestError(what, needed=end, available=available)
    what = f"memory of {_amount(available)} is too little: {takes}"
    least = libxc_limit(image, initrd=request.ramdisk).least
    if least is not None and least > available:
        what += f"; the least that will do is {_amount(least)}"
    raise RequestError(what, needed=end, available=available)


def hypercall_pfn(image: KernelImage) -> int | None:
    """The pfn of the page that Xen fills with hypercalls; None where the kernel wants none."""
    page = image.parameters.hypercall_page
    return None if page is None else page - image.virt_base >> PAGE_SHIFT


def remarks(image: KernelImage, request: Request, entries: int) -> tuple[str, ...]:
    """What is odd about a plan, in words, and stops nothing here; ``entries`` are those of the p2m."""
    found = []
    one, *_ = inside = [limit for limit in limits(image, initrd=request.ramdisk) if not limit.outside]
    if p2m_obstacle(image) is not None and len(inside) > 1 and entries > one.pages:
        found.append(f"the initial mapping reaches beyond {one.bound}: up to {_amount(one.pages)} it would not")
    if request.pages >= LIBXC_PAGES:
        found.append(f"libxc counts pages in 32 bits: it builds less than {_amount(LIBXC_PAGES)}")
    if request.ramdisk > _LIBXC_RAMDISK_MAX:
        found.append(f"libxc takes no ramdisk of more than {_amount(whole_pages(_LIBXC_RAMDISK_MAX))}")
    if request.memory % (1 << 20):
        found.append("xl gives whole MiB only, and would leave out what is beyond the last")
    return tuple(found)


def _check_request(request: Request) -> None:
    """What needs no kernel."""
    if request.memory <= 0 or request.memory % PAGE_SIZE:
        what = f"memory of {request.memory} bytes is not a whole number of pages of {PAGE_SIZE} bytes, and at least one"
        raise RequestError(what, needed=max(whole_pages(request.memory), 1) * PAGE_SIZE, available=request.memory)
    if request.ramdisk < 0:
        raise RequestError(f"a ramdisk of {request.ramdisk} bytes", needed=request.ramdisk, available=0)
    if request.vcpus < 1:
        raise RequestError(f"{request.vcpus} vcpus: a domain has 1 or more", needed=1, available=request.vcpus)
    if request.vcpus > MAX_VCPUS:
        what = f"{request.vcpus} vcpus: a PV domain has no more than {MAX_VCPUS}"
        raise RequestError(what, needed=request.vcpus, available=MAX_VCPUS)
    if (length := len(request.cmd_line)) > COMMAND_LINE_MAX:
        what = f"a command line of {length} bytes: start info holds {COMMAND_LINE_MAX}, and libxc would cut it off"
        raise RequestError(what, needed=length, available=COMMAND_LINE_MAX)
    if "\0" in request.cmdline:
        raise RequestError(f"the command line has a zero byte, at {request.cmd_line.index(0)}, which would end it")


def _ranges(request: Request) -> tuple[range, ...]:
    """The pfns that have memory, ascending and apart."""
    if not request.ranges:
        return (range(request.pages),)
    merged: list[range] = []
    for some in sorted(request.ranges, key=lambda some: some.start):
        if some.step != 1 or not some or some.start < 0:
            raise RequestError(
                f"the pfns from {some.start:#x} to {some.stop:#x} (step {some.step}) are no range of memory"
            )
        if merged and some.start < merged[-1].stop:
            both = f"pfn {merged[-1].start:#x} to {merged[-1].stop:#x} and {some.start:#x} to {some.stop:#x}"
            raise RequestError(f"ranges of memory overlap: {both}", needed=merged[-1].stop, available=some.start)
        if merged and some.start == merged[-1].stop:
            merged[-1] = range(merged[-1].start, some.stop)
        else:
            merged.append(some)
    if (total := sum(map(len, merged))) != request.pages:
        what = f"the ranges have {_amount(total)}, and the memory is {_amount(request.pages)}"
        raise RequestError(what, needed=request.pages, available=total)
    return tuple(merged)


def _beyond(image: KernelImage, request: Request, limit: Limit, entries: int) -> RequestError:
    """The error for a p2m of more entries than the kernel can be started with."""
    if limit.least is None and request.ramdisk and libxc_limit(image).least is not None:
        what = f"a ramdisk of {_amount(whole_pages(request.ramdisk))} does not fit: it has to be mapped"
        if mapped_initrd(image, request.ramdisk):
            what += ", for the kernel has no MOD_START_PFN note,"
        return RequestError(f"{what} within {limit.bound}", needed=whole_pages(request.ramdisk), available=_room(image))
    most = f"no more than {_amount(limit.pages)}" if limit.pages else "no memory at all"
    what = f"a domain of {_amount(entries)}: this kernel can be started with {most}; that is bounded by {limit.bound}"
    if (obstacle := p2m_obstacle(image)) is not None and image.width == 8:
        what += (
            f". Its p2m list has to lie inside the initial mapping, for {obstacle}: take a kernel with that note, or "
            "give it less memory"
        )
    return RequestError(what, needed=entries, available=limit.pages)


def _room(image: KernelImage) -> int:
    """The largest ramdisk that fits into the initial mapping, in pages."""
    low, high = 0, 1 << 20
    while low < high:
        middle = (low + high + 1) // 2
        if libxc_limit(image, initrd=middle * PAGE_SIZE).least is not None:
            low = middle
        else:
            high = middle - 1
    return low


def _amount(pages: int) -> str:
    """Pages for a message, in the largest unit in which they are a whole number: "0x800 pages (8 MiB)"."""
    shift = next((shift for shift in (28, 18, 8) if pages and not pages % (1 << shift)), 8)
    unit = {28: "TiB", 18: "GiB", 8: "MiB"}[shift]
    return f"{pages:#x} pages ({round(pages / (1 << shift), 2):.16g} {unit})"
