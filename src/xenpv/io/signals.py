"""Signal handlers: work is undone or completed before the program ends."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@contextmanager
def uninterruptible() -> Iterator[None]:
    """Ignore SIGINT, SIGTERM, SIGHUP and SIGQUIT while the body runs.

    Without effect outside the main thread.
    """
    with _handled_by(signal.SIG_IGN):
        yield


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, SIGHUP and SIGQUIT during the body.

    The body's cleanup then runs as after Ctrl-C. A signal that is ignored stays ignored: nohup does that to SIGHUP.
    Without effect outside the main thread.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    with _handled_by(interrupt):
        yield


@contextmanager
def _handled_by(handler: signal._HANDLER) -> Iterator[None]:
    previous: dict[signal.Signals, signal._HANDLER] = {}
    with contextlib.suppress(ValueError):  # only the main thread gets signals, and may set handlers
        for number in _STOP_SIGNALS:
            if signal.getsignal(number) not in {signal.SIG_IGN, None}:  # None: set by C code, and not to be set again
                previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler_before in previous.items():
            signal.signal(number, handler_before)
