"""What reaches a terminal or a pipe: no control characters, no noise at a broken pipe, whole lines."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import xenpv
from tests.support.host_stub import HostStub, domain_info
from tests.support.writers.build import pv_domain
from tests.support.writers.envelopes import config_json
from xenpv.text import printable, size

HOSTILE = "\x1b]0;owned\x07\x1b[2Jname\u202egpj\r\x08\x7f\x9b31m"
COMMAND = [sys.executable, "-c", "from xenpv.cli.main import run; run()"]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    domain = pv_domain()
    domain.start_info["cmd_line"] = ("console=hvc0 " + HOSTILE).encode()
    file = tmp_path / "hostile.save"
    stream = domain.to_stream(config=config_json(name=HOSTILE, memory_kib=4 * len(domain.pages)) + b"\0\x1b[31m\0")
    file.write_bytes(bytes(stream))
    return file


@pytest.mark.parametrize(
    "args", [["show"], ["show", "-v"], ["show", "--json"], ["verify"], ["verify", "--json"], ["p2m"], ["p2m", "--json"]]
)
def test_control_characters_of_a_file_are_not_printed(hostile: Path, args: list[str]) -> None:
    ran = xenpv(*args, hostile)
    assert ran.code == 0
    printed = ran.out + ran.err
    assert not [c for c in printed if c != "\n" and not c.isprintable()]
    if args[0] == "show":
        assert "gpj" in printed


@pytest.mark.parametrize("ident", [b"\x1b[31mXYZ", b"\r\n\0\x07ABCD"])
def test_control_characters_of_a_header_are_not_printed(tmp_path: Path, ident: bytes) -> None:
    file = tmp_path / "hostile"
    file.write_bytes(bytes(pv_domain().to_stream().patch("libxl header", 0, ident)))
    for verb in ("show", "verify"):
        ran = xenpv(verb, file)
        assert ran.code == 1
        assert "expected LibxlFmt" in ran.out + ran.err
        assert not [c for c in ran.out + ran.err if c != "\n" and not c.isprintable()]


def test_hex_dump_has_no_control_characters(hostile: Path) -> None:
    ran = xenpv("read", "-p", hostile, 0x1000, 0x1000)
    assert ran.code == 0
    assert not [c for c in ran.out if c != "\n" and not c.isprintable()]


def test_printable_replaces_control_and_direction_characters() -> None:
    assert printable("Grüße, 世界") == "Grüße, 世界"
    assert printable("a\n\tb") == "a??b", "a name has one line"
    assert printable("a\n\tb\x07", keep="\n\t") == "a\n\tb?"
    assert printable("a\x1b[2J\x9b\u202eb\ud800") == "a?[2J??b?"


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (96 << 20, "96.0 MiB"), (3 << 40, "3.0 TiB")],
)
def test_size_is_rounded_to_one_digit_of_its_unit(n: int, text: str) -> None:
    assert size(n) == text


# --- pipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args", [["read", "-p", "FILE", "0", "400K"], ["verify", "--list-rules"], ["show", "-v", "FILE"]]
)
def test_broken_pipe_prints_no_error(good: Path, args: list[str]) -> None:
    args = [str(good) if arg == "FILE" else arg for arg in args]
    with subprocess.Popen([*COMMAND, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ran:
        assert ran.stdout is not None
        assert ran.stderr is not None
        ran.stdout.close()
        assert ran.stderr.read() == b""
        assert ran.wait(30) in {0, 1}


def test_python_m_xenpv_is_the_command(good: Path) -> None:
    ran = subprocess.run([sys.executable, "-m", "xenpv", "verify", "-q", good], capture_output=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"", b"")


def test_standard_input_is_read_from_its_position(tmp_path: Path, good: Path) -> None:
    """``(read header; xenpv verify -) < file``: the stream begins after what was read before."""
    file = tmp_path / "file"
    file.write_bytes(b"header\n" + good.read_bytes())
    with file.open("rb") as stdin:
        os.lseek(stdin.fileno(), 7, os.SEEK_SET)
        ran = subprocess.run([*COMMAND, "verify", "-"], stdin=stdin, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.startswith("standard input: ")


def test_raw_memory_on_a_terminal_is_refused(good: Path) -> None:
    master, slave = os.openpty()
    try:
        args = [*COMMAND, "read", "-p", "--raw", str(good), "0", "16"]
        ran = subprocess.run(args, stdout=slave, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(slave)
        os.close(master)
    assert ran.returncode == 1
    assert ran.stderr.startswith("xenpv: error: raw memory")


def test_pipe_gets_no_escape_sequences(good: Path, bad: Path) -> None:
    for args in (["show", "-v", good], ["verify", bad], ["p2m", "--frames", good]):
        assert "\x1b" not in xenpv(*args).out


def test_progress_bar_on_a_terminal_does_not_touch_standard_output(good: Path) -> None:
    master, slave = os.openpty()
    try:
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
        ran = subprocess.run([*COMMAND, "verify", good], stdout=subprocess.PIPE, stderr=slave, env=environment,
                             text=True, check=False)  # fmt: skip
    finally:
        os.close(slave)
        os.close(master)
    assert ran.returncode == 0
    assert ran.stdout.startswith(f"{good}: ")
    assert "\x1b" not in ran.stdout


MARKUP = ["[/x]", "[red]web", "[link=http://nowhere]web[/link]", "web\nxenpv: error: forged", "web\x1b[2J", "[bold"]


@pytest.mark.parametrize("name", MARKUP)
def test_list_prints_hostile_names_as_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One domain with such a name must not break the list of all, nor add a line to it."""
    host = HostStub(domain_info(1, "first"), domain_info(2, name), domain_info(3, "last"))
    monkeypatch.setattr("xenpv.cli.list.XenHost", lambda: host)
    ran = xenpv("list")
    assert ran.code == 0
    rows = [line for line in ran.out.splitlines() if line.strip()]
    assert [row.split()[0] for row in rows[-3:]] == ["1", "2", "3"]
    assert printable(name) in rows[-2]


@pytest.mark.parametrize("name", MARKUP)
def test_diff_prints_hostile_fields_as_text(name: str, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for file, called in ((one, "web"), (other, name)):
        domain = pv_domain()
        domain.start_info["cmd_line"] = called.encode()
        file.write_bytes(domain.to_bytes())
    ran = xenpv("diff", one, other)
    assert ran.code == 1
    assert printable(name) in ran.out


def test_error_with_a_hostile_path_stays_one_line(tmp_path: Path) -> None:
    """``xenpv verify $'x\\nweb7.save: should restore'`` must not print that line."""
    file = tmp_path / "x\nweb7.save: should restore\x1b[2J"
    for verb in ("verify", "show", "export"):
        ran = xenpv(verb, file, *([tmp_path / "out"] if verb == "export" else []))
        assert ran.code == 1
        assert len((ran.out + ran.err).splitlines()) == 1
        assert "\x1b" not in ran.err
    file.write_bytes(pv_domain().to_bytes())
    assert len(xenpv("verify", file).out.splitlines()) == 1


def test_broken_pipe_of_another_output_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a reader of standard output that has gone is no error worth a word."""

    def closes(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe", "unix:/run/peer")

    monkeypatch.setattr("xenpv.cli.list.XenHost", closes)
    ran = xenpv("list")
    assert ran.code == 1
    assert "unix:/run/peer" in ran.err
