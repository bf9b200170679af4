"""Domains on ModelHost, saved and restored on another: the guest goes on, and has what it had."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.domain.saved import piped
from tests.domain.saving import CONFIG, of_host, saved, suspended
from tests.host.kernel_guest import SOME, Guest
from tests.host.model_guest import pfns
from tests.host.model_invariants import check
from xenpv.abi.declare import Width
from xenpv.domain.input import Input
from xenpv.domain.restore import Restored, restore, restore_domain
from xenpv.host.model import ModelHost
from xenpv.stream.envelope import Kind


def from_file(path: Path, host: ModelHost, **how: Any) -> Restored:
    source = Input.open(str(path))
    try:
        return restore_domain(host, source, **how)
    finally:
        source.close()


def moved_guest(guest: Guest, host: ModelHost, restored: Restored) -> Guest:
    return Guest(host, restored.domid, guest.kernel, guest.day)


def same(guest: Guest, other: Guest) -> None:
    """The same pages of the same types at the same pfns, but for those that a restore writes to."""
    at, kinds, pages = of_host(guest)
    there, their_kinds, their_pages = of_host(other)
    np.testing.assert_array_equal(there, at)
    np.testing.assert_array_equal(their_kinds, kinds)
    leaves = guest.host.m2p(guest.live.p2m.distinct.frame)
    plain = ~np.isin(at, leaves) & (at != np.uint64(guest.day.start_info))
    np.testing.assert_array_equal(their_pages[plain], pages[plain])


@pytest.mark.parametrize(("width", "form"), SOME)
def test_the_guest_goes_on(width: Width, form: str, tmp_path: Path) -> None:
    guest = suspended(form, width)
    saved(guest, tmp_path / "x", config=CONFIG)
    host = ModelHost(1 << 30, seed=9)
    restored = from_file(tmp_path / "x", host)
    other = moved_guest(guest, host, restored)
    check(host)
    same(guest, other)
    assert other.do("resume") is False
    assert set(other.agrees()) <= {"physmap-invalid"}
    assert not len(other.do("check_pattern", other.do("free"), 7))
    other.do("balloon_in", pfns(20, 200_000))
    assert set(other.agrees()) <= {"physmap-invalid"}


@pytest.mark.parametrize("way", ["file", "pipe"])
def test_a_domain_that_is_there_is_filled(way: str, tmp_path: Path) -> None:
    """As for libxl: its descriptor, which is left right behind the stream."""
    guest = suspended("both")
    saved(guest, tmp_path / "x", envelope=Kind.LIBXC)
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(data + b"more")
    host = ModelHost(1 << 30, seed=9)
    domid = host.create(max_pages=4096)
    missing: list[tuple[bool, bool]] = []

    def fill(fd: int) -> Restored:
        source = Input(fd, "fd", exact=True)
        ports: dict[str, Any] = {"console_port": host.alloc_event(domid), "xenstore_port": host.alloc_event(domid)}
        restored = restore(
            host,
            domid,
            source,
            envelope=Kind.LIBXC,
            static_data_done=lambda cpuid, msrs: missing.append((cpuid, msrs)),
            **ports,
        )
        assert os.read(fd, 9) == b"more"
        source.close()
        return restored

    if way == "file":
        restored = fill(os.open(tmp_path / "x", os.O_RDONLY))
    else:
        with piped(data + b"more") as fd:
            restored = fill(os.dup(fd))
    assert missing == [(True, True)]
    assert (restored.console.port, restored.xenstore.port, restored.bytes) == (1, 2, len(data))
    assert host.info(domid).paused
    same(guest, moved_guest(guest, host, restored))
