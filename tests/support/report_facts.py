"""Facts of a report in which every text is hostile."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.writers.build import pv_domain
from tests.support.writers.envelopes import config_json
from xenpv.findings import Findings, Rule, Severity
from xenpv.report.gather import CheckResult, ReportFacts, gather_facts
from xenpv.source.saved import SavedDomain

HOSTILE = "</title><script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}\u202e\x1b[2J--></script>"
_SAID = Rule("report-test", HOSTILE, HOSTILE, Severity.ERROR)


def hostile_facts(tmp_path: Path) -> ReportFacts:
    """A domain of which every text is hostile."""
    domain = pv_domain(pfns=range(100), vcpus=2)
    line = HOSTILE.encode()[:200]
    domain.start_info["cmd_line"] = line
    config = json.loads(config_json(vcpus=2, memory_kib=400))
    config["c_info"] |= {"name": HOSTILE, "uuid": HOSTILE}
    config[HOSTILE] = HOSTILE
    file = tmp_path / "<img src=x onerror=alert(3)>.save"
    stream = domain.to_stream(config=json.dumps(config, ensure_ascii=False).encode() + b"\0")
    file.write_bytes(bytes(stream))
    findings = Findings()
    findings.add(_SAID, HOSTILE, pfn=5, record=HOSTILE, offset=7)
    with SavedDomain.open(str(file)) as saved:
        return gather_facts(saved, CheckResult(HOSTILE, ok=False, findings=findings), content_pages=1000)
