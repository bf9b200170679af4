"""Domains on ModelHost, saved and restored on another: the guest goes on, and has what it had."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.domain.restoring import (
    assert_same,
    made,
    memory,
    mfn_of,
    moved,
    opened,
    shared_info,
    start_info,
)
from tests.domain.saved import piped
from tests.domain.saving import BOTH, CONFIG, Heap, saved, suspended
from tests.host.kernel_guest import SOME, Guest
from tests.host.model_guest import pfns
from tests.host.model_invariants import check
from tests.host.restored import restored as restored_without
from tests.writers.build import pv_domain
from tests.writers.domain import Domain
from tests.writers.envelopes import config_json, wrap
from tests.writers.stream import BROKEN, NOTAB, PAGE, XALLOC, XTAB, Piece, Stream, Wire
from xenpv.abi.declare import Width
from xenpv.abi.x86 import VCPU_GUEST_CONTEXT
from xenpv.abi.xen import SIF_INITDOMAIN, SIF_MOD_START_PFN, SIF_PRIVILEGED, SIF_VIRT_P2M_4TOOLS
from xenpv.domain.input import Input
from xenpv.domain.restore import Restored, restore, restore_domain
from xenpv.domain.save import save
from xenpv.frames import U64, DomId
from xenpv.host.model import ModelHost
from xenpv.memory.p2m import entries_in
from xenpv.stream.envelope import Kind

WIRE = Wire()


@pytest.mark.parametrize(("width", "form"), SOME)
def test_the_guest_goes_on(width: Width, form: str, tmp_path: Path) -> None:
    guest = suspended(form, width)
    saved(guest, tmp_path / "x", config=CONFIG)
    host, restored = made((tmp_path / "x").read_bytes())
    other = moved(guest, host, restored)
    check(host)
    assert_same(guest, other)
    assert host.info(restored.domid).name == "made"
    assert other.do("resume") is False
    assert set(other.agrees()) <= {"physmap-invalid"}
    assert not len(other.do("check_pattern", other.do("free"), 7))
    other.do("balloon_in", pfns(20, 200_000))
    assert set(other.agrees()) <= {"physmap-invalid"}


@BOTH
def test_it_is_what_becomes_of_a_domain_without_a_stream(width: Width) -> None:
    """tests/host/restored.py, which knows no records and does all in arithmetic of its own, comes to the same."""
    guest, heap = suspended("both", width), Heap()
    save(guest.host, guest.domid, heap, config=CONFIG)
    host, ours = made(bytes(heap.data))
    other = ModelHost(1 << 30, seed=8)
    theirs = Guest(other, restored_without(guest.host, guest.domid, other), guest.kernel, guest.day)
    assert_same(guest, theirs)
    assert_same(guest, moved(guest, host, ours))
    page = guest.day.start_info
    for field in ("magic", "nr_pages", "flags", "mfn_list"):
        mine = start_info(host, ours.domid, page)[field]
        assert mine == start_info(other, theirs.domid, page)[field]
    for leaf in guest.host.m2p(guest.live.p2m.distinct.frame).tolist():  # entry by entry, with pfns for mfns
        entries = [
            entries_in(on.frames.read(np.array([mfn_of(on, who, leaf)], np.uint64)), width)[0]
            for on, who in ((host, ours.domid), (other, theirs.domid))
        ]
        mine, his = (on.m2p(some) for on, some in zip((host, other), entries, strict=True))
        np.testing.assert_array_equal(mine, his)


def test_64_mib_over_16_tib_take_no_time() -> None:
    """All but the last pfns that a stream can hold: 64 MiB of p2m frames, which the format wants, and 64 leaves."""
    guest, heap = Guest.boot("linear", pages=1 << 14), Heap()
    guest.do("spread", (1 << 32) - 4096)
    free = guest.do("free")
    guest.do("suspend")
    save(guest.host, guest.domid, heap, config=config_json(memory_kib=4 << 14))
    data = bytes(heap.data)
    began = time.process_time()
    host, result = made(data)
    assert time.process_time() - began < 5  # 0.7 s, most of it the model's
    assert result.entries > (1 << 32) - 5000
    other = moved(guest, host, result)
    assert other.do("resume") is False
    np.testing.assert_array_equal(other.do("free"), free)


@pytest.mark.parametrize("way", ["file", "pipe", "pipe that does not wait"])
def test_a_domain_that_is_there_is_filled(way: str) -> None:
    """As for libxl: its descriptor, which is left right behind the stream; the domain stays paused and unknown."""
    guest, heap = suspended("both"), Heap()
    save(guest.host, guest.domid, heap, envelope=Kind.LIBXC)
    data = bytes(heap.data)
    host = ModelHost(1 << 30, seed=9)
    domid = host.create(max_pages=4096)
    missing: list[tuple[bool, bool]] = []

    def fill(source: Input) -> Restored:
        ports: dict[str, Any] = {"console_port": host.alloc_event(domid), "xenstore_port": host.alloc_event(domid)}

        def done(cpuid: bool, msrs: bool) -> None:
            missing.append((cpuid, msrs))

        restored = restore(host, domid, source, envelope=Kind.LIBXC, static_data_done=done, **ports)
        assert os.read(source.fd, 9) == b"more"
        return restored

    if way == "file":
        with opened(data + b"more", exact=True) as source:
            restored = fill(source)
    else:
        with piped(data + b"more") as fd:
            os.set_blocking(fd, way == "pipe")
            source = Input(os.dup(fd), "pipe", exact=True)
            restored = fill(source)
            source.close()
    assert missing == [(False, False)]
    assert (restored.console.port, restored.xenstore.port, restored.bytes) == (1, 2, len(data))
    assert host.info(domid).paused
    assert host.store.read(f"/local/domain/{domid}/console/ring-ref") is None
    assert_same(guest, moved(guest, host, restored))


# --- streams of all kinds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("envelope", ["xl", "libvirt", "xenopsd", "libxl", "libxc"])
@pytest.mark.parametrize("width", [8, 4])
def test_every_envelope(envelope: str, width: Width) -> None:
    domain = pv_domain(width=width, vcpus=2)
    host, restored = made(domain.to_stream(envelope))
    info = host.info(restored.domid)
    assert (info.pages, info.max_vcpu, info.width) == (len(domain.types) - 1, 1, width)
    assert not info.paused
    check(host)


def test_a_new_domain_is_as_its_configuration_says() -> None:
    domain = pv_domain(vcpus=2)
    host, restored = made(domain.to_stream("xl"), paused=True)
    info = host.info(restored.domid)
    assert (info.name, info.max_vcpu, info.max_pages, info.paused) == ("made", 1, 96 + 256, True)
    assert (restored.name, restored.uuid) == ("made", info.uuid)
    assert info.uuid is not None
    home = f"/local/domain/{restored.domid}"
    assert host.store.read(f"{home}/console/ring-ref") == str(restored.console.mfn).encode()
    assert host.store.read(f"{home}/store/port") == str(restored.xenstore.port).encode()
    assert host.told_memory(restored.domid) == 96
    assert host.configuration(restored.domid) == config_json(vcpus=2, memory_kib=96 * 4)
    host, restored = made(domain.to_stream("xl"), host, name="another")
    assert host.info(restored.domid).name == "another"


def test_a_version_2_stream_says_where_its_static_data_ends() -> None:
    host = ModelHost(1 << 30, seed=3)
    domid, said = host.create(max_pages=200), list[tuple[bool, bool]]()
    with opened(bytes(pv_domain().to_stream("libxc", version=2))) as source:
        restore(host, domid, source, console_port=1, xenstore_port=2, static_data_done=lambda a, b: said.append((a, b)))
    assert said == [(True, True)]


@BOTH
def test_state_of_vcpus_time_and_policy_is_set(width: Width) -> None:
    domain = pv_domain(width=width, vcpus=2)
    host, restored = made(domain.to_stream("xl"))
    for vcpu in (0, 1):
        state = host.vcpu_state(restored.domid, vcpu)
        assert (state.extended, state.xsave, state.msrs) == (
            domain.extended[vcpu],
            domain.xsave[vcpu],
            domain.msrs.get(vcpu, b""),
        )
        context = VCPU_GUEST_CONTEXT.read(host.vcpu_context(restored.domid, vcpu), width)
        was = domain.vcpus[vcpu]
        for field in ("trap_ctxt", "kernel_sp", "fpu_ctxt", "event_callback_eip", "gdt_ents", "vm_assist"):
            np.testing.assert_array_equal(context[field], was[field])
        frame = int(context["gdt_frames"][0])
        assert frame == mfn_of(host, restored.domid, int(was["gdt_frames"][0]))
    tsc = host.tsc_info(restored.domid)
    assert (tsc.mode, tsc.khz, tsc.nsec, tsc.incarnation) != (0, 1_000_000, 0, 0)
    policy = host.cpu_policy(restored.domid)
    assert (len(policy.leaves), len(policy.msrs)) == (2 * 24, 2 * 16)


def test_without_a_configuration_a_file_shows_what_is_needed() -> None:
    domain = pv_domain(vcpus=3)
    host, restored = made(domain.to_stream("libxc"))
    info = host.info(restored.domid)
    assert (info.max_vcpu, info.max_pages, info.name) == (2, len(domain.types) - 1 + 256, None)


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


# --- pages -----------------------------------------------------------------------------------------------------------


def a_stream(domain: Domain, *pages: Piece) -> Stream:
    """All of a domain, and more pages behind its own."""
    stream = domain.to_stream("xl")
    return stream.before("X86_TSC_INFO", *pages)


def test_a_page_that_comes_again_is_written_over() -> None:
    domain = pv_domain()
    first, second = domain.places.data[:2]
    again = [(first, NOTAB), (second, NOTAB), (first, NOTAB)]
    more = WIRE.page_data(again, [b"a" * PAGE, b"b" * PAGE, b"c" * PAGE])
    host, restored = made(a_stream(domain, more))
    now = memory(host, restored.domid)
    assert (now[first], now[second]) == (b"c" * PAGE, b"b" * PAGE)
    assert restored.pages == len(domain.types) - 1


def test_pages_may_come_in_any_order_and_twice_in_a_record() -> None:
    """Each gets one frame, and no frame is mapped twice at once, which real Xen does and the protocol does not."""
    domain = pv_domain()
    low, high = domain.places.data[0], domain.places.data[-1]
    stream = domain.to_stream("xl", batch=16).drop("PAGE_DATA")
    entries = [(high, NOTAB), (low, NOTAB), (high, NOTAB)]
    stream.before("X86_TSC_INFO", WIRE.page_data(entries, [b"a" * PAGE, b"b" * PAGE, b"c" * PAGE]))
    stream.before("X86_TSC_INFO", *domain.page_data(WIRE, 16, sorted(set(domain.types) - {low, high})))
    host, restored = made(stream, Watched())
    now = memory(host, restored.domid)
    assert (now[low], now[high]) == (b"b" * PAGE, b"c" * PAGE)
    assert restored.pages == host.info(restored.domid).pages == len(domain.types) - 1


def test_types_are_those_that_came_last() -> None:
    """A page that was sent as a pinned table first, and is none at the end: it can be written, and is not pinned."""
    domain = pv_domain()
    page = domain.places.data[0]
    stream = domain.to_stream("xl")
    junk = np.full(512, 0xFFFF_F000_0000_0001, np.uint64).tobytes()  # pfns that no domain has
    stream.before("PAGE_DATA", WIRE.page_data([(page, 4 | 8)], [junk]))
    host, restored = made(stream)
    assert host.page_types(restored.domid, np.array([mfn_of(host, restored.domid, page)], np.uint64)).tolist() == [0]
    assert memory(host, restored.domid)[page] == bytes(domain.pages[page])


@pytest.mark.parametrize("kind", [XTAB, BROKEN])
def test_a_page_that_is_gone_keeps_its_frame_and_is_no_table(kind: int) -> None:
    domain = pv_domain()
    page = domain.places.data[0]
    stream = domain.to_stream("xl")
    stream.before("PAGE_DATA", WIRE.page_data([(page, 1 | 8)], [bytes(PAGE)]))
    stream.before("X86_TSC_INFO", WIRE.page_data([(page, kind)], []))
    host, restored = made(stream)
    mfn = mfn_of(host, restored.domid, page)
    assert host.page_types(restored.domid, np.array([mfn], np.uint64)).tolist() == [0]
    assert p2m_entry(host, restored, domain, page) == mfn


def p2m_entry(host: ModelHost, restored: Restored, domain: Domain, pfn: int) -> int:
    """What stands in the guest's own p2m."""
    per_leaf = PAGE // domain.width
    leaf = memory(host, restored.domid)[int(domain.p2m_pfns[pfn // per_leaf])]
    return int(np.frombuffer(leaf, f"<u{domain.width}")[pfn % per_leaf])


@pytest.mark.parametrize("width", [8, 4])
def test_pages_without_content_are_given_and_named(width: Width) -> None:
    domain = pv_domain(width=width, pfns=[*range(60), *range(2000, 2010)])
    page, gone = 2003, 2011
    stream = domain.to_stream("xl")
    domain.types[page] = XALLOC
    stream = domain.to_stream("xl")
    host, restored = made(stream)
    assert p2m_entry(host, restored, domain, page) == mfn_of(host, restored.domid, page)
    assert p2m_entry(host, restored, domain, gone) == 256**width - 1
    assert p2m_entry(host, restored, domain, 1500) == 256**width - 1


@BOTH
def test_what_is_behind_the_end_of_the_p2m_is_not_written_to(width: Width) -> None:
    domain = pv_domain(width=width)
    leaf = int(domain.p2m_pfns[-1])
    domain.pages[leaf][-8:] = b"behind!!"
    host, restored = made(domain.to_stream("xl"))
    assert memory(host, restored.domid)[leaf].endswith(b"behind!!")
    assert p2m_entry(host, restored, domain, domain.entries - 1) == 256**width - 1


def test_a_pfn_that_only_a_page_table_names_gets_a_frame() -> None:
    domain = pv_domain()
    hidden = domain.places.data[0]
    del domain.types[hidden]
    host, restored = made(domain.to_stream("xl"))
    assert p2m_entry(host, restored, domain, hidden) == mfn_of(host, restored.domid, hidden)
    check(host)


def test_a_verified_page_that_is_another_is_counted_and_written() -> None:
    domain = pv_domain()
    one, two = domain.places.data[:2]
    sent = [(one, NOTAB), (two, NOTAB), (domain.places.top, 4 | 8)]
    content = [bytes(domain.pages[one]), b"new" + bytes(PAGE - 3), bytes(domain.pages[domain.places.top])]
    host, restored = made(a_stream(domain, WIRE.verify(), WIRE.page_data(sent, content)))
    assert restored.differing == 1
    assert memory(host, restored.domid)[two].startswith(b"new")
    check(host)


@pytest.mark.parametrize("extents", [1 << 30, 1, 0])
def test_memory_is_given_in_extents_where_there_are_some(extents: int) -> None:
    guest, heap = suspended("linear"), Heap()
    save(guest.host, guest.domid, heap, config=CONFIG)
    host = Watched()
    host.extents = extents
    _, restored = made(bytes(heap.data), host)
    by_order = {order: sum(n for o, n in host.asked if o == order) for order in (0, 9)}
    assert by_order[9] >= 4
    if extents == 1 << 30:
        assert by_order[0] + by_order[9] * 512 == restored.pages
        assert len(host.asked) < 12
    assert_same(guest, moved(guest, host, restored))


@pytest.mark.parametrize("way", ["file", "pipe"])
def test_where_nothing_can_be_read_into_a_domain_it_is_copied(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(pv_domain().to_stream("xl"))
    calls = []

    def refusing(call: Callable[..., int]) -> Callable[..., int]:
        def refuse(fd: int, buffers: Sequence[memoryview], *at: int) -> int:
            calls.append(len(buffers[0]))
            if len(calls) % 3:
                raise OSError(errno.EFAULT, "Bad address")
            return call(fd, [buffers[0][:5000]], *at)  # and now and then some of it can

        return refuse

    monkeypatch.setattr(os, "readv", refusing(os.readv))
    monkeypatch.setattr(os, "preadv", refusing(os.preadv))
    host = ModelHost(1 << 30, seed=3)
    if way == "file":
        with opened(data) as source:
            restored = restore_domain(host, source)
    else:
        with piped(data) as fd:
            source = Input(os.dup(fd), "pipe")
            restored = restore_domain(host, source)
            source.close()
    assert calls
    monkeypatch.undo()
    other, expected = made(data)
    mine, theirs = memory(host, restored.domid), memory(other, expected.domid)
    domain = pv_domain()
    for pfn in domain.places.data:
        assert mine[pfn] == theirs[pfn] == bytes(domain.pages[pfn])


# --- what is another on the new host ---------------------------------------------------------------------------------


@BOTH
def test_start_info_says_what_is_true_here(width: Width) -> None:
    domain = pv_domain(width=width)
    flags = SIF_PRIVILEGED | SIF_INITDOMAIN | SIF_MOD_START_PFN | SIF_VIRT_P2M_4TOOLS | 0xFF00
    domain.start_info["flags"] = flags
    host, restored = made(domain.to_stream("xl"))
    places = domain.places
    info = start_info(host, restored.domid, places.start_info)
    assert int(info["flags"]) == SIF_MOD_START_PFN | SIF_VIRT_P2M_4TOOLS
    assert int(info["nr_pages"]) == domain.entries
    assert int(info["shared_info"]) == host.info(restored.domid).shared_info_mfn * PAGE
    assert (int(info["store_mfn"]), int(info["store_evtchn"])) == (restored.xenstore.mfn, restored.xenstore.port)
    assert mfn_of(host, restored.domid, places.store) == restored.xenstore.mfn
    console = info["console"]["domU"]
    assert (int(console["mfn"]), int(console["evtchn"])) == (restored.console.mfn, restored.console.port)
    assert mfn_of(host, restored.domid, places.console) == restored.console.mfn
    register = VCPU_GUEST_CONTEXT.read(host.vcpu_context(restored.domid, 0), width)["user_regs"]
    assert int(register["rdx" if width == 8 else "edx"]) == mfn_of(host, restored.domid, places.start_info)


@BOTH
def test_shared_info_has_the_guests_own_and_no_p2m_of_another_host(width: Width) -> None:
    domain = pv_domain(width=width, tree=True)
    was = domain.shared_info
    was["vcpu_info"]["evtchn_upcall_mask"], was["vcpu_info"]["evtchn_pending_sel"] = 1, 5
    was["vcpu_info"]["evtchn_upcall_pending"] = 1
    was["evtchn_pending"], was["arch"]["nmi_reason"], was["wc_sec"] = 3, 2, 77
    end = len(was.tobytes())
    domain.shared_page[end : end + 64] = b"\xff" * 64  # p2m_levels, p2m_root
    host, restored = made(domain.to_stream("xl"))
    now = shared_info(host, restored.domid)
    assert (now["vcpu_info"]["evtchn_upcall_mask"] == 1).all()
    assert (now["vcpu_info"]["evtchn_upcall_pending"] == 1).all()
    assert not now["vcpu_info"]["evtchn_pending_sel"].any()
    assert not now["evtchn_pending"].any()
    assert (now["evtchn_mask"] == 256**width - 1).all()
    arch = now["arch"]
    assert (int(arch["max_pfn"]), int(arch["nmi_reason"])) == (int(was["arch"]["max_pfn"]), 2)
    for field in ("pfn_to_mfn_frame_list_list", "p2m_cr3", "p2m_vaddr", "p2m_generation"):
        assert int(was["arch"][field]) or field == "p2m_generation"
        assert not int(arch[field])
    assert int(now["wc_sec"]) == 0, "the wallclock is Xen's"
    assert not any(host.shared_info(restored.domid)[end:])


# --- checkpoints -----------------------------------------------------------------------------------------------------


def checkpointed(domain: Domain, page: int, *, behind: bool) -> Stream:
    """Two checkpoints, before each of which a page changes; and, ``behind`` the last one, once more."""
    wire = WIRE
    stream = Stream([*domain.head(wire), *domain.page_data(wire), *domain.tail(wire)])
    for content in (b"1", b"2"):
        stream += [wire.page_data([(page, NOTAB)], [content * PAGE]), *domain.tail(wire), wire.checkpoint()]
    if behind:
        stream += [wire.page_data([(page, NOTAB)], [b"3" * PAGE]), *domain.tail(wire)]
    return Stream([*stream, wire.end()])


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("way", ["file", "pipe"])
def test_of_a_stream_with_checkpoints_the_last_whole_one_counts(way: str, behind: bool) -> None:
    domain = pv_domain()
    page = domain.places.data[0]
    data = bytes(wrap(checkpointed(domain, page, behind=behind), "libxc"))
    host = ModelHost(1 << 30, seed=3)
    domid = host.create(max_pages=200)
    ports: dict[str, Any] = {"console_port": 1, "xenstore_port": 2}
    if way == "file":
        with opened(data) as source:
            restored = restore(host, domid, source, **ports)
    else:
        with piped(data) as fd:
            source = Input(os.dup(fd), "pipe")
            restored = restore(host, domid, source, **ports)
            source.close()
    assert memory(host, domid)[page] == b"2" * PAGE
    assert restored.checkpoints == 2
    check(host)
