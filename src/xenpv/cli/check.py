"""``xenpv check``: is a domain's p2m what it must be?"""

from __future__ import annotations

import click

from xenpv.cli.target import INDEX, PAUSE, TARGET, open_target
from xenpv.cli.terminal import JSON, print_findings, print_json, progress_bar
from xenpv.errors import RequestError
from xenpv.findings import Findings
from xenpv.memory.survey import survey
from xenpv.verify.p2m import check_p2m
from xenpv.verify.physmap import PhysmapCheck, notes


@click.command()
@TARGET
@click.option("--keep", type=click.IntRange(min=0), default=20, show_default=True, metavar="N",
              help="Findings to show of each rule; all are counted.")  # fmt: skip
@click.option("--quick", is_flag=True, help="Do not ask Xen who owns each frame: on large hosts, much faster.")
@PAUSE
@INDEX
@JSON
def check(target: str, keep: int, quick: bool, pause: bool, as_json: bool) -> int:
    """Hold a running domain's p2m against Xen's m2p, both ways; or a saved one's against the pages that came with it.

    By every way that the guest exposes. Says which pfn has a frame that is another pfn's, or not the domain's, or
    stale, which frame of the domain is no pfn's, and which tables are not what they must be; and, as notes, how many
    pfns have no frame or somebody else's.

    DOM is an id, a uuid or a name; what is a file, or "-", is taken as one. A running domain runs on meanwhile, unless
    --pause is given: what it changes while we look is looked at twice, and is a warning, not an error.

    \b
    xenpv check web                    exit status 1 on errors
    xenpv check dom.save               of a file; xenpv verify checks all the rest of it, too
    """
    findings = Findings(keep)
    with open_target(target, pause=pause) as domain:
        if domain.live is not None:
            with progress_bar("checking") as bar:
                PhysmapCheck(domain.live, findings, owner=not quick, progress=bar).run()
            against, last = "m2p", max(domain.live.anchors.max_pfn - 1, 0)
        elif domain.saved is None:
            what = "a core, whose list of frames xl made out of the p2m itself: there is nothing to hold it against"
            raise RequestError(f"{target}: {what}")
        else:
            check_p2m(domain.saved, findings, domain.config)
            notes(survey(domain.p2m), findings)
            against, last = "the stream's pages", domain.saved.contents.end_pfn
        forms = domain.anchors.names if domain.anchors else "unknown"
        name = domain.name
    if as_json:
        found = [finding.to_json() for finding in findings]
        left_out = {rule.name: n for rule, n in findings.left_out().items()}
        counts = {"errors": findings.errors, "warnings": findings.warnings, "notes": findings.notes}
        print_json({"domain": name, "form": forms, "last_pfn": last, **counts, "findings": found, "left_out": left_out})
    else:
        print_findings(findings, findings.left_out())
        verdict = f"{findings.errors} errors" if findings.errors else f"p2m and {against} agree"
        click.echo(f"{name}: {verdict}, by {forms}, up to pfn {last:#x}")
    return 1 if findings.errors else 0
