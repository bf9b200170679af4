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
from tests.support.writers.build import pv_domain
from xenpv.errors import RequestError
from xenpv.io.atomic_output import Output
from xenpv.io.file_kind import FileKind, identify
from xenpv.save.save import save
from xenpv.stream.envelope import XL_MAGIC
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


@pytest.fixture(params=["unnamed", "named"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system with O_TMPFILE, and one without: open() answers EISDIR there, as old kernels do."""
    if request.param == "named":
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)
    return str(request.param)


def test_output_file_appears_when_complete(tmp_path: Path, file_system: str) -> None:
    path = tmp_path / "x.save"
    old = os.umask(0)
    try:
        with Output.open(str(path)) as out:
            out.write(BUFFERS)
            assert not path.exists()
            assert stat.S_IMODE(os.fstat(out.fd).st_mode) == 0o600, "it holds memory from the first byte"
            assert len(os.listdir(tmp_path)) == (file_system == "named")
    finally:
        os.umask(old)
    assert path.read_bytes() == WHOLE
    assert out.written == len(WHOLE)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["x.save"]


@pytest.mark.usefixtures("file_system")
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


def test_output_buffer_of_wide_items_survives_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """writev() counts bytes, len() of a memoryview counts items."""
    real, words = os.writev, memoryview(bytes(range(240))).cast("Q")
    monkeypatch.setattr(os, "writev", lambda fd, buffers: real(fd, [memoryview(buffers[0]).cast("B")[:3]]))
    with Output.open(str(tmp_path / "x")) as out:
        out.write([words])
    assert (tmp_path / "x").read_bytes() == bytes(range(240))


def test_output_abandoned_without_its_temporary_file_closes_the_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)
    out = Output.open(str(tmp_path / "x"))
    [temporary] = tmp_path.iterdir()
    temporary.unlink()
    out.abandon()
    assert out.fd == -1


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


@pytest.mark.usefixtures("file_system")
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


# --- what is not replaced --------------------------------------------------------------------------------------------


def aliases(path: Path) -> dict[str, Path]:
    """The names by which a file may be meant by a slip."""
    symlink, hard_link = path.with_suffix(".symlink"), path.with_suffix(".link")
    symlink.symlink_to(path)
    hard_link.hardlink_to(path)
    return {"itself": path, "symlink": symlink, "hard link": hard_link}


@pytest.mark.parametrize("alias", ["itself", "symlink", "hard link"])
@pytest.mark.parametrize("force", [False, True])
def test_output_that_is_an_input_is_refused(alias: str, force: bool, tmp_path: Path) -> None:
    path = tmp_path / "web.save"
    path.write_bytes(WHOLE)
    names = aliases(path)
    with path.open("rb") as file:
        for source in (str(path), file.fileno()):
            with pytest.raises(RequestError):
                Output.open(str(names[alias]), inputs=[source], force=force)
    assert path.read_bytes() == WHOLE
    assert len(os.listdir(tmp_path)) == 3


HEADS = {
    FileKind.SAVED_DOMAIN: XL_MAGIC,
    FileKind.CORE: b"\x7fELF\x02\x01\x01" + bytes(9) + b"\4\0",
    FileKind.KERNEL: b"\x7fELF\x02\x01\x01" + bytes(9) + b"\2\0",
    FileKind.KDUMP: b"KDUMP   ",
    FileKind.LIME: b"EMiL\1\0\0\0",
    FileKind.HTML: b"<!DOCTYPE html>",
    FileKind.SVG: b"<svg xmlns=",
    FileKind.OTHER: b"notes of last week",
}


@pytest.mark.parametrize("existing", HEADS)
@pytest.mark.parametrize("written", HEADS)
def test_output_replaces_its_own_kind_alone(written: FileKind, existing: FileKind, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(HEADS[existing])
    if written is existing:
        Output.open(str(path), replaces={written}).abandon()
        return
    with pytest.raises(RequestError):
        Output.open(str(path), replaces={written})
    assert path.read_bytes() == HEADS[existing]
    with Output.open(str(path), replaces={written}, force=True) as out:
        out.write(BUFFERS)
    assert path.read_bytes() == WHOLE


def test_identify_bz_image_is_a_kernel() -> None:
    assert identify(bytes(0x202) + b"HdrS") is FileKind.KERNEL


def test_output_empty_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.touch()
    with Output.open(str(path), replaces={FileKind.HTML}) as out:
        out.write(BUFFERS)
    assert path.read_bytes() == WHOLE


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")
@pytest.mark.parametrize("kind", ["fifo", "symlink"])
@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o755])
def test_output_of_another_user_in_an_open_folder_is_refused(kind: str, mode: int, tmp_path: Path) -> None:
    """A guest's memory must not go through somebody else's pipe, nor to where somebody else's link points."""
    folder, target = tmp_path / "folder", tmp_path / "target"
    folder.mkdir()
    path = folder / "web.save"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(target)
    os.lchown(path, 12345, 12345)
    folder.chmod(mode)
    if mode == 0o755 and kind == "symlink":
        with Output.open(str(path)) as out:
            out.write(BUFFERS)
        assert target.read_bytes() == WHOLE
    elif mode != 0o755:
        with pytest.raises(RequestError):
            Output.open(str(path))
        assert not target.exists()


STALLED = """
import os, sys
if sys.argv[1] == "named":
    os.O_TMPFILE = os.O_DIRECTORY
from xenpv.cli.main import run
sys.argv[1:] = ["convert", "-", sys.argv[2]]
run()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL])
@pytest.mark.parametrize("place", ["unnamed", "named"])
def test_output_of_a_stopped_verb_leaves_nothing(number: signal.Signals, place: str, tmp_path: Path) -> None:
    """Not even SIGKILL leaves anything where the file system has O_TMPFILE."""
    stream, path = pv_domain(pfns=range(64)).to_bytes("libxl"), tmp_path / "out.save"
    command = [sys.executable, "-c", STALLED, place, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(stream[:-200])
        process.stdin.flush()
        while not opened_in(process.pid, tmp_path):
            assert process.poll() is None
        process.send_signal(number)
        process.wait(20)
    leaves_a_part = number is signal.SIGKILL and place == "named"
    assert process.returncode == (-9 if number is signal.SIGKILL else 130)
    assert len(os.listdir(tmp_path)) == leaves_a_part


def opened_in(pid: int, folder: Path) -> bool:
    """Whether a process has a file of the folder open."""
    links = Path(f"/proc/{pid}/fd")
    return any(str(folder) in os.readlink(link) for link in links.iterdir())
