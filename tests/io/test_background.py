"""BackgroundWorker: one task at a time, and its errors."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from xenpv.io.background import BackgroundWorker


def test_worker_runs_tasks_in_order_until_exit() -> None:
    completed: list[int] = []
    with BackgroundWorker() as worker:
        for n in range(50):
            worker.submit(lambda n=n: completed.append(n))  # type: ignore[misc]
        worker.wait()
        assert completed == list(range(50))
        worker.submit(lambda: completed.append(50))
    assert completed[-1] == 50


def test_worker_submit_waits_for_the_previous_task() -> None:
    first, second = threading.Event(), threading.Event()
    with BackgroundWorker() as worker:
        worker.submit(lambda: first.wait(5))
        assert not first.is_set()  # we are here while it waits
        threading.Timer(0.01, first.set).start()
        worker.submit(second.set)
        assert first.is_set()  # the second begins when the first is done


def test_worker_error_is_raised_once_by_the_next_call() -> None:
    def fail() -> None:
        raise OSError(28, "full")

    completed: list[int] = []
    with BackgroundWorker() as worker:
        worker.submit(fail)
        with pytest.raises(OSError, match="full"):  # the text that the task raised
            worker.submit(lambda: completed.append(1))
        worker.submit(lambda: completed.append(2))
    assert completed == [2]
    with pytest.raises(OSError, match="full"), BackgroundWorker() as worker:
        worker.submit(fail)


def test_worker_body_error_wins_after_the_task_ended() -> None:
    slow, completed = threading.Event(), threading.Event()

    def work() -> None:
        slow.wait(5)
        completed.set()
        raise OSError(28, "full")

    def fail_meanwhile() -> None:
        with BackgroundWorker() as worker:
            worker.submit(work)
            threading.Timer(0.01, slow.set).start()
            raise KeyError("another")

    with pytest.raises(KeyError):
        fail_meanwhile()
    assert completed.is_set()
    assert threading.active_count() <= 2  # its thread has ended; a timer may not have


def test_worker_ends_its_task_before_a_second_interrupt_is_heard() -> None:
    """The task works in memory that the caller unmaps after the body: not even two Ctrl-C may leave it running."""
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        may_end.wait(5)
        ended.set()

    def interrupt_twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        may_end.set()

    def run() -> None:
        with BackgroundWorker() as worker:
            worker.submit(work)
            begun.wait(5)
            threading.Thread(target=interrupt_twice).start()
            worker.wait()

    with pytest.raises(KeyboardInterrupt):
        run()
    assert ended.is_set()
