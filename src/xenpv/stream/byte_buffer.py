"""A buffer of input bytes.

It is fed in pieces of any size, and read in the sizes that a parser asks for.
"""

from __future__ import annotations

from collections.abc import Callable

_SMALL = 1024  # bytes; smaller pieces are joined at once, since an object for each few bytes of a slow pipe is dear


class ByteBuffer:
    """The bytes of one input that were fed and not yet taken.

    Pieces stay as they were fed until one request spans several of them. Bytes that will be skipped are not stored.

    Attributes:
        offset: offset of the next byte, from the start of the input.
        available: bytes that can be taken now.
        skippable: bytes to come that will be skipped; a caller that can seek may call ``skip`` instead of feeding them.
        ended: whether ``feed_eof`` was called.
        tap: called with all bytes that are taken, also those that were fed to be skipped; None if nobody needs them.
    """

    def __init__(self) -> None:
        self.tap: Callable[[bytes | bytearray | memoryview], None] | None = None
        self.offset = 0
        self.available = 0
        self.skippable = 0
        self.ended = False
        self._chunks: list[bytes] = []
        self._start = 0  # of the first byte not taken, in the first chunk

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Add the next bytes of the input."""
        if self.skippable:
            n = min(self.skippable, len(data))
            if self.tap is not None:
                self.tap(memoryview(data)[:n])
            self.skip(n)
            data = memoryview(data)[n:]
        if data:
            if self._chunks and len(self._chunks[-1]) < _SMALL > len(data):
                self._chunks[-1] += data
            else:
                self._chunks.append(data if isinstance(data, bytes) else bytes(data))
            self.available += len(data)

    def feed_eof(self) -> None:
        """Mark the end of the input."""
        self.ended = True

    def skip(self, n: int) -> None:
        """Count n bytes that the caller seeked over as fed.

        Raises ValueError for more than ``skippable``.
        """
        if n > self.skippable:
            raise ValueError(f"cannot skip {n} bytes, only {self.skippable}")
        self.skippable -= n
        self.offset += n

    def peek(self, n: int) -> bytes:
        """Return the next n bytes, or all that are available, without consuming them."""
        return b"".join([self._chunks[0][self._start :], *self._chunks[1:]])[:n] if self._chunks else b""

    def read(self, n: int) -> memoryview:
        """Read n bytes that are available. The view stays valid, as chunks never change."""
        if not n:
            return memoryview(b"")
        head = self._chunks[0]
        if len(head) - self._start < n:
            head = b"".join([head[self._start :], *self._chunks[1:]])
            self._chunks, self._start = [head], 0
        data = memoryview(head)[self._start : self._start + n]
        self._drop(n)
        if self.tap is not None:
            self.tap(data)
        return data

    def discard(self, n: int) -> None:
        """Drop the next n bytes.

        Those that have not come yet are ``skippable`` from now on.
        """
        dropped = min(n, self.available)
        if self.tap is not None:
            self.read(dropped)
        else:
            self._drop(dropped)
        self.skippable = n - dropped

    def _drop(self, n: int) -> None:
        self.available -= n
        self.offset += n
        self._start += n
        while self._chunks and self._start >= len(self._chunks[0]):
            self._start -= len(self._chunks.pop(0))
