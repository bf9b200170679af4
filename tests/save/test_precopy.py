"""Domains copied while they run: what arrives is the guest as it was when it stopped, whatever it did until then."""

from __future__ import annotations

import errno
import itertools
import time
from contextlib import suppress
from functools import partial
from typing import Any, cast

import numpy as np
import pytest

from tests.support.kernel_guest import SOME_FORMS, Guest, cancel_suspend
from tests.support.live_guests import XTAB, attend, copied, is_off, times
from tests.support.model_guest import pfns
from tests.support.saving import BOTH, MemorySink, PatchedHost, a_page, arch, tree_of
from xenpv.abi.declare import Width
from xenpv.errors import GuestError, HostError, RequestError, iter_notes
from xenpv.frames import U8, U64, DomId
from xenpv.host.protocol import Mover
from xenpv.io.progress import Phase, Progress, Transfer
from xenpv.save.p2m_tracker import P2MTracker
from xenpv.save.precopy import PrecopyPolicy
from xenpv.save.save import save
from xenpv.save.suspend import suspend
from xenpv.stream.envelope import Kind


def writing(guest: Guest, count: int = 40) -> Any:
    """A step that writes other pages each time, with another pattern."""
    turn = itertools.count(1)

    def step() -> None:
        n = next(turn)
        guest.do("write_pattern", guest.do("free_pfns")[n * 7 : n * 7 + count], n)

    return step


@pytest.mark.parametrize(("width", "form"), SOME_FORMS)
def test_live_save_pages_written_meanwhile_arrive(width: Width, form: str) -> None:
    guest = Guest.boot(form, width)
    guest.do("write_pattern", guest.do("free_pfns"), 9)
    attend(guest, times(9, writing(guest, 200)))
    made, summary = copied(guest)
    assert made.names.count(3) == 1, "nothing happened to its p2m"
    assert summary.iterations == 6
    assert summary.pages < 4096 + 6 * 500, "cost follows what it wrote"


@pytest.mark.parametrize(("top", "others"), [(1 << 24, [1]), (1 << 40, [1, 1 << 32, 1 << 32 | 1])])
def test_p2m_tracker_mfn_that_differs_in_one_bit_counts_as_remapped(top: int, others: list[int]) -> None:
    """What is remembered of an mfn is all of it, also on a host of 16 TiB and more."""
    guest = Guest.boot("linear")
    p2m = P2MTracker(cast(Mover, PatchedHost(guest, max_mfn=lambda: top)), guest.domid, track_changes=True)
    assert sum(len(p2m.record_leaves(leaves)[0]) for leaves in p2m.iter_leaves()) > 4000
    pfn = int(guest.do("free_pfns")[0])
    leaf = p2m.p2m.leaves.frame_of(np.array([pfn // 512]))
    for other in others:
        entries = guest.host.frames.read(leaf).view("<u8")
        entries[0, pfn % 512] ^= np.uint64(other)
        guest.host.write_frames(guest.domid, leaf, entries.view(np.uint8))
        for expected in ([pfn], []):
            assert p2m.changes(guest.host.m2p(leaf)).remapped.tolist() == expected, hex(other)


@pytest.mark.parametrize(("width", "form"), SOME_FORMS)
def test_live_save_p2m_replaced_meanwhile_arrives(width: Width, form: str) -> None:
    """It grows, and with it all that is above its leaves is made anew; pages come, go, and get other pfns."""
    guest = Guest.boot(form, width)
    guest.do("write_pattern", guest.do("free_pfns"), 9)
    free = guest.do("free_pfns")

    def repopulate() -> None:
        guest.do("balloon_out", free[50:60])
        guest.do("balloon_in", free[50:60])

    attend(guest, [
        lambda: guest.do("move", free[:20], pfns(20, 50_000)),
        lambda: guest.do("balloon_out", free[100:200]),
        lambda: guest.do("balloon_in", pfns(30, 90_000)),
        repopulate,
        lambda: guest.do("move", pfns(20, 50_000), free[:20][::-1]),
    ])  # fmt: skip
    made, _ = copied(guest, live=PrecopyPolicy(max_iterations=9, target_dirty=0))
    assert made.end_pfn == 90_029
    assert made.names.count(3) > 1
    assert {made.pages[pfn] for pfn in free[100:170].tolist()} == {(XTAB, b"")}, "sent, and then given back"


@BOTH
def test_live_save_p2m_grown_before_log_dirty_arrives(width: Width) -> None:
    guest = Guest.boot("tree3", width, pages=4000)
    guest.do("write_pattern", guest.do("free_pfns"), 9)

    def log_dirty(domid: DomId, *, on: bool) -> None:
        if on:
            guest.do("move", guest.do("free_pfns")[:10], pfns(10, 4050))
        guest.host.log_dirty(domid, on=on)

    attend(guest)
    made, _ = copied(guest, PatchedHost(guest, log_dirty=log_dirty))
    assert made.end_pfn == 4059


@BOTH
def test_live_save_page_moved_to_another_pfn_resends_page_tables(width: Width) -> None:
    """The mfn in them is as it was, and nobody writes them: only what they come to in a stream is another."""
    guest = Guest.boot("linear", width)
    guest.do("write_pattern", guest.do("free_pfns"), 9)
    attend(guest, [lambda: guest.do("move", guest.do("free_pfns")[1000:1025], pfns(25, 4096))])
    copied(guest, live=PrecopyPolicy(max_iterations=1))


def test_live_save_lookup_in_replaced_leaf_is_sent_again() -> None:
    guest = Guest.boot("tree3")
    host, place = guest.host, 7
    new = np.array([a_page(guest)], np.uint64)
    old = guest.live.p2m.leaves.frame_of(np.array([place]))
    wrote, moved = list[int](), list[int]()

    def write() -> None:
        guest.do("write_pattern", pfns(60, place * 512), 4)
        wrote.append(1)

    def map_frames(domid: DomId, mfns: U64) -> tuple[U8, U8]:
        """The leaf is read for the pages that were written: just before, another has taken its place."""
        if wrote and not moved and old[0] in mfns:
            moved.append(1)
            leaf = host.frames.read(old)
            host.write_frames(domid, new, leaf)
            tree_of(guest, {place: int(new[0])}, 4096)
            leaf.view("<u8")[0, :60] = leaf.view("<u8")[0, :60][::-1].copy()
            host.write_frames(domid, old, leaf)
            top = np.array([guest.live.anchors.frame_list_list], np.uint64)
            host.hypervisor.mark_dirty(domid, np.concatenate([new, old, host.frames.read(top).view("<u8")[0, :1]]))
        return host.map_frames(domid, mfns)

    attend(guest, [write])
    copied(guest, PatchedHost(guest, map_frames=map_frames))
    assert moved


def test_precopy_idle_guest_takes_two_iterations() -> None:
    guest = Guest.boot("linear")
    attend(guest)
    _, summary = copied(guest)
    assert summary.iterations == 2
    assert summary.pages < 4096 + 10, "once, and what it writes to suspend"
    assert summary.downtime <= summary.seconds


def test_live_save_page_table_not_yet_normalisable_is_deferred() -> None:
    """xg_sr_save_x86_pv.c normalise_pagetable(): "Errors during the live part of migration are expected"."""
    guest = Guest.boot("tree3")
    foreign = int(guest.host.frames.owned(1)[7])

    def map_frames(domid: DomId, mfns: U64) -> tuple[U8, U8]:
        pages, mapped = guest.host.map_frames(domid, mfns)
        if guest.host.info(domid).shutdown_reason is None:
            tables = guest.host.page_types(domid, mfns) == 1
            pages[tables, 8:16] = np.frombuffer((foreign << 12 | 1).to_bytes(8, "little"), np.uint8)
        return pages, mapped

    attend(guest)
    made, _ = copied(guest, PatchedHost(guest, map_frames=map_frames))
    assert 1 in {kind & 7 for kind, _ in made.pages.values()}


def test_live_save_unmappable_pages_are_deferred() -> None:
    guest = Guest.boot("tree3")
    mfn = guest.live.p2m.lookup(np.array([4000, 4001], np.uint64))

    def running() -> bool:
        return guest.host.info(guest.domid).shutdown_reason is None

    def page_types(domid: DomId, mfns: U64) -> U8:
        kinds = guest.host.page_types(domid, mfns)
        kinds[(mfns == mfn[0]) & running()] = XTAB
        return kinds

    def map_frames(domid: DomId, mfns: U64) -> tuple[U8, U8]:
        pages, mapped = guest.host.map_frames(domid, mfns)
        mapped[(mfns == mfn[1]) & running()] = 0
        return pages, mapped

    attend(guest)
    made, summary = copied(guest, PatchedHost(guest, page_types=page_types, map_frames=map_frames))
    assert (made.pages[4000][0], made.pages[4001][0], summary.not_owned) == (0, 0, 0)


@BOTH
def test_live_save_generation_briefly_odd_succeeds(width: Width) -> None:
    guest = Guest.boot("linear", width)
    generation, looks = guest.live.anchors.p2m_generation, itertools.count()

    def shared_info(domid: DomId) -> bytes:
        n = next(looks)
        arch(guest, p2m_generation=generation + (n % 7 < 2))
        return guest.host.shared_info(domid)

    attend(guest, times(4, writing(guest)))
    copied(guest, PatchedHost(guest, shared_info=shared_info), live=PrecopyPolicy(max_iterations=9))


def test_live_save_generation_stays_odd_is_refused() -> None:
    """Before a byte is written if it is from the first; else when it has stopped, and its p2m may be anything."""
    guest = Guest.boot("linear")
    attend(guest, [lambda: arch(guest, p2m_generation=7)])
    heap = MemorySink()
    with pytest.raises(GuestError, match="p2m_generation 0x7 "):
        save(guest.host, guest.domid, heap, live=PrecopyPolicy(), suspend=lambda: suspend(guest.host, guest.domid))
    assert heap.calls
    is_off(guest)
    assert cancel_suspend(guest) is True
    again = MemorySink()
    with pytest.raises(GuestError, match="p2m_generation 0x7 "):
        save(guest.host, guest.domid, again, live=PrecopyPolicy(), suspend=lambda: suspend(guest.host, guest.domid))
    assert again.calls == []
    is_off(guest)


def test_live_save_p2m_changing_all_the_time_arrives_in_stop_and_copy() -> None:
    """No pass of it is of use, and there are max_iterations of them."""
    guest = Guest.boot("linear")
    free, n = guest.do("free_pfns"), itertools.count(1)

    def grow() -> None:
        i = next(n)
        guest.do("write_pattern", free[i * 5 : i * 5 + 60], i)
        guest.do("balloon_out", free[-i:][:1])
        guest.do("balloon_in", pfns(1, 20_000 * i))

    attend(guest, times(5, grow))
    _, summary = copied(guest, live=PrecopyPolicy(max_iterations=3))
    assert summary.iterations <= 4


def test_live_save_p2m_shrunk_meanwhile_is_refused() -> None:
    guest = Guest.boot("tree3")
    attend(guest, [lambda: arch(guest, max_pfn=4096 - 512)])
    with pytest.raises(GuestError, match="0xfff") as e:
        save(
            guest.host,
            guest.domid,
            MemorySink(),
            live=PrecopyPolicy(),
            suspend=lambda: suspend(guest.host, guest.domid),
        )
    assert e.value.pfn == 0xDFF
    is_off(guest)


def test_live_save_populated_leaf_in_two_places_is_refused() -> None:
    guest = Guest.boot("tree3")
    end = a_page(guest)
    leaf = int(guest.live.p2m.leaves.frame[0])
    attend(guest, [lambda: tree_of(guest, {8: leaf, 9: end}, 10 * 512)])
    with pytest.raises(GuestError) as e:
        save(
            guest.host,
            guest.domid,
            MemorySink(),
            live=PrecopyPolicy(),
            suspend=lambda: suspend(guest.host, guest.domid),
        )
    assert e.value.pfn == 0
    is_off(guest)


# --- off, whatever happens -------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt, HostError])
@pytest.mark.parametrize("nth", [1, 4, 9, 14])
def test_live_save_failing_sink_leaves_log_dirty_off(error: type[BaseException], nth: int) -> None:
    guest, calls = Guest.boot("linear"), itertools.count(1)
    attend(guest, times(9, writing(guest)))

    class FailingSink:
        is_regular_file = False

        def write(self, _buffers: Any) -> None:
            if next(calls) == nth:
                raise error("full", op="write") if error is HostError else error

    with pytest.raises(error):
        save(
            guest.host,
            guest.domid,
            FailingSink(),
            live=PrecopyPolicy(),
            suspend=lambda: suspend(guest.host, guest.domid),
        )
    is_off(guest)


@pytest.mark.parametrize("call", ["dirty_pfns", "map_frames", "page_types", "shared_info", "vcpu_context", "log_dirty"])
def test_live_save_failing_host_leaves_log_dirty_off(call: str) -> None:
    """And when Xen cannot do it, or somebody interrupts."""
    for error in (HostError("no", op=call, errno=95), KeyboardInterrupt()):
        for nth in (1, 3, 12):
            guest, calls = Guest.boot("tree3"), itertools.count(1)
            attend(guest, times(9, writing(guest)))

            def failing(*arguments: Any, _g: Guest = guest, _c: Any = calls, _n: int = nth, **how: Any) -> Any:
                if next(_c) == _n:
                    raise error  # noqa: B023
                return getattr(_g.host, call)(*arguments, **how)

            host = PatchedHost(guest, **{call: failing})
            with suppress(HostError, KeyboardInterrupt):
                save(
                    host,
                    guest.domid,
                    MemorySink(),
                    live=PrecopyPolicy(),
                    suspend=partial(suspend, guest.host, guest.domid),
                )
                assert next(calls) <= nth, "there was no nth call"
            is_off(guest)


@pytest.mark.parametrize(("number", "is_noted"), [(errno.EIO, True), (errno.ESRCH, False)], ids=["fails", "no domain"])
def test_live_save_failing_twice_notes_that_log_dirty_stays_on(number: int, is_noted: bool) -> None:
    guest = Guest.boot("linear")

    def log_dirty(domid: DomId, *, on: bool) -> None:
        if not on:
            raise HostError("cannot be turned off", op="shadow_op", domid=domid, errno=number)
        guest.host.log_dirty(domid, on=on)

    def fail() -> None:
        raise Broken

    with pytest.raises(Broken) as caught:
        save(PatchedHost(guest, log_dirty=log_dirty), guest.domid, MemorySink(), live=PrecopyPolicy(), suspend=fail)
    assert ["cannot be turned off" in note for note in iter_notes(caught.value)] == [True] * is_noted


def test_live_save_log_dirty_that_stays_on_keeps_the_first_error() -> None:
    guest = Guest.boot("linear")
    guest.host.log_dirty(guest.domid, on=True)

    def log_dirty(domid: DomId, *, on: bool) -> None:
        if not on:
            raise HostError("cannot be turned off", op="shadow_op", domid=domid, errno=errno.EIO)
        guest.host.log_dirty(domid, on=on)

    with pytest.raises(HostError) as caught:
        save(
            PatchedHost(guest, log_dirty=log_dirty),
            guest.domid,
            MemorySink(),
            live=PrecopyPolicy(),
            suspend=lambda: None,
        )
    assert caught.value.errno == errno.EINVAL
    assert any("cannot be turned off" in note for note in iter_notes(caught.value))


def test_live_save_log_dirty_left_on_by_a_killed_save_succeeds() -> None:
    guest = Guest.boot("linear")
    guest.host.log_dirty(guest.domid, on=True)
    attend(guest)
    copied(guest)


def test_live_save_host_without_log_dirty_is_refused_before_the_first_byte() -> None:
    guest, heap = Guest.boot("linear"), MemorySink()

    def log_dirty(domid: DomId, *, on: bool) -> None:
        raise HostError("Operation not supported", op="shadow_op", errno=95)

    with pytest.raises(HostError) as e:
        save(PatchedHost(guest, log_dirty=log_dirty), guest.domid, heap, live=PrecopyPolicy(), suspend=lambda: None)
    assert (e.value.op, e.value.errno) == ("shadow_op", 95)
    assert heap.calls == []


@pytest.mark.parametrize("live", [PrecopyPolicy(), None], ids=["live", "nonlive"])
def test_save_suspend_callback_without_effect_is_refused(live: PrecopyPolicy | None) -> None:
    guest = Guest.boot("linear")
    for spoil, why in (
        (lambda: None, "runs"),
        (lambda: guest.host.hypervisor.shutdown(guest.domid, 3), "shut down for reason 3"),
    ):
        with pytest.raises(GuestError, match=rf"dom1 .litmus. .*{why}"):
            save(guest.host, guest.domid, MemorySink(), live=live, suspend=spoil)
        is_off(guest)


def test_live_save_without_suspend_callback_is_refused() -> None:
    guest = Guest.boot("linear")
    with pytest.raises(RequestError):
        save(guest.host, guest.domid, MemorySink(), live=PrecopyPolicy())


@pytest.mark.parametrize("width", [8, 4])
def test_save_with_suspend_callback_sends_all_pages_once(width: Width) -> None:
    guest = Guest.boot("both", width)
    attend(guest)
    _, summary = copied(guest, live=None)
    assert (summary.iterations, summary.pages) == (1, 4096)


# --- policy, progress, bandwidth -------------------------------------------------------------------------------------


def test_precopy_policy_default_is_libxenguests() -> None:
    """xg_sr_save.c simple_precopy_policy(): fewer than 50 dirty pages, or 5 passes."""
    policy = PrecopyPolicy()
    assert policy.continues(1, 4096, 50, 1e9)
    assert not policy.continues(1, 4096, 49, 1e9)
    assert policy.continues(4, 10_000, 50, 1e9)
    assert not policy.continues(5, 10_000, 50, 1e9)
    assert not policy.continues(2, 8000, 4000, 1e9), "it writes as much as a pass sends"
    quick = PrecopyPolicy(max_downtime=0.1, target_dirty=0, max_iterations=99)
    assert quick.continues(1, 1 << 20, 1000, 1000 * 4096 / 0.11)
    assert not quick.continues(1, 1 << 20, 1000, 1000 * 4096 / 0.09)
    assert quick.continues(1, 1 << 20, 1000, 0.0), "nobody knows how fast it goes"


@pytest.mark.parametrize(
    "how", [{"max_iterations": 0}, {"target_dirty": -1}, {"max_downtime": 0.0}, {"bandwidth": 4095}]
)
def test_precopy_policy_value_out_of_range_is_refused(how: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        PrecopyPolicy(**how)


def transfers(seen: list[Progress]) -> list[Transfer]:
    return [one.transfer for one in seen if one.transfer is not None]


def test_live_save_progress_reports_every_phase_and_iteration() -> None:
    guest, seen = Guest.boot("linear"), list[Progress]()
    attend(guest, times(2, writing(guest, 300)))
    _, summary = copied(guest, progress=seen.append)
    assert [phase for phase, _ in itertools.groupby(one.phase for one in transfers(seen))] == [
        Phase.COPYING, Phase.SUSPENDING, Phase.FINISHING, Phase.DONE,
    ]  # fmt: skip
    last = transfers(seen)[-1]
    assert (last.pages, last.bytes) == (summary.pages, summary.bytes)
    iterations = {one.iteration: one for one in transfers(seen)}
    assert sorted(iterations) == list(range(summary.iterations))
    assert 300 <= iterations[1].dirty < 400
    assert all(one.total is not None and one.done <= one.total for one in seen)
    begun = transfers([one for one in seen if one.done])
    assert all(one.rate > 0 and one.downtime is not None for one in begun)


def test_live_save_bandwidth_limits_precopy_only() -> None:
    guest, seen = Guest.boot("linear", pages=2048), list[Progress]()
    attend(guest, times(9, writing(guest, 500)))
    before = time.monotonic()
    copied(guest, live=PrecopyPolicy(bandwidth=32 << 20, max_iterations=1), progress=seen.append)
    took = time.monotonic() - before
    assert took > 2048 * 4096 / (32 << 20)
    copying = [one for one in transfers([one for one in seen if one.done]) if one.phase is Phase.COPYING]
    assert max(one.rate for one in copying) < (32 << 20) * 1.05
    stopped = [one for one in transfers(seen) if one.phase is Phase.SUSPENDING][-1]
    assert stopped.downtime is not None


def test_live_save_default_envelope_is_xls() -> None:
    guest, heap = Guest.boot("linear"), MemorySink()
    attend(guest, times(3, writing(guest)))
    save(
        guest.host,
        guest.domid,
        heap,
        live=PrecopyPolicy(),
        suspend=lambda: suspend(guest.host, guest.domid),
        envelope=Kind.XL,
    )
    assert bytes(heap.data).startswith(b"Xen saved domain, xl format")
