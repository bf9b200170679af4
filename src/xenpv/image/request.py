"""Request: what a domain should have; and the checks whether that is possible.

Refusals name the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from xenpv.abi.x86 import PAGE_SHIFT, PAGE_SIZE
from xenpv.errors import ImageError, RequestError
from xenpv.image.capacity import LIBXC_PAGES, MemoryLimit, libxc_memory_limit, mapped_initrd_size, memory_limits
from xenpv.image.kernel import KernelImage
from xenpv.image.mapping import whole_pages
from xenpv.image.verdict import p2m_obstacle, pv_obstacles

MAX_VCPUS = 8192  # of a PV domain: MAX_VIRT_CPUS of xen.git:xen/arch/x86/include/asm/config.h
COMMAND_LINE_MAX = 1023  # bytes; MAX_GUEST_CMDLINE of xen.git:xen/include/public/xen.h counts the 0 after them, too
_LIBXC_RAMDISK_MAX = 1 << 30  # bytes; XC_DOM_DECOMPRESS_MAX of xen.git:tools/include/xenguest.h


@dataclass(frozen=True, slots=True)
class Request:
    """What a domain should have.

    Attributes:
        memory: Bytes of memory.
        ramdisk: Bytes of ramdisk; 0 is none.
        vcpus: Number of vcpus.
        cmdline: The kernel's command line.
        ranges: The pfns that have memory, ``memory`` in all (default: the pfns from 0 on). vNUMA calls them vmemranges.
        virt_p2m_4tools: Tell the kernel that its tools need only the linear p2m list, as xenpv and libxc since 4.7 do.
            xl never says so (xen.git:tools/libs/light/libxl_dom.c libxl__build_pv()).
    """

    memory: int
    ramdisk: int = 0
    vcpus: int = 1
    cmdline: str = ""
    ranges: tuple[range, ...] = ()
    virt_p2m_4tools: bool = True

    @property
    def pages(self) -> int:
        """Number of pages of memory."""
        return self.memory >> PAGE_SHIFT

    @property
    def cmd_line(self) -> bytes:
        """The command line in bytes.

        What the shell could not decode becomes its original bytes.
        """
        return self.cmdline.encode("utf-8", "surrogateescape")


def check_request(image: KernelImage, request: Request) -> tuple[range, ...]:
    """Check a request before planning.

    Returns the pfns that have memory: ascending, and adjacent ranges joined.

    Raises:
        ImageError: The kernel cannot be started as PV.
        RequestError: The request is impossible, whatever the layout.
    """
    _check_values(request)
    if obstacles := pv_obstacles(image):
        raise ImageError("the kernel cannot be started as PV: " + "; ".join(obstacles))
    if image.virt_base % PAGE_SIZE:
        raise ImageError(f"VIRT_BASE {image.virt_base:#x} is not at the start of a page", note="VIRT_BASE")
    ranges = _merge_ranges(request)
    if (ramdisk := whole_pages(request.ramdisk)) > request.pages:
        problem = f"a ramdisk of {_format_pages(ramdisk)} is larger than the memory, {_format_pages(request.pages)}"
        raise RequestError(problem, needed=ramdisk, available=request.pages)
    limit = libxc_memory_limit(image, initrd=request.ramdisk)
    if ranges[-1].stop > limit.max_pages:
        raise _limit_error(image, request, limit, ranges[-1].stop)
    hypercalls = hypercall_pfn(image)
    if hypercalls is not None and not any(hypercalls in pfns for pfns in ranges):
        problem = (
            f"HYPERCALL_PAGE {image.parameters.hypercall_page:#x} would be pfn {hypercalls:#x}, which has no memory"
        )
        raise ImageError(problem, note="HYPERCALL_PAGE")
    return ranges


def check_fits(image: KernelImage, request: Request, ranges: tuple[range, ...], end: int) -> None:
    """Check that the pfns from 0 to before ``end`` have memory.

    Raises:
        RequestError: They do not.
    """
    available = ranges[0].stop if ranges[0].start == 0 else 0
    if end <= available:
        return
    takes = f"the start of day takes {_format_pages(end)}"
    if request.ramdisk:
        takes += f", {_format_pages(whole_pages(request.ramdisk))} of it the ramdisk"
    if len(ranges) > 1 or not available:
        problem = f"{takes} from pfn 0 on, and only {_format_pages(available)} have memory there"
        raise RequestError(problem, needed=end, available=available)
    problem = f"memory of {_format_pages(available)} is too little: {takes}"
    least = libxc_memory_limit(image, initrd=request.ramdisk).min_pages
    if least is not None and least > available:
        problem += f"; the domain needs at least {_format_pages(least)}"
    raise RequestError(problem, needed=end, available=available)


def hypercall_pfn(image: KernelImage) -> int | None:
    """Return the pfn of the page that Xen fills with hypercalls.

    None if the kernel has no such page.
    """
    page = image.parameters.hypercall_page
    return None if page is None else page - image.virt_base >> PAGE_SHIFT


def remarks(image: KernelImage, request: Request, entries: int) -> tuple[str, ...]:
    """Return warnings about a plan, in words.

    ``entries`` is the number of p2m entries.
    """
    warnings = []
    tight, *_ = inside = [limit for limit in memory_limits(image, initrd=request.ramdisk) if not limit.p2m_outside]
    if p2m_obstacle(image) is not None and len(inside) > 1 and entries > tight.max_pages:
        warnings.append(
            f"the initial mapping reaches beyond {tight.bound}: up to {_format_pages(tight.max_pages)} it would not"
        )
    if request.pages >= LIBXC_PAGES:
        warnings.append(f"libxc counts pages in 32 bits: it builds domains of less than {_format_pages(LIBXC_PAGES)}")
    if request.ramdisk > _LIBXC_RAMDISK_MAX:
        warnings.append(f"libxc takes no ramdisk of more than {_format_pages(whole_pages(_LIBXC_RAMDISK_MAX))}")
    if request.memory % (1 << 20):
        warnings.append("xl gives whole MiB only, and would drop the rest")
    return tuple(warnings)


def _check_values(request: Request) -> None:
    """Check what does not depend on the kernel."""
    if request.memory <= 0 or request.memory % PAGE_SIZE:
        problem = f"memory of {request.memory} bytes is not one or more whole pages of {PAGE_SIZE} bytes"
        raise RequestError(problem, needed=max(whole_pages(request.memory), 1) * PAGE_SIZE, available=request.memory)
    if request.ramdisk < 0:
        raise RequestError(f"a ramdisk of {request.ramdisk} bytes", needed=request.ramdisk, available=0)
    if request.vcpus < 1:
        raise RequestError(f"{request.vcpus} vcpus: a domain has at least 1", needed=1, available=request.vcpus)
    if request.vcpus > MAX_VCPUS:
        problem = f"{request.vcpus} vcpus: a PV domain has at most {MAX_VCPUS}"
        raise RequestError(problem, needed=request.vcpus, available=MAX_VCPUS)
    if (length := len(request.cmd_line)) > COMMAND_LINE_MAX:
        problem = f"a command line of {length} bytes: start info holds {COMMAND_LINE_MAX}, and libxc would cut it off"
        raise RequestError(problem, needed=length, available=COMMAND_LINE_MAX)
    if "\0" in request.cmdline:
        raise RequestError(f"the command line has a zero byte, at {request.cmd_line.index(0)}, which would end it")


def _merge_ranges(request: Request) -> tuple[range, ...]:
    """Return the pfns that have memory as ascending ranges, none of which touch."""
    if not request.ranges:
        return (range(request.pages),)
    merged: list[range] = []
    for pfns in sorted(request.ranges, key=lambda pfns: pfns.start):
        if pfns.step != 1 or not pfns or pfns.start < 0:
            raise RequestError(
                f"the pfns from {pfns.start:#x} to {pfns.stop:#x} (step {pfns.step}) are no range of memory"
            )
        if merged and pfns.start < merged[-1].stop:
            both = f"pfn {merged[-1].start:#x} to {merged[-1].stop:#x} and {pfns.start:#x} to {pfns.stop:#x}"
            raise RequestError(f"ranges of memory overlap: {both}", needed=merged[-1].stop, available=pfns.start)
        if merged and pfns.start == merged[-1].stop:
            merged[-1] = range(merged[-1].start, pfns.stop)
        else:
            merged.append(pfns)
    if (total := sum(map(len, merged))) != request.pages:
        problem = f"the ranges have {_format_pages(total)}, and the memory is {_format_pages(request.pages)}"
        raise RequestError(problem, needed=request.pages, available=total)
    return tuple(merged)


def _limit_error(image: KernelImage, request: Request, limit: MemoryLimit, entries: int) -> RequestError:
    """Return the error for a p2m with more entries than the kernel can have."""
    if limit.min_pages is None and request.ramdisk and libxc_memory_limit(image).min_pages is not None:
        problem = f"a ramdisk of {_format_pages(whole_pages(request.ramdisk))} does not fit: it has to be mapped"
        if mapped_initrd_size(image, request.ramdisk):
            problem += ", for the kernel has no MOD_START_PFN note,"
        return RequestError(
            f"{problem} within {limit.bound}", needed=whole_pages(request.ramdisk), available=_max_ramdisk_pages(image)
        )
    most = f"no more than {_format_pages(limit.max_pages)}" if limit.max_pages else "no memory at all"
    problem = f"a domain of {_format_pages(entries)}: this kernel can be started with {most}, bounded by {limit.bound}"
    if (obstacle := p2m_obstacle(image)) is not None and image.width == 8:
        problem += (
            f". Its p2m list has to lie inside the initial mapping, for {obstacle}: take a kernel with that note, or "
            "give it less memory"
        )
    return RequestError(problem, needed=entries, available=limit.max_pages)


def _max_ramdisk_pages(image: KernelImage) -> int:
    """Return the pages of the largest ramdisk that fits into the initial mapping."""
    low, high = 0, 1 << 20
    while low < high:
        middle = (low + high + 1) // 2
        if libxc_memory_limit(image, initrd=middle * PAGE_SIZE).min_pages is not None:
            low = middle
        else:
            high = middle - 1
    return low


def _format_pages(pages: int) -> str:
    """Return pages for a message: "0x800 pages (8 MiB)"."""
    shift = next((shift for shift in (28, 18, 8) if pages and not pages % (1 << shift)), 8)
    unit = {28: "TiB", 18: "GiB", 8: "MiB"}[shift]
    number = f"{pages / (1 << shift):.2f}".rstrip("0").rstrip(".")
    return f"{pages:#x} pages ({number} {unit})"
