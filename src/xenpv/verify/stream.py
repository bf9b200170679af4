"""Verifies a saved domain: finds what would keep it from being restored.

It reads the file once.

A check of framing alone imports no NumPy, which takes longer to load than most files take to check.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from xenpv.errors import StreamError
from xenpv.findings import Findings
from xenpv.io.progress import ProgressCallback
from xenpv.io.stream_input import Input, StreamSource
from xenpv.source.config import Config
from xenpv.stream import rules
from xenpv.stream.envelope import Envelope, Kind
from xenpv.stream.events import DomainHeader, SectionHeader
from xenpv.stream.page_data import PageData
from xenpv.stream.reader import Reader
from xenpv.stream.record_order import Guest
from xenpv.stream.records import End
from xenpv.stream.seal import SealState
from xenpv.verify.rules import XEND

if TYPE_CHECKING:
    from xenpv.source.saved import SavedDomain


@dataclass
class Report:
    """What verify found in one saved domain.

    Attributes:
        name: The path, or "-" for standard input.
        findings: All findings.
        guest: PV or HVM; None if the stream does not say.
        pages: Pages with content. Without ``deep``, a page counts as often as it was sent.
        deep: Whether the domain itself was checked, and not only its framing.
        error: The error at which reading ended early, or None.
        sealed: Whether a seal was checked that covers the whole stream.
    """

    name: str
    findings: Findings = field(default_factory=Findings)
    guest: Guest | None = None
    pages: int = 0
    deep: bool = False
    error: StreamError | None = None
    sealed: bool = False

    @property
    def ok(self) -> bool:
        """Whether there is no error: the domain should restore."""
        return self.findings.errors == 0

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        if not self.ok:
            unchecked = "; nothing after the first unreadable record was checked" if self.error else ""
            return f"would not restore as it was saved{unchecked}"
        if self.deep:
            return "should restore"
        domain = " of this HVM domain" if self.guest is Guest.HVM else ""
        return f"framing, order and records{domain} are sound"

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values, for --json."""
        return {
            "file": self.name,
            "ok": self.ok,
            "deep": self.deep,
            "domain_type": None if self.guest is None else self.guest.name,
            "pages": self.pages,
            "sealed": self.sealed,
            "errors": self.findings.errors,
            "warnings": self.findings.warnings,
            "findings": [finding.to_json() for finding in self.findings],
            "left_out": {rule.name: n for rule, n in self.findings.omitted().items()},
        }


def verify(
    source: str | os.PathLike[str] | StreamSource,
    *,
    deep: bool = True,
    envelope: Kind | None = None,
    keep: int = 20,
    seal_key: bytes | None = None,
    require_seal: bool = False,
    progress: ProgressCallback | None = None,
) -> Report:
    """Check a saved domain against all rules in one pass.

    Args:
        source: A path ("-": standard input), or a stream source, which is closed.
        deep: Check the domain, too; otherwise only framing, order and records.
        envelope: What wraps the stream (default: detected).
        keep: Findings to keep of each rule. All are counted.
        seal_key: The key of a keyed seal; the stream has to have such a seal, and all of it.
        require_seal: Whether a stream without a seal, or with one that does not cover all of it, is an error.
        progress: Called while the file is read and while it is checked.

    Returns:
        The report. A broken file gives a report as well.

    Raises:
        RequestError: The path cannot be opened.
        StreamError: The file holds no stream at all.
    """
    if isinstance(source, str | os.PathLike):
        source = Input.open(os.fspath(source))
    findings = Findings(keep)
    if not deep:
        report, seal = _verify_framing(source, findings, envelope, progress)
        _require_seal(report, seal, require_seal, seal_key)
        return report
    from xenpv.source.saved import SavedDomain  # noqa: PLC0415  NumPy

    with SavedDomain.from_source(
        source, on_breach=findings.add_breach, kind=envelope, check_seal=True, seal_key=seal_key, progress=progress
    ) as saved:
        report = verify_domain(saved, findings, progress)
        _require_seal(report, saved.seal, require_seal, seal_key)
        return report


def _require_seal(report: Report, seal: SealState, required: bool, key: bytes | None) -> None:
    """Report why a seal does not vouch for the whole stream, if it has to."""
    report.sealed = seal.checked and not seal.gaps(keyed=key is not None)
    if required or key is not None:
        for gap in seal.gaps(keyed=key is not None):
            report.findings.add(rules.SEAL_COVERAGE, gap)


def verify_domain(saved: SavedDomain, findings: Findings, progress: ProgressCallback | None = None) -> Report:
    """Check an open saved domain against all rules.

    Args:
        saved: The domain, which stays open.
        findings: The findings of reading it: open it with ``on_breach=findings.add_breach``. More are added.
        progress: Called after each batch.

    Raises:
        StreamError: The file holds no stream at all.
    """
    from xenpv.frames import HAS_DATA  # noqa: PLC0415  NumPy
    from xenpv.verify.domain import check_domain  # noqa: PLC0415

    contents = saved.contents
    report = Report(saved.source.name, findings)
    if saved.error is not None:
        _end_early(report, saved.error)
    _check_trailing_data(saved.source, report, contents.complete)
    report.pages = sum(n for page_type, n in contents.index.count().items() if HAS_DATA[page_type])
    report.guest = contents.domain.guest if contents.domain else None
    _check_config(report, contents.envelope, contents.sections)
    if report.guest is Guest.PV and contents.pv_info is not None:
        check_domain(saved, findings, progress)
        report.deep = True
    return report


def _verify_framing(
    source: StreamSource, findings: Findings, envelope: Kind | None, progress: ProgressCallback | None
) -> tuple[Report, SealState]:
    """Check framing, order and records; return the seal's state, too."""
    report, complete = Report(source.name, findings), False
    header: Envelope | None = None
    sections: list[SectionHeader] = []
    reader = Reader(on_breach=findings.add_breach, kind=envelope, check_seal=False)
    try:
        for event in source.events(reader, progress):
            match event:
                case Envelope():
                    header = event
                case SectionHeader():
                    sections.append(event)
                case PageData():
                    report.pages += event.pages
                case DomainHeader():
                    report.guest = event.guest
                case End():
                    complete = True
    except StreamError as e:
        _end_early(report, e)
    finally:
        source.close()
    _check_config(report, header, sections)
    _check_trailing_data(source, report, complete)
    return report, reader.seal


def _end_early(report: Report, error: StreamError) -> None:
    """Note the error at which reading ended.

    Without a finding the file is no stream at all: raise the error.
    """
    if not report.findings.errors:
        raise error
    report.error = error


def _check_config(report: Report, envelope: Envelope | None, sections: list[SectionHeader]) -> None:
    """Report what keeps a toolstack from using the configuration in the envelope."""
    if envelope is not None and envelope.kind is Kind.XEND:
        report.findings.add(
            XEND, "xend wrote it; `xenpv convert` makes a file of it that xl restores", offset=0, record=envelope.name
        )
    config = Config.from_envelope(envelope, sections)
    if config is not None and envelope is not None:
        for rule, problem in config.iter_problems(report.guest):
            report.findings.add(rule, problem, offset=envelope.offset, record=envelope.name)


def _check_trailing_data(source: StreamSource, report: Report, complete: bool) -> None:
    """Report bytes after the end of a complete stream."""
    if complete and report.error is None and source.trailing > 0:
        message = f"{source.trailing} bytes follow the end of the stream"
        report.findings.add(rules.TRAILING, message, offset=source.size - source.trailing)
