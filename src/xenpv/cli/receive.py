"""``xenpv receive``: the other end of ``xenpv migrate``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import click

from xenpv.cli.migrate import IDLE_TIMEOUT
from xenpv.cli.terminal import JSON_LINES, print_json_line, progress_bar
from xenpv.text import printable


@click.command()
@click.option("--listen", "address", metavar="ADDRESS",
              show_default="standard input and output", help="Wait at unix:PATH or tcp:ADDRESS:PORT.")  # fmt: skip
@click.option("--anywhere", is_flag=True, help="Allow an ADDRESS that other machines reach; nothing is encrypted.")
@IDLE_TIMEOUT
@JSON_LINES
def receive(address: str | None, anywhere: bool, idle_timeout: float, as_json: bool) -> None:
    """Receive one domain that `xenpv migrate` sends, over ssh or at an address.

    A domain that does not fit is refused before anything is sent: too little memory, or a domain of its name or uuid
    exists. It is built paused, as NAME--incoming, and checked while it arrives. It gets its own name and runs once the
    sender has given it up. A failure before that leaves nothing behind.

    \b
    Examples:
      xenpv receive --listen unix:/run/xenpv.sock
      xenpv receive --listen tcp:127.0.0.1:7000      reach it with: ssh -L 7000:127.0.0.1:7000
    """
    from xenpv.host.xen.host import XenHost  # noqa: PLC0415  NumPy, and Xen's libraries
    from xenpv.migrate.receiver import receive_domain  # noqa: PLC0415
    from xenpv.migrate.transport import accept, listening, standard_streams  # noqa: PLC0415

    def print_event(event: str, /, **details: Any) -> None:
        if as_json:
            print_json_line({"event": event, **details}, err=address is None)
        elif event == "unheard":
            problem = f"the sender could not be told ({details['why']}); its copy is suspended"
            click.echo(
                f"xenpv: dom{details['domid']} is here, but {problem}: run xenpv migrate --settle there", err=True
            )

    with ExitStack() as stack:
        host = stack.enter_context(XenHost())
        if address is None:
            link = stack.enter_context(standard_streams(idle_timeout=idle_timeout))
        else:
            with listening(address, anywhere=anywhere) as listener:
                print_event("listening", at=listener.getsockname())
                link = stack.enter_context(accept(listener, address, idle_timeout=idle_timeout))
        bar = None if address is None or as_json else stack.enter_context(progress_bar("receiving"))
        received = receive_domain(host, link, on_event=print_event, progress=bar)
    if received is not None and not as_json and address is not None:
        state = "runs" if received.running else "is here, paused"
        click.echo(f"dom{received.domid} ({printable(received.name or '')}) {state}", err=True)
