"""A file, a pipe or a descriptor that a stream comes out of, and how a Reader is driven over it."""

from __future__ import annotations

import errno
import os
import select
import stat
from collections.abc import Callable, Iterator
from typing import Self

from xenpv.errors import RequestError
from xenpv.io.progress import Progress, ProgressCallback
from xenpv.stream import rules
from xenpv.stream.events import Event
from xenpv.stream.pagedata import PageData
from xenpv.stream.reader import Reader

_WINDOW = 4 << 10  # bytes to read of a file at least; at a PAGE_DATA, what the last one took up to its pages
_CHUNK = 1 << 20  # bytes to read of a pipe at most


class Input:
    """Where a stream comes from. ``start`` is the file offset of its first byte, ``size`` the bytes seen from there on.

    ``exact``: leave the descriptor right behind the stream, as a program must that shares it with its caller.
    Otherwise a pipe is read to its end, so that its writer finishes; what follows the stream is counted in
    ``trailing``.
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
        self._next = 0  # where in the stream the content is that ``take`` gives
        self._taken = 0  # of it, out of a pipe, and not yet told to the reader

    @classmethod
    def open(cls, path: str) -> Self:
        """Open a path; "-" is standard input. Raises RequestError."""
        try:
            fd = os.dup(0) if path == "-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise RequestError(f"{path}: {e.strerror}") from e
        return cls(fd, path)

    def close(self) -> None:
        """Close the descriptor; again does no harm."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def read(self, count: int) -> bytes:
        """What a pipe has next, at most so many bytes; none at its end."""
        return os.read(self.fd, count)

    def events(
        self, reader: Reader, progress: ProgressCallback | None = None, *, taking: bool = False
    ) -> Iterator[Event]:
        """All events of the reader, fed from here. Raises what the reader raises.

        ``taking``: at a PageData event, until the next event, page content is there for ``take``; what is not taken is
        passed over.
        """
        return self._of_file(reader, progress) if self.seekable else self._of_pipe(reader, progress, taking)

    def take(self, into: memoryview) -> None:
        """Fill a buffer, which may be a guest's own mapped memory, with the next bytes of page content.

        Truncated when the input ends before, OSError when it cannot be read.
        """
        self._next += self._take_at(self._next, into)

    def later(self, count: int) -> Callable[[memoryview], None]:
        """A ``take`` of the next so many bytes that may be called at any time, in any thread: a file's only."""
        at, self._next = self._next, self._next + count

        def take(into: memoryview) -> None:
            self._take_at(at, into)

        return take

    def _take_at(self, place: int, into: memoryview) -> int:
        """Fill a buffer; how many bytes that were."""
        first = place
        while into:
            n = self._read_into(place, into)
            if not n:
                end = f"{len(into)} more bytes of page content are missing, the input ends at {place:#x}"
                raise rules.breach(rules.TRUNCATED, end, offset=place, record="PAGE_DATA")
            place += n
            if not self.seekable:
                self._taken += n
            into = into[n:]
        return place - first

    def _read_into(self, place: int, into: memoryview) -> int:
        try:
            if self.seekable:
                return os.preadv(self.fd, [into], self.start + place)
            self.wait()
            return os.readv(self.fd, [into])
        except OSError as e:
            if e.errno != errno.EFAULT:
                raise
        # The file system reads into no memory of other domains (9p is one), so by way of our own.
        n = min(len(into), _CHUNK)
        data = os.pread(self.fd, n, self.start + place) if self.seekable else os.read(self.fd, n)
        into[: len(data)] = data
        return len(data)

    def wait(self) -> None:
        """Until a pipe has something: whoever shares it may have made it one that does not wait."""
        if not os.get_blocking(self.fd):
            poll = select.poll()
            poll.register(self.fd, select.POLLIN)
            poll.poll()

    def _of_file(self, reader: Reader, progress: ProgressCallback | None) -> Iterator[Event]:
        position, window = 0, _WINDOW
        try:
            while not reader.done:
                event = reader.next_event()
                if event is not None:
                    if isinstance(event, PageData):
                        window = 16 + len(event.raw)
                        self._next = event.pages_offset
                    yield event
                elif reader.skippable and position < self.size:
                    n = min(reader.skippable, self.size - position)
                    reader.skip(n)
                    position += n
                    if progress is not None:
                        progress(Progress(position, self.size, unit="bytes"))
                elif not reader.done:
                    data = os.pread(self.fd, min(max(reader.needed, window), _CHUNK), self.start + position)
                    position += len(data)
                    reader.feed(data) if data else reader.feed_eof()
        finally:
            self.trailing = self.size - reader.offset
            if self.exact:
                os.lseek(self.fd, self.start + reader.offset, os.SEEK_SET)

    def _of_pipe(self, reader: Reader, progress: ProgressCallback | None, taking: bool) -> Iterator[Event]:
        while not reader.done:
            event = reader.next_event()
            if event is not None:
                if isinstance(event, PageData):
                    self._next, self._taken = event.pages_offset, 0
                yield event
                continue
            if self._taken:
                reader.skip(self._taken)
                self.size, self._taken = self.size + self._taken, 0
            elif not reader.done:
                wanted = reader.skippable or reader.needed
                self.wait()
                data = os.read(self.fd, min(wanted, _CHUNK) if self.exact or taking else _CHUNK)
                self.size += len(data)
                reader.feed(data) if data else reader.feed_eof()
            if progress is not None:
                progress(Progress(self.size, unit="bytes"))
        self.trailing = reader.trailing
        while not self.exact and (data := os.read(self.fd, _CHUNK)):
            self.trailing += len(data)
            self.size += len(data)
