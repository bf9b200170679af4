"""How a domain reaches another host: ssh, a socket, or two descriptors that are given. Bytes both ways, no meaning."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import select
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from xenpv.errors import RequestError
from xenpv.io.atomic_output import Output
from xenpv.io.stream_input import Input
from xenpv.stream.fields import Buffer

PATIENCE = 120.0  # seconds in which the other side has to do something
SSH = ("ssh",)
RECEIVER = ("xenpv", "receive")
_DRAIN = 5.0  # seconds, for what the other side has on its way when it has been told no
_SCHEMES = ("tcp:", "unix:", "fd:")


class Link:
    """Two descriptors to another host, or one that is both. ``name`` is for people.

    As a context: closed when its block ends, and whatever was started for it has ended then. What reads or writes
    raises OSError (ECONNRESET, EPIPE, ETIMEDOUT and their like), which names it.
    """

    def __init__(
        self,
        reading: int,
        writing: int,
        name: str,
        *,
        patience: float = PATIENCE,
        process: subprocess.Popen[bytes] | None = None,
    ) -> None:
        self.reading = reading
        self.name = name
        self.patience = patience
        self._writing = writing
        self._process = process
        self._out = _Patient(writing, name, patience)
        os.set_blocking(writing, False)  # or a write that nobody takes would never come back

    @classmethod
    def of_socket(cls, one: socket.socket, name: str, *, patience: float = PATIENCE) -> Self:
        """A connected socket, whose descriptor is the link's from here on."""
        if one.family in {socket.AF_INET, socket.AF_INET6}:
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # words are small, and each is waited for
            one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        one.setblocking(True)
        fd = one.detach()
        return cls(fd, fd, name, patience=patience)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it; again does no harm. A program that was started for it has some seconds to end by itself."""
        fds, self.reading, self._writing = {self.reading, self._writing}, -1, -1
        for fd in fds - {-1}:
            os.close(fd)
        self._out.fd = -1
        if self._process is not None:
            try:
                self._process.wait(_DRAIN)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def write(self, buffers: Sequence[Buffer]) -> None:
        """All of the buffers, in order; ETIMEDOUT when the other side takes none for as long as patience lasts."""
        self._out.write(buffers)

    @property
    def written(self) -> int:
        """Bytes that have left this side."""
        return self._out.written

    def waits(self, seconds: float = 0.0) -> bool:
        """Whether there is something to read, or the other side has closed: now, or within so many seconds."""
        return bool(_poll(self.reading, select.POLLIN, seconds))

    def read(self, count: int) -> bytes:
        """Exactly so many bytes. ECONNRESET when the other side has closed, ETIMEDOUT when it sends none."""
        data = b""
        while len(data) < count:
            if not self.waits(self.patience):
                raise OSError(errno.ETIMEDOUT, f"nothing was heard for {self.patience:g} s", self.name)
            try:
                more = os.read(self.reading, count - len(data))
            except BlockingIOError:  # one descriptor for both ways, and somebody else was quicker
                continue
            except OSError as e:
                raise OSError(e.errno or errno.EIO, e.strerror, self.name) from e
            if not more:
                raise OSError(errno.ECONNRESET, self._why_closed(), self.name)
            data += more
        return data

    def input(self) -> Input:
        """What comes next, as a stream that a reader is driven over, up to its end exactly."""
        return _PatientInput(os.dup(self.reading), self.name, self.patience)

    def drain(self) -> None:
        """Take in what the other side still sends, for a while: closing a socket at once would cut off what it was
        told last.
        """
        deadline = time.monotonic() + _DRAIN
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._writing)) as one:
            one.shutdown(socket.SHUT_WR)  # "it is all said"; a pipe is no socket, and needs none of this
        with contextlib.suppress(OSError):
            while (left := deadline - time.monotonic()) > 0 and self.waits(left):
                with contextlib.suppress(BlockingIOError):
                    if not os.read(self.reading, 1 << 20):
                        return

    def _why_closed(self) -> str:
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
            if self._process.returncode:
                return f"what led to it ended with status {self._process.returncode}"
        return "the other side has closed the connection"


class _Patient(Output):
    """An output whose reader may be gone without a word."""

    def __init__(self, fd: int, name: str, patience: float) -> None:
        super().__init__(fd, name)
        self._patience = patience

    def wait(self) -> None:
        if not _poll(self.fd, select.POLLOUT, self._patience):
            raise OSError(errno.ETIMEDOUT, f"nothing was taken for {self._patience:g} s", self.name)


class _PatientInput(Input):
    """An input whose writer may be gone without a word."""

    def __init__(self, fd: int, name: str, patience: float) -> None:
        super().__init__(fd, name, exact=True)
        self._patience = patience

    def wait(self) -> None:
        if not _poll(self.fd, select.POLLIN, self._patience):
            raise OSError(errno.ETIMEDOUT, f"nothing was heard for {self._patience:g} s", self.name)


def _poll(fd: int, what: int, seconds: float) -> list[tuple[int, int]]:
    poll = select.poll()
    poll.register(fd, what)
    return poll.poll(seconds * 1000)


# --- where to --------------------------------------------------------------------------------------------------------


def connect(
    where: str, *, ssh: Sequence[str] = SSH, receiver: Sequence[str] = RECEIVER, patience: float = PATIENCE
) -> Link:
    """A link to ``where``: ``tcp:HOST:PORT``, ``unix:PATH``, ``fd:N`` or ``fd:IN,OUT``; else a host that ``ssh``
    reaches, and on which it starts ``receiver``.

    Raises RequestError for what is none of these, and OSError when nobody is there.
    """
    if where.startswith("tcp:"):
        host, port = _address(where)
        try:
            one = socket.create_connection((host, port), timeout=patience)
        except OSError as e:
            raise OSError(e.errno or errno.EHOSTUNREACH, e.strerror or str(e), where) from e
        return Link.of_socket(one, where, patience=patience)
    if where.startswith("unix:"):
        one = socket.socket(socket.AF_UNIX)
        try:
            one.connect(where.removeprefix("unix:"))
        except OSError as e:
            one.close()
            raise OSError(e.errno or errno.EIO, e.strerror or str(e), where) from e
        return Link.of_socket(one, where, patience=patience)
    if where.startswith("fd:"):
        reading, writing = _descriptors(where)
        return Link(reading, writing, where, patience=patience)
    return _by_ssh(where, ssh, receiver, patience)


def _by_ssh(host: str, ssh: Sequence[str], receiver: Sequence[str], patience: float) -> Link:
    if not host or host.startswith("-"):
        raise RequestError(f"{host!r} is no host")  # ssh would take it for an option
    # What follows the host is one word to ssh, which the other side's shell reads.
    words = [*ssh, host, shlex.join(receiver)]
    try:
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    except OSError as e:
        raise RequestError(f"{words[0]}: {e.strerror}") from e
    assert process.stdin is not None
    assert process.stdout is not None
    reading, writing = os.dup(process.stdout.fileno()), os.dup(process.stdin.fileno())
    process.stdin.close()
    process.stdout.close()
    return Link(reading, writing, host, patience=patience, process=process)


@contextmanager
def listening(where: str, *, anywhere: bool = False) -> Iterator[socket.socket]:
    """A socket at ``unix:PATH``, which only its owner may connect to, or ``tcp:ADDRESS:PORT``.

    RequestError for an address that others than this machine reach, unless ``anywhere``: nothing is encrypted, and
    whoever connects is believed. OSError when it cannot be had.
    """
    if where.startswith("unix:"):
        path = Path(where.removeprefix("unix:"))
        one = socket.socket(socket.AF_UNIX)
        before = os.umask(0o177)
        try:
            one.bind(str(path))
        except OSError as e:
            one.close()
            raise OSError(e.errno or errno.EIO, e.strerror or str(e), where) from e
        finally:
            os.umask(before)
        with one:
            try:
                one.listen(1)
                yield one
            finally:
                path.unlink(missing_ok=True)
        return
    if not where.startswith("tcp:"):
        raise RequestError(f"{where!r}: listen at unix:PATH or tcp:ADDRESS:PORT")
    host, port = _address(where)
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as e:
        raise RequestError(f"{where}: {e.strerror or e}") from e
    if not anywhere and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        what = (
            f"{where}: others than this machine would reach it, and a guest's memory would cross the network as it is"
        )
        raise RequestError(f"{what}; go through ssh, or say --anywhere")
    with socket.socket(family, kind) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(address)
            one.listen(1)
        except OSError as e:
            raise OSError(e.errno or errno.EIO, e.strerror, where) from e
        yield one


def accept(listener: socket.socket, where: str, *, patience: float = PATIENCE) -> Link:
    """The link to the first that connects; waits for it as long as it takes."""
    one, peer = listener.accept()
    name = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else where
    return Link.of_socket(one, name, patience=patience)


def standard(*, patience: float = PATIENCE) -> Link:
    """Standard input and output as a link; what is printed from here on goes to standard error."""
    reading, writing = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    return Link(reading, writing, "standard input", patience=patience)


def _address(where: str) -> tuple[str, int]:
    host, _, port = where.removeprefix("tcp:").rpartition(":")
    if not host or not port.isdecimal() or int(port) > 0xFFFF:
        raise RequestError(f"{where!r}: say tcp:HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _descriptors(where: str) -> tuple[int, int]:
    words = where.removeprefix("fd:").split(",")
    if not 1 <= len(words) <= 2 or not all(word.isdecimal() for word in words):
        raise RequestError(f"{where!r}: say fd:N for a socket, fd:IN,OUT for two pipes")
    reading, writing = int(words[0]), int(words[-1])
    for fd in (reading, writing):
        try:
            os.fstat(fd)
        except (OSError, OverflowError) as e:
            raise RequestError(f"{where}: descriptor {fd} is not open") from e
    return reading, writing
