"""``xenpv diff``: what is not the same in two domains."""

from __future__ import annotations

import click

from xenpv.cli.target import INDEX, PAUSE, is_running, open_target
from xenpv.cli.terminal import JSON, print_json, print_table, progress_bar
from xenpv.diff.diff import Difference, Page
from xenpv.diff.diff import diff as compare
from xenpv.text import printable

_RANGES = 4  # of a page, in a line


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--first", "keep", type=click.IntRange(min=0), default=20, show_default=True, metavar="N",
              help="Pages of each kind to name; all are counted.")  # fmt: skip
@click.option("-q", "--quiet", is_flag=True, help="Say nothing; the exit status is the answer.")
@PAUSE
@INDEX
@JSON
def diff(a: str, b: str, keep: int, quiet: bool, pause: bool, as_json: bool) -> int:
    """What differs between two domains, by page and by record.

    A and B are save files, cores of xl dump-core or running domains (by id, uuid or name), of any version and in any
    envelope. Pages are compared by pfn, page tables with pfns in their entries; of two save files also start info,
    shared info, vcpus and all other records, field by field.

    \b
    xenpv diff before.save after.save
    xenpv diff --first 1000 --json old.save new.save | jq .pages
    xenpv diff dom.save dom.core
    xenpv diff --pause web web.save            what a running domain has written since (in dom0)

    Exit status: 0 nothing differs, 1 something does or it failed.
    """
    with (
        open_target(a, pause=pause and is_running(a), allow_hvm=True) as one,
        open_target(b, pause=pause and is_running(b), allow_hvm=True) as other,
        progress_bar("comparing") as bar,
    ):
        found = compare(one, other, keep=keep, progress=bar)
    if as_json:
        print_json(found.to_json())
    elif not quiet:
        _print(found)
    return 0 if found.same else 1


def _print(found: Difference) -> None:
    if found.types:
        rows = [[str(t.pages), t.a, t.b, " ".join(f"{pfn:#x}" for pfn in t.first)] for t in found.types]
        print_table("Page types", ["pages#", "in A", "in B", "first pfns"], rows)
    if found.first:
        rows = [[f"{page.pfn:#x}", page.type, page.what, _where(page)] for page in found.first]
        print_table("Page content", ["pfn#", "type", "what", "bytes that differ"], rows)
        if found.differ > len(found.first):
            click.echo(f"… and {found.differ - len(found.first)} more pages")
    if found.fields:
        rows = [[f.where, f.name, printable(f.a), printable(f.b)] for f in found.fields]
        print_table("Records", ["where", "field", "in A", "in B"], rows)
    if found.same:
        click.echo(f"nothing differs: {found.compared} pages are the same")
        return
    kinds = ", ".join(f"{n} of {name}" for name, n in sorted(found.kinds.items()))
    others = sum(types.pages for types in found.types)
    differ = f"{found.differ} of {found.compared} pages differ" + (f" ({kinds})" if kinds else "")
    fields = "1 field of records differs" if len(found.fields) == 1 else f"{len(found.fields)} fields of records differ"
    click.echo(f"{differ}; {others} are of another type or in one only; {fields}")


def _where(page: Page) -> str:
    told = [f"{first:#x}-{behind - 1:#x}" for first, behind in page.ranges[:_RANGES]]
    more = len(page.ranges) - len(told)
    return ", ".join(told) + (f" and {more} more" if more else "")
