"""Signal handlers are set for a time, and what was there before comes back."""

from __future__ import annotations

import os
import signal

import pytest

from xenpv.io.signals import interruptible, uninterruptible


def test_interruptible_raises_on_each_stop_signal() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        before = signal.getsignal(number)
        with pytest.raises(KeyboardInterrupt), interruptible():
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) is before


def test_interruptible_leaves_an_ignored_signal_ignored() -> None:
    """``nohup xenpv save``: SIGHUP was ignored before, and must not stop the save."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handler_set_by_c_code_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python cannot set such a handler again: getsignal() gives None for it."""
    handler_of = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda n: None if n == signal.SIGTERM else handler_of(n))
    with uninterruptible():
        assert handler_of(signal.SIGTERM) is signal.SIG_DFL
        assert handler_of(signal.SIGHUP) is signal.SIG_IGN
