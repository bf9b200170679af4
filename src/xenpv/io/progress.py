"""Progress: how far a long operation is, for the terminal and for other callers."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple


class Phase(StrEnum):
    """The phase of a save or a migration."""

    COPYING = "copying"  # sending memory; the domain runs if the save is live
    SUSPENDING = "suspending"  # waiting for the domain to suspend
    FINISHING = "finishing"  # the stop-and-copy of a live save: the domain is suspended
    VERIFYING = "verifying"  # sending all pages once more, for the receiver to compare
    DONE = "done"


class Transfer(NamedTuple):
    """Figures of a save or a migration, which only these report.

    Attributes:
        phase: The current phase.
        iteration: The pass over memory, from 0.
        pages: Pages with content that were sent, in all iterations.
        dirty: Pages that the guest had written since they were sent, at the last look at Xen's dirty bitmap.
        bytes: Bytes of the stream so far.
        rate: Bytes per second in this iteration, including waits for a bandwidth limit.
        downtime: Estimated seconds of downtime if the domain were suspended now; None while unknown.
    """

    phase: Phase
    iteration: int = 0
    pages: int = 0
    dirty: int = 0
    bytes: int = 0
    rate: float = 0.0
    downtime: float | None = None


class Progress(NamedTuple):
    """How far an operation is.

    Attributes:
        done: How much of the current step is done, in ``unit``.
        total: The size of the current step; None if unknown, as for a pipe.
        step: The name of the current step; empty if the operation has only one.
        unit: What ``done`` counts: "bytes", "pages", …; empty for a mere fraction.
        transfer: Figures of a save or a migration; otherwise None.
    """

    done: int
    total: int | None = None
    step: str = ""
    unit: str = ""
    transfer: Transfer | None = None


ProgressCallback = Callable[[Progress], None]
"""Receives the progress now and then: after every batch of work and at every change of step."""
