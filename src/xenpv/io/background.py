"""Reading and writing files behind the caller's back: while one batch of pages goes out, the next one is made."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Self

Work = Callable[[], object]


class Behind:
    """A thread that does one piece of work at a time. As a context: when its block ends, so has the last piece.

    What a piece raises is raised by the next ``do`` or ``wait``. For work that cannot hang, as reading and writing a
    regular file cannot: who is interrupted still waits for it, since it uses memory that is about to go.
    """

    def __init__(self) -> None:
        self._todo: SimpleQueue[Work | None] = SimpleQueue()
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        self._busy = False
        self._thread: threading.Thread | None = None

    def do(self, work: Work) -> None:
        """Begin with it, as soon as what was begun before is done."""
        self.wait()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        self._busy = True
        self._todo.put(work)

    def wait(self) -> None:
        """Until all is done that was begun."""
        if self._busy:
            raised = self._done.get()
            self._busy = False
            if raised is not None:
                raise raised

    def _run(self) -> None:
        while (work := self._todo.get()) is not None:
            try:
                work()
            except BaseException as e:
                self._done.put(e)
            else:
                self._done.put(None)
            del work  # and the memory that it holds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        try:
            with contextlib.suppress(*() if kind is None else (BaseException,)):
                self.wait()
        finally:
            if self._busy:  # somebody interrupted the waiting
                self._done.get()
                self._busy = False
            if self._thread is not None:
                self._todo.put(None)
                self._thread.join()
                self._thread = None
