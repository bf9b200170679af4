"""``xenpv report``: an HTML report about a domain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from xenpv.cli.target import PAUSE, TARGET, open_target
from xenpv.cli.terminal import FORCE, JSON, NUMBER, keep_option, print_json, progress_bar
from xenpv.findings import Findings
from xenpv.frames import PAGE_SIZE
from xenpv.io.atomic_output import Output
from xenpv.io.file_kind import FileKind
from xenpv.report.gather import CheckResult, gather_facts
from xenpv.report.page import render_page
from xenpv.source.domain import Domain
from xenpv.verify.physmap import PhysmapCheck
from xenpv.verify.stream import verify_domain


@click.command()
@TARGET
@click.option("-o", "--output", type=click.Path(allow_dash=True), metavar="HTML",
              help='File of the report; "-" is standard output.')  # fmt: skip
@click.option("--content", type=NUMBER, default="16G", show_default=True, metavar="SIZE",
              help="Look for zero and duplicate pages in so much memory; 0 skips this.")  # fmt: skip
@keep_option(50)
@PAUSE
@FORCE
@JSON
def report(target: str, output: str | None, content: int, keep: int, pause: bool, force: bool, as_json: bool) -> None:
    """Write an HTML report about a domain: its memory, p2m, vcpus and faults.

    The report is one HTML file that loads nothing else. It contains registers and the configuration, so only its owner
    can read it. Findings of verify are linked with their places on the map. The report covers the readable part of a
    damaged file. A running domain keeps running unless --pause is given.

    \b
    Examples:
      xenpv report dom.save -o report.html
      xenpv report web -o web.html --pause                 a running domain
      xenpv report 1tib.save -o big.html --content 0       faster: does not read every page
      xenpv report dom.save --json | jq .page_tables
    """
    if output is None and not as_json:
        raise click.UsageError("name the file of the report: -o report.html")
    with _checked_domain(target, pause=pause, keep=keep) as (domain, checked):
        with progress_bar() as bar:
            facts = gather_facts(domain, checked, content_pages=content // PAGE_SIZE, progress=bar)
        if output is not None:
            html = render_page(facts).encode()
            with Output.open(output, replaces={FileKind.HTML}, inputs=domain.files, force=force) as out:
                out.write([html])
    if as_json:
        print_json(facts.to_json())


@contextmanager
def _checked_domain(target: str, *, pause: bool, keep: int) -> Iterator[tuple[Domain, CheckResult]]:
    """Open a domain and check all that can be checked of it."""
    findings = Findings(keep)
    with open_target(target, pause=pause, allow_hvm=True, on_breach=findings.add_breach) as domain:
        if domain.saved is not None:
            with progress_bar("verifying") as bar:
                result = verify_domain(domain.saved, findings, bar)
            verdict = result.verdict
        elif domain.live is not None:
            with progress_bar("checking") as bar:
                PhysmapCheck(domain.live, findings, progress=bar).run()
            verdict = "p2m and m2p do not agree" if findings.errors else "p2m and m2p agree"
        else:
            verdict = "the core is damaged" if findings.errors else "the core could be read"
        yield domain, CheckResult(verdict, not findings.errors, findings)
