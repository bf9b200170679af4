"""``xenpv migrate``: a PV domain to another host."""

from __future__ import annotations

import shlex
from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from xenpv.cli.outcomes import describe_rollback, describe_settlement, print_rollback
from xenpv.cli.save import TIMEOUT
from xenpv.cli.terminal import JSON_LINES, NUMBER, SECONDS, print_json, print_json_line, progress_bar
from xenpv.frames import PAGE_SIZE
from xenpv.text import size

if TYPE_CHECKING:
    from xenpv.io.progress import Phase, Progress, ProgressCallback
    from xenpv.migrate.sender import Settlement

IDLE_TIMEOUT = click.option("--idle-timeout", "--patience", "idle_timeout", default=120.0, show_default=True,
                            type=SECONDS, metavar="SECONDS",
                            help="Fail if the peer is silent for so long.")  # fmt: skip
_EVENT_EVERY = 64  # print one of so many progress events as JSON, and the first of each iteration


@click.command()
@click.argument("target", metavar="DOM")
@click.argument("destination", metavar="[HOST]", required=False)
@click.option("--no-live", is_flag=True, help="Suspend the domain before anything is sent.")
@click.option("--max-iterations", type=int, default=5, show_default=True, metavar="N",
              help="Suspend the domain after N pre-copy iterations.")  # fmt: skip
@click.option("--target-dirty", type=int, default=50, show_default=True, metavar="PAGES",
              help="Suspend the domain when fewer pages than this are dirty.")  # fmt: skip
@click.option(
    "--max-downtime", type=SECONDS, metavar="SECONDS", help="Suspend the domain when the rest takes less than this."
)
@click.option("--bandwidth", type=NUMBER, metavar="BYTES", help="Limit the pre-copy to so many bytes a second: 100M.")
@click.option("-p", "--paused", is_flag=True, help="Leave the domain paused on HOST.")
@click.option("--ssh", default="ssh", show_default=True, metavar="COMMAND", help="Reach HOST with this command.")
@click.option("--receiver", default="xenpv receive", show_default=True, metavar="COMMAND",
              help="Run this command on HOST.")  # fmt: skip
@TIMEOUT
@IDLE_TIMEOUT
@click.option("--settle", is_flag=True, help="Ask HOST for the outcome of a migration that was cut off at its commit.")
@click.option("--take-back", is_flag=True,
              help="Resume such a domain here without asking. Use only if it runs nowhere else.")  # fmt: skip
@JSON_LINES
def migrate(
    target: str,
    destination: str | None,
    no_live: bool,
    max_iterations: int,
    target_dirty: int,
    max_downtime: float | None,
    bandwidth: int | None,
    paused: bool,
    ssh: str,
    receiver: str,
    timeout: float,
    idle_timeout: float,
    settle: bool,
    take_back: bool,
    as_json: bool,
) -> None:
    """Migrate a PV domain to another HOST, live or not.

    DOM is an id, a uuid or a name. HOST is reached by ssh, which runs `xenpv receive` there. HOST may also be
    tcp:HOST:PORT or unix:PATH, where `xenpv receive --listen` waits, or a pair of descriptors, fd:IN,OUT.

    The pre-copy sends the memory while the domain runs, and then what the domain wrote meanwhile, until little is
    left. Then it suspends, the rest is sent, and it runs on HOST. Xen without shadow paging (Debian's 4.20) keeps
    no dirty log: use --no-live.

    At every moment at most one side may run the domain. After a failure, or at Ctrl-C, it runs on here. If the
    connection drops during the commit, the outcome is unknown here: the domain stays suspended until --settle asks
    HOST.

    A domain with disks, network interfaces or a device model is refused: use xl migrate.

    \b
    Examples:
      xenpv migrate web otherhost
      xenpv migrate web otherhost --max-downtime 0.3 --bandwidth 100M --ssh "ssh -i key"
      xenpv migrate web tcp:127.0.0.1:7000     there: xenpv receive --listen tcp:127.0.0.1:7000
      xenpv migrate --settle web otherhost     after the connection dropped during the commit
    """
    if (destination is None) is not take_back:
        raise click.UsageError("give DOM and HOST, or --take-back and DOM")
    if settle and take_back:
        raise click.UsageError("--settle asks HOST, --take-back does not: use one of them")
    from xenpv.host.protocol import find_domain  # noqa: PLC0415
    from xenpv.host.xen.host import XenHost  # noqa: PLC0415
    from xenpv.migrate import sender as migration  # noqa: PLC0415  NumPy, and Xen's libraries
    from xenpv.migrate.transport import connect  # noqa: PLC0415
    from xenpv.save.file import configuration  # noqa: PLC0415
    from xenpv.save.precopy import PrecopyPolicy  # noqa: PLC0415

    live = None if no_live else PrecopyPolicy(max_iterations, target_dirty, max_downtime, bandwidth)
    with ExitStack() as stack:
        host = stack.enter_context(XenHost())
        domid = find_domain(host, target).domid
        if destination is None:
            _print_settlement(migration.take_back(host, domid), "", as_json)
            return
        link = stack.enter_context(
            connect(destination, ssh=shlex.split(ssh), receiver=shlex.split(receiver), idle_timeout=idle_timeout)
        )
        if settle:
            _print_settlement(migration.settle(host, domid, link), destination, as_json)
            return
        bar = _print_progress() if as_json else stack.enter_context(progress_bar())
        sent = migration.send_domain(
            host,
            domid,
            link,
            config=configuration(host, domid),
            live=live,
            paused=paused,
            suspend_timeout=timeout,
            on_event=print_event if as_json else _print_rollback,
            progress=bar,
        )
    if not as_json:
        state = "is paused" if paused else "runs"
        figures = f"{size(sent.summary.bytes)} sent, {sent.downtime:.2f} s down"
        click.echo(f"{sent.label} {state} on {destination} as dom{sent.domid}: {figures}", err=True)


def print_event(event: str, /, **details: Any) -> None:
    """Print an event as a line of JSON."""
    if (rollback := details.pop("rollback", None)) is not None:
        details["state"] = describe_rollback(rollback)
    print_json_line({"event": event, **details})


def _print_progress() -> ProgressCallback:
    """Print the first progress event of each phase and iteration, then a few.

    After the first, one of ``_EVENT_EVERY`` is printed.
    """
    counts: Counter[tuple[Phase, int]] = Counter()

    def print_progress(progress: Progress) -> None:
        transfer = progress.transfer
        assert transfer is not None
        counts[transfer.phase, transfer.iteration] += 1
        if counts[transfer.phase, transfer.iteration] % _EVENT_EVERY == 1:
            total = progress.total or 0
            print_event(
                "progress",
                phase=transfer.phase,
                round=transfer.iteration,
                pages=transfer.pages,
                round_pages=total,
                round_done=progress.done,
                dirty=transfer.dirty,
                bytes=transfer.bytes,
                rate=transfer.rate,
                downtime=transfer.downtime,
                left=(total - progress.done) * PAGE_SIZE,
            )

    return print_progress


def _print_rollback(event: str, /, **details: Any) -> None:
    """Print how the rollback of a failed migration went; ignore all other events."""
    if event == "kept":
        print_rollback(details["rollback"])


def _print_settlement(settlement: Settlement, peer: str, as_json: bool) -> None:
    outcome = describe_settlement(settlement, peer)
    if as_json:
        print_json({"settled": outcome})
    else:
        click.echo(outcome, err=True)
