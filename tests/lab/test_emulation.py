"""The emulation computes rightly: what every figure and every verdict of the lab relies on."""

from __future__ import annotations

import pytest

import lab
from lab import guests
from tests.support.lab.guest import LIVE, OURS, Guest, run, start

NAME = "busy"
VCPUS = 4
MIGRATIONS = 10
# A wrong register gives a wrong order, a wrong sum, or a crash. Without `spec-ctrl=eager-fpu` the first round fails.
SORTS = """
import numpy as np
random = np.random.default_rng(1)
numbers, fractions = random.integers(0, 2**63, 400_000, dtype=np.uint64), random.random(400_000)
total = numbers.sum(dtype=np.uint64)
wrong = 0
for _ in range(20):
    ordered, between = np.sort(numbers), np.sort(fractions)
    right = (ordered[1:] >= ordered[:-1]).all() and (between[1:] >= between[:-1]).all()
    wrong += not (right and ordered.sum(dtype=np.uint64) == total)
print("wrong", wrong)
"""


def start_busy_guest(host: lab.Host) -> Guest:
    """A Debian guest whose four vcpus always compute."""
    config = guests.config(NAME, memory=128, vcpus=VCPUS, kernel_options=guests.BUSY)
    return start(host, NAME, config, guests.UP)


@pytest.mark.deep_elsewhere
def test_sorts_in_dom0_beside_a_busy_guest_are_right(host: lab.Host) -> None:
    start_busy_guest(host)
    script = host.write("sorts.py", SORTS)
    assert run(host, f"python3 {script}", timeout=600) == "wrong 0\n"


@pytest.mark.deep
def test_busy_guest_survives_save_restore_and_ten_migrations(host: lab.Host) -> None:
    guest = start_busy_guest(host)
    run(host, f"env {OURS} xl save {NAME} /tmp/saved && env {OURS} xl restore /tmp/saved && rm /tmp/saved", timeout=600)
    guest.beats(guests.BEAT)
    precopy = "" if host.xen in LIVE else "XENPV_PRECOPY=no"
    for _ in range(MIGRATIONS):
        arrived = Guest.expected(host, f"{NAME}--incoming")  # what its console is called
        receiver = f"env {OURS} xl migrate-receive"
        run(host, f"env {OURS} {precopy} xl migrate -s '' {NAME} '{receiver}'", timeout=600)
        arrived.beats(guests.BEAT)
    run(host, "xenpv check 0 > /dev/null && xenpv check busy > /dev/null", timeout=600)
