"""Guests that run on the model: memory by virtual address, log-dirty, suspend, events and xenstore."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from tests.support.model_guest import BASE, READ_ONLY, array, make_guest, page
from tests.support.model_invariants import check_invariants
from xenpv.abi.declare import Width
from xenpv.abi.x86 import VCPU_GUEST_CONTEXT
from xenpv.abi.xen import SHARED_INFO
from xenpv.errors import Fault, HostError
from xenpv.frames import DomId
from xenpv.host.model.guest_view import GuestView
from xenpv.host.model.host import SHUTDOWN_SUSPEND, ModelHost
from xenpv.host.model.xenstore import ModelXenStore

BOTH = pytest.mark.parametrize("width", [8, 4])


@BOTH
def test_write_across_pages_is_read_back(width: Width) -> None:
    host = ModelHost(1 << 30)
    guest = make_guest(host, width, 1200)

    def program(view: GuestView) -> bytes:
        view.write(guest.vaddr(511) + 4000, b"x" * 5000)
        return view.read(guest.vaddr(511) + 3999, 5002)

    assert host.run(guest.domid, program) == b"\0" + b"x" * 5000 + b"\0"
    pages, _ = host.map_frames(guest.domid, guest.mfns[511:514])
    assert pages.reshape(-1)[4000:9000].tobytes() == b"x" * 5000


def test_write_of_any_offset_and_length_writes_only_that() -> None:
    host = ModelHost(1 << 30)
    guest = make_guest(host, 8, 64)
    expected = bytearray(8 * 4096)

    def program(view: GuestView) -> None:
        for start in (0, 1, 4095, 4096, 5000):
            for length in (0, 1, 95, 4095, 4096, 4097, 8192, 12000):
                data = bytes([(start + length) % 255 + 1]) * length
                view.write(guest.vaddr(8) + start, data)
                expected[start : start + length] = data
                assert view.read(guest.vaddr(8), len(expected)) == expected

    host.run(guest.domid, program)


@BOTH
@pytest.mark.parametrize("write", [False, True])
def test_translate_of_an_unmapped_address_faults_with_its_level(width: Width, write: bool) -> None:
    host = ModelHost(1 << 30)
    guest = make_guest(host, width, 64)
    xen = 0xFFFF_8000_0000_0000 if width == 8 else 0xF580_0000

    def program(view: GuestView) -> None:
        for vaddr, level in (
            (guest.vaddr(64), 1),
            (BASE[width] + (4 << 20), 2),
            (0x1000, width // 2 if width == 8 else 3),
            (xen, 4 if width == 8 else 3),
            (1 << 60, 4 if width == 8 else 3),
        ):
            with pytest.raises(Fault) as e:
                view.translate(vaddr, write=write)
            assert (e.value.space, e.value.address, e.value.level) == ("vaddr", vaddr, level)

    host.run(guest.domid, program)


@BOTH
def test_write_to_a_page_table_faults(width: Width) -> None:
    host = ModelHost(1 << 30)
    guest = make_guest(host, width, 64)

    def program(view: GuestView) -> None:
        assert any(view.read(guest.vaddr(63), 4096))
        with pytest.raises(Fault) as e:
            view.write(guest.vaddr(62) + 4095, b"xy")
        assert e.value.level == 1
        with pytest.raises(HostError) as no:
            view.mmu_update([(*guest.entry_of(63), int(guest.mfns[63]) << 12 | READ_ONLY | 2)])
        assert no.value.errno == errno.EBUSY

    host.run(guest.domid, program)


def test_guest_adds_an_l1_table_and_moves_a_page() -> None:
    """It allocates a new L1 table, maps a page by it, and moves the page to a pfn beyond 2^31."""
    host = ModelHost(1 << 30)
    guest = make_guest(host, 8, 64)
    host.set_max_mem(guest.domid, 70)
    far = 1 << 32

    def program(view: GuestView) -> bytes:
        table, moved = view.populate_physmap(array(64, 65)).tolist()
        view.mmu_update([(table, 5, moved << 12 | READ_ONLY | 2), (guest.l2, 9, table << 12 | READ_ONLY)])
        with pytest.raises(Fault) as e:
            view.write(BASE[8] + (9 << 21) + 0x5000, b"no")
        assert (e.value.level, e.value.entry) == (2, 9), "it maps read-only"
        view.mmu_update([(guest.l2, 9, table << 12 | READ_ONLY | 2)])
        view.write(BASE[8] + (9 << 21) + 0x5000, b"hello")
        view.machphys_update(array(moved), array(far))
        assert view.m2p(array(moved)).tolist() == [far]
        assert view.decrease_reservation(guest.mfns[7:8]) == 1
        return view.read(BASE[8] + (9 << 21) + 0x5000, 5)

    assert host.run(guest.domid, program) == b"hello"
    assert host.info(guest.domid).pages == 66
    check_invariants(host)


@BOTH
def test_write_pages_in_any_order_writes_all_or_none(width: Width) -> None:
    """Across L1 tables, with a repeated page; then with a read-only one, which prevents all writes."""
    host = ModelHost(1 << 30)
    guest = make_guest(host, width, 1200)
    wanted = [1100, 5, 600, 1100, 7]

    def program(view: GuestView) -> None:
        vaddrs = array(*map(guest.vaddr, wanted))
        assert view.translate_pages(vaddrs).tolist() == guest.mfns[wanted].tolist()
        content = np.arange(len(wanted), dtype=np.uint8)[:, None].repeat(4096, axis=1)
        view.write_pages(vaddrs, content)
        assert view.read_pages(vaddrs)[:, 77].tolist() == [3, 1, 2, 3, 4]
        with pytest.raises(Fault) as e:
            view.write_pages(array(guest.vaddr(5), guest.vaddr(1), guest.vaddr(1199)), content[:3])
        assert e.value.address == guest.vaddr(1)
        assert view.read_pages(vaddrs)[:, 77].tolist() == [3, 1, 2, 3, 4]
        assert view.read_pages(array()).shape == (0, 4096)

    host.run(guest.domid, program)


@pytest.mark.parametrize("seed", range(40))
def test_update_va_mapping_equals_single_mmu_updates(seed: int) -> None:
    """Also if Xen refuses one, or if a frame is freed before it is mapped again."""
    random = np.random.default_rng(seed)
    width: Width = 8 if seed % 2 else 4
    hosts, mades = [ModelHost(1 << 28), ModelHost(1 << 28)], []
    for host in hosts:
        mades.append(guest := make_guest(host, width, 700))
        if seed % 4 > 1:
            host.hypervisor.decrease_reservation(guest.domid, guest.mfns[20:24])  # gone as soon as nothing maps them
    guest = mades[0]
    others = guest.mfns[random.choice([*range(15, 30), *range(100, 110), 99 if seed % 4 else 699], 30)] << np.uint64(12)
    slots = random.choice(np.append(np.arange(15, 30), 512 + np.arange(15)), 30, replace=seed % 8 == 7)
    ptes = np.where(
        random.random(30) < 0.3, np.uint64(0), others | random.choice([READ_ONLY, READ_ONLY | 2], 30).astype(np.uint64)
    )
    errors: list[int | None] = []
    vaddrs = array(*(guest.vaddr(slot) for slot in slots.tolist()))
    order = np.argsort(vaddrs, kind="stable")  # table by table, as one multicall might have them
    updates = [(*guest.entry_of(int(slots[n])), int(ptes[n])) for n in order]
    try:
        hosts[0].run(guest.domid, lambda view: view.update_va_mapping(vaddrs, ptes))
        errors.append(None)
    except HostError as e:
        errors.append(e.errno)
    try:
        hosts[1].hypervisor.mmu_update(guest.domid, updates)
        errors.append(None)
    except HostError as e:
        errors.append(e.errno)
    assert errors[0] == errors[1]
    for mfn in guest.l1:
        np.testing.assert_array_equal(hosts[0].frames.entries(int(mfn)), hosts[1].frames.entries(int(mfn)))
    for name in ("owner", "type", "flags", "type_count", "ref_count"):
        np.testing.assert_array_equal(getattr(hosts[0].frames.rows, name), getattr(hosts[1].frames.rows, name))
    check_invariants(hosts[0])


@BOTH
def test_update_va_mapping_without_an_l1_table_raises_einval(width: Width) -> None:
    host = ModelHost(1 << 30)
    guest = make_guest(host, width, 64)

    def program(view: GuestView) -> None:
        with pytest.raises(HostError) as e:
            view.update_va_mapping(array(BASE[width] + (4 << 20)), array(0))
        assert (e.value.op, e.value.errno, e.value.domid) == ("update_va_mapping", errno.EINVAL, guest.domid)

    host.run(guest.domid, program)


@BOTH
def test_register_returns_the_context_and_the_shutdown_argument(width: Width) -> None:
    """After a suspend, the third argument is in rdx or edx, and the result in rax or eax."""
    host = ModelHost(1 << 30)
    guest = make_guest(host, width, 64)
    data = np.frombuffer(bytearray(host.vcpu_context(guest.domid, 0)), VCPU_GUEST_CONTEXT[width])
    data["user_regs"]["rsi" if width == 8 else "esi"] = 0x1234
    data["user_regs"]["rax" if width == 8 else "eax"] = 9
    host.set_vcpu_context(guest.domid, 0, data.tobytes())

    def program(view: GuestView) -> None:
        assert (view.register("si"), view.register("ax"), view.register("dx")) == (0x1234, 9, 0)
        assert [view.alloc_event_channel(), view.alloc_event_channel()] == [1, 2]
        view.shutdown(SHUTDOWN_SUSPEND, 0xABC)

    host.run(guest.domid, program)
    view = host.guest_view(guest.domid)
    assert (view.register("si"), view.register("ax"), view.register("dx")) == (0x1234, 0, 0xABC)


def test_info_of_dom0_has_no_uuid_as_on_real_xen() -> None:
    assert ModelHost(1 << 30).info(DomId(0)).uuid is None


def test_dirty_pfns_are_those_that_the_guest_wrote() -> None:
    host = ModelHost(1 << 30)
    guest = make_guest(host, 8, 64)
    with pytest.raises(HostError) as e:
        host.dirty_pfns(guest.domid, 64, clean=True)
    assert e.value.errno == errno.EINVAL
    host.run(guest.domid, lambda view: view.write(guest.vaddr(3), b"before"))
    host.log_dirty(guest.domid, on=True)
    with pytest.raises(HostError) as e:
        host.log_dirty(guest.domid, on=True)
    assert e.value.errno == errno.EINVAL
    host.run(guest.domid, lambda view: view.write(guest.vaddr(8) + 4090, b"two pages"))
    host.write_frames(guest.domid, guest.mfns[20:21], page({}))
    assert host.dirty_pfns(guest.domid, 64, clean=False).tolist() == [8, 9], "without what a toolstack wrote"
    assert host.dirty_pfns(guest.domid, 9, clean=False).tolist() == [8]
    assert host.dirty_pfns(guest.domid, 64, clean=True).tolist() == [8, 9]
    host.run(guest.domid, lambda view: view.mmu_update([(*guest.entry_of(30), 0)]))
    assert host.dirty_pfns(guest.domid, 64, clean=True).tolist() == host.m2p(array(guest.entry_of(30)[0])).tolist()
    host.hypervisor.pin(guest.domid, int(guest.mfns[30]), 1)
    host.hypervisor.machphys_update(guest.domid, guest.mfns[31:32], array(1 << 34))
    assert host.dirty_pfns(guest.domid, 1 << 35, clean=True).tolist() == [30, 1 << 34]
    host.log_dirty(guest.domid, on=False)
    host.log_dirty(guest.domid, on=True)
    assert not len(host.dirty_pfns(guest.domid, 64, clean=True))


def test_suspend_by_xenstore_and_resume() -> None:
    host = ModelHost(1 << 30)
    guest = make_guest(host, 8, 64)
    node = f"/local/domain/{guest.domid}/control/shutdown"
    seen: list[str] = []
    host.store.watch(node, "token", lambda path, _: seen.append(path))

    def program(view: GuestView) -> str:
        if view.xenstore_read("control/shutdown") == b"suspend":
            view.xenstore_write("control/shutdown", b"")
            view.shutdown(SHUTDOWN_SUSPEND)
        return "running"

    assert host.run(guest.domid, program) == "running"
    host.store.write(node, b"suspend")
    assert host.run(guest.domid, program) is None
    assert seen == [node] * 3
    info = host.info(guest.domid)
    assert (info.shutdown, info.shutdown_reason) == (True, SHUTDOWN_SUSPEND)
    with pytest.raises(HostError):
        host.run(guest.domid, program)
    host.resume(guest.domid)
    assert host.run(guest.domid, program) == "running"
    host.pause(guest.domid)
    with pytest.raises(HostError):
        host.run(guest.domid, program)


def test_consume_event_clears_a_pending_event() -> None:
    host = ModelHost(1 << 30)
    guest = make_guest(host, 8, 64)
    host.hypervisor.send_event(guest.domid, 3)
    host.hypervisor.send_event(guest.domid, 3)
    assert host.run(guest.domid, lambda view: [view.consume_event(n) for n in (2, 3, 3)]) == [False, True, False]


@BOTH
def test_guest_writes_shared_info_by_hypervisor_and_by_mapping(width: Width) -> None:
    host = ModelHost(1 << 30)
    guest = make_guest(host, width, 64)
    at = SHARED_INFO.offset(width, "arch.p2m_generation")
    host.run(guest.domid, lambda view: view.write_shared_info(b"\x05", at))
    assert int(SHARED_INFO.read(host.shared_info(guest.domid), width)["arch"]["p2m_generation"]) == 5
    mfn = host.info(guest.domid).shared_info_mfn
    host.hypervisor.mmu_update(guest.domid, [(*guest.entry_of(9), mfn << 12 | READ_ONLY | 2)])
    host.run(guest.domid, lambda view: view.write(guest.vaddr(9) + at, b"\x07"))
    assert int(SHARED_INFO.read(host.shared_info(guest.domid), width)["arch"]["p2m_generation"]) == 7
    check_invariants(host)


def test_xenstore_remove_keeps_parents_and_fires_watches() -> None:
    store = ModelXenStore()
    store.write("/a/b/c", b"1")
    store.write("/a/d", b"2")
    assert (store.list("/"), store.list("/a"), store.read("/a/b"), store.read("/x")) == (["a"], ["b", "d"], b"", None)
    seen: list[str] = []
    store.watch("/a/b/c", "t", lambda path, _: seen.append(path))
    assert store.remove("/a/b")
    assert not store.remove("/a/b")
    assert store.list("/a") == ["d"]
    store.unwatch("/a/b/c", "t")
    store.write("/a/b/c", b"3")
    assert seen == ["/a/b/c", "/a/b/c"]
