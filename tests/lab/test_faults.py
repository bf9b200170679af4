"""Faults on real Xen: refused calls, damaged streams, outputs that end, killed helpers.

After each fault the domain runs where it ran before, or does not exist. Nothing is left, and there was an error.
The faults happen in dom0: tests/support/lab/faults.py and save_faults.py.
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
SAMPLE, ALL = 3, 30  # faults of each kind; there are fewer than 30 records


def run_faults(host: lab.Host, *arguments: object, program: str = "faults") -> dict[str, Any]:
    """Cause faults in dom0, and return what happened; assert that nothing was left."""
    command = f"python3 -m tests.support.lab.{program} {' '.join(map(str, arguments))}"
    result = host.run(command, timeout=3000, env={"PYTHONFAULTHANDLER": "1"}).check()
    outcome: dict[str, Any] = json.loads(result.text.splitlines()[-1])
    print(json.dumps(outcome, indent=1))
    assert outcome["left"] == []
    return outcome


def save_litmus(host: lab.Host, name: str) -> str:
    """Save a litmus guest with stock xl, and return the path in dom0."""
    boot(host, name, "p2m=both", memory=8, vcpus=2)
    run(host, f"xl save {name} $TMPDIR/{name}.save")
    return f"$TMPDIR/{name}.save"


@ONE_VERSION
def test_build_refused_call_leaves_nothing(host: lab.Host) -> None:
    """Each call is refused at its first time and at its last."""
    outcome = run_faults(host, "build", guests.LITMUS)
    assert outcome["messages"] == {f"{call} {when}": "no" for call in BUILDING for when in ("first", "last")}


@pytest.mark.deep
@ONE_VERSION
def test_restore_refused_call_leaves_nothing(host: lab.Host) -> None:
    """Each call is refused at its first time and at its last."""
    outcome = run_faults(host, "restore", save_litmus(host, "refused"))
    assert len(outcome["messages"]) > 30
    assert set(outcome["messages"].values()) == {"no"}


POINTS = pytest.mark.parametrize("points", [SAMPLE, pytest.param(ALL, marks=pytest.mark.deep)])


@ONE_VERSION
@POINTS
def test_restore_damaged_stream_leaves_nothing(host: lab.Host, points: int) -> None:
    """Streams are truncated at records and anywhere, and bits are flipped."""
    outcome = run_faults(host, "streams", save_litmus(host, "broken-off"), SEED, points)
    counts = outcome["counts"]
    assert counts["cut where a record begins"].keys() <= {"Truncated", "Unsupported"}
    assert outcome["begins"] > 15
    assert sum(counts["cut where a record begins"].values()) == min(points, outcome["begins"])
    assert counts["cut anywhere"] == {"Truncated": points}
    assert sum(counts["bit flipped in a record"].values()) == points


@ONE_VERSION
@POINTS
def test_save_output_ends_domain_runs_on(host: lab.Host, points: int) -> None:
    guest = boot(host, "goes-on", "p2m=both dirty=200", memory=8, vcpus=2)
    outcome = run_faults(host, "outputs", guest.name, SEED, points, program="save_faults")
    assert_resumed_intact(guest)
    for kind, outcomes in outcome["counts"].items():
        expected = "No space left on device" if kind.startswith("disk") else "Broken pipe"
        assert outcomes.keys() <= {expected, "went well"}, kind


def assert_resumed_intact(guest: Guest) -> None:
    """Assert that litmus resumed, and found its pattern intact each time."""
    guest.beats()
    printed = guest.host.guest_console(guest.name)
    print(f"{printed.count('litmus: resume')} resumes")
    assert printed.count("litmus: resume") == printed.count("pattern ok") > 0
    assert "BAD" not in printed


@pytest.mark.deep
@ONE_VERSION
def test_save_helper_killed_domain_runs_on(host: lab.Host) -> None:
    guest = boot(host, "outlives", "p2m=both", memory=8, vcpus=2)
    outcome = run_faults(host, "killed", guest.name, SEED, 12, program="save_faults")
    assert outcome["counts"]["save"]["failed"] > 3
    assert outcome["counts"]["restore"]["failed"] > 3
    assert_resumed_intact(guest)
