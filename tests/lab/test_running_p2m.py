"""The p2m of running domains on real Xen: litmus publishes every form, and prints what it published."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

import lab
from lab import guests

# name: xl memory, litmus options, the forms that must be found
FORMS = {
    "linear": (32, "p2m=linear", ["linear virtual list"]),
    "tree": (32, "p2m=tree", ["three-level tree"]),
    "both": (32, "p2m=both spread=64G", ["linear virtual list", "three-level tree"]),
    "far": (32, "p2m=linear spread=8T", ["linear virtual list"]),
    "unaligned": (32, "p2m=linear spread=16T vaddr=+512M", ["linear virtual list"]),
    "rooted": (32, "p2m=rooted levels=5 spread=16T", ["rooted tree of 5 levels (proposed)"]),
    "marked": (64, "p2m=marked spread=16T places=4", ["marked tree of 4 levels (proposed)"]),
    "hidden": (32, "p2m=tree4hidden", ["three-level tree"]),
}
REFUSED = {  # name: xl memory, litmus options, the number that the error names
    "none": (32, "p2m=none", " 0x0"),
    "invalid": (32, "p2m=invalid", "0xffffffffffffffff"),
    "short": (
        32,
        "p2m=tree4hidden spread=600G",
        "0x7ffffff",
    ),
}
BAD = {  # the frame that an entry had is nobody's then, unless it was given back
    "twice": {"physmap-twice", "physmap-lost"},
    "foreign": {"physmap-not-own", "physmap-lost"},
    "stale": {"physmap-not-own"},
    "oddgen": {"physmap-generation"},
}

# What does not depend on the version of Xen is shown on one.
ONE_VERSION = pytest.mark.parametrize("host", [lab.DEFAULT], indirect=True, ids=[f"xen-{lab.DEFAULT}"])


def inspect_guests(host: lab.Host, wanted: dict[str, tuple[int, str]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Boot litmus guests and inspect all of them by one process in dom0; return its output and their consoles."""
    start = {}
    for name, (memory, options) in wanted.items():
        config = host.write(f"{name}.cfg", guests.litmus_config(name, memory=memory, options=options))
        start[name] = len(host.guest_console(name))
        host.run(f"xl create {config}").check()
    for name in wanted:
        host.wait_for_guest(name, "litmus: up", after=start[name])
    result = host.run(f"python3 -m tests.support.lab.inspect_p2m {' '.join(wanted)}", timeout=240).check()
    consoles = {name: host.guest_console(name)[start[name] :] for name in wanted}
    for name in wanted:
        host.run(f"xl destroy {name}").check()
    return json.loads(result.stdout), consoles


def printed(console: str) -> dict[int, int]:
    """The p2m as litmus printed it: mfn by pfn."""
    p2m: dict[int, int] = {}
    for match in re.finditer(r"litmus: p2m pfn=(0x\w+) pages=(\d+) mfn=(0x\w+)( down)?\n", console):
        pfn, pages, mfn = int(match[1], 16), int(match[2]), int(match[3], 16)
        step = -1 if match[4] else 1
        p2m |= {pfn + i: mfn + i * step for i in range(pages)}
    end = re.search(r"litmus: p2m end pages=(\d+)", console)
    assert end is not None
    assert len(p2m) == int(end[1])
    return p2m


def test_p2m_of_a_running_guest_in_each_form_is_walked_mfn_for_mfn(host: lab.Host) -> None:
    forms = FORMS if host.xen == lab.DEFAULT else {name: FORMS[name] for name in ("linear", "tree", "rooted")}
    said, consoles = inspect_guests(
        host, {name: (memory, f"{options} print=p2m") for name, (memory, options, _) in forms.items()}
    )
    for name, (_, _, ways) in forms.items():
        assert said[name]["findings"] == [], name
        assert said[name]["p2m"]["forms"] == ways
        assert dict(said[name]["entries"]) == printed(consoles[name]), name
        print(name, {k: said[name]["p2m"][k] for k in ("max_pfn", "leaves", "places", "shared")}, said[name]["seconds"])


@ONE_VERSION
def test_p2m_that_cannot_be_walked_raises_guest_error(host: lab.Host) -> None:
    said, _ = inspect_guests(host, {name: (memory, options) for name, (memory, options, _) in REFUSED.items()})
    for name, (_, _, words) in REFUSED.items():
        assert words in said[name]["refused"], name
        assert [finding["rule"] for finding in said[name]["findings"]] == ["physmap-reach"]


@ONE_VERSION
def test_check_of_a_corrupted_p2m_names_the_rule(host: lab.Host) -> None:
    said, consoles = inspect_guests(host, {f"bad-{bad}": (32, f"p2m=linear bad={bad}") for bad in BAD})
    for bad, rules in BAD.items():
        findings = said[f"bad-{bad}"]["findings"]
        assert {finding["rule"] for finding in findings} == rules, bad
        if place := re.search(rf"litmus: bad {bad} pfn=(0x\w+)", consoles[f"bad-{bad}"]):
            also = re.search(rf"litmus: bad {bad} .*also=(0x\w+)", consoles[f"bad-{bad}"])
            known = {int(place[1], 16)} | ({int(also[1], 16)} if also else set())
            assert {finding["pfn"] for finding in findings} <= known
