"""xl migrate between two hosts, with xenpv-save-helper on both sides and on one; link.py is what ssh would be.

The oracle for what is in a domain's memory is litmus, which checks its pattern when it has arrived.
"""

from __future__ import annotations

import re
import time

import pytest

import lab
from tests.lab.conftest import Hosts
from tests.support.lab.guest import LIVE, OURS, STOCK, Guest, boot, freed, listed, run
from tests.support.lab.pair import LINK, LISTENING, Pair, two

NAME = "litmus"
ARRIVING = f"{NAME}--incoming"
SIDES = {"ours to ours": (OURS, OURS), "ours to stock": (OURS, STOCK), "stock to ours": (STOCK, OURS)}
SLOWLY = "XENPV_PRECOPY=bandwidth=2000000"


def migrate(pair: Pair, environment: str, options: str = "") -> str:
    return f"env {environment} xl migrate {options} -s '{LINK}' {NAME} {pair.address}"


def arrives(pair: Pair, sender: str, receives: str, options: str = "") -> str:
    """A guest that works goes there and lives; what both sides said."""
    boot(pair.here, NAME, "p2m=both dirty=300", vcpus=2)
    there = pair.receiver(receives)
    arrived = Guest.expected(pair.there, ARRIVING)  # what its console is called
    said = run(pair.here, migrate(pair, sender, options), timeout=300)
    assert "Migration successful." in said
    result = there.wait().check()
    arrived.lives("new domain")
    assert listed(pair.here) == []
    assert [name for name, _ in listed(pair.there)] == [NAME]
    run(pair.there, f"xl destroy {NAME}")
    return said + result.stderr.decode()


@pytest.mark.deep
@pytest.mark.parametrize("xen", ["4.14", "4.17", "4.20"])
def test_a_guest_that_works_goes_to_another_host(hosts: Hosts, xen: str) -> None:
    how = "" if xen in LIVE else "XENPV_PRECOPY=no"
    with two(hosts, xen) as pair:
        free = freed(pair.here), freed(pair.there)
        for sides, (sender, receives) in SIDES.items():
            if sender == STOCK and xen not in LIVE:
                continue  # stock's sends no other way
            began = time.monotonic()
            said = arrives(pair, f"{sender} {how}", receives)
            print(f"\nXen {xen}, {sides}: {time.monotonic() - began:.1f} s\n{said}")
            assert ("xenpv: info: iteration" in said) == (sender == OURS and xen in LIVE)
        for sides, (sender, receives) in SIDES.items():
            if xen not in LIVE:
                continue  # stock's sends all twice of a live one only
            said = arrives(pair, sender, receives, "--debug")
            print(f"\nXen {xen}, {sides}, --debug\n{said}")
            assert ("4096 pages to be sent again, to be compared" in said) == (sender == OURS)
            differ = len(re.findall("verify pfn .* failed", said))
            differ += sum(map(int, re.findall(r"(\d+) pages, the first is pfn", said)))
            assert differ <= 1, "the ring of a console may be read meanwhile"
        assert freed(pair.here) >= free[0]
        assert freed(pair.there) >= free[1]


@pytest.mark.deep
def test_what_ends_on_the_way(hosts: Hosts) -> None:
    """A helper, here or there, or the link: it runs on here, and nothing of it is there."""
    with two(hosts, lab.DEFAULT) as pair:
        guest = boot(pair.here, NAME, "p2m=both dirty=200", vcpus=2)
        free = freed(pair.there)
        for host, what in (
            (pair.here, "save_helper.program --[s]ave"),
            (pair.there, "save_helper.program --[r]estore"),
            (pair.here, "tests.lab.[l]ink 10"),
            (pair.there, "xl [m]igrate-receive"),
        ):
            there = pair.receiver(OURS)
            sending = pair.here.start(migrate(pair, f"{OURS} {SLOWLY}"))
            deadline = time.monotonic() + LISTENING
            while "iteration 0" not in sending.output_so_far():
                assert time.monotonic() < deadline
                assert not sending.done(), sending.wait().tails()
                time.sleep(0.1)
            time.sleep(2)  # of eight
            run(host, f"kill -KILL $(pgrep -f '{what}')")
            result = sending.wait()
            print(what, result.tails(), there.wait().tails())
            assert result.status not in (0, -1)
            assert "Migration failed" in result.stderr.decode()
            guest.beats()
            printed = pair.here.guest_console(NAME)
            assert printed.count("litmus: resume") == printed.count("pattern ok")
            assert [name for name, _ in listed(pair.here)] == [NAME]
            run(pair.there, f"xl list {ARRIVING} && xl destroy {ARRIVING}; true")
            assert freed(pair.there) >= free
        pair.receiver(OURS)
        arrived = Guest.expected(pair.there, ARRIVING)
        run(pair.here, migrate(pair, OURS), timeout=300)  # nobody remembers
        arrived.lives("new domain")
