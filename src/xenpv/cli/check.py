"""``xenpv check``: a p2m against Xen's M2P, or against the pages of a file."""

from __future__ import annotations

import click

from xenpv.cli.target import INDEX, PAUSE, TARGET, open_target
from xenpv.cli.terminal import JSON, keep_option, print_findings, print_json, progress_bar
from xenpv.errors import RequestError
from xenpv.findings import Findings
from xenpv.memory.p2m_survey import survey
from xenpv.text import printable
from xenpv.verify.p2m import check_p2m
from xenpv.verify.physmap import PhysmapCheck, add_survey_notes


@click.command()
@TARGET
@keep_option()
@click.option("--quick", is_flag=True, help="Do not ask Xen for the owner of each frame; much faster on large hosts.")
@PAUSE
@INDEX
@JSON
def check(target: str, keep: int, quick: bool, pause: bool, as_json: bool) -> int:
    """Cross-check a domain's p2m against Xen's M2P, or a file's pages.

    Follows every root that the guest exposes. Reports each pfn whose frame is stale, belongs to another pfn or is not
    the domain's; each frame of the domain without a pfn; and each bad table. Notes count pfns without a frame and pfns
    with somebody else's.

    DOM is an id, a uuid or a name. A running domain keeps running during the check, unless --pause is given. Whatever
    it changes meanwhile is checked twice, and is a warning rather than an error.

    \b
    Examples:
      xenpv check web
      xenpv check --quick --json web | jq .errors
      xenpv check dom.save               of a file; xenpv verify checks everything else of it, too

    \b
    Exit status:
      0  no error
      1  errors
    """
    findings = Findings(keep)
    with open_target(target, pause=pause) as domain:
        if domain.live is not None:
            with progress_bar("checking") as bar:
                PhysmapCheck(domain.live, findings, owner=not quick, progress=bar).run()
            reference, last_pfn = "m2p", max(domain.live.anchors.max_pfn - 1, 0)
        elif domain.saved is None:
            reason = "a core has no second list of frames: xl dump-core made its list from the p2m"
            raise RequestError(f"{target}: nothing to check the p2m against: {reason}")
        else:
            check_p2m(domain.saved, findings, domain.config)
            add_survey_notes(survey(domain.p2m), findings)
            reference, last_pfn = "the stream's pages", domain.saved.contents.end_pfn
        forms = domain.anchors.form_names if domain.anchors else "unknown"
        name = domain.name
    if as_json:
        documents = [finding.to_json() for finding in findings]
        left_out = {rule.name: n for rule, n in findings.omitted().items()}
        counts = {"errors": findings.errors, "warnings": findings.warnings, "notes": findings.notes}
        print_json(
            {"domain": name, "form": forms, "last_pfn": last_pfn, **counts, "findings": documents, "left_out": left_out}
        )
    else:
        print_findings(findings, findings.omitted())
        verdict = f"{findings.errors} errors" if findings.errors else f"p2m and {reference} agree"
        click.echo(f"{printable(name)}: {verdict}, by {forms}, up to pfn {last_pfn:#x}")
    return 1 if findings.errors else 0
