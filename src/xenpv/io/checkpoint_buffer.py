"""What comes behind a checkpoint is kept until the next one says that it is whole, as the specification has it.

xen.git:docs/specs/libxc-migration-stream.pandoc CHECKPOINT, tools/libs/guest/xg_sr_restore.c handle_checkpoint().
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
from xenpv.stream.pagedata import PageData, ReadInto

_RECORDS_MAX = 1 << 30  # bytes of records, pages aside, that are kept in memory: p2m frames of 16 TiB are 64 MiB
_AT_ONCE = 1 << 20
_END = 40  # bytes that a number of PageDeltas.ends takes


class Checkpoints:
    """Events behind a checkpoint, in order; page content, and what has changed in pages, is in a file without a name,
    which ``close`` gives back.
    """

    def __init__(self) -> None:
        self._events: list[tuple[Event, int]] = []
        self._fd = unlinked_file()
        self._end = 0  # of the file
        self._kept = 0  # bytes in memory

    def keep(self, event: Event, take: ReadInto) -> None:
        """Put one event aside. Unsupported when records take more memory than any checkpoint's would."""
        self._events.append((event if not isinstance(event, PageDeltas) else replace(event, data=b""), self._end))
        match event:
            case PageData():
                self._kept += len(event.raw)
                buffer, left = memoryview(bytearray(_AT_ONCE)), event.pages * PAGE_SIZE
                while left:
                    some = buffer[: min(left, _AT_ONCE)]
                    take(some)
                    self._write(some)
                    left -= len(some)
            case PageDeltas():
                self._kept += len(event.raw) + _END * len(event.ends)
                self._write(memoryview(event.data))
            case Record():
                self._kept += event.length
        if self._kept > _RECORDS_MAX:
            what = f"more than {_RECORDS_MAX >> 20} MiB of records, pages aside, behind one checkpoint"
            raise Unsupported(what, offset=event.offset, record=event.name)

    def _write(self, some: memoryview) -> None:
        while some:
            n = os.pwrite(self._fd, some, self._end)
            self._end, some = self._end + n, some[n:]

    def release(self) -> Iterator[tuple[Event, ReadInto]]:
        """The next checkpoint has come: all events, each with its content."""
        for event, at in self._events:
            take = partial(self._take, [at])
            if isinstance(event, PageDeltas):
                data = bytearray(event.ends[-1])
                take(memoryview(data))
                yield replace(event, data=bytes(data)), take
            else:
                yield event, take
        self._events, self._end, self._kept = [], 0, 0
        os.ftruncate(self._fd, 0)

    def _take(self, place: list[int], into: memoryview) -> None:
        while into:
            data = os.pread(self._fd, min(len(into), _AT_ONCE), place[0])
            into[: len(data)] = data
            place[0], into = place[0] + len(data), into[len(data) :]

    def close(self) -> None:
        """Give the file back."""
        os.close(self._fd)
