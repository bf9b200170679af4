"""Types of options, JSON, tables, findings and the progress bar of all verbs."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from xenpv.findings import Finding, Rule, Severity
from xenpv.io.progress import Progress, ProgressCallback
from xenpv.text import printable, size

if TYPE_CHECKING:
    from rich.progress import TaskID

    from xenpv.stream.seal import Sealer

_F = TypeVar("_F", bound=Callable[..., Any])
_COLOURS = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.NOTE: "blue"}
_SUFFIXES = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class Number(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.2 only
    """A number: decimal, hexadecimal (0x…), or decimal with K, M, G or T.

    The letters mean powers of 1024.
    """

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse a number from 0 to 2^64 - 1."""
        if isinstance(value, int):
            return value
        text = str(value).replace("_", "")
        scale = _SUFFIXES.get(text[-1:].lower(), 1) if not text.lower().startswith("0x") else 1
        try:
            number = int(text[:-1] if scale > 1 else text, 0) * scale
        except ValueError:
            self.fail(f"{value!r} is not a number; use decimal, 0x…, or a suffix K, M, G, T", param, ctx)
        if not 0 <= number < 1 << 64:
            self.fail(f"{value!r} is not between 0 and 2^64 - 1", param, ctx)
        return number


NUMBER = Number()
FILE = click.argument("file", metavar="FILE", type=click.Path(allow_dash=True))
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
JSON_LINES = click.option("--json", "as_json", is_flag=True, help="Print events as JSON, one object per line.")
QUIET = click.option("-q", "--quiet", is_flag=True, help="Print nothing; the exit status is the answer.")


def keep_option(default: int = 20, *names: str, each: str = "findings of each rule") -> Callable[[_F], _F]:
    """Return an option for how many results to show; all are counted.

    Its value is the parameter ``keep``.

    Args:
        default: How many to show by default.
        names: Further names of the option.
        each: The results, for the help.
    """
    help_text = f"Show at most N {each}; all are counted."
    count = click.IntRange(min=0)
    return click.option("--keep", *names, "keep", type=count, default=default, show_default=True, metavar="N",
                        help=help_text)  # fmt: skip


class Seconds(click.FloatRange):
    """A finite number of seconds above 0, at most a year: what a wait can take."""

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True, max=366 * 86400)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number; click's own check lets "nan" pass."""
        seconds = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value!r} is not a number of seconds", param, ctx)
        return seconds


SECONDS = Seconds()
FORCE = click.option("--force", is_flag=True, help="Replace an existing file even if it is of another kind.")
SEAL = click.option("--seal", is_flag=True, help="Seal the file: add digests of every page and record.")
SEAL_KEY = click.option("--seal-key", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
                        help="Seal with the secret key in FILE; it needs mode 0600.")  # fmt: skip
CHECK_KEY = click.option("--seal-key", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
                         help="Demand a seal that was made with the key in FILE.")  # fmt: skip


def make_sealer(seal: bool, key_file: str | None) -> Sealer | None:
    """Return the Sealer that SEAL and SEAL_KEY ask for; None if neither was given."""
    key = load_key(key_file)
    if not seal and key is None:
        return None
    from xenpv.stream.seal import Sealer  # noqa: PLC0415

    return Sealer(key)


def load_key(key_file: str | None) -> bytes | None:
    """Return the key in a file; None if no file was given."""
    if key_file is None:
        return None
    from xenpv.io.seal_key import read_seal_key  # noqa: PLC0415

    return read_seal_key(key_file)


def print_json(value: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(value, indent=2))


def print_json_line(value: Any, *, err: bool = False) -> None:
    """Print an event as one line of JSON, on stderr with ``err``."""
    click.echo(json.dumps(value), err=err)


@contextmanager
def progress_bar(description: str = "") -> Iterator[ProgressCallback | None]:
    """Draw the progress of the body on stderr, a bar for each step.

    Yields None if stderr is no terminal.

    Args:
        description: The name of an operation's only step.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # noqa: PLC0415  slow to import, and most runs need none
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn  # noqa: PLC0415
    from rich.progress import Progress as Bars  # noqa: PLC0415

    columns = (TextColumn("{task.description:24}"), BarColumn(), TextColumn("{task.fields[figures]}"))
    with Bars(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str | int, tuple[TaskID, float]] = {}

        def draw(progress: Progress) -> None:
            transfer, step = progress.transfer, progress.step or description
            key = step if transfer is None else transfer.iteration
            if key not in tasks:
                tasks[key] = bars.add_task(step, figures=""), time.monotonic()
            task, start = tasks[key]
            figures = _format_figures(progress, time.monotonic() - start)
            bars.update(task, description=step, completed=progress.done, total=progress.total, figures=figures)

        yield draw


def _format_figures(progress: Progress, seconds: float) -> str:
    """The numbers to the right of a bar, ``seconds`` after the step began."""
    if (transfer := progress.transfer) is not None:
        figures = [f"{size(int(transfer.rate))}/s"]
        if transfer.dirty:
            figures.append(f"{transfer.dirty} pages dirty")
        if transfer.downtime is not None:
            figures.append(f"downtime {transfer.downtime:.2f} s")
        return ", ".join(figures)
    if progress.unit == "bytes":
        total = f" of {size(progress.total)}" if progress.total is not None else ""
        return f"{size(progress.done)}{total}, {size(progress.done / max(seconds, 1e-3))}/s"
    if not progress.unit:
        return ""
    return f"{progress.done}" + (f" of {progress.total}" if progress.total is not None else "") + f" {progress.unit}"


def print_findings(findings: Iterable[Finding], left_out: dict[Rule, int]) -> None:
    """Print a line for each finding, then how many more of each rule there are."""
    for finding in findings:
        severity = finding.severity
        click.echo(f"{click.style(f'{severity}: ', fg=_COLOURS[severity], bold=True)}{printable(str(finding))}")
    for rule, count in left_out.items():
        click.echo(f"… and {count} more of [{rule.name}]")


def print_field(label: str, text: str) -> None:
    """Print an indented line of a description: a label and its text."""
    click.echo(f"  {label:<13}{text}")


class Coloured(NamedTuple):
    """A cell of a table in a colour."""

    text: str
    colour: str


def print_table(title: str, columns: list[str], rows: Sequence[Sequence[str | Coloured]]) -> None:
    """Print a table.

    Cells are plain text, whatever a hostile name in them looks like. Columns whose name ends in "#" hold numbers and
    are aligned to the right.
    """
    from rich.box import SIMPLE  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    def text_of(cell: str | Coloured) -> Text:
        return Text(printable(cell)) if isinstance(cell, str) else Text(printable(cell.text), cell.colour)

    heading = Text(title) if title else None
    table = Table(title=heading, title_justify="left", title_style="bold", box=SIMPLE, pad_edge=False)
    for column in columns:
        table.add_column(column.rstrip("#"), justify="right" if column.endswith("#") else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(text_of, row))
    width = None if sys.stdout.isatty() else 1000  # programs that read a pipe need whole lines
    Console(width=width, highlight=False).print(table)
