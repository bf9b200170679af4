"""Connections to another host: by ssh, by a socket, or by two given descriptors.

Bytes both ways, without a meaning.
"""

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

IDLE_TIMEOUT = 120.0  # seconds in which the peer has to send or to accept something
SSH = ("ssh",)
RECEIVER = ("xenpv", "receive")
# A peer that sends a byte now and then must not hold a receiver for ever. This is 35 kB/s with the default timeout; a
# sender is silent for 60 s at most, while its guest suspends.
STREAM_BYTES_MIN = 4 << 20  # bytes of a stream in each ``idle_timeout``
_DRAIN_TIMEOUT = 5.0  # seconds for what the peer still sends after an abort, and for ssh to end


class Link:
    """A connection to another host: two descriptors, or one for both directions.

    As a context manager, it ends closed, with the program that was started for it ended. Reads and writes raise
    OSError with its name: ECONNRESET, EPIPE, ETIMEDOUT.

    Attributes:
        read_fd: The descriptor to read from.
        name: The peer, for people.
        idle_timeout: Seconds in which the peer has to send or to accept something.
    """

    def __init__(
        self,
        read_fd: int,
        write_fd: int,
        name: str,
        *,
        idle_timeout: float = IDLE_TIMEOUT,
        process: subprocess.Popen[bytes] | None = None,
    ) -> None:
        self.read_fd = read_fd
        self.name = name
        self.idle_timeout = idle_timeout
        self._write_fd = write_fd
        self._process = process
        self._out = _TimedOutput(write_fd, name, idle_timeout)
        self._was_blocking = os.get_blocking(write_fd)
        os.set_blocking(write_fd, False)  # otherwise a write that the peer does not accept would never return

    @classmethod
    def of_socket(cls, sock: socket.socket, name: str, *, idle_timeout: float = IDLE_TIMEOUT) -> Self:
        """Return the link over a connected socket.

        The socket's descriptor belongs to the link from now on.
        """
        if sock.family in {socket.AF_INET, socket.AF_INET6}:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # messages are small, and each is waited for
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setblocking(True)
        fd = sock.detach()
        return cls(fd, fd, name, idle_timeout=idle_timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the link; may be called again.

        A program that was started for it has some seconds to end by itself.
        """
        if self._write_fd >= 0:
            os.set_blocking(self._write_fd, self._was_blocking)  # the caller may have it open, too
        fds, self.read_fd, self._write_fd = {self.read_fd, self._write_fd}, -1, -1
        for fd in fds - {-1}:
            os.close(fd)
        self._out.fd = -1
        if self._process is not None:
            try:
                self._process.wait(_DRAIN_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Write all buffers, in order.

        ETIMEDOUT if the peer accepts nothing for ``idle_timeout`` seconds.
        """
        self._out.write(buffers)

    @property
    def written(self) -> int:
        """Bytes written so far."""
        return self._out.written

    def is_readable(self, timeout: float = 0.0) -> bool:
        """Return whether the peer has sent something or closed.

        Waits for that for ``timeout`` seconds.
        """
        return bool(_poll(self.read_fd, select.POLLIN, timeout))

    def read(self, count: int) -> bytes:
        """Read exactly ``count`` bytes.

        ECONNRESET if the peer has closed, ETIMEDOUT if they have not all come within ``idle_timeout`` seconds.
        """
        data, deadline = b"", time.monotonic() + self.idle_timeout
        while len(data) < count:
            if not self.is_readable(max(0.0, deadline - time.monotonic())):
                received = f"{len(data)} of {count} bytes" if data else "nothing"
                raise OSError(errno.ETIMEDOUT, f"the peer sent {received} in {self.idle_timeout:g} s", self.name)
            try:
                more = os.read(self.read_fd, count - len(data))
            except BlockingIOError:  # one descriptor for both directions, and another reader was quicker
                continue
            except OSError as e:
                raise OSError(e.errno or errno.EIO, e.strerror, self.name) from e
            if not more:
                raise OSError(errno.ECONNRESET, self._why_closed(), self.name)
            data += more
        return data

    def input(self) -> Input:
        """Return the peer's next bytes as a stream, which is read up to its end."""
        return _TimedInput(os.dup(self.read_fd), self.name, self.idle_timeout)

    def drain(self) -> None:
        """Read and drop what the peer still sends, for a while.

        Closing at once would cut off the last message.
        """
        deadline = time.monotonic() + _DRAIN_TIMEOUT
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._write_fd)) as sock:
            sock.shutdown(socket.SHUT_WR)  # a pipe is no socket, and needs no shutdown
        with contextlib.suppress(OSError):
            while (remaining := deadline - time.monotonic()) > 0 and self.is_readable(remaining):
                with contextlib.suppress(BlockingIOError):
                    if not os.read(self.read_fd, 1 << 20):
                        return

    def _why_closed(self) -> str:
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
            if self._process.returncode:
                return f"the program that connects to it ended with status {self._process.returncode}"
        return "the peer has closed the connection"


class _TimedOutput(Output):
    """An output that times out."""

    def __init__(self, fd: int, name: str, idle_timeout: float) -> None:
        super().__init__(fd, name)
        self._idle_timeout = idle_timeout

    def wait(self) -> None:
        if not _poll(self.fd, select.POLLOUT, self._idle_timeout):
            raise OSError(errno.ETIMEDOUT, f"the peer accepted nothing for {self._idle_timeout:g} s", self.name)


class _TimedInput(Input):
    """An input that times out, also if hardly anything comes."""

    def __init__(self, fd: int, name: str, idle_timeout: float) -> None:
        super().__init__(fd, name, exact=True)
        self._idle_timeout = idle_timeout
        self._received = 0  # bytes since the last check of the rate
        self._checked_at = time.monotonic()

    def read(self, count: int) -> bytes:
        data = super().read(count)
        self._received += len(data)
        return data

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        count = super()._read_some(buffer, offset)
        self._received += count
        return count

    def wait(self) -> None:
        if time.monotonic() - self._checked_at >= self._idle_timeout:
            if self._received < STREAM_BYTES_MIN:
                problem = f"the peer sent {self._received} bytes of the stream in {self._idle_timeout:g} s"
                raise OSError(errno.ETIMEDOUT, f"{problem}; at least {STREAM_BYTES_MIN} are expected", self.name)
            self._received, self._checked_at = 0, time.monotonic()
        if not _poll(self.fd, select.POLLIN, self._idle_timeout):
            raise OSError(errno.ETIMEDOUT, f"the peer sent nothing for {self._idle_timeout:g} s", self.name)


def _poll(fd: int, events: int, seconds: float) -> list[tuple[int, int]]:
    poll = select.poll()
    poll.register(fd, events)
    return poll.poll(seconds * 1000)


# --- addresses --------------------------------------------------------------------------------------------------------


def connect(
    address: str, *, ssh: Sequence[str] = SSH, receiver: Sequence[str] = RECEIVER, idle_timeout: float = IDLE_TIMEOUT
) -> Link:
    """Connect to a receiver.

    Args:
        address: ``tcp:HOST:PORT``, ``unix:PATH``, ``fd:N`` or ``fd:IN,OUT``; otherwise a host for ``ssh``.
        ssh: The command that reaches such a host.
        receiver: The command that ssh starts there.
        idle_timeout: Seconds in which the peer has to send or to accept something.

    Raises:
        RequestError: The address is invalid, or ssh cannot be started.
        OSError: Nobody listens there.
    """
    if address.startswith("tcp:"):
        host, port = _address(address)
        try:
            sock = socket.create_connection((host, port), timeout=idle_timeout)
        except OSError as e:
            raise OSError(e.errno or errno.EHOSTUNREACH, e.strerror or str(e), address) from e
        return Link.of_socket(sock, address, idle_timeout=idle_timeout)
    if address.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(address.removeprefix("unix:"))
        except OSError as e:
            sock.close()
            raise OSError(e.errno or errno.EIO, e.strerror or str(e), address) from e
        return Link.of_socket(sock, address, idle_timeout=idle_timeout)
    if address.startswith("fd:"):
        read_fd, write_fd = _descriptors(address)
        return Link(read_fd, write_fd, address, idle_timeout=idle_timeout)
    return _by_ssh(address, ssh, receiver, idle_timeout)


def _by_ssh(host: str, ssh: Sequence[str], receiver: Sequence[str], idle_timeout: float) -> Link:
    if not host or host.startswith("-"):
        raise RequestError(f"{host!r} is not a valid host name")  # ssh would take it for an option
    # ssh hands what follows the host to the shell there, as one string.
    command = [*ssh, host, shlex.join(receiver)]
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    except OSError as e:
        raise RequestError(f"{command[0]}: {e.strerror}") from e
    assert process.stdin is not None
    assert process.stdout is not None
    read_fd, write_fd = os.dup(process.stdout.fileno()), os.dup(process.stdin.fileno())
    process.stdin.close()
    process.stdout.close()
    return Link(read_fd, write_fd, host, idle_timeout=idle_timeout, process=process)


@contextmanager
def listening(address: str, *, anywhere: bool = False) -> Iterator[socket.socket]:
    """Listen at ``unix:PATH`` or ``tcp:ADDRESS:PORT``.

    Only the owner of PATH may connect to it.

    Args:
        address: Where to listen.
        anywhere: Allow an address that other machines reach. Nothing is encrypted or authenticated.

    Raises:
        RequestError: The address is invalid, or other machines reach it.
        OSError: The address is not available.
    """
    if address.startswith("unix:"):
        path = Path(address.removeprefix("unix:"))
        sock = socket.socket(socket.AF_UNIX)
        before = os.umask(0o177)  # of the whole process: nothing else of it makes files while it waits for a peer
        try:
            sock.bind(str(path))
        except OSError as e:
            sock.close()
            raise OSError(e.errno or errno.EIO, e.strerror or str(e), address) from e
        finally:
            os.umask(before)
        with sock:
            try:
                sock.listen(1)
                yield sock
            finally:
                path.unlink(missing_ok=True)
        return
    if not address.startswith("tcp:"):
        raise RequestError(f"{address!r}: listen at unix:PATH or tcp:ADDRESS:PORT")
    host, port = _address(address)
    try:
        family, kind, _, _, socket_address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as e:
        raise RequestError(f"{address}: {e.strerror or e}") from e
    if not anywhere and not ipaddress.ip_address(str(socket_address[0]).partition("%")[0]).is_loopback:
        problem = (
            f"{address}: other machines reach this address, and a guest's memory would cross the network unencrypted"
        )
        raise RequestError(f"{problem}; use ssh, or --anywhere")
    with socket.socket(family, kind) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(socket_address)
            sock.listen(1)
        except OSError as e:
            raise OSError(e.errno or errno.EIO, e.strerror, address) from e
        yield sock


def accept(listener: socket.socket, address: str, *, idle_timeout: float = IDLE_TIMEOUT) -> Link:
    """Wait for the first connection, without a timeout, and return its link.

    Whoever connects is the peer: the socket's mode, the loopback address or the network keeps others out.
    """
    sock, peer = listener.accept()
    name = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else address
    return Link.of_socket(sock, name, idle_timeout=idle_timeout)


def standard_streams(*, idle_timeout: float = IDLE_TIMEOUT) -> Link:
    """Return standard input and output as a link.

    What is printed from now on goes to standard error.
    """
    read_fd, write_fd = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    return Link(read_fd, write_fd, "standard input", idle_timeout=idle_timeout)


def _is_number(text: str) -> bool:
    """Whether a text has digits 0 to 9 only; isdecimal() takes those of all scripts."""
    return text.isascii() and text.isdecimal()


def _address(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tcp:").rpartition(":")
    if not host or not _is_number(port) or int(port) > 0xFFFF:
        raise RequestError(f"{address!r}: write tcp:HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _descriptors(address: str) -> tuple[int, int]:
    numbers = address.removeprefix("fd:").split(",")
    if not 1 <= len(numbers) <= 2 or not all(map(_is_number, numbers)):
        raise RequestError(f"{address!r}: write fd:N for a socket, fd:IN,OUT for two pipes")
    read_fd, write_fd = int(numbers[0]), int(numbers[-1])
    for fd in (read_fd, write_fd):
        try:
            os.fstat(fd)
        except (OSError, OverflowError) as e:
            raise RequestError(f"{address}: descriptor {fd} is not open") from e
    return read_fd, write_fd
