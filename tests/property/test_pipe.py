"""verify() reports the same for a pipe as for a file, however often the stream sends a page.

A live migration sends a page again when it changed; its type may have changed too. From a pipe, verify() keeps only
some pages, and must forget the earlier content of a page that comes again.
"""

from __future__ import annotations

import tempfile

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.verifying import verify_or_error, verify_pipe
from tests.support.writers.build import pattern, pv_domain
from tests.support.writers.domain import Domain
from tests.support.writers.stream import NOTAB, PAGE, WITH_DATA, XTAB, Wire
from xenpv.abi.declare import Width
from xenpv.verify.stream import Report

W = Wire()
CONTENTS = ["its own", "zeroes", "ones", "pattern", "start_info", "top", "p2m_missing", "tree_top"]
again = st.lists(
    st.tuples(st.integers(0, 35), st.sampled_from([None, NOTAB, 1, 2, 3, XTAB]), st.sampled_from(CONTENTS)),
    min_size=1,
    max_size=6,
    unique_by=lambda sent: sent[0],
)


def content(domain: Domain, pfn: int, name: str) -> bytes:
    """Return the page content of one of CONTENTS; the last four name a page of the domain."""
    match name:
        case "its own":
            return bytes(domain.pages.get(pfn, bytes(PAGE)))
        case "zeroes":
            return bytes(PAGE)
        case "ones":
            return b"\xff" * PAGE
        case "pattern":
            return bytes(pattern(pfn ^ 0x55))
    return bytes(domain.pages[getattr(domain.places, name)])


def findings_of_file_and_pipe(data: bytes) -> tuple[list[str], list[str]]:
    """Return both lists of findings, without the rules on pages that a pipe may not keep."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        reports = verify_or_error(file.name, deep=True), verify_pipe(data, deep=True)
    of_file, of_pipe = (
        [str(finding) for finding in report.findings if finding.rule.name not in {"p2m-anchor", "not-checked"}]
        for report in reports
        if isinstance(report, Report)
    )
    return of_file, of_pipe


def with_pages_resent(domain: Domain, rounds: list[list[tuple[int, int | None, str]]]) -> bytes:
    """Return the domain's stream with more rounds of pages, of other contents and types (None: its own)."""
    stream = domain.to_stream("libxc", batch=16)
    for pages in rounds:
        entries = [(pfn, domain.types[pfn] if kind is None else kind) for pfn, kind, _ in pages]
        contents = [content(domain, pfn, name) for pfn, _, name in pages]
        contents = [page for page, (_, kind) in zip(contents, entries, strict=True) if kind in WITH_DATA]
        stream.before("X86_TSC_INFO", W.page_data(entries, contents))
    return bytes(stream)


@settings(max_examples=25)
@given(st.sampled_from([4, 8]), st.lists(again, max_size=3))
def test_verify_of_resent_pages_is_equal_for_file_and_pipe(
    width: Width, rounds: list[list[tuple[int, int | None, str]]]
) -> None:
    """PAGE_DATA: a later record for a pfn replaces the earlier one."""
    domain = pv_domain(width=width, pfns=range(36), tree=True)
    file, pipe = findings_of_file_and_pipe(with_pages_resent(domain, rounds))
    assert pipe == file


def test_verify_pipe_start_info_resent_as_other_content_is_reported() -> None:
    domain = pv_domain(pfns=range(36))
    data = with_pages_resent(domain, [[(domain.places.start_info, None, "pattern")]])
    report = verify_pipe(data, deep=True)
    assert isinstance(report, Report)
    assert {rule.name for rule in report.findings.count} == {"start-info-magic"}


def test_verify_pipe_pages_corrected_by_a_resend_give_no_finding() -> None:
    """Every page comes twice; only the second content is right."""
    domain = pv_domain(pfns=range(36), tree=True)
    stream = domain.to_stream("libxc", batch=16)
    wrong = [W.page_data([(pfn, NOTAB)], [bytes(pattern(pfn ^ 1))]) for pfn in domain.pages]
    report = verify_pipe(bytes(stream.before("PAGE_DATA", *wrong)), deep=True)
    assert isinstance(report, Report)
    assert [str(finding) for finding in report.findings] == []
