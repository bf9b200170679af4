"""Fuzz the reader of kernels. One invariant: any bytes are a kernel or raise ImageError, in bounded memory and time.

The loop hands in streams; what is tried is the stream, and a kernel whose changes the stream's bytes are the seed of,
so that a case can be had again by its number here too.

python -m tests.fuzz.image [--seconds N] [--seed N] [--only N]
"""

from __future__ import annotations

import gzip
import json
import struct
import sys
from functools import cache
from random import Random

from tests.fuzz.mutate import a_few, cut_out, cut_short, flip_bits, number, put_in, write_number
from tests.fuzz.run import MIB, bounded, main
from tests.support.writers.kernel import (
    COMPRESSIONS,
    LEGACY,
    PV64,
    Kernel,
    Load,
    Section,
    bzimage,
    kernel32,
    note,
    pack,
)
from xenpv.cli.image import describe
from xenpv.errors import ImageError
from xenpv.image.kernel import KernelImage

MEMORY = 40 * MIB  # two blocks of lz4, or what a lie within reason comes to


@cache
def corpus() -> tuple[bytes, ...]:
    """A small sound kernel of each kind."""
    loads = [Load(0x10_0000, b"code", 0x1000), Load(0x10_1000, b"", 0x5000, 6)]
    every = [*PV64, *(note(n, struct.pack("<Q", 1 << 39)) for n in (4, 12, 13, 14, 15, 16, 17, 18, 19))]
    every += [note(n, b"yes\0") for n in (0, 9, 10, 11, 77)]
    symbols = [Section(".symtab", 2, bytes(24), link=2), Section(".strtab", 3, b"\0a\0")]
    return (
        Kernel(notes=every, loads=loads, sections=symbols).to_bytes(),
        Kernel(notes=every, loads=loads, place="SHT_NOTE").to_bytes(),
        kernel32(loads=loads).to_bytes(),
        kernel32(place="__xen_guest", legacy=f"{LEGACY},VIRT_ENTRY=0xC0100000,HYPERCALL_PAGE=0x102").to_bytes(),
    )


def header_field(rng: Random, data: bytes) -> bytes:
    """A number into the ELF header, the program headers or the tail, where the section headers are."""
    size = rng.choice((1, 2, 4, 8))
    at = rng.choice((rng.randrange(16, 64), rng.randrange(64, 232), len(data) - rng.randrange(8, 260)))
    return data[:at] + number(rng, size) + data[at + size :]


def kernel(rng: Random) -> bytes:
    """A kernel with a few things done to it, and perhaps to what it is wrapped in."""
    data = a_few(rng, rng.choice(corpus()), header_field)
    if rng.random() < 0.4:
        return data
    kind = rng.choice(COMPRESSIONS)
    payload = pack(kind, data)
    if rng.random() < 0.5:
        payload = rng.choice((flip_bits, cut_out, put_in, write_number))(rng, payload)
    data = gzip.compress(data) if rng.random() < 0.2 else bzimage(kind, b"", payload=payload)
    if rng.random() < 0.3:
        at = rng.choice((0x1F1, 0x206, 0x20E, 0x248, 0x24C, rng.randrange(len(data))))
        data = data[:at] + number(rng, 4) + data[at + 4 :]
    return cut_short(rng, data)


def try_one(data: bytes) -> None:
    """Read it, and ask everything of it that the command line asks."""
    try:
        image = KernelImage.parse(data)
    except ImageError as e:
        refused = e
    else:
        answer(image)
        return
    assert "\n" not in str(refused)
    assert refused.reason
    assert refused.offset is None or refused.offset >= 0


def answer(image: KernelImage) -> None:
    description = describe(image, 1 << 20)
    assert description["pv"]["can_boot"] == bool(description["pv"]["limits"])
    json.dumps(description)
    for segment in image.segments:
        assert len(image.content(segment)) == segment.filesz
    if description["pv"]["can_boot"]:
        size = -(-(image.kernel_end - image.kernel_start) // 4096) * 4096
        for vaddr, content, zeroes in image.loads():
            assert 0 <= vaddr - image.kernel_start <= size - len(content) - zeroes


def target(data: bytes, n: int) -> None:
    """Try a stream, and the kernel that is made of it."""
    kernel_file = kernel(Random(data))
    with bounded(n, len(kernel_file), memory=MEMORY):
        try_one(data)
        try_one(kernel_file)


if __name__ == "__main__":
    sys.exit(main(target, "tests.fuzz.image"))
