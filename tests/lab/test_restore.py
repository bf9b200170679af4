"""What stock xl saved on real Xen, restored by us: the guest goes on, and nothing of what fails is left."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import pytest

import lab
from lab import guests

RESTORE = """
import json, sys, time
from xenpv.domain.input import Input
from xenpv.domain.restore import restore_domain
from xenpv.host.xen_move import XenMover

said = {}
with XenMover() as host:
    for path in sys.argv[1:]:
        began = time.monotonic()
        restored = restore_domain(host, Input.open(path))
        said[restored.name] = {
            "domid": restored.domid, "pages": restored.pages, "entries": restored.entries, "tables": restored.tables,
            "pinned": restored.pinned, "seconds": round(time.monotonic() - began, 2),
        }
print(json.dumps(said))
"""
FORMS = {
    "tree": "p2m=tree",
    "linear": "p2m=linear",
    "both": "p2m=both",
    "spread": "p2m=linear spread=3G places=2 vaddr=+1G",
    "hidden": "p2m=tree4hidden",
}


@dataclass
class Guest:
    name: str
    host: lab.Host
    at: int = 0

    def boot(self, config: str, up: str) -> None:
        self.at = len(self.host.guest_console(self.name))
        path = self.host.write(f"{self.name}.cfg", config)
        self.host.run(f"xl create -q {path}").check()
        self.wait(up)

    def wait(self, text: str) -> None:
        self.at = self.host.wait_for_guest(self.name, text, after=self.at)


@pytest.mark.deep_elsewhere
def test_guests_go_on(host: lab.Host) -> None:
    """litmus in each form, which checks its pattern when it resumes, and Debian, whose heart goes on beating."""
    script, free = host.write("restore.py", RESTORE), host.run("xl info free_memory").check().text
    running = [Guest(f"moved-{name}", host) for name in FORMS]
    for guest, options in zip(running, FORMS.values(), strict=True):
        guest.boot(guests.litmus_config(guest.name, memory=32, options=options), "litmus: up ")
    debian = Guest("moved-debian", host)
    debian.boot(guests.config(debian.name), f"{guests.BEAT} 1")
    names = [guest.name for guest in (*running, debian)]
    saves = "".join(f"xl save {name} $TMPDIR/{name}\n" for name in names)
    files = " ".join(f"$TMPDIR/{name}" for name in names)
    result = host.run(f"set -e\n{saves}python3 {script} {files}\nxl list\nrm {files}", timeout=240).check()
    said = json.loads(result.text.splitlines()[0])
    print(host.xen, said)
    assert list(said) == names
    for guest in running:
        guest.wait("litmus: pattern ok")
    debian.wait(guests.BEAT)
    debian.wait(guests.BEAT)
    checked = host.run("\n".join(f"xenpv check {name}" for name in names), timeout=240)
    assert checked.status == 0, checked.text
    again = "".join(f"xl save {name} $TMPDIR/{name} && xl restore $TMPDIR/{name} || exit 1\n" for name in names)
    host.run(again, timeout=240).check()  # and stock tools have it again, as any other
    for guest in running:
        guest.wait("litmus: pattern ok")
    debian.wait(guests.BEAT)
    host.run("".join(f"xl destroy {name}; rm $TMPDIR/{name}\n" for name in names)).check()
    assert host.run("xl info free_memory").check().text == free
    assert not re.findall("moved-", host.run("xenstore-ls -f; xl list").check().text)


BREAK = """
import json, subprocess, sys
from tests.domain.breaking import Breaking
from tests.domain.test_restore_refusals import CALLS
from xenpv.domain.input import Input
from xenpv.domain.restore import restore_domain
from xenpv.errors import XenPVError
from xenpv.host.xen_move import XenMover

def state(host):
    nodes = subprocess.run(["xenstore-ls", "-f"], capture_output=True, text=True, check=True).stdout
    return len(host.domains()), host.free_pages(), sorted(line.split(" = ")[0] for line in nodes.splitlines())

def tried(host, path):
    source = Input.open(path)
    try:
        return restore_domain(host, source, name="broken", paused=True).domid
    finally:
        source.close()

said = {}
with XenMover() as host:
    host.destroy(tried(host, sys.argv[1]))
    before = state(host)
    for call in CALLS:
        original, times = getattr(host, call), 0
        for nth in (0, -1, "last"):
            breaking = Breaking(original, times - 1 if nth == "last" else nth)
            setattr(host, call, breaking)
            try:
                domid = tried(host, sys.argv[1])
            except XenPVError as e:
                said[f"{call} {nth}"] = str(e)
            else:
                times = breaking.times
                host.destroy(domid)
        setattr(host, call, original)
    data = open(sys.argv[1], "rb").read()
    for eighth in range(8):
        with open(sys.argv[1] + ".cut", "wb") as file:
            file.write(data[: len(data) * eighth // 8])
        try:
            host.destroy(tried(host, sys.argv[1] + ".cut"))
        except XenPVError as e:
            said[f"cut {eighth}"] = type(e).__name__
    after = state(host)
print(json.dumps({"said": said, "before": before, "after": after}))
"""


@pytest.mark.deep
@pytest.mark.parametrize("host", [lab.DEFAULT], indirect=True, ids=[f"xen-{lab.DEFAULT}"])
def test_a_restore_that_fails_leaves_nothing(host: lab.Host) -> None:
    """Each call refused once, at its first and at its last time, and streams cut off: pages, domains and nodes."""
    script = host.write("break.py", BREAK)
    guest = Guest("broken-off", host)
    guest.boot(guests.litmus_config(guest.name, memory=32, options="p2m=both"), "litmus: up ")
    command = f"xl save {guest.name} $TMPDIR/x && python3 {script} $TMPDIR/x; status=$?; rm $TMPDIR/x*"
    result = host.run(f"{command}; exit $status", timeout=300).check()
    told = json.loads(result.text.splitlines()[-1])
    print(told["said"])
    assert told["before"] == told["after"]
    assert len(told["said"]) > 30
