"""A file that appears only when it is complete.

A pipe or a device is written to directly.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
from collections.abc import Collection, Iterable, Sequence
from types import TracebackType
from typing import Self

from xenpv.errors import RequestError
from xenpv.io.file_kind import HEAD_SIZE, FileKind, identify
from xenpv.stream.fields import Buffer

STANDARD_OUTPUT = "standard output"  # its name in errors

_IOV_MAX = os.sysconf("SC_IOV_MAX")  # buffers that one writev takes
_ZEROS = memoryview(bytes(1 << 20))
_COPY_MAX = 1 << 20  # bytes per write, where buffers have to be copied first


class Output:
    """A descriptor that buffers are written to without a copy.

    As a context manager: the file appears when the body ends, and nothing of it is left if the body raises. Until then
    a file that had its name stays. Only the owner can read the file, as it holds a guest's memory.

    Where the file system has O_TMPFILE, the file has no name until it is complete: not even SIGKILL leaves anything.

    Attributes:
        fd: The descriptor.
        name: Its name, for people.
        written: Bytes written so far.
        copies: Whether buffers are copied first, because the target refused mapped pages of a guest.
        is_regular_file: Whether writes cannot hang.
        sparse: Whether it is a new file, which can have holes and be written at any offset.
    """

    def __init__(self, fd: int, name: str, *, target: str | None = None, temporary: str | None = None) -> None:
        self.fd = fd
        self.name = name
        self.written = 0
        self.copies = False
        self.is_regular_file = stat.S_ISREG(os.fstat(fd).st_mode)
        self.sparse = target is not None
        self._target = target
        self._temporary = temporary

    @classmethod
    def open(
        cls,
        path: str,
        *,
        replaces: Collection[FileKind] | None = None,
        inputs: Iterable[str | int] = (),
        force: bool = False,
    ) -> Self:
        """Open a path to write to; "-" is standard output.

        An existing pipe or device is written to. If the path is a symbolic link, the file that it names is replaced.

        Args:
            path: The path.
            replaces: The kinds of existing file that may be replaced, besides empty ones (default: all).
            inputs: Paths and descriptors that are read meanwhile; none of them is replaced.
            force: Replace files of all kinds, except inputs.

        Raises:
            RequestError: The file cannot be made, it is an input, or it is a file of another kind. Or a link or pipe of
                another user has its name in a folder in which anybody can make one.
        """
        try:
            if path == "-":
                _check_no_input(os.fstat(1), STANDARD_OUTPUT, inputs)
                return cls(os.dup(1), STANDARD_OUTPUT)
            _check_owner(path)
            target = os.path.realpath(path)
            if os.path.lexists(target):
                status = os.stat(target)
                _check_no_input(status, path, inputs)
                if not stat.S_ISREG(status.st_mode):
                    return cls(os.open(target, os.O_WRONLY | os.O_CLOEXEC), path)
                if replaces is not None and not force:
                    _check_kind(target, path, replaces)
            fd, temporary = _open_unnamed(os.path.dirname(target))
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
        pending = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
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
        if self._target is not None and self.fd >= 0:
            if os.fstat(self.fd).st_size < self.written:  # it ends with a hole
                os.ftruncate(self.fd, self.written)
            os.fsync(self.fd)
            folder = os.path.dirname(self._target)
            if self._temporary is None:
                self._temporary = _temporary_name(folder)
                _link(self.fd, self._temporary)  # a link cannot replace a file, but a rename can
            os.rename(self._temporary, self._target)
            self._temporary = None
            directory = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def abandon(self) -> None:
        """Close it and remove an incomplete file; may be called again."""
        temporary, self._temporary = self._temporary, None
        fd, self.fd = self.fd, -1
        try:
            if temporary is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
        finally:
            if fd >= 0:
                os.close(fd)

    def _with_name(self, e: OSError) -> OSError:
        """Return the error with the output's name."""
        return OSError(e.errno or errno.EIO, e.strerror, self.name)


def _check_no_input(output: os.stat_result, name: str, inputs: Iterable[str | int]) -> None:
    """Raise RequestError if the output is one of the inputs, by any name.

    Pipes and devices may be both.
    """
    if not stat.S_ISREG(output.st_mode):
        return
    for source in inputs:
        if os.path.samestat(output, os.stat(source)):
            raise RequestError(f"{name}: is also the input, which would be lost; choose another output")


def _check_kind(target: str, path: str, replaces: Collection[FileKind]) -> None:
    """Raise RequestError if an existing file is of a kind that may not be replaced."""
    with open(target, "rb") as file:
        kind = identify(file.read(HEAD_SIZE))
    if kind is not FileKind.EMPTY and kind not in replaces:
        raise RequestError(f"{path}: is {kind}, which would be lost; choose another output, or give --force")


def _check_owner(path: str) -> None:
    """Raise RequestError if another user's link, pipe or device is at the path.

    It matters where anybody can make one, as in /tmp. Linux has the same rule for open() in sticky folders
    (Documentation/admin-guide/sysctl/fs.rst: protected_symlinks, protected_fifos).
    """
    folder = os.stat(os.path.dirname(path) or ".")
    if not folder.st_mode & stat.S_IWOTH or not os.path.lexists(path):
        return
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode) and status.st_uid not in {os.geteuid(), folder.st_uid}:
        raise RequestError(
            f"{path}: belongs to another user (uid {status.st_uid}), and anybody could have put it there"
        )


def _temporary_name(folder: str) -> str:
    return os.path.join(folder, f".xenpv-{os.urandom(8).hex()}.part")


def _open_unnamed(folder: str) -> tuple[int, str | None]:
    """Open a new file in the folder of its target.

    So a rename does not cross file systems.

    Returns:
        Its descriptor, and its name if the file system has no O_TMPFILE.
    """
    with contextlib.suppress(OSError):  # of many kinds: EOPNOTSUPP, EISDIR of old kernels, ENOENT
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600), None
    name = _temporary_name(folder)
    return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), name


def _link(fd: int, path: str) -> None:
    """Give an open file without a name a name."""
    # os.link() follows the link in /proc only if it calls linkat(), which it does for a descriptor of a folder.
    folder = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(str(fd), path, src_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _copy(buffers: Sequence[memoryview]) -> bytes:
    """Return a copy of the first buffers, up to _COPY_MAX bytes."""
    parts, room = [], _COPY_MAX
    for buffer in buffers:
        parts.append(buffer[:room])
        room -= len(parts[-1])
        if room <= 0:
            break
    return b"".join(parts)
