"""What a verb looks into: DOM, a running domain, or FILE, a save file or a core."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

import click

from xenpv.cli.terminal import progress_bar
from xenpv.errors import HostError, RequestError
from xenpv.host.protocol import find_domain
from xenpv.source.core import CoreDomain
from xenpv.source.live import LiveDomain
from xenpv.source.open import open_domain
from xenpv.source.saved import SavedDomain
from xenpv.stream.rules import BreachHandler

Domain: TypeAlias = LiveDomain | SavedDomain | CoreDomain

TARGET = click.argument("target", metavar="DOM|FILE")
PAUSE = click.option("--pause", is_flag=True, help="Pause a running domain meanwhile; without, it runs on.")


def _say(ctx: click.Context, _: click.Parameter, index: bool | None) -> None:
    ctx.meta[__name__] = index


INDEX = click.option(
    "--index/--no-index",
    default=None,
    expose_value=False,
    callback=_say,
    help="Keep the index of a save file in FILE.xpvi beside it, and use it, or do not. Unasked it is kept of files of "
    "8 GiB and more, where the folder can be written to.",
)


@contextmanager
def opened(
    target: str, *, pause: bool = False, hvm: bool = False, on_breach: BreachHandler | None = None
) -> Iterator[Domain]:
    """The domain that people mean by a file's name or "-", or else by a domain's id, uuid or name; RequestError if it
    is not PV, unless ``hvm``. ``on_breach`` is told of what is wrong with a file, which is then read as far as it goes.
    """
    with ExitStack() as stack:
        if target != "-" and not os.path.exists(target):
            live = _running(target, stack)
            if pause:
                stack.enter_context(live.paused())
            yield live
            return
        if pause:
            raise RequestError(f"{target}: is a file; only a running domain can be paused")
        domain = stack.push(kept(target, on_breach))
        if domain.hvm and not hvm:
            what = "an HVM or PVH domain; Xen keeps its p2m, and the file has none"
            raise RequestError(f"{target}: {what}")
        yield domain


def kept(path: str, on_breach: BreachHandler | None = None) -> SavedDomain | CoreDomain:
    """The domain in a file, with its index as INDEX says. To be closed."""
    ctx = click.get_current_context(silent=True)
    with progress_bar("reading") as bar:
        return open_domain(
            path, on_breach=on_breach, progress=bar, index=None if ctx is None else ctx.meta.get(__name__)
        )


def _running(target: str, stack: ExitStack) -> LiveDomain:
    from xenpv.host.xen.host import XenHost  # noqa: PLC0415  opens Xen's libraries

    try:
        host = stack.enter_context(XenHost())
        info = find_domain(host, target)
    except HostError as e:
        if "/" not in target and "." not in target:
            raise
        raise RequestError(f"{target}: No such file or directory; and as a domain: {e}") from e
    if info.hvm:
        raise RequestError(f"dom{info.domid} is HVM or PVH: Xen keeps its p2m, the guest publishes none")
    return LiveDomain(host, info)
