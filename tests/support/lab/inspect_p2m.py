"""Inspect the p2m of running domains, in dom0: python3 -m tests.support.lab.inspect_p2m NAME...; prints JSON."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from xenpv.cli.p2m import describe
from xenpv.errors import GuestError
from xenpv.findings import Findings, Severity
from xenpv.host.protocol import find_domain
from xenpv.host.xen.host import XenHost
from xenpv.memory.p2m_reader import names_local_frame
from xenpv.memory.p2m_survey import survey
from xenpv.source.live import LiveDomain
from xenpv.verify.physmap import PhysmapCheck


def inspect_p2m(live: LiveDomain) -> dict[str, Any]:
    """Return findings, a description and all local entries of a running domain's p2m, or why it cannot be walked."""
    started = time.monotonic()
    findings = Findings()
    PhysmapCheck(live, findings).run()
    result: dict[str, Any] = {
        "seconds": time.monotonic() - started,
        "findings": [finding.to_json() for finding in findings if finding.severity is not Severity.NOTE],
        "notes": [finding.to_json() for finding in findings if finding.severity is Severity.NOTE],
    }
    try:
        result["p2m"] = describe(live, live.p2m, survey(live.p2m))
        entries: list[tuple[int, int]] = []
        for leaves in live.p2m.iter_leaves():
            local = names_local_frame(leaves.mfns)
            entries += zip(leaves.pfns[local].tolist(), leaves.mfns[local].tolist(), strict=True)
        result["entries"] = entries
    except GuestError as e:
        result["refused"] = str(e)
    return result


if __name__ == "__main__":
    with XenHost() as host:
        print(json.dumps({name: inspect_p2m(LiveDomain(host, find_domain(host, name))) for name in sys.argv[1:]}))
