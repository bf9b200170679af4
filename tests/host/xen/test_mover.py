"""XenHost's parts that need no Xen: the log's bitmap, what is memory, and what is taken back."""

from __future__ import annotations

import errno
from struct import pack
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.host.xen.test_toolstack import Xenstore, opened
from xenpv.errors import HostError
from xenpv.frames import DomId
from xenpv.host.protocol import DomainInfo
from xenpv.host.xen import log_dirty
from xenpv.host.xen.host import XenHost, ram_bounds
from xenpv.host.xen.log_dirty import LogDirty, set_bits

RAM, RESERVED = 1, 2
DOMID = DomId(7)
NODE = b"/local/domain/7/control/shutdown"


@given(st.sets(st.integers(0, 64 * 5000 - 1)), st.integers(1, 5000))
def test_bits_that_are_set(bits: set[int], at_once: int) -> None:
    words = np.zeros(5000, "<u8")
    for bit in bits:
        words[bit >> 6] |= np.uint64(1 << (bit & 63))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(log_dirty, "_WORDS_AT_ONCE", at_once)
        found = set_bits(words)
    assert found.dtype == np.uint64
    assert found.tolist() == sorted(bits)


def test_no_bits_at_all() -> None:
    assert set_bits(np.zeros(0, "<u8")).tolist() == []
    assert set_bits(np.full(2, (1 << 64) - 1, "<u8")).tolist() == list(range(128))


def bounds(*entries: tuple[int, int, int]) -> list[int]:
    found: list[int] = ram_bounds(b"".join(pack("<QQI", *entry) for entry in entries)).tolist()
    return found


def test_what_of_a_host_is_memory() -> None:
    assert bounds() == []
    low, high = (0, 0x9FC00, RAM), (1 << 32, 1 << 32, RAM)
    usual = [low, (0x9FC00, 0x400, RESERVED), (1 << 20, 3 << 30, RAM), (0xFEFF_C000, 0x4000, RESERVED), high]
    assert bounds(*usual) == [0x100, (3 << 18) + 0x100, 1 << 20, 1 << 21]
    assert bounds(*usual[::-1]) == bounds(*usual)
    assert bounds((0x0010_0001, 0x2FFF, RAM)) == [0x101, 0x103], "whole pages only"
    assert bounds((1 << 20, 0xFFF, RAM)) == []
    assert bounds((1 << 30, 1 << 30, RAM), (5 << 28, 1 << 28, RAM), (6 << 28, 1 << 31, RAM)) == [
        1 << 18,
        1 << 19,
        1 << 19,
        (6 << 16) + (1 << 19),
    ]
    assert bounds((0, (1 << 64) - 1, RAM)) == [0x100, (1 << 52) - 1]


def mover(calls: Xenstore) -> XenHost:
    made: Any = XenHost.__new__(XenHost)
    store = opened(calls)
    made._store, made._getdomaininfo = store, lambda _: None
    assert isinstance(made, XenHost)
    return made


def asked() -> Xenstore:
    calls = Xenstore()
    calls.nodes |= {b"/local/domain/7": b"", NODE: b""}
    return calls


def test_a_request_is_taken_back_where_it_still_stands() -> None:
    calls = asked()
    host = mover(calls)
    host.request_shutdown(DOMID, "suspend")
    assert calls.nodes[NODE] == b"suspend"
    assert calls.permissions.pop(NODE) == [(7, 0)], "the guest must be able to take it away"
    host.request_shutdown(DOMID, "")
    assert calls.nodes[NODE] == b""
    del calls.permissions[NODE]
    host.request_shutdown(DOMID, "")
    assert not calls.permissions, "nothing was written"


def test_a_guest_that_sees_a_request_while_it_is_taken_back() -> None:
    """Its write makes ours come to nothing, and looking again there is nothing left to take back."""
    calls = asked()
    calls.nodes[NODE] = b"suspend"
    ended = calls.end

    def end(handle: int, within: int, abort: bool) -> bool:
        if calls.conflicts:
            calls.nodes[NODE] = b""
        return ended(handle, within, abort)

    calls.conflicts, calls.end = 1, end  # type: ignore[assignment,method-assign]
    writes: list[bytes] = []
    written = calls.write
    calls.write = lambda *a: writes.append(a[2]) or written(*a)  # type: ignore[method-assign,func-returns-value]
    mover(calls).request_shutdown(DOMID, "")
    assert (calls.begun, calls.ended) == (2, 2)
    assert len(writes) == 1


def test_nothing_is_written_for_a_domain_whose_nodes_have_gone() -> None:
    calls = Xenstore()
    before = dict(calls.nodes)
    with pytest.raises(HostError, match="no such domain") as caught:
        mover(calls).request_shutdown(DOMID, "suspend")
    assert caught.value.errno == errno.ESRCH
    assert calls.nodes == before
    assert calls.begun == calls.ended


def test_log_dirty_enable_grows_shadow_memory_of_tiny_and_sparse_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense domains from 4 MiB on need none; no domain gets more than tables for 64 MiB of bitmap need."""
    log = LogDirty.__new__(LogDirty)
    allocated_mb: list[int] = []

    def shadow_op(_domid: DomId, _command: int, **arguments: int) -> None:
        allocated_mb.extend([arguments["mb"]] if "mb" in arguments else [])

    def allocation(pages: int, max_pfn: int) -> int:
        allocated_mb.clear()
        log.enable(DomainInfo(DOMID, None, None, False, 8, pages, pages, 5, 0, False, False, None, False), max_pfn)
        return sum(allocated_mb)

    monkeypatch.setattr(log, "_shadow_op", shadow_op)
    assert allocation(16, 0) == allocation(1023, 1023) == 1
    assert allocation(1024, 1024) == allocation(1 << 17, 1 << 17) == 0
    assert allocation(1 << 27, 1 << 27) == 0, "512 GiB, dense"
    assert allocation(1 << 14, 1 << 32) == 193, "64 MiB over 16 TiB"
    assert allocation(1 << 27, (1 << 64) - 1) == 0
    assert allocation(1 << 22, (1 << 64) - 1) == 193
