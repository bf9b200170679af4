"""litmus with pfns where no tool had any: beyond 512 GiB, 8 TiB and 2^32 pages, saved and restored on real Xen."""

from __future__ import annotations

import json

import pytest

import lab
from tests.lab.test_migrate import boot, freed, lives

OURS = "LIBXL_SAVE_HELPER=/usr/local/bin/xenpv-save-helper"
MIB = 1 << 20
DEFAULT = pytest.mark.parametrize("host", [lab.DEFAULT], indirect=True, ids=[f"xen-{lab.DEFAULT}"])


@DEFAULT
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
    at, free = boot(host, "litmus", options), freed(host)
    if own:
        said = host.run("xenpv save litmus /tmp/l.save")
        assert said.status == 1
        assert b"a stream has pfns up to 0xffffffff (16 TiB)" in said.stderr
        assert b"--xenpv-only" in said.stderr
        at = host.wait_for_guest("litmus", "litmus: heartbeat", after=at)
    seen = json.loads(host.run(f"xenpv save --json {own} litmus /tmp/l.save").check().stdout)
    assert seen["bytes"] < most * MIB
    host.run("xenpv verify /tmp/l.save").check()
    host.run("xenpv restore /tmp/l.save").check()
    lives(host, "litmus", "new domain", at)
    host.run("xenpv check litmus").check()
    assert freed(host) == free


@DEFAULT
def test_xl_moves_it_with_our_helper(host: lab.Host) -> None:
    """Stock's own takes ten minutes for 512 GiB of pfns, and with a tree says that max_pfn is too large."""
    at = boot(host, "litmus", "p2m=linear spread=600G")
    host.run(f"{OURS} xl save litmus /tmp/l.save && {OURS} xl restore /tmp/l.save").check()
    lives(host, "litmus", "new domain", at)
