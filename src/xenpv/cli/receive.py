"""``xenpv receive``: the other end of ``xenpv migrate``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import click

from xenpv.cli.migrate import PATIENCE
from xenpv.cli.terminal import JSON, print_json_line, progress_bar
from xenpv.text import printable


@click.command()
@click.option("--listen", "where", metavar="ADDRESS",
              help="Wait at unix:PATH or tcp:ADDRESS:PORT; standard input and output unless said.")  # fmt: skip
@click.option("--anywhere", is_flag=True, help="Listen at an address that other machines reach: nothing is encrypted.")
@PATIENCE
@JSON
def receive(where: str | None, anywhere: bool, patience: float, as_json: bool) -> None:
    """Take one domain that `xenpv migrate` sends: on standard input and output, as ssh starts it, or at an address.

    It is refused before anything is sent if it does not fit: too little memory, or a domain of its name or uuid here
    already. It comes under the name NAME--incoming, paused, and is checked as it comes; it has its own name, and runs,
    once the sender has given it up. If anything goes wrong before, nothing is left of it.

    \b
    xenpv receive --listen unix:/run/xenpv.sock
    xenpv receive --listen tcp:127.0.0.1:7000      and ssh -L or -R leads there
    """
    from xenpv.host.xen.host import XenHost  # noqa: PLC0415
    from xenpv.io.signals import interruptible  # noqa: PLC0415  NumPy, and Xen's libraries
    from xenpv.migrate.receiver import take  # noqa: PLC0415
    from xenpv.migrate.transport import accept, listening, standard  # noqa: PLC0415

    def say(what: str, **numbers: Any) -> None:
        if as_json:
            print_json_line({"event": what, **numbers}, err=where is None)
        elif what == "unheard":
            why = f"the sender could not be told ({numbers['why']}): it has its copy suspended, to be settled there"
            click.echo(f"xenpv: dom{numbers['domid']} is here, and {why}", err=True)

    with ExitStack() as stack:
        stack.enter_context(interruptible())
        host = stack.enter_context(XenHost())
        if where is None:
            link = stack.enter_context(standard(patience=patience))
        else:
            with listening(where, anywhere=anywhere) as listener:
                say("listening", at=listener.getsockname())
                link = stack.enter_context(accept(listener, where, patience=patience))
        bar = None if where is None or as_json else stack.enter_context(progress_bar("receiving"))
        taken = take(host, link, tell=say, progress=bar)
    if taken is not None and not as_json and where is not None:
        state = "runs" if taken.running else "is here, and paused"
        click.echo(f"dom{taken.domid} ({printable(taken.name or '')}) {state}", err=True)
