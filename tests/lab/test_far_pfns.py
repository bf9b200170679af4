"""litmus with pfns where no tool had any: beyond 512 GiB, 8 TiB and 2^32 pages, saved and restored on real Xen."""

from __future__ import annotations

import json

import pytest

import lab
from tests.support.lab.guest import BEATS, ONE_VERSION, OURS, boot, freed

MIB = 1 << 20


@ONE_VERSION
@pytest.mark.parametrize(
    ("options", "own", "most"),
    [
        ("p2m=linear spread=600G", "", 24),  # where a tree of three levels ends, and the list goes on
        pytest.param("p2m=rooted levels=4 spread=9T", "", 24 + 36, marks=pytest.mark.deep),  # pfns of 43 bits and more
        ("p2m=linear spread=17T", "--xenpv-only", 24),  # more pfns than 32 bits count
    ],
    ids=["600G", "9T", "17T"],
)
def test_what_is_far_apart_is_saved_and_restored(host: lab.Host, options: str, own: str, most: int) -> None:
    """In megabytes, which follow the 16 MiB that it has, and 8 bytes for each leaf where stock is to read them."""
    guest, free = boot(host, "litmus", options, vcpus=2), freed(host)
    if own:
        said = host.run("xenpv save litmus /tmp/l.save")
        assert said.status == 1
        assert b"a stream has pfns up to 0xffffffff (16 TiB)" in said.stderr
        assert b"--xenpv-only" in said.stderr
        guest.wait(BEATS)
    seen = json.loads(host.run(f"xenpv save --json {own} litmus /tmp/l.save").check().stdout)
    assert seen["bytes"] < most * MIB
    host.run("xenpv verify /tmp/l.save").check()
    host.run("xenpv restore /tmp/l.save").check()
    guest.lives("new domain")
    host.run("xenpv check litmus").check()
    assert freed(host) == free


@ONE_VERSION
def test_xl_moves_it_with_our_helper(host: lab.Host) -> None:
    """Stock's own takes ten minutes for 512 GiB of pfns, and with a tree says that max_pfn is too large."""
    guest = boot(host, "litmus", "p2m=linear spread=600G", vcpus=2)
    host.run(f"{OURS} xl save litmus /tmp/l.save && {OURS} xl restore /tmp/l.save").check()
    guest.lives("new domain")
