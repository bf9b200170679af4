"""What moves domains on real Xen, each version: the contract holds, and our calls give what stock xl save writes."""

from __future__ import annotations

import json
from typing import Any

import pytest

import lab
from lab import guests

NAME = "moved"
STREAM = "/tmp/moved.save"  # noqa: S108  in dom0
CANCELLED = "litmus: resume (cancelled) 1"
WITHOUT_SHADOW = ("4.20",)  # Debian builds it without CONFIG_SHADOW_PAGING: it cannot log what PV domains write


@pytest.mark.deep_elsewhere
def test_the_contract_of_what_moves_domains(host: lab.Host) -> None:
    before = start(host)
    live = look(host, "")
    assert {name: why for name, why in live["contract"].items() if why != "ok"} == {}
    running = live["running"]
    logged = running.pop("all_that_changes_is_in_the_log")
    assert {name: why for name, why in running.items() if why != "ok"} == {}
    if host.xen in WITHOUT_SHADOW:
        assert logged == "not on this Xen"
    else:
        assert 0 < logged["changed"] <= logged["logged"] < logged["changed"] + 50, logged
    resumed = host.wait_for_guest(NAME, CANCELLED, after=before)
    host.wait_for_guest(NAME, "pattern ok", after=resumed)
    assert "BAD" not in host.guest_console(NAME)[before:]


@pytest.mark.deep_elsewhere
def test_our_calls_give_what_stock_xl_save_writes(host: lab.Host) -> None:
    """Byte for byte, vcpus and policies, of the very suspend; the TSC has gone on."""
    start(host)
    host.run(f"xl save -p {NAME} {STREAM}").check()
    stock = look(host, STREAM)["stock"]
    tsc, ours = stock.pop("tsc"), stock.pop("our tsc")
    assert {name: sizes for name, sizes in stock.items() if not sizes[1]} == {}
    assert [stock[name][0] for name in ("extended0", "extended1")] == [64, 64]
    assert stock["xsave0"][0] >= 16
    assert stock["cpuid"][0] > 0
    assert stock["msr policy"][0] > 0
    assert (ours[0], ours[3]) == (tsc[0], tsc[3])
    assert ours[2] > tsc[2] > 0


def start(host: lab.Host) -> int:
    """Where its console begins."""
    config = host.write(f"{NAME}.cfg", guests.litmus_config(NAME, 16, 2, options="dirty=500 p2m=both"))
    before = len(host.guest_console(NAME))
    host.run(f"xl create {config}").check()
    host.wait_for_guest(NAME, "heartbeat 1", after=before)
    return before


def look(host: lab.Host, stream: str) -> dict[str, Any]:
    result = host.run(f"python3 -m tests.contract.live_move {NAME} {stream} > live.json", timeout=600)
    text = (result.outputs / "live.json").read_text()
    print(text)  # shown when something fails
    result.check()
    found: dict[str, Any] = json.loads(text)
    return found
