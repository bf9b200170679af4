"""xenpv save, restore, migrate and receive on real Xen: within one host, and between two.

The oracle for what is in a domain's memory is litmus, which checks its pattern after each resume.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

import lab
from lab import guests
from tests.lab.conftest import Hosts
from tests.support.lab.guest import BEATS, Guest, boot, freed, listed, start
from tests.support.lab.pair import LISTENING, Pair, two
from xenpv.verify.stream import verify

# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.deep_elsewhere
@pytest.mark.parametrize("options", ["p2m=both", pytest.param("p2m=rooted levels=4 spread=2G", marks=pytest.mark.deep)])
def test_litmus_is_saved_and_restored(host: lab.Host, options: str) -> None:
    guest, free = boot(host, "litmus", options, vcpus=2), freed(host)
    result = host.run(
        "xenpv save --preflight litmus; xenpv save litmus /tmp/saved && cp /tmp/saved . && xl list"
    ).check()
    assert "can be saved" in result.text
    assert "litmus" not in result.text.splitlines()[-1]
    report = verify(str(result.outputs / "saved"))
    assert [str(finding) for finding in report.findings] == []
    assert freed(host) >= free + 15
    host.run("xenpv restore /tmp/saved").check()
    guest.lives("new domain")
    host.run(
        "xenpv save -c litmus /tmp/again && xl destroy litmus && xl restore /tmp/again; rm -f /tmp/saved /tmp/again"
    )
    guest.lives("new domain")


@pytest.mark.deep_elsewhere
def test_a_debian_guest_is_saved_and_restored(host: lab.Host) -> None:
    name = "debian"
    start(host, name, guests.config(name), guests.UP)
    host.run(f"xenpv save {name} /tmp/saved && xenpv restore /tmp/saved && rm /tmp/saved", timeout=300).check()
    Guest.expected(host, name).beats(guests.BEAT)


@pytest.mark.deep_elsewhere
def test_a_domain_with_a_device_is_refused(host: lab.Host) -> None:
    guest = boot(host, "litmus", "p2m=both")
    host.run("xenstore-write /local/domain/$(xl domid litmus)/device/vif/0/state 4").check()
    for options in ("--preflight litmus", "litmus /tmp/saved"):
        result = host.run(f"xenpv save {options}; echo $?; ls /tmp/saved")
        assert result.text.split() == ["1"]
        assert b"vif 0" in result.stderr
    host.run("xenstore-rm /local/domain/$(xl domid litmus)/device/vif").check()
    host.run("xenpv save --preflight litmus").check()
    guest.beats()


@pytest.mark.deep_elsewhere
def test_a_disk_that_is_full_leaves_the_guest_running(host: lab.Host) -> None:
    guest = boot(host, "litmus", "p2m=both", vcpus=2)
    mounted = "mkdir -p /tmp/small && mount -t tmpfs -o size=4M none /tmp/small"
    result = host.run(f"{mounted} && xenpv save litmus /tmp/small/saved; echo $?; ls -A /tmp/small; umount /tmp/small")
    assert result.text.split() == ["1"]
    assert b"No space left on device" in result.stderr
    assert b"(litmus) runs on here" in result.stderr
    guest.lives("cancelled")
    assert [name for name, _ in listed(host)] == ["litmus"]


# --- two hosts -------------------------------------------------------------------------------------------------------


def receiver(pair: Pair, options: str = "") -> lab.Job:
    return pair.listener(f"xenpv receive --json --anywhere --listen tcp:0.0.0.0:{pair.port} {options}")


def migrate(pair: Pair, name: str, options: str = "") -> lab.Result:
    command = f"xenpv migrate {options} --json {name} tcp:{pair.address}"
    return pair.here.run(command, timeout=600, env={"PYTHONFAULTHANDLER": "1"})


def events(result: lab.Result) -> dict[str, Any]:
    """The last of each kind of event."""
    return {event["event"]: event for event in map(json.loads, result.text.splitlines())}


@pytest.mark.deep
@pytest.mark.parametrize(("xen", "live"), [("4.14", True), ("4.17", True), ("4.20", False)])
def test_a_domain_goes_to_another_host(hosts: Hosts, xen: str, live: bool, tmp_path: Path) -> None:
    with two(hosts, xen) as pair:
        here, there = pair.here, pair.there
        free_here, free_there = freed(here), freed(there)
        boot(here, "litmus", "p2m=both dirty=2000", vcpus=2)
        arrived = Guest.expected(there, "litmus--incoming")  # the console's log has the name that it came by
        listening = receiver(pair)
        told = events(migrate(pair, "litmus", "--max-downtime 0.5" if live else "--no-live").check())
        print(f"\nXen {xen}: {told['sent']}, {told['running']}, {told['progress']}")
        assert told["running"]["downtime"] < 60
        assert told["progress"]["round"] > 0 or not live
        listening.wait().check()
        assert listed(here) == []
        assert [name for name, _ in listed(there)] == ["litmus"]
        arrived.lives("new domain")
        assert freed(here) >= free_here

        # It is refused while one of its name is there, and runs on.
        guest = boot(here, "litmus", "p2m=both", vcpus=2)
        listening = receiver(pair)
        result = migrate(pair, "litmus", "" if live else "--no-live")
        assert result.status == 1
        assert b"has a domain of this name or uuid already" in result.stderr
        assert listening.wait().status == 1
        guest.wait(BEATS)
        there.run("xl destroy litmus").check()

        # The receiver is killed on the way: it runs on here, and what is left there goes by its name.
        guest = Guest.expected(here, "litmus")
        listening = receiver(pair)
        slow = here.start(f"xenpv migrate --bandwidth 1M litmus tcp:{pair.address}") if live else None
        if slow is not None:
            deadline = time.monotonic() + LISTENING
            while "litmus--incoming" not in there.run("xl list").text:
                assert time.monotonic() < deadline
            there.run("kill -KILL $(pgrep -f 'receive --json')")
            result = slow.wait()
            assert result.status == 1
            assert re.search(rb"dom\d+ \(litmus\) runs on here", result.stderr)
            guest.wait(BEATS)
            there.run("xl destroy litmus--incoming").check()
            listening = receiver(pair)
        migrate(pair, "litmus", "" if live else "--no-live").check()
        listening.wait().check()
        assert [name for name, _ in listed(there)] == ["litmus"]
        there.run("xl destroy litmus").check()
        assert freed(there) >= free_there
