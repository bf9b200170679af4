"""Writes a stream again from what was read of it: the bytes must be the same."""

from __future__ import annotations

from tests.support.stream_reading import Reading, one_chunk, read
from xenpv.stream import libxl
from xenpv.stream.envelope import Envelope, Kind
from xenpv.stream.events import DomainHeader, PageContent
from xenpv.stream.fields import Buffer
from xenpv.stream.framing import Record
from xenpv.stream.page_data import PageData
from xenpv.stream.writer import Writer


def rewrite_stream(data: bytes) -> bytes:
    """Read a stream, and return what a Writer makes of it."""
    reading = read(one_chunk(data), pages=True)
    assert reading.error is None, reading.error
    return b"".join(b"".join(buffers) for buffers in rewrite_events(reading))


def rewrite_events(reading: Reading) -> list[list[Buffer]]:
    """Return what a Writer makes of the events of a stream, record by record."""
    first = reading.events[0]
    kind = Kind.LIBXC if first.name == "image header" else Kind.LIBXL
    config = b""
    if isinstance(first, Envelope):
        kind, config = first.kind, first.config
    header = next(event for event in reading.events if isinstance(event, DomainHeader))
    writer = Writer(kind, guest=header.guest, xen=(header.xen_major, header.xen_minor), config=config)
    out = [writer.start()]
    waiting: PageData | None = None
    contents: list[Buffer] = []
    for event in reading.events:
        if isinstance(event, PageContent):
            contents.append(event.raw)
            continue
        if waiting is not None:
            out.append(writer.pages(waiting.raw, contents))
        waiting, contents = (event, []) if isinstance(event, PageData) else (None, [])
        if isinstance(event, Record) and waiting is None and not isinstance(event, libxl.LibxcContext):
            out.append(writer.send(event))
    assert writer.done
    return out
