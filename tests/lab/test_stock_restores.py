"""What stock xl restores on real Xen, and what verify says of the same file."""

from __future__ import annotations

import json

import pytest

import lab
from tests.support.lab.guest import ONE_VERSION

RULES = ("start-info", "start-info-frames", "linear-table", "linear-table-used", "pte-l1tf", "pte-range")
# xl goes on, and the domain is damaged: daemons write into the page, or read what is none of theirs.
DAMAGED = {
    "start-info-frames: xenstore is a leaf of the p2m, 64 bit",
    "start-info-frames: console is a leaf of the p2m, 64 bit",
    "start-info-frames: xenstore is a start info, 64 bit",
    "start-info-frames: console is a start info, 64 bit",
    "start-info-frames: one ring for both, 64 bit",
}


@pytest.mark.deep
@ONE_VERSION
def test_stock_xl_restores_what_verify_passes_and_nothing_else(host: lab.Host) -> None:
    command = f"python3 -m tests.support.lab.stock_restores {' '.join(RULES)}"
    outcomes = json.loads(host.run(command, timeout=1500).check().text.splitlines()[-1])
    print(json.dumps(outcomes, indent=1))
    assert len(outcomes) > 60
    differing = {name: outcome for name, outcome in outcomes.items() if outcome["stock"] != outcome["verify"]}
    assert differing == {name: {"stock": True, "verify": False} for name in DAMAGED}
