"""What a file is, is told by looking; and what is none of ours is told for what it is."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct

import pytest

from tests.support.stream_reading import one_chunk, read, single_bytes
from tests.support.writers.build import pv_domain
from tests.support.writers.envelopes import (
    CONFIG_SEXP,
    CONFIG_XML,
    LIBXC_LEGACY,
    XENOPS,
    config_json,
    libvirt_header,
    xenopsd_section,
    xl_header,
)
from tests.support.writers.hvm import hvm_stream
from tests.support.writers.stream import Stream
from xenpv.errors import Malformed, Truncated, Unsupported
from xenpv.stream import rules
from xenpv.stream.envelope import INNER_KIND, SNIFF_SIZE, Envelope, Kind, Section, sniff
from xenpv.stream.events import SectionHeader


def envelope_of(stream: Stream) -> Envelope:
    event = read(one_chunk(bytes(stream))).events[0]
    assert isinstance(event, Envelope)
    return event


@pytest.mark.parametrize("kind", list(INNER_KIND))
def test_sniff_detects_each_kind(kind: Kind) -> None:
    head = pv_domain().to_bytes(str(kind))[:SNIFF_SIZE]
    assert sniff(head) is kind


@pytest.mark.parametrize("kind", list(INNER_KIND))
def test_sniff_truncated_magic_is_of_its_kind(kind: Kind) -> None:
    """The first byte of xl's magic begins xenopsd's too; from the fifth on each is told."""
    head = pv_domain().to_bytes(str(kind))[:SNIFF_SIZE]
    for n in range(5, 9):
        assert sniff(head[:n]) is kind


def test_reader_xl_envelope_gives_json_config() -> None:
    found = envelope_of(pv_domain(vcpus=2).to_stream("xl"))
    expected = config_json(vcpus=2, memory_kib=96 * 4)
    assert (found.kind, found.config_format) == (Kind.XL, "json")
    assert found.config.rstrip(b"\0") == expected
    assert (found.offset, found.length) == (0, 48 + 4 + len(expected) + 1)


def test_reader_xl_envelope_without_config_gives_empty_config() -> None:
    found = envelope_of(pv_domain().to_stream("xl").replace("xl header", xl_header(b"", mandatory=2)))
    assert (found.config, found.length) == (b"", 48)


def test_reader_xl_envelope_with_text_config_gives_format_xl() -> None:
    found = envelope_of(pv_domain().to_stream("xl").replace("xl header", xl_header(b'name = "made"\n', mandatory=2)))
    assert (found.config, found.config_format) == (b'name = "made"\n', "xl")


def test_reader_libvirt_envelope_gives_xml_config() -> None:
    found = envelope_of(pv_domain().to_stream("libvirt"))
    assert (found.kind, found.config, found.config_format) == (Kind.LIBVIRT, CONFIG_XML, "xml")
    assert found.length == 64 + len(CONFIG_XML) + 1


def test_reader_xenopsd_envelope_gives_sections() -> None:
    reading = read(one_chunk(pv_domain().to_bytes("xenopsd")))
    sections = [event for event in reading.events if isinstance(event, SectionHeader)]
    assert [section.section for section in sections] == [Section.XENOPS, Section.LIBXC, Section.END]
    assert sections[0].data == CONFIG_SEXP
    assert [section.name for section in sections] == ["xenops section", "libxc section", "end section"]


def test_reader_xenopsd_emulator_section_is_skipped() -> None:
    reading = read(one_chunk(bytes(hvm_stream("xenopsd"))))
    assert reading.done
    sections = [event.section for event in reading.events if isinstance(event, SectionHeader)]
    assert sections == [Section.XENOPS, Section.LIBXC, Section.QEMU_XEN, Section.END]


def test_reader_bare_stream_gives_no_envelope() -> None:
    for kind in ("libxl", "libxc"):
        assert not any(isinstance(event, Envelope) for event in read(one_chunk(pv_domain().to_bytes(kind))).events)


LEGACY_64 = struct.pack("<QQI", 0x18000, (1 << 64) - 1, 0x1450)
LEGACY_32 = struct.pack("<III", 0x18000, 0xFFFFFFFF, 0x1450) + bytes(8)
LZ4 = b"\x04\x22\x4d\x18\x64\x40\xa7"
ZSTD = b"\x28\xb5\x2f\xfd\x24\x00\x01\x00"

OTHER_INPUTS = {
    "empty": (b"", "empty"),
    "gzip": (gzip.compress(b"x" * 99), "gzip -dc"),
    "xz": (lzma.compress(b"x" * 99), "xz -dc"),
    "bzip2": (bz2.compress(b"x" * 99), "bzip2 -dc"),
    "zstd": (ZSTD, "zstd -dc"),
    "lz4": (LZ4, "lz4 -dc"),
    "elf": (b"\x7fELF\x02\x01\x01" + bytes(57), "ELF"),
    "legacy-64": (LEGACY_64, "legacy (v1) stream of a 64-bit toolstack"),
    "legacy-32": (LEGACY_32, "legacy (v1) stream of a 32-bit toolstack"),
    "legacy-xenopsd": (b"XenSavedDomain\n" + bytes(40), "legacy xenopsd"),
    "lime": (b"EMiL" + bytes(60), "LiME"),
    "kdump": (b"KDUMP   " + bytes(60), "kdump"),
    "virsh-kvm": (b"LibvirtQemudSave" + bytes(60), "KVM"),
    "qemu": (b"QEVM\0\0\0\3" + bytes(60), "QEMU"),
    "xva": (b"ova.xml" + bytes(93), "XVA"),
    "text": (b"#!/bin/sh\necho this is no domain\n", "not a saved Xen domain"),
    "zeroes": (bytes(4096), "not a saved Xen domain"),
    "nearly-xl": (b"Xen saved domain, xl format\n \1 \r" + bytes(99), "not a saved Xen domain"),
    "nearly-libxc": (b"\xff" * 7 + b"\xfe" + bytes(99), "not a saved Xen domain"),
}


@pytest.mark.parametrize(("data", "description"), OTHER_INPUTS.values(), ids=OTHER_INPUTS)
def test_sniff_other_inputs_are_unsupported_and_described(data: bytes, description: str) -> None:
    for chunks in ([data], [*single_bytes(data)]):
        for collect in (False, True):
            reading = read(chunks, collect=collect)
            assert type(reading.error) is Unsupported
            assert description in str(reading.error)
            assert reading.error.offset == 0
            assert reading.events == []
            assert "\n" not in str(reading.error)


def test_reader_legacy_xl_file_is_unsupported() -> None:
    stream = pv_domain().to_stream("xl").replace("xl header", xl_header(mandatory=1))
    reading = read(one_chunk(bytes(stream)))
    assert type(reading.error) is Unsupported
    assert reading.error.offset == 0
    assert reading.names == ["xl envelope"]


def test_reader_legacy_libvirt_file_is_unsupported() -> None:
    stream = pv_domain().to_stream("libvirt").replace("libvirt header", libvirt_header(version=1))
    reading = read(one_chunk(bytes(stream)))
    assert type(reading.error) is Unsupported
    assert reading.names == ["libvirt envelope"]
    assert reading.error.offset == stream.offset("libxl header")


def test_reader_legacy_xenopsd_section_is_unsupported() -> None:
    stream = pv_domain().to_stream("xenopsd")
    stream.replace("xenopsd section", xenopsd_section(LIBXC_LEGACY), nth=1)
    reading = read(one_chunk(bytes(stream)))
    assert type(reading.error) is Unsupported
    assert reading.error.offset == stream.offset("xenopsd section", 1)


def test_reader_config_length_beyond_maximum_is_malformed() -> None:
    for length in (1 << 31, (1 << 32) - 1):
        reading = read([xl_header(length=length).data])
        assert type(reading.error) is Malformed
        assert f"{length:#x}" in reading.error.reason
    assert type(read([xl_header(length=1 << 20).data]).error) is Truncated
    reading = read([pv_domain().to_bytes("xenopsd")[:15] + struct.pack("<QQ", XENOPS, 1 << 63)], collect=True)
    assert type(reading.error) is Malformed
    assert reading.rules == {rules.ENVELOPE}


@pytest.mark.parametrize("kind", list(Kind))
def test_reader_given_kind_is_checked(kind: Kind) -> None:
    reading = read([b"\x55" * 200], kind=kind)
    assert type(reading.error) is Malformed
    assert reading.error.offset == 0
    assert reading.events == []
