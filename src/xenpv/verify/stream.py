"""Will it restore? The whole answer for one saved domain, in one pass.

Framing alone needs no NumPy, whose import takes longer than framing most files: what does is imported where it is used.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from xenpv.errors import StreamError
from xenpv.findings import Findings
from xenpv.io.progress import ProgressCallback
from xenpv.io.stream_input import Input
from xenpv.stream import rules
from xenpv.stream.envelope import Kind
from xenpv.stream.events import DomainHeader
from xenpv.stream.order import Guest
from xenpv.stream.pagedata import PageData
from xenpv.stream.reader import Reader
from xenpv.stream.records import End

if TYPE_CHECKING:
    from xenpv.source.saved import SavedDomain


@dataclass
class Report:
    """What was found.

    ``pages`` is the number of pages with content (as often as they were sent, for framing only), ``fatal`` the
    sentence at which the stream could not be read on, ``deep`` whether all was checked; ``saved`` the domain, held
    open, when it was.
    """

    name: str
    findings: Findings = field(default_factory=Findings)
    guest: Guest | None = None
    pages: int = 0
    deep: bool = False
    fatal: str | None = None
    saved: SavedDomain | None = None

    @property
    def ok(self) -> bool:
        """No error was found: as far as can be told without restoring it, it restores."""
        return self.findings.errors == 0

    @property
    def verdict(self) -> str:
        """The answer in a sentence."""
        if not self.ok:
            cut = "; nothing was checked behind the first place that cannot be read" if self.fatal else ""
            return f"would not restore as it was saved{cut}"
        if self.deep:
            return "restores, as far as can be told without doing it"
        domain = " of this HVM domain" if self.guest is Guest.HVM else ""
        return f"framing, order and records{domain} are sound"

    def close(self) -> None:
        """Close the domain, if it is held open."""
        if self.saved is not None:
            self.saved.close()

    def to_json(self) -> dict[str, Any]:
        """Plain values, for --json."""
        return {
            "file": self.name,
            "ok": self.ok,
            "deep": self.deep,
            "domain_type": None if self.guest is None else self.guest.name,
            "pages": self.pages,
            "errors": self.findings.errors,
            "warnings": self.findings.warnings,
            "findings": [finding.to_json() for finding in self.findings],
            "left_out": {rule.name: n for rule, n in self.findings.left_out().items()},
        }


def verify(
    source: str | Input,
    *,
    deep: bool = True,
    kind: Kind | None = None,
    keep: int = 20,
    progress: ProgressCallback | None = None,
) -> Report:
    """Check a saved domain, a path ("-": standard input) or an Input: all rules in one pass.

    Not ``deep``: framing, order and records only. ``keep`` findings of each rule are kept, all are counted. Raises
    RequestError when the path cannot be opened, and Unsupported when it holds no stream at all. Close the report when
    done.
    """
    source = Input.open(source) if isinstance(source, str) else source
    report = Report(source.name, Findings(keep))
    (_deep if deep else _framing)(source, report, kind, progress)
    return report


def _framing(source: Input, report: Report, kind: Kind | None, progress: ProgressCallback | None) -> None:
    complete = False
    try:
        for event in source.events(Reader(on_breach=report.findings.add_breach, kind=kind), progress):
            if isinstance(event, PageData):
                report.pages += event.pages
            elif isinstance(event, DomainHeader):
                report.guest = event.guest
            elif isinstance(event, End):
                complete = True
    except StreamError as e:
        _ends_early(report, e)
    finally:
        source.close()
    _trailing(source, report, complete)


def _deep(source: Input, report: Report, kind: Kind | None, progress: ProgressCallback | None) -> None:
    from xenpv.source.saved import SavedDomain  # noqa: PLC0415

    saved = SavedDomain.of(source, on_breach=report.findings.add_breach, kind=kind, progress=progress)
    judge(saved, report, progress)


def judge(saved: SavedDomain, report: Report, progress: ProgressCallback | None = None) -> None:
    """Check all of a domain that was opened with ``report.findings.add_breach``; the report holds it from then on."""
    from xenpv.frames import HAS_DATA  # noqa: PLC0415
    from xenpv.verify.domain import check_domain  # noqa: PLC0415

    report.saved, contents = saved, saved.contents
    if saved.error is not None:
        _ends_early(report, saved.error)
    _trailing(saved.source, report, contents.complete)
    report.pages = sum(n for page_type, n in contents.index.count().items() if HAS_DATA[page_type])
    report.guest = contents.domain.guest if contents.domain else None
    if report.guest is Guest.PV and contents.pv_info is not None:
        check_domain(saved, report.findings, progress)
        report.deep = True


def _ends_early(report: Report, error: StreamError) -> None:
    """Note where reading ended. What has no finding is no stream at all: nothing was verified, the error goes on."""
    if not report.findings.errors:
        report.close()
        raise error
    report.fatal = str(error)


def _trailing(source: Input, report: Report, complete: bool) -> None:
    if complete and report.fatal is None and source.trailing > 0:
        message = f"{source.trailing} bytes follow the end of the stream"
        report.findings.add(rules.TRAILING, message, offset=source.size - source.trailing)
