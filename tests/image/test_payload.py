"""Containers around kernels: every compression, wrong sizes, and files that are no kernel."""

from __future__ import annotations

import gzip
import lzma
import struct
import sys
from contextlib import suppress

import pytest

from tests.support.memory_limit import peak_memory_below
from tests.support.writers.kernel import COMPRESSIONS, LZ4_LEGACY, Kernel, bzimage, lz4_legacy, pack, word
from xenpv.errors import ImageError
from xenpv.image.kernel import KernelImage
from xenpv.image.payload import UNPACKED_MIN, Layer, unpack_kernel

ELF = Kernel().to_bytes()


def parse_error(data: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        KernelImage.parse(data)
    return caught.value


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_parse_bzimage(compression: str) -> None:
    image = KernelImage.parse(bzimage(compression, ELF))
    packed = len(pack(compression, ELF))
    layer = Layer("bzImage", compression, 5 * 512 + 0x2CC, packed, len(ELF), (2, 15), "6.1.0-made #1")
    assert image.layers == (layer,)
    assert bytes(image.elf.data) == ELF


def test_parse_gzip_around_elf_and_bzimage() -> None:
    image = KernelImage.parse(gzip.compress(ELF))
    assert [(layer.kind, layer.compression, layer.unpacked) for layer in image.layers] == [("gzip", "gzip", len(ELF))]
    assert bytes(image.elf.data) == ELF
    image = KernelImage.parse(gzip.compress(bzimage("xz", ELF)))
    assert [(layer.kind, layer.compression) for layer in image.layers] == [("gzip", "gzip"), ("bzImage", "xz")]


def test_unpack_lz4_with_many_blocks_and_magics() -> None:
    data = ELF + bytes(9 << 20)
    payload = lz4_legacy(data[:100], 40) + lz4_legacy(data[100:]) + word(len(data))
    assert payload.count(LZ4_LEGACY) == 2
    assert bytes(unpack_kernel(memoryview(bzimage("lz4", b"", payload=payload)))[0]) == data


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("wrong", [-1, 1, -len(ELF), 1 << 20], ids=["1 less", "1 more", "0", "1 MiB more"])
def test_unpack_wrong_size_raises_image_error(compression: str, wrong: int) -> None:
    payload = pack(compression, ELF)[:-4] + word(len(ELF) + wrong)
    error = parse_error(bzimage(compression, b"", payload=payload))
    assert error.offset is not None
    if compression != "gzip":  # which may find its own checksum wrong first
        assert f"unpack to {len(ELF) + wrong:#x} bytes" in error.reason
        assert error.offset == 5 * 512 + 0x2CC + len(payload) - 4


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_unpack_bomb_allocates_no_more_than_its_size(compression: str) -> None:
    payload = pack(compression, bytes(64 << 20))
    lie = payload[:-4] + word(100_000)
    limit = 17 if compression == "lz4" else 2  # a block of lz4 has 8 MiB, and is put behind what was there
    with peak_memory_below(limit << 20):
        parse_error(bzimage(compression, b"", payload=lie))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_unpack_size_above_maximum_raises_image_error(compression: str) -> None:
    payload = pack(compression, ELF)[:-4] + word(UNPACKED_MIN + 1)
    reason = parse_error(bzimage(compression, b"", payload=payload)).reason
    assert f"{UNPACKED_MIN + 1:#x}" in reason
    assert f"{UNPACKED_MIN:#x}" in reason


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_unpack_of_a_small_file_holds_at_most_64_mib(compression: str) -> None:
    """A bzImage of 4 kB that unpacks to 512 MiB took 1.07 GiB."""
    at_most = bzimage(compression, b"", payload=pack(compression, ELF + bytes(UNPACKED_MIN - len(ELF))))
    beyond = bzimage(compression, b"", payload=pack(compression, ELF + bytes(UNPACKED_MIN - len(ELF) + 1)))
    assert len(at_most) < 1 << 20
    with peak_memory_below(UNPACKED_MIN + UNPACKED_MIN // 4):
        assert len(unpack_kernel(memoryview(at_most))[0]) == UNPACKED_MIN
    with peak_memory_below(1 << 20):
        parse_error(beyond)


def test_unpack_of_two_layers_shares_one_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xenpv.image.payload.UNPACKED_MAX", 2 << 20)
    inner = bzimage("gzip", ELF + bytes(1 << 20))
    outer = gzip.compress(inner + bytes((1 << 20) - len(inner)))
    assert f"{(2 << 20) - (1 << 20):#x}" in parse_error(outer).reason
    assert KernelImage.parse(inner).layers


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_unpack_damaged_payload_raises_image_error(compression: str) -> None:
    payload = pack(compression, ELF)
    for cut in (5, 9, 20, len(payload) // 2, len(payload) - 5):
        parse_error(bzimage(compression, b"", payload=payload[:cut]))
        parse_error(bzimage(compression, b"", payload=payload[:cut] + payload[-4:]))
    for at in range(len(payload)):
        broken = bytearray(payload)
        broken[at] ^= 0x55
        with suppress(ImageError):  # what a checksum does not cover may change unseen
            KernelImage.parse(bzimage(compression, b"", payload=bytes(broken)))


def test_unpack_lzma_with_huge_dictionary_allocates_little() -> None:
    filters = [{"id": lzma.FILTER_LZMA1, "preset": 0, "dict_size": 1 << 20}]
    packed = bytearray(lzma.compress(ELF, lzma.FORMAT_ALONE, filters=filters))
    struct.pack_into("<I", packed, 1, 0xC000_0000)
    with peak_memory_below(2 << 20):
        KernelImage.parse(bzimage("lzma", b"", payload=bytes(packed) + word(len(ELF))))


@pytest.mark.parametrize(("compression", "module"), [("zstd", "zstandard"), ("lz4", "lz4.block")])
def test_unpack_without_library_names_package(compression: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    assert (
        f"the Python package {package} is not installed (Debian: python3-{package})"
        in parse_error(bzimage(compression, ELF)).reason
    )


def patched(at: int, value: bytes, data: bytes | None = None) -> bytes:
    image = bytearray(bzimage("gzip", ELF) if data is None else data)
    image[at : at + len(value)] = value
    return bytes(image)


LONG = len(bzimage("gzip", ELF))
WRONG: dict[str, tuple[bytes, str, int]] = {
    "empty": (b"", "there is nothing; the input is empty", 0),
    "text": (b"#!/bin/sh\necho no kernel\n", "neither an ELF file nor a bzImage: it begins with 23 21 2f", 0),
    "zeroes": (bytes(4096), "neither an ELF file nor a bzImage", 0),
    "a Windows program": (b"MZ\x90\0" + bytes(500), "a PE program (Windows", 0),
    "an arm64 kernel with an EFI stub": (
        b"MZ\0\x91" + bytes(52) + b"ARMd" + b"\x40\0\0\0PE\0\0\x64\xaa" + bytes(900),
        "an AArch64 Linux Image",
        0,
    ),
    "an arm64 kernel": (b"\0" * 56 + b"ARMd" + bytes(900), "an AArch64 Linux Image", 0),
    "xz around it": (lzma.compress(ELF), "a file compressed with xz; only gzip may be around a kernel", 0),
    "nothing in gzip": (gzip.compress(b""), "there is nothing inside the gzip", 0),
    "text in gzip": (gzip.compress(b"no kernel at all"), "neither an ELF file nor a bzImage inside the gzip", 0),
    "text in a bzImage": (bzimage("xz", b"no kernel"), "neither an ELF file nor a bzImage inside the bzImage", 0),
    "a bzImage in a bzImage": (bzimage("xz", bzimage("xz", ELF)), "a PE program inside the bzImage", 0),
    "half a gzip": (gzip.compress(ELF)[:-30], "", 0),
    "two bytes of gzip": (b"\x1f\x8b", "the file is cut short: 2 bytes of gzip", 0),
    "lzo": (
        bzimage("", b"", payload=b"\x89LZO\0\r\n\x1a\n" + bytes(40)),
        "packed with lzo, which xenpv does not",
        3276,
    ),
    "not packed": (bzimage("", ELF), "begins with 7f 45 4c 46", 3276),
    "no payload, as memtest86+": (bzimage("", b"", payload=b""), "has no payload: payload_length is 0", 0x248),
    "an old protocol": (bzimage("gzip", ELF, protocol=0x207), "boot protocol 2.07 of the bzImage is too old", 0x206),
    "a length beyond": (
        bzimage("gzip", ELF, length=1 << 31),
        f"lies beyond the file: payload_length 0x80000000 from 0xccc on, in a file of {LONG:#x} bytes",
        0x248,
    ),
    "an offset beyond": (patched(0x248, b"\xff\xff\xff\xff"), "the bzImage's payload lies beyond the file", 0x248),
    "a header cut short": (bzimage("gzip", ELF)[:0x24F], "the bzImage's header is cut short: 0x24f bytes of 0x250", 0),
}


@pytest.mark.parametrize("kind", WRONG)
def test_parse_what_is_no_kernel_raises_image_error(kind: str) -> None:
    data, fragment, offset = WRONG[kind]
    error = parse_error(data)
    assert fragment in error.reason
    if fragment:
        assert (error.offset, error.note) == (offset, None)
    assert str(error).startswith(error.reason)


def test_unpack_bzimage_without_version_text() -> None:
    assert unpack_kernel(memoryview(patched(0x20E, b"\0\0")))[1][0].version == ""
    assert unpack_kernel(memoryview(patched(0x20E, b"\xff\xff")))[1][0].version == ""


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_parse_bzimage_truncated_anywhere_raises_image_error(compression: str) -> None:
    image = bzimage(compression, ELF)
    end = len(image) - len(b"tail")
    for cut in [*range(0x260), *range(0x260, end, 37), end - 1]:
        parse_error(image[:cut])
    assert KernelImage.parse(image[:end]).layers
