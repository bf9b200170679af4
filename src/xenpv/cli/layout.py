"""``xenpv layout``: where everything of a domain will lie when it starts, before there is one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from xenpv.abi.x86 import PAGE_SIZE
from xenpv.abi.xen import SIF_MOD_START_PFN, SIF_VIRT_P2M_4TOOLS
from xenpv.cli.image import naming, read_kernel
from xenpv.cli.terminal import JSON, NUMBER, print_json, print_table
from xenpv.errors import RequestError
from xenpv.image.drawing import svg
from xenpv.image.kernel import KernelImage
from xenpv.image.layout import Layout, Part, Segment, Span, plan
from xenpv.image.request import Request
from xenpv.text import printable, size

_FLAGS = {SIF_MOD_START_PFN: "MOD_START_PFN", SIF_VIRT_P2M_4TOOLS: "VIRT_P2M_4TOOLS"}
_COLOURS = {
    Part.KERNEL: "blue",
    Part.RAMDISK: "magenta",
    Part.P2M: "yellow",
    Part.TABLES: "red",
    Part.P2M_TABLES: "red",
    Part.START_INFO: "cyan",
    Part.XENSTORE: "cyan",
    Part.CONSOLE: "cyan",
    Part.STACK: "green",
}


def ramdisk_size(path: Path) -> int:
    """Bytes of a file that is to be a ramdisk. RequestError where it cannot be one."""
    if path.is_dir():
        raise RequestError(f"{path}: is a directory, not a ramdisk")
    if not (found := path.stat().st_size):
        raise RequestError(f"{path}: is empty; nothing takes an empty ramdisk")
    return found


class _Ramdisk(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2 only
    """The size in bytes of a file, or one that is said."""

    name = "ramdisk"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        if (path := Path(str(value))).exists():
            return ramdisk_size(path)
        try:
            return NUMBER.convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value!r} is neither a file nor a size such as 64M", param, ctx)


@click.command()
@click.argument("kernel", metavar="KERNEL", type=click.Path(allow_dash=True))
@click.option("--memory", type=NUMBER, required=True, metavar="SIZE", help="Memory of the domain, such as 640G.")
@click.option("--ramdisk", type=_Ramdisk(), default=0, metavar="FILE|SIZE", help="The initrd, or how large it is.")
@click.option("--vcpus", type=int, default=1, metavar="N", help="Vcpus of the domain; 1 unless said.")
@click.option("--cmdline", default="", metavar="TEXT", help="The kernel's command line.")
@click.option("-o", "output", type=click.Path(allow_dash=True), metavar="FILE", help="Draw the plan, as SVG.")
@JSON
def layout(kernel: str, memory: int, ramdisk: int, vcpus: int, cmdline: str, output: str | None, as_json: bool) -> None:
    """Where everything of a PV domain lies when it starts: kernel, ramdisk, p2m, page tables, in pfns.

    KERNEL is a bzImage (vmlinuz) or an ELF file (vmlinux); "-" reads a pipe. The plan is that of Xen's own builder
    (libxc), page for page. Nothing is started, no memory is taken, and no hypervisor is needed: frames are pfns, as the
    domain counts them itself.

    \b
    xenpv layout /boot/vmlinuz-6.1.0-amd64 --memory 640G --ramdisk /boot/initrd.img-6.1.0-amd64
    xenpv layout vmlinuz --memory 16T -o plan.svg      the same as a picture ("-o -" writes nothing else)
    xenpv layout vmlinuz --memory 4G --json | jq .start_info

    A bar has one mark for a page, and one more for each doubling. What is mapped has its virtual address: pfn 0 is at
    the kernel's VIRT_BASE, and the initial mapping ends at a multiple of 4 MiB with 512 KiB or more to spare. A p2m
    list that is mapped elsewhere is where the note INIT_P2M wants it; its page tables are mapped nowhere.

    Exit status: 0 if there is a plan; 1 if it does not fit, with the numbers, or if the kernel cannot boot as PV; 64
    usage.
    """
    data = read_kernel(kernel)
    with naming(kernel):
        planned = plan(KernelImage.parse(data), Request(memory, ramdisk, vcpus, cmdline))
    if output is not None:
        picture = svg(planned, f"{kernel}, {size(memory)}")
        if output == "-":
            click.echo(picture, nl=False)
            return
        Path(output).write_text(picture, encoding="utf-8")
    if as_json:
        print_json({"file": kernel} | describe(planned))
    else:
        _print_layout(kernel, planned)


def describe(layout: Layout) -> dict[str, Any]:
    """Everything that a plan says, as plain values: frames are pfns, addresses and sizes in bytes."""
    info = layout.start_info
    return {
        "guest_type": layout.guest_type,
        "width": layout.width,
        "vcpus": layout.vcpus,
        "nr_pages": layout.nr_pages,
        "used_pages": layout.used,
        "p2m_entries": layout.p2m_entries,
        "p2m_outside": layout.p2m_outside,
        "virt_base": layout.virt_base,
        "mapping_end": layout.mapping_end,
        "segments": [
            {
                "what": str(s.part),
                "pfn": s.first,
                "pages": s.pages,
                "vaddr": s.vaddr,
                "size": s.size,
                "level": s.level,
            }
            for s in layout.segments
        ],
        "mapped": [{"vaddr": s.vaddr, "end": s.end, "pfn": s.first, "pages": s.count} for s in layout.mapped],
        "tables": [
            {"level": s.level, "pfn": s.first, "count": s.count, "vaddr": s.vaddr, "end": s.end} for s in layout.tables
        ],
        "read_only": [{"pfn": pfns.start, "pages": len(pfns)} for pfns in layout.read_only],
        "hypercall_pfn": layout.hypercall_pfn,
        "top_below_4g": layout.top_below_4g,
        "start_info": asdict(info)
        | {
            "magic": info.magic.decode(),
            "flag_names": _flag_names(info.flags),
            "cmd_line": info.cmd_line.decode("utf-8", "replace"),
        },
        "vcpu0": asdict(layout.registers),
        "remarks": list(layout.remarks),
    }


def _flag_names(flags: int) -> list[str]:
    return [name for bit, name in _FLAGS.items() if flags & bit]


# --- for people ------------------------------------------------------------------------------------------------------


def _print_layout(file: str, layout: Layout) -> None:
    info, registers = layout.start_info, layout.registers
    vcpus = f"{layout.vcpus} vcpu{'s' if layout.vcpus > 1 else ''}"
    click.echo(f"{printable(file)}: {layout.guest_type}, {size(layout.nr_pages * PAGE_SIZE)}, {vcpus}")
    where = "outside the initial mapping" if layout.p2m_outside else "inside the initial mapping"
    _line("p2m list", f"{layout.p2m_entries:#x} entries, {where}")
    end = "the end of addresses" if layout.mapping_end >> 64 else f"{layout.mapping_end:#x}"
    _line("mapped", f"{layout.virt_base:#x} to {end}, {size(layout.mapped[0].count * PAGE_SIZE)} from pfn 0 on")
    for remark in layout.remarks:
        _line("remark", click.style(remark, fg="yellow"))
    print_table(
        "Memory",
        ["pfn#", "pages#", "size#", "mapped at#", "what", "a mark, and one for each doubling"],
        [_row(segment) for segment in layout.segments],
    )
    print_table(
        "Page tables, all mapped read-only or nowhere",
        ["level", "pfn#", "tables#", "for addresses from#", "to#"],
        [[f"L{s.level}", f"{s.first:#x}", f"{s.count:#x}", *_reach(s, layout)] for s in layout.tables],
    )
    click.echo(f"Start info, in pfn {info.pfn:#x}; xenstore's page is pfn {info.store_pfn:#x}, the console's "
               f"{info.console_pfn:#x}")  # fmt: skip
    _line("flags", " | ".join(_flag_names(info.flags)) or "none")
    _line("pt_base", f"{info.pt_base:#x}, nr_pt_frames {info.nr_pt_frames:#x}")
    first = f", first_p2m_pfn {info.first_p2m_pfn:#x}, nr_p2m_frames {info.nr_p2m_frames:#x}"
    _line("mfn_list", f"{info.mfn_list:#x}{first if layout.p2m_outside else ''}")
    if info.mod_len:
        what = "a pfn" if info.flags & SIF_MOD_START_PFN else "an address"
        _line("mod_start", f"{info.mod_start:#x} ({what}), mod_len {info.mod_len:#x}")
    if info.cmd_line:
        _line("cmd_line", printable(info.cmd_line.decode("utf-8", "replace")))
    click.echo("Vcpu 0")
    prefix = "r" if layout.width == 8 else "e"
    names = {"ip": registers.ip, "sp": registers.sp, "si": registers.si}
    _line("registers", ", ".join(f"{prefix}{name} {value:#x}" for name, value in names.items()))
    _line("segments", f"cs {registers.cs:#x}, ss {registers.ss:#x}, others {registers.ds:#x}")
    _line("cr3", f"pfn {registers.cr3_pfn:#x}" + (", of which the mfn has to be below 4 GiB" * layout.top_below_4g))


def _reach(tables: Span, layout: Layout) -> tuple[str, str]:
    """The first and the last address that tables translate."""
    top = tables is layout.tables[0]
    return ("all", "") if top else (f"{tables.vaddr:#x}", f"{tables.end - 1:#x}")


def _row(segment: Segment) -> list[str]:
    what = f"L{segment.level} {segment.part}" if segment.level else str(segment.part)
    bar, colour = "█" * segment.pages.bit_length(), _COLOURS.get(segment.part, "bright_black")
    return [
        f"{segment.first:#x}",
        f"{segment.pages:#x}",
        size(segment.pages * PAGE_SIZE),
        "" if segment.vaddr is None else f"{segment.vaddr:#x}",
        what,
        f"[{colour}]{bar}[/]",
    ]


def _line(label: str, text: str) -> None:
    click.echo(f"  {label:<13}{text}")
