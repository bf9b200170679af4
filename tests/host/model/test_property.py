"""Random calls of guests and toolstacks: reference counts stay right, and a refused call changes nothing.

The rule is Xen's, in the head comment of xen.git:xen/arch/x86/mm.c: a frame's type changes only while its type count
is 0, so that no guest can write its own page tables.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.model_guest import READ_ONLY, TABLE, array, make_guest, page, pfns
from tests.support.model_invariants import check_invariants
from xenpv.abi.declare import Width
from xenpv.abi.x86 import PTE_PSE
from xenpv.errors import HostError
from xenpv.host.model.host import ModelHost

FRAMES = 12  # the domain's first frames, on which random calls are made
some = st.integers(0, FRAMES - 1)
slot = st.sampled_from([0, 1, 3, 255, 256, 300, 511])
flags = st.sampled_from([0, TABLE, TABLE, READ_ONLY, READ_ONLY, TABLE | PTE_PSE])
entry = st.tuples(slot, some, flags)
level = st.integers(1, 4)
ops = st.one_of(
    st.tuples(st.just("fill"), some, st.lists(entry, max_size=3)),
    st.tuples(st.just("pin"), some, level),
    st.tuples(st.just("unpin"), some),
    st.tuples(st.just("update"), some, entry),
    st.tuples(st.just("decrease"), some),
    st.tuples(st.just("populate"), st.integers(1, 3)),
    st.tuples(st.just("m2p"), some, some),
    st.tuples(st.just("load_cr3"), some, st.booleans()),
    st.tuples(st.just("foreign"), some, st.sampled_from([0, TABLE, READ_ONLY])),
)


def state(host: ModelHost) -> bytes:
    rows = host.frames.rows
    return b"".join(column.tobytes() for column in (rows.owner, rows.ref_count, rows.type_count, rows.m2p))


def call(host: ModelHost, domid: Any, mfns: Any, op: tuple[Any, ...]) -> None:
    def pte(at: tuple[int, int, int]) -> int:
        return int(mfns[at[1]]) << 12 | at[2]

    match op:
        case ("fill", n, entries):
            host.write_frames(domid, mfns[n : n + 1], page({e[0]: pte(e) for e in entries}))
        case ("pin", n, kind):
            host.hypervisor.pin(domid, int(mfns[n]), kind)
        case ("unpin", n):
            host.hypervisor.unpin(domid, int(mfns[n]))
        case ("update", n, at):
            host.hypervisor.mmu_update(domid, [(int(mfns[n]), at[0], pte(at))])
        case ("decrease", n):
            host.hypervisor.decrease_reservation(domid, mfns[n : n + 1])
        case ("populate", n):
            host.populate_physmap(domid, pfns(n, 5000))
        case ("m2p", n, pfn):
            host.hypervisor.machphys_update(domid, mfns[n : n + 1], array(0x10_0000_0000 + pfn))
        case ("load_cr3", n, user):
            host.hypervisor.load_cr3(domid, int(mfns[n]), user=user)
        case ("foreign", n, bits):
            other = host.info(type(domid)(0)).shared_info_mfn
            host.hypervisor.mmu_update(domid, [(int(mfns[n]), 7, other << 12 | bits)])
        case _:
            raise AssertionError(op)


@pytest.mark.parametrize("width", [8, 4])
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(ops, min_size=15, max_size=60))
def test_random_calls_keep_counts_right_and_refusals_change_nothing(width: Width, steps: list[tuple[Any, ...]]) -> None:
    host = ModelHost(1 << 30)
    guest = make_guest(host, width, 64)
    unmap(host, guest)
    for op in steps:
        before = state(host)
        try:
            call(host, guest.domid, guest.mfns, op)
        except HostError:
            assert state(host) == before
        info = host.info(guest.domid)
        assert info.pages <= info.max_pages
    check_invariants(host)
    host.destroy(guest.domid)
    check_invariants(host)
    assert host.info(type(guest.domid)(0)).pages == host.frames.pages.total()


def unmap(host: ModelHost, guest: Any) -> None:
    """Unmap the frames of the random calls from the domain's own tables, so that they can become any type."""
    host.hypervisor.mmu_update(guest.domid, [(*guest.entry_of(n), 0) for n in range(FRAMES) if n != 1])


@pytest.mark.parametrize("width", [8, 4])
def test_model_guest_has_right_counts(width: Width) -> None:
    host = ModelHost(1 << 30)
    guest = make_guest(host, width, 600)
    check_invariants(host)
    host.hypervisor.unpin(guest.domid, guest.top)
    check_invariants(host)
    assert np.count_nonzero(host.page_types(guest.domid, guest.mfns)) > 3, "cr3 still holds them"
