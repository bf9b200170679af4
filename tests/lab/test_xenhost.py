"""XenHost on each version of Xen: it agrees with stock tools, and passes the checks of Host."""

from __future__ import annotations

import json
import re

import pytest

import lab
from lab import guests

MIB = 96


@pytest.mark.deep_elsewhere
def test_xenhost_agrees_with_stock_tools_and_passes_the_host_checks(host: lab.Host) -> None:
    config = host.write("looked-at.cfg", guests.config("looked-at", memory=MIB, vcpus=2))
    start = len(host.guest_console("looked-at"))
    host.run(f"xl create {config}").check()
    host.wait_for_guest("looked-at", f"{guests.BEAT} 1", after=start)
    result = host.run(
        "xl pause looked-at && xl list > list && xl list -l > list.json && xenpv list --json > ours.json && "
        "xl dump-core looked-at /tmp/core && "
        "python3 -m tests.contract.host_on_xen looked-at /tmp/core > live.json; status=$?; rm -f /tmp/core; "
        "exit $status",
        timeout=300,
    )
    for name in ("live.json", "list"):
        print((result.outputs / name).read_text())  # shown when something fails
    result.check()
    outputs = {name: (result.outputs / name).read_text() for name in ("list", "list.json", "ours.json", "live.json")}
    _compare_lists(outputs["list"], json.loads(outputs["list.json"]), json.loads(outputs["ours.json"]))

    live = json.loads(outputs["live.json"])
    assert live["version"].startswith(f"{host.xen}.")
    assert {name: result for name, result in live["contract"].items() if result != "ok"} == {}
    core = live["core"]
    assert core["frames"] == core["info_pages"] == MIB * 256
    assert (core["differ"], core["unmapped"], core["m2p_differ"]) == (0, 0, 0)
    assert core["types"]["L4TAB_PIN"] > 0
    assert core["cr3_among_pinned_l4"]
    assert live["leaks"]["during"] == live["leaks"]["before"] + 1
    assert live["leaks"]["after"] == live["leaks"]["before"]
    assert 0 < live["dom0"]["mapped"] < live["dom0"]["asked"]
    assert live["died"]["after"].endswith("(ESRCH)")
    assert live["died"]["held"]
    assert live["readable_after_close"]
    assert "needs root in dom0" in live["without_root"]


def _compare_lists(text: str, config: list[dict[str, object]], ours: list[dict[str, object]]) -> None:
    """Ids, names, memory and vcpus of `xl list`; names and uuids of `xl list -l`, which has no dom0 on all versions."""
    rows = [re.split(r"\s+", line.strip()) for line in text.splitlines()[1:]]
    expected = [(int(row[1]), row[0], int(row[2])) for row in rows]
    memory = [(d["domid"], d["name"], int(str(d["memory"])) >> 20) for d in ours]
    assert memory == expected
    theirs = {c["domid"]: c["config"]["c_info"] for c in config}  # type: ignore[index]
    [(domid, mine)] = [(d["domid"], d) for d in ours if d["name"] == "looked-at"]
    assert mine["uuid"] == theirs[domid]["uuid"]
    assert (mine["vcpus"], mine["paused"], mine["hvm"], mine["width"]) == (2, True, False, 8)
