"""``xenpv walk``: each entry of a walk, and walks that end before a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.command import xenpv
from tests.support.writers.build import USER_VADDR
from tests.support.writers.domain import Domain


def test_walk_prints_every_entry_and_the_page(good: Path, domain: Domain) -> None:
    vaddr = domain.vaddrs[600] + 0x123
    ran = xenpv("walk", good, hex(vaddr))
    assert (ran.code, ran.err) == (0, "")
    steps = domain.walk(vaddr)
    for step in steps:
        row = next(line for line in ran.out.splitlines() if line.split()[:1] == [f"L{step.level}"])
        assert row.split()[1] == f"{step.table:#x}"
        assert row.split()[3] == str(step.entry)
        assert row.split()[4] == f"{step.pte:#018x}"
    assert re.findall("0x[0-9a-f]+", ran.out.splitlines()[-1]) == [f"{vaddr:#x}", "0x258", "0x123"]


def test_walk_json_has_every_entry(good: Path, domain: Domain) -> None:
    vaddr = domain.vaddrs[domain.places.top]
    facts = xenpv("walk", "--json", good, vaddr).json
    assert (facts["vaddr"], facts["pfn"], facts["fault"]) == (vaddr, domain.places.top, None)
    assert [(s["level"], s["table_pfn"], s["entry"], s["pte"]) for s in facts["steps"]] == [
        tuple(step) for step in domain.walk(vaddr)
    ]
    assert [s["type"] for s in facts["steps"]] == ["L4TAB_PIN", "L3TAB", "L2TAB", "L1TAB"]
    assert facts["steps"][-1]["flags"] == "P|US|A|D|NX", "a page table is mapped read-only"


@pytest.mark.parametrize(
    ("vaddr", "why"),
    [
        ("0xffff800000000000", "L4[256] is Xen's own slot, which no stream has"),
        ("0x0000900000000000", "not a canonical address"),
        ("0xffffa00000000000", "L4[320] of pfn"),
    ],
)
def test_walk_of_an_unmapped_address_exits_1_and_names_the_entry(good: Path, vaddr: str, why: str) -> None:
    ran = xenpv("walk", good, vaddr)
    assert ran.code == 1
    assert f"{int(vaddr, 0):#x} is not mapped" in ran.out
    assert why in ran.out
    as_json = xenpv("walk", "--json", good, vaddr)
    assert as_json.code == 1
    assert as_json.json["pfn"] is None
    assert why in as_json.json["fault"]


def test_walk_user_vcpu_and_top_options_choose_the_top_table(good: Path, domain: Domain) -> None:
    user = xenpv("walk", "--user", "--json", good, hex(USER_VADDR)).json
    assert user["steps"][0]["table_pfn"] == domain.places.user_top
    assert user["pfn"] == domain.places.user
    assert xenpv("walk", "--vcpu", 1, good, domain.vaddrs[0]).code == 0
    top = xenpv("walk", "--top", hex(domain.places.user_top), "--json", good, USER_VADDR).json
    assert top["steps"] == user["steps"]
    assert xenpv("walk", "--top", "0x7777", good, USER_VADDR).code == 1
