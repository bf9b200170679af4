"""A file that appears only when it is complete.

A pipe or a device is written to directly.
"""

from __future__ import annotations

import errno
import os
import select
import stat
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from xenpv.errors import RequestError
from xenpv.stream.fields import Buffer

_IOV_MAX = os.sysconf("SC_IOV_MAX")  # buffers that one writev takes
_ZEROS = memoryview(bytes(1 << 20))
_COPY_MAX = 1 << 20  # bytes per write, where buffers have to be copied first


class Output:
    """A descriptor that buffers are written to without a copy.

    As a context manager: the file appears when the body ends, and never if the body raises. Until then an older file
    of that name stays. Only the owner can read the file, as it holds a guest's memory.

    Attributes:
        fd: The descriptor.
        name: Its name, for people.
        written: Bytes written so far.
        copies: Whether buffers are copied first, because the target refused mapped pages of a guest.
        is_regular_file: Whether writes cannot hang.
    """

    def __init__(self, fd: int, name: str, *, target: str | None = None, temporary: str | None = None) -> None:
        self.fd = fd
        self.name = name
        self.written = 0
        self.copies = False
        self.is_regular_file = stat.S_ISREG(os.fstat(fd).st_mode)
        self._target = target
        self._temporary = temporary

    @classmethod
    def open(cls, path: str) -> Self:
        """Open a path to write to; "-" is standard output. RequestError if that fails.

        An existing pipe or device is written to. If the path is a symbolic link, the file that it names is replaced.
        """
        try:
            if path == "-":
                return cls(os.dup(1), "standard output")
            target = os.path.realpath(path)
            if os.path.lexists(target) and not stat.S_ISREG(os.stat(target).st_mode):
                return cls(os.open(target, os.O_WRONLY | os.O_CLOEXEC), path)
            # In the same directory: a rename does not cross file systems.
            temporary = os.path.join(os.path.dirname(target), f".xenpv-{os.urandom(8).hex()}.part")
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise RequestError(f"{path}: {e.strerror}") from e
        return cls(fd, path, target=target, temporary=temporary)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self.abandon()

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Write all buffers, in order.

        A target that pins the pages it writes (9p, O_DIRECT) refuses those of another domain with EFAULT. It gets
        copies from then on.

        Raises:
            OSError: Writing failed, for example with ENOSPC or EPIPE. It has the output's name.
        """
        pending = [memoryview(buffer) for buffer in buffers if len(buffer)]
        first = 0
        while first < len(pending):
            batch = pending[first : first + _IOV_MAX]
            try:
                count = os.writev(self.fd, [_copy(batch)] if self.copies else batch)
            except BlockingIOError:  # another process may have made the pipe non-blocking
                self.wait()
                continue
            except OSError as e:
                if e.errno == errno.EFAULT and not self.copies:
                    self.copies = True
                    continue
                raise self._with_name(e) from e
            self.written += count
            while first < len(pending) and count >= len(pending[first]):
                count -= len(pending[first])
                first += 1
            if count:
                pending[first] = pending[first][count:]

    @property
    def sparse(self) -> bool:
        """Whether it is a new file, which can have holes and be written at any offset."""
        return self._temporary is not None

    def skip(self, length: int) -> None:
        """Write ``length`` zero bytes: a hole in a sparse file. Raises OSError."""
        if self.sparse:
            try:
                os.lseek(self.fd, length, os.SEEK_CUR)
            except OSError as e:
                raise self._with_name(e) from e
            self.written += length
            return
        for offset in range(0, length, len(_ZEROS)):
            self.write([_ZEROS[: length - offset]])

    def write_at(self, data: Buffer, offset: int) -> None:
        """Write data at an offset of a sparse file that was skipped before.

        Raises OSError.
        """
        pending = memoryview(data)
        while pending:
            try:
                count = os.pwrite(self.fd, pending, offset)
            except OSError as e:
                raise self._with_name(e) from e
            pending, offset = pending[count:], offset + count

    def wait(self) -> None:
        """Wait until it accepts data."""
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        poll.poll()

    def finish(self) -> None:
        """Write the file to the disk and give it its name. Raises OSError.

        After an error nothing has changed; if only the last step failed, the file exists but may not survive a power
        cut.
        """
        try:
            self._commit()
        except BaseException as e:
            self.abandon()
            if isinstance(e, OSError):
                raise self._with_name(e) from e
            raise

    def _commit(self) -> None:
        if self._temporary is not None and self._target is not None:
            if os.fstat(self.fd).st_size < self.written:  # it ends with a hole
                os.ftruncate(self.fd, self.written)
            os.fsync(self.fd)
            os.rename(self._temporary, self._target)
            self._temporary = None
            directory = os.open(os.path.dirname(self._target), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def abandon(self) -> None:
        """Close it and remove an incomplete file; may be called again."""
        if self._temporary is not None:
            os.unlink(self._temporary)
            self._temporary = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _with_name(self, e: OSError) -> OSError:
        """Return the error with the output's name."""
        return OSError(e.errno or errno.EIO, e.strerror, self.name)


def _copy(buffers: Sequence[memoryview]) -> bytes:
    """Return a copy of the first buffers, up to _COPY_MAX bytes."""
    parts, room = [], _COPY_MAX
    for buffer in buffers:
        parts.append(buffer[:room])
        room -= len(parts[-1])
        if room <= 0:
            break
    return b"".join(parts)
