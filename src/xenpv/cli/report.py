"""``xenpv report``: a domain as a page to look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from xenpv.cli.target import PAUSE, TARGET, open_target
from xenpv.cli.terminal import JSON, NUMBER, print_json, progress_bar
from xenpv.findings import Findings
from xenpv.frames import PAGE_SIZE
from xenpv.io.atomic_output import Output
from xenpv.report.gather import Checked, gather
from xenpv.report.page import page
from xenpv.source.domain import Domain
from xenpv.verify.physmap import PhysmapCheck
from xenpv.verify.stream import verify_domain


@click.command()
@TARGET
@click.option("-o", "--output", type=click.Path(allow_dash=True), metavar="PAGE",
              help='Where the page goes; "-" is standard output.')  # fmt: skip
@click.option("--content", type=NUMBER, default="16G", show_default=True, metavar="SIZE",
              help="Look for zero and duplicate pages in so much of the memory; 0: in none.")  # fmt: skip
@click.option("--keep", type=click.IntRange(min=0), default=50, show_default=True, metavar="N",
              help="Findings to show of each rule; all are counted.")  # fmt: skip
@PAUSE
@JSON
def report(target: str, output: str | None, content: int, keep: int, pause: bool, as_json: bool) -> None:
    """A domain as a page that people look at: who it is, its map, its p2m, page tables, vcpus, and what is wrong.

    One HTML file that needs nothing else and loads nothing. It holds registers and the configuration, so only its
    owner can read it. What verify finds is linked with the places on the map. A file that is broken is shown as far
    as it can be read; a running domain runs on meanwhile, unless --pause is given.

    \b
    xenpv report dom.save -o report.html
    xenpv report web -o web.html --pause       a running domain (in dom0)
    xenpv report 1tib.save -o big.html --content 0
    xenpv report dom.save --json | jq .page_tables
    """
    if output is None and not as_json:
        raise click.UsageError("say where the page goes: -o report.html")
    with _looked_at(target, pause=pause, keep=keep) as (domain, checked), progress_bar() as bar:
        facts = gather(domain, checked, content_pages=content // PAGE_SIZE, progress=bar)
    if output is not None:
        whole = page(facts).encode()
        with Output.open(output) as out:
            out.write([whole])
    if as_json:
        print_json(facts.to_json())


@contextmanager
def _looked_at(target: str, *, pause: bool, keep: int) -> Iterator[tuple[Domain, Checked]]:
    """What people mean by a name, and what is found in it."""
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
        yield domain, Checked(verdict, not findings.errors, findings)
