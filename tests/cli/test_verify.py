"""xenpv verify: what it says, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.command import xenpv
from tests.support.writers.domain import Domain
from xenpv.findings import RULES
from xenpv.verify import rules  # noqa: F401  so that all rules are there


def test_a_good_file(good: Path, domain: Domain) -> None:
    ran = xenpv("verify", good)
    assert (ran.code, ran.err) == (0, "")
    pages = len(domain.pages)
    what = f"should restore: {pages} pages and every page table are sound"
    assert ran.out == f"{good}: {what}\n"


def test_a_bad_file(bad: Path) -> None:
    ran = xenpv("verify", bad)
    assert (ran.code, ran.err) == (1, "")
    lines = ran.out.splitlines()
    assert len(lines) == 6
    assert [line.partition(":")[0] for line in lines[:-1]] == ["error"] * 4 + ["warning"]
    assert [line.rpartition("[")[2] for line in lines[:-1]] == ["start-info-frames]"] + ["pte-range]"] * 3 + [
        "trailing-data]"
    ]
    assert lines[-1] == f"{bad}: would not restore as it was saved (4 errors, 1 warning)"


def test_findings_come_in_the_order_of_the_file(bad: Path) -> None:
    offsets = [int(line.split("(offset ")[1].split(",")[0].split(")")[0], 16)
               for line in xenpv("verify", bad).out.splitlines()[:-1]]  # fmt: skip
    assert offsets == sorted(offsets)


@pytest.mark.parametrize("which", ["good", "bad", "odd", "hvm"])
def test_json_agrees_with_the_text(which: str, request: pytest.FixtureRequest) -> None:
    file = request.getfixturevalue(which)
    ran, told = xenpv("verify", "--json", file), xenpv("verify", file)
    assert ran.code == told.code
    assert ran.err == ""
    found = ran.json
    assert found["file"] == str(file)
    assert found["ok"] == (ran.code == 0)
    assert found["errors"] + found["warnings"] == len(found["findings"]) == len(told.out.splitlines()) - 1
    for finding in found["findings"]:
        assert finding["rule"] in RULES
        assert any(
            line.startswith(f"{finding['severity']}: {finding['message']}") and line.endswith(f"[{finding['rule']}]")
            for line in told.out.splitlines()
        )


def test_warnings_alone_are_fine_unless_strict(odd: Path) -> None:
    assert xenpv("verify", odd).code == 0
    assert "(0 errors, 1 warning)" in xenpv("verify", odd).out
    assert xenpv("verify", "--strict", odd).code == 1
    assert xenpv("verify", "--strict", "--json", odd).code == 1


def test_strict_on_a_good_file(good: Path) -> None:
    assert xenpv("verify", "--strict", good).code == 0


def test_quiet_says_nothing(good: Path, bad: Path) -> None:
    for file, code in ((good, 0), (bad, 1)):
        ran = xenpv("verify", "-q", file)
        assert (ran.code, ran.raw, ran.err) == (code, b"", "")


def test_framing_does_not_look_into_memory(bad: Path) -> None:
    ran = xenpv("verify", "--framing", bad)
    assert ran.code == 0
    assert "trailing-data" in ran.out
    assert "framing, order and records are sound" in ran.out
    assert xenpv("verify", "--framing", "--json", bad).json["deep"] is False


def test_keep_fewer_findings(bad: Path) -> None:
    ran = xenpv("verify", "--keep", 1, bad)
    assert ran.code == 1
    assert "… and 2 more of [pte-range]" in ran.out
    assert "(4 errors, 1 warning)" in ran.out
    assert xenpv("verify", "--keep", 0, bad).out.count("more of [") == 3
    assert xenpv("verify", "--keep", 1, "--json", bad).json["left_out"] == {"pte-range": 2}


@pytest.mark.parametrize("keep", ["-1", "many"])
def test_keep_is_a_number(good: Path, keep: str) -> None:
    assert xenpv("verify", f"--keep={keep}", good).code == 64


def test_a_pipe(good: Path, bad: Path) -> None:
    ran = xenpv("verify", "-", stdin=good.read_bytes())
    assert ran.code == 0
    assert ran.out.startswith("standard input: should restore")
    ran = xenpv("verify", "-", stdin=bad.read_bytes())
    assert ran.code == 1
    assert ran.out.splitlines()[:-1] == xenpv("verify", bad).out.splitlines()[:-1]


def test_hvm(hvm: Path) -> None:
    ran = xenpv("verify", hvm)
    assert ran.code == 0
    assert "framing, order and records of this HVM domain are sound (15 pages)" in ran.out


def test_list_rules() -> None:
    ran = xenpv("verify", "--list-rules")
    assert ran.code == 0
    for rule in RULES.values():
        assert rule.name in ran.out
    listed = xenpv("verify", "--list-rules", "--json")
    assert {entry["rule"]: (entry["severity"], entry["text"], entry["source"]) for entry in listed.json} == {
        rule.name: (str(rule.severity), rule.text, rule.source) for rule in RULES.values()
    }


def test_list_rules_knows_all_without_having_verified_anything() -> None:
    """The rules of what only the deep checks import are listed, too."""
    names = {entry["rule"] for entry in json.loads(xenpv("verify", "--list-rules", "--json").raw)}
    assert {"truncated", "pte-writable", "p2m-anchor", "vcpu-state", "page-missing"} <= names
