"""Every rule of what a stream describes: a good domain keeps all; what breaks one is named, with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.breakage import CASES, Case, as_stream
from tests.support.saved_files import judge, judge_pipe
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from tests.support.writers.envelopes import ENVELOPES
from tests.support.writers.stream import Stream
from tests.verify import cases_heuristics, cases_p2m, cases_page_tables, cases_vcpus
from xenpv.abi.declare import Width
from xenpv.findings import RULES, Finding, Rule
from xenpv.verify import rules

assert cases_heuristics
assert cases_p2m
assert cases_page_tables
assert cases_vcpus

ANCHORS = {"list": (True, False), "tree": (False, True), "both": (True, True)}
# Rules that take more than a domain to break; the test of that name does.
ELSEWHERE = {
    rules.TABLE_CONTENT: "test_verify.py::test_content_of_which_nobody_knows_whose_it_is",
    rules.PAGE_REPEATED: "test_streams.py::test_one_record_that_names_a_page_twice",
    rules.NOT_CHECKED: "test_streams.py::test_what_a_pipe_let_go_is_said",
}


@pytest.mark.parametrize("vcpus", [1, 3])
@pytest.mark.parametrize("anchors", ANCHORS)
@pytest.mark.parametrize("width", [8, 4])
def test_a_good_domain_has_no_findings(tmp_path: Path, width: Width, anchors: str, vcpus: int) -> None:
    linear, tree = ANCHORS[anchors]
    domain = pv_domain(width=width, linear=linear, tree=tree, vcpus=vcpus, pfns=[*range(128), 1030, 0x2_0000])
    data = domain.to_bytes()
    file = tmp_path / "good.save"
    file.write_bytes(data)
    for verdict in (judge(file), judge_pipe(data)):
        assert not verdict.found, str(verdict)
        assert verdict.report.deep
        assert verdict.report.ok


@pytest.mark.parametrize("envelope", ENVELOPES)
@pytest.mark.parametrize("version", [2, 3])
def test_a_good_domain_has_no_findings_in_any_envelope(tmp_path: Path, envelope: str, version: int) -> None:
    data = pv_domain().to_bytes(envelope, version=version)
    file = tmp_path / "good.save"
    file.write_bytes(data)
    for verdict in (judge(file), judge_pipe(data)):
        assert not verdict.found, str(verdict)


def test_every_rule_has_a_way_to_be_broken() -> None:
    ours = {rule.name for rule in vars(rules).values() if isinstance(rule, Rule)}
    assert ours <= set(RULES)
    tested = {case.rule.name for case in CASES} | {rule.name for rule in ELSEWHERE}
    assert ours - tested == set(), "rules without a test that breaks them"
    for where in ELSEWHERE.values():
        file, _, test = where.partition("::")
        assert f"def {test}(" in (Path(__file__).parent / file).read_text()


def _made(case: Case) -> Domain:
    domain = pv_domain(**case.make)
    if case.prepare:
        case.prepare(domain)
    return domain


def _broken(domain: Domain, case: Case) -> Stream:
    stream = as_stream(domain, case.config)
    if case.rewrite:
        case.rewrite(stream)
    return stream


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_breaks_is_named_with_its_place(tmp_path: Path, case: Case) -> None:
    good = as_stream(_made(case))
    domain = _made(case)
    where = case.spoil(domain)
    bad = _broken(domain, case)
    file = tmp_path / "broken.save"
    file.write_bytes(bytes(good))
    assert not judge(file).found, "the domain is to be good before it is broken"

    file.write_bytes(bytes(bad))
    verdict = judge(file)

    assert verdict.rules - case.may == {case.rule.name} | case.also, str(verdict)
    expected = dict(where.fields)
    if where.span:
        expected["offset"] = where.span(bad)[0]
    matching = [f for f in verdict.of(case.rule.name) if _agrees(f, expected)]
    assert len(matching) == 1, f"{expected}\n{verdict}"
    if case.rule.name not in case.also:
        assert verdict.report.findings.count[case.rule] == 1, str(verdict)
    assert verdict.report.ok == all(RULES[name].severity == "warning" for name in verdict.rules)

    offset, length = where.span(bad) if where.span else (0, 0)
    if length:  # put the good bytes back where the finding points, and nothing is wrong any more
        _patch(file, offset, bytes(good)[offset : offset + length])
        mended = judge(file)
        assert not mended.found, str(mended)


def _agrees(finding: Finding, expected: dict[str, int | str | None]) -> bool:
    return all(getattr(finding, name) == value for name, value in expected.items())


def _patch(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as f:
        f.seek(offset)
        f.write(data)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_pipe_tells_the_same_as_a_file(tmp_path: Path, case: Case) -> None:
    domain = _made(case)
    case.spoil(domain)
    data = bytes(_broken(domain, case))
    file = tmp_path / "broken.save"
    file.write_bytes(data)
    assert judge_pipe(data).found == judge(file).found
