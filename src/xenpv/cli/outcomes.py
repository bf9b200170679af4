"""Sentences on the outcome of a save or migration: a domain's place and state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from xenpv.migrate.sender import Settlement
    from xenpv.save.source_domain import Rollback, SourceState


def describe_state(state: SourceState) -> str:
    """Return a domain's state as the predicate of a sentence: "runs on here"."""
    from xenpv.save.source_domain import SourceState  # noqa: PLC0415  NumPy

    return {
        SourceState.RUNNING: "runs on here",
        SourceState.PAUSED: "runs on here, paused",
        SourceState.SUSPENDED: "is suspended, as before",
        SourceState.SHUT_DOWN: "has shut down by itself",
        SourceState.DESTROYED: "is gone from here",
    }[state]


def describe_rollback(rollback: Rollback) -> str:
    """Return a sentence on the rollback of a failed save or migration."""
    if rollback.state is None:
        return f"{rollback.label} could not be resumed: {rollback.error}"
    problem = "" if rollback.error is None else f", but undoing the failure failed: {rollback.error}"
    return f"{rollback.label} {describe_state(rollback.state)}{problem}"


def print_rollback(rollback: Rollback) -> None:
    """Print on standard error how the rollback went.

    A rollback that failed prints nothing here; the error that is raised next reports it.
    """
    if rollback.error is None:
        click.echo(f"xenpv: {describe_rollback(rollback)}", err=True)


def describe_settlement(settlement: Settlement, peer: str) -> str:
    """Return a sentence on the outcome of a migration to ``peer`` that was settled."""
    from xenpv.migrate.sender import Owner  # noqa: PLC0415  NumPy

    if settlement.owner is Owner.RECEIVER:
        return f"{settlement.label} is on {peer}, as dom{settlement.domid}; its copy here is destroyed"
    return f"{settlement.label} runs on here"
