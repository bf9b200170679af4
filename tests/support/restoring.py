"""Streams restored on a ModelHost, and what is there then."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from tests.support.kernel_guest import Guest
from tests.support.model_invariants import check
from tests.support.saving import of_host
from tests.support.writers.stream import Stream
from xenpv.abi.xen import SHARED_INFO, START_INFO
from xenpv.errors import XenPVError
from xenpv.frames import U64, DomId
from xenpv.host.model.host import ModelHost
from xenpv.io.stream_input import Input
from xenpv.restore.restore import Restored, restore_domain


class Watched(ModelHost):
    """A host that keeps what memory it was asked for, has only so many extents, and maps no frame twice at once."""

    extents = 1 << 30

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        super().__init__(1 << 30, seed=4)

    def populate_physmap(self, domid: DomId, pfns: U64, order: int = 0) -> U64:
        if domid:
            self.asked.append((order, len(pfns)))
            if order:
                pfns = pfns[: self.extents]
                self.extents -= len(pfns)
        return super().populate_physmap(domid, pfns, order)

    def map_writable(self, domid: DomId, mfns: U64) -> Any:
        assert len(np.unique(mfns)) == len(mfns)
        return super().map_writable(domid, mfns)


@contextmanager
def opened(data: bytes, **how: Any) -> Iterator[Input]:
    """The data as a file."""
    fd = os.memfd_create("stream")
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    source = Input(fd, "stream", **how)
    try:
        yield source
    finally:
        source.close()


def made(stream: Stream | bytes, host: ModelHost | None = None, **how: Any) -> tuple[ModelHost, Restored]:
    """What a stream becomes on a host whose mfns are no pfns."""
    host = host or ModelHost(1 << 30, seed=3)
    with opened(bytes(stream)) as source:
        return host, restore_domain(host, source, **how)


def refused(stream: Stream | bytes, host: ModelHost | None = None, **how: Any) -> XenPVError:
    """Why a stream becomes no domain; nothing is left of what was begun."""
    host = host or ModelHost(128 << 20, seed=3)
    before = state(host)
    with opened(bytes(stream)) as source, pytest.raises(XenPVError) as e:
        restore_domain(host, source, **how)
    assert state(host) == before
    check(host)
    return e.value


def state(host: ModelHost) -> tuple[object, ...]:
    """Domains, memory and nodes; /vm stays, as with libxl."""
    left = nodes(host, "/")
    left.pop("/vm", None)
    return host.domains(), host.free_pages(), left


def nodes(host: ModelHost, path: str) -> dict[str, bytes | None]:
    """All that is in xenstore below a path."""
    below = [f"{path.rstrip('/')}/{name}" for name in host.store.list(path)]
    return {path: host.store.read(path)} | {k: v for node in below for k, v in nodes(host, node).items()}


def memory(host: ModelHost, domid: DomId) -> dict[int, bytes]:
    """What a domain has, by the host's own books: pages as they are, tables with mfns, by pfn."""
    mfns = frames(host, domid)
    return {pfn: page.tobytes() for pfn, page in zip(host.m2p(mfns).tolist(), host.frames.read(mfns), strict=True)}


def frames(host: ModelHost, domid: DomId) -> U64:
    mfns = host.frames.owned(domid + 1)
    own: U64 = mfns[mfns != np.uint64(host.info(domid).shared_info_mfn)]
    return own


def mfn_of(host: ModelHost, domid: DomId, pfn: int) -> int:
    mfns = frames(host, domid)
    [found] = mfns[host.m2p(mfns) == np.uint64(pfn)].tolist()
    return int(found)


def start_info(host: ModelHost, domid: DomId, pfn: int) -> np.void:
    return START_INFO.read(memory(host, domid)[pfn], host.info(domid).width)


def shared_info(host: ModelHost, domid: DomId) -> np.void:
    return SHARED_INFO.read(host.shared_info(domid), host.info(domid).width)


def moved(guest: Guest, host: ModelHost, restored: Restored) -> Guest:
    """The same kernel, where it is now."""
    return Guest(host, restored.domid, guest.kernel, guest.day)


def assert_same(guest: Guest, other: Guest) -> None:
    """The same pages of the same types at the same pfns, but for those that a restore writes to."""
    at, kinds, pages = of_host(guest)
    there, their_kinds, their_pages = of_host(other)
    np.testing.assert_array_equal(there, at)
    np.testing.assert_array_equal(their_kinds, kinds)
    leaves = guest.host.m2p(guest.live.p2m.distinct.frame)
    plain = ~np.isin(at, leaves) & (at != np.uint64(guest.day.start_info))
    assert at[plain & (their_pages != pages).any(axis=1)].tolist() == []
