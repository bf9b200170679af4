"""How far a save is: counted in one place, told to whoever asks, and held back to a bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from xenpv.frames import PAGE_SIZE

_NAP = 0.25  # seconds: the longest sleep, so that who interrupts is heard


class Phase(StrEnum):
    """What is being done."""

    COPYING = "copying"  # the domain runs, if the save is live
    SUSPENDING = "suspending"  # it is asked to, and is waited for
    FINISHING = "finishing"  # the last pass of a live save: it stands still
    VERIFYING = "verifying"  # all of it once more, to be compared
    DONE = "done"


class Status(NamedTuple):
    """How far a save is. ``round``: the pass over memory, the first is 0. Pages are those with content.

    ``pages`` were sent, in all rounds; ``round_done`` of the ``round_pages`` of this one. ``dirty``: how many pages the
    guest was last found to have written since they were sent. ``bytes`` of the stream, ``rate`` bytes a second of late,
    waits for a bandwidth counted. ``downtime``: for how many seconds the domain would stand still if it were stopped
    now, None as long as nobody can tell.
    """

    phase: Phase
    round: int = 0
    pages: int = 0
    round_pages: int = 0
    round_done: int = 0
    dirty: int = 0
    bytes: int = 0
    rate: float = 0.0
    downtime: float | None = None


Progress = Callable[[Status], None]
"""progress(status): called after every batch of pages, and whenever the phase changes."""


class Meter:
    """Counts what is written. ``bandwidth``: bytes a second that are not exceeded, None for as fast as it goes."""

    def __init__(self, progress: Progress | None, bandwidth: int | None = None) -> None:
        self.bandwidth = bandwidth
        self.pages = 0
        self.bytes = 0
        self.round = -1
        self._progress = progress
        self._phase = Phase.COPYING
        self._round_pages = self._round_done = self._dirty = 0
        self._began = self._since = time.monotonic()
        self._at_round = 0  # bytes when the round began
        self._slept = 0.0  # seconds of the round

    def begin(self, phase: Phase, pages: int, *, dirty: int = 0) -> None:
        """A round begins, in which so many pages are to be sent."""
        self.round += 1
        self._phase, self._round_pages, self._round_done, self._dirty = phase, pages, 0, dirty
        self._since, self._at_round, self._slept = time.monotonic(), self.bytes, 0.0
        self._tell()

    def enter(self, phase: Phase) -> None:
        """The phase changes within a round."""
        self._phase = phase
        self._tell()

    def wrote(self, count: int, pages: int = 0) -> None:
        """So many bytes were written, ``pages`` of content among them. Sleeps when that was too fast."""
        self.bytes += count
        self.pages += pages
        self._round_done += pages
        if self.bandwidth:
            self._hold_back(self.bandwidth)
        if pages:
            self._tell()

    def _hold_back(self, bandwidth: int) -> None:
        while (early := (self.bytes - self._at_round) / bandwidth - (time.monotonic() - self._since)) > 0:
            before = time.monotonic()
            time.sleep(min(early, _NAP))
            self._slept += time.monotonic() - before

    @property
    def rate(self) -> float:
        """Bytes a second in this round."""
        return (self.bytes - self._at_round) / max(time.monotonic() - self._since, 1e-6)

    @property
    def speed(self) -> float:
        """Bytes a second in this round if nobody held it back: what a domain's standing still would be at."""
        return (self.bytes - self._at_round) / max(time.monotonic() - self._since - self._slept, 1e-6)

    def downtime(self, pages: int) -> float | None:
        """How many seconds so many pages would take. None as long as nobody can tell."""
        speed = self.speed
        return pages * PAGE_SIZE / speed if speed else None

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(
                Status(
                    phase=self._phase,
                    round=self.round,
                    pages=self.pages,
                    round_pages=self._round_pages,
                    round_done=self._round_done,
                    dirty=self._dirty,
                    bytes=self.bytes,
                    rate=self.rate,
                    downtime=self.downtime(max(self._dirty, self._round_pages - self._round_done)),
                )
            )
