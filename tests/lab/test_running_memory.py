"""Into a running Debian guest, by the command line in dom0: all verbs that look at one, and what --pause does."""

from __future__ import annotations

import json
import re

import pytest

import lab
from lab import guests

# One process for all of it, since importing NumPy takes seconds under emulation. The verbs are called as from a shell.
VERBS = """
import io, json, sys
from contextlib import redirect_stdout
from xenpv.cli.main import main

def xenpv(*args):
    out = io.StringIO()
    with redirect_stdout(out):
        code = main.main([str(a) for a in args], standalone_mode=False)
    return {"code": code or 0, "out": out.getvalue()}

name, banner = sys.argv[1:]
said = {"p2m": xenpv("p2m", name), "json": xenpv("p2m", name, "--json")}
said["dump"] = xenpv("p2m", name, "--dump", "--pause")
entries = json.loads(said["json"]["out"])
first = said["dump"]["out"].splitlines()[1].split("mfn=")[1]
said["lookup"] = xenpv("p2m", name, "--lookup", 0, "--mfn", first, "--pause")
said["check"] = xenpv("check", name)
said["paused"] = xenpv("check", "--pause", "--json", name)
said["walk"] = xenpv("walk", name, banner)
said["nowhere"] = xenpv("walk", name, "0xffff800000000000")
said["read"] = xenpv("read", name, banner, 256)
said["export"] = xenpv("export", name, "/tmp/it.core", "--format", "dumpcore", "--pause")
said["exported"] = xenpv("read", "/tmp/it.core", banner, 256)
said["report"] = xenpv("report", name, "--json", "--output", "report.html")
json.dump(said, sys.stdout)
"""


@pytest.mark.deep_elsewhere
def test_verbs_on_a_running_guest_read_its_memory(host: lab.Host) -> None:
    config = host.write("running.cfg", guests.config("running"))
    start = len(host.guest_console("running"))
    host.run(f"xl create {config}").check()
    host.wait_for_guest("running", f"{guests.BEAT} 1", after=start)
    console = host.guest_console("running")[start:]
    banner = re.search(r"xenpv-guest: symbol (\w+) linux_banner", console)
    version = re.search(r"xenpv-guest: version (.*)", console)
    assert banner
    assert version
    script = host.write("verbs.py", VERBS)
    ran = host.run(f"python3 {script} running 0x{banner[1]}; rm -f /tmp/it.core", timeout=300).check()
    said = json.loads(ran.stdout)
    print({name: verb["out"][:2000] for name, verb in said.items()})  # shown when something fails
    assert {name: verb["code"] for name, verb in said.items() if verb["code"]} == {"nowhere": 1}

    pages = guests.SMALLEST * 256
    p2m = json.loads(said["json"]["out"])
    assert p2m["running"]
    assert "linear virtual list" in p2m["forms"]
    assert p2m["populated"] == sum(p2m["map"]["populated"]) == pages
    assert p2m["changed"] is None
    assert "█" in said["p2m"]["out"]
    dump = dict(re.findall(r"pfn=(0x\w+) ==> mfn=(0x\w+)\n", said["dump"]["out"]))
    assert len(dump) == len(set(dump.values())) == pages
    looked = said["lookup"]["out"].splitlines()[-2:]
    pfn = next(iter(dump))
    assert looked == [f"pfn=0x0 ==> mfn={dump['0x0']} (type NOTAB)", f"mfn={dump[pfn]} ==> pfn={pfn}"]

    assert "p2m and m2p agree, by linear virtual list" in said["check"]["out"]
    assert json.loads(said["paused"]["out"])["errors"] == 0
    steps = [line.split() for line in said["walk"]["out"].splitlines() if re.match(r"\s*L\d ", line)]
    assert [step[0] for step in steps] == ["L4", "L3", "L2", "L1"]
    assert [step[2].removesuffix("_PIN") for step in steps] == ["L4TAB", "L3TAB", "L2TAB", "L1TAB"]
    assert "Xen's own slot" in said["nowhere"]["out"]
    text = bytes(
        int(byte, 16) for line in said["read"]["out"].splitlines() for byte in line[18:66].split() if byte != "|"
    )
    assert text.partition(b"\0")[0].decode().strip() == version[1].strip()
    assert said["exported"]["out"] == said["read"]["out"]
    facts, page = json.loads(said["report"]["out"]), (ran.outputs / "report.html").read_text()
    assert "<h1>running</h1>" in page
    assert sum(layer["pages"] for layer in facts["map"]["layers"] if layer["lane"] in ("pages", "tables")) == pages
    assert facts["p2m"]["entries"]["own"] == pages
    assert facts["verify"]["ok"]

    after = len(host.guest_console("running"))
    host.wait_for_guest("running", guests.BEAT, after=after)  # it was paused, and runs on
    host.run("xl destroy running").check()
