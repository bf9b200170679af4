"""LiveDomain: memory through the p2m, normalised page tables, and every error."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.model_guest import BASE, READ_ONLY, TABLE, make_guest, page
from tests.support.p2m_guest import PAGES, P2MGuest
from xenpv.abi.declare import Width
from xenpv.abi.x86 import LEVELS, PTE_FRAME_MASK, PTE_P, XEN_PAE_L2_FIRST
from xenpv.abi.xen import INVALID_MFN
from xenpv.cli.target import open_target
from xenpv.errors import Fault, GuestError, HostError, RequestError
from xenpv.frames import ABSENT, FOREIGN, IS_TABLE, NO_FRAME, PAGE_SIZE, U8, U64, DomId, PageType, Pfn
from xenpv.host.model.host import ModelHost
from xenpv.memory.page_tables import NO_PFN, as_ptes, is_xen_slot
from xenpv.source.live import LiveDomain

WRITTEN = range(10, 20)


@pytest.fixture(params=[(8, "tree"), (8, "linear"), (4, "tree"), (4, "linear")], ids=lambda p: f"{p[1]}-{8 * p[0]}")
def guest(request: pytest.FixtureRequest) -> P2MGuest:
    guest = P2MGuest(*request.param)
    content = np.random.default_rng(1).integers(0, 256, (len(WRITTEN), PAGE_SIZE), np.uint8)
    guest.host.write_frames(guest.model.domid, guest.model.mfns[WRITTEN.start : WRITTEN.stop], content)
    return guest


def raw(guest: P2MGuest, pfn: int) -> U64:
    """The 64-bit words of a page as the machine has them."""
    pages, _ = guest.host.map_frames(guest.model.domid, guest.model.mfns[pfn : pfn + 1])
    return as_ptes(pages.copy()).reshape(-1)


def tables(guest: P2MGuest) -> dict[int, int]:
    """Level by pfn, of all page tables of the guest."""
    kinds = guest.live.frames.types(np.arange(PAGES, dtype=np.uint64))
    return {int(pfn): int(kinds[pfn]) & 7 for pfn in np.flatnonzero(IS_TABLE[kinds])}


# --- its memory ------------------------------------------------------------------------------------------------------


def test_memory_of_a_running_domain_reads_by_pfn_and_virtual_address(guest: P2MGuest) -> None:
    memory, first = guest.live.memory, WRITTEN.start
    content = guest.host.frames.read(guest.model.mfns[first : WRITTEN.stop]).tobytes()
    vaddr = guest.model.vaddr(first) + 100
    expected = guest.host.run(guest.model.domid, lambda view: view.read(vaddr, 5 * PAGE_SIZE))
    assert expected == content[100 : 100 + 5 * PAGE_SIZE]
    assert memory.read_virtual(vaddr, 5 * PAGE_SIZE) == expected
    assert memory.read(first * PAGE_SIZE + 100, 5 * PAGE_SIZE) == expected
    assert memory.page(first + 3) == content[3 * PAGE_SIZE :][:PAGE_SIZE]


def test_types_of_a_running_domain_are_the_hosts(guest: P2MGuest) -> None:
    pfns = np.arange(PAGES, dtype=np.uint64)
    expected = guest.host.page_types(guest.model.domid, guest.model.mfns)
    assert guest.live.frames.types(pfns).tolist() == expected.tolist()
    assert guest.live.frames.types(pfns.reshape(32, 32)).tolist() == expected.reshape(32, 32).tolist()
    assert sorted(set(tables(guest).values())) == list(range(1, LEVELS[guest.width] + 1))
    assert guest.live.frames.types(np.array([PAGES, 1 << 63, NO_FRAME], np.uint64)).tolist() == [ABSENT] * 3


def test_page_tables_of_a_running_domain_are_normalised(guest: P2MGuest) -> None:
    """Pfns in the place of mfns, flags kept, Xen's slots empty (normalise_pagetable() of libxenguest)."""
    pfn_of = {int(mfn): pfn for pfn, mfn in enumerate(guest.model.mfns)}
    levels = tables(guest)
    assert len(levels) == PAGES // 512 + LEVELS[guest.width] - 1
    for pfn, level in levels.items():
        [table] = as_ptes(guest.live.frames.pages(np.array([pfn], np.uint64))).tolist()
        xens = is_xen_slot(level, guest.width, last_pae_l2=level == 2)
        for slot, (got, had) in enumerate(zip(table, raw(guest, pfn).tolist(), strict=True)):
            if xens[slot]:
                assert got == 0
            elif had & PTE_P:
                assert got & PTE_FRAME_MASK == pfn_of[(had & PTE_FRAME_MASK) >> 12] << 12
                assert got & ~PTE_FRAME_MASK == had & ~PTE_FRAME_MASK
            else:
                assert got == had


def test_walk_of_a_running_domain_gives_pfns(guest: P2MGuest) -> None:
    memory, pfn_of = guest.live.memory, {int(mfn): pfn for pfn, mfn in enumerate(guest.model.mfns)}
    walk = memory.walk(guest.model.vaddr(12))
    assert walk.pfn == 12
    assert [step.level for step in walk.steps] == list(range(LEVELS[guest.width], 0, -1))
    assert walk.steps[0].table == memory.top == pfn_of[guest.model.top]
    assert walk.steps[-1].table == pfn_of[int(guest.model.l1[0])]
    fault = memory.walk(guest.model.vaddr(PAGES)).fault
    assert fault is not None
    assert (fault.level, fault.address) == (1 if PAGES % 512 else 2, guest.model.vaddr(PAGES))


def test_walk_through_a_freed_page_table_raises_fault(guest: P2MGuest) -> None:
    """A process of a running guest ends, and with it its tables: what is in their frames then is no tables'."""
    memory = guest.live.memory
    fault = memory.walk(guest.model.vaddr(12), top=Pfn(WRITTEN.start)).fault
    assert fault is not None
    assert f"pfn {WRITTEN.start:#x}" in str(fault)
    assert guest.live.frames.pages(np.array([WRITTEN.start], np.uint64)).any()  # it can be read: it is no table
    with pytest.raises(Fault) as e:
        memory.read_virtual(guest.model.vaddr(12), 16, top=Pfn(WRITTEN.start))
    assert (e.value.space, e.value.address, e.value.level) == (fault.space, fault.address, fault.level)


def test_page_table_freed_while_read_is_not_normalised(guest: P2MGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its type is asked for, then it is freed and written to, then its content is read."""
    page_types = guest.host.page_types
    queries: list[int] = []

    def before(domid: DomId, mfns: U64) -> U8:
        kinds = page_types(domid, mfns).copy()
        if not queries:
            kinds[:] = PageType.L1TAB
        queries.append(len(mfns))
        return kinds

    monkeypatch.setattr(guest.host, "page_types", before)
    first = WRITTEN.start
    content = guest.host.frames.read(guest.model.mfns[first : first + 4]).tobytes()
    assert guest.live.frames.pages(np.arange(first, first + 4, dtype=np.uint64)).tobytes() == content
    assert queries == [4, 4]


def test_entry_with_a_foreign_frame_gives_no_pfn() -> None:
    """A grant, say: normalise gives NO_PFN, and an address through it ends there."""
    guest = P2MGuest()
    table, slot = guest.model.entry_of(30)
    other = make_guest(guest.host, 8, 64)
    guest.host.frames.entries(table)[slot] = int(other.mfns[5]) << 12 | TABLE
    live = guest.live
    [l1] = as_ptes(live.frames.pages(live.pfns_of(np.array([table], np.uint64))))
    assert int(l1[slot]) == NO_PFN << 12 | TABLE
    with pytest.raises(Fault) as e:
        live.memory.read_virtual(guest.model.vaddr(30), 1)
    assert (e.value.level, e.value.entry) == (1, 30)


def test_last_l2_of_a_32_bit_guest_has_no_xen_entries() -> None:
    guest = P2MGuest(4)
    pfn = int(guest.live.pfns_of(np.array([guest.model.l2], np.uint64))[0])
    assert int(raw(guest, pfn)[XEN_PAE_L2_FIRST]) & PTE_P, "there Xen has its own entries"
    [l2] = as_ptes(guest.live.frames.pages(np.array([pfn], np.uint64)))
    assert not l2[XEN_PAE_L2_FIRST:].any()
    assert l2[:2].all()


# --- its vcpus -------------------------------------------------------------------------------------------------------


def test_cr3_of_a_vcpu_is_a_pfn(guest: P2MGuest) -> None:
    live = guest.live
    assert live.cr3(0) == int(np.flatnonzero(guest.model.mfns == guest.model.top)[0])
    assert live.cr3(0, user=True) is None
    assert (live.cr3(1), live.vcpus) == (None, [0])


def test_cr3_of_the_user_half_is_a_pfn() -> None:
    guest = P2MGuest()
    host, domid = guest.host, guest.model.domid
    table, slot = guest.model.entry_of(40)
    host.hypervisor.mmu_update(domid, [(table, slot, int(guest.model.mfns[40]) << 12 | READ_ONLY)])
    host.write_frames(domid, guest.model.mfns[40:41], page({}))
    host.hypervisor.pin(domid, int(guest.model.mfns[40]), 4)
    host.hypervisor.load_cr3(domid, int(guest.model.mfns[40]), user=True)
    assert guest.live.cr3(0, user=True) == guest.live.memory.user_top == 40


def test_cr3_outside_the_p2m_raises_guest_error() -> None:
    guest = P2MGuest()
    top = int(np.flatnonzero(guest.model.mfns == guest.model.top)[0])
    guest.put(top, INVALID_MFN[8])
    with pytest.raises(GuestError) as e:
        guest.live.cr3(0)
    assert e.value.mfn == guest.model.top


def test_memory_of_a_vcpu_with_cr3_outside_the_p2m_reads_by_pfn() -> None:
    guest = P2MGuest()
    top = int(np.flatnonzero(guest.model.mfns == guest.model.top)[0])
    guest.put(top, INVALID_MFN[8])
    memory = guest.live.memory_of(0)
    assert len(memory.page(0)) == 4096
    with pytest.raises(Fault) as e:
        memory.read_virtual(BASE[8], 1)
    assert (e.value.space, e.value.address) == ("vaddr", BASE[8])


# --- what is not there -----------------------------------------------------------------------------------------------


def test_pages_without_a_local_frame_raise_fault() -> None:
    guest = P2MGuest()
    other = make_guest(guest.host, 8, 64)
    mfn = int(other.mfns[5])
    marked = int(FOREIGN) | mfn
    guest.put(13, INVALID_MFN[8])
    guest.put(14, mfn)
    guest.put(15, marked)
    guest.put(16, 1 << 52)
    for pfn, entry in ((13, None), (14, mfn), (15, marked), (16, 1 << 52), (PAGES, None), (1 << 63, None)):
        with pytest.raises(Fault) as e:
            guest.live.frames.pages(np.array([12, pfn, 13], np.uint64))
        assert (e.value.space, e.value.address, e.value.mfn) == ("pfn", pfn, entry)
    for unreadable in (13, 14):
        with pytest.raises(Fault) as e:
            guest.live.memory.page(unreadable)
        assert (e.value.space, e.value.address) == ("pfn", unreadable)


def test_pages_that_cannot_be_mapped_raise_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was the domain's when we asked, and has gone since."""
    guest = P2MGuest()
    live = guest.live
    assert live.p2m.entries
    original, unmappable = guest.host.map_frames, guest.model.mfns[12]

    def map_frames(domid: int, mfns: U64) -> tuple[object, object]:
        pages, mapped = original(guest.model.domid, mfns)
        mapped[mfns == unmappable] = 0
        return pages, mapped

    monkeypatch.setattr(guest.host, "map_frames", map_frames)
    with pytest.raises(Fault) as e:
        live.frames.pages(np.array([11, 12], np.uint64))
    assert (e.value.space, e.value.address, e.value.mfn) == ("pfn", 12, unmappable)


def test_domain_destroyed_meanwhile_raises_host_error() -> None:
    guest = P2MGuest()
    live, late = guest.live, guest.live
    assert live.p2m.entries == PAGES
    guest.host.destroy(guest.model.domid)
    pfns = np.array([3], np.uint64)
    for read in (
        lambda: late.p2m,
        live.read_anchors,
        live.p2m_change,
        lambda: live.cr3(0),
        lambda: live.frames.types(pfns),
        lambda: live.frames.pages(pfns),
        lambda: live.memory,
    ):
        with pytest.raises(HostError) as e:
            read()
        assert e.value.errno == errno.ESRCH


def test_paused_pauses_and_always_unpauses() -> None:
    guest = P2MGuest()

    def paused() -> bool:
        return guest.host.info(guest.model.domid).paused

    def fails() -> None:
        with guest.live.paused():
            assert paused()
            raise ZeroDivisionError

    with guest.live.paused():
        assert paused()
        with guest.live.paused():
            assert paused()
        assert paused()
    assert not paused()
    with pytest.raises(ZeroDivisionError):
        fails()
    assert not paused()


def test_paused_that_cannot_unpause_keeps_the_error_of_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = P2MGuest()

    def refuse(domid: DomId) -> None:
        raise HostError("unpause: no", op="unpause", domid=domid)

    monkeypatch.setattr(guest.host, "unpause", refuse)
    with pytest.raises(ZeroDivisionError) as e, guest.live.paused():
        raise ZeroDivisionError
    assert any("unpause: no" in note for note in e.value.__notes__)
    with pytest.raises(HostError), guest.live.paused():
        pass


def test_p2m_damaged_from_the_start_has_not_changed() -> None:
    """The list is no list, the tree is sound: one finding for the list, and none of a p2m that is no more."""
    guest = P2MGuest()
    guest.arch(p2m_cr3=guest.model.top << 12, p2m_vaddr=BASE[8] + 1)
    assert guest.live.p2m_change() is None
    assert guest.findings() == [("physmap-reach", None)]


# --- what people say on the command line -----------------------------------------------------------------------------


@pytest.fixture
def this_host(monkeypatch: pytest.MonkeyPatch) -> ModelHost:
    """The host that the command line finds itself on."""
    host = ModelHost(1 << 30)

    @contextmanager
    def open_host() -> Iterator[ModelHost]:
        yield host

    monkeypatch.setattr("xenpv.host.xen.host.XenHost", open_host)
    return host


def test_open_target_by_id_uuid_or_name_opens_a_running_domain(this_host: ModelHost) -> None:
    made = make_guest(this_host, name="web")
    for name in ("web", str(made.domid)):
        with open_target(name, pause=True) as live:
            assert isinstance(live, LiveDomain)
            assert (live.name, this_host.info(made.domid).paused) == (f"dom{made.domid} (web)", True)
        assert not this_host.info(made.domid).paused


def test_open_target_without_such_domain_or_file_raises(this_host: ModelHost, tmp_path: Path) -> None:
    for target in ("nobody", "77"):
        with pytest.raises(HostError) as caught, open_target(target):
            pass
        assert caught.value.errno == errno.ESRCH, target
    missing = str(tmp_path / "dom.save")
    with pytest.raises(RequestError) as e, open_target(missing):
        pass
    assert missing in str(e.value)
    assert isinstance(e.value.__cause__, HostError)
    assert e.value.__cause__.errno == errno.ESRCH


def test_open_target_refuses_to_pause_a_file(this_host: ModelHost, tmp_path: Path) -> None:
    file = tmp_path / "dom.save"
    file.write_bytes(b"")
    with pytest.raises(RequestError) as e, open_target(str(file), pause=True):
        pass
    assert str(file) in str(e.value), "an empty file that was opened would raise StreamError"


def test_open_target_refuses_a_running_hvm_domain(this_host: ModelHost, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_guest(this_host)
    info = replace(this_host.info(made.domid), hvm=True)
    monkeypatch.setattr(this_host, "info", lambda _domid: info)
    with pytest.raises(RequestError) as e, open_target(str(made.domid)):
        pass
    assert f"dom{made.domid} " in str(e.value)


@pytest.mark.parametrize("width", [8, 4])
def test_new_domain_without_p2m_or_vcpus_raises_guest_error(width: Width) -> None:
    """Made, and not yet built: no anchors, no vcpu, no name."""
    host = ModelHost(1 << 30)
    live = LiveDomain(host, host.info(host.create(width)))
    assert (live.name, live.cr3(0), live.p2m_change()) == ("dom1", None, None)
    with pytest.raises(GuestError, match=r"dom1 .* 0x0"):  # the domain, and max_pfn
        live.frames.pages(np.array([0], np.uint64))


@pytest.mark.parametrize(("number", "passes"), [(errno.ENODATA, False), (errno.EPERM, True), (errno.EFAULT, True)])
def test_vcpu_context_passes_errors_other_than_no_such_vcpu(
    number: int, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = P2MGuest(8, "linear")

    def refuse(*_: object) -> bytes:
        raise HostError("refused", op="getvcpucontext", errno=number)

    monkeypatch.setattr(guest.host, "vcpu_context", refuse)
    if not passes:
        assert guest.live.vcpu_context(0) is None
        return
    with pytest.raises(HostError) as caught:
        guest.live.cr3(0)
    assert caught.value.errno == number
