"""Feeds a Reader in every way, and gives its events in a form that can be compared."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from xenpv.errors import StreamError
from xenpv.findings import Rule
from xenpv.stream.envelope import Kind
from xenpv.stream.events import Event, PageContent
from xenpv.stream.reader import Reader


@dataclass(frozen=True)
class ReportedBreach:
    """A breach that a reader reported to its handler."""

    rule: Rule
    message: str
    offset: int
    record: str | None


@dataclass
class Reading:
    """The events, breaches and error of one reading of a stream."""

    events: list[Event] = field(default_factory=list)
    comparable: list[tuple[object, ...]] = field(default_factory=list)  # the events, as values that == compares
    breaches: list[ReportedBreach] = field(default_factory=list)
    error: StreamError | None = None
    done: bool = False
    trailing: int = 0
    skipped: int = 0

    @property
    def names(self) -> list[str]:
        return [event.name for event in self.events]

    @property
    def rules(self) -> set[Rule]:
        return {breach.rule for breach in self.breaches}

    @property
    def content(self) -> bytes:
        """The content of all pages, of a reading with PageContent events."""
        return b"".join(event.raw for event in self.events if isinstance(event, PageContent))


def comparable(value: object) -> Any:
    """A value that can be compared with ==: an array as its type, shape and bytes, a dataclass as its fields."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, memoryview):
        return bytes(value)
    if is_dataclass(value) and not isinstance(value, type):
        return (type(value).__name__, *((f.name, comparable(getattr(value, f.name))) for f in fields(value)))
    return value


def one_chunk(data: bytes) -> list[bytes]:
    return [data]


def single_bytes(data: bytes) -> Iterator[bytes]:
    return (data[i : i + 1] for i in range(len(data)))


def split_at(data: bytes, at: Iterable[int]) -> list[bytes]:
    """Split the data at offsets; pieces may be empty."""
    return [data[a:b] for a, b in pairwise([0, *sorted(at), len(data)])]


def random_chunks(data: bytes, seed: int) -> list[bytes]:
    rng = random.Random(seed)
    return split_at(data, [rng.randrange(len(data) + 1) for _ in range(rng.randrange(40))])


def read(
    chunks: Iterable[bytes],
    *,
    pages: bool = False,
    collect: bool = False,
    eof: bool = True,
    kind: Kind | None = None,
) -> Reading:
    """Feed all chunks, and take every event as soon as it comes. A StreamError ends the reading and is kept.

    Args:
        chunks: the pieces of the stream.
        pages: give page content.
        collect: report breaches to a handler; otherwise the first one raises.
        eof: mark the end of the input after the chunks.
        kind: the kind of stream; None detects it.
    """
    out = Reading()

    def on_breach(rule: Rule, message: str, offset: int, record: str | None) -> None:
        out.breaches.append(ReportedBreach(rule, message, offset, record))

    reader = Reader(on_breach=on_breach if collect else None, pages=pages, kind=kind)
    try:
        for chunk in chunks:
            reader.feed(chunk)
            _drain(reader, out)
        if eof:
            reader.feed_eof()
            _drain(reader, out)
    except StreamError as e:
        out.error = e
    out.done, out.trailing = reader.done, reader.trailing
    return out


def read_seeking(data: bytes, *, step: int = 1000) -> Reading:
    """Read as a caller that can seek: skip all that is skippable, and feed what is needed, or ``step`` if more."""
    out = Reading()
    reader = Reader()
    position = 0
    try:
        while not reader.done:
            _drain(reader, out)
            if reader.done:
                break
            if reader.skippable and position < len(data):
                n = min(reader.skippable, len(data) - position)
                reader.skip(n)
                out.skipped += n
            elif position < len(data):
                n = min(max(reader.needed, step), len(data) - position)
                reader.feed(data[position : position + n])
            else:
                n = 0
                reader.feed_eof()
            position += n
    except StreamError as e:
        out.error = e
    out.done, out.trailing = reader.done, reader.trailing
    return out


def _drain(reader: Reader, out: Reading) -> None:
    while (event := reader.next_event()) is not None:
        out.events.append(event)
        out.comparable.append(comparable(event))
