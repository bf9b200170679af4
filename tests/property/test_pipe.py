"""A saved domain says the same out of a pipe as out of a file, however often its pages were sent.

A live migration sends a page again when it changed; its type may have changed too. Of a pipe only some pages are kept,
so what was kept of an earlier sending has to go.
"""

from __future__ import annotations

import tempfile

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.verify import from_pipe, judge
from tests.support.writers.build import pattern, pv_domain
from tests.support.writers.domain import Domain
from tests.support.writers.stream import NOTAB, PAGE, WITH_DATA, XTAB, Wire
from xenpv.abi.declare import Width
from xenpv.verify.stream import Report

W = Wire()
WHAT = ["its own", "zeroes", "ones", "pattern", "start_info", "top", "p2m_missing", "tree_top"]
again = st.lists(
    st.tuples(st.integers(0, 35), st.sampled_from([None, NOTAB, 1, 2, 3, XTAB]), st.sampled_from(WHAT)),
    min_size=1,
    max_size=6,
    unique_by=lambda sent: sent[0],
)


def content(domain: Domain, pfn: int, what: str) -> bytes:
    """One of WHAT; the last ones are the page that has that part to play in the domain."""
    match what:
        case "its own":
            return bytes(domain.pages.get(pfn, bytes(PAGE)))
        case "zeroes":
            return bytes(PAGE)
        case "ones":
            return b"\xff" * PAGE
        case "pattern":
            return bytes(pattern(pfn ^ 0x55))
    return bytes(domain.pages[getattr(domain.places, what)])


def both_ways(data: bytes) -> tuple[list[str], list[str]]:
    """What is found in a file and in a pipe; not what hangs on pages that a pipe keeps on suspicion only."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        reports = judge(file.name, True), from_pipe(data, True)
    of_file, of_pipe = (
        [str(finding) for finding in report.findings if finding.rule.name not in {"p2m-anchor", "not-checked"}]
        for report in reports
        if isinstance(report, Report)
    )
    return of_file, of_pipe


def sent_again(domain: Domain, rounds: list[list[tuple[int, int | None, str]]]) -> bytes:
    """The domain with pages sent again in further rounds, with other contents and types (None: its own)."""
    stream = domain.to_stream("libxc", batch=16)
    for pages in rounds:
        entries = [(pfn, domain.types[pfn] if kind is None else kind) for pfn, kind, _ in pages]
        contents = [content(domain, pfn, what) for pfn, _, what in pages]
        contents = [page for page, (_, kind) in zip(contents, entries, strict=True) if kind in WITH_DATA]
        stream.before("X86_TSC_INFO", W.page_data(entries, contents))
    return bytes(stream)


@settings(max_examples=25)
@given(st.sampled_from([4, 8]), st.lists(again, max_size=3))
def test_pages_sent_again(width: Width, rounds: list[list[tuple[int, int | None, str]]]) -> None:
    domain = pv_domain(width=width, pfns=range(36), tree=True)
    file, pipe = both_ways(sent_again(domain, rounds))
    assert pipe == file


def test_a_start_info_page_that_was_one_only_at_first() -> None:
    domain = pv_domain(pfns=range(36))
    data = sent_again(domain, [[(domain.places.start_info, None, "pattern")]])
    found = from_pipe(data, True)
    assert isinstance(found, Report)
    assert {rule.name for rule in found.findings.count} == {"start-info-magic"}


def test_a_live_migration_that_ends_well() -> None:
    """Every page twice, wrong at first."""
    domain = pv_domain(pfns=range(36), tree=True)
    stream = domain.to_stream("libxc", batch=16)
    wrong = [W.page_data([(pfn, NOTAB)], [bytes(pattern(pfn ^ 1))]) for pfn in domain.pages]
    found = from_pipe(bytes(stream.before("PAGE_DATA", *wrong)), True)
    assert isinstance(found, Report)
    assert [str(finding) for finding in found.findings] == []
