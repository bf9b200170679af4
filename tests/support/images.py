"""Kernel images, fixed ones and those of hypothesis, and plans for them."""

from __future__ import annotations

import struct

from hypothesis import strategies as st

from tests.support.writers.kernel import BASE, PV32, PV64, Kernel, Load, kernel32, note, quad, word
from xenpv.image.capacity import libxc_memory_limit
from xenpv.image.kernel import KernelImage
from xenpv.image.layout import Layout, plan
from xenpv.image.request import Request

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
P2M = note(15, quad(1 << 39))
UNMAPPED = note(16, word(1))


def image(kernel: Kernel) -> KernelImage:
    """Parse a synthetic kernel."""
    return KernelImage.parse(kernel.to_bytes())


def sized(mib: int, *notes: bytes) -> KernelImage:
    """Return a 64-bit kernel that ends so many MiB after its virt_base."""
    return image(Kernel(notes=[*PV64, *notes], loads=[Load(0x10_0000, b"", (mib - 1) << 20)]))


def asking_for_symbols(litmus: bytes) -> bytes:
    """Return litmus.elf with its note SUSPEND_CANCEL turned into BSD_SYMTAB."""
    old, new = (struct.pack("<III", 4, 8, number) + b"Xen\0" for number in (14, 11))
    at = litmus.index(old)
    return litmus[:at] + new + b"yes\0\0\0\0\0" + litmus[at + len(old) + 8 :]


BASES = {8: (BASE, 0, 1 << 30, (1 << 39) + (3 << 30), 0xFFFF_8800_0000_0000), 4: (0xC000_0000, 0, 0x4000_0000)}


@st.composite
def kernels(draw: st.DrawFn) -> KernelImage:
    """Draw kernels of both widths, at many addresses, with and without INIT_P2M and MOD_START_PFN."""
    width = draw(st.sampled_from([8, 8, 4]))
    base, load = draw(st.sampled_from(BASES[width])), draw(st.sampled_from([0, 0x1000, 0x10_0000, 0x100_0000]))
    number = quad if width == 8 else word
    notes = [*(PV64 if width == 8 else PV32), note(3, number(base)), note(1, number(base + load))]
    below = [at for at in (1 << 39, 1 << 30, (1 << 40) - 4096, 0x20_0000) if at < base]
    if width == 8 and below and draw(st.booleans()):
        notes.append(note(15, quad(draw(st.sampled_from(below)))))
    if draw(st.booleans()):
        notes.append(UNMAPPED)
    loads = [Load(load, b"", draw(st.integers(1, 24 * MIB)))]
    return image(Kernel(notes=notes, loads=loads) if width == 8 else kernel32(notes=notes, loads=loads))


@st.composite
def layouts(draw: st.DrawFn, most: int = 1 << 32) -> tuple[KernelImage, Request, Layout]:
    """Draw plans of any size that fits: up to ``most`` pages, and up to the kernel's limit."""
    kernel = draw(kernels())
    ramdisk = draw(st.one_of(st.just(0), st.integers(1, 64 * MIB)))
    limit = libxc_memory_limit(kernel, initrd=ramdisk)
    assert limit.min_pages is not None
    low = limit.min_pages + (8 << 8)  # so that one page more does not need 4 MiB more
    pages = draw(st.integers(low, max(low, min(limit.max_pages, most))))
    request = Request(
        pages << 12,
        ramdisk=ramdisk,
        cmdline=draw(st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=40)),
    )
    return kernel, request, plan(kernel, request)
