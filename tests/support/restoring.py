"""Restores streams on a ModelHost, and reads what the domain has then."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from tests.support.kernel_guest import Guest
from tests.support.model_invariants import check_invariants
from tests.support.saving import of_host
from tests.support.writers.stream import Stream
from xenpv.abi.xen import SHARED_INFO, START_INFO
from xenpv.errors import XenPVError
from xenpv.frames import U64, DomId
from xenpv.host.model.host import ModelHost
from xenpv.io.stream_input import Input
from xenpv.restore.restore import Restored, restore_domain


class RecordingHost(ModelHost):
    """Records each populate_physmap() of a domU; has ``extents_left`` extents of 2 MiB; refuses duplicate mappings."""

    extents_left = 1 << 30

    def __init__(self) -> None:
        self.populate_calls: list[tuple[int, int]] = []  # order, number of extents
        super().__init__(1 << 30, seed=4)

    def populate_physmap(self, domid: DomId, pfns: U64, order: int = 0) -> U64:
        if domid:
            self.populate_calls.append((order, len(pfns)))
            if order:
                pfns = pfns[: self.extents_left]
                self.extents_left -= len(pfns)
        return super().populate_physmap(domid, pfns, order)

    def map_writable(self, domid: DomId, mfns: U64) -> Any:
        assert len(np.unique(mfns)) == len(mfns)
        return super().map_writable(domid, mfns)


@contextmanager
def stream_input(data: bytes, **options: Any) -> Iterator[Input]:
    """The data as a file, open for reading."""
    fd = os.memfd_create("stream")
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    source = Input(fd, "stream", **options)
    try:
        yield source
    finally:
        source.close()


def restore_stream(stream: Stream | bytes, host: ModelHost | None = None, **options: Any) -> tuple[ModelHost, Restored]:
    """Restore a stream as a new domain, by default on a host where no mfn equals its pfn."""
    host = host or ModelHost(1 << 30, seed=3)
    with stream_input(bytes(stream)) as source:
        return host, restore_domain(host, source, **options)


def restore_error(stream: Stream | bytes, host: ModelHost | None = None, **options: Any) -> XenPVError:
    """Return the error of a restore that fails; assert that nothing of its domain is left."""
    host = host or ModelHost(128 << 20, seed=3)
    before = host_state(host)
    with stream_input(bytes(stream)) as source, pytest.raises(XenPVError) as e:
        restore_domain(host, source, **options)
    assert host_state(host) == before
    check_invariants(host)
    return e.value


def host_state(host: ModelHost) -> tuple[object, ...]:
    """Domains, free memory and xenstore nodes, without /vm, which libxl leaves behind too."""
    nodes = xenstore_nodes(host, "/")
    nodes.pop("/vm", None)
    return host.domains(), host.free_pages(), nodes


def xenstore_nodes(host: ModelHost, path: str) -> dict[str, bytes | None]:
    """Everything in xenstore at and below a path."""
    children = [f"{path.rstrip('/')}/{name}" for name in host.store.list(path)]
    return {path: host.store.read(path)} | {k: v for node in children for k, v in xenstore_nodes(host, node).items()}


def memory_of(host: ModelHost, domid: DomId) -> dict[int, bytes]:
    """The pages of a domain by pfn, from the host's own books: page tables hold mfns."""
    mfns = mfns_of(host, domid)
    return {pfn: page.tobytes() for pfn, page in zip(host.m2p(mfns).tolist(), host.frames.read(mfns), strict=True)}


def mfns_of(host: ModelHost, domid: DomId) -> U64:
    """The frames of a domain, without shared info."""
    mfns = host.frames.owned(domid + 1)
    own: U64 = mfns[mfns != np.uint64(host.info(domid).shared_info_mfn)]
    return own


def mfn_of(host: ModelHost, domid: DomId, pfn: int) -> int:
    """The only frame of a domain that the m2p gives this pfn."""
    mfns = mfns_of(host, domid)
    [mfn] = mfns[host.m2p(mfns) == np.uint64(pfn)].tolist()
    return int(mfn)


def start_info(host: ModelHost, domid: DomId, pfn: int) -> np.void:
    """The start info at a pfn of a domain."""
    return START_INFO.read(memory_of(host, domid)[pfn], host.info(domid).width)


def shared_info(host: ModelHost, domid: DomId) -> np.void:
    """The shared info of a domain."""
    return SHARED_INFO.read(host.shared_info(domid), host.info(domid).width)


def guest_on(host: ModelHost, guest: Guest, restored: Restored) -> Guest:
    """The same guest kernel in its restored domain."""
    return Guest(host, restored.domid, guest.kernel, guest.layout)


def assert_same_pages(guest: Guest, other: Guest) -> None:
    """Assert that both have the same pages of the same types, except those that a restore changes."""
    pfns, types, pages = of_host(guest)
    other_pfns, other_types, other_pages = of_host(other)
    np.testing.assert_array_equal(other_pfns, pfns)
    np.testing.assert_array_equal(other_types, types)
    leaves = guest.host.m2p(guest.live.p2m.distinct_leaves.frame)
    unchanged = ~np.isin(pfns, leaves) & (pfns != np.uint64(guest.layout.start_info))
    assert pfns[unchanged & (other_pages != pages).any(axis=1)].tolist() == []
