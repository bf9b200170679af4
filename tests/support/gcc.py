"""Values of C expressions over Xen's public headers, by gcc, without linking or running anything.

Each expression becomes an element of a constant array; gcc compiles to assembly, and the array's data directives are
read back. That works for -m32 on a machine that has no 32-bit C library.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from xenpv.abi.declare import Width

_DIRECTIVE = re.compile(r"\s+\.(quad|long|zero)\s+(-?\d+)")
_SIZE = {"quad": 8, "long": 4}


class NoCompiler(Exception):
    """gcc is missing, or does not compile for both widths of x86."""


def header_folders() -> dict[str, Path]:
    """Include folders with xen/xen.h in them, by name: of XENPV_XEN_HEADERS if set, or those the lab has fetched."""
    if chosen := os.environ.get("XENPV_XEN_HEADERS"):
        return {"XENPV_XEN_HEADERS": Path(chosen)}
    from lab import trees, versions  # noqa: PLC0415  not needed with the variable, nor in a tree without the lab

    folders = {xen: trees.headers(xen).path / "usr/include" for xen in versions.names()}
    return {xen: folder for xen, folder in folders.items() if (folder / "xen/xen.h").exists()}


def evaluate(include: Path, headers: Sequence[str], expressions: Sequence[str], width: Width) -> list[int]:
    """The values, as unsigned 64-bit integers, of constant C expressions with Xen's headers included, tools' parts too.

    Raises NoCompiler; an expression that does not compile, such as a member that is not there, fails with gcc's words.
    """
    gcc = shutil.which("gcc")
    if gcc is None:
        raise NoCompiler("gcc is not installed")
    lines = ["#include <stdint.h>", "#include <stddef.h>", *(f"#include <xen/{name}>" for name in headers)]
    elements = ",\n".join(f"(unsigned long long)({expression})" for expression in expressions)
    source = "\n".join([*lines, f"const unsigned long long values[] = {{\n{elements}\n}};\n"])
    options = [f"-m{width * 8}", "-S", "-w", "-O0", "-ffreestanding", "-D__XEN_TOOLS__", f"-I{include}"]
    done = subprocess.run(
        [gcc, *options, "-x", "c", "-", "-o", "-"], input=source, capture_output=True, text=True, check=False
    )
    if "unrecognized command-line option" in done.stderr or "not supported in this configuration" in done.stderr:
        raise NoCompiler(f"this gcc does not compile for x86 of {width * 8} bits")
    assert done.returncode == 0, done.stderr[:2000]
    data = _data_of(done.stdout)
    assert len(data) == 8 * len(expressions)
    return [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]


def _data_of(assembly: str) -> bytes:
    """Return the bytes after the label "values"."""
    data = bytearray()
    for line in assembly.partition("\nvalues:\n")[2].splitlines():
        match = _DIRECTIVE.match(line)
        if match is None:
            break
        directive, number = match[1], int(match[2])
        if directive == "zero":
            data += bytes(number)
        else:
            size = _SIZE[directive]
            data += (number % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(data)
