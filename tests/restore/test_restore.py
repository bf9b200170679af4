"""Domains on ModelHost, saved and restored on another: the guest goes on, and has what it had."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.kernel_guest import SOME, Guest
from tests.support.model_guest import pfns
from tests.support.model_invariants import check
from tests.support.restored_domain import restored as restored_without
from tests.support.restoring import (
    assert_same,
    made,
    memory,
    mfn_of,
    moved,
    opened,
    shared_info,
    start_info,
)
from tests.support.saved_files import piped
from tests.support.saving import BOTH, CONFIG, Heap, saved, suspended
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from tests.support.writers.envelopes import config_json, wrap
from tests.support.writers.stream import NOTAB, PAGE, Stream, Wire
from xenpv.abi.declare import Width
from xenpv.abi.x86 import VCPU_GUEST_CONTEXT
from xenpv.abi.xen import SIF_INITDOMAIN, SIF_MOD_START_PFN, SIF_PRIVILEGED, SIF_VIRT_P2M_4TOOLS
from xenpv.host.model.host import ModelHost
from xenpv.io.stream_input import Input
from xenpv.memory.p2m import entries_in
from xenpv.restore.restore import Restored, restore
from xenpv.save.save import save
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
    """support/restored_domain.py, which knows no records and does all in arithmetic of its own, comes to the same."""
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


@pytest.mark.parametrize(("way", "width"), [("file", 8), ("pipe", 4), ("pipe that does not wait", 8)])
def test_a_domain_that_is_there_is_filled(way: str, width: Width) -> None:
    """As for libxl: its descriptor, which is left right behind the stream; the domain stays paused and unknown. libxl
    makes all domains 64 bit wide, whatever the stream has.
    """
    guest, heap = suspended("both", width), Heap()
    save(guest.host, guest.domid, heap, envelope=Kind.LIBXC)
    data = bytes(heap.data)
    host = ModelHost(1 << 30, seed=9)
    domid = host.create(max_pages=4096)
    missing: list[tuple[bool, bool]] = []

    def fill(source: Input) -> Restored:
        ports: dict[str, Any] = {
            "console_port": host.alloc_event_channel(domid),
            "xenstore_port": host.alloc_event_channel(domid),
        }

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
