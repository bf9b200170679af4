"""What wraps a migration stream, told apart by looking.

xl writes xen.git:tools/xl/xl.h struct save_file_header; libvirt src/libxl/libxl_domain.h libxlSavefileHeader; xenopsd
(xen-api.git:ocaml/xenopsd/lib/suspend_image.ml) a signature and then {type, length} sections. All three hold a libxl
or libxc stream, which may also come bare.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from xenpv.errors import Unsupported
from xenpv.stream.fields import Fields

SNIFF_SIZE = 32  # bytes that sniff() wants; fewer do when the input ends before


class Kind(StrEnum):
    XL = "xl"
    LIBVIRT = "libvirt"
    XENOPSD = "xenopsd"
    LIBXL = "libxl"
    LIBXC = "libxc"


XL_MAGIC = b"Xen saved domain, xl format\n \0 \r"
XL_FIELDS = Fields(byteorder=4, mandatory=4, optional=4, length=4)  # behind the magic
XL_HEADER_SIZE = len(XL_MAGIC) + XL_FIELDS.size
XL_CONFIG = Fields(size=4)  # what the optional data begins with, then the configuration
XL_BYTEORDER = 0x01020304
XL_FLAG_JSON = 1 << 0
XL_FLAG_STREAMV2 = 1 << 1
XL_FLAGS_KNOWN = XL_FLAG_JSON | XL_FLAG_STREAMV2

LIBVIRT_MAGIC = b"libvirt-xml\n \0 \r"
LIBVIRT_FIELDS = Fields(version=4, length=4, **{f"_unused{i}": 4 for i in range(10)})  # behind the magic
LIBVIRT_HEADER_SIZE = len(LIBVIRT_MAGIC) + LIBVIRT_FIELDS.size

XENOPSD_MAGIC = b"XenSavedDomv2-\n"
XENOPSD_SECTION = Fields(type=8, length=8)

LIBXL_IDENT = b"LibxlFmt"
LIBXC_MARKER = b"\xff" * 8

_MAGICS = {
    XL_MAGIC: Kind.XL,
    LIBVIRT_MAGIC: Kind.LIBVIRT,
    XENOPSD_MAGIC: Kind.XENOPSD,
    LIBXL_IDENT: Kind.LIBXL,
    LIBXC_MARKER: Kind.LIBXC,
}

CONFIG_MAX = 16 << 20  # bytes; a domain's configuration is kilobytes, so a larger one is a lie


class Section(StrEnum):
    """Kinds of section of a xenopsd suspend image."""

    XENOPS = "xenops"
    LIBXC = "libxc"
    LIBXL = "libxl"
    LIBXC_LEGACY = "libxc-legacy"
    QEMU_TRAD = "qemu-trad"
    QEMU_XEN = "qemu-xen"
    DEMU = "demu"
    VARSTORED = "varstored"
    SWTPM0 = "swtpm0"
    SWTPM = "swtpm"
    END = "end"


SECTIONS = {
    0x000F: Section.XENOPS,
    0x00F0: Section.LIBXC,
    0x00F1: Section.LIBXL,
    0x00F2: Section.LIBXC_LEGACY,
    0x0F00: Section.QEMU_TRAD,
    0x0F01: Section.QEMU_XEN,
    0x0F10: Section.DEMU,
    0x0F11: Section.VARSTORED,
    0x0F12: Section.SWTPM0,
    0x0F13: Section.SWTPM,
    0xFFFF: Section.END,
}


@dataclass(frozen=True, slots=True)
class Envelope:
    """The wrapping as found: its kind, and the domain's configuration where it carries one.

    ``length`` is its size in bytes up to the stream inside; ``config`` is JSON, xl's text format, XML or an
    s-expression, as ``config_format`` says ("json", "xl", "xml", "sexp", or "" for none).
    """

    kind: Kind
    offset: int
    length: int
    config: bytes = b""
    config_format: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind} envelope"


_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gzip -dc"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc"),
    b"\xfd7zXZ\0": ("xz", "xz -dc"),
    b"BZh": ("bzip2", "bzip2 -dc"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4 -dc"),
}


def sniff(head: bytes) -> Kind:
    """The kind of stream that begins with these bytes, ``SNIFF_SIZE`` of them or all that there are.

    An input that ends within the first bytes of a kind is of that kind: reading it will say where it was cut.
    Raises Unsupported with a sentence that says what it is instead.
    """
    for magic, kind in _MAGICS.items():
        if head.startswith(magic) or (head and magic.startswith(head)):
            return kind
    raise Unsupported(_what_else(head), offset=0)


def _what_else(head: bytes) -> str:
    if not head:
        return "the input is empty"
    for magic, (name, command) in _COMPRESSED.items():
        if head.startswith(magic):
            return f"the input is compressed with {name}; unpack it into a pipe: {command} FILE | xenpv … -"
    if head.startswith(b"\x7fELF"):
        what = "the input is an ELF file (a kernel or a core), not a saved domain"
        return f"{what}; xenpv image reads kernels, show and others cores, by their names"
    if head.startswith(b"XenSavedDomain\n"):
        return "the input is a legacy xenopsd suspend image (before Xen 4.6), which is recognised but not read"
    if width := legacy_width(head):
        return (
            f"the input looks like a legacy (v1) stream of a {width}-bit toolstack (before Xen 4.6), which is "
            "recognised but not read; `xenpv convert` converts it"
        )
    return "the input is not a saved Xen domain: no xl, libvirt, xenopsd, libxl or libxc header"


def legacy_width(head: bytes) -> int | None:
    """Bits of the toolstack that wrote a legacy stream of a PV domain, or None.

    "These shall be distinguished by inspecting octets 4-7 in the image. If these are zero then it is a 64-bit image";
    in a 32-bit one a PV domain's extended-info signature, all ones, stands there (libxc-migration-stream.pandoc,
    Legacy Images).
    """
    p2m_size = int.from_bytes(head[:4], "little")
    if len(head) < 16 or not 0 < p2m_size < 1 << 28:
        return None
    if head[4:8] == b"\0" * 4 and head[8:16] == b"\xff" * 8:
        return 64
    if head[4:8] == b"\xff" * 4:
        return 32
    return None
