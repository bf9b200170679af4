"""The words for what became of a domain that was to leave this host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from xenpv.migrate.sender import Settlement
    from xenpv.save.source_domain import Rollback, SourceState


def describe_state(state: SourceState) -> str:
    """Return what a domain does now, as the end of a sentence about it."""
    from xenpv.save.source_domain import SourceState  # noqa: PLC0415  NumPy

    return {
        SourceState.RUNNING: "runs on here",
        SourceState.PAUSED: "runs on here, paused",
        SourceState.SUSPENDED: "is suspended, as before",
        SourceState.SHUT_DOWN: "has shut down by itself",
        SourceState.DESTROYED: "is gone from here",
    }[state]


def describe_rollback(rollback: Rollback) -> str:
    """Return how undoing a failed save or migration went."""
    if rollback.state is None:
        return f"{rollback.label} could not be resumed: {rollback.error}"
    problem = "" if rollback.error is None else f", but undoing the failure failed: {rollback.error}"
    return f"{rollback.label} {describe_state(rollback.state)}{problem}"


def print_rollback(rollback: Rollback) -> None:
    """Print how undoing went, on standard error.

    If it failed, the error that follows says so.
    """
    if rollback.error is None:
        click.echo(f"xenpv: {describe_rollback(rollback)}", err=True)


def describe_settlement(settlement: Settlement, peer: str) -> str:
    """Return what became of a domain whose migration to ``peer`` is settled."""
    from xenpv.migrate.sender import Owner  # noqa: PLC0415  NumPy

    if settlement.owner is Owner.RECEIVER:
        return f"{settlement.label} is on {peer}, as dom{settlement.domid}; its copy here is destroyed"
    return f"{settlement.label} runs on here"
