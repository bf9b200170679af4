"""Every rule of verify: a sound domain breaks none, and a broken one is reported with rule and place."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.breakage import CASES, Case, as_stream
from tests.support.saved_files import verify_file, verify_pipe
from tests.support.saving import BOTH
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from tests.support.writers.envelopes import ENVELOPES
from tests.support.writers.stream import Stream
from tests.verify import cases_cpu, cases_heuristics, cases_p2m, cases_page_tables, cases_vcpus
from xenpv.abi.declare import Width
from xenpv.findings import RULES, Finding, Rule
from xenpv.verify import rules

assert cases_cpu
assert cases_heuristics
assert cases_p2m
assert cases_page_tables
assert cases_vcpus

ANCHORS = {"list": (True, False), "tree": (False, True), "both": (True, True)}
# Rules that need more than a broken domain, and the tests that break them.
ELSEWHERE = {
    rules.TABLE_CONTENT: "test_verify.py::test_verify_page_data_with_too_few_pages_reports_its_tables",
    rules.PAGE_REPEATED: "test_streams.py::test_verify_pfn_twice_in_a_record_is_a_warning",
    rules.NOT_CHECKED: "test_streams.py::test_verify_pipe_reports_what_it_could_not_check",
    rules.XEND: "../convert/test_xend.py::test_verify_of_a_xend_file_says_that_it_has_to_be_converted",
}


@pytest.mark.parametrize("vcpus", [1, 3])
@pytest.mark.parametrize("anchors", ANCHORS)
@BOTH
def test_verify_sound_domain_finds_nothing(tmp_path: Path, width: Width, anchors: str, vcpus: int) -> None:
    linear, tree = ANCHORS[anchors]
    domain = pv_domain(width=width, linear=linear, tree=tree, vcpus=vcpus, pfns=[*range(128), 1030, 0x2_0000])
    data = domain.to_bytes()
    file = tmp_path / "good.save"
    file.write_bytes(data)
    for result in (verify_file(file), verify_pipe(data)):
        assert not result.findings, str(result)
        assert result.report.deep
        assert result.report.ok


@pytest.mark.parametrize("envelope", ENVELOPES)
@pytest.mark.parametrize("version", [2, 3])
def test_verify_sound_domain_in_any_envelope_finds_nothing(tmp_path: Path, envelope: str, version: int) -> None:
    data = pv_domain().to_bytes(envelope, version=version)
    file = tmp_path / "good.save"
    file.write_bytes(data)
    for result in (verify_file(file), verify_pipe(data)):
        assert not result.findings, str(result)


def test_every_rule_has_a_test_that_breaks_it() -> None:
    ours = {rule.name for rule in vars(rules).values() if isinstance(rule, Rule)}
    assert ours <= set(RULES)
    tested = {case.rule.name for case in CASES} | {rule.name for rule in ELSEWHERE}
    assert ours - tested == set(), "rules without a test that breaks them"
    for test_id in ELSEWHERE.values():
        file, _, test = test_id.partition("::")
        assert f"def {test}(" in (Path(__file__).parent / file).read_text()


def _sound_domain(case: Case) -> Domain:
    domain = pv_domain(**case.make)
    if case.prepare:
        case.prepare(domain)
    return domain


def _broken_stream(domain: Domain, case: Case) -> Stream:
    stream = as_stream(domain, case.config)
    if case.rewrite:
        case.rewrite(stream)
    return stream


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_verify_broken_domain_names_rule_and_place(tmp_path: Path, case: Case) -> None:
    sound = as_stream(_sound_domain(case))
    domain = _sound_domain(case)
    place = case.spoil(domain)
    bad = _broken_stream(domain, case)
    file = tmp_path / "broken.save"
    file.write_bytes(bytes(sound))
    assert not verify_file(file).findings, "the domain must be sound before it is broken"

    file.write_bytes(bytes(bad))
    result = verify_file(file)

    assert result.rules - case.may == {case.rule.name} | case.also, str(result)
    expected = dict(place.fields)
    if place.span:
        expected["offset"] = place.span(bad)[0]
    matching = [f for f in result.of_rule(case.rule.name) if _has_fields(f, expected)]
    assert len(matching) == 1, f"{expected}\n{result}"
    if case.rule.name not in case.also:
        assert result.report.findings.count[case.rule] == 1, str(result)
    assert result.report.ok == all(RULES[name].severity != "error" for name in result.rules)

    offset, length = place.span(bad) if place.span else (0, 0)
    if length:  # with the sound bytes at the place of the finding, nothing is wrong
        _patch(file, offset, bytes(sound)[offset : offset + length])
        repaired = verify_file(file)
        assert not repaired.findings, str(repaired)


def _has_fields(finding: Finding, expected: dict[str, int | str | None]) -> bool:
    return all(getattr(finding, name) == value for name, value in expected.items())


def _patch(file: Path, offset: int, data: bytes) -> None:
    with file.open("r+b") as f:
        f.seek(offset)
        f.write(data)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_verify_pipe_finds_the_same_as_file(tmp_path: Path, case: Case) -> None:
    domain = _sound_domain(case)
    case.spoil(domain)
    data = bytes(_broken_stream(domain, case))
    file = tmp_path / "broken.save"
    file.write_bytes(data)
    assert verify_pipe(data).findings == verify_file(file).findings
