"""``xenpv verify``: findings in text and JSON, and its exit status."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.command import xenpv
from tests.support.writers.domain import Domain
from xenpv.findings import RULES
from xenpv.verify import rules  # noqa: F401  so that all rules are there


def test_verify_of_a_good_file_exits_0_and_counts_pages(good: Path, domain: Domain) -> None:
    ran = xenpv("verify", good)
    assert (ran.code, ran.err) == (0, "")
    pages = len(domain.pages)
    (line,) = ran.out.splitlines()
    assert re.search(rf"\b{pages} pages\b", line.removeprefix(f"{good}: "))
    facts = xenpv("verify", "--json", good).json
    assert (facts["ok"], facts["deep"], facts["findings"]) == (True, True, [])


def test_verify_of_a_bad_file_exits_1_and_names_each_rule(bad: Path) -> None:
    ran = xenpv("verify", bad)
    assert (ran.code, ran.err) == (1, "")
    lines = ran.out.splitlines()
    assert len(lines) == 6
    assert [line.partition(":")[0] for line in lines[:-1]] == ["error"] * 4 + ["warning"]
    assert [line.rpartition("[")[2] for line in lines[:-1]] == ["start-info-frames]"] + ["pte-range]"] * 3 + [
        "trailing-data]"
    ]
    assert lines[-1] == f"{bad}: would not restore as it was saved (4 errors, 1 warning)"


def test_verify_prints_findings_in_order_of_offset(bad: Path) -> None:
    offsets = [int(line.split("(offset ")[1].split(",")[0].split(")")[0], 16)
               for line in xenpv("verify", bad).out.splitlines()[:-1]]  # fmt: skip
    assert offsets == sorted(offsets)


@pytest.mark.parametrize("which", ["good", "bad", "odd", "hvm"])
def test_verify_json_has_the_findings_of_the_text(which: str, request: pytest.FixtureRequest) -> None:
    file = request.getfixturevalue(which)
    ran, text = xenpv("verify", "--json", file), xenpv("verify", file)
    assert ran.code == text.code
    assert ran.err == ""
    facts = ran.json
    assert facts["file"] == str(file)
    assert facts["ok"] == (ran.code == 0)
    assert facts["errors"] + facts["warnings"] == len(facts["findings"]) == len(text.out.splitlines()) - 1
    for finding in facts["findings"]:
        assert finding["rule"] in RULES
        assert any(
            line.startswith(f"{finding['severity']}: {finding['message']}") and line.endswith(f"[{finding['rule']}]")
            for line in text.out.splitlines()
        )


def test_verify_of_warnings_alone_fails_only_with_strict(odd: Path) -> None:
    assert xenpv("verify", odd).code == 0
    assert "(0 errors, 1 warning)" in xenpv("verify", odd).out
    assert xenpv("verify", "--strict", odd).code == 1
    assert xenpv("verify", "--strict", "--json", odd).code == 1


def test_verify_strict_of_a_good_file_exits_0(good: Path) -> None:
    assert xenpv("verify", "--strict", good).code == 0


def test_verify_quiet_prints_nothing(good: Path, bad: Path) -> None:
    for file, code in ((good, 0), (bad, 1)):
        ran = xenpv("verify", "-q", file)
        assert (ran.code, ran.raw, ran.err) == (code, b"", "")


def test_verify_framing_finds_no_error_in_memory(bad: Path) -> None:
    ran = xenpv("verify", "--framing", bad)
    assert ran.code == 0
    assert "trailing-data" in ran.out
    facts = xenpv("verify", "--framing", "--json", bad).json
    assert (facts["ok"], facts["deep"]) == (True, False)


def test_verify_keep_counts_what_it_does_not_show(bad: Path) -> None:
    ran = xenpv("verify", "--keep", 1, bad)
    assert ran.code == 1
    assert re.search(r"\b2\b.*\[pte-range\]$", ran.out, re.MULTILINE)
    assert re.search(r"\b4 errors, 1 warning\b", ran.out.splitlines()[-1])
    assert xenpv("verify", "--keep", 0, bad).out.count("more of [") == 3
    assert xenpv("verify", "--keep", 1, "--json", bad).json["left_out"] == {"pte-range": 2}


@pytest.mark.parametrize("keep", ["-1", "many"])
def test_verify_keep_with_a_bad_number_is_wrong_usage(good: Path, keep: str) -> None:
    assert xenpv("verify", f"--keep={keep}", good).code == 64


def test_verify_of_a_pipe_has_the_findings_of_the_file(good: Path, bad: Path) -> None:
    ran = xenpv("verify", "-", stdin=good.read_bytes())
    assert ran.code == 0
    assert ran.out.startswith("standard input: should restore")
    ran = xenpv("verify", "-", stdin=bad.read_bytes())
    assert ran.code == 1
    assert ran.out.splitlines()[:-1] == xenpv("verify", bad).out.splitlines()[:-1]


def test_verify_hvm_checks_framing_and_counts_pages(hvm: Path) -> None:
    ran = xenpv("verify", hvm)
    assert ran.code == 0
    assert re.search(r"\bHVM\b.*\b15 pages\b", ran.out)


def test_verify_list_rules_prints_every_rule() -> None:
    ran = xenpv("verify", "--list-rules")
    assert ran.code == 0
    for rule in RULES.values():
        assert rule.name in ran.out
    listed = xenpv("verify", "--list-rules", "--json")
    assert {entry["rule"]: (entry["severity"], entry["text"], entry["source"]) for entry in listed.json} == {
        rule.name: (str(rule.severity), rule.text, rule.source) for rule in RULES.values()
    }


def test_verify_list_rules_has_the_rules_of_the_deep_check() -> None:
    """Modules that otherwise only a deep check imports declare some of the rules."""
    names = {entry["rule"] for entry in json.loads(xenpv("verify", "--list-rules", "--json").raw)}
    assert {"truncated", "pte-writable", "p2m-anchor", "vcpu-state", "page-missing"} <= names
