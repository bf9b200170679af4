"""restore() and restore_domain() on ModelHost: the guest runs on, and has what it had."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.kernel_guest import SOME_FORMS, Guest
from tests.support.memory_limit import peak_memory_below
from tests.support.model_guest import pfns
from tests.support.model_invariants import check_invariants
from tests.support.restored_domain import restore_directly
from tests.support.restoring import (
    assert_same_pages,
    guest_on,
    memory_of,
    mfn_of,
    restore_stream,
    shared_info,
    start_info,
    stream_input,
)
from tests.support.saved_files import piped
from tests.support.saving import BOTH, CONFIG, MemorySink, saved, suspended
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from tests.support.writers.envelopes import config_json, wrap
from tests.support.writers.stream import NOTAB, PAGE, Stream, Wire
from xenpv.abi.declare import Width
from xenpv.abi.x86 import VCPU_GUEST_CONTEXT
from xenpv.abi.xen import SIF_INITDOMAIN, SIF_MOD_START_PFN, SIF_PRIVILEGED, SIF_VIRT_P2M_4TOOLS
from xenpv.host.model.host import ModelHost
from xenpv.io.stream_input import Input
from xenpv.memory.p2m_reader import decode_entries
from xenpv.restore.restore import Restored, restore
from xenpv.save.save import save
from xenpv.stream.envelope import Kind

WIRE = Wire()


@pytest.mark.parametrize(("width", "form"), SOME_FORMS)
def test_restore_saved_guest_resumes_with_same_memory(width: Width, form: str, tmp_path: Path) -> None:
    guest = suspended(form, width)
    saved(guest, tmp_path / "x", config=CONFIG)
    host, restored = restore_stream((tmp_path / "x").read_bytes())
    other = guest_on(host, guest, restored)
    check_invariants(host)
    assert_same_pages(guest, other)
    assert host.info(restored.domid).name == "made"
    assert other.do("resume") is False
    assert set(other.assert_consistent()) <= {"physmap-invalid"}
    assert not len(other.do("check_pattern", other.do("free_pfns"), 7))
    other.do("balloon_in", pfns(20, 200_000))
    assert set(other.assert_consistent()) <= {"physmap-invalid"}


@BOTH
def test_restore_equals_reference_that_uses_no_stream(width: Width) -> None:
    """The reference, support/restored_domain.py, knows no records and shares no code with restore."""
    guest, heap = suspended("both", width), MemorySink()
    save(guest.host, guest.domid, heap, config=CONFIG)
    host, ours = restore_stream(bytes(heap.data))
    other = ModelHost(1 << 30, seed=8)
    theirs = Guest(other, restore_directly(guest.host, guest.domid, other), guest.kernel, guest.layout)
    assert_same_pages(guest, theirs)
    assert_same_pages(guest, guest_on(host, guest, ours))
    page = guest.layout.start_info
    for field in ("magic", "nr_pages", "flags", "mfn_list"):
        assert start_info(host, ours.domid, page)[field] == start_info(other, theirs.domid, page)[field]
    for leaf in guest.host.m2p(guest.live.p2m.distinct_leaves.frame).tolist():  # entry by entry, as pfns
        entries = [
            decode_entries(on.frames.read(np.array([mfn_of(on, who, leaf)], np.uint64)), width)[0]
            for on, who in ((host, ours.domid), (other, theirs.domid))
        ]
        actual, expected = (on.m2p(mfns) for on, mfns in zip((host, other), entries, strict=True))
        np.testing.assert_array_equal(actual, expected)


def test_restore_64_mib_spread_over_16_tib_resumes() -> None:
    """Nearly the highest pfns that a stream can hold: the format needs 64 MiB of p2m frames for 64 leaves.

    Restore takes 0.7 s, most of it in the model; a cost linear in max_pfn would take minutes and 32 GiB.
    """
    guest, heap = Guest.boot("linear", pages=1 << 14), MemorySink()
    guest.do("spread", (1 << 32) - 4096)
    free = guest.do("free_pfns")
    guest.do("suspend")
    save(guest.host, guest.domid, heap, config=config_json(memory_kib=4 << 14))
    data = bytes(heap.data)
    with peak_memory_below(512 << 20):  # a p2m of 2^32 entries has 32 GiB
        host, result = restore_stream(data)
    assert result.entries > (1 << 32) - 5000
    other = guest_on(host, guest, result)
    assert other.do("resume") is False
    np.testing.assert_array_equal(other.do("free_pfns"), free)


@pytest.mark.parametrize(("source_kind", "width"), [("file", 8), ("pipe", 4), ("nonblocking pipe", 8)])
def test_restore_into_existing_domain_leaves_it_paused_and_the_rest_of_the_input_unread(
    source_kind: str, width: Width
) -> None:
    """As libxl does it: it creates a 64-bit domain for any stream, and reads on after the stream's end."""
    guest, heap = suspended("both", width), MemorySink()
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

        def static_data_done(cpuid_missing: bool, msrs_missing: bool) -> None:
            missing.append((cpuid_missing, msrs_missing))

        restored = restore(host, domid, source, envelope=Kind.LIBXC, static_data_done=static_data_done, **ports)
        assert os.read(source.fd, 9) == b"more"
        return restored

    if source_kind == "file":
        with stream_input(data + b"more", exact=True) as source:
            restored = fill(source)
    else:
        with piped(data + b"more") as fd:
            os.set_blocking(fd, source_kind == "pipe")
            source = Input(os.dup(fd), "pipe", exact=True)
            restored = fill(source)
            source.close()
    assert missing == [(False, False)]
    assert (restored.console.port, restored.xenstore.port, restored.bytes) == (1, 2, len(data))
    assert host.info(domid).paused
    assert host.store.read(f"/local/domain/{domid}/console/ring-ref") is None
    assert_same_pages(guest, guest_on(host, guest, restored))


# --- streams of all kinds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("envelope", ["xl", "libvirt", "xenopsd", "libxl", "libxc"])
@BOTH
def test_restore_domain_from_any_envelope_creates_it(envelope: str, width: Width) -> None:
    domain = pv_domain(width=width, vcpus=2)
    host, restored = restore_stream(domain.to_stream(envelope))
    info = host.info(restored.domid)
    assert (info.pages, info.max_vcpu, info.width) == (len(domain.types) - 1, 1, width)
    assert not info.paused
    check_invariants(host)


def test_restore_domain_with_configuration_creates_what_it_says() -> None:
    domain = pv_domain(vcpus=2)
    host, restored = restore_stream(domain.to_stream("xl"), paused=True)
    info = host.info(restored.domid)
    assert (info.name, info.max_vcpu, info.max_pages, info.paused) == ("made", 1, 96 + 256, True)
    assert (restored.name, restored.uuid) == ("made", info.uuid)
    assert info.uuid is not None
    home = f"/local/domain/{restored.domid}"
    assert host.store.read(f"{home}/console/ring-ref") == str(restored.console.mfn).encode()
    assert host.store.read(f"{home}/store/port") == str(restored.xenstore.port).encode()
    assert host.guest_view(restored.domid).memory_map == 96
    assert host.configuration(restored.domid) == config_json(vcpus=2, memory_kib=96 * 4)
    host, restored = restore_stream(domain.to_stream("xl"), host, name="another", new_uuid=True)
    assert host.info(restored.domid).name == "another"


def test_restore_version_2_stream_reports_missing_policies() -> None:
    host = ModelHost(1 << 30, seed=3)
    domid, reported = host.create(max_pages=200), list[tuple[bool, bool]]()
    with stream_input(bytes(pv_domain().to_stream("libxc", version=2))) as source:
        ports: dict[str, Any] = {"console_port": 1, "xenstore_port": 2}
        restore(host, domid, source, static_data_done=lambda cpuid, msrs: reported.append((cpuid, msrs)), **ports)
    assert reported == [(True, True)]


@BOTH
def test_restore_sets_vcpu_state_tsc_and_policy(width: Width) -> None:
    domain = pv_domain(width=width, vcpus=2)
    host, restored = restore_stream(domain.to_stream("xl"))
    for vcpu in (0, 1):
        state = host.vcpu_state(restored.domid, vcpu)
        assert (state.extended, state.xsave, state.msrs) == (
            domain.extended[vcpu],
            domain.xsave[vcpu],
            domain.msrs.get(vcpu, b""),
        )
        context = VCPU_GUEST_CONTEXT.read(host.vcpu_context(restored.domid, vcpu), width)
        sent = domain.vcpus[vcpu]
        for field in ("trap_ctxt", "kernel_sp", "fpu_ctxt", "event_callback_eip", "gdt_ents", "vm_assist"):
            np.testing.assert_array_equal(context[field], sent[field])
        frame = int(context["gdt_frames"][0])
        assert frame == mfn_of(host, restored.domid, int(sent["gdt_frames"][0]))
    tsc = host.tsc_info(restored.domid)
    assert (tsc.mode, tsc.khz, tsc.nsec, tsc.incarnation) != (0, 1_000_000, 0, 0)
    policy = host.cpu_policy(restored.domid)
    assert (len(policy.leaves), len(policy.msrs)) == (2 * 24, 2 * 16)


def test_restore_domain_without_configuration_sizes_it_by_the_file() -> None:
    domain = pv_domain(vcpus=3)
    host, restored = restore_stream(domain.to_stream("libxc"))
    info = host.info(restored.domid)
    assert (info.max_vcpu, info.max_pages, info.name) == (2, len(domain.types) - 1 + 256, None)


# --- what changes on the new host ---------------------------------------------------------------------------------


@BOTH
def test_restore_start_info_has_values_of_new_host(width: Width) -> None:
    domain = pv_domain(width=width)
    flags = SIF_PRIVILEGED | SIF_INITDOMAIN | SIF_MOD_START_PFN | SIF_VIRT_P2M_4TOOLS | 0xFF00
    domain.start_info["flags"] = flags
    host, restored = restore_stream(domain.to_stream("xl"))
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
def test_restore_shared_info_keeps_guest_state_and_publishes_no_p2m(width: Width) -> None:
    domain = pv_domain(width=width, tree=True)
    sent = domain.shared_info
    sent["vcpu_info"]["evtchn_upcall_mask"], sent["vcpu_info"]["evtchn_pending_sel"] = 1, 5
    sent["vcpu_info"]["evtchn_upcall_pending"] = 1
    sent["evtchn_pending"], sent["arch"]["nmi_reason"], sent["wc_sec"] = 3, 2, 77
    end = len(sent.tobytes())
    domain.shared_page[end : end + 64] = b"\xff" * 64  # p2m_levels, p2m_root
    host, restored = restore_stream(domain.to_stream("xl"))
    restored_info = shared_info(host, restored.domid)
    assert (restored_info["vcpu_info"]["evtchn_upcall_mask"] == 1).all()
    assert (restored_info["vcpu_info"]["evtchn_upcall_pending"] == 1).all()
    assert not restored_info["vcpu_info"]["evtchn_pending_sel"].any()
    assert not restored_info["evtchn_pending"].any()
    assert (restored_info["evtchn_mask"] == 256**width - 1).all()
    arch = restored_info["arch"]
    assert (int(arch["max_pfn"]), int(arch["nmi_reason"])) == (int(sent["arch"]["max_pfn"]), 2)
    for field in ("pfn_to_mfn_frame_list_list", "p2m_cr3", "p2m_vaddr", "p2m_generation"):
        assert int(sent["arch"][field]) or field == "p2m_generation"
        assert not int(arch[field])
    assert int(restored_info["wc_sec"]) == 0, "wallclock belongs to Xen"
    assert not any(host.shared_info(restored.domid)[end:])


# --- checkpoints -----------------------------------------------------------------------------------------------------


def checkpointed_stream(domain: Domain, page: int, *, partial: bool) -> Stream:
    """Two checkpoints with other content of a page each; ``partial``: the begin of a third one."""
    wire = WIRE
    stream = Stream([*domain.head(wire), *domain.page_data(wire), *domain.tail(wire)])
    for content in (b"1", b"2"):
        stream += [wire.page_data([(page, NOTAB)], [content * PAGE]), *domain.tail(wire), wire.checkpoint()]
    if partial:
        stream += [wire.page_data([(page, NOTAB)], [b"3" * PAGE]), *domain.tail(wire)]
    return Stream([*stream, wire.end()])


@pytest.mark.parametrize("partial", [False, True], ids=["whole", "with partial checkpoint"])
@pytest.mark.parametrize("source_kind", ["file", "pipe"])
def test_restore_checkpointed_stream_has_state_of_last_complete_checkpoint(source_kind: str, partial: bool) -> None:
    domain = pv_domain()
    page = domain.places.data[0]
    data = bytes(wrap(checkpointed_stream(domain, page, partial=partial), "libxc"))
    host = ModelHost(1 << 30, seed=3)
    domid = host.create(max_pages=200)
    ports: dict[str, Any] = {"console_port": 1, "xenstore_port": 2}
    if source_kind == "file":
        with stream_input(data) as source:
            restored = restore(host, domid, source, **ports)
    else:
        with piped(data) as fd:
            source = Input(os.dup(fd), "pipe")
            restored = restore(host, domid, source, **ports)
            source.close()
    assert memory_of(host, domid)[page] == b"2" * PAGE
    assert restored.checkpoints == 2
    check_invariants(host)
