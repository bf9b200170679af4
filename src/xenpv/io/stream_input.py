"""Input: a file or pipe with a stream, and the loop that feeds a Reader from it."""

from __future__ import annotations

import errno
import os
import select
import stat
from collections.abc import Callable, Iterator
from typing import Protocol, Self

from xenpv.errors import RequestError
from xenpv.io.progress import Progress, ProgressCallback
from xenpv.stream import rules
from xenpv.stream.events import Event
from xenpv.stream.page_data import PageData
from xenpv.stream.reader import Reader

_READ_MIN = 4 << 10  # bytes per read of a file; after a PAGE_DATA, as much as that one had before its pages
_READ_MAX = 1 << 20  # bytes per read


class StreamSource(Protocol):
    """A stream as its readers see it: a file, a pipe, the output of a conversion.

    Attributes:
        name: Its name, for people.
        fd: The descriptor that page content is read from; only used if ``seekable``.
        start: The offset in ``fd`` of the stream's first byte.
        size: Bytes from there to the end; if not ``seekable``, those read so far.
        seekable: Whether ``fd`` can be read at any offset.
        trailing: Bytes after the stream, once its events have ended.
    """

    name: str
    fd: int
    start: int
    size: int
    seekable: bool
    trailing: int

    def events(self, reader: Reader, progress: ProgressCallback | None = None) -> Iterator[Event]:
        """Yield all events of a reader that is fed from this source. Raises as the reader."""

    def close(self) -> None:
        """Close the source; may be called again."""


class Input:
    """A StreamSource over a descriptor: a file or a pipe.

    Attributes:
        start: The file offset of the stream's first byte; 0 for a pipe.
        size: Bytes from there to the end of the file; of a pipe, those read so far.
        seekable: Whether it is a regular file.
        trailing: Bytes after the stream.

    Args:
        fd: The descriptor, which belongs to the input from now on.
        name: Its name, for people.
        exact: Leave the descriptor right after the stream, for a caller that shares it. Otherwise a pipe is read to
            its end, so that its writer finishes.

    Raises:
        RequestError: It is a directory.
    """

    def __init__(self, fd: int, name: str, *, exact: bool = False) -> None:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            os.close(fd)
            raise RequestError(f"{name}: is a directory, not a saved domain")
        self.fd = fd
        self.name = name
        self.exact = exact
        self.seekable = stat.S_ISREG(mode)
        self.start = os.lseek(fd, 0, os.SEEK_CUR) if self.seekable else 0
        self.size = os.fstat(fd).st_size - self.start if self.seekable else 0
        self.trailing = 0
        self._next = 0  # offset in the stream of the page content that is read next
        self._reader: Reader | None = None  # of a pipe whose page content is read past it
        self._read_of_pipe = 0  # bytes of page content read from a pipe that the reader was not told to skip yet

    @classmethod
    def open(cls, path: str) -> Self:
        """Open a path; "-" is standard input. RequestError if that fails."""
        try:
            fd = os.dup(0) if path == "-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise RequestError(f"{path}: {e.strerror}") from e
        return cls(fd, path)

    def close(self) -> None:
        """Close the descriptor; may be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def read(self, count: int) -> bytes:
        """Read up to ``count`` bytes from a pipe; none at its end."""
        self.wait()
        return os.read(self.fd, count)

    def events(
        self, reader: Reader, progress: ProgressCallback | None = None, *, reads_pages: bool = False
    ) -> Iterator[Event]:
        """Yield all events of a reader that is fed from this input. Raises as the reader.

        Args:
            reader: The reader.
            progress: Receives the progress.
            reads_pages: Between a PageData event and the next one, ``read_into`` reads its page content. The rest
                is skipped.
        """
        return (
            self._events_of_file(reader, progress)
            if self.seekable
            else self._events_of_pipe(reader, progress, reads_pages)
        )

    def read_into(self, buffer: memoryview) -> None:
        """Fill a buffer with the next bytes of page content.

        The buffer may be a guest's mapped memory.

        Raises:
            Truncated: The input ends before.
            OSError: It cannot be read.
        """
        self._fill(buffer, self._next)
        self._next += len(buffer)

    def defer_read(self, count: int) -> Callable[[memoryview], None]:
        """Return a ``read_into`` for the next ``count`` bytes of page content of a file.

        Any thread may call it at any time.
        """
        offset, self._next = self._next, self._next + count
        return lambda buffer: self._fill(buffer, offset)

    def _fill(self, buffer: memoryview, offset: int) -> None:
        while buffer:
            n = self._read_some(buffer, offset)
            if not n:
                end = f"{len(buffer)} more bytes of page content are missing, the input ends at {offset:#x}"
                raise rules.breach(rules.TRUNCATED, end, offset=offset, record="PAGE_DATA")
            offset += n
            if not self.seekable:
                self._read_of_pipe += n
                if self._reader is not None:
                    self._reader.absorb(buffer[:n])
            buffer = buffer[n:]

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        try:
            if self.seekable:
                return os.preadv(self.fd, [buffer], self.start + offset)
            self.wait()
            return os.readv(self.fd, [buffer])
        except OSError as e:
            if e.errno != errno.EFAULT:
                raise
        # The file system, such as 9p, does not read into memory of other domains: copy through our own.
        n = min(len(buffer), _READ_MAX)
        data = os.pread(self.fd, n, self.start + offset) if self.seekable else os.read(self.fd, n)
        buffer[: len(data)] = data
        return len(data)

    def wait(self) -> None:
        """Wait until a pipe has data, should another process have made it non-blocking."""
        if not os.get_blocking(self.fd):
            poll = select.poll()
            poll.register(self.fd, select.POLLIN)
            poll.poll()

    def _events_of_file(self, reader: Reader, progress: ProgressCallback | None) -> Iterator[Event]:
        position, read_size = 0, _READ_MIN
        try:
            while not reader.done:
                event = reader.next_event()
                if event is not None:
                    if isinstance(event, PageData):
                        read_size = 16 + len(event.raw)
                        self._next = event.pages_offset
                    yield event
                elif reader.skippable and position < self.size and not reader.needs_content:
                    n = min(reader.skippable, self.size - position)
                    reader.skip(n)
                    position += n
                    if progress is not None:
                        progress(Progress(position, self.size, unit="bytes"))
                elif not reader.done:
                    data = os.pread(self.fd, self._read_size(reader, read_size), self.start + position)
                    position += len(data)
                    reader.feed(data) if data else reader.feed_eof()
                    if progress is not None and reader.needs_content:
                        progress(Progress(position, self.size, unit="bytes"))
        finally:
            self.trailing = self.size - reader.offset
            if self.exact and self.fd >= 0:
                os.lseek(self.fd, self.start + reader.offset, os.SEEK_SET)

    @staticmethod
    def _read_size(reader: Reader, read_size: int) -> int:
        """Return how much to read of a file: of page content, no more than there is."""
        return min(reader.skippable or max(reader.needed, read_size), _READ_MAX)

    def _events_of_pipe(self, reader: Reader, progress: ProgressCallback | None, reads_pages: bool) -> Iterator[Event]:
        self._reader = reader
        while not reader.done:
            event = reader.next_event()
            if event is not None:
                if isinstance(event, PageData):
                    self._next, self._read_of_pipe = event.pages_offset, 0
                yield event
                continue
            if self._read_of_pipe:
                reader.skip(self._read_of_pipe)
                self.size, self._read_of_pipe = self.size + self._read_of_pipe, 0
            elif not reader.done:
                size = reader.skippable or reader.needed
                self.wait()
                data = os.read(self.fd, min(size, _READ_MAX) if self.exact or reads_pages else _READ_MAX)
                self.size += len(data)
                reader.feed(data) if data else reader.feed_eof()
            if progress is not None:
                progress(Progress(self.size, unit="bytes"))
        self.trailing = reader.trailing
        while not self.exact and (data := os.read(self.fd, _READ_MAX)):
            self.trailing += len(data)
            self.size += len(data)
