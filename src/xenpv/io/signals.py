"""Being asked to end while a domain stands still: it has to run again first."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_ASKS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Signals that ask this program to end are ignored while the body runs. In the main thread, which gets them."""
    with _all(signal.SIG_IGN):
        yield


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP are KeyboardInterrupt, as SIGINT is, while the body runs: so that what it does is undone."""

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    with _all(interrupt):
        yield


@contextmanager
def _all(handler: signal._HANDLER) -> Iterator[None]:
    kept: dict[signal.Signals, signal._HANDLER] = {}
    with contextlib.suppress(ValueError):  # of another thread
        for one in _ASKS:
            kept[one] = signal.signal(one, handler)
    try:
        yield
    finally:
        for one, before in kept.items():
            signal.signal(one, before)
