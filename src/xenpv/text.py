"""Numbers and foreign text, for people."""

from __future__ import annotations


def size(n: float) -> str:
    """Bytes: "96.0 MiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def printable(text: str) -> str:
    """Text out of a file, which may be hostile: control characters would let it write all over the terminal, and those
    that turn the reading direction hide what it says.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
