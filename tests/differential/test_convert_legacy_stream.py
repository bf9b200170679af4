"""Our convert-legacy-stream beside Xen's own, on the same streams: the same bytes.

The original from Debian's xen-utils, unpacked by the lab.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import lab
from tests.support.saved_files import verify_file
from tests.support.writers.build import pv_domain
from tests.support.writers.legacy import UNMAPPED, Legacy, hvm_stream, in_xl, pv_stream, remus_stream
from tests.support.writers.stream import Stream
from xenpv.abi.declare import Width
from xenpv.cli.convert_legacy_stream import main

FORMATS = ("libxc", "libxl")
LONGS = (8, 4)


class Both:
    """The original and ours, on one stream."""

    def __init__(self, original: lab.PeerTools, folder: Path) -> None:
        self.original, self.folder = original, folder

    def on(self, stream: Stream, *options: str) -> tuple[bytes, bytes]:
        """What both write; the exit status of neither is other than 0."""
        theirs, ours = self.status(stream, *options)
        assert (theirs, ours) == (0, 0)
        return (self.folder / "theirs").read_bytes(), (self.folder / "ours").read_bytes()

    def status(self, stream: Stream, *options: str) -> tuple[int, int]:
        source = self.folder / "in"
        source.write_bytes(bytes(stream))
        args = ["-i", str(source), *options, "-o"]
        theirs = self.original.run("convert-legacy-stream", *args, str(self.folder / "theirs")).returncode
        return theirs, main([*args, str(self.folder / "ours")])


@pytest.fixture
def both(original: lab.PeerTools, tmp_path: Path) -> Both:
    return Both(original, tmp_path)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("long", LONGS)
@pytest.mark.parametrize("width", [8, 4])
def test_convert_legacy_stream_pv_gives_the_originals_bytes(both: Both, width: Width, long: int, form: str) -> None:
    domain = pv_domain(width=width, pfns=range(96), vcpus=3, tree=True)
    theirs, ours = both.on(pv_stream(domain, Legacy(long)), "-w", str(long * 8), "-g", "pv", "-f", form)
    assert ours == theirs


@pytest.mark.parametrize("skip", [(), ("--skip-qemu",)])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("long", LONGS)
def test_convert_legacy_stream_hvm_gives_the_originals_bytes(
    both: Both, long: int, form: str, skip: tuple[str, ...]
) -> None:
    theirs, ours = both.on(hvm_stream(Legacy(long)), "-w", str(long * 8), "-g", "hvm", "-f", form, *skip)
    assert ours == theirs


def test_convert_legacy_stream_refuses_what_the_original_refuses(both: Both) -> None:
    domain, wire = pv_domain(pfns=range(36)), Legacy()
    options = ("-w", "64", "-g", "pv")
    for piece in (wire.chunk(1025), wire.chunk(-99), wire.chunk(2, wire.longs(0xE << 28, 0xE << 28))):
        assert both.status(pv_stream(domain).before("chunk -7", piece), *options) == (1, 1)
    whole = pv_stream(domain)
    assert both.status(Stream(whole[:-1]), *options) == (1, 1)
    assert both.status(whole, "-w", "32", "-g", "pv") == (1, 1)
    assert not (both.folder / "ours").exists()


def test_convert_legacy_stream_writes_restorable_streams_where_the_original_does_not(both: Both) -> None:
    """A batch of nothing but pfns that cannot be mapped: libxenguest refuses a PAGE_DATA without a pfn."""
    wire = Legacy()
    stream = pv_stream(pv_domain(pfns=range(36))).before("chunk -7", wire.chunk(2, wire.longs(UNMAPPED, UNMAPPED)))
    both.on(stream, "-w", "64", "-g", "pv")
    assert verify_file(both.folder / "theirs").rules == {"page-data-count"}
    assert verify_file(both.folder / "ours").rules == set()


def test_convert_legacy_stream_converts_where_the_original_fails(both: Both) -> None:
    """Its -x compares bytes with text, under Python 3; compression is "todo" there."""
    domain, wire = pv_domain(pfns=range(36)), Legacy()
    options = ("-w", "64", "-g", "pv", "-f", "libxl")
    assert both.status(in_xl(pv_stream(domain)), *options, "-x") == (1, 0)
    assert verify_file(both.folder / "ours").rules == set()
    rounds = [[wire.pages([], [], count=0)][:0]]
    assert both.status(remus_stream(domain, rounds), *options) == (2, 0)
    assert verify_file(both.folder / "ours").rules == set()
