"""Feeding: bytes put in as they come, and taken out as a grammar asks for them.

Nothing is gathered that need not be: what is held are the pieces as they were fed, until what was asked for is there;
and what is to be passed over is not held at all: a caller that can seek asks ``skippable`` how far.
"""

from __future__ import annotations

from collections.abc import Generator

from xenpv.errors import StreamError
from xenpv.findings import Rule, Severity
from xenpv.stream import rules
from xenpv.stream.rules import BreachHandler

_SMALL = 1024  # bytes; smaller pieces are joined as they come

Taking = Generator[None, None, memoryview]
Waiting = Generator[None, None, None]


class Feeding:
    """The bytes of one input. ``feed`` them, ``feed_eof`` at their end; a grammar, in a subclass, takes them.

    What it takes is a generator that yields None for "I need more data". ``fault`` collects breaches of rules, which
    raise otherwise.
    """

    def __init__(self, on_breach: BreachHandler | None = None) -> None:
        self._collect = on_breach
        self._chunks: list[bytes] = []  # fed and not yet read, joined only when something spans them
        self._start = 0  # of what is unread in the first chunk
        self._have = 0  # bytes unread in all
        self._skip = 0
        self._eof = False
        self.offset = 0  # of the next unread byte, from the start of the input
        self.need = 0  # bytes beyond what is buffered that the reader waits for
        self._record: str | None = None  # what is being read, for errors
        self._at = 0

    # --- the caller's side -----------------------------------------------------------------------------------------

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """More bytes of the input, in order."""
        if self._skip:
            n = min(self._skip, len(data))
            self._skip -= n
            self.offset += n
            data = memoryview(data)[n:]
        if data:
            if self._chunks and len(self._chunks[-1]) < _SMALL > len(data):
                self._chunks[-1] += data  # a slow pipe gives a few bytes at a time, and an object for each is dear
            else:
                self._chunks.append(data if isinstance(data, bytes) else bytes(data))
            self._have += len(data)

    def feed_eof(self) -> None:
        """The input has ended."""
        self._eof = True

    @property
    def skippable(self) -> int:
        """How many of the bytes to come will be passed over: a caller that can seek may, and says so with ``skip``."""
        return self._skip

    def skip(self, n: int) -> None:
        """Take n bytes as gone by; n is at most ``skippable``."""
        if n > self._skip:
            raise ValueError(f"cannot skip {n} bytes, only {self._skip}")
        self._skip -= n
        self.offset += n

    # --- bytes -----------------------------------------------------------------------------------------------------

    def _begin(self, record: str | None) -> None:
        self._record = record
        self._at = self.offset

    def _fault(self, rule: Rule, message: str) -> None:
        if self._collect is not None:
            self._collect(rule, message, self._at, self._record)
        elif rule.severity is Severity.ERROR:
            raise rules.breach(rule, message, offset=self._at, record=self._record)

    def _fatal(self, rule: Rule, message: str) -> StreamError:
        """Report, and the error to raise: nothing behind this can be read."""
        if self._collect is not None:
            self._collect(rule, message, self._at, self._record)
        return rules.breach(rule, message, offset=self._at, record=self._record)

    def _wait(self, have: int, want: int, what: str) -> Waiting:
        """Until there are more bytes, or the end: which is an error here."""
        if self._eof:
            end = self.offset + self._have
            raise self._fatal(rules.TRUNCATED, f"{what} needs {want} bytes, the input ends after {have}, at {end:#x}")
        self.need = want - have
        yield None

    def _take(self, n: int, what: str) -> Taking:
        while self._have < n:
            yield from self._wait(self._have, n, what)
        self.need = 0
        return self._cut(n)

    def _cut(self, n: int) -> memoryview:
        """The next n bytes, which are there; what is given stays valid, as chunks never change."""
        if not n:
            return memoryview(b"")
        head = self._chunks[0]
        if len(head) - self._start < n:
            head = b"".join([head[self._start :], *self._chunks[1:]])
            self._chunks, self._start = [head], 0
        data = memoryview(head)[self._start : self._start + n]
        self._advance(n)
        return data

    def _ahead(self, n: int) -> bytes:
        """The next n bytes, or all that are there, which stay unread."""
        return b"".join([self._chunks[0][self._start :], *self._chunks[1:]])[:n] if self._chunks else b""

    def _advance(self, n: int) -> None:
        """Step over n bytes that are there."""
        self._have -= n
        self.offset += n
        self._start += n
        while self._chunks and self._start >= len(self._chunks[0]):
            self._start -= len(self._chunks.pop(0))

    def _pass_over(self, n: int, what: str) -> Waiting:
        buffered = min(n, self._have)
        self._advance(buffered)
        self._skip = n - buffered
        while self._skip:
            yield from self._wait(n - self._skip, n, what)
