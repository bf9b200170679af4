"""``xenpv layout``: where a PV domain's parts will lie when it starts.

Nothing is built.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from xenpv.abi.x86 import PAGE_SIZE
from xenpv.abi.xen import SIF_MOD_START_PFN, SIF_VIRT_P2M_4TOOLS
from xenpv.cli.kernel_file import (
    CMDLINE,
    KERNEL,
    MEMORY,
    VCPUS,
    kernel_inputs,
    named_in_errors,
    ramdisk_size,
    read_kernel,
)
from xenpv.cli.terminal import FORCE, JSON, NUMBER, Coloured, print_field, print_json, print_table
from xenpv.image.drawing import svg
from xenpv.image.kernel import KernelImage
from xenpv.image.layout import Layout, Part, Segment, Span, plan
from xenpv.image.request import Request
from xenpv.io.atomic_output import Output
from xenpv.io.file_kind import FileKind
from xenpv.text import counted, printable, size

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


class _Ramdisk(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2 only
    """A ramdisk: the path of its file or its size; its value is the size in bytes."""

    name = "ramdisk"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the size of an existing file, otherwise parse a size."""
        if isinstance(value, int):
            return value
        if (path := Path(str(value))).exists():
            return ramdisk_size(path)
        try:
            return NUMBER.convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value!r} is neither a file nor a size such as 64M", param, ctx)


@click.command()
@KERNEL
@MEMORY
@click.option("--ramdisk", type=_Ramdisk(), default=0, metavar="FILE|SIZE", help="Initrd: its file or its size.")
@VCPUS
@CMDLINE
@click.option("-o", "output", type=click.Path(allow_dash=True), metavar="FILE", help="Draw the layout as SVG.")
@FORCE
@JSON
def layout(
    kernel: str,
    memory: int,
    ramdisk: int,
    vcpus: int,
    cmdline: str,
    output: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Show where the parts of a PV domain lie when it starts, in pfns.

    KERNEL is a bzImage (vmlinuz) or an ELF file (vmlinux); "-" reads a pipe. The layout equals that of Xen's own
    builder (libxenguest), page for page. Nothing is built; this needs no hypervisor.

    A bar in the table has one mark for one page, and one more for each doubling. pfn 0 is mapped at the kernel's
    VIRT_BASE; the initial mapping ends at a multiple of 4 MiB with at least 512 KiB to spare. The note INIT_P2M says
    where a p2m list outside the initial mapping is mapped; its page tables are not mapped.

    \b
    Examples:
      xenpv layout /boot/vmlinuz-6.1.0-amd64 --memory 640G --ramdisk 64M
      xenpv layout vmlinuz --memory 16T -o layout.svg      a picture, too; "-o -" prints only the picture
      xenpv layout vmlinuz --memory 4G --json | jq .start_info

    \b
    Exit status:
      0  the domain fits
      1  it does not fit, or the kernel cannot boot as PV
    """
    data = read_kernel(kernel)
    with named_in_errors(kernel):
        domain_layout = plan(KernelImage.parse(data), Request(memory, ramdisk, vcpus, cmdline))
    if output is not None:
        picture = svg(domain_layout, f"{kernel}, {size(memory)}")
        if output == "-":
            click.echo(picture, nl=False)
            return
        with Output.open(output, replaces={FileKind.SVG}, inputs=kernel_inputs(kernel), force=force) as out:
            out.write([picture.encode()])
    if as_json:
        print_json({"file": kernel} | describe(domain_layout))
    else:
        _print_layout(kernel, domain_layout)


def describe(layout: Layout) -> dict[str, Any]:
    """Return the description that --json prints.

    Frames are pfns; addresses and sizes are in bytes.
    """
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


# --- text ------------------------------------------------------------------------------------------------------------


def _print_layout(file: str, layout: Layout) -> None:
    info, registers = layout.start_info, layout.registers
    vcpus = counted(layout.vcpus, "vcpu")
    click.echo(f"{printable(file)}: {layout.guest_type}, {size(layout.nr_pages * PAGE_SIZE)}, {vcpus}")
    place = "outside the initial mapping" if layout.p2m_outside else "inside the initial mapping"
    print_field("p2m list", f"{layout.p2m_entries:#x} entries, {place}")
    end = "the end of the address space" if layout.mapping_end >> 64 else f"{layout.mapping_end:#x}"
    print_field("mapped", f"{layout.virt_base:#x} to {end}, {size(layout.mapped[0].count * PAGE_SIZE)} from pfn 0")
    for remark in layout.remarks:
        print_field("remark", click.style(remark, fg="yellow"))
    print_table(
        "Memory",
        ["pfn#", "pages#", "size#", "mapped at#", "content", "pages (log2)"],
        [_segment_row(segment) for segment in layout.segments],
    )
    print_table(
        "Page tables (mapped read-only or not at all)",
        ["level", "pfn#", "tables#", "translate from#", "to#"],
        [[f"L{s.level}", f"{s.first:#x}", f"{s.count:#x}", *_translated(s, layout)] for s in layout.tables],
    )
    rings = f"xenstore ring in pfn {info.store_pfn:#x}, console ring in pfn {info.console_pfn:#x}"
    click.echo(f"Start info in pfn {info.pfn:#x}; {rings}")
    print_field("flags", " | ".join(_flag_names(info.flags)) or "none")
    print_field("pt_base", f"{info.pt_base:#x}, nr_pt_frames {info.nr_pt_frames:#x}")
    first = f", first_p2m_pfn {info.first_p2m_pfn:#x}, nr_p2m_frames {info.nr_p2m_frames:#x}"
    print_field("mfn_list", f"{info.mfn_list:#x}{first if layout.p2m_outside else ''}")
    if info.mod_len:
        unit = "pfn" if info.flags & SIF_MOD_START_PFN else "address"
        print_field("mod_start", f"{info.mod_start:#x} ({unit}), mod_len {info.mod_len:#x}")
    if info.cmd_line:
        print_field("cmd_line", printable(info.cmd_line.decode("utf-8", "replace")))
    click.echo("Vcpu 0")
    prefix = "r" if layout.width == 8 else "e"
    names = {"ip": registers.ip, "sp": registers.sp, "si": registers.si}
    print_field("registers", ", ".join(f"{prefix}{name} {value:#x}" for name, value in names.items()))
    print_field("segments", f"cs {registers.cs:#x}, ss {registers.ss:#x}, others {registers.ds:#x}")
    print_field("cr3", f"pfn {registers.cr3_pfn:#x}" + (", whose mfn must be below 4 GiB" * layout.top_below_4g))


def _translated(tables: Span, layout: Layout) -> tuple[str, str]:
    """Return the first and the last address that page tables translate."""
    top = tables is layout.tables[0]
    return ("all", "") if top else (f"{tables.vaddr:#x}", f"{tables.end - 1:#x}")


def _segment_row(segment: Segment) -> list[str | Coloured]:
    content = f"L{segment.level} {segment.part}" if segment.level else str(segment.part)
    bar, colour = "█" * segment.pages.bit_length(), _COLOURS.get(segment.part, "bright_black")
    return [
        f"{segment.first:#x}",
        f"{segment.pages:#x}",
        size(segment.pages * PAGE_SIZE),
        "" if segment.vaddr is None else f"{segment.vaddr:#x}",
        content,
        Coloured(bar, colour),
    ]
