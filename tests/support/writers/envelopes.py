"""What wraps a libxc stream in a file: libxl's records, and the headers of xl, libvirt and xenopsd around those.

>>> file = wrap(Stream([Wire().image_header()]), "xl", config=b"{}")
>>> [piece.name for piece in file]
['xl header', 'libxl header', 'libxl LIBXC_CONTEXT', 'image header', 'libxl END']
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable

from tests.support.writers.stream import LITTLE, Piece, Stream, Wire

ENVELOPES = ("xl", "libvirt", "xenopsd", "libxl", "libxc")

CONFIG_XML = b"<domain type='xen'>\n  <name>made</name>\n  <memory unit='KiB'>384</memory>\n</domain>\n"
CONFIG_SEXP = b"((time 20240101T00:00:00Z)(word_size 64))"


def config_json(kind: str = "pv", *, name: str = "made", vcpus: int = 1, memory_kib: int = 4096) -> bytes:
    """A domain's configuration as libxl_domain_config_to_json() has it, as far as anybody looks."""
    config = {
        "c_info": {"type": kind, "name": name, "uuid": "8d1c2f6e-3f0a-4c5b-9a77-0123456789ab"},
        "b_info": {"max_vcpus": vcpus, "max_memkb": memory_kib, "target_memkb": memory_kib, f"type.{kind}": {}},
    }
    return json.dumps(config, indent=4).encode()


# xenopsd's sections: suspend_image.ml int64_of_header_type
XENOPS, LIBXC, LIBXL, LIBXC_LEGACY, QEMU_XEN, END = 0x000F, 0x00F0, 0x00F1, 0x00F2, 0x0F01, 0xFFFF


def xl_header(
    config: bytes | None = None,
    *,
    mandatory: int = 3,
    optional: int = 0,
    byteorder: bytes = b"\4\3\2\1",
    length: int | None = None,
    config_length: int | None = None,
) -> Piece:
    """xl's struct save_file_header and its optional data. Flags: 1 the config is JSON, 2 a stream of version 2 follows.

    ``length`` and ``config_length`` lie about the optional data and the configuration in it. ``config`` b"" leaves the
    optional data out; None stands for a configuration as xl writes it, with its final NUL.
    """
    config = config_json() + b"\0" if config is None else config
    data = struct.pack("<I", len(config) if config_length is None else config_length) + config if config else b""
    numbers = struct.pack("<III", mandatory, optional, len(data) if length is None else length)
    return Piece("xl header", b"Xen saved domain, xl format\n \0 \r" + byteorder + numbers + data)


def libvirt_header(
    xml: bytes = CONFIG_XML + b"\0", *, version: int = 2, length: int | None = None, unused: bytes = bytes(40)
) -> Piece:
    numbers = struct.pack("<II", version, len(xml) if length is None else length)
    return Piece("libvirt header", b"libvirt-xml\n \0 \r" + numbers + unused + xml)


def xenopsd_signature() -> Piece:
    return Piece("xenopsd signature", b"XenSavedDomv2-\n")


def xenopsd_section(kind: int, data: bytes = b"", *, length: int | None = None) -> Piece:
    return Piece("xenopsd section", struct.pack("<QQ", kind, len(data) if length is None else length) + data)


def libxl(libxc: Stream, *, wire: Wire = LITTLE, emulator: Iterable[Piece] = ()) -> Stream:
    """The libxl stream around a libxc one; ``emulator`` is what comes behind it for an HVM domain."""
    return Stream([wire.libxl_header(), wire.libxc_context(), *libxc, *emulator, wire.libxl_end()])


def wrap(
    libxc: Stream,
    envelope: str,
    *,
    config: bytes | None = None,
    wire: Wire = LITTLE,
    emulator: Iterable[Piece] = (),
) -> Stream:
    """The stream as the tool named ``envelope`` would write it: xl, libvirt, xenopsd, or bare libxl or libxc.

    ``config`` takes the place of a small configuration of the tool's own kind. An HVM domain's device model goes where
    the tool puts it; xenopsd gives it a section.
    """
    emulator = list(emulator)
    match envelope:
        case "libxc":
            return Stream(libxc)
        case "libxl":
            return libxl(libxc, wire=wire, emulator=emulator)
        case "xl":
            return Stream([xl_header(config), *libxl(libxc, wire=wire, emulator=emulator)])
        case "libvirt":
            header = libvirt_header() if config is None else libvirt_header(config)
            return Stream([header, *libxl(libxc, wire=wire, emulator=emulator)])
        case "xenopsd":
            record = xenopsd_section(XENOPS, CONFIG_SEXP if config is None else config)
            qemu = [xenopsd_section(QEMU_XEN, b"QEVM" + bytes(60))] if emulator else []
            return Stream([xenopsd_signature(), record, xenopsd_section(LIBXC), *libxc, *qemu, xenopsd_section(END)])
    raise ValueError(f"no envelope is called {envelope!r}: {', '.join(ENVELOPES)}")
