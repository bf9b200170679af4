"""Exit status 1 with one line for bad input, naming offset and record; 64 for wrong usage; 70 for a bug of xenpv."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.command import Ran, xenpv
from tests.support.writers.build import pv_domain
from tests.support.writers.envelopes import libvirt_header, xenopsd_section, xenopsd_signature
from tests.support.writers.stream import PAGE, Stream, Wire
from xenpv.errors import HostError

WIRE = Wire()
VERBS: list[list[object]] = [["show"], ["verify"], ["verify", "--framing"], ["p2m"], ["walk", 0], ["read", 0, 16]]


def try_verb(verb: list[object], file: object, stdin: bytes | None = None) -> Ran:
    options = [arg for arg in verb[1:] if str(arg).startswith("-")]
    rest = [arg for arg in verb[1:] if not str(arg).startswith("-")]
    return xenpv(verb[0], *options, file, *rest, stdin=stdin)


# --- files that are no stream ----------------------------------------------------------------------------------------

GOOD = pv_domain(pfns=range(40), user=False)
NO_STREAM: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the input is empty (at 0x0)"),
    "gzip": (gzip.compress(GOOD.to_bytes(), 1), "compressed with gzip; unpack it into a pipe: gzip -dc"),
    "xz": (lzma.compress(bytes(500)), "compressed with xz; unpack it into a pipe: xz -dc"),
    "bzip2": (bz2.compress(bytes(500)), "compressed with bzip2; unpack it into a pipe: bzip2 -dc"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(60), "compressed with zstd; unpack it into a pipe: zstd -dc"),
    "lz4": (b"\x04\x22\x4d\x18" + bytes(60), "compressed with lz4; unpack it into a pipe: lz4 -dc"),
    "elf": (b"\x7fELF" + bytes(60), "an ELF file (a kernel or a core), not a saved domain"),
    "text": (b"This is no stream at all, whatever its name may say.", "is not a saved Xen domain"),
    "zeroes": (bytes(4096), "is not a saved Xen domain"),
    "legacy, 64 bit": (struct.pack("<QQ", 0x6000, (1 << 64) - 1) + bytes(40), "legacy (v1) stream of a 64-bit"),
    "legacy, 32 bit": (struct.pack("<IIQ", 0x6000, (1 << 32) - 1, 40) + bytes(40), "legacy (v1) stream of a 32-bit"),
    "legacy xenopsd": (b"XenSavedDomain\n" + bytes(60), "legacy xenopsd suspend image"),
    "legacy libvirt": (libvirt_header(version=1).data + bytes(60), "legacy stream format"),
    "legacy in xenopsd": (
        xenopsd_signature().data + xenopsd_section(0x00F2, bytes(32)).data,
        "a suspend image with a legacy libxc stream",
    ),
}


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: " ".join(map(str, verb)))
@pytest.mark.parametrize("kind", NO_STREAM)
def test_file_that_is_no_stream_fails_and_says_what_it_is(tmp_path: Path, kind: str, verb: list[object]) -> None:
    data, sentence = NO_STREAM[kind]
    file = tmp_path / "file"
    file.write_bytes(data)
    assert sentence in try_verb(verb, file).error
    assert sentence in try_verb(verb, "-", stdin=data).error


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: " ".join(map(str, verb)))
def test_directory_or_missing_file_fails(tmp_path: Path, verb: list[object]) -> None:
    assert f"{tmp_path}: is a directory" in try_verb(verb, tmp_path).error
    nothing = tmp_path / "nothing"
    assert f"{nothing}: No such file or directory" in try_verb(verb, nothing).error


def test_file_without_permission_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **more: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("xenpv.io.stream_input.os.open", refuse)
    assert f"{tmp_path / 'file'}: Permission denied" in xenpv("verify", tmp_path / "file").error


def test_disk_error_while_reading_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> bytes:
        raise OSError(5, "Input/output error")

    file = tmp_path / "file"
    file.write_bytes(GOOD.to_bytes())
    monkeypatch.setattr("xenpv.io.stream_input.os.pread", fail)
    assert "Input/output error" in xenpv("show", file).error


def test_named_fifo_is_read_like_a_pipe(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(GOOD.to_bytes()), daemon=True)
    writer.start()
    assert xenpv("verify", fifo).code == 0
    writer.join(10)


# --- streams with something wrong ------------------------------------------------------------------------------------


def le32(value: int) -> bytes:
    return value.to_bytes(4, "little")


BROKEN: dict[str, tuple[Callable[[Stream], object], str, str]] = {
    "length lies": (lambda s: s.patch("X86_PV_P2M_FRAMES", 4, le32(1 << 20)), "X86_PV_P2M_FRAMES", "needs 1048576"),
    "record too large": (lambda s: s.patch("X86_PV_P2M_FRAMES", 4, le32(0x0800_0001)), "X86_PV_P2M_FRAMES", "exceeds"),
    "pages too large": (lambda s: s.patch("PAGE_DATA", 4, le32(0xFFFF_FFFF)), "PAGE_DATA", "exceeds max"),
    "pfn beyond the limit": (
        lambda s: s.patch("PAGE_DATA", 16, (1 << 40).to_bytes(8, "little")), "PAGE_DATA",
        "pfn 0x10000000000 (index 0) outside domain maximum 0x28",
    ),
    "unknown record": (lambda s: s.before("END", WIRE.record(0x55, b"12345678")), "record 0x55", "unknown type 0x55"),
    "marker": (lambda s: s.patch("image header", 0, b"\0"), "image header", "Invalid marker"),
    "version": (lambda s: s.patch("image header", 15, b"\7"), "image header", "Invalid Version: Expected 2 <="),
    "page size": (lambda s: s.patch("domain header", 4, b"\x10"), "domain header", "page shift 16"),
    "vcpu size": (lambda s: s.replace("X86_PV_VCPU_BASIC", WIRE.vcpu_basic(0, bytes(5160))), "X86_PV_VCPU_BASIC",
                  "expected 5168 bytes, got 5160"),
    "order": (lambda s: s.drop("X86_PV_P2M_FRAMES"), "PAGE_DATA", "PAGE_DATA before X86_PV_P2M_FRAMES"),
    "nothing of it": (lambda s: s.drop("PAGE_DATA").drop("SHARED_INFO"), "X86_PV_VCPU_BASIC", "before PAGE_DATA"),
    "pages missing": (
        lambda s: s.patch("PAGE_DATA", 4, le32(8 + 40 * 8 + 39 * PAGE)), "PAGE_DATA", "PAGE_DATA record wrong size"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_stream_fails_with_offset_and_record(tmp_path: Path, kind: str) -> None:
    spoil, record, message = BROKEN[kind]
    stream = GOOD.to_stream()
    spoil(stream)
    at = {piece.name: stream.offset(piece.name) for piece in stream}
    file = tmp_path / "file"
    file.write_bytes(bytes(stream))
    for verb in VERBS:
        if verb[0] == "verify":
            for ran in (try_verb(verb, file), try_verb(verb, "-", stdin=bytes(stream))):
                assert (ran.code, ran.err) == (1, "")
                line = next(line for line in ran.out.splitlines() if message in line)
                assert f"{record}" in line
                assert "(offset 0x" in line
        else:
            error = try_verb(verb, file).error
            assert message in error
            assert record in error
            assert "(at 0x" in error
            if record in at:
                assert f"(at {at[record]:#x}" in error


@pytest.mark.parametrize("envelope", ["xl", "libvirt", "xenopsd", "libxc"])
def test_truncated_stream_fails_with_an_offset(tmp_path: Path, envelope: str) -> None:
    stream = GOOD.to_stream(envelope)
    data = bytes(stream)
    cuts, at = set(range(1, 200 if envelope == "xl" else 70)), 0
    for piece in stream:
        at += len(piece.data)
        cuts |= {at - 1, at, at + 1, at + 7, at + 9}
    file = tmp_path / "cut"
    for cut in sorted(cut for cut in cuts if cut < len(data)):
        file.write_bytes(data[:cut])
        error = xenpv("show", file).error
        assert "(at 0x" in error
        ran = xenpv("verify", "--framing", file)
        assert ran.code == 1
        assert "Traceback" not in ran.err
        assert ran.err.count("\n") <= 1


def test_configuration_of_2_gib_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(GOOD.to_stream().patch("xl header", 44, le32(1 << 31))))
    assert "xl header" in xenpv("show", file).error


# --- wrong usage, and bugs of xenpv ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [["frobnicate"], ["verify"], ["verify", "--frobnicate", "x"], ["walk", "x"], ["walk", "x", "nonsense"],
     ["read", "x", "0"], ["show", "x", "y"], ["read", "--vcpu", "one", "x", "0", "0"]],
)  # fmt: skip
def test_wrong_usage_exits_64(args: list[str]) -> None:
    ran = xenpv(*args)
    assert ran.code == 64
    assert ran.raw == b""
    assert "Usage: xenpv" in ran.err
    assert "Traceback" not in ran.err


def test_bug_exits_70_with_a_traceback(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **more: object) -> None:
        raise ZeroDivisionError("one and only")

    monkeypatch.setattr("xenpv.stream.contents.Contents.add", fail)
    for verb in (["show"], ["verify"], ["p2m"]):
        ran = xenpv(*verb, good)
        assert ran.code == 70
        assert "Traceback" in ran.err
        assert "ZeroDivisionError: one and only" in ran.err
        assert ran.err.splitlines()[-1] == "xenpv: this is a bug in xenpv; please report it with the lines above"


def test_interrupt_exits_130_without_a_traceback(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("xenpv.stream.contents.Contents.add", interrupt)
    ran = xenpv("show", good)
    assert ran.code == 130
    assert "Traceback" not in ran.err


def test_error_with_notes_prints_those_of_its_causes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        first = HostError("first", op="create")
        first.add_note("the unfinished dom7\x1b stays")
        raise HostError("second", op="create") from first

    monkeypatch.setattr("xenpv.cli.show.open_file", fail)
    ran = xenpv("show", "file")
    assert (ran.code, ran.err) == (1, "xenpv: error: second\nxenpv: note: the unfinished dom7? stays\n")
