"""Saves and restores litmus with pfns beyond 512 GiB, 8 TiB and 2^32 pages, on real Xen."""

from __future__ import annotations

import json

import pytest

import lab
from tests.support.lab.guest import BEATS, ONE_VERSION, OURS, boot, freed

MIB = 1 << 20


@ONE_VERSION
@pytest.mark.parametrize(
    ("options", "save_option", "max_mib"),
    [
        ("p2m=linear spread=600G", "", 24),  # beyond the reach of a three-level tree
        pytest.param("p2m=rooted levels=4 spread=9T", "", 24 + 36, marks=pytest.mark.deep),  # pfns of 43 bits and more
        ("p2m=linear spread=17T", "--xenpv-only", 24),  # more than 2^32 pfns
    ],
    ids=["600G", "9T", "17T"],
)
def test_save_and_restore_far_pfns(host: lab.Host, options: str, save_option: str, max_mib: int) -> None:
    """The file takes 16 MiB of memory, and 8 bytes for each leaf where stock tools must read them."""
    guest, free = boot(host, "litmus", options, vcpus=2), freed(host)
    if save_option:
        refused = host.run("xenpv save litmus /tmp/l.save")
        assert refused.status == 1
        assert b"0xffffffff" in refused.stderr
        assert b"--xenpv-only" in refused.stderr
        guest.wait(BEATS)
    summary = json.loads(host.run(f"xenpv save --json {save_option} litmus /tmp/l.save").check().stdout)
    assert summary["bytes"] < max_mib * MIB
    host.run("xenpv verify /tmp/l.save").check()
    host.run("xenpv restore /tmp/l.save").check()
    guest.lives("new domain")
    host.run("xenpv check litmus").check()
    assert freed(host) == free


@ONE_VERSION
def test_xl_with_our_helper_saves_and_restores_far_pfns(host: lab.Host) -> None:
    """Stock's helper takes ten minutes for 512 GiB of pfns, and refuses a tree with a max_pfn that large."""
    guest = boot(host, "litmus", "p2m=linear spread=600G", vcpus=2)
    host.run(f"{OURS} xl save litmus /tmp/l.save && {OURS} xl restore /tmp/l.save").check()
    guest.lives("new domain")
