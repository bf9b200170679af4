"""Guests that are saved, restored and moved in the lab, and what is left of them on a host."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

import lab
from lab import guests

OURS = "LIBXL_SAVE_HELPER=/usr/local/bin/xenpv-save-helper"
STOCK = ""
LIVE = ("4.14", "4.17")  # Debian's 4.20 was built without log-dirty for PV
ONE_VERSION = pytest.mark.parametrize("host", [lab.DEFAULT], indirect=True, ids=[f"xen-{lab.DEFAULT}"])
BEATS = "litmus: heartbeat"


@dataclass
class Guest:
    """A guest by the name that its console's log has; ``at`` is how far that was read."""

    name: str
    host: lab.Host
    at: int

    @classmethod
    def expected(cls, host: lab.Host, name: str) -> Guest:
        """One that will have that name: what it prints from now on."""
        return cls(name, host, len(host.guest_console(name)))

    def wait(self, text: str, timeout: float = 120) -> str:
        """What it printed up to and with that text, since the last wait."""
        start = self.at
        self.at = self.host.wait_for_guest(self.name, text, after=start, timeout=timeout)
        return self.host.guest_console(self.name)[start : self.at]

    def lives(self, resumed: str) -> None:
        """A litmus has resumed in that way, its memory is what it was, and it goes on."""
        printed = self.wait(f"litmus: resume ({resumed})") + self.wait(BEATS)
        assert "pattern ok" in printed
        assert "BAD" not in printed

    def beats(self, beat: str = BEATS) -> None:
        """It goes on: it says so twice."""
        self.wait(beat)
        self.wait(beat)


def start(host: lab.Host, name: str, config: str, up: str) -> Guest:
    """A guest by that configuration, when it has said that it is up."""
    guest = Guest.expected(host, name)
    run(host, f"xl create -q {host.write(f'{name}.cfg', config)}")
    guest.wait(up)
    return guest


def boot(host: lab.Host, name: str, options: str, *, memory: int = 16, vcpus: int = 1) -> Guest:
    """A litmus that works."""
    return start(host, name, guests.litmus_config(name, memory=memory, vcpus=vcpus, options=options), BEATS)


def run(host: lab.Host, command: str, timeout: float = 180) -> str:
    """A command that succeeds; what it said."""
    result = host.run(command, timeout=timeout).check()
    return (result.stdout + result.stderr).decode()


def fails(host: lab.Host, command: str, timeout: float = 180) -> str:
    """A command that does not; what it said."""
    result = host.run(command, timeout=timeout)
    assert result.status not in (0, -1), result.tails()
    return (result.stdout + result.stderr).decode()


def listed(host: lab.Host) -> list[tuple[str, str]]:
    """The name and state of every domain but dom0."""
    lines = host.run("xl list").check().text.splitlines()[2:]
    return [(words[0], words[4]) for words in map(str.split, lines)]


def freed(host: lab.Host) -> int:
    """MiB that no domain has, once Xen has got all back."""
    return int(host.run("sleep 2; xl info free_memory").check().text)


@dataclass(frozen=True)
class State:
    """What is there: domains, MiB that are free, nodes of domains in xenstore."""

    domains: list[tuple[str, str]]
    free: int
    nodes: list[str]

    @classmethod
    def of(cls, host: lab.Host) -> State:
        listing = run(host, "xenstore-ls -f /local/domain | cut -d' ' -f1")
        nodes = [line for line in listing.split() if not line.startswith("/local/domain/0")]
        return cls(listed(host), freed(host), nodes)

    def is_again(self, host: lab.Host) -> None:
        """Nothing is left of what was there since, when all domains that are there now are destroyed."""
        run(host, "xl list | awk 'NR > 2 { print $2 }' | while read -r domid; do xl destroy $domid; done")
        now = State.of(host)
        assert (now.domains, now.nodes) == (self.domains, self.nodes)
        assert self.free - now.free <= 1, "MiB that are not free again"
