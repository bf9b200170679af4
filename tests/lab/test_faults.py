"""Faults on real Xen, counted: calls refused, streams cut off and damaged, outputs that end, helpers killed.

Afterwards one copy runs where it did, or there is none; nothing is left, and there were words (faults.py, in dom0).
"""

from __future__ import annotations

import json
from typing import Any

import pytest

import lab
from lab import guests
from tests.support.lab.guest import ONE_VERSION, Guest, boot, run
from tests.support.refused_calls import BUILDING

SEED = 6
SAMPLE, ALL = 3, 30  # points of each kind; records are fewer than 30


def faults(host: lab.Host, *arguments: object, program: str = "faults") -> dict[str, Any]:
    """What came of some, and nothing was left of any."""
    command = f"python3 -m tests.lab.{program} {' '.join(map(str, arguments))}"
    result = host.run(command, timeout=3000, env={"PYTHONFAULTHANDLER": "1"}).check()
    told: dict[str, Any] = json.loads(result.text.splitlines()[-1])
    print(json.dumps(told, indent=1))
    assert told["left"] == []
    return told


def saved(host: lab.Host, name: str) -> str:
    """A litmus that stock xl has saved."""
    boot(host, name, "p2m=both", memory=8, vcpus=2)
    run(host, f"xl save {name} $TMPDIR/{name}.save")
    return f"$TMPDIR/{name}.save"


@ONE_VERSION
def test_a_build_that_fails_leaves_nothing(host: lab.Host) -> None:
    """Each call of Xen is refused at its first time and at its last."""
    told = faults(host, "build", guests.LITMUS)
    assert told["said"] == {f"{call} {when}": "no" for call in BUILDING for when in ("first", "last")}


@pytest.mark.deep
@ONE_VERSION
def test_a_restore_that_fails_leaves_nothing(host: lab.Host) -> None:
    """So is each of a restore."""
    told = faults(host, "restore", saved(host, "refused"))
    assert len(told["said"]) > 30
    assert set(told["said"].values()) == {"no"}


POINTS = pytest.mark.parametrize("points", [SAMPLE, pytest.param(ALL, marks=pytest.mark.deep)])


@ONE_VERSION
@POINTS
def test_streams_that_end_or_lie(host: lab.Host, points: int) -> None:
    """Cut off where each record begins, and anywhere; bits flipped. What is in a page nobody can tell."""
    told = faults(host, "streams", saved(host, "broken-off"), SEED, points)
    counts = told["counts"]
    assert counts["cut where a record begins"].keys() <= {"Truncated", "Unsupported"}
    assert told["begins"] > 15
    assert sum(counts["cut where a record begins"].values()) == min(points, told["begins"])
    assert counts["cut anywhere"] == {"Truncated": points}
    assert sum(counts["bit flipped in a record"].values()) == points


@ONE_VERSION
@POINTS
def test_saves_whose_output_ends(host: lab.Host, points: int) -> None:
    """It runs on each time, and its memory is what it was."""
    guest = boot(host, "goes-on", "p2m=both dirty=200", memory=8, vcpus=2)
    told = faults(host, "outputs", guest.name, SEED, points, program="faults_of_saves")
    suspended(guest)
    for kind, outcomes in told["counts"].items():
        expected = "No space left on device" if kind.startswith("disk") else "Broken pipe"
        assert outcomes.keys() <= {expected, "went well"}, kind


def suspended(guest: Guest) -> None:
    """However often it was: after each resume its memory was what it had been."""
    guest.beats()
    printed = guest.host.guest_console(guest.name)
    print(f"{printed.count('litmus: resume')} resumes")
    assert printed.count("litmus: resume") == printed.count("pattern ok") > 0
    assert "BAD" not in printed


@pytest.mark.deep
@ONE_VERSION
def test_helpers_that_are_killed(host: lab.Host) -> None:
    guest = boot(host, "outlives", "p2m=both", memory=8, vcpus=2)
    told = faults(host, "killed", guest.name, SEED, 12, program="faults_of_saves")
    assert told["counts"]["save"]["failed"] > 3
    assert told["counts"]["restore"]["failed"] > 3
    suspended(guest)
