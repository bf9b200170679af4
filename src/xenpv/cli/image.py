"""``xenpv image``: whether and how Xen boots a kernel, with how much memory."""

from __future__ import annotations

from typing import Any

import click

from xenpv.abi.x86 import PAGE_SIZE
from xenpv.cli.kernel_file import KERNEL, named_in_errors, read_kernel
from xenpv.cli.terminal import JSON, NUMBER, print_field, print_json, print_table
from xenpv.image.capacity import MemoryLimit, memory_limits
from xenpv.image.elf import ElfSegment
from xenpv.image.kernel import KernelImage
from xenpv.image.notes import Note, NoteSource
from xenpv.image.parameters import feature_names
from xenpv.image.verdict import guest_type, p2m_obstacle, pv_obstacles, pvh_obstacles, remarks
from xenpv.text import printable, size


@click.command()
@KERNEL
@click.option("--initrd", type=NUMBER, default=0, metavar="SIZE", help="Reserve room for an initrd of this size: 64M.")
@JSON
def image(kernel: str, initrd: int, as_json: bool) -> None:
    """Show whether a kernel can boot as PV or PVH, why not, and with how much memory.

    KERNEL is a bzImage (vmlinuz) or an ELF file (vmlinux), 32-bit or 64-bit, also compressed with gzip; "-" reads a
    pipe. The output lists the Xen ELF notes and their meaning, features, addresses, and the segments to load. Nothing
    is started; this needs no hypervisor.

    The table "Memory as PV" has a line for each place where the p2m list can lie. A list inside the initial mapping
    must fit above the kernel's own addresses, which limits the memory. The note INIT_P2M moves the list out (Xen 4.7).

    \b
    Examples:
      xenpv image /boot/vmlinuz-6.1.0-amd64
      xenpv image --json vmlinuz | jq .pv.limits
      xenpv image --initrd 200M vmlinuz      a mapped initrd leaves less room for the p2m list

    \b
    Exit status:
      0  the file is a kernel, also if it cannot boot ("can_boot" in --json tells)
      1  it is no kernel, or is damaged
    """
    data = read_kernel(kernel)
    with named_in_errors(kernel):
        parsed = KernelImage.parse(data)
    if as_json:
        print_json({"file": kernel, "size": len(data)} | describe(parsed, initrd))
    else:
        _print_description(kernel, parsed, initrd)


def describe(image: KernelImage, initrd: int = 0) -> dict[str, Any]:
    """Return the description that --json prints.

    Addresses and sizes are in bytes, memory limits in pages.
    """
    p = image.parameters
    return {
        "layers": [
            {
                "kind": layer.kind,
                "compression": layer.compression,
                "offset": layer.offset,
                "packed": layer.packed,
                "unpacked": layer.unpacked,
                "boot_protocol": layer.protocol and f"{layer.protocol[0]}.{layer.protocol[1]:02}",
                "version": layer.version,
            }
            for layer in image.layers
        ],
        "machine": image.elf.machine_name,
        "width": image.width,
        "pv": {
            "can_boot": not (obstacles := pv_obstacles(image)),
            "why_not": obstacles,
            "guest_type": guest_type(image),
            "limits": [_describe_limit(limit) for limit in memory_limits(image, initrd=initrd)],
        },
        "pvh": {"can_boot": not (obstacles := pvh_obstacles(image)), "why_not": obstacles, "entry": p.phys32_entry},
        "p2m_outside_initial_mapping": p2m_obstacle(image) is None,
        "initrd_unmapped": p.mod_start_pfn,
        "remarks": remarks(image),
        "addresses": {
            "virt_base": image.virt_base,
            "paddr_offset": image.paddr_offset,
            "kernel_start": image.kernel_start,
            "kernel_end": image.kernel_end,
            "entry": image.entry,
            "elf_entry": image.elf.entry,
            "hypercall_page": p.hypercall_page,
            "init_p2m": p.init_p2m,
            "hv_start_low": p.hv_start_low,
        },
        "suspend_cancel": p.suspend_cancel,
        "pae": str(p.pae),
        "bsd_symtab": p.bsd_symtab,
        "features": {
            "supported": feature_names(p.features.supported),
            "required": feature_names(p.features.required),
            "unknown": [*p.features.unknown, *p.features.unknown_required],
        },
        "notes_from": str(image.note_source),
        "notes": [
            {
                "type": note.type,
                "name": note.name,
                "value": note.value.hex() if isinstance(note.value, bytes) else note.value,
                "meaning": note.meaning,
                "offset": note.offset,
                "size": note.size,
            }
            for note in image.notes
        ],
        "segments": [_describe_segment(segment, image) for segment in image.segments],
    }


def _describe_limit(limit: MemoryLimit) -> dict[str, Any]:
    return {
        "p2m": limit.p2m_place,
        "p2m_outside": limit.p2m_outside,
        "max_pages": limit.max_pages,
        "min_pages": limit.min_pages,
        "bound": limit.bound,
    }


def _describe_segment(segment: ElfSegment, image: KernelImage) -> dict[str, Any]:
    return {
        "offset": segment.offset,
        "vaddr": segment.vaddr,
        "paddr": segment.paddr,
        "loaded_at": image.virtual(segment.paddr),
        "filesz": segment.filesz,
        "memsz": segment.memsz,
        "flags": segment.flag_names,
    }


# --- text ------------------------------------------------------------------------------------------------------------


def _print_description(file: str, image: KernelImage, initrd: int) -> None:
    p = image.parameters
    click.echo(f"{printable(file)}: {_format_layers(image)}")
    for layer in image.layers:
        if layer.version:
            print_field("version", printable(layer.version))
    _print_verdict("PV", pv_obstacles(image), f"as {guest_type(image)}, entry {image.entry:#x}")
    _print_verdict("PVH", pvh_obstacles(image), f"entry {p.phys32_entry or 0:#x}")
    if image.note_source is not NoteSource.NONE:
        _print_requirements(image)
    if p.features.supported:
        required = feature_names(p.features.required)
        names = [f"{name} (required)" if name in required else name for name in feature_names(p.features.supported)]
        print_field("features", ", ".join(names))
    for remark in remarks(image):
        print_field("remark", click.style(printable(remark), fg="yellow"))
    _print_limits(memory_limits(image, initrd=initrd), initrd)
    _print_notes(image)
    rows = []
    for s in image.segments:
        numbers = (s.offset, s.paddr, s.vaddr, image.virtual(s.paddr), s.filesz, s.memsz)
        rows.append([*(f"{n:#x}" for n in numbers), s.flag_names])
    print_table("Load segments", ["offset#", "paddr#", "vaddr#", "PV address#", "filesz#", "memsz#", "flags"], rows)


def _print_requirements(image: KernelImage) -> None:
    p = image.parameters
    obstacle = p2m_obstacle(image)
    place = "may lie outside the initial mapping" if obstacle is None else "must lie inside the initial mapping"
    print_field("p2m list", f"{place}: {obstacle or f'INIT_P2M {p.init_p2m:#x}'}")
    initrd = "may stay unmapped (MOD_START_PFN)" if p.mod_start_pfn else "must be mapped: no MOD_START_PFN note"
    print_field("initrd", initrd)
    print_field("kernel", f"{image.kernel_start:#x} to {image.kernel_end:#x}, pfn 0 at {image.virt_base:#x}")
    if p.hypercall_page is not None:
        print_field("hypercalls", f"page at {p.hypercall_page:#x}")
    print_field("suspend", "can be cancelled" if p.suspend_cancel else "cannot be cancelled: no SUSPEND_CANCEL note")


def _format_layers(image: KernelImage) -> str:
    """Describe the layers of a kernel file, outermost first.

    For example "bzImage (boot protocol 2.15), 7.7 MiB of xz; inside it a 64-bit ELF …".
    """
    parts = []
    for layer in image.layers:
        protocol = f" (boot protocol {layer.protocol[0]}.{layer.protocol[1]:02})" if layer.protocol else ""
        parts.append(f"{layer.kind}{protocol}, {size(layer.packed)} of {layer.compression}")
    elf = f"{8 * image.elf.width}-bit ELF file of {size(len(image.elf.data))} for {image.elf.machine_name}"
    return "; inside it a ".join([*parts, elf])


def _print_verdict(kind: str, obstacles: list[str], detail: str) -> None:
    if not obstacles:
        print_field(kind, click.style("can boot", fg="green") + f", {detail}")
    for i, obstacle in enumerate(obstacles):
        print_field("" if i else kind, ("" if i else click.style("cannot boot", fg="red") + ": ") + printable(obstacle))


def _print_limits(memory_limits: list[MemoryLimit], initrd: int) -> None:
    if not memory_limits:
        return
    rows = []
    for limit in memory_limits:
        minimum = "" if limit.min_pages is None else size(limit.min_pages * PAGE_SIZE)
        maximum = size(limit.max_pages * PAGE_SIZE) if limit.max_pages else "nothing fits"
        rows.append([limit.p2m_place, minimum, maximum, f"{limit.max_pages:#x}", limit.bound])
    title = "Memory as PV" + (f", with an initrd of {size(initrd)}" if initrd else "")
    print_table(title, ["p2m list", "minimum#", "maximum#", "maximum pages#", "limited by"], rows)


def _print_notes(image: KernelImage) -> None:
    if image.note_source is NoteSource.NONE:
        return
    rows = [
        ["" if note.type is None else str(note.type), printable(note.name), _format_value(note), note.meaning]
        for note in image.notes
    ]
    legacy = image.note_source is NoteSource.LEGACY
    title = "Notes of the string __xen_guest" if legacy else f"Xen ELF notes ({image.note_source})"
    print_table(title, ["type#", "name", "value", "meaning"], rows)


def _format_value(note: Note) -> str:
    """Format the value of a note."""
    value = note.value
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, bytes):
        return value.hex(" ")
    if isinstance(value, int):
        return f"{value:#x}"
    return " ".join(map(hex, value))
