"""CheckpointBuffer: holds events until the next checkpoint completes them.

Source: xen.git:docs/specs/libxc-migration-stream.pandoc CHECKPOINT, tools/libs/guest/xg_sr_restore.c
handle_checkpoint()
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from xenpv.errors import Unsupported
from xenpv.frames import PAGE_SIZE
from xenpv.io.tempfile import unlinked_file
from xenpv.stream.events import Event, PageDeltas
from xenpv.stream.framing import Record
from xenpv.stream.page_data import PageData, ReadInto

_RECORDS_MAX = 1 << 30  # bytes of records, pages aside, in memory: p2m frames of 16 TiB are 64 MiB
_CHUNK = 1 << 20  # bytes copied at a time
_DELTA_END = 40  # bytes of memory per item of PageDeltas.ends


class CheckpointBuffer:
    """Events since a checkpoint, in order.

    Page content and deltas are in a temporary file until ``close``.
    """

    def __init__(self) -> None:
        self._events: list[tuple[Event, int]] = []  # with the offset of the content in the file
        self._fd = unlinked_file()
        self._file_size = 0
        self._records_size = 0  # bytes in memory

    def add(self, event: Event, read_into: ReadInto) -> None:
        """Add an event; ``read_into`` reads its page content.

        Unsupported if the records take too much memory.
        """
        self._events.append((event if not isinstance(event, PageDeltas) else replace(event, data=b""), self._file_size))
        match event:
            case PageData():
                self._records_size += len(event.raw)
                buffer, remaining = memoryview(bytearray(_CHUNK)), event.pages * PAGE_SIZE
                while remaining:
                    chunk = buffer[: min(remaining, _CHUNK)]
                    read_into(chunk)
                    self._append(chunk)
                    remaining -= len(chunk)
            case PageDeltas():
                self._records_size += len(event.raw) + _DELTA_END * len(event.ends)
                self._append(memoryview(event.data))
            case Record():
                self._records_size += event.length
        if self._records_size > _RECORDS_MAX:
            problem = f"more than {_RECORDS_MAX >> 20} MiB of records, pages aside, after one checkpoint"
            raise Unsupported(problem, offset=event.offset, record=event.name)

    def _append(self, data: memoryview) -> None:
        while data:
            n = os.pwrite(self._fd, data, self._file_size)
            self._file_size, data = self._file_size + n, data[n:]

    def events(self) -> Iterator[tuple[Event, ReadInto]]:
        """Yield all events, each with the function that reads its page content."""
        for event, offset in self._events:
            read_into = partial(self._read_into, [offset])
            if isinstance(event, PageDeltas):
                data = bytearray(event.ends[-1])
                read_into(memoryview(data))
                yield replace(event, data=bytes(data)), read_into
            else:
                yield event, read_into

    def clear(self) -> None:
        """Drop all events."""
        self._events, self._file_size, self._records_size = [], 0, 0
        os.ftruncate(self._fd, 0)

    def _read_into(self, position: list[int], buffer: memoryview) -> None:
        while buffer:
            data = os.pread(self._fd, min(len(buffer), _CHUNK), position[0])
            if not data:
                raise ValueError(f"no content at {position[0]:#x}: the events were dropped, or read twice")
            buffer[: len(data)] = data
            position[0], buffer = position[0] + len(data), buffer[len(data) :]

    def close(self) -> None:
        """Close the temporary file; may be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
