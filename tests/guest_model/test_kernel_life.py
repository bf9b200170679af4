"""The life of a kernel on the model: suspend, restore, cancel, deliberate corruption, and random operations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.kernel_guest import SOME_FORMS, WIDTHS, Guest, cancel_suspend, mfn_by_pfn, register, ring_frames
from tests.support.model_guest import array, pfns
from tests.support.restored_domain import restore_directly
from xenpv.abi.declare import Width
from xenpv.abi.x86 import PTE_P
from xenpv.errors import GuestError
from xenpv.findings import Severity
from xenpv.frames import NO_FRAME
from xenpv.host.model.host import SHUTDOWN_SUSPEND, ModelHost

BOTH = pytest.mark.parametrize("width", WIDTHS)


@pytest.mark.parametrize(("width", "form"), SOME_FORMS)
def test_resume_after_a_restore_elsewhere_publishes_the_p2m_again(width: Width, form: str) -> None:
    guest = Guest.boot(form, width)
    guest.do("balloon_out", guest.do("free_pfns")[5:100])
    guest.do("move", guest.do("free_pfns")[:5], pfns(5, 70_000))
    free = guest.do("free_pfns")
    guest.do("write_pattern", free, 7)
    guest.host.hypervisor.send_event(guest.domid, guest.kernel.port)
    assert guest.do("poll") is None
    info = guest.host.info(guest.domid)
    assert (info.shutdown, info.shutdown_reason) == (True, SHUTDOWN_SUSPEND)
    before = guest.live.p2m.lookup(free)
    other = ModelHost(2 << 30, seed=9)
    moved = Guest(other, restore_directly(guest.host, guest.domid, other), guest.kernel, guest.layout)
    assert moved.do("resume") is False
    assert moved.assert_consistent() == ["physmap-invalid"]
    assert (moved.live.p2m.lookup(free) != before).all()
    assert not len(moved.do("check_pattern", free, 7))
    assert mfn_by_pfn(moved.live.p2m).keys() == mfn_by_pfn(guest.live.p2m).keys()
    moved.do("balloon_in", pfns(100, 200_000))
    assert moved.assert_consistent() == ["physmap-invalid"]
    assert other.store.read(f"/local/domain/{moved.domid}/device/suspend/event-channel") == b"1"


@BOTH
def test_resume_after_a_cancelled_suspend_changes_nothing(width: Width) -> None:
    guest = Guest.boot("both", width)
    node = f"/local/domain/{guest.domid}/control/shutdown"
    guest.do("poll")
    assert not guest.host.info(guest.domid).shutdown, "nobody asked"
    before, fields = guest.live.anchors, ring_frames(guest)
    guest.host.store.write(node, b"suspend")
    guest.do("poll")
    assert guest.host.store.read(node) == b""
    assert ring_frames(guest) == (guest.layout.start_info + 1, guest.layout.start_info + 2)
    regs = register(guest, "dx")
    assert regs == int(guest.layout.mfns[guest.layout.start_info])
    assert register(guest, "ax") == 0
    assert cancel_suspend(guest) is True
    assert (guest.live.anchors, ring_frames(guest)) == (before, fields)
    assert guest.assert_consistent() == []


def test_suspend_leaves_no_mapping_of_shared_info() -> None:
    guest = Guest.boot("linear")
    guest.do("suspend")
    shared = guest.host.info(guest.domid).shared_info_mfn
    owned = guest.host.frames.owned(guest.domid + 1)
    tables = owned[(guest.host.page_types(guest.domid, owned) & 7) == 1]
    ptes = guest.host.frames.read(tables).view("<u8").reshape(-1)
    mapped = ptes[ptes & np.uint64(PTE_P) != 0] >> np.uint64(12) & np.uint64((1 << 40) - 1)
    assert len(mapped)
    assert shared not in mapped.tolist()


def contents(guest: Guest) -> dict[int, bytes]:
    """Return all pages with content by their pfn in the m2p."""
    mfns = guest.host.frames.owned(guest.domid + 1)
    mfns = mfns[guest.host.m2p(mfns) != NO_FRAME]
    pages = guest.host.frames.read(mfns)
    return {int(pfn): page.tobytes() for pfn, page in zip(guest.host.m2p(mfns), pages, strict=True) if page.any()}


@BOTH
def test_log_dirty_logs_every_page_that_changes(width: Width) -> None:
    """Otherwise a migration would not send it: pages written, moved, and used for tables of a growing p2m."""
    guest = Guest.boot("both", width)
    free = guest.do("free_pfns")
    guest.do("write_pattern", free[:900], 1)
    before = contents(guest)
    guest.host.log_dirty(guest.domid, on=True)
    guest.do("write_pattern", free[100:200], 2)
    guest.do("balloon_out", free[300:400])
    guest.do("move", free[500:600], pfns(100, 1 << 20))
    guest.do("balloon_in", pfns(50, 2 << 20))
    guest.do("write_pattern", pfns(10, 2 << 20), 2)
    after = contents(guest)
    changed = {pfn for pfn, page in after.items() if before.get(pfn) != page}
    dirty = set(guest.host.dirty_pfns(guest.domid, 1 << 22, clean=True).tolist())
    assert {*free[100:200].tolist(), *range(1 << 20, (1 << 20) + 100), *range(2 << 20, (2 << 20) + 10)} <= changed
    assert changed <= dirty
    assert len(dirty) < len(changed) + 200, "and few others"


def corrupt(guest: Guest, pfn: int, mfn: int) -> list[tuple[str, int | None]]:
    """Set an entry of the p2m. Rule and pfn of the findings."""
    guest.host.run(guest.domid, lambda view: guest.kernel.p2m.store(view, array(pfn), array(mfn)))
    return [(f.rule.name, f.pfn) for f in guest.findings() if f.severity is not Severity.NOTE]


@pytest.mark.parametrize(("width", "form"), SOME_FORMS)
def test_check_of_a_wrong_entry_reports_its_rule_and_pfn(width: Width, form: str) -> None:
    guest = Guest.boot(form, width)
    pfn, other = (int(n) for n in guest.do("free_pfns")[[3, 9]])
    right, taken = guest.entries(array(pfn, other)).tolist()
    dom0 = int(guest.host.frames.owned(1)[77])
    for wrong, rule in (
        (taken, "physmap-twice"),
        (dom0, "physmap-not-own"),
        (guest.host.max_mfn() + 5, "physmap-beyond"),
    ):
        assert corrupt(guest, pfn, wrong) == [(rule, pfn), ("physmap-lost", pfn)]
    assert corrupt(guest, pfn, int(NO_FRAME)) == [("physmap-lost", pfn)]
    assert corrupt(guest, pfn, right) == []
    guest.host.hypervisor.machphys_update(guest.domid, array(right), array(1 << 20))
    assert ("physmap-stale", pfn) in corrupt(guest, pfn, right)


def test_balloon_out_of_a_foreign_frame_stops_there() -> None:
    """The second entry names a frame of dom0: Xen takes the page before it, and none after."""
    guest = Guest.boot("linear")
    chosen = guest.do("free_pfns")[:3]
    right = guest.entries(chosen)
    assert corrupt(guest, int(chosen[1]), int(guest.host.frames.owned(1)[77]))
    with pytest.raises(GuestError, match="1 pages of 3"):
        guest.do("balloon_out", chosen)
    guest.host.run(guest.domid, lambda view: guest.kernel.p2m.store(view, chosen[1:], right[1:]))
    assert guest.assert_consistent() == ["physmap-invalid"]
    assert guest.host.info(guest.domid).pages == 4095


ops = st.one_of(
    st.tuples(st.just("out"), st.integers(0, 3000), st.integers(1, 600), st.sampled_from([1, 1, 3, 17])),
    st.tuples(st.just("in"), st.sampled_from([0, 1500, 5000, 1 << 20, (1 << 27) - 400]), st.integers(1, 400)),
    st.tuples(st.just("move"), st.integers(0, 3000), st.integers(1, 300), st.sampled_from([3000, 6000, 1 << 24])),
    st.tuples(st.just("dirty"), st.integers(0, 3000), st.integers(1, 800)),
    st.tuples(st.just("shuffle"), st.integers(0, 3000), st.integers(2, 300)),
    st.tuples(st.just("cancel")),
)


@pytest.mark.parametrize(("width", "form"), [(8, "both"), (8, "rooted4"), (4, "linear"), (4, "tree3")])
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(ops, min_size=3, max_size=10))
def test_random_operations_keep_p2m_m2p_and_contents_consistent(
    width: Width, form: str, steps: list[tuple[Any, ...]]
) -> None:
    guest = Guest.boot(form, width, 3000)
    end = guest.kernel.pages.end
    written: dict[int, int] = {}
    for counter, op in enumerate(steps, 1):
        free = guest.do("free_pfns")
        match op:
            case ("out", first, n, step):
                released = free[first::step][:n]
                guest.do("balloon_out", released)
                written = {pfn: at for pfn, at in written.items() if pfn not in set(released.tolist())}
            case ("in", first, n):
                new = np.setdiff1d(pfns(n, max(first, end)), free)
                room = 3000 - guest.host.info(guest.domid).pages
                assert len(guest.do("balloon_in", new)) == min(room, len(new))
            case ("move", first, n, to):
                chosen = free[first : first + n]
                new = np.setdiff1d(pfns(n, to), free)[: len(chosen)]
                guest.do("move", chosen[: len(new)], new)
                written = {pfn: at for pfn, at in written.items() if pfn not in set(chosen.tolist())}
            case ("dirty", first, n):
                chosen = free[first : first + n]
                guest.do("write_pattern", chosen, counter)
                written |= dict.fromkeys(chosen.tolist(), counter)
            case ("shuffle", first, n):
                chosen = free[first : first + n]
                guest.do("move", chosen, np.roll(chosen, 1))
                written = {pfn: at for pfn, at in written.items() if pfn not in set(chosen.tolist())}
            case _:
                anchors = guest.live.anchors
                guest.do("suspend")
                assert cancel_suspend(guest) is True
                assert guest.live.anchors == anchors
    guest.assert_consistent()
    entries = mfn_by_pfn(guest.live.p2m)
    mine = guest.host.frames.owned(guest.domid + 1)
    mine = mine[mine != np.uint64(guest.host.info(guest.domid).shared_info_mfn)]
    assert entries == dict(sorted(zip(guest.host.m2p(mine).tolist(), mine.tolist(), strict=True)))
    for counter in set(written.values()):
        chosen = array(*sorted(pfn for pfn, at in written.items() if at == counter))
        assert not len(guest.do("check_pattern", chosen, counter))
