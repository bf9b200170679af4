"""xenpv save, restore, migrate and receive on real Xen: within one host, and between two.

The oracle for what is in a domain's memory is litmus, which checks its pattern after each resume.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import lab
from lab import guests
from tests.lab.conftest import Hosts
from xenpv.domain.verify import verify

LISTENING = 240.0  # seconds that a receiver has to start, under emulation


def boot(host: lab.Host, name: str, options: str) -> int:
    """Start litmus; the offset in its console where its first heartbeat ends."""
    start = len(host.guest_console(name))
    config = host.write(f"{name}.cfg", guests.litmus_config(name, memory=16, vcpus=2, options=options))
    host.run(f"xl create -q {config}").check()
    return host.wait_for_guest(name, "litmus: heartbeat", after=start)


def lives(host: lab.Host, console: str, resumed: str, after: int = 0) -> None:
    """It has resumed in that way, its memory is what it was, and it goes on."""
    at = host.wait_for_guest(console, f"litmus: resume ({resumed})", after=after)
    end = host.wait_for_guest(console, "litmus: heartbeat", after=at)
    printed = host.guest_console(console)[at:end]
    assert "pattern ok" in printed
    assert "BAD" not in printed


def listed(host: lab.Host) -> list[tuple[str, str]]:
    """The name and state of every domain but dom0."""
    lines = host.run("xl list").check().text.splitlines()[2:]
    return [(words[0], words[4]) for words in map(str.split, lines)]


def freed(host: lab.Host) -> int:
    """MiB that no domain has, once Xen has got all back."""
    return int(host.run("sleep 2; xl info free_memory").check().text)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.deep_elsewhere
@pytest.mark.parametrize("options", ["p2m=both", "p2m=rooted levels=4 spread=2G"])
def test_litmus_is_saved_and_restored(host: lab.Host, options: str) -> None:
    at, free = boot(host, "litmus", options), freed(host)
    result = host.run(
        "xenpv save --preflight litmus; xenpv save litmus /tmp/saved && cp /tmp/saved . && xl list"
    ).check()
    assert "can be saved" in result.text
    assert "litmus" not in result.text.splitlines()[-1]
    report = verify(str(result.outputs / "saved"))
    report.close()
    assert [str(finding) for finding in report.findings] == []
    assert freed(host) >= free + 15
    host.run("xenpv restore /tmp/saved").check()
    lives(host, "litmus", "new domain", at)
    at = len(host.guest_console("litmus"))
    host.run(
        "xenpv save -c litmus /tmp/again && xl destroy litmus && xl restore /tmp/again; rm -f /tmp/saved /tmp/again"
    )
    lives(host, "litmus", "new domain", at)


@pytest.mark.deep_elsewhere
def test_a_debian_guest_is_saved_and_restored(host: lab.Host) -> None:
    name = "debian"
    config = host.write(f"{name}.cfg", guests.config(name))
    at = len(host.guest_console(name))
    host.run(f"xl create -q {config}").check()
    host.wait_for_guest(name, guests.UP, after=at)
    host.run(f"xenpv save {name} /tmp/saved && xenpv restore /tmp/saved && rm /tmp/saved", timeout=300).check()
    at = len(host.guest_console(name))
    at = host.wait_for_guest(name, guests.BEAT, after=at)
    host.wait_for_guest(name, guests.BEAT, after=at)


@pytest.mark.deep_elsewhere
def test_a_disk_that_is_full_leaves_the_guest_running(host: lab.Host) -> None:
    at = boot(host, "litmus", "p2m=both")
    mounted = "mkdir -p /tmp/small && mount -t tmpfs -o size=4M none /tmp/small"
    result = host.run(f"{mounted} && xenpv save litmus /tmp/small/saved; echo $?; ls -A /tmp/small; umount /tmp/small")
    assert result.text.split() == ["1"]
    assert b"No space left on device" in result.stderr
    assert b"(litmus) runs on here" in result.stderr
    lives(host, "litmus", "cancelled", at)
    assert [name for name, _ in listed(host)] == ["litmus"]


# --- two hosts -------------------------------------------------------------------------------------------------------


class Pair:
    """Two hosts; a domain goes from ``here`` to ``there`` over this machine's loopback."""

    def __init__(self, here: lab.Host, there: lab.Host, port: int) -> None:
        self.here, self.there, self.port = here, there, port

    def receiver(self, options: str = "") -> lab.Job:
        """Have one listen there, and wait until it does."""
        listen = f"xenpv receive --json --anywhere --listen tcp:0.0.0.0:{self.port}"
        job = self.there.start(f"{listen} {options}")
        deadline = time.monotonic() + LISTENING
        while b"listening" not in (job.stdout.read_bytes() if job.stdout.exists() else b""):
            assert time.monotonic() < deadline, "it does not listen"
            assert not job.done(), job.wait().tails()
            time.sleep(0.1)
        return job

    def migrate(self, name: str, options: str = "") -> lab.Result:
        command = f"xenpv migrate {options} --json {name} tcp:10.0.2.2:{self.port}"
        return self.here.run(command, timeout=600, env={"PYTHONFAULTHANDLER": "1"})


@contextmanager
def two(hosts: Hosts, xen: str) -> Iterator[Pair]:
    hosts.close()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    with (
        lab.Host(xen, mem="2G", dom0_mem="1G", listen=(port,)) as there,
        lab.Host(xen, mem="2G", dom0_mem="1G", network=True) as here,
    ):
        yield Pair(here, there, port)


def events(result: lab.Result) -> dict[str, Any]:
    """The last of each kind of event."""
    return {event["event"]: event for event in map(json.loads, result.text.splitlines())}


@pytest.mark.deep
@pytest.mark.parametrize(("xen", "live"), [("4.14", True), ("4.17", True), ("4.20", False)])
def test_a_domain_goes_to_another_host(hosts: Hosts, xen: str, live: bool, tmp_path: Path) -> None:
    with two(hosts, xen) as pair:
        here, there = pair.here, pair.there
        free_here, free_there = freed(here), freed(there)
        boot(here, "litmus", "p2m=both dirty=2000")
        receiver = pair.receiver()
        told = events(pair.migrate("litmus", "--max-downtime 0.5" if live else "--no-live").check())
        print(f"\nXen {xen}: {told['sent']}, {told['running']}, {told['progress']}")
        assert told["running"]["downtime"] < 60
        assert told["progress"]["round"] > 0 or not live
        receiver.wait().check()
        assert listed(here) == []
        assert [name for name, _ in listed(there)] == ["litmus"]
        lives(there, "litmus--incoming", "new domain")  # the console's log has the name that it came by
        assert freed(here) >= free_here

        # It is refused while one of its name is there, and runs on.
        at = boot(here, "litmus", "p2m=both")
        receiver = pair.receiver()
        result = pair.migrate("litmus", "" if live else "--no-live")
        assert result.status == 1
        assert b"there is a domain of this name or uuid here already" in result.stderr
        assert receiver.wait().status == 1
        here.wait_for_guest("litmus", "litmus: heartbeat", after=at)
        there.run("xl destroy litmus").check()

        # The receiver is killed on the way: it runs on here, and what is left there goes by its name.
        at = len(here.guest_console("litmus"))
        receiver = pair.receiver()
        slow = here.start(f"xenpv migrate --bandwidth 1M litmus tcp:10.0.2.2:{pair.port}") if live else None
        if slow is not None:
            deadline = time.monotonic() + LISTENING
            while "litmus--incoming" not in there.run("xl list").text:
                assert time.monotonic() < deadline
            there.run("kill -KILL $(pgrep -f 'receive --json')")
            result = slow.wait()
            assert result.status == 1
            assert re.search(rb"dom\d+ \(litmus\) runs on here", result.stderr)
            here.wait_for_guest("litmus", "litmus: heartbeat", after=at)
            there.run("xl destroy litmus--incoming").check()
            receiver = pair.receiver()
        pair.migrate("litmus", "" if live else "--no-live").check()
        receiver.wait().check()
        assert [name for name, _ in listed(there)] == ["litmus"]
        there.run("xl destroy litmus").check()
        assert freed(there) >= free_there
