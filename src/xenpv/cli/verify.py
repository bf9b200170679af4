"""``xenpv verify``: will it restore?"""

from __future__ import annotations

import sys

import click

from xenpv.cli.terminal import FILE, JSON, print_findings, print_json, print_table, progress_bar
from xenpv.findings import RULES, Finding
from xenpv.verify.stream import Report
from xenpv.verify.stream import verify as verify_file


def _list_rules(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    import xenpv.verify.rules  # noqa: F401, PLC0415  declares the rules that only the deep check imports

    if "--json" in sys.argv:
        print_json(
            [{"rule": r.name, "severity": r.severity, "text": r.text, "source": r.source} for r in RULES.values()]
        )
    else:
        rows = [[r.name, str(r.severity), r.text, r.source] for r in RULES.values()]
        print_table("", ["rule", "severity", "what must hold", "who says so"], rows)
    ctx.exit()


@click.command()
@FILE
@click.option("--framing", is_flag=True, help="Check framing, order and records only; do not look into memory.")
@click.option("--strict", is_flag=True, help="Take warnings for errors: exit 1 on any finding.")
@click.option(
    "--keep",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    metavar="N",
    help="Findings to show of each rule; all are counted.",
)
@click.option("-q", "--quiet", is_flag=True, help="Say nothing; the exit status is the answer.")
@click.option("--list-rules", is_flag=True, is_eager=True, expose_value=False, callback=_list_rules,
              help="Print every rule and where it comes from, and exit.")  # fmt: skip
@JSON
def verify(file: str, framing: bool, strict: bool, keep: int, quiet: bool, as_json: bool) -> int:
    """Would this saved domain restore, and as what was saved?

    Checks framing and order, everything that libxenguest's restore path and Xen check for a PV domain, and what no
    tool checks: every entry of every page table, the p2m's frames against the guest's own anchors, pages that are
    missing. All findings come in one pass, each with its byte offset, pfn, level and entry.

    Errors mean: it would not restore, or come back as something else. Warnings: it restores, yet is not as it should
    be.

    \b
    xenpv verify dom.save
    xenpv verify --framing 1tib.save         seconds, whatever the size
    ssh host cat dom.save | xenpv verify -
    """
    with progress_bar("verifying") as bar:
        report = verify_file(file, deep=not framing, keep=keep, progress=bar)
    failed = not report.ok or (strict and len(report.findings) > 0)
    if as_json:
        print_json(report.to_json())
    elif not quiet:
        _print(report)
    return 1 if failed else 0


def _print(report: Report) -> None:
    print_findings(sorted(report.findings, key=_place), report.findings.left_out())
    click.echo(summary(report))


def _place(finding: Finding) -> int:
    return finding.offset if finding.offset is not None else 1 << 64


def summary(report: Report) -> str:
    """The answer, with its numbers."""
    name = "standard input" if report.name == "-" else report.name
    counts = f"{_number(report.findings.errors, 'error')}, {_number(report.findings.warnings, 'warning')}"
    if not report.ok:
        return click.style(f"{name}: {report.verdict}", bold=True) + f" ({counts})"
    pages = f": {report.pages} pages and every page table are sound" if report.deep else f" ({report.pages} pages)"
    return f"{name}: {report.verdict}{pages}" + (f" ({counts})" if len(report.findings) else "")


def _number(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
