"""Writes the records of a save to its sink.

Page content is written in the background where that is safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Self

from xenpv.io.background import BackgroundWorker
from xenpv.io.sink import Sink
from xenpv.save.meter import TransferMeter
from xenpv.stream.fields import Buffer
from xenpv.stream.framing import Record
from xenpv.stream.libxl import LibxlEnd
from xenpv.stream.records import End
from xenpv.stream.writer import Writer


class StreamOutput:
    """The stream of one save: everything that is written is counted by ``meter``.

    As a context manager, it ends with all pages written, whether or not the body raised.
    """

    def __init__(self, sink: Sink, writer: Writer, meter: TransferMeter) -> None:
        self.meter = meter
        self._sink = sink
        self._writer = writer
        self._worker = BackgroundWorker()
        self._last_buffers: Sequence[Buffer] = ()  # kept until the next: malloc then reuses their memory

    def __enter__(self) -> Self:
        self._worker.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._worker.__exit__(kind, e, tb)

    def start(self) -> None:
        """Write the headers."""
        self._write(self._writer.start())

    def send(self, record: Record) -> None:
        """Write a record other than PAGE_DATA."""
        self._write(self._writer.send(record))

    def send_pages(self, entries: bytes, contents: list[Buffer], pages: int) -> None:
        """Write a PAGE_DATA record.

        ``contents`` must stay as they are until the next call, or ``wait``.

        Args:
            entries: Types and pfns as the record has them.
            contents: Page content in the entries' order.
            pages: How many pages that content is.
        """
        buffers = self._last_buffers = self._writer.pages(entries, contents)
        if self._sink.is_regular_file:
            self._worker.submit(partial(self._sink.write, buffers))
        else:
            self._sink.write(buffers)
        self._count(pages)

    def wait(self) -> None:
        """Wait until all pages are written. Raises what writing raised."""
        self._worker.wait()

    def finish(self) -> None:
        """Write the end of the stream and of its envelope."""
        self._last_buffers = ()
        self.send(End())
        if not self._writer.done:
            self.send(LibxlEnd())

    def _write(self, buffers: Sequence[Buffer]) -> None:
        self.wait()
        self._sink.write(buffers)
        self._count()

    def _count(self, pages: int = 0) -> None:
        self.meter.count(self._writer.offset - self.meter.bytes, pages)
