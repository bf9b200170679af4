"""Links to another host: what arrives, what is refused, and that nobody waits for ever."""

from __future__ import annotations

import errno
import itertools
import os
import re
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from xenpv.errors import RequestError
from xenpv.migrate import transport
from xenpv.migrate.transport import STREAM_BYTES_MIN, Link, accept, connect, listening

ECHO = "import os, sys\nwhile data := os.read(0, 1 << 16): os.write(1, data)"


def pair(idle_timeout: float = 5.0) -> tuple[Link, Link]:
    one, other = socket.socketpair()
    return Link.of_socket(one, "here", idle_timeout=idle_timeout), Link.of_socket(
        other, "there", idle_timeout=idle_timeout
    )


def test_link_transfers_bytes_both_ways() -> None:
    here, there = pair()
    with here, there:
        here.write([b"one", b"two"])
        assert (there.read(4), there.read(2)) == (b"onet", b"wo")
        there.write([b"three"])
        assert here.is_readable(1.0)
        assert here.read(5) == b"three"
        assert not here.is_readable()
        assert (here.written, there.written) == (6, 5)


def test_link_transfers_more_than_a_socket_buffer() -> None:
    here, there = pair()
    data = os.urandom(8 << 20)
    with here, there:
        writer = threading.Thread(target=lambda: here.write([data]))
        writer.start()
        assert there.read(len(data)) == data
        writer.join()


def test_link_closed_by_peer_names_the_peer() -> None:
    here, there = pair()
    with here:
        there.close()
        with pytest.raises(ConnectionResetError) as e:
            here.read(1)
        assert (e.value.errno, e.value.filename) == (errno.ECONNRESET, "here")
        with pytest.raises(BrokenPipeError) as broken:
            here.write([b"x"])
        assert broken.value.filename == "here"


def test_link_idle_peer_times_out() -> None:
    here, there = pair(0.05)
    with here, there:
        source = here.input()
        for blocked in (
            lambda: here.read(1),
            lambda: here.write([bytes(64 << 20)]),
            lambda: source.read_into(memoryview(bytearray(1))),
        ):
            with pytest.raises(TimeoutError, match=r"\b0\.05\b") as e:
                blocked()
            assert e.value.errno == errno.ETIMEDOUT
        source.close()


def test_link_drain_delivers_the_last_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_DRAIN_TIMEOUT", 2.0)
    with listening("tcp:127.0.0.1:0") as listener:
        port = listener.getsockname()[1]
        here = connect(f"tcp:127.0.0.1:{port}", idle_timeout=5.0)
        there = accept(listener, "tcp")
    here.write([bytes(100_000)])  # never read: closing would reset the connection, and take the last words along
    there.write([b"no"])

    def close() -> None:
        there.drain()
        there.close()

    closer = threading.Thread(target=close)
    closer.start()
    with here:
        assert here.read(2) == b"no"
        with pytest.raises(ConnectionResetError):
            here.read(1)
    closer.join()


def test_listening_unix_socket_is_private_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "link"
    with listening(f"unix:{path}") as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with connect(f"unix:{path}") as here, accept(listener, str(path)) as there:
            here.write([b"x"])
            assert there.read(1) == b"x"
        with pytest.raises(OSError, match=rf"\b{errno.EADDRINUSE}\b"), listening(f"unix:{path}"):
            pass
    assert not path.exists()


@pytest.mark.parametrize("where", ["tcp:127.0.0.1:0", "tcp:[::1]:0", "tcp:localhost:0"])
def test_listening_loopback_is_allowed(where: str) -> None:
    if "::1" in where and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 on this machine")
    with listening(where) as listener:
        port = listener.getsockname()[1]
        with connect(where.removesuffix("0") + str(port)) as here, accept(listener, where) as there:
            there.write([b"x"])
            assert here.read(1) == b"x"


@pytest.mark.parametrize("where", ["tcp:0.0.0.0:0", "tcp:[::]:0"])
def test_listening_public_address_needs_anywhere(where: str) -> None:
    with pytest.raises(RequestError, match="--anywhere"), listening(where):
        pass
    if where.startswith("tcp:0") or socket.has_dualstack_ipv6():
        with listening(where, anywhere=True):
            pass


@pytest.mark.parametrize(
    "where",
    ["tcp:7000", "tcp:host:", "tcp:host:99999", "tcp::7000", "fd:x", "fd:1,2,3", "fd:987", "fd:٣", "tcp:host:٣"],
)
def test_connect_invalid_address_is_refused(where: str) -> None:
    with pytest.raises(RequestError, match=re.escape(where.rpartition(",")[2])):
        connect(where)


@pytest.mark.parametrize("where", ["web", "ssh:web", "tcp:web"])
def test_listening_invalid_address_is_refused(where: str) -> None:
    with pytest.raises(RequestError, match=where), listening(where):
        pass


def test_connect_without_listener_raises_os_error(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp:127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ConnectionRefusedError) as e:
            connect(address)
    assert e.value.filename == address
    with pytest.raises(FileNotFoundError):
        connect(f"unix:{tmp_path}/none")


def test_connect_by_descriptors_transfers_bytes() -> None:
    one, other = socket.socketpair()
    with connect(f"fd:{one.detach()}") as here, Link.of_socket(other, "there") as there:
        here.write([b"x"])
        assert there.read(1) == b"x"
    reading, out = os.pipe()
    into, writing = os.pipe()
    with connect(f"fd:{reading},{writing}") as here:
        os.write(out, b"y")
        assert here.read(1) == b"y"
        here.write([b"z"])
        assert os.read(into, 1) == b"z"
    os.close(out)
    os.close(into)


def test_link_over_descriptors_leaves_them_as_blocking_as_they_were() -> None:
    """O_NONBLOCK belongs to the open file, which a shell may share: its next write would fail with EAGAIN."""
    reading, writing = os.pipe()
    with connect(f"fd:{os.dup(reading)},{os.dup(writing)}") as link:
        assert not os.get_blocking(writing)
        assert link.written == 0
    assert os.get_blocking(writing)
    os.close(reading)
    os.close(writing)


def test_connect_by_ssh_quotes_the_remote_command(tmp_path: Path) -> None:
    """The host is one word whatever is in it; what runs there is one word to ssh, quoted for the other side's shell."""
    arguments = tmp_path / "arguments"
    program = tmp_path / "ssh"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nopen({str(arguments)!r}, 'w').write(repr(sys.argv[1:]))\n{ECHO}\n"
    )
    program.chmod(0o755)
    words = [str(program), "-o", "A=b c"]
    with connect("web; touch x", ssh=words, receiver=["xenpv", "receive", "a b;c"]) as link:
        link.write([b"hello"])
        assert link.read(5) == b"hello"
    assert arguments.read_text() == repr(["-o", "A=b c", "web; touch x", "xenpv receive 'a b;c'"])


@pytest.mark.parametrize("host", ["-oProxyCommand=touch x", ""])
def test_connect_host_like_an_option_is_refused(host: str) -> None:
    with pytest.raises(RequestError, match=re.escape(repr(host))):
        connect(host, ssh=["false"])


def test_connect_failing_ssh_names_its_status() -> None:
    failing = [sys.executable, "-c", "raise SystemExit(255)"]
    with connect("web", ssh=failing) as link, pytest.raises(ConnectionResetError, match=r"\b255\b"):
        link.read(1)
    with pytest.raises(RequestError, match="/no/such/ssh"):
        connect("web", ssh=["/no/such/ssh"])


def test_link_close_ends_a_lingering_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_DRAIN_TIMEOUT", 0.1)
    link = connect("web", ssh=[sys.executable, "-c", "import time; time.sleep(60)"])
    process = link._process
    assert process is not None
    link.close()
    link.close()
    assert process.returncode is not None


def test_standard_streams_keeps_prints_off_the_link() -> None:
    code = "from xenpv.migrate.transport import standard_streams\n"
    code += "link = standard_streams()\nprint('noise')\nlink.write([link.read(2)])"
    ran = subprocess.run([sys.executable, "-c", code], input=b"hi", capture_output=True, check=True)
    assert (ran.stdout, ran.stderr) == (b"hi", b"noise\n")


# --- a peer that sends a byte now and then ----------------------------------------------------------------------------


def trickle(fd: int, data: bytes, pause: float, stop: threading.Event) -> threading.Thread:
    """Send a byte at a time, until the reader has gone."""

    def send() -> None:
        for byte in itertools.cycle(data):
            if stop.wait(pause):
                return
            try:
                os.write(fd, bytes([byte]))
            except OSError:
                return

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_read_of_a_message_has_one_deadline_for_all_of_it() -> None:
    stop = threading.Event()
    here, there = pair(0.2)
    with here, there:
        thread = trickle(there._write_fd, b"x", 0.02, stop)
        with pytest.raises(TimeoutError) as e:
            here.read(1000)
        stop.set()
        thread.join()
    assert e.value.errno == errno.ETIMEDOUT
    assert "of 1000 bytes" in str(e.value)


@pytest.mark.parametrize("paged", [False, True], ids=["records", "page content"])
def test_stream_that_trickles_times_out(paged: bool) -> None:
    """It sends something all the time, and never as much as a stream has to."""
    stop = threading.Event()
    here, there = pair(0.2)
    with here, there:
        thread = trickle(there._write_fd, b"x", 0.01, stop)
        source = here.input()

        def read_all() -> None:
            received = 0
            while received < 10_000:
                if paged:
                    source.read_into(memoryview(bytearray(16)))
                    received += 16
                else:
                    received += len(source.read(16))

        with pytest.raises(TimeoutError) as e:
            read_all()
        stop.set()
        thread.join()
        source.close()
    assert e.value.errno == errno.ETIMEDOUT
    assert str(STREAM_BYTES_MIN) in str(e.value)


def test_stream_that_is_fast_enough_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "STREAM_BYTES_MIN", 5)
    stop = threading.Event()
    here, there = pair(0.2)
    with here, there:
        thread = trickle(there._write_fd, b"x", 0.01, stop)
        source = here.input()
        for _ in range(60):  # some three periods
            assert source.read(1) == b"x"
        stop.set()
        thread.join()
        source.close()
