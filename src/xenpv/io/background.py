"""BackgroundWorker: overlaps I/O with computing.

A thread reads or writes one batch of pages while the caller prepares the next.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from xenpv.io.signals import uninterruptible

Task = Callable[[], object]


class BackgroundWorker:
    """A thread that runs one task at a time.

    The next ``submit`` or ``wait`` raises the exception of a task. As a context manager, it waits for the last task
    and ends the thread. Use it only for tasks that cannot hang, such as reading and writing a regular file: even an
    interrupt waits for the current task, because that task uses memory that is about to be unmapped.
    """

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._results: SimpleQueue[BaseException | None] = SimpleQueue()
        self._busy = False
        self._thread: threading.Thread | None = None

    def submit(self, task: Task) -> None:
        """Start a task as soon as the previous one is done.

        Raises what the previous one raised.
        """
        self.wait()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        self._busy = True
        self._tasks.put(task)

    def wait(self) -> None:
        """Wait for the current task. Raises what it raised."""
        if self._busy:
            error = self._results.get()
            self._busy = False
            if error is not None:
                raise error

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except BaseException as e:
                self._results.put(e)
            else:
                self._results.put(None)
            del task  # and the memory that it holds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        try:
            with contextlib.suppress(*() if kind is None else (BaseException,)):
                self.wait()
        finally:
            with uninterruptible():  # the thread works in memory that the caller is about to unmap
                if self._busy:  # an interrupt ended the wait
                    self._results.get()
                    self._busy = False
                if self._thread is not None:
                    self._tasks.put(None)
                    self._thread.join()
                    self._thread = None
