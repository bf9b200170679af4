"""The kind of an existing file, by its first bytes.

With it, no output replaces a file of another kind by a slip.
"""

from __future__ import annotations

from enum import StrEnum

from xenpv.errors import Unsupported
from xenpv.stream.envelope import SNIFF_SIZE, legacy_width, sniff

HEAD_SIZE = 0x206  # bytes that identify() needs, unless the file ends before

_ELF_TYPE = slice(16, 18)  # e_type; Xen, and all that reads cores of its guests, is little-endian
_ELF_CORE = (4).to_bytes(2, "little")
_BOOT_HEADER = slice(0x202, 0x206)  # Documentation/arch/x86/boot.rst: "HdrS" in every bzImage since Linux 1.3.73


class FileKind(StrEnum):
    """Kinds of file that xenpv reads or writes; the value describes one in a message."""

    EMPTY = "an empty file"
    SAVED_DOMAIN = "a saved domain"
    CORE = "a core"
    KDUMP = "a kdump-compressed core"
    LIME = "a LiME dump"
    KERNEL = "a kernel or program"
    HTML = "an HTML page"
    SVG = "an SVG picture"
    OTHER = "a file of another kind"


_MAGICS = {
    b"KDUMP   ": FileKind.KDUMP,
    b"EMiL": FileKind.LIME,
    b"XenSavedDomain\n": FileKind.SAVED_DOMAIN,  # xenopsd's of before Xen 4.6
    b"<!DOCTYPE html": FileKind.HTML,
    b"<svg": FileKind.SVG,
}


def identify(head: bytes) -> FileKind:
    """Return the kind of a file by its first HEAD_SIZE bytes, or all that it has."""
    if not head:
        return FileKind.EMPTY
    if head.startswith(b"\x7fELF"):
        return FileKind.CORE if head[_ELF_TYPE] == _ELF_CORE else FileKind.KERNEL
    if head[_BOOT_HEADER] == b"HdrS":
        return FileKind.KERNEL
    for magic, kind in _MAGICS.items():
        if head.startswith(magic):
            return kind
    try:
        sniff(head[:SNIFF_SIZE])
    except Unsupported:
        return FileKind.SAVED_DOMAIN if legacy_width(head) else FileKind.OTHER
    return FileKind.SAVED_DOMAIN
