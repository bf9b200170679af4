"""XenHost as a toolstack on each version of Xen: it passes the checks, and a domain that it builds runs."""

from __future__ import annotations

import json
import re

import lab

XEN_HEAP_PAGES = 4  # that Xen keeps after some thirty domains; one leaked domain would be 21 pages or more


def test_toolstack_checks_pass_and_a_built_domain_runs_and_leaves_nothing(host: lab.Host) -> None:
    result = host.run("python3 -m tests.contract.toolstack_on_xen tiny > live.json", timeout=600)
    text = (result.outputs / "live.json").read_text()
    print(text)  # shown when something fails
    result.check()
    live = json.loads(text)
    assert live["version"].startswith(f"{host.xen}.")
    assert {name: result for name, result in live["contract"].items() if result != "ok"} == {}

    tiny = live["tiny"]
    assert re.search(r"^tiny\s+\d+\s+0\s+1\s+--p---\s", tiny["list_paused"], re.MULTILINE)
    assert tiny["shut_down"]
    assert tiny["reason"] == 5
    assert re.search(r"^tiny\s+\d+\s+0\s+1\s+---s\S\S\s", tiny["list_shutdown"], re.MULTILINE)
    assert tiny["domname"] == "tiny"
    assert tiny["tty"]
    assert tiny["printed"]
    assert tiny["gone"]
    assert live["xl_destroyed"]
    assert "CONFIG_PV32" in live["width_4"]
    assert live["width_4"].endswith("(EOPNOTSUPP)")
    assert live["left_in_xenstore"] == []
    assert live["domains"] == [0]
    before, after = live["free_pages"]
    assert before - after <= XEN_HEAP_PAGES
    ours, theirs = live["free_mib"]
    assert abs(ours - theirs) <= 1
    assert "needs root in dom0" in live["without_root"]
