"""litmus in every form of p2m, at pfns up to 16 TiB, and what stock `xl save` makes of it, on real Xen.

The oracle for what is in a save file is the list that the guest itself printed before it was saved (print=p2m).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import lab
from lab import guests
from tests.support.lab.guest import BEATS, ONE_VERSION, Guest
from xenpv.cli.show import describe
from xenpv.source.saved import SavedDomain
from xenpv.verify.stream import verify

MEMORY = 32
PAGES = MEMORY << 8
GIB = 1 << 18  # pages
TIB = 1 << 28
UP = "litmus: up "

# What libxenguest says to forms it cannot save; the guest is not even asked to suspend.
REFUSED = {
    "p2m=none": "Bad mfn 0 for p2m frame list list",
    "p2m=invalid": "Bad mfn 0xffffffffffffffff for p2m frame list list",
    "p2m=marked": r"Bad mfn 0x2000000000[0-9a-f]{6} for p2m frame list list",
    "p2m=rooted levels=2": "Bad mfn 0xffffffffffffffff for p2m frame list list",
    "p2m=rooted levels=6": "Bad mfn 0xffffffffffffffff for p2m frame list list",
    "p2m=tree4hidden spread=600G": "max_pfn 0x95fffff too large for p2m tree",
    "p2m=tree spread=600G": "max_pfn 0x95fffff too large for p2m tree",
}
# What can be saved by stock tools, and is whole in the file.
SAVED = {
    "p2m=tree4hidden": 0,
    "p2m=tree spread=2G": 2 * GIB,
    "p2m=linear spread=2G": 2 * GIB,
    "p2m=linear spread=3G places=2 vaddr=+1G": 3 * GIB,  # a GiB without a page: a shared page table
}
BAD = ("twice", "foreign", "stale", "oddgen")


@dataclass
class Published(Guest):
    """One that was booted with these options."""

    options: str = ""

    def save(self, keep: Path) -> lab.Result:
        """Saves it and restores it."""
        path = f"$TMPDIR/{self.name}.save"
        result = self.host.run(
            f"xl save {self.name} {path} && cp {path} saved && xl restore {path}; status=$?; rm {path}; exit $status",
            timeout=120,
        ).check()
        (result.outputs / "saved").rename(keep)
        return result


def boot(host: lab.Host, prefix: str, *all_options: str) -> list[Published]:
    """Boots one guest for each of the options, until it is up."""
    booted = []
    for number, options in enumerate(all_options):
        name = f"{prefix}{number}"
        host.write(f"{name}.cfg", guests.litmus_config(name, memory=MEMORY, options=f"{options} print=p2m"))
        booted.append(Published(name, host, len(host.guest_console(name)), options))
    host.run("".join(f"xl create -q /share/{guest.name}.cfg || exit 1\n" for guest in booted)).check()
    return booted


def destroy(booted: list[Published]) -> None:
    booted[0].host.run("".join(f"xl destroy {guest.name}\n" for guest in booted)).check()


def printed_p2m(console: str) -> dict[int, int]:
    """pfn -> mfn, from the lines of print=p2m."""
    p2m: dict[int, int] = {}
    for pfn, pages, mfn, down in re.findall(r"p2m pfn=0x(\w+) pages=(\d+) mfn=0x(\w+)( down)?", console):
        step = -1 if down else 1
        p2m |= {int(pfn, 16) + i: int(mfn, 16) + step * i for i in range(int(pages))}
    end = re.search(r"p2m end pages=(\d+) runs=(\d+) printed=(\d+)", console)
    assert end is not None
    pages, runs, printed = end.groups()
    assert runs == printed
    assert len(p2m) == int(pages)
    return p2m


@pytest.mark.deep_elsewhere
def test_what_stock_tools_refuse_to_save(host: lab.Host) -> None:
    booted = boot(host, "refused", *REFUSED)
    for guest in booted:
        console = guest.wait(UP) + guest.wait("\n")
        assert f" form={guest.options.split()[0].removeprefix('p2m=')} " in console
        result = host.run(f"xl save {guest.name} $TMPDIR/never")
        assert result.status != 0
        said = (result.stdout + result.stderr).decode()
        assert re.search(f"xc: error: {REFUSED[guest.options]}: Internal error", said), said
        # It has no part in this, and goes on.
        assert "suspend" not in guest.wait(BEATS)
    destroy(booted)


@ONE_VERSION
def test_what_stock_tools_save_whole(host: lab.Host, tmp_path: Path) -> None:
    booted = boot(host, "whole", *SAVED)
    for guest in booted:
        printed = printed_p2m(guest.wait(UP))
        assert len(printed) == len(set(printed.values())) == PAGES
        guest.save(tmp_path / guest.name)
        again = printed_p2m(guest.wait("litmus: pattern ok"))
        assert again.keys() == printed.keys()
        with SavedDomain.open(str(tmp_path / guest.name)) as saved:
            shown = describe(saved)
            assert shown["memory_in_stream"] == MEMORY << 20
            assert shown["p2m"]["max_pfn"] == (SAVED[guest.options] or PAGES)
            assert shown["p2m"]["end_pfn"] == (max(printed) if SAVED[guest.options] else shown["p2m"]["end_pfn"])
            assert saved.p2m.lookup(np.array(list(printed), np.uint64)).tolist() == list(printed.values())
        assert [str(finding) for finding in verify(str(tmp_path / guest.name)).findings] == []
    destroy(booted)


def test_a_list_not_aligned_to_1_gib_loses_its_last_gib(host: lab.Host, tmp_path: Path) -> None:
    """A bug of libxenguest: `xl save` and `xl restore` succeed, and memory is gone."""
    [guest] = boot(host, "unaligned", "p2m=linear spread=3G vaddr=+512M")
    printed = printed_p2m(guest.wait(UP))
    result = guest.save(tmp_path / "saved")
    assert b"error" not in result.stdout + result.stderr
    with SavedDomain.open(str(tmp_path / "saved")) as saved:
        shown = describe(saved)
    assert max(printed) == shown["p2m"]["max_pfn"] - 1 == 3 * GIB - 1
    assert shown["p2m"]["end_pfn"] == 2 * GIB - 1
    kept = sum(pfn < 2 * GIB for pfn in printed) << 12
    assert shown["memory_in_stream"] <= kept < MEMORY << 20
    guest.wait("litmus: panic vector=14")
    destroy([guest])


@ONE_VERSION
def test_16_tib_of_pfns_take_few_pages(host: lab.Host) -> None:
    booted = boot(
        host,
        "wide",
        "p2m=linear spread=16T vaddr=+512M",
        "p2m=rooted levels=4 spread=16T",
        "p2m=rooted levels=6 spread=8T",
        "p2m=marked spread=16T places=4",
        "p2m=rooted levels=3 spread=512G",
    )
    for guest in booted:
        console = guest.wait(UP)
        printed = printed_p2m(console)
        assert len(printed) == len(set(printed.values())) == PAGES
        told = dict(re.findall(r"(\w+)=(\w+)", console[console.index("litmus: spread") :].splitlines()[0]))
        size = {"16T": 16 * TIB, "8T": 8 * TIB, "512G": 512 * GIB}[re.findall(r"spread=(\w+)", guest.options)[0]]
        assert int(told["max_pfn"], 16) == size == max(printed) + 1
        assert int(told["list"]) + int(told["tree"]) < 300
    destroy(booted)
    [guest] = boot(host, "narrow", "p2m=rooted levels=3 spread=513G")
    guest.wait("litmus: panic p2m too large for the tree")


@ONE_VERSION
def test_corruptions_on_request(host: lab.Host, tmp_path: Path) -> None:
    booted = boot(host, "bad", *(f"p2m=both bad={bad}" for bad in BAD))
    consoles = {bad: guest.wait(UP) for bad, guest in zip(BAD, booted, strict=True)}
    p2m = {bad: printed_p2m(console) for bad, console in consoles.items()}

    def told(bad: str) -> dict[str, int]:
        line = re.search(f"litmus: bad {bad}(.*)", consoles[bad])
        assert line is not None
        return {key: int(value, 16) for key, value in re.findall(r"(\w+)=0x(\w+)", line.group(1))}

    twice, foreign, stale = told("twice"), told("foreign"), told("stale")
    assert p2m["twice"][twice["pfn"]] == p2m["twice"][twice["also"]] == twice["mfn"]
    assert len(set(p2m["twice"].values())) == PAGES - 1
    assert p2m["foreign"][foreign["pfn"]] == foreign["mfn"]
    assert p2m["stale"][stale["pfn"]] == stale["mfn"]
    assert told("oddgen") == {}
    for bad, guest in zip(BAD, booted, strict=True):  # none of this stops stock tools, nor the guest
        guest.save(tmp_path / bad)
        again = printed_p2m(guest.wait("litmus: pattern ok"))
        assert len(again) == len(set(again.values())) == PAGES - (bad in ("foreign", "stale"))
    destroy(booted)
