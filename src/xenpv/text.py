"""Numbers as text, and text of others made safe for a terminal."""

from __future__ import annotations


def size(n: float) -> str:
    """Return a size in bytes as text: "96.0 MiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def counted(count: int, noun: str) -> str:
    """Return a number of things: "1 error", "2 errors"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def printable(text: str, *, keep: str = "") -> str:
    r"""Replace the dangerous characters of a hostile text by "?".

    They could control the terminal, change the reading direction, or forge a line of output.

    Args:
        text: The text.
        keep: Characters that stay: "\n\t" of a text that may have several lines.
    """
    return "".join(c if c.isprintable() or c in keep else "?" for c in text)
