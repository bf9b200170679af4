"""The position of a parser in its input.

A Cursor reads bytes, waits for more, and reports breaches of rules.
"""

from __future__ import annotations

from collections.abc import Generator

from xenpv.abi.x86 import PAGE_SIZE
from xenpv.errors import StreamError
from xenpv.findings import Rule, Severity
from xenpv.stream import rules
from xenpv.stream.byte_buffer import ByteBuffer
from xenpv.stream.events import Event, PageContent
from xenpv.stream.page_data import PageData
from xenpv.stream.rules import BreachHandler

PAGES_AT_ONCE = 256  # pages of one PageContent event at most: 1 MiB

Steps = Generator[Event | None, None, None]
"""A parser of part of a stream: yields events, and None where it needs more bytes."""

Wait = Generator[None, None, None]


class Cursor:
    """Reads one input for a parser.

    The parser is a chain of generators: each yields None where it needs more bytes.

    Attributes:
        buffer: the bytes.
        needed: bytes beyond the buffered ones that the parser waits for.
        record: name of the record that is being read, for errors.
        record_offset: offset of its first byte.
    """

    def __init__(self, on_breach: BreachHandler | None = None) -> None:
        self.buffer = ByteBuffer()
        self.needed = 0
        self.record: str | None = None
        self.record_offset = 0
        self._on_breach = on_breach

    @property
    def offset(self) -> int:
        """Offset of the next byte, from the start of the input."""
        return self.buffer.offset

    def start_record(self, record: str) -> None:
        """Start a record here: breaches are reported with its name and offset."""
        self.record = record
        self.record_offset = self.offset

    # --- breaches ----------------------------------------------------------------------------------------------------

    def report_or_raise(self, rule: Rule, message: str) -> None:
        """Report a breach after which reading can go on.

        Raises:
            StreamError: without a breach handler, if the rule's severity is ERROR.
        """
        if self._on_breach is not None:
            self._on_breach(rule, message, self.record_offset, self.record)
        elif rule.severity is Severity.ERROR:
            raise self._error(rule, message)

    def fatal_error(self, rule: Rule, message: str) -> StreamError:
        """Report a breach after which nothing can be read; return the error.

        The caller must raise it.
        """
        if self._on_breach is not None:
            self._on_breach(rule, message, self.record_offset, self.record)
        return self._error(rule, message)

    def report_error(self, error: StreamError, rule: Rule) -> None:
        """Report a breach whose error has more attributes than a handler takes.

        Raises:
            StreamError: that error, if there is no handler or the handler raises.
        """
        if self._on_breach is None:
            raise error
        try:
            self._on_breach(rule, error.reason, error.offset, error.record)
        except StreamError:
            raise error from None

    def _error(self, rule: Rule, message: str) -> StreamError:
        return rules.breach(rule, message, offset=self.record_offset, record=self.record)

    # --- bytes -------------------------------------------------------------------------------------------------------

    def read(self, n: int, part: str) -> Generator[None, None, memoryview]:
        """Read n bytes; ``part`` names them in the error.

        Raises Truncated where the input ends before.
        """
        while self.buffer.available < n:
            yield from self.wait(self.buffer.available, n, part)
        self.needed = 0
        return self.buffer.read(n)

    def skip(self, n: int, part: str) -> Wait:
        """Skip n bytes; ``part`` names them in the error.

        Raises Truncated where the input ends before.
        """
        self.buffer.discard(n)
        while self.buffer.skippable:
            yield from self.wait(n - self.buffer.skippable, n, part)

    def peek(self, n: int) -> Generator[None, None, bytes]:
        """Return the next n bytes without taking them; fewer where the input ends before."""
        while self.buffer.available < n and not self.buffer.ended:
            self.needed = n - self.buffer.available
            yield None
        return self.buffer.peek(n)

    def wait(self, have: int, want: int, part: str) -> Wait:
        """Wait for more bytes of something that has ``have`` of ``want``.

        Raises Truncated at the end of the input.
        """
        if self.buffer.ended:
            end = self.offset + self.buffer.available
            raise self.fatal_error(
                rules.TRUNCATED, f"{part} needs {want} bytes, the input ends after {have}, at {end:#x}"
            )
        self.needed = want - have
        yield None


def read_pages(cursor: Cursor, record: PageData) -> Steps:
    """Read the page content of a PAGE_DATA record.

    Each PageContent event has up to PAGES_AT_ONCE pages.
    """
    for first in range(0, record.pages, PAGES_AT_ONCE):
        offset = cursor.offset
        data = yield from cursor.read(min(PAGES_AT_ONCE, record.pages - first) * PAGE_SIZE, "page content")
        yield PageContent(offset, record, first, data)
