"""Restores that fail: damaged streams, impossible guests, hosts that refuse a call. Nothing may be left behind."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable

import numpy as np
import pytest

from tests.support.breakage import CASES, Case, as_stream
from tests.support.model_invariants import check_invariants
from tests.support.refused_calls import RESTORING, RefusingCall
from tests.support.restoring import host_state, restore_error, restore_stream, stream_input
from tests.support.saved_files import piped, verify_pipe
from tests.support.saving import BOTH, CONFIG, MemorySink, suspended
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from tests.support.writers.hvm import hvm_stream
from tests.support.writers.stream import L2TAB, NOTAB, PAGE, PIN, XALLOC, Stream, Wire
from tests.verify import cases_vcpus
from xenpv.abi.declare import Width
from xenpv.errors import (
    Fault,
    GuestError,
    HostError,
    Malformed,
    OutOfOrder,
    RequestError,
    StreamError,
    Truncated,
    Unsupported,
    XenPVError,
)
from xenpv.frames import DomId
from xenpv.host.model.host import ModelHost
from xenpv.io.stream_input import Input
from xenpv.restore.restore import restore, restore_domain
from xenpv.save.save import save
from xenpv.stream.envelope import Kind
from xenpv.verify import rules

assert cases_vcpus  # registers its cases
WIRE = Wire()


@pytest.mark.parametrize("call", RESTORING)
def test_restore_domain_host_refuses_call_leaves_nothing(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = pv_domain(vcpus=2).to_stream("xl", batch=16)
    host = ModelHost(128 << 20, seed=3)
    before, last = host_state(host), 0
    for nth in ("count", "first", "last"):
        refusing = RefusingCall(getattr(host, call), {"count": -1, "first": 0, "last": last}[nth])
        monkeypatch.setattr(host, call, refusing)
        if nth == "count":
            _, restored = restore_stream(stream, host)
            last = refusing.calls - 1
            host.destroy(restored.domid)
        else:
            with stream_input(bytes(stream)) as source, pytest.raises(HostError) as e:
                restore_domain(host, source)
            assert e.value.op == "test"
        monkeypatch.undo()
        assert last >= 0
        assert host_state(host) == before
        check_invariants(host)


# --- damaged streams -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("envelope", ["xl", "libxc"])
def test_restore_domain_truncated_anywhere_leaves_nothing(envelope: str) -> None:
    """Cut at each record's begin, in its header and in its body; from a file and from a pipe."""
    stream = pv_domain(vcpus=2, pfns=range(48)).to_stream(envelope, batch=16)
    data, cuts = bytes(stream), set[int]()
    for i in range(len(stream)):
        at = stream.offset_of(i)
        cuts |= {at, at + 1, at + 7, at + 12, at + len(stream[i].data) // 2}
    host = ModelHost(128 << 20, seed=3)
    before = host_state(host)
    for at in sorted(cut for cut in cuts if cut < len(data)):
        with stream_input(data[:at]) as source, pytest.raises((Truncated, Unsupported)):
            restore_domain(host, source)
        assert host_state(host) == before
        with piped(data[:at]) as fd:
            source = Input(os.dup(fd), "pipe")
            # A pipe without a configuration is refused before its end.
            with pytest.raises((Truncated, Unsupported, RequestError)):
                restore_domain(host, source)
            source.close()
        assert host_state(host) == before


def test_restore_domain_flipped_bit_restores_or_raises_our_error() -> None:
    stream = pv_domain(vcpus=2, pfns=range(48), tree=True).to_stream("xl", batch=16)
    data, rng = bytes(stream), random.Random(5)
    headers = [stream.offset_of(i) + k for i in range(len(stream)) for k in range(24)]
    host = ModelHost(128 << 20, seed=3)
    before, refusals = host_state(host), 0
    for n in range(120):
        at = rng.choice(headers) if n % 2 else rng.randrange(len(data))
        broken = bytearray(data)
        broken[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        with stream_input(bytes(broken)) as source:
            try:
                restored = restore_domain(host, source)
            except XenPVError:
                refusals += 1
            else:
                host.destroy(restored.domid)
        assert host_state(host) == before
    check_invariants(host)
    assert refusals > 25


def test_restore_domain_truncated_checkpointed_stream_raises() -> None:
    stream = pv_domain().to_checkpointed()
    cut = bytes(stream)[: stream.offset("PAGE_DATA", -1) + 100]
    assert isinstance(restore_error(cut), Truncated)


def test_restore_checkpoint_of_libxl_migration_raises_unsupported() -> None:
    host = ModelHost(128 << 20)
    domid = host.create(max_pages=200)
    stream = pv_domain().to_checkpointed()
    libxc = bytes(stream)[stream.offset("image header") :]
    with stream_input(libxc, exact=True) as source, pytest.raises(Unsupported) as e:
        restore(host, domid, source, console_port=1, xenstore_port=2, envelope=Kind.LIBXC)
    assert e.value.record == "CHECKPOINT"


# --- domains that do not fit -----------------------------------------------------------------------------------------


def error_into(host: ModelHost, domid: DomId, stream: Stream | bytes) -> XenPVError:
    """Return the error of restoring a stream into an existing domain."""
    with stream_input(bytes(stream)) as source, pytest.raises(XenPVError) as e:
        restore(host, domid, source, console_port=1, xenstore_port=2)
    return e.value


def test_restore_domain_with_low_max_pages_raises_needed_and_available() -> None:
    host = ModelHost(128 << 20)
    domid = host.create(max_pages=50)
    e = error_into(host, domid, pv_domain().to_stream("xl", batch=16))
    assert isinstance(e, RequestError)
    assert (e.needed, e.available) == (64, 50)
    assert host.info(domid).pages == 48


def test_restore_domain_host_out_of_memory_raises_enomem() -> None:
    guest, heap = suspended("linear"), MemorySink()
    save(guest.host, guest.domid, heap, config=CONFIG)
    e = restore_error(bytes(heap.data), ModelHost(84 << 20, seed=3))  # 4 MiB for domains
    assert isinstance(e, HostError)
    assert (e.op, e.errno) == ("populate_physmap", errno.ENOMEM)


def test_restore_into_unfit_domain_raises() -> None:
    host = ModelHost(128 << 20)
    stream = pv_domain().to_stream("xl")
    narrow = host.create(4, max_pages=200)
    e = error_into(host, narrow, stream)
    assert isinstance(e, HostError)
    assert e.errno == errno.EINVAL
    full = host.create(max_pages=200)
    host.populate_physmap(full, np.arange(3, dtype=np.uint64))
    e = error_into(host, full, stream)
    assert isinstance(e, RequestError)
    assert (e.needed, e.available) == (0, 3)
    running = host.create(max_pages=200)
    host.unpause(running)
    assert isinstance(error_into(host, running, stream), RequestError)


def test_restore_more_vcpus_than_domain_has_raises() -> None:
    host = ModelHost(128 << 20)
    domid = host.create(vcpus=2, max_pages=200)
    e = error_into(host, domid, pv_domain(vcpus=4).to_stream("xl"))
    assert isinstance(e, RequestError)
    assert (e.needed, e.available) == (4, 2)


def test_restore_domain_with_name_of_other_domain_raises() -> None:
    host = ModelHost(128 << 20)
    stream = pv_domain().to_stream("xl")
    restore_stream(stream, host)
    assert isinstance(restore_error(stream, host), RequestError)


def test_restore_domain_from_pipe_without_configuration_raises() -> None:
    with piped(bytes(pv_domain().to_stream("libxl"))) as fd:
        source = Input(os.dup(fd), "pipe")
        with pytest.raises(RequestError):
            restore_domain(ModelHost(128 << 20), source)
        source.close()


def test_restore_domain_hvm_stream_raises_unsupported() -> None:
    assert isinstance(restore_error(hvm_stream("xl", pages=4)), Unsupported)


def test_restore_domain_second_libxc_stream_raises_out_of_order() -> None:
    stream = pv_domain().to_stream("xenopsd")
    at = stream.find("image header")
    end = stream.find("END")
    e = restore_error(Stream([*stream[: end + 1], *stream[at - 1 : end + 1], *stream[end + 1 :]]))
    assert isinstance(e, OutOfOrder)
    assert e.record == "image header"


# --- impossible guests -----------------------------------------------------------------------------------------------


@BOTH
def test_localise_entry_beyond_end_of_p2m_raises_fault(width: Width) -> None:
    domain = pv_domain(width=width)
    table = next(pfn for pfn in sorted(domain.types) if domain.types[pfn] & ~PIN == 1)
    slot = int(np.flatnonzero(domain.table(table) & np.uint64(1))[-1])
    domain.table(table)[slot] = domain.entries << 12 | 1
    e = restore_error(domain.to_stream("xl"))
    assert isinstance(e, Fault)
    assert (e.pfn, e.level, e.entry) == (table, 1, slot)


def test_localise_superpage_raises_fault() -> None:
    domain = pv_domain()
    table = next(pfn for pfn in sorted(domain.types) if domain.types[pfn] & ~PIN == L2TAB)
    domain.table(table)[7] = 3 << 12 | 0x81
    e = restore_error(domain.to_stream("xl"))
    assert isinstance(e, Fault)
    assert (e.pfn, e.level, e.entry) == (table, 2, 7)


def test_localise_l4_table_in_32_bit_guest_raises_fault() -> None:
    domain = pv_domain(width=4)
    page = domain.places.data[0]
    domain.types[page] = 4
    e = restore_error(domain.to_stream("xl"))
    assert isinstance(e, Fault)
    assert (e.pfn, e.level, e.entry) == (page, 4, None)


TOP = {8: "L4TAB", 4: "L3TAB"}


def set_register(domain: Domain, pfn: int) -> None:
    """Set the register that names start info."""
    domain.vcpus[0]["user_regs"]["rdx" if domain.width == 8 else "edx"] = pfn


def set_cr3(domain: Domain, pfn: int) -> None:
    domain.vcpus[1]["ctrlreg"][3] = pfn << 12


def set_gdt_frame(domain: Domain, pfn: int) -> None:
    domain.vcpus[1]["gdt_frames"][0] = pfn


def set_console(domain: Domain, pfn: int) -> None:
    domain.start_info["console"]["domU"]["mfn"] = pfn


def set_store(domain: Domain, pfn: int) -> None:
    domain.start_info["store_mfn"] = pfn


@BOTH
@pytest.mark.parametrize(
    ("change", "pfn", "problem"),
    [
        pytest.param(set_register, 0xFFFFF, "Start Info (pfn 0xfffff) out of range", id="start info out of range"),
        pytest.param(set_gdt_frame, 0x60, "GDT frame 0 (pfn 0x60) has bad mfn", id="GDT frame not sent"),
        pytest.param(set_cr3, 5, "cr3 (pfn 0x5) has bad type NOTAB", id="cr3 names no table"),
        pytest.param(set_store, 0x60, "XenStore (pfn 0x60) has bad mfn", id="xenstore ring not sent"),
        pytest.param(set_console, 0x70, "Console (pfn 0x70) out of range", id="console ring out of range"),
    ],
)
def test_complete_pfn_of_wrong_page_raises_guest_error(
    width: Width, change: Callable[[Domain, int], None], pfn: int, problem: str
) -> None:
    domain = pv_domain(width=width, vcpus=2)
    change(domain, pfn)
    e = restore_error(domain.to_stream("xl"))
    assert isinstance(e, GuestError)
    assert e.pfn == pfn
    assert problem in str(e)  # libxenguest's own words


@BOTH
def test_complete_start_info_in_page_table_raises_guest_error(width: Width) -> None:
    domain = pv_domain(width=width)
    set_register(domain, domain.places.top)
    e = restore_error(domain.to_stream("xl"))
    assert isinstance(e, GuestError)
    assert e.pfn == domain.places.top
    assert f"has bad type {TOP[width]}_PIN, expected NOTAB" in str(e)


@BOTH
def test_complete_start_info_without_magic_raises_guest_error(width: Width) -> None:
    domain = pv_domain(width=width)
    set_register(domain, domain.places.data[0])
    e = restore_error(domain.to_stream("xl"))
    assert isinstance(e, GuestError)
    assert e.pfn == domain.places.data[0]


@BOTH
def test_complete_too_many_gdt_entries_raises_guest_error(width: Width) -> None:
    domain = pv_domain(width=width)
    domain.vcpus[0]["gdt_ents"] = 7169
    e = restore_error(domain.to_stream("xl"))
    assert isinstance(e, GuestError)
    assert "GDT entry count (7169) of vcpu0 out of range (max 7168)" in str(e)  # libxenguest's own words


@pytest.mark.parametrize(
    ("cr1", "pfn"), [pytest.param(0x5000, None, id="bit 0 clear"), pytest.param(0x5001, 5, id="no table")]
)
def test_complete_bad_cr1_raises_guest_error(cr1: int, pfn: int | None) -> None:
    domain = pv_domain(vcpus=2)
    domain.vcpus[1]["ctrlreg"][1] = cr1
    e = restore_error(domain.to_stream("xl"))
    assert isinstance(e, GuestError)
    assert e.pfn == pfn
    assert "vcpu1's cr1" in str(e)


def test_complete_without_vcpu0_raises() -> None:
    domain = pv_domain(vcpus=2)
    stream = domain.to_stream("xl")
    at = stream.find("X86_PV_VCPU_BASIC")
    del stream[at]
    assert "Sender didn't send vcpu0's basic state" in str(restore_error(stream))


def test_pin_table_that_xen_refuses_raises_host_error() -> None:
    """The page table maps itself writable."""
    domain = pv_domain()
    table = next(pfn for pfn in sorted(domain.types) if domain.types[pfn] & ~PIN == 1)
    domain.table(table)[:] = table << 12 | 3
    assert isinstance(restore_error(domain.to_stream("xl")), HostError)


@BOTH
@pytest.mark.parametrize(
    ("place", "pfn", "problem"),
    [
        pytest.param(0, lambda _: 64, "has bad mfn", id="not sent"),
        pytest.param(1, lambda _: 0xFFFFFF, "out of range", id="out of range"),
        pytest.param(0, lambda domain: domain.places.top, "expected NOTAB", id="page table"),
        pytest.param(-1, lambda domain: int(domain.p2m_pfns[0]), "p2m_frame_list[0]", id="shared by populated parts"),
    ],
)
def test_write_p2m_with_bad_leaf_raises_guest_error(
    width: Width, place: int, pfn: Callable[[Domain], int], problem: str
) -> None:
    domain = pv_domain(width=width, pfns=[*range(60), *range(5000, 5010)])
    bad = pfn(domain)
    domain.p2m_pfns[place] = bad
    e = restore_error(domain.to_stream("xl"))
    assert isinstance(e, GuestError)
    assert e.pfn == bad
    assert problem in str(e)  # contract: libxenguest's own text, or the place in the list


def test_write_p2m_with_missing_leaf_raises() -> None:
    domain = pv_domain()
    stream = domain.to_stream("xl")
    stream.after("X86_PV_P2M_FRAMES", WIRE.p2m_frames(1024, 1100, [int(domain.p2m_pfns[0])]))
    assert isinstance(restore_error(stream), GuestError)


def test_complete_after_checkpoint_without_state_raises() -> None:
    domain = pv_domain()
    stream = domain.to_stream("libxc")
    stream.after("PAGE_DATA", WIRE.checkpoint(), WIRE.page_data([(0, NOTAB)], [bytes(PAGE)]), nth=-1)
    e = restore_error(stream)
    assert "Sender didn't send vcpu0's basic state" in str(e)
    stream = domain.to_stream("libxc")
    stream.drop("SHARED_INFO")
    stream.before("END", WIRE.checkpoint(), WIRE.shared_info(bytes(domain.shared_page)))
    e = restore_error(stream)
    assert isinstance(e, GuestError)
    assert "shared info" in str(e)


@pytest.mark.parametrize("error", [OutOfOrder, Malformed, Truncated])
def test_restore_domain_broken_rule_raises_its_class(error: type[StreamError]) -> None:
    stream = pv_domain().to_stream("xl")
    if error is OutOfOrder:
        stream.drop("X86_PV_INFO")
    elif error is Malformed:
        stream.before("END", WIRE.page_data([(5000, NOTAB)], [bytes(PAGE)]))
    else:
        stream.drop("libxl END")
    assert type(restore_error(stream)) is error


def test_restore_domain_failure_counts_and_not_that_of_the_cleanup(monkeypatch: pytest.MonkeyPatch) -> None:
    host = ModelHost(128 << 20, seed=3)
    monkeypatch.setattr(host, "introduce", RefusingCall(host.introduce, 0))
    monkeypatch.setattr(host, "destroy", RefusingCall(host.destroy, 0))
    with stream_input(bytes(pv_domain().to_stream("xl"))) as source, pytest.raises(HostError) as e:
        restore_domain(host, source)
    [note] = e.value.__notes__
    assert "xl destroy 1" in note


@pytest.mark.parametrize("envelope", ["xl", "libvirt", "xenopsd", "libxl", "libxc"])
@pytest.mark.parametrize("version", [2, 3])
def test_restore_domain_stream_of_headers_only_raises(envelope: str, version: int) -> None:
    """Order and completeness are record_order.py's: no later code meets a stream without X86_PV_INFO."""
    stream = pv_domain().to_stream(envelope, version=version)
    first, end = stream.find("domain header"), stream.find("END")
    assert isinstance(restore_error(Stream([*stream[: first + 1], *stream[end:]])), OutOfOrder)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.rule is rules.START_INFO_FRAMES], ids=lambda case: case.id
)
def test_restore_domain_ring_that_no_daemon_can_use_raises_as_verify_says(case: Case) -> None:
    domain = pv_domain(**case.make)
    pfn = case.spoil(domain).fields["pfn"]
    error = restore_error(as_stream(domain))
    assert isinstance(error, GuestError)
    assert error.pfn == pfn


@BOTH
def test_restore_domain_ring_without_content_is_taken(width: Width) -> None:
    """libxenguest asks for any page; `convert --drop-zero` sends one of zeros without content."""
    domain = pv_domain(width=width)
    ring = int(domain.start_info["console"]["domU"]["mfn"])
    domain.types[ring] = XALLOC
    del domain.pages[ring]
    assert not verify_pipe(domain.to_bytes()).findings
    restore_stream(domain.to_bytes())


def test_restore_domain_p2m_that_becomes_shorter_raises() -> None:
    """Pages beyond the new end may have come already, and tables that name them may be localised."""
    domain = pv_domain()
    stream = domain.to_stream("xl", batch=16)
    leaf = int(domain.p2m_pfns[0])
    for nth, entries in ((0, domain.entries), (1, domain.entries - 2)):
        stream.before("X86_PV_P2M_FRAMES" if nth == 0 else "X86_TSC_INFO", WIRE.p2m_leaves(entries, (0, 1, leaf)))
    stream.pop(stream.find("X86_PV_P2M_FRAMES"))
    error = restore_error(stream)
    assert isinstance(error, Malformed)
    assert error.rule == "p2m-frames-range"
    assert error.record == "XENPV_P2M_LEAVES"
