"""The domain that a verb works on, and its options.

DOM is a running domain, FILE a save file or a core.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import click

import xenpv
from xenpv.cli.terminal import NUMBER, progress_bar
from xenpv.errors import RequestError
from xenpv.frames import Pfn
from xenpv.source.domain import Domain
from xenpv.source.open import FileDomain, open_path
from xenpv.stream.rules import BreachHandler

TARGET = click.argument("target", metavar="DOM|FILE")
PAUSE = click.option("--pause", is_flag=True, help="Pause a running domain meanwhile; otherwise it keeps running.")


VCPU = click.option("--vcpu", default=0, show_default=True, metavar="N", help="Use the page tables of this vcpu.")
USER = click.option("--user", is_flag=True, help="Use the page tables of user mode (64-bit PV guests have two sets).")
TOP = click.option("--top", type=NUMBER, metavar="PFN", help="Start at this top-level page table, not at a vcpu's cr3.")


def _remember_index(ctx: click.Context, _: click.Parameter, index: bool | None) -> None:
    ctx.meta[__name__] = index


INDEX = click.option(
    "--index/--no-index",
    default=None,
    expose_value=False,
    callback=_remember_index,
    show_default="for files of 8 GiB and more, if the folder is writable",
    help="Keep an index of a save file in FILE.xpvi, and use it to open the file faster.",
)


@contextmanager
def open_target(
    target: str, *, pause: bool = False, allow_hvm: bool = False, on_breach: BreachHandler | None = None
) -> Iterator[Domain]:
    """Open a file of this name or "-"; otherwise a running domain.

    A running domain goes by its id, uuid or name.

    Args:
        target: Path, "-", or a domain's id, uuid or name.
        pause: Pause a running domain until the context ends.
        allow_hvm: Accept HVM and PVH domains in files.
        on_breach: Called for each breach of a rule in a file, which is then read on. Default: the first one raises.

    Raises:
        RequestError: No such file or domain, a domain that is not PV, or a file that is to be paused.
    """
    if pause and not is_running(target):
        raise RequestError(f"{target}: this is a file; only a running domain can be paused")
    with progress_bar("reading") as bar:
        domain = xenpv.open_domain(target, on_breach=on_breach, progress=bar, index=_keep_index())
    with domain, domain.paused() if pause else nullcontext():
        if domain.hvm and not allow_hvm:
            raise RequestError(f"{target}: this is an HVM or PVH domain: Xen keeps its p2m, the file has none")
        yield domain


def is_running(target: str) -> bool:
    """Return whether a target names a running domain.

    It does if it is neither "-" nor the path of a file.
    """
    return target != "-" and not os.path.exists(target)


def open_file(path: str) -> FileDomain:
    """Open the save file or core at a path; "-" is standard input."""
    with progress_bar("reading") as bar:
        return open_path(path, progress=bar, index=_keep_index())


def _keep_index() -> bool | None:
    """Return the choice of --index or --no-index; None without either.

    It is also None outside a command.
    """
    context = click.get_current_context(silent=True)
    return None if context is None else context.meta.get(__name__)


def top_table(domain: Domain, vcpu: int, user: bool, top: int | None) -> Pfn:
    """Return the pfn of the top-level page table that --top, --vcpu and --user select."""
    if top is not None:
        return Pfn(top)
    cr3 = domain.cr3(vcpu, user=user)
    if cr3 is None:
        if user and vcpu in domain.vcpus:
            raise RequestError(f"{domain.name}: vcpu {vcpu} has no page tables of user mode")
        vcpus = ", ".join(map(str, domain.vcpus)) or "none"
        raise RequestError(f"{domain.name}: no vcpu {vcpu}, or it never ran (vcpus: {vcpus})")
    return cr3


def walk_attempts(domain: Domain) -> int:
    """Return how often to try a walk.

    A running domain may free a process's page tables meanwhile.
    """
    return 4 if domain.live is not None else 1
