"""Lists every reason why a kernel cannot boot, as PV and as PVH.

Domain builders stop at the first reason.

Source: xen.git:xen/common/libelf/libelf-dominfo.c elf_xen_note_check() and elf_xen_addr_calc_check(),
tools/libs/guest/xg_dom_elfloader.c, xg_dom_core.c and xg_dom_x86.c
"""

from __future__ import annotations

from collections.abc import Iterator

from xenpv.abi.x86 import PAGE_SIZE
from xenpv.image.elf import EM_386, EM_X86_64
from xenpv.image.kernel import KernelImage
from xenpv.image.mapping import whole_pages
from xenpv.image.notes import NoteSource
from xenpv.image.parameters import XENFEAT_AUTO_TRANSLATED, XENFEAT_DOM0, Pae


def guest_type(image: KernelImage) -> str | None:
    """Return libxc's guest type, such as "xen-3.0-x86_64".

    None if today's Xen runs no such PV guest.
    """
    if image.elf.machine == EM_X86_64:
        return "xen-3.0-x86_64"
    if image.elf.machine == EM_386 and image.parameters.pae is not Pae.NO:
        return "xen-3.0-x86_32p"
    return None


def pv_obstacles(image: KernelImage) -> list[str]:
    """Return every reason why the kernel cannot be started as a PV domU."""
    return [*_not_for_xen(image), *_not_pv(image)]


def pvh_obstacles(image: KernelImage) -> list[str]:
    """Return every reason why the kernel cannot be started as a PVH domU."""
    reasons = list(_not_for_xen(image))
    entry, loaded = image.parameters.phys32_entry, image.elf.paddr_range
    if entry is None:
        reasons.append("it has no PHYS32_ENTRY note, the entry point of PVH")
    elif loaded and not loaded.start <= entry <= loaded.stop:
        reasons.append(f"PHYS32_ENTRY {entry:#x} is outside the loaded range, {loaded.start:#x} to {loaded.stop:#x}")
    return reasons


def p2m_obstacle(image: KernelImage) -> str | None:
    """Return why the p2m list cannot be outside the initial mapping, else None.

    Toolstacks since Xen 4.7 silently ignore an INIT_P2M note that does not fit, and put the list into the initial
    mapping (xg_dom_core.c xc_dom_build_image()).
    """
    base = image.parameters.init_p2m
    if base is None:
        return "it has no INIT_P2M note"
    if image.width != 8 or image.elf.machine != EM_X86_64:
        return f"INIT_P2M {base:#x} is for 64-bit kernels only"
    if base >= image.virt_base:
        return f"INIT_P2M {base:#x} is not below VIRT_BASE {image.virt_base:#x}"
    if base % PAGE_SIZE:
        return f"INIT_P2M {base:#x} is not page-aligned"
    return None


def remarks(image: KernelImage) -> list[str]:
    """Return warnings about a kernel that do not keep it from booting."""
    warnings = list(image.xen_notes.remarks[:4])
    if len(image.xen_notes.remarks) > 4:
        warnings.append(f"{len(image.xen_notes.remarks) - 4} more notes are damaged")
    overlaps = image.elf.overlaps()
    for first, second in overlaps[:4]:
        warnings.append(
            f"segments overlap: paddr {first.paddr:#x} with {first.memsz:#x} bytes, and paddr {second.paddr:#x}; the "
            "later one in the file overwrites the other"
        )
    if len(overlaps) > 4:
        warnings.append(f"{len(overlaps) - 4} more segments overlap")
    if any(layer.compression == "zstd" for layer in image.layers):
        warnings.append("it is packed with zstd, which xl unpacks from Xen 4.15 on, and PV GRUB does not")
    obstacle = p2m_obstacle(image)
    if obstacle is not None and image.parameters.init_p2m is not None:
        warnings.append(f"{obstacle}, so it has no effect")
    features = image.parameters.features
    unknown = [*features.unknown, *(features.unknown_required if image.note_source is NoteSource.LEGACY else ())]
    if unknown:
        warnings.append(f"FEATURES has names that Xen does not know: {', '.join(unknown)}")
    if image.parameters.bsd_symtab and image.symbols is None:
        warnings.append("BSD_SYMTAB asks for a symbol table, and the file has none with strings")
    if image.symbols is not None and image.symbols.truncated:
        warnings.append(
            "the symbol table does not fit into the space that libelf reserves, so a part of it is not loaded"
        )
    return warnings


def _not_for_xen(image: KernelImage) -> Iterator[str]:
    """Yield the reasons against both PV and PVH."""
    if image.elf.machine not in {EM_386, EM_X86_64}:
        yield f"it is for {image.elf.machine_name}, and Xen's PV and PVH guests are x86"
    if not image.elf.paddr_range:
        yield "it has no segment to load"
    features = image.parameters.features
    if features.required & XENFEAT_DOM0:
        yield "it requires the feature dom0, so it does not run in an unprivileged domain"
    if features.unknown_required and image.note_source is not NoteSource.LEGACY:
        yield f"it requires features that Xen does not know: {', '.join(features.unknown_required)}"


def _not_pv(image: KernelImage) -> Iterator[str]:
    """Yield the reasons against PV."""
    parameters = image.parameters
    if image.note_source is NoteSource.NONE:
        yield "it has neither Xen ELF notes nor a section __xen_guest: it is not built with support for Xen PV"
        return
    if not parameters.loader.startswith("generic") and not parameters.guest_os.startswith("linux"):
        yield (
            f"it is for another loader: LOADER {parameters.loader!a} does not begin with 'generic', nor GUEST_OS "
            f"{parameters.guest_os!a} with 'linux'"
        )
    if not parameters.xen_version.startswith("xen-3.0"):
        yield f"it is for another Xen ABI: XEN_VERSION {parameters.xen_version!a} does not begin with 'xen-3.0'"
    if image.elf.machine == EM_386 and parameters.pae is Pae.NO:
        yield "it is a 32-bit kernel without PAE, which no 64-bit Xen runs"
    if parameters.features.required & XENFEAT_AUTO_TRANSLATED:
        yield "it requires the feature auto_translated_physmap, which PV domains no longer have"
    if image.elf.paddr_range:
        yield from _misplaced(image)


def _misplaced(image: KernelImage) -> Iterator[str]:
    """Yield contradictions between addresses, as PV."""
    parameters, base, start, end = image.parameters, image.virt_base, image.kernel_start, image.kernel_end
    extent = f"it would extend from {start:#x} to {end:#x}"
    if parameters.paddr_offset is not None and parameters.virt_base is None:
        yield f"PADDR_OFFSET {parameters.paddr_offset:#x} needs a VIRT_BASE"
    if start > end:
        yield f"{extent}, around the end of addresses (VIRT_BASE {base:#x}, PADDR_OFFSET {image.paddr_offset:#x})"
        return
    if not start <= image.entry <= end:
        yield f"{extent}, and ENTRY {image.entry:#x} is outside"
    if base > start:
        yield f"{extent}, and VIRT_BASE {base:#x} is above its start"
    if start % PAGE_SIZE:
        yield f"{extent}, which is not page-aligned"
    if parameters.init_p2m is not None and start <= parameters.init_p2m < end:
        yield f"{extent}, and INIT_P2M {parameters.init_p2m:#x} is inside"
    loaded, maximum = sum(segment.memsz for segment in image.segments), 2 * whole_pages(end - start) * PAGE_SIZE
    if loaded > maximum:
        yield f"its segments have {loaded:#x} bytes, and libelf loads at most {maximum:#x}, twice their range"
    if parameters.hypercall_page is not None and parameters.hypercall_page < base:
        yield f"HYPERCALL_PAGE {parameters.hypercall_page:#x} is below VIRT_BASE {base:#x}"
