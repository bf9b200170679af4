"""XenHost as a mover on each version of Xen: it passes the checks, and reads the same as stock xl save."""

from __future__ import annotations

import json
from typing import Any

import pytest

import lab
from lab import guests

NAME = "moved"
STREAM = "/tmp/moved.save"  # noqa: S108  in dom0
CANCELLED = "litmus: resume (cancelled) 1"
WITHOUT_SHADOW = ("4.20",)  # Debian builds it without CONFIG_SHADOW_PAGING: no log-dirty mode for PV domains


@pytest.mark.deep_elsewhere
def test_mover_and_running_guest_checks_pass(host: lab.Host) -> None:
    before = start(host)
    live = run_checks(host, "")
    assert {name: result for name, result in live["contract"].items() if result != "ok"} == {}
    running = live["running"]
    logged = running.pop("log_dirty_logs_every_page_that_changes")
    assert {name: result for name, result in running.items() if result != "ok"} == {}
    if host.xen in WITHOUT_SHADOW:
        assert logged == "not on this Xen"
    else:
        assert 0 < logged["changed"] <= logged["logged"] < logged["changed"] + 50, logged
    resumed = host.wait_for_guest(NAME, CANCELLED, after=before)
    host.wait_for_guest(NAME, "pattern ok", after=resumed)
    assert "BAD" not in host.guest_console(NAME)[before:]


@pytest.mark.deep_elsewhere
def test_vcpu_state_and_policy_equal_what_stock_xl_save_writes(host: lab.Host) -> None:
    """Vcpus and policies of the same suspend are equal byte for byte; the TSC has advanced."""
    start(host)
    host.run(f"xl save -p {NAME} {STREAM}").check()
    stock = run_checks(host, STREAM)["stock"]
    tsc, ours = stock.pop("tsc"), stock.pop("our tsc")
    assert {name: sizes for name, sizes in stock.items() if not sizes[1]} == {}
    assert [stock[name][0] for name in ("extended0", "extended1")] == [64, 64]
    assert stock["xsave0"][0] >= 16
    assert stock["cpuid"][0] > 0
    assert stock["msr policy"][0] > 0
    assert (ours[0], ours[3]) == (tsc[0], tsc[3])
    assert ours[2] > tsc[2] > 0


def start(host: lab.Host) -> int:
    """Start the guest. Where its console output begins."""
    config = host.write(f"{NAME}.cfg", guests.litmus_config(NAME, 16, 2, options="dirty=500 p2m=both"))
    before = len(host.guest_console(NAME))
    host.run(f"xl create {config}").check()
    host.wait_for_guest(NAME, "heartbeat 1", after=before)
    return before


def run_checks(host: lab.Host, stream: str) -> dict[str, Any]:
    result = host.run(f"python3 -m tests.contract.mover_on_xen {NAME} {stream} > live.json", timeout=600)
    text = (result.outputs / "live.json").read_text()
    print(text)  # shown when something fails
    result.check()
    results: dict[str, Any] = json.loads(text)
    return results
