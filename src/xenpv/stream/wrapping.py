"""What wraps a stream in a file, made: the headers that envelope.py tells apart, and what follows the stream."""

from __future__ import annotations

from xenpv.errors import RequestError
from xenpv.stream import envelope
from xenpv.stream.envelope import Kind, Section
from xenpv.stream.fields import Buffer

# The stream inside, and the formats of configuration that it has a place for.
INSIDE = {
    Kind.XL: Kind.LIBXL,
    Kind.LIBVIRT: Kind.LIBXL,
    Kind.XENOPSD: Kind.LIBXC,
    Kind.LIBXL: Kind.LIBXL,
    Kind.LIBXC: Kind.LIBXC,
}
STYLES = {Kind.XL: ("json", "xl"), Kind.LIBVIRT: ("xml",), Kind.XENOPSD: ("sexp",), Kind.LIBXL: (), Kind.LIBXC: ()}

_LIBVIRT_VERSION = 2
_NUMBERS = {section: number for number, section in envelope.SECTIONS.items()}
_NO_RECORD = b"((time 19700101T00:00:00Z)(word_size 64))"  # the members that a xenops record cannot be without


def xl_header(config: bytes, style: str = "json", *, inside: int = envelope.XL_FLAG_STREAMV2) -> list[Buffer]:
    """As xl writes it: without a configuration, too, its size is there. ``inside``: the flag that says what follows."""
    text = config and config.rstrip(b"\0") + b"\0"
    data = envelope.XL_CONFIG.pack(size=len(text)) + text
    flags = inside | (envelope.XL_FLAG_JSON if text and style == "json" else 0)
    header = envelope.XL_FIELDS.pack(byteorder=envelope.XL_BYTEORDER, mandatory=flags, optional=0, length=len(data))
    return [envelope.XL_MAGIC, header, data]


def head(kind: Kind, config: bytes, style: str) -> list[Buffer]:
    """What stands in front of the stream. ``style`` is the configuration's format, one of STYLES.

    Raises RequestError for a configuration that is missing, too long, or has no place there.
    """
    if config and style not in STYLES[kind]:
        raise RequestError(f"a configuration of format {style or 'unknown'} has no place in a {kind} file")
    if len(config) >= envelope.CONFIG_MAX - envelope.XL_CONFIG.size:
        most = envelope.CONFIG_MAX
        raise RequestError(f"a configuration of {len(config)} bytes", needed=len(config), available=most)
    match kind:
        case Kind.XL:
            return xl_header(config, style)
        case Kind.LIBVIRT:
            if not config:
                raise RequestError("a libvirt file cannot be without the domain's XML")
            xml = config.rstrip(b"\0") + b"\0"
            return [
                envelope.LIBVIRT_MAGIC,
                envelope.LIBVIRT_FIELDS.pack(version=_LIBVIRT_VERSION, length=len(xml)),
                xml,
            ]
        case Kind.XENOPSD:
            record = config or _NO_RECORD
            return [envelope.XENOPSD_MAGIC, _section(Section.XENOPS, len(record)), record, _section(Section.LIBXC)]
    return []


def tail(kind: Kind) -> list[Buffer]:
    """What follows the stream."""
    return [_section(Section.END)] if kind is Kind.XENOPSD else []


def _section(section: Section, length: int = 0) -> bytes:
    return envelope.XENOPSD_SECTION.pack(type=_NUMBERS[section], length=length)
