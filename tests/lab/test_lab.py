"""The lab itself: what every other test on real Xen relies on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Protocol

import pytest

import lab
from lab import guests
from lab.__main__ import LOST, main


class Closable(Protocol):
    def close(self) -> None: ...


def test_boots_that_version_of_xen(host: lab.Host) -> None:
    info = host.run("xl info").check().text
    assert re.search(rf"^xen_version +: {re.escape(host.xen)}\.", info, re.MULTILINE)


def test_python_of_dom0_has_what_the_project_needs(host: lab.Host) -> None:
    host.run("python3 -c 'import sys; assert sys.version_info >= (3, 11)'").check()
    host.run("python3 -c 'import numpy, click, rich, elftools, zstandard, lz4.frame, pytest'").check()


def test_the_project_is_importable_in_dom0(host: lab.Host) -> None:
    shown = host.run("python3 -c 'import xenpv; print(xenpv.__file__)'").check().text
    assert shown == "/xenpv/src/xenpv/__init__.py\n"


def test_the_checkout_is_safe_from_jobs(host: lab.Host) -> None:
    host.run("echo scribble > /xenpv/scribble && rm -r /xenpv/docs").check()
    checkout = Path(lab.__file__).parent.parent
    assert not (checkout / "scribble").exists()
    assert (checkout / "docs").is_dir()


def test_a_job_gives_status_outputs_and_files(host: lab.Host) -> None:
    result = host.run(r"printf '\000\377'; echo oops >&2; echo kept > file; pwd > where; exit 7")
    assert result.status == 7
    assert result.stdout == b"\0\xff"
    assert result.stderr == b"oops\n"
    assert (result.outputs / "file").read_text() == "kept\n"
    assert host.get((result.outputs / "where").read_text().strip()) == result.outputs
    with pytest.raises(lab.JobFailed, match=r"(?s)ended with 7.*oops"):
        result.check()


def test_a_job_that_a_signal_ends_has_a_shells_status(host: lab.Host) -> None:
    assert host.run("kill -SEGV $$").status == 128 + signal.SIGSEGV


def test_files_go_in_and_environment_too(host: lab.Host, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_bytes(bytes(range(256)) * 4096)
    there = host.put(source)
    result = host.run('cmp "$THERE" /share/in && cp "$THERE" out', env={"THERE": there}).check()
    assert (result.outputs / "out").read_bytes() == source.read_bytes()


def test_jobs_run_side_by_side(host: lab.Host) -> None:
    waiting = host.start("until [ -e /tmp/go ]; do sleep 0.1; done; rm /tmp/go")
    assert not waiting.done()
    host.run("touch /tmp/go").check()
    assert waiting.wait().status == 0


def test_a_job_that_hangs_is_killed_and_the_vm_lives(host: lab.Host) -> None:
    with pytest.raises(lab.JobTimeout, match=r"(?s)killed after 1 s.*begun") as caught:
        host.run("echo begun; sleep 1234 & sleep 1234", timeout=1)
    assert caught.value.result.status == 128 + signal.SIGTERM
    assert host.run("pgrep -f 'sleep 1234'").status == 1


def test_answers_come_promptly(host: lab.Host) -> None:
    delays = []
    for _ in range(5):
        started = time.monotonic()
        result = host.run("true")
        delays.append(time.monotonic() - started - result.seconds)
    assert min(delays) < 0.1


def test_debian_guest_runs_and_survives_save_and_restore(host: lab.Host) -> None:
    config = host.write("debian.cfg", guests.config("debian"))
    host.run(f"xl create {config}").check()
    host.wait_for_guest("debian", guests.UP)
    at = host.wait_for_guest("debian", f"{guests.BEAT} 1")
    assert re.search(r"symbol ffffffff8[0-9a-f]{7} linux_banner$", host.guest_console("debian"), re.MULTILINE)
    host.run("xl save debian /tmp/debian.save && xl restore /tmp/debian.save && rm /tmp/debian.save").check()
    length = len(host.guest_console("debian"))
    host.wait_for_guest("debian", guests.BEAT, after=max(at, length))
    beats = [int(beat) for beat in re.findall(rf"{guests.BEAT} (\d+)\n", host.guest_console("debian"))]
    assert beats == list(range(len(beats))), "the guest went on where it was"
    assert guests.UP not in host.guest_console("debian")[at:]


@pytest.mark.deep_elsewhere
def test_debian_guest_runs_with_two_vcpus_and_more_memory(host: lab.Host) -> None:
    config = host.write("two.cfg", guests.config("two", memory=128, vcpus=2))
    host.run(f"xl create {config}").check()
    host.wait_for_guest("two", guests.UP)
    assert re.search(r"^two +\d+ +128 +2 ", host.run("xl list").check().text, re.MULTILINE)


def test_a_port_of_dom0_is_reachable_and_a_killed_vm_is_lost(hosts: Closable) -> None:
    hosts.close()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    with lab.Host("4.17", listen=(port,)) as host:
        serving = host.start(f"python3 -m http.server {port}")
        deadline = time.monotonic() + 60
        answer = b""
        while not answer and time.monotonic() < deadline:
            # QEMU takes the connection whether or not dom0 listens already, and then resets it.
            with (
                contextlib.suppress(ConnectionError),
                socket.create_connection(("127.0.0.1", port)) as connection,
            ):
                connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
                answer = connection.recv(100)
        assert answer.startswith(b"HTTP/1.0 200")

        os.kill(host.pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(lab.LostVM, match=r"(?s)QEMU ended with -9.*\(XEN\)") as caught:
            serving.wait()
        assert time.monotonic() - started < 2
        assert "about to get started" in caught.value.console
        with pytest.raises(lab.LostVM):
            host.run("true")


def test_run_tells_a_crash_of_dom0_from_a_status(
    hosts: Closable, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hosts.close()
    crash = "echo before; echo kept > file; sync; sleep 1; echo c > /proc/sysrq-trigger"
    started = time.monotonic()
    assert main(["run", "--out", str(tmp_path), "--timeout", "100", "--", crash]) == LOST
    assert time.monotonic() - started < 100, "noticed, not waited for"
    out, err = capfd.readouterr()
    assert out == "before\n"
    assert "is lost: Kernel panic - not syncing" in err
    assert "| (XEN) " in err
    assert (tmp_path / "file").read_text() == "kept\n"


def test_headers_and_peer_tools_are_for_this_machine(tmp_path: Path) -> None:
    for version in lab.SUPPORTED:
        assert "struct vcpu_guest_context" in (lab.headers(version.xen) / "xen/arch-x86/xen.h").read_text()
    bad = tmp_path / "bad"
    bad.write_bytes(bytes(64))
    done = lab.peer_tools("4.17").run("verify-stream-v2", "-i", str(bad))
    assert done.returncode == 1
    assert "Error" in done.stderr or "Error" in done.stdout
