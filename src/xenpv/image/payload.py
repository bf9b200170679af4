"""Unpacks the ELF file inside a kernel file: a bzImage, or gzip.

All sizes are checked before memory is allocated.

As in libxc, a file is an ELF file or a bzImage, with or without gzip around it. The last 4 bytes of a bzImage's payload
are its unpacked size. This size bounds what is unpacked, and the size of the packed data bounds this size.

Source: xen.git:tools/libs/guest/xg_dom_core.c xc_dom_try_gunzip(), xg_dom_bzimageloader.c
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from xenpv.errors import ImageError

UNPACKED_MAX = 256 << 20  # bytes of all layers; a quarter of libxc's XC_DOM_DECOMPRESS_MAX, five times Debian's kernel
UNPACKED_MIN = 64 << 20  # bytes to which anything may unpack
_RATIO = 64  # bytes to which a packed byte may unpack beyond that; of kernels it is 3 to 9
_PIECE = 1 << 20  # bytes unpacked at a time
_WINDOW_MAX = 256 << 20  # bytes of dictionary; libxc's LZMA_BLOCK_SIZE

ELF_MAGIC = b"\x7fELF"
_GZIP = b"\x1f\x8b"
_LZ4_LEGACY = b"\x02\x21\x4c\x18"
_LZ4_BLOCK = 8 << 20  # bytes that a block of the legacy format unpacks to at most
_LZ4_RATIO = 255  # the most bytes that one byte of an lz4 block can unpack to

# Documentation/arch/x86/boot.rst of Linux: offsets in the first sectors of a bzImage
_SETUP_SECTS = 0x1F1
_HEADER, _HDRS = 0x202, b"HdrS"
_VERSION = 0x206
_KERNEL_VERSION = 0x20E
_PAYLOAD = 0x248
_HEADER_END = 0x250
_VERSION_WITH_PAYLOAD = 0x0208


@dataclass(frozen=True, slots=True)
class Layer:
    """One container around a kernel.

    Attributes:
        kind: "gzip", around the whole file, or "bzImage".
        compression: The compression of its payload.
        offset: Byte offset of the payload within the container.
        packed: Bytes of payload.
        unpacked: Bytes that the payload unpacks to.
        protocol: Boot protocol of a bzImage, major and minor; otherwise None.
        version: Kernel version by a bzImage's header; "" if it has none.
    """

    kind: str
    compression: str
    offset: int
    packed: int
    unpacked: int
    protocol: tuple[int, int] | None = None
    version: str = ""


def unpack_kernel(data: memoryview) -> tuple[memoryview, tuple[Layer, ...]]:
    """Return the ELF file in a kernel file, and its containers, outermost first.

    Raises:
        ImageError: The file is no kernel, or it is damaged.
    """
    layers, room = [], UNPACKED_MAX
    if data[:2] == _GZIP:
        data, layer = _unpack(data, Layer("gzip", "gzip", 0, len(data), 0), room)
        layers.append(layer)
        room -= layer.unpacked
    if data[_HEADER : _HEADER + 4] == _HDRS and data[:4] != ELF_MAGIC:
        data, layer = _unpack(data, _parse_bzimage(data), room)
        layers.append(layer)
    if data[:4] != ELF_MAGIC:
        raise ImageError(_describe_other_file(data, layers), offset=0)
    return data, tuple(layers)


def _unpack(data: memoryview, layer: Layer, room: int) -> tuple[memoryview, Layer]:
    """Return a container's unpacked payload, and the container with the unpacked size.

    ``room``: bytes that it may have at most.
    """
    packed = data[layer.offset : layer.offset + layer.packed]
    name = f"the {layer.kind}'s payload" if layer.kind == "bzImage" else "the file"
    if len(packed) < 10:
        raise ImageError(f"{name} is cut short: {len(packed)} bytes of {layer.compression}", offset=layer.offset)
    size = int.from_bytes(packed[-4:], "little")
    allowed = min(room, max(UNPACKED_MIN, _RATIO * len(packed)))
    if size > allowed:
        raise ImageError(
            f"{name} claims to unpack to {size:#x} bytes; at most {allowed:#x} are accepted of {len(packed):#x}",
            offset=layer.offset + layer.packed - 4,
        )
    try:
        unpacked = _DECOMPRESSORS[layer.compression](packed, size)
    except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as e:
        raise ImageError(f"{name} cannot be unpacked as {layer.compression}: {e}", offset=layer.offset) from e
    except ImportError as e:
        package = _PACKAGES[layer.compression]
        raise ImageError(
            f"{name} is packed with {layer.compression}, and the Python package {package} is not installed "
            f"(Debian: python3-{package})",
            offset=layer.offset,
        ) from e
    if len(unpacked) != size:
        actual = f"more than {size:#x}" if len(unpacked) > size else f"{len(unpacked):#x}"
        raise ImageError(
            f"{name} claims to unpack to {size:#x} bytes of {layer.compression}, and unpacks to {actual}",
            offset=layer.offset + layer.packed - 4,
        )
    return memoryview(unpacked), replace(layer, unpacked=size)


def _parse_bzimage(data: memoryview) -> Layer:
    """Return the container that a bzImage is."""
    if len(data) < _HEADER_END:
        raise ImageError(f"the bzImage's header is cut short: {len(data):#x} bytes of {_HEADER_END:#x}", offset=0)
    [version] = struct.unpack_from("<H", data, _VERSION)
    protocol = (version >> 8, version & 0xFF)
    if version < _VERSION_WITH_PAYLOAD:
        raise ImageError(
            f"boot protocol {protocol[0]}.{protocol[1]:02} of the bzImage is too old: it names no payload before 2.08",
            offset=_VERSION,
        )
    payload_offset, length = struct.unpack_from("<II", data, _PAYLOAD)
    offset = (data[_SETUP_SECTS] + 1) * 512 + payload_offset
    if offset + length > len(data):
        raise ImageError(
            f"the bzImage's payload lies beyond the file: payload_length {length:#x} from {offset:#x} on, in a file of "
            f"{len(data):#x} bytes; is it cut short?",
            offset=_PAYLOAD,
        )
    [text_offset] = struct.unpack_from("<H", data, _KERNEL_VERSION)
    text = (
        bytes(data[text_offset + 512 : text_offset + 512 + 200]).partition(b"\0")[0].decode("latin-1")
        if text_offset
        else ""
    )
    return Layer("bzImage", _detect_compression(data, offset, length), offset, length, 0, protocol, text)


# In libxc's order, since some magics are the begin of others' data.
_MAGICS = {
    _GZIP: "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x5d\0": "lzma",
    b"\x89LZO": "lzo",
    _LZ4_LEGACY: "lz4",
}
_PACKAGES = {"lz4": "lz4", "zstd": "zstandard"}


def _detect_compression(data: memoryview, offset: int, length: int) -> str:
    if not length:
        raise ImageError(
            "the bzImage has no payload: payload_length is 0, as of a program like memtest86+", offset=_PAYLOAD
        )
    head = bytes(data[offset : offset + min(length, 8)])
    for magic, name in _MAGICS.items():
        if head.startswith(magic):
            if name in _DECOMPRESSORS:
                return name
            raise ImageError(f"the bzImage's payload is packed with {name}, which xenpv does not unpack", offset=offset)
    raise ImageError(
        f"the bzImage's payload begins with {head.hex(' ')}, which is no compression that a loader of Xen "
        "knows (gzip, bzip2, xz, zstd, lzma, lzo, lz4)",
        offset=offset,
    )


# Each unpacks all but the size at the end (which is gzip's own trailer), and stops early if there is more than that.


def _decompress(decompressor: Any, packed: memoryview, size: int) -> bytearray:
    """Use a decompressor of bz2 or lzma, which must reach its end and its checksum."""
    unpacked = bytearray()
    pending: memoryview | bytes = packed  # the decompressor keeps what it has not read
    while len(unpacked) <= size and not decompressor.eof:
        piece = decompressor.decompress(pending, min(_PIECE, size + 1 - len(unpacked)))
        if not piece and decompressor.needs_input:
            raise ValueError("the data ends early")
        unpacked += piece
        pending = b""
    return unpacked


def _decompress_gzip(packed: memoryview, size: int) -> bytearray:
    decompressor, unpacked, offset = zlib.decompressobj(zlib.MAX_WBITS + 16), bytearray(), 0
    while len(unpacked) <= size and not decompressor.eof:
        pending = decompressor.unconsumed_tail
        if not pending:
            pending = bytes(packed[offset : offset + _PIECE])
            offset += len(pending)
        if not pending:
            raise ValueError("the data ends early")
        unpacked += decompressor.decompress(pending, min(_PIECE, size + 1 - len(unpacked)))
    return unpacked


def _decompress_bzip2(packed: memoryview, size: int) -> bytearray:
    return _decompress(bz2.BZ2Decompressor(), packed[:-4], size)


def _decompress_xz(packed: memoryview, size: int) -> bytearray:
    return _decompress(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_WINDOW_MAX), packed[:-4], size)


def _decompress_lzma(packed: memoryview, size: int) -> bytearray:
    # Bytes 1 to 4 of its header are the dictionary size; none larger than the unpacked size is needed.
    dictionary = min(int.from_bytes(packed[1:5], "little"), max(size, 4096))
    archive = b"".join([packed[:1], dictionary.to_bytes(4, "little"), packed[5:-4]])
    return _decompress(lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_WINDOW_MAX), memoryview(archive), size)


def _decompress_zstd(packed: memoryview, size: int) -> bytearray:
    import zstandard  # noqa: PLC0415  few kernels need it, and a dom0 may not have it

    unpacked = bytearray()
    try:
        reader = zstandard.ZstdDecompressor(max_window_size=_WINDOW_MAX // 2).stream_reader(packed[:-4])
        while len(unpacked) <= size and (piece := reader.read(min(_PIECE, size + 1 - len(unpacked)))):
            unpacked += piece
    except zstandard.ZstdError as e:
        raise ValueError(str(e)) from e
    return unpacked


def _decompress_lz4(packed: memoryview, size: int) -> bytearray:
    """Unpack the legacy frame format: a magic, then packed sizes with blocks.

    The magic may be repeated.
    """
    from lz4.block import LZ4BlockError, decompress  # noqa: PLC0415  as zstandard

    end = len(packed) - 4
    unpacked, offset = bytearray(), 0
    while offset < end and len(unpacked) <= size:
        if packed[offset : offset + 4] == _LZ4_LEGACY:
            offset += 4
            continue
        length = int.from_bytes(packed[offset : offset + 4], "little")
        block = packed[offset + 4 : offset + 4 + length]
        offset += 4 + length
        if not length or offset > end:
            raise ValueError(f"a block of {length:#x} bytes is empty, or ends beyond the data")
        try:
            # It allocates what it is told to, so bound that by what the block can hold, too.
            unpacked += decompress(block, min(_LZ4_BLOCK, _LZ4_RATIO * len(block)))
        except LZ4BlockError as e:
            raise ValueError(str(e)) from e
    return unpacked


_DECOMPRESSORS: dict[str, Callable[[memoryview, int], bytearray]] = {
    "gzip": _decompress_gzip,
    "bzip2": _decompress_bzip2,
    "xz": _decompress_xz,
    "zstd": _decompress_zstd,
    "lzma": _decompress_lzma,
    "lz4": _decompress_lz4,
}


def _describe_other_file(data: memoryview, layers: list[Layer]) -> str:
    """Describe a file that is no kernel."""
    inside = f" inside the {layers[-1].kind}" if layers else ""
    head = bytes(data[:64])
    if not head:
        return f"there is nothing{inside}; the input is empty" if not inside else f"there is nothing{inside}"
    for magic, name in _MAGICS.items():
        if head.startswith(magic) and len(magic) > 2:
            return f"a file compressed with {name}{inside}; only gzip may be around a kernel, so unpack it first"
    if head[56:60] == b"ARMd":  # with an EFI stub it begins with MZ, too (Documentation/arch/arm64/booting.rst)
        return f"an AArch64 Linux Image{inside}; Xen's PV and PVH guests are x86"
    if head.startswith(b"MZ"):
        return f"a PE program{inside} (Windows, or an EFI application that is no bzImage), not a kernel that Xen boots"
    return f"neither an ELF file nor a bzImage{inside}: it begins with {head[:8].hex(' ')}"
