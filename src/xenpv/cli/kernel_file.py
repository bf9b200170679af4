"""Kernel files, and the options that ``image``, ``layout`` and ``build`` share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from xenpv.cli.terminal import NUMBER
from xenpv.errors import ImageError, RequestError
from xenpv.image.kernel import FILE_MAX
from xenpv.text import printable

KERNEL = click.argument("kernel", metavar="KERNEL", type=click.Path(allow_dash=True))
MEMORY = click.option("--memory", type=NUMBER, required=True, metavar="SIZE", help="Memory of the domain: 4G, 640G.")
VCPUS = click.option("--vcpus", type=int, default=1, show_default=True, metavar="N", help="Vcpus of the domain.")
CMDLINE = click.option("--cmdline", default="", metavar="TEXT", help="Command line of the kernel.")

_CHUNK = 1 << 20  # bytes


def kernel_inputs(kernel: str, ramdisk: str | None = None) -> list[str | int]:
    """Return the files that a kernel and a ramdisk are read from, for Output.open()."""
    return [0 if kernel == "-" else kernel, *([ramdisk] if ramdisk is not None else [])]


def read_kernel(path: str) -> bytearray:
    """Read a kernel file, or a pipe for "-".

    It reads at most one chunk more than ``FILE_MAX`` bytes, the limit of KernelImage.
    """
    if path != "-" and Path(path).is_dir():
        raise RequestError(f"{path}: is a directory, not a kernel")
    data = bytearray()
    with open(0, "rb", closefd=False) if path == "-" else Path(path).open("rb") as file:
        while len(data) <= FILE_MAX and (chunk := file.read(_CHUNK)):
            data += chunk
    return data


def ramdisk_size(path: Path) -> int:
    """Return the size of a ramdisk's file in bytes.

    Raises:
        RequestError: It is a directory, or empty.
    """
    if path.is_dir():
        raise RequestError(f"{path}: is a directory, not a ramdisk")
    if not (nbytes := path.stat().st_size):
        raise RequestError(f"{path}: is empty; a ramdisk has at least one byte")
    return nbytes


@contextmanager
def named_in_errors(path: str) -> Iterator[None]:
    """Prefix the kernel file's name to every ImageError of the body."""
    try:
        yield
    except ImageError as e:
        name = "standard input" if path == "-" else printable(path)
        raise ImageError(f"{name}: {e.reason}", offset=e.offset, note=e.note) from None
