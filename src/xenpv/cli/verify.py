"""``xenpv verify``: whether a saved domain would restore."""

from __future__ import annotations

import sys

import click

import xenpv
from xenpv.cli.terminal import (
    CHECK_KEY,
    FILE,
    JSON,
    QUIET,
    keep_option,
    load_key,
    print_findings,
    print_json,
    print_table,
    progress_bar,
)
from xenpv.findings import RULES, Finding
from xenpv.text import counted, printable
from xenpv.verify.stream import Report


def _list_rules(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    """Print every rule and exit."""
    if not value or ctx.resilient_parsing:
        return
    import xenpv.verify.rules  # noqa: F401, PLC0415  declares the rules that otherwise only a deep check imports

    if "--json" in sys.argv:
        print_json(
            [{"rule": r.name, "severity": r.severity, "text": r.text, "source": r.source} for r in RULES.values()]
        )
    else:
        rows = [[r.name, str(r.severity), r.text, r.source] for r in RULES.values()]
        print_table("", ["rule", "severity", "requirement", "source"], rows)
    ctx.exit()


@click.command()
@FILE
@click.option("--framing", is_flag=True, help="Check framing, order and records only, not memory.")
@click.option("--strict", is_flag=True, help="Exit with 1 on any finding, also on warnings and notes.")
@click.option("--require-seal", is_flag=True, help="Demand a seal over the whole stream (xenpv save --seal).")
@CHECK_KEY
@keep_option()
@QUIET
@click.option("--list-rules", is_flag=True, is_eager=True, expose_value=False, callback=_list_rules,
              help="Print every rule and its source, and exit.")  # fmt: skip
@JSON
def verify(
    file: str,
    framing: bool,
    strict: bool,
    require_seal: bool,
    seal_key: str | None,
    keep: int,
    quiet: bool,
    as_json: bool,
) -> int:
    """Check whether a saved domain would restore as it was saved; if not, say why.

    Checks framing and order; everything that libxenguest's restore path and Xen check for a PV domain; and what no
    other tool checks: every entry of every page table, the p2m's frames against the guest's own anchors, missing pages.
    One run reports all findings, each with its rule, byte offset, pfn, level and entry.

    A sealed file is held to its seal, which needs all of its pages; --framing leaves that out.

    An error means that the domain would not restore, or would come back different. A warning means that it restores,
    but something is not as it should be.

    \b
    Examples:
      xenpv verify dom.save
      xenpv verify --framing 1tib.save         seconds at any size
      ssh host cat dom.save | xenpv verify -
      xenpv verify --require-seal dom.save     every page is as it was saved
      xenpv verify --list-rules                every rule, and the source that demands it

    \b
    Exit status:
      0  no error (with --strict: no finding)
      1  errors
    """
    key = load_key(seal_key)
    with progress_bar("verifying") as bar:
        report = xenpv.verify(file, deep=not framing, keep=keep, seal_key=key, require_seal=require_seal, progress=bar)
    failed = not report.ok or (strict and len(report.findings) > 0)
    if as_json:
        print_json(report.to_json())
    elif not quiet:
        _print(report)
    return 1 if failed else 0


def _print(report: Report) -> None:
    print_findings(sorted(report.findings, key=_sort_offset), report.findings.omitted())
    click.echo(summary(report))


def _sort_offset(finding: Finding) -> int:
    """Return a finding's offset; findings without one sort last."""
    return finding.offset if finding.offset is not None else 1 << 64


def summary(report: Report) -> str:
    """Return the verdict with its numbers.

    For example "web.save: would not restore as it was saved (1 error, 0 warnings)".
    """
    name = "standard input" if report.name == "-" else printable(report.name)
    counts = f"{counted(report.findings.errors, 'error')}, {counted(report.findings.warnings, 'warning')}"
    if not report.ok:
        return click.style(f"{name}: {report.verdict}", bold=True) + f" ({counts})"
    pages = f": {report.pages} pages and every page table are sound" if report.deep else f" ({report.pages} pages)"
    return f"{name}: {report.verdict}{pages}" + (f" ({counts})" if len(report.findings) else "")
