"""Will it restore? The whole answer for one saved domain, in one pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from xenpv.domain.check_p2m import check_p2m
from xenpv.domain.check_tables import TableChecks, gdt_frames
from xenpv.domain.check_vcpus import check_start_info, check_vcpus
from xenpv.domain.config import Config, config_of
from xenpv.domain.source import Progress, SavedDomain
from xenpv.findings import Findings, Rule
from xenpv.stream import rules as stream_rules
from xenpv.stream.envelope import Kind
from xenpv.stream.order import Guest


@dataclass
class Report:
    """What was found.

    ``fatal`` is the sentence at which the stream could not be read on; ``deep`` whether all was checked.
    """

    name: str
    findings: Findings = field(default_factory=Findings)
    saved: SavedDomain | None = None
    config: Config | None = None
    deep: bool = False
    fatal: str | None = None

    @property
    def ok(self) -> bool:
        """No error was found: as far as can be told without restoring it, it restores."""
        return self.findings.errors == 0

    def to_json(self) -> dict[str, Any]:
        """Plain values, for --json."""
        return {
            "file": self.name,
            "ok": self.ok,
            "deep": self.deep,
            "errors": self.findings.errors,
            "warnings": self.findings.warnings,
            "findings": [finding.to_json() for finding in self.findings],
            "left_out": {rule.name: n for rule, n in self.findings.left_out().items()},
        }


def verify(
    path: str,
    *,
    deep: bool = True,
    kind: Kind | None = None,
    fd: int | None = None,
    keep: int = 20,
    progress: Progress | None = None,
) -> Report:
    """Check the saved domain at ``path`` ("-": standard input; or an open ``fd``), all rules in one pass.

    Not ``deep``: framing, order and records only. Raises RequestError when the path cannot be opened, and Unsupported
    when it holds no stream at all. The report holds the domain open: close it (``report.saved.close()``) when done.
    """
    report = Report(path, Findings(keep))

    def fault(rule: Rule, message: str, offset: int, record: str | None) -> None:
        report.findings.add(rule, message, offset=offset, record=record)

    if fd is None:
        saved = SavedDomain.open(path, fault=fault, kind=kind, deep=deep, progress=progress)
    else:
        saved = SavedDomain.from_fd(fd, name=path, fault=fault, kind=kind, deep=deep, progress=progress)
    report.saved = saved
    report.config = config_of(saved.contents)
    if saved.error is not None:
        report.fatal = str(saved.error)
        if not report.findings:
            saved.close()
            raise saved.error
    if saved.trailing > 0 and saved.contents.complete:
        message = f"{saved.trailing} bytes follow the end of the stream"
        report.findings.add(stream_rules.TRAILING, message, offset=saved.size - saved.trailing)
    domain = saved.contents.domain
    if deep and domain is not None and domain.guest is Guest.PV and saved.contents.pv_info is not None:
        _check_domain(saved, report, progress)
        report.deep = True
    return report


def _check_domain(saved: SavedDomain, report: Report, progress: Progress | None) -> None:
    findings = report.findings
    check_vcpus(saved, findings, report.config)
    check_start_info(saved, findings)
    check_p2m(saved, findings, report.config)
    TableChecks(saved, findings, gdt_frames(saved)).run(progress)
