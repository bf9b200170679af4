"""Counts what a save has written, limits its bandwidth and reports its progress."""

from __future__ import annotations

import time

from xenpv.frames import PAGE_SIZE
from xenpv.io.progress import Phase, Progress, ProgressCallback, Transfer

_NAP_MAX = 0.25  # seconds: the longest sleep, so that an interrupt takes effect soon


class TransferMeter:
    """Counts bytes and pages of a stream, and sleeps where they exceed a bandwidth.

    Args:
        progress: Called after every batch of pages and whenever the phase changes.
        bandwidth: Bytes per second; None for no limit.
    """

    def __init__(self, progress: ProgressCallback | None, bandwidth: int | None = None) -> None:
        self.pages = 0
        self.bytes = 0
        self.iteration = -1
        self._bandwidth = bandwidth
        self._progress = progress
        self._phase = Phase.COPYING
        self._iteration_pages = self._iteration_done = self._dirty = 0
        self._iteration_start = time.monotonic()
        self._bytes_before_iteration = 0
        self._slept = 0.0  # seconds in this iteration

    def begin_iteration(self, phase: Phase, pages: int, *, dirty: int = 0) -> None:
        """Start the next iteration, which is to send ``pages`` pages."""
        self.iteration += 1
        self._phase, self._iteration_pages, self._iteration_done, self._dirty = phase, pages, 0, dirty
        self._iteration_start, self._bytes_before_iteration, self._slept = time.monotonic(), self.bytes, 0.0
        self._report()

    def enter(self, phase: Phase) -> None:
        """Change the phase within an iteration."""
        self._phase = phase
        self._report()

    def lift_bandwidth_limit(self) -> None:
        """Write as fast as possible from now on."""
        self._bandwidth = None

    def count(self, written: int, pages: int = 0) -> None:
        """Count written bytes and the pages of content among them.

        Sleeps if that exceeded the bandwidth.
        """
        self.bytes += written
        self.pages += pages
        self._iteration_done += pages
        if self._bandwidth:
            self._throttle(self._bandwidth)
        if pages:
            self._report()

    def _throttle(self, bandwidth: int) -> None:
        while (early := self._iteration_bytes / bandwidth - (time.monotonic() - self._iteration_start)) > 0:
            before = time.monotonic()
            time.sleep(min(early, _NAP_MAX))
            self._slept += time.monotonic() - before

    @property
    def _iteration_bytes(self) -> int:
        return self.bytes - self._bytes_before_iteration

    @property
    def rate(self) -> float:
        """Bytes per second in this iteration."""
        return self._iteration_bytes / max(time.monotonic() - self._iteration_start, 1e-6)

    @property
    def unlimited_rate(self) -> float:
        """Bytes per second in this iteration, without waits for the bandwidth limit.

        The stop-and-copy sends at this rate.
        """
        return self._iteration_bytes / max(time.monotonic() - self._iteration_start - self._slept, 1e-6)

    def _downtime(self, pages: int) -> float | None:
        rate = self.unlimited_rate
        return pages * PAGE_SIZE / rate if rate else None

    def _report(self) -> None:
        if self._progress is None:
            return
        transfer = Transfer(
            phase=self._phase,
            iteration=self.iteration,
            pages=self.pages,
            dirty=self._dirty,
            bytes=self.bytes,
            rate=self.rate,
            downtime=self._downtime(max(self._dirty, self._iteration_pages - self._iteration_done)),
        )
        step = f"iteration {self.iteration}: {self._phase}"
        self._progress(Progress(self._iteration_done, self._iteration_pages, step, "pages", transfer))
