"""``xenpv diff``: what differs between two domains."""

from __future__ import annotations

import click

import xenpv
from xenpv.cli.target import INDEX, PAUSE, is_running, open_target
from xenpv.cli.terminal import JSON, QUIET, keep_option, print_json, print_table, progress_bar
from xenpv.diff.diff import Difference, PageDifference
from xenpv.text import counted, printable

_RANGES = 4  # shown of a page, in its line


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@keep_option(20, "--first", each="pages of each kind")
@QUIET
@PAUSE
@INDEX
@JSON
def diff(a: str, b: str, keep: int, quiet: bool, pause: bool, as_json: bool) -> int:
    """Compare two domains by page and by record.

    A and B are save files of any version and envelope, cores of xl dump-core, or running domains (id, uuid or name).
    Pages are compared by pfn, and page tables with pfns in their entries. For two save files, start info, shared info,
    vcpus and all other records are compared field by field.

    \b
    Examples:
      xenpv diff before.save after.save
      xenpv diff --keep 1000 --json old.save new.save | jq .pages
      xenpv diff dom.save dom.core
      xenpv diff --pause web web.save            what a running domain wrote since its save

    \b
    Exit status:
      0  nothing differs
      1  something differs, or an error
    """
    with (
        open_target(a, pause=pause and is_running(a), allow_hvm=True) as domain_a,
        open_target(b, pause=pause and is_running(b), allow_hvm=True) as domain_b,
        progress_bar("comparing") as bar,
    ):
        difference = xenpv.diff(domain_a, domain_b, keep=keep, progress=bar)
    if as_json:
        print_json(difference.to_json())
    elif not quiet:
        _print(difference)
    return 0 if difference.same else 1


def _print(difference: Difference) -> None:
    if difference.types:
        rows = [[str(types.pages), types.a, types.b, " ".join(map(hex, types.first))] for types in difference.types]
        print_table("Page types", ["pages#", "in A", "in B", "first pfns"], rows)
    if difference.first:
        rows = [[f"{page.pfn:#x}", page.type, page.kind, _byte_ranges(page)] for page in difference.first]
        print_table("Page content", ["pfn#", "type", "content", "differing bytes"], rows)
        if difference.differ > len(difference.first):
            click.echo(f"… and {difference.differ - len(difference.first)} more pages")
    if difference.fields:
        rows = [[field.where, field.name, printable(field.a), printable(field.b)] for field in difference.fields]
        print_table("Records", ["record", "field", "in A", "in B"], rows)
    if difference.same:
        click.echo(f"nothing differs: {difference.compared} pages are the same")
        return
    kinds = ", ".join(f"{count} of {kind}" for kind, count in sorted(difference.kinds.items()))
    content = f"{difference.differ} of {difference.compared} pages differ" + (f" ({kinds})" if kinds else "")
    other_types = sum(types.pages for types in difference.types)
    fields = counted(len(difference.fields), "field")
    click.echo(f"{content}; {other_types} have another type or are in one domain only; {fields} of records differ")


def _byte_ranges(page: PageDifference) -> str:
    """List the first ranges of bytes that differ: "0x8-0xf, 0x20-0x27 and 3 more"."""
    shown = [f"{start:#x}-{end - 1:#x}" for start, end in page.ranges[:_RANGES]]
    more = len(page.ranges) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
