"""Restores files of stock xl on real Xen: the guests run on."""

from __future__ import annotations

import json
import re

import pytest

import lab
from lab import guests
from tests.support.lab.guest import start

RESTORE = """
import json, sys, time
from xenpv.io.stream_input import Input
from xenpv.restore.restore import restore_domain
from xenpv.host.xen.host import XenHost

results = {}
with XenHost() as host:
    for path in sys.argv[1:]:
        began = time.monotonic()
        restored = restore_domain(host, Input.open(path))
        results[restored.name] = {
            "domid": restored.domid, "pages": restored.pages, "entries": restored.entries, "tables": restored.tables,
            "pinned": restored.pinned, "seconds": round(time.monotonic() - began, 2),
        }
print(json.dumps(results))
"""
FORMS = {
    "tree": "p2m=tree",
    "linear": "p2m=linear",
    "both": "p2m=both",
    "spread": "p2m=linear spread=3G places=2 vaddr=+1G",
    "hidden": "p2m=tree4hidden",
}


@pytest.mark.deep
def test_restore_guests_run_on_and_stock_tools_manage_them(host: lab.Host) -> None:
    """litmus in each form checks its pattern when it resumes; Debian prints a heartbeat."""
    script, free = host.write("restore.py", RESTORE), host.run("xl info free_memory").check().text
    running = [
        start(host, f"moved-{name}", guests.litmus_config(f"moved-{name}", memory=32, options=options), "litmus: up ")
        for name, options in FORMS.items()
    ]
    debian = start(host, "moved-debian", guests.config("moved-debian"), f"{guests.BEAT} 1")
    names = [guest.name for guest in (*running, debian)]
    saves = "".join(f"xl save {name} $TMPDIR/{name}\n" for name in names)
    files = " ".join(f"$TMPDIR/{name}" for name in names)
    result = host.run(f"set -e\n{saves}python3 {script} {files}\nxl list\nrm {files}", timeout=240).check()
    results = json.loads(result.text.splitlines()[0])
    print(host.xen, results)
    assert list(results) == names
    for guest in running:
        guest.wait("litmus: pattern ok")
    debian.beats(guests.BEAT)
    checked = host.run("\n".join(f"xenpv check {name}" for name in names), timeout=240)
    assert checked.status == 0, checked.text
    again = "".join(f"xl save {name} $TMPDIR/{name} && xl restore $TMPDIR/{name} || exit 1\n" for name in names)
    host.run(again, timeout=240).check()  # stock tools manage it as any other domain
    for guest in running:
        guest.wait("litmus: pattern ok")
    debian.wait(guests.BEAT)
    host.run("".join(f"xl destroy {name}; rm $TMPDIR/{name}\n" for name in names)).check()
    assert host.run("xl info free_memory").check().text == free
    assert not re.findall("moved-", host.run("xenstore-ls -f; xl list").check().text)
