"""Output: a file that appears complete or not at all."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.saving import MemorySink, suspended
from xenpv.errors import RequestError
from xenpv.io.atomic_output import Output
from xenpv.save.save import save
from xenpv.stream.fields import Buffer

BUFFERS: list[Buffer] = [b"one", b"", memoryview(b"two"), bytearray(b"three"), b"4" * 10_000]
WHOLE = b"".join(BUFFERS)


def failing(monkeypatch: pytest.MonkeyPatch, no: int, after: int) -> None:
    """A disk that takes so many bytes and no more."""
    real, room = os.writev, [after]

    def writev(fd: int, buffers: Sequence[Any]) -> int:
        if room[0] <= 0:
            raise OSError(no, os.strerror(no))
        n = real(fd, [memoryview(buffers[0])[: room[0]]])
        room[0] -= n
        return n

    monkeypatch.setattr(os, "writev", writev)


def test_output_file_appears_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "x.save"
    old = os.umask(0)
    try:
        with Output.open(str(path)) as out:
            out.write(BUFFERS)
            assert not path.exists()
            (temporary,) = tmp_path.iterdir()
            assert stat.S_IMODE(temporary.stat().st_mode) == 0o600, "it holds memory from the first byte"
    finally:
        os.umask(old)
    assert path.read_bytes() == WHOLE
    assert out.written == len(WHOLE)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["x.save"]


def test_output_existing_file_stays_until_complete(tmp_path: Path) -> None:
    path = tmp_path / "x.save"
    path.write_bytes(b"before")
    out = Output.open(str(path))
    out.write(BUFFERS)
    out.__exit__(ValueError, ValueError(), None)
    assert path.read_bytes() == b"before"
    with Output.open(str(path)) as out:
        out.write(BUFFERS)
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == WHOLE
    assert os.listdir(tmp_path) == ["x.save"]


def test_output_symbolic_link_replaces_its_target(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "real", tmp_path / "link"
    target.write_bytes(b"before")
    link.symlink_to(target)
    with Output.open(str(link)) as out:
        out.write(BUFFERS)
    assert link.is_symlink()
    assert target.read_bytes() == WHOLE


@pytest.mark.parametrize("most", [1, 2, 3, 7, 4096])
def test_output_short_writes_are_continued(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.writev

    def writev(fd: int, buffers: Sequence[Any]) -> int:
        room, parts = most, []
        for buffer in buffers:
            parts.append(memoryview(buffer)[:room])
            room -= len(parts[-1])
            if not room:
                break
        return real(fd, parts)

    monkeypatch.setattr(os, "writev", writev)
    with Output.open(str(tmp_path / "x")) as out:
        out.write(BUFFERS)
    assert (tmp_path / "x").read_bytes() == WHOLE


def test_output_efault_falls_back_to_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that says EFAULT to pages of another domain, which are all but what is bytes here, some way in."""
    real, calls = os.writev, []

    def writev(fd: int, buffers: Sequence[Any]) -> int:
        calls.append(sum(map(len, buffers)))
        for i, buffer in enumerate(buffers):
            if not isinstance(memoryview(buffer).obj, bytes):
                if i == 0:
                    raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
                return real(fd, buffers[:i])
        return real(fd, [memoryview(buffers[0])[: 3 << 18], *buffers[1:]])

    monkeypatch.setattr(os, "writev", writev)
    foreign: list[Buffer] = [b"head", bytearray(b"A" * 5_000_000), b"", bytearray(b"B" * 10), b"tail"]
    with Output.open(str(tmp_path / "x")) as out:
        out.write(foreign)
        assert out.copies
        out.write(foreign)
    assert (tmp_path / "x").read_bytes() == b"".join(foreign) * 2
    assert out.written == 2 * len(b"".join(foreign))
    assert max(calls[2:]) <= 1 << 20, "copied a piece at a time"


def test_output_unmapped_memory_raises_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def writev(*_: Any) -> int:
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))

    monkeypatch.setattr(os, "writev", writev)
    with pytest.raises(OSError, match=os.strerror(errno.EFAULT)) as e, Output.open(str(tmp_path / "x")) as out:
        out.write(BUFFERS)
    assert e.value.errno == errno.EFAULT
    assert os.listdir(tmp_path) == []


def test_output_more_buffers_than_iov_max(tmp_path: Path) -> None:
    many: list[Buffer] = [bytes([i % 251]) for i in range(5000)]
    with Output.open(str(tmp_path / "x")) as out:
        out.write(many)
    assert (tmp_path / "x").read_bytes() == b"".join(many)


@pytest.mark.parametrize("after", [0, 1, 100_000, 16_000_000])
def test_output_full_disk_leaves_no_file(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = suspended("linear")
    failing(monkeypatch, errno.ENOSPC, after)
    path = tmp_path / "x.save"
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as e, Output.open(str(path)) as out:
        save(guest.host, guest.domid, out)
    assert (e.value.errno, e.value.filename) == (errno.ENOSPC, str(path))
    assert os.listdir(tmp_path) == []
    assert guest.host.info(guest.domid).shutdown, "the domain is as it was"


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_output_failing_finish_leaves_no_file(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)) as e, Output.open(str(tmp_path / "x")) as out:
        out.write(BUFFERS)
    assert e.value.errno == errno.EIO
    assert os.listdir(tmp_path) == []
    out.abandon()
    assert out.fd == -1


def test_output_full_device_raises_enospc() -> None:
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as e, Output.open("/dev/full") as out:
        out.write(BUFFERS)
    assert (e.value.errno, e.value.filename) == (errno.ENOSPC, "/dev/full")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    yield path
    assert stat.S_ISFIFO(path.stat().st_mode)


def reading(path: Path, into: bytearray) -> threading.Thread:
    def run() -> None:
        with path.open("rb", buffering=0) as file:
            while data := file.read(997):
                into.extend(data)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_output_pipe_survives_signals(fifo: Path) -> None:
    guest, expected, got = suspended("linear"), MemorySink(), bytearray()
    save(guest.host, guest.domid, expected)
    thread, ticks = reading(fifo, got), list[int]()
    old = signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        with Output.open(str(fifo)) as out:
            save(guest.host, guest.domid, out)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        thread.join(10)
    assert len(ticks) > 3
    assert got == expected.data


def test_output_nonblocking_pipe_waits(fifo: Path) -> None:
    got = bytearray()
    thread = reading(fifo, got)
    with Output.open(str(fifo)) as out:
        os.set_blocking(out.fd, False)
        out.write([bytes(1 << 20), b"end"])
    thread.join(10)
    assert got == bytes(1 << 20) + b"end"


def test_output_closed_pipe_raises_epipe() -> None:
    ours, theirs = os.pipe()
    out = Output(theirs, "pipe")
    os.close(ours)
    with pytest.raises(BrokenPipeError) as e, out:
        out.write(BUFFERS)
    assert e.value.filename == "pipe"
    assert out.fd == -1


def test_output_dash_is_standard_output() -> None:
    code = (
        "from xenpv.io.atomic_output import Output\n"
        "with Output.open('-') as out: out.write([b'x' * 5, b'y'])\n"
        "print('z')"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert process.stdout == b"xxxxxyz\n", "and it is left open"


def test_output_unopenable_path_is_refused(tmp_path: Path) -> None:
    for path, number in ((tmp_path / "nowhere" / "x", errno.ENOENT), (tmp_path, errno.EISDIR)):
        with pytest.raises(RequestError) as e:
            Output.open(str(path))
        assert str(path) in str(e.value)
        assert isinstance(e.value.__cause__, OSError)
        assert e.value.__cause__.errno == number
    assert os.listdir(tmp_path) == []
