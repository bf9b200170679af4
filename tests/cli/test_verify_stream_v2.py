"""``verify-stream-v2``: the original's options and exit status, and streams that the original wrongly rejects."""

from __future__ import annotations

import os
import subprocess
import sys
import syslog
from pathlib import Path

import pytest

from tests.support.command import shim
from tests.support.writers.build import pv_domain
from tests.support.writers.envelopes import wrap
from tests.support.writers.hvm import hvm_stream
from tests.support.writers.stream import OPTIONAL, RECORDS, Piece, Stream, Wire

WIRE = Wire()
FORMATS = ["libxc", "libxl", "xl"]


@pytest.fixture(scope="module", params=[8, 4], ids=["64-bit", "32-bit"])
def streams(request: pytest.FixtureRequest) -> dict[str, Stream]:
    domain = pv_domain(width=request.param, pfns=range(64), vcpus=2)
    return {kind: domain.to_stream(kind, batch=16) for kind in FORMATS}


def accepted(data: bytes, kind: str = "libxc") -> None:
    ran = shim("-f", kind, stdin=data)
    assert (ran.code, ran.raw, ran.err) == (0, b"", "")


def rejected(data: bytes, kind: str = "libxc") -> str:
    ran = shim("-f", kind, stdin=data)
    assert ran.code == 1
    assert ran.raw == b""
    assert ran.err.startswith("Stream Error:\n")
    assert "Traceback" not in ran.err
    return ran.err


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_shim_accepts_a_good_stream_in_each_format(tmp_path: Path, streams: dict[str, Stream], kind: str) -> None:
    data = bytes(streams[kind])
    accepted(data, kind)
    file = tmp_path / "stream"
    file.write_bytes(data)
    for args in (["-i", file, "-f", kind], [f"--in={file}", f"--format={kind}"], ["-f", kind, "-q", "-i", file]):
        ran = shim(*args)
        assert (ran.code, ran.raw, ran.err) == (0, b"", "")


def test_shim_rejects_a_stream_of_another_format(streams: dict[str, Stream]) -> None:
    for kind in FORMATS:
        for other in set(FORMATS) - {kind}:
            rejected(bytes(streams[other]), kind)


def test_shim_default_format_is_libxc(streams: dict[str, Stream]) -> None:
    assert shim(stdin=bytes(streams["libxc"])).code == 0
    assert shim(stdin=bytes(streams["xl"])).code == 1


@pytest.mark.parametrize("kind", ["libxl", "xl"])
def test_shim_accepts_hvm(kind: str) -> None:
    accepted(bytes(hvm_stream(kind)), kind)
    accepted(bytes(hvm_stream("libxc")), "libxc")


def test_shim_verbose_prints_the_originals_lines(streams: dict[str, Stream]) -> None:
    ran = shim("-v", "-f", "xl", stdin=bytes(streams["xl"]))
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[:5] == [
        "Processed xl header",
        "Libxl Header: little endian",
        "Libxl Record: LIBXC_CONTEXT, length 0",
        "Libxc Image Header: Version 3, little endian",
        "Domain Header: x86 PV from Xen 4.17",
    ]
    assert "Squashed 5 Page Data records together" in lines
    assert any(
        line in {"  64bit guest, 4 levels of pagetables", "  32bit guest, 3 levels of pagetables"} for line in lines
    )
    assert "  Start pfn 0x0, End 0x40" in lines
    assert lines[-1] == "Libxl Record: END, length 0"


def test_shim_quiet_overrides_verbose(streams: dict[str, Stream]) -> None:
    ran = shim("-v", "-q", "-f", "xl", stdin=bytes(streams["xl"]))
    assert (ran.code, ran.raw, ran.err) == (0, b"", "")
    ran = shim("-v", "-q", "-f", "xl", stdin=bytes(streams["libxc"]))
    assert (ran.code, ran.raw, ran.err) == (1, b"", "")


def test_shim_reads_no_byte_after_the_stream_of_a_file_descriptor(tmp_path: Path, streams: dict[str, Stream]) -> None:
    """A caller that passes its own descriptor goes on reading there."""
    data = bytes(streams["libxl"])
    file = tmp_path / "two"
    file.write_bytes(b"before" + data + b"after!")
    fd = os.open(file, os.O_RDONLY)
    os.lseek(fd, 6, os.SEEK_SET)
    assert shim("-i", os.dup(fd), "-f", "libxl").code == 0
    assert os.read(fd, 100) == b"after!"
    os.close(fd)


def test_shim_reads_no_byte_after_the_stream_of_a_pipe(streams: dict[str, Stream]) -> None:
    data = bytes(streams["xl"])
    program = (
        "import os, sys; from xenpv.cli.verify_stream_v2 import main; code = main(['-f', 'xl', '-i', '3']);"
        "print(code, os.read(4, 100))"
    )
    reading, writing = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", f"import os; os.dup2({reading}, 3); os.dup2(3, 4); {program}"],
        pass_fds=[reading],
        stdout=subprocess.PIPE,
        text=True,
    ) as ran:
        os.close(reading)
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(data + b"after!")
        assert ran.stdout is not None
        assert ran.stdout.read() == "0 b'after!'\n"


def test_shim_syslog_gets_summary_and_errors(streams: dict[str, Stream], monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int, str]] = []
    monkeypatch.setattr(syslog, "syslog", lambda level, line: logged.append((level, line)))
    monkeypatch.setattr(syslog, "openlog", lambda *_: None)
    ran = shim("--syslog", "-v", "-f", "libxl", stdin=bytes(streams["libxl"]))
    assert (ran.code, ran.raw, ran.err) == (0, b"", "")
    assert (syslog.LOG_INFO, "Libxl Header: little endian") in logged
    logged.clear()
    ran = shim("--syslog", "-f", "libxl", stdin=b"nonsense" * 10)
    assert ran.code == 1
    assert logged[0] == (syslog.LOG_ERR, "Stream Error:")
    assert ran.err.startswith("Stream Error:\n"), "the original says errors in both places"


# --- bad streams -----------------------------------------------------------------------------------------------------


def test_shim_rejects_bad_streams_and_says_why(streams: dict[str, Stream]) -> None:
    good = streams["libxc"]

    def spoiled() -> Stream:
        return Stream(good)

    assert "Invalid ID" in rejected(bytes(spoiled().patch("image header", 8, b"NENX")))
    assert "unknown type 0x77" in rejected(bytes(spoiled().before("END", WIRE.record(0x77))))
    assert "X86_PV_INFO" in rejected(bytes(spoiled().drop("X86_PV_INFO")))
    assert "reserved bits set" in rejected(bytes(spoiled().patch("X86_TSC_INFO", 28, b"\1"))), "an error there"
    padded = WIRE.record(RECORDS.index("X86_PV_VCPU_XSAVE"), bytes(8 + 845), padding=b"\1\0\0")
    assert "padding" in rejected(bytes(spoiled().replace("X86_PV_VCPU_XSAVE", padded)))


@pytest.mark.parametrize("kind", FORMATS)
def test_shim_rejects_a_truncated_stream(streams: dict[str, Stream], kind: str) -> None:
    data = bytes(streams[kind])
    for cut in (0, 1, 7, 30, 100, len(data) // 2, len(data) - 1):
        rejected(data[:cut], kind)


def test_shim_of_a_missing_file_or_descriptor_exits_1(tmp_path: Path) -> None:
    for source, why in ((tmp_path / "no", "No such file"), (tmp_path, "directory"), (999, "Bad file descriptor")):
        ran = shim("-i", source)
        assert ran.code == 1
        assert ran.raw == b""
        assert why in ran.err


def test_shim_with_wrong_options_exits_2() -> None:
    for args in (["-f", "qcow2"], ["--frobnicate"], ["-i"]):
        ran = shim(*args)
        assert ran.code == 2, "as optparse ends"
        assert "usage" in ran.err.lower()


def test_shim_help_lists_the_options() -> None:
    ran = shim("--help")
    assert ran.code == 0
    for option in ("-i", "--in", "-v", "-q", "-f", "--format", "--syslog"):
        assert option in ran.out


def test_shim_bug_exits_2_with_a_traceback(streams: dict[str, Stream], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **more: object) -> None:
        raise ZeroDivisionError("one and only")

    monkeypatch.setattr("xenpv.cli.verify_stream_v2._describe", fail)
    ran = shim(stdin=bytes(streams["libxc"]))
    assert ran.code == 2
    assert ran.err.startswith("Script Error:\nTraceback")
    assert ran.err.endswith("ZeroDivisionError: one and only\nPlease fix me\n")


# --- good streams that the original rejects --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_shim_accepts_unknown_optional_records(streams: dict[str, Stream], kind: str) -> None:
    """The original takes bit 31 for a part of the type, and the type for one that it does not know."""
    extra = [WIRE.record(OPTIONAL | 0x123, b"whatever this is"), WIRE.record(OPTIONAL | 0x7FFF_FFFF)]
    accepted(bytes(Stream(streams[kind]).before("END", *extra)), kind)
    if kind != "libxc":
        accepted(bytes(Stream(streams[kind]).before("libxl END", WIRE.libxl_record(OPTIONAL | 9, b"12345"))), kind)


def test_shim_accepts_emulator_xenstore_data() -> None:
    """Under Python 3 the original splits bytes at a str, and falls over every HVM domain that has such data."""
    stream = hvm_stream("libxl")
    assert "libxl EMULATOR_XENSTORE_DATA" in [piece.name for piece in stream]
    accepted(bytes(stream), "libxl")
    odd = Piece("libxl EMULATOR_XENSTORE_DATA", WIRE.libxl_record(2, bytes((2, 0, 0, 0, 0, 0, 0, 0)) + b"key\0").data)
    assert "key and value" in rejected(bytes(stream.replace("libxl EMULATOR_XENSTORE_DATA", odd)), "libxl")


@pytest.mark.parametrize("rounds", [1, 3])
def test_shim_accepts_checkpointed_libxl_streams(rounds: int) -> None:
    """The original does not hand the stream back to libxc behind CHECKPOINT_END."""
    stream = pv_domain().to_checkpointed(rounds)
    accepted(bytes(stream), "libxl")
    accepted(bytes(wrap(Stream(), "xl")[0].data + bytes(stream)), "xl")
    rejected(bytes(stream.drop("libxl CHECKPOINT_END")), "libxl")


def test_shim_verbose_says_legacy_converted(streams: dict[str, Stream]) -> None:
    old = Stream(streams["libxl"])
    old.replace("domain header", WIRE.domain_header(major=0, minor=1))
    old.replace("libxl header", WIRE.libxl_header(options=2))
    ran = shim("-v", "-f", "libxl", stdin=bytes(old))
    assert ran.code == 0
    assert "Libxl Header: little endian, legacy converted" in ran.out
    assert "Domain Header: legacy converted x86 PV" in ran.out
