"""Allocating and freeing frames, the m2p, and the cost of a sparse domain."""

from __future__ import annotations

import errno
import tracemalloc

import numpy as np
import pytest

from tests.support.model_guest import TABLE, array, make_guest, page, pfns
from tests.support.model_invariants import check_invariants
from xenpv.abi.declare import Width
from xenpv.abi.domctl import PageType
from xenpv.errors import HostError
from xenpv.frames import U8, DomId
from xenpv.host.model.host import ModelHost

GIB = 1 << 30
NONE = (1 << 64) - 1


@pytest.mark.parametrize("order", [0, 9])
def test_populate_physmap_returns_shuffled_mfns_that_differ_from_their_pfns(order: int) -> None:
    host = ModelHost(GIB)
    domid = host.create(max_pages=1 << 17)
    wanted = pfns(1 << 17)[:: 1 << order]  # as many pfns as there are mfns below half a GiB
    mfns = host.populate_physmap(domid, wanted, order)
    assert len(np.unique(mfns)) == len(mfns)
    assert not (mfns == wanted).any()
    assert np.count_nonzero(np.diff(mfns.astype(np.int64)) == 1 << order) < len(mfns) // 8
    assert (host.m2p(mfns) == wanted).all()
    assert host.m2p(mfns + np.uint64((1 << order) - 1)).tolist() == (wanted + np.uint64((1 << order) - 1)).tolist()
    check_invariants(host)


def test_populate_physmap_with_the_same_seed_returns_the_same_mfns() -> None:
    def frames(seed: int) -> list[int]:
        host = ModelHost(GIB, seed=seed)
        return [int(mfn) for mfn in host.populate_physmap(host.create(max_pages=64), pfns(64))]

    assert frames(1) == frames(1) != frames(2)


@pytest.mark.parametrize("order", [0, 9])
def test_set_max_mem_limits_populate_physmap_and_frees_nothing(order: int) -> None:
    host = ModelHost(GIB)
    domid = host.create(max_pages=3 << 9)
    assert len(host.populate_physmap(domid, pfns(5) << np.uint64(order), order)) == (3 if order else 5)
    host.set_max_mem(domid, 4)
    assert len(host.populate_physmap(domid, pfns(5), order)) == 0
    assert host.info(domid).pages == (3 << 9 if order else 5)
    assert host.info(domid).max_pages == 4


def test_populate_physmap_on_a_full_host_returns_what_is_free() -> None:
    host = ModelHost(GIB)
    domid = host.create(max_pages=1 << 20)
    extents = len(host.populate_physmap(domid, pfns(1024) << np.uint64(9), 9))
    assert 400 < extents < 512
    assert len(host.populate_physmap(domid, pfns(1024))) == 0
    mfns = host.frames.owned(domid + 1)
    assert host.hypervisor.decrease_reservation(domid, mfns[mfns >= 1 << 12][:7]) == 7
    assert len(host.populate_physmap(domid, pfns(1024))) == 7
    check_invariants(host)
    host.destroy(domid)
    again = host.create(max_pages=1 << 20)
    assert len(host.populate_physmap(again, pfns(1024) << np.uint64(9), 9)) == extents


def test_populate_physmap_of_32_bit_domains_stays_below_128_gib() -> None:
    host = ModelHost(1 << 40)
    low = host.populate_physmap(host.create(4, max_pages=1 << 16), pfns(1 << 7) << np.uint64(9), 9)
    high = host.populate_physmap(host.create(8, max_pages=1 << 16), pfns(1 << 7) << np.uint64(9), 9)
    assert int(low.max()) < 1 << 25 < int(high.min())
    assert len(host.populate_physmap(host.create(4, max_pages=1), pfns(1))) == 1
    greedy = host.create(4, max_pages=1 << 28)
    assert len(host.populate_physmap(greedy, pfns(1 << 19) << np.uint64(9), 9)) < 1 << 16


def test_decrease_reservation_stops_at_a_foreign_frame() -> None:
    host = ModelHost(GIB)
    a, b = host.create(max_pages=8), host.create(max_pages=8)
    mine, theirs = host.populate_physmap(a, pfns(8)), host.populate_physmap(b, pfns(8))
    assert host.hypervisor.decrease_reservation(a, np.concatenate([mine[:2], theirs[:1], mine[2:]])) == 2
    assert host.hypervisor.decrease_reservation(a, array(int(mine[3]), int(mine[3]))) == 1
    assert host.hypervisor.decrease_reservation(a, array(host.info(a).shared_info_mfn)) == 0
    assert host.info(a).pages == 5
    assert host.m2p(mine[:2]).tolist() == [NONE, NONE]
    assert host.page_types(a, mine[:3]).tolist() == [PageType.XTAB, PageType.XTAB, 0]
    check_invariants(host)


def test_decrease_reservation_of_a_mapped_frame_waits_for_the_unmapping() -> None:
    host = ModelHost(GIB)
    guest = make_guest(host, 8, 64)
    frame = guest.mfns[5:6]
    assert host.hypervisor.decrease_reservation(guest.domid, frame) == 1
    assert host.info(guest.domid).pages == 64
    assert host.m2p(frame).tolist() == [5]
    check_invariants(host)
    host.hypervisor.mmu_update(guest.domid, [(*guest.entry_of(5), 0)])
    assert host.info(guest.domid).pages == 63
    assert host.m2p(frame).tolist() == [NONE]
    check_invariants(host)


def test_freed_frames_are_zeroed() -> None:
    host = ModelHost(GIB)
    domid = host.create(max_pages=1 << 18)
    mfns = host.populate_physmap(domid, pfns(2048))
    ones: U8 = np.ones((2048, 4096), np.uint8)
    host.write_frames(domid, mfns, ones)
    assert host.hypervisor.decrease_reservation(domid, mfns) == 2048
    again = host.populate_physmap(domid, pfns(120_000))
    assert np.isin(mfns, again).any()
    assert not host.map_frames(domid, again[np.isin(again, mfns)])[0].any()
    host.hypervisor.mmu_update(domid, [(int(again[0]), 9, 1)])
    assert np.count_nonzero(host.map_frames(domid, again[:1])[0]) == 1, "and so is the content store's memory"


@pytest.mark.parametrize("order", [0, 9])
def test_populate_physmap_of_one_extent_avoids_its_own_pfn(order: int) -> None:
    def first(pfn: int) -> int:
        host = ModelHost(GIB)
        return int(host.populate_physmap(host.create(max_pages=512), array(pfn), order)[0])

    assert first(first(0)) != first(0)


@pytest.mark.parametrize("touched", [False, True])
def test_decrease_reservation_of_extents_frees_them_whole(touched: bool) -> None:
    host = ModelHost(GIB)
    domid = host.create(max_pages=1024)
    mfns = host.populate_physmap(domid, array(0, 512), 9)
    if touched:
        host.write_frames(domid, mfns[:1] + np.uint64(3), page({1: 1}))
    assert host.hypervisor.decrease_reservation(domid, mfns, 9) == 2
    assert host.info(domid).pages == 0
    assert host.m2p(mfns).tolist() == [NONE, NONE]
    assert host.hypervisor.decrease_reservation(domid, mfns, 9) == 0
    check_invariants(host)


def test_machphys_update_sets_the_m2p_up_to_a_foreign_frame() -> None:
    host = ModelHost(GIB)
    domid = host.create(max_pages=600)
    mfns = host.populate_physmap(domid, array(0), 9)
    far = 1 << 31
    host.hypervisor.machphys_update(domid, mfns + np.uint64(7), array(far + 5))
    assert host.m2p(mfns + np.uint64(6)).tolist() == [6]
    assert host.m2p(mfns + np.uint64(7)).tolist() == [far + 5]
    other = host.info(DomId(0)).shared_info_mfn
    with pytest.raises(HostError) as e:
        host.hypervisor.machphys_update(domid, array(int(mfns[0]), other, int(mfns[0]) + 1), array(50, 51, 52))
    assert (e.value.errno, e.value.domid) == (errno.EINVAL, domid)
    assert host.m2p(array(int(mfns[0]), other, int(mfns[0]) + 1)).tolist() == [50, NONE, 1]


@pytest.mark.parametrize("width", [8, 4])
def test_map_frames_and_page_types_hide_foreign_frames(width: Width) -> None:
    host = ModelHost(GIB)
    a, b = make_guest(host, width, 64), make_guest(host, width, 64)
    pages, mapped = host.map_frames(a.domid, b.mfns)
    assert not pages.any()
    assert not mapped.any()
    assert (host.page_types(a.domid, b.mfns) == PageType.XTAB).all()
    host.destroy(b.domid)
    assert (host.m2p(b.mfns) == np.uint64(NONE)).all()
    check_invariants(host)


def test_populate_physmap_of_other_orders_raises_einval() -> None:
    host = ModelHost(GIB)
    with pytest.raises(HostError) as e:
        host.populate_physmap(host.create(max_pages=64), pfns(1), 3)
    assert e.value.errno == errno.EINVAL


def test_a_domain_of_1_tib_costs_what_is_touched() -> None:
    """64 MiB of 1 TiB are touched, on a host of 16 TiB."""
    tracemalloc.start()
    host = ModelHost(16 << 40)
    before = tracemalloc.get_traced_memory()[0]
    domid = host.create(max_pages=1 << 28)
    mfns = host.populate_physmap(domid, pfns(1 << 19) << np.uint64(9), 9)
    assert len(mfns) == 1 << 19
    assert int(mfns.max()) > 1 << 31
    assert tracemalloc.get_traced_memory()[0] - before < 16 << 20
    touched = (mfns[::16384][:, None] + pfns(512)).reshape(-1)
    host.write_frames(domid, touched, np.full((len(touched), 4096), 7, np.uint8))
    assert tracemalloc.get_traced_memory()[0] - before < 96 << 20
    tracemalloc.stop()
    assert host.m2p(mfns[-1:] + np.uint64(511)).tolist() == [(1 << 28) - 1]
    pages, mapped = host.map_frames(domid, array(int(mfns[0]), int(mfns[1])))
    assert (mapped.tolist(), pages[0, 0], pages[1, 0]) == ([1, 1], 7, 0)
    assert host.info(domid).pages == 1 << 28


def test_pin_of_a_table_that_maps_an_untouched_extent() -> None:
    host = ModelHost(GIB)
    domid = host.create(max_pages=1024)
    one, two = host.populate_physmap(domid, array(0, 512), 9).tolist()
    host.write_frames(domid, array(one), page({0: (two + 5) << 12 | TABLE}))
    host.hypervisor.pin(domid, one, 1)
    check_invariants(host)
