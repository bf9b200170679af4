"""The envelope of a migration stream in a file.

Here are its headers, its detection by the first bytes, and its writing.

xl writes struct save_file_header (xen.git:tools/xl/xl.h), libvirt libxlSavefileHeader (src/libxl/libxl_domain.h).
xenopsd writes a signature and then {type, length} sections (xen-api.git:ocaml/xenopsd/lib/suspend_image.ml). All three
hold a libxl or libxc stream, which may also come bare.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from xenpv.errors import RequestError, Unsupported
from xenpv.stream.fields import Buffer, Fields

SNIFF_SIZE = 32  # bytes that sniff() needs, unless the input ends before


class Kind(StrEnum):
    """Kinds of stream: an envelope, or a bare stream."""

    XL = "xl"
    LIBVIRT = "libvirt"
    XENOPSD = "xenopsd"
    LIBXL = "libxl"
    LIBXC = "libxc"
    XEND = "xend"


XL_MAGIC = b"Xen saved domain, xl format\n \0 \r"
XL_FIELDS = Fields(byteorder=4, mandatory=4, optional=4, length=4)  # after the magic
XL_HEADER_SIZE = len(XL_MAGIC) + XL_FIELDS.size
XL_CONFIG = Fields(size=4)  # the start of the optional data; the configuration follows
XL_BYTEORDER = 0x01020304
XL_FLAG_JSON = 1 << 0
XL_FLAG_STREAMV2 = 1 << 1
XL_FLAGS_KNOWN = XL_FLAG_JSON | XL_FLAG_STREAMV2

LIBVIRT_MAGIC = b"libvirt-xml\n \0 \r"
LIBVIRT_FIELDS = Fields(version=4, length=4, **{f"_unused{i}": 4 for i in range(10)})  # after the magic
LIBVIRT_HEADER_SIZE = len(LIBVIRT_MAGIC) + LIBVIRT_FIELDS.size

XENOPSD_MAGIC = b"XenSavedDomv2-\n"
XENOPSD_SECTION = Fields(type=8, length=8)

# xm save, to Xen 4.4: the signature, the length of the configuration in network order, the configuration, and a legacy
# stream (xen.git@RELEASE-4.4.0:tools/python/xen/xend/XendCheckpoint.py save(), restore()).
XEND_MAGIC = b"LinuxGuestRecord"
XEND_HEADER_SIZE = len(XEND_MAGIC) + 4

LIBXL_IDENT = b"LibxlFmt"
LIBXC_MARKER = b"\xff" * 8

_MAGICS = {
    XL_MAGIC: Kind.XL,
    LIBVIRT_MAGIC: Kind.LIBVIRT,
    XENOPSD_MAGIC: Kind.XENOPSD,
    LIBXL_IDENT: Kind.LIBXL,
    LIBXC_MARKER: Kind.LIBXC,
    XEND_MAGIC: Kind.XEND,
}

CONFIG_MAX = 1 << 20  # bytes; a domain's configuration has kilobytes, and takes 50 times as much to parse


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
    """An envelope that was read.

    Attributes:
        kind: xl, libvirt, xenopsd or xend.
        offset: where it begins.
        length: bytes up to the stream inside.
        config: the domain's configuration; empty where it carries none.
        config_format: "json", "xl" (xl's text format), "xml", "sexp" (xenopsd's), "xend", or "" for none.
    """

    kind: Kind
    offset: int
    length: int
    config: bytes = b""
    config_format: str = ""

    @property
    def name(self) -> str:
        """The name that findings and listings call it."""
        return f"{self.kind} envelope"


_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gzip -dc"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -dc"),
    b"\xfd7zXZ\0": ("xz", "xz -dc"),
    b"BZh": ("bzip2", "bzip2 -dc"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4 -dc"),
}


# Files that people have beside saved domains.
_OTHERS = {
    b"EMiL": "a LiME dump of memory",
    b"KDUMP   ": "a kdump-compressed core, as makedumpfile and `xenpv export -f kdump` write it",
    b"LibvirtQemudSave": "a saved KVM guest of libvirt (virsh save)",
    b"LibvirtQemudPart": "a saved KVM guest of libvirt, unfinished",
    b"QEVM": "a migration stream of QEMU, a KVM guest's state",
    b"ova.xml\0": "a tar archive of an XVA export (xe vm-export), which holds disks and no memory",
}


def sniff(head: bytes) -> Kind:
    """Detect the kind of stream by its first SNIFF_SIZE bytes, or all that there are.

    An input that ends within the magic of a kind is of that kind; reading it then raises Truncated.

    Raises:
        Unsupported: no kind begins so. The message says what the input looks like.
    """
    for magic, kind in _MAGICS.items():
        if head.startswith(magic) or (head and magic.startswith(head)):
            return kind
    raise Unsupported(_describe_other(head), offset=0)


def _describe_other(head: bytes) -> str:
    """Describe an input that is no stream."""
    if not head:
        return "the input is empty"
    for magic, (name, command) in _COMPRESSED.items():
        if head.startswith(magic):
            return f"the input is compressed with {name}; unpack it into a pipe: {command} FILE | xenpv … -"
    if head.startswith(b"\x7fELF"):
        return (
            "the input is an ELF file (a kernel or a core), not a saved domain; read a kernel with `xenpv image FILE`, "
            "a core with `xenpv show FILE` or `xenpv check FILE`, and not from a pipe"
        )
    for magic, name in _OTHERS.items():
        if head.startswith(magic):
            return f"the input is {name}, not a saved Xen domain"
    if head.startswith(b"XenSavedDomain\n"):
        return "the input is a legacy xenopsd suspend image (before Xen 4.6), which xenpv does not read"
    if width := legacy_width(head):
        return (
            f"the input looks like a legacy (v1) stream of a {width}-bit toolstack (before Xen 4.6); "
            "convert it with `xenpv convert`"
        )
    return "the input is not a saved Xen domain: no xl, libvirt, xenopsd, libxl or libxc header"


def legacy_width(head: bytes) -> int | None:
    """Return the bits of the toolstack that wrote a legacy stream of a PV domain.

    32 or 64; None for other inputs.

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


_XEND_TOKEN = re.compile(rb"""'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+"|[()]|[^()'"]++""", re.DOTALL)


def is_whole_expression(text: bytes) -> bool:
    """Return whether a text is one whole s-expression in brackets.

    Brackets in quotes do not count. Source: xen.git@RELEASE-4.4.0:tools/python/xen/xend/sxp.py
    """
    depth = position = 0
    while token := _XEND_TOKEN.match(text, position):
        position = token.end()
        depth += {b"(": 1, b")": -1}.get(token[0], 0)
        if depth <= 0:
            break
    return depth == 0 and 0 < position == len(text)


# --- writing ---------------------------------------------------------------------------------------------------------

# The kind of stream inside, and the formats of configuration that an envelope can carry.
INNER_KIND = {
    Kind.XL: Kind.LIBXL,
    Kind.LIBVIRT: Kind.LIBXL,
    Kind.XENOPSD: Kind.LIBXC,
    Kind.LIBXL: Kind.LIBXL,
    Kind.LIBXC: Kind.LIBXC,
}
CONFIG_FORMATS = {
    Kind.XL: ("json", "xl"),
    Kind.LIBVIRT: ("xml",),
    Kind.XENOPSD: ("sexp",),
    Kind.LIBXL: (),
    Kind.LIBXC: (),
}

_LIBVIRT_VERSION = 2
_SECTION_NUMBERS = {section: number for number, section in SECTIONS.items()}
_XENOPS_MINIMAL = b"((time 19700101T00:00:00Z)(word_size 64))"  # the members that a xenops record must have


def check_config_size(config: bytes) -> None:
    """Raise RequestError for a configuration that is too long for any envelope."""
    if len(config) >= CONFIG_MAX - XL_CONFIG.size:
        size = len(config)
        raise RequestError(f"a configuration of {size:#x} bytes is too long", needed=size, available=CONFIG_MAX)


def xl_header(config: bytes, config_format: str = "json", *, stream_flag: int = XL_FLAG_STREAMV2) -> list[Buffer]:
    """Return xl's header.

    An empty configuration still has its size. ``stream_flag``: the kind of stream inside.
    """
    text = config and config.rstrip(b"\0") + b"\0"
    data = XL_CONFIG.pack(size=len(text)) + text
    flags = stream_flag | (XL_FLAG_JSON if text and config_format == "json" else 0)
    header = XL_FIELDS.pack(byteorder=XL_BYTEORDER, mandatory=flags, optional=0, length=len(data))
    return [XL_MAGIC, header, data]


def envelope_header(kind: Kind, config: bytes, config_format: str) -> list[Buffer]:
    """Return the buffers in front of the stream.

    Args:
        kind: the envelope; a bare stream has none.
        config: the domain's configuration, or nothing.
        config_format: its format, one of CONFIG_FORMATS[kind].

    Raises:
        RequestError: the configuration is missing, too long, or of a format that the envelope cannot carry.
    """
    if config and config_format not in CONFIG_FORMATS[kind]:
        raise RequestError(f"a {kind} file cannot carry a configuration of format {config_format or 'unknown'}")
    check_config_size(config)
    match kind:
        case Kind.XL:
            return xl_header(config, config_format)
        case Kind.LIBVIRT:
            if not config:
                raise RequestError("a libvirt file needs the domain's XML")
            xml = config.rstrip(b"\0") + b"\0"
            return [LIBVIRT_MAGIC, LIBVIRT_FIELDS.pack(version=_LIBVIRT_VERSION, length=len(xml)), xml]
        case Kind.XENOPSD:
            record = config or _XENOPS_MINIMAL
            return [XENOPSD_MAGIC, _section(Section.XENOPS, len(record)), record, _section(Section.LIBXC)]
    return []


def envelope_trailer(kind: Kind) -> list[Buffer]:
    """Return the buffers after the stream."""
    return [_section(Section.END)] if kind is Kind.XENOPSD else []


def _section(section: Section, length: int = 0) -> bytes:
    return XENOPSD_SECTION.pack(type=_SECTION_NUMBERS[section], length=length)
