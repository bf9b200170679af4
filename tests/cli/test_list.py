"""``xenpv list``: a line for each domain, in text and JSON."""

from __future__ import annotations

import pytest

from tests.support.command import lines, xenpv
from tests.support.host_stub import HostStub, domain_info

UUID = "01234567-89ab-cdef-0123-456789abcdef"


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    domains = [
        domain_info(0, "Domain-0"),
        domain_info(1, "a", UUID, paused=True, width=4),
        domain_info(2, None, shutdown=True, shutdown_reason=3, pages=1 << 28),
        domain_info(3, "evil\x1b[2J", shutdown=True, shutdown_reason=77, hvm=True),
        domain_info(4, "b", dying=True, max_vcpu=-1),
    ]
    monkeypatch.setattr("xenpv.cli.list.XenHost", lambda: HostStub(*domains))


def test_list_prints_state_memory_and_type_of_each_domain() -> None:
    rows = [line.strip() for line in lines(xenpv("list")).splitlines()]
    for row in (
        "0 Domain-0 4.0 MiB 2 running PV, 64-bit",
        f"1 a {UUID} 4.0 MiB 2 paused PV, 32-bit",
        "2 1.0 TiB 2 shut down: crash PV, 64-bit",
        "3 evil?[2J 4.0 MiB 2 shut down: 77 HVM or PVH",
        "4 b 4.0 MiB 0 dying PV, 64-bit",
    ):
        assert row in rows


def test_list_json_adds_memory_in_bytes_and_vcpus() -> None:
    listed = xenpv("list", "--json").json
    assert [domain["domid"] for domain in listed] == [0, 1, 2, 3, 4]
    assert [domain["memory"] for domain in listed] == [4 << 20, 4 << 20, 1 << 40, 4 << 20, 4 << 20]
    assert [domain["vcpus"] for domain in listed] == [2, 2, 2, 2, 0]
    assert (listed[1]["uuid"], listed[1]["paused"], listed[2]["shutdown_reason"]) == (UUID, True, 3)


def test_list_without_xenstore_notes_that_no_names_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert xenpv("list").err == ""
    monkeypatch.setattr(HostStub, "xenstore_error", "xenstore cannot be reached")
    ran = xenpv("list")
    assert (ran.code, ran.err.count("xenstore cannot be reached")) == (0, 1)
