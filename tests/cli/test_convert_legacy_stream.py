"""``convert-legacy-stream``: the original's options, exit status and messages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.saved_files import piped, verify_file
from tests.support.writers.build import pv_domain_with_gdt
from tests.support.writers.legacy import hvm_stream as legacy_hvm
from tests.support.writers.legacy import pv_stream
from xenpv.cli.convert_legacy_stream import main as convert_legacy_stream

DOMAIN = pv_domain_with_gdt()


def test_convert_legacy_stream_on_descriptors_reads_no_byte_after_the_stream(tmp_path: Path) -> None:
    """libxl passes a pipe for each side; more data follows the stream in the input's."""
    data = bytes(pv_stream(DOMAIN))
    with piped(data + b"qemu's") as fd:
        out = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
        args = ["-i", str(fd), "-o", str(out), "-w", "64", "-g", "pv", "-f", "libxl"]
        rest = os.dup(fd)
        assert convert_legacy_stream(args) == 0
        assert os.read(rest, 99) == b"qemu's"
        os.close(rest)
        os.dup2(os.open(os.devnull, os.O_RDONLY), fd)  # the program has closed its descriptor
    assert verify_file(tmp_path / "out").rules == set()


def test_convert_legacy_stream_verbose_names_each_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    source.write_bytes(bytes(legacy_hvm()))
    args = ["-i", str(source), "-o", str(tmp_path / "out"), "-w", "64", "-g", "hvm"]
    assert convert_legacy_stream(args) == 0
    assert capsys.readouterr().out == ""
    assert convert_legacy_stream([*args, "-v"]) == 0
    printed = capsys.readouterr().out
    assert "HVM_CONTEXT" in printed
    assert "PAGE_DATA" in printed


def _fails(*args: object, **options: object) -> None:
    raise ZeroDivisionError


def test_convert_legacy_stream_exit_status_is_the_originals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_bytes(b"junk" * 99)
    args = ["-i", str(source), "-o", str(out), "-w", "64", "-g", "pv"]
    assert convert_legacy_stream(args) == 1
    assert "Stream Error:" in capsys.readouterr().err
    assert not out.exists()
    assert convert_legacy_stream(args[2:]) == 1
    assert "usage" in capsys.readouterr().err
    assert convert_legacy_stream(["-i", str(tmp_path / "gone"), *args[2:]]) == 1
    with pytest.raises(SystemExit) as e:
        convert_legacy_stream([*args[:5], "16", *args[6:]])
    assert e.value.code == 2
    source.write_bytes(bytes(pv_stream(DOMAIN)))
    monkeypatch.setattr("xenpv.cli.convert_legacy_stream.convert", _fails)
    assert convert_legacy_stream(args) == 2
    assert "Please fix me" in capsys.readouterr().err
