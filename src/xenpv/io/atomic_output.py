"""Where a stream goes: a file, which has its name only when it is whole, or a pipe or a device as it is."""

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
_COPIED = 1 << 20  # bytes at a time, where buffers have to be copied first


class Output:
    """A descriptor that buffers are written to, as they are.

    As a context: the file is whole when its block ends, and gone when that ends with an exception. What had its name
    before is there until then. A file can be read by its owner only: it holds a guest's memory.
    """

    def __init__(self, fd: int, name: str, *, becomes: str | None = None, temporary: str | None = None) -> None:
        self.fd = fd
        self.name = name
        self.written = 0  # bytes
        self.copies = False  # whether the target showed that it does not take foreign pages
        self.is_regular_file = stat.S_ISREG(os.fstat(fd).st_mode)
        self._becomes = becomes
        self._temporary = temporary

    @classmethod
    def open(cls, path: str) -> Self:
        """Open a path to write to; "-" is standard output. Raises RequestError.

        A pipe or a device that is there already is written to. Of a symbolic link the file that it names is replaced.
        """
        try:
            if path == "-":
                return cls(os.dup(1), "standard output")
            target = os.path.realpath(path)
            if os.path.lexists(target) and not stat.S_ISREG(os.stat(target).st_mode):
                return cls(os.open(target, os.O_WRONLY | os.O_CLOEXEC), path)
            # The same directory, or it could not be renamed.
            temporary = os.path.join(os.path.dirname(target), f".xenpv-{os.urandom(8).hex()}.part")
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise RequestError(f"{path}: {e.strerror}") from e
        return cls(fd, path, becomes=target, temporary=temporary)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self.abandon()

    def write(self, buffers: Sequence[Buffer]) -> None:
        """All of the buffers, in order. Raises OSError, which names the output: ENOSPC, EPIPE and their like.

        What pins the pages that it writes (9p, O_DIRECT) says EFAULT to another domain's, and is given copies from
        then on.
        """
        waiting = [memoryview(buffer) for buffer in buffers if len(buffer)]
        first = 0
        while first < len(waiting):
            now = waiting[first : first + _IOV_MAX]
            try:
                done = os.writev(self.fd, [_copied(now)] if self.copies else now)
            except BlockingIOError:  # whoever shares the pipe may have made it so
                self.wait()
                continue
            except OSError as e:
                if e.errno == errno.EFAULT and not self.copies:
                    self.copies = True
                    continue
                raise self._named(e) from e
            self.written += done
            while first < len(waiting) and done >= len(waiting[first]):
                done -= len(waiting[first])
                first += 1
            if done:
                waiting[first] = waiting[first][done:]

    @property
    def sparse(self) -> bool:
        """Whether it is a file that was made here: it can have holes, and be written at any place."""
        return self._temporary is not None

    def skip(self, length: int) -> None:
        """So many zeros: a hole in a sparse file, written out to anything else. Raises OSError."""
        if self.sparse:
            try:
                os.lseek(self.fd, length, os.SEEK_CUR)
            except OSError as e:
                raise self._named(e) from e
            self.written += length
            return
        for at in range(0, length, len(_ZEROS)):
            self.write([_ZEROS[: length - at]])

    def write_at(self, data: Buffer, offset: int) -> None:
        """All of the data at a place of a sparse file that was skipped. Raises OSError."""
        left = memoryview(data)
        while left:
            try:
                done = os.pwrite(self.fd, left, offset)
            except OSError as e:
                raise self._named(e) from e
            left, offset = left[done:], offset + done

    def wait(self) -> None:
        """Until it takes something again."""
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        poll.poll()

    def finish(self) -> None:
        """All is written: give the file its name, once it is on the disk. Raises OSError.

        Then nothing has changed, or, if the last step failed, the file is there, yet might not outlive a power cut.
        """
        try:
            self._settle()
        except BaseException as e:
            self.abandon()
            if isinstance(e, OSError):
                raise self._named(e) from e
            raise

    def _settle(self) -> None:
        if self._temporary is not None and self._becomes is not None:
            if os.fstat(self.fd).st_size < self.written:  # it ends with a hole
                os.ftruncate(self.fd, self.written)
            os.fsync(self.fd)
            os.rename(self._temporary, self._becomes)
            self._temporary = None
            directory = os.open(os.path.dirname(self._becomes), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def abandon(self) -> None:
        """Close it; of a file that is not whole nothing is left. Again does no harm."""
        if self._temporary is not None:
            os.unlink(self._temporary)
            self._temporary = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _named(self, e: OSError) -> OSError:
        return OSError(e.errno or errno.EIO, e.strerror, self.name)


def _copied(buffers: Sequence[memoryview]) -> bytes:
    """The first of the buffers in memory of our own, up to about _COPIED bytes."""
    taken, room = [], _COPIED
    for buffer in buffers:
        taken.append(buffer[:room])
        room -= len(taken[-1])
        if room <= 0:
            break
    return b"".join(taken)
