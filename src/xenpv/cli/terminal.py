"""How the verbs speak: numbers in, numbers out, progress on a terminal's stderr, JSON on demand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from xenpv.findings import Finding, Rule, Severity
from xenpv.io.stream_input import Progress
from xenpv.text import size

if TYPE_CHECKING:
    from rich.progress import TaskID

    from xenpv.save.progress import Status

_COLOURS = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTE: "blue"}
_SUFFIXES = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class Number(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2 only
    """A number in decimal or, with 0x, hexadecimal; with K, M, G or T for powers of 1024."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).replace("_", "")
        scale = _SUFFIXES.get(text[-1:].lower(), 1) if not text.lower().startswith("0x") else 1
        try:
            number = int(text[:-1] if scale > 1 else text, 0) * scale
        except ValueError:
            self.fail(f"{value!r} is not a number (decimal, 0x…, or with K, M, G, T)", param, ctx)
        if not 0 <= number < 1 << 64:
            self.fail(f"{value!r} is not between 0 and 2^64 - 1", param, ctx)
        return number


NUMBER = Number()
FILE = click.argument("file", metavar="FILE", type=click.Path(allow_dash=True))
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(value, indent=2))


@contextmanager
def progress(what: str) -> Iterator[Progress | None]:
    """A progress bar while the body runs, when stderr is a terminal; else None."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # noqa: PLC0415  slow to import, and most runs need none
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn  # noqa: PLC0415

    columns = (TextColumn(what), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def moving() -> Iterator[Callable[[Status], None] | None]:
    """A bar for each round of sending a domain's memory, with how fast it goes and how long the domain would stand
    still, while the body runs and when stderr is a terminal; else None.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # noqa: PLC0415  slow to import, and most runs need none
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description:20}"), BarColumn(), TextColumn("{task.fields[told]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[int, TaskID] = {}

        def shown(status: Status) -> None:
            if status.round not in tasks:
                tasks[status.round] = bar.add_task("", told="")
            told = f"{size(status.rate)}/s"
            told += f", {status.dirty} pages dirty" if status.dirty else ""
            told += f", {status.downtime:.2f} s to stand still" if status.downtime is not None else ""
            what = f"round {status.round}: {status.phase}"
            bar.update(tasks[status.round], description=what, completed=status.round_done, total=status.round_pages,
                       told=told)  # fmt: skip

        yield shown


@contextmanager
def steps() -> Iterator[Callable[[str, int, int], None] | None]:
    """Step(what, done, in all): a bar for each step of some long work, when stderr is a terminal; else None."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # noqa: PLC0415  slow to import, and most runs need none
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description:24}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def step(what: str, done: int, in_all: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=in_all)
            bar.update(tasks[what], completed=done)

        yield step


def print_findings(kept: Iterable[Finding], left_out: dict[Rule, int]) -> None:
    """A line for each finding, and how many more of each rule there are."""
    for finding in kept:
        kind = finding.severity
        click.echo(f"{click.style(f'{kind}: ', fg=_COLOURS[kind], bold=True)}{finding}")
    for rule, n in left_out.items():
        click.echo(f"… and {n} more of [{rule.name}]")


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table; numbers (a column name that ends in "#") to the right."""
    from rich.box import SIMPLE  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(title=title or None, title_justify="left", title_style="bold", box=SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(column.rstrip("#"), justify="right" if column.endswith("#") else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 1000  # who reads a pipe wants whole lines
    Console(width=width, highlight=False).print(table)
