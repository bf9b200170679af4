"""``xenpv migrate``: a PV domain to another host."""

from __future__ import annotations

import shlex
from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from xenpv.cli.save import TIMEOUT
from xenpv.cli.terminal import JSON, NUMBER, print_json, print_json_line, progress_bar
from xenpv.frames import PAGE_SIZE
from xenpv.text import size

if TYPE_CHECKING:
    from xenpv.io.progress import Phase, Progress, ProgressCallback

PATIENCE = click.option("--patience", type=click.FloatRange(min=0, min_open=True), default=120.0, metavar="SECONDS",
                        help="For how long the other side may be silent; 120 unless said.")  # fmt: skip
_EVENT_EVERY = 64  # progress events, of which one is printed as JSON, beside the first of each round


@click.command()
@click.argument("target", metavar="DOM")
@click.argument("where", metavar="[HOST]", required=False)
@click.option("--no-live", is_flag=True, help="Suspend it before anything is sent.")
@click.option("--max-iterations", type=int, default=5, metavar="N", help="Rounds while it runs; 5 unless said.")
@click.option("--target-dirty", type=int, default=50, metavar="PAGES",
              help="Stop it when fewer pages are dirty; 50 unless said.")  # fmt: skip
@click.option("--max-downtime", type=float, metavar="SECONDS", help="Stop it when the rest takes no longer than that.")
@click.option("--bandwidth", type=NUMBER, metavar="BYTES", help="Bytes a second while it runs, such as 100M.")
@click.option("-p", "--paused", is_flag=True, help="Leave it paused there.")
@click.option("--ssh", default="ssh", show_default=True, metavar="COMMAND", help="What reaches HOST.")
@click.option("--receiver", default="xenpv receive", show_default=True, metavar="COMMAND", help="What runs there.")
@TIMEOUT
@PATIENCE
@click.option("--settle", is_flag=True, help="Ask HOST what became of a domain whose last word was lost.")
@click.option(
    "--take-back", is_flag=True, help="Let such a domain go on here: it does not run elsewhere, you know that."
)
@JSON
def migrate(
    target: str,
    where: str | None,
    no_live: bool,
    max_iterations: int,
    target_dirty: int,
    max_downtime: float | None,
    bandwidth: int | None,
    paused: bool,
    ssh: str,
    receiver: str,
    timeout: float,
    patience: float,
    settle: bool,
    take_back: bool,
    as_json: bool,
) -> None:
    """Move a PV domain to HOST, while it runs.

    DOM is an id, a uuid or a name. HOST is reached by ssh, where `xenpv receive` is started; or it is tcp:HOST:PORT or
    unix:PATH, where one listens, or fd:IN,OUT. Its memory is sent, and sent again where it was written meanwhile, until
    the rest is small; then it stops, the rest is sent, and it runs there. Xen without shadow paging (Debian's 4.20)
    cannot tell what was written: --no-live.

    At every moment one side alone may run it (migration.md). If anything goes wrong, or at Ctrl-C, it runs on
    here. Only when the other side falls silent right after it was told to go ahead can nobody here know: then the
    domain stays suspended, and --settle asks. Of a domain with disks or networks use xl migrate.

    \b
    xenpv migrate web otherhost
    xenpv migrate web otherhost --max-downtime 0.3 --bandwidth 100M --ssh "ssh -i key"
    xenpv migrate web tcp:127.0.0.1:7000           to: xenpv receive --listen tcp:127.0.0.1:7000
    xenpv migrate --settle web otherhost           when the last word was lost
    """
    if (where is None) is not take_back:
        raise click.UsageError("say DOM and HOST, or --take-back and DOM")
    if settle and take_back:
        raise click.UsageError("--settle asks HOST, --take-back asks nobody: say one of them")
    from xenpv.host.protocol import find_domain  # noqa: PLC0415
    from xenpv.host.xen.host import XenHost  # noqa: PLC0415
    from xenpv.io.signals import interruptible  # noqa: PLC0415
    from xenpv.migrate import sender as migration  # noqa: PLC0415  NumPy, and Xen's libraries
    from xenpv.migrate.transport import connect  # noqa: PLC0415
    from xenpv.save.file import configuration  # noqa: PLC0415
    from xenpv.save.precopy import Precopy  # noqa: PLC0415

    live = None if no_live else Precopy(max_iterations, target_dirty, max_downtime, bandwidth)
    with ExitStack() as stack:
        host = stack.enter_context(XenHost())
        domid = find_domain(host, target).domid
        if where is None:
            _settled(migration.take_back(host, domid), as_json)
            return
        stack.enter_context(interruptible())
        link = stack.enter_context(
            connect(where, ssh=shlex.split(ssh), receiver=shlex.split(receiver), patience=patience)
        )
        if settle:
            _settled(migration.settle(host, domid, link), as_json)
            return
        bar = _print_progress() if as_json else stack.enter_context(progress_bar())
        given = migration.give(
            host,
            domid,
            link,
            config=configuration(host, domid),
            live=live,
            paused=paused,
            timeout=timeout,
            tell=print_event if as_json else _tell_kept,
            progress=bar,
        )
    if not as_json:
        summary = given.summary
        sent = f"{size(summary.bytes)} sent"
        state = "is paused" if paused else "runs"
        click.echo(
            f"{given.name} {state} on {where} as dom{given.domid}: {sent}, {given.downtime:.2f} s down", err=True
        )


def print_event(what: str, **numbers: Any) -> None:
    """What has happened, as a line of JSON."""
    print_json_line({"event": what, **numbers})


def _print_progress() -> ProgressCallback:
    """Print progress events: the first of each phase and iteration, and then one of _EVENT_EVERY."""
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


def _tell_kept(what: str, **numbers: Any) -> None:
    if what == "kept":
        click.echo(f"xenpv: {numbers['state']}", err=True)


def _settled(what: str, as_json: bool) -> None:
    if as_json:
        print_json({"settled": what})
    else:
        click.echo(what, err=True)
