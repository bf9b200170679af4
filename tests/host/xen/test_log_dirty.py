"""Log-dirty mode of the real Xen: the bitmap, and the memory for it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.host_stub import domain_info
from xenpv.frames import DomId
from xenpv.host.xen import log_dirty
from xenpv.host.xen.log_dirty import LogDirty, set_bits

DOMID = DomId(7)


@given(st.sets(st.integers(0, 64 * 5000 - 1)), st.integers(1, 5000))
def test_set_bits_in_batches_of_any_size_returns_all_ascending(bits: set[int], batch_size: int) -> None:
    words = np.zeros(5000, "<u8")
    for bit in bits:
        words[bit >> 6] |= np.uint64(1 << (bit & 63))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(log_dirty, "_WORDS_AT_ONCE", batch_size)
        pfns = set_bits(words)
    assert pfns.dtype == np.uint64
    assert pfns.tolist() == sorted(bits)


def test_set_bits_of_empty_and_full_words() -> None:
    assert set_bits(np.zeros(0, "<u8")).tolist() == []
    assert set_bits(np.full(2, (1 << 64) - 1, "<u8")).tolist() == list(range(128))


def test_log_dirty_enable_grows_shadow_memory_of_tiny_and_sparse_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense domains from 4 MiB on need none; no domain gets more than tables for 64 MiB of bitmap need."""
    log = LogDirty.__new__(LogDirty)
    allocated_mb: list[int] = []

    def shadow_op(_domid: DomId, _command: int, **arguments: int) -> None:
        allocated_mb.extend([arguments["mb"]] if "mb" in arguments else [])

    def allocation(pages: int, max_pfn: int) -> int:
        allocated_mb.clear()
        log.enable(domain_info(DOMID, pages=pages, max_pages=pages, max_vcpu=0), max_pfn)
        return sum(allocated_mb)

    monkeypatch.setattr(log, "_shadow_op", shadow_op)
    assert allocation(16, 0) == allocation(1023, 1023) == 1
    assert allocation(1024, 1024) == allocation(1 << 17, 1 << 17) == 0
    assert allocation(1 << 27, 1 << 27) == 0, "512 GiB, dense"
    assert allocation(1 << 14, 1 << 32) == 193, "64 MiB over 16 TiB"
    assert allocation(1 << 27, (1 << 64) - 1) == 0
    assert allocation(1 << 22, (1 << 64) - 1) == 193
