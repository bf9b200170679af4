"""What becomes no domain: streams that end, break or lie, hosts that say no. Nothing is left of any."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import pytest

from tests.support.model_invariants import check
from tests.support.refused_calls import RESTORING, Breaking
from tests.support.restoring import made, opened, refused, state
from tests.support.saved_files import piped
from tests.support.saving import BOTH, CONFIG, Heap, suspended
from tests.support.writers.build import pv_domain
from tests.support.writers.hvm import hvm_stream
from tests.support.writers.stream import L2TAB, NOTAB, PAGE, PIN, Stream, Wire
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
from xenpv.host.model.host import ModelHost
from xenpv.io.stream_input import Input
from xenpv.restore.restore import restore, restore_domain
from xenpv.save.save import save
from xenpv.stream.envelope import Kind

WIRE = Wire()


@pytest.mark.parametrize("call", RESTORING)
def test_each_call_refused_once_leaves_nothing(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = pv_domain(vcpus=2).to_stream("xl", batch=16)
    host = ModelHost(128 << 20, seed=3)
    before, last = state(host), 0
    for nth in ("count", "first", "last"):
        breaking = Breaking(getattr(host, call), {"count": -1, "first": 0, "last": last}[nth])
        monkeypatch.setattr(host, call, breaking)
        if nth == "count":
            _, restored = made(stream, host)
            last = breaking.times - 1
            host.destroy(restored.domid)
        else:
            with opened(bytes(stream)) as source, pytest.raises(HostError, match="no"):
                restore_domain(host, source)
        monkeypatch.undo()
        assert last >= 0
        assert state(host) == before
        check(host)


# --- streams that end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("envelope", ["xl", "libxc"])
def test_cut_off_anywhere_it_becomes_nothing(envelope: str) -> None:
    """At each record's begin, in its header and in its body, out of a file and out of a pipe."""
    stream = pv_domain(vcpus=2, pfns=range(48)).to_stream(envelope, batch=16)
    data, cuts = bytes(stream), set[int]()
    for i in range(len(stream)):
        at = stream.offset_of(i)
        cuts |= {at, at + 1, at + 7, at + 12, at + len(stream[i].data) // 2}
    host = ModelHost(128 << 20, seed=3)
    before = state(host)
    for at in sorted(cut for cut in cuts if cut < len(data)):
        with opened(data[:at]) as source, pytest.raises((Truncated, Unsupported)):
            restore_domain(host, source)
        assert state(host) == before
        with piped(data[:at]) as fd:
            source = Input(os.dup(fd), "pipe")
            # Without a configuration a pipe is refused before it is cut off.
            with pytest.raises((Truncated, Unsupported, RequestError)):
                restore_domain(host, source)
            source.close()
        assert state(host) == before


def test_a_flipped_bit_anywhere_is_a_domain_or_an_error_in_words() -> None:
    stream = pv_domain(vcpus=2, pfns=range(48), tree=True).to_stream("xl", batch=16)
    data, rng = bytes(stream), random.Random(5)
    headers = [stream.offset_of(i) + k for i in range(len(stream)) for k in range(24)]
    host = ModelHost(128 << 20, seed=3)
    before, refusals = state(host), 0
    for n in range(120):
        at = rng.choice(headers) if n % 2 else rng.randrange(len(data))
        broken = bytearray(data)
        broken[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        with opened(bytes(broken)) as source:
            try:
                restored = restore_domain(host, source)
            except XenPVError:
                refusals += 1
            else:
                host.destroy(restored.domid)
        assert state(host) == before
    check(host)
    assert refusals > 25


def test_a_checkpointed_stream_that_breaks_off_is_not_started() -> None:
    stream = pv_domain().to_checkpointed()
    cut = bytes(stream)[: stream.offset("PAGE_DATA", -1) + 100]
    assert isinstance(refused(cut), Truncated)


def test_a_checkpoint_where_libxl_has_the_stream_in_hand_is_refused() -> None:
    host = ModelHost(128 << 20)
    domid = host.create(max_pages=200)
    stream = pv_domain().to_checkpointed()
    libxc = bytes(stream)[stream.offset("image header") :]
    with opened(libxc, exact=True) as source, pytest.raises(Unsupported, match="Remus and COLO are not received"):
        restore(host, domid, source, console_port=1, xenstore_port=2, envelope=Kind.LIBXC)


# --- what does not fit -----------------------------------------------------------------------------------------------


def filling(host: ModelHost, domid: Any, stream: Stream | bytes) -> XenPVError:
    with opened(bytes(stream)) as source, pytest.raises(XenPVError) as e:
        restore(host, domid, source, console_port=1, xenstore_port=2)
    return e.value


def test_a_domain_that_may_not_have_so_many_pages_is_told_how_many() -> None:
    host = ModelHost(128 << 20)
    domid = host.create(max_pages=50)
    e = filling(host, domid, pv_domain().to_stream("xl", batch=16))
    assert isinstance(e, RequestError)
    assert str(e) == f"dom{domid} may have 0x32 pages, and the stream has 0x40 so far: give it more memory"
    assert (e.needed, e.available) == (64, 50)
    assert host.info(domid).pages == 48


def test_a_host_without_memory_says_how_far_it_came() -> None:
    guest, heap = suspended("linear"), Heap()
    save(guest.host, guest.domid, heap, config=CONFIG)
    e = refused(bytes(heap.data), ModelHost(84 << 20, seed=3))  # 4 MiB beside dom0 and Xen
    assert isinstance(e, HostError)
    assert "the host gave 0x" in str(e)


def test_only_an_empty_paused_domain_is_filled() -> None:
    host = ModelHost(128 << 20)
    stream = pv_domain().to_stream("xl")
    narrow = host.create(4, max_pages=200)
    assert "a 32-bit domain stays one" in str(filling(host, narrow, stream))
    full = host.create(max_pages=200)
    host.populate_physmap(full, np.arange(3, dtype=np.uint64))
    assert "dom2 has 0x3 pages already" in str(filling(host, full, stream))
    running = host.create(max_pages=200)
    host.unpause(running)
    assert "dom3 is running" in str(filling(host, running, stream))


def test_more_vcpus_than_the_domain_has() -> None:
    host = ModelHost(128 << 20)
    domid = host.create(vcpus=2, max_pages=200)
    e = filling(host, domid, pv_domain(vcpus=4).to_stream("xl"))
    assert "has 2 vcpus, and the stream has state of vcpu3" in str(e)


def test_a_name_that_is_taken_and_a_pipe_that_says_too_little() -> None:
    host = ModelHost(128 << 20)
    domain = pv_domain()
    made(domain.to_stream("xl"), host)
    assert "a domain called 'made' is there already, dom1" in str(refused(domain.to_stream("xl"), host))
    with piped(bytes(domain.to_stream("libxl"))) as fd:
        source = Input(os.dup(fd), "pipe")
        with pytest.raises(RequestError, match="pipe has no configuration that says how many vcpus"):
            restore_domain(host, source)
        source.close()


def test_an_hvm_domain_is_told_for_one() -> None:
    assert "a saved HVM domain" in str(refused(hvm_stream("xl", pages=4)))


def test_a_second_libxc_stream_is_refused() -> None:
    stream = pv_domain().to_stream("xenopsd")
    at = stream.find("image header")
    end = stream.find("END")
    e = refused(Stream([*stream[: end + 1], *stream[at - 1 : end + 1], *stream[end + 1 :]]))
    assert isinstance(e, OutOfOrder)
    assert "a second libxc stream" in str(e)


# --- guests that cannot be made --------------------------------------------------------------------------------------


@BOTH
def test_an_entry_beyond_the_end_is_named(width: Width) -> None:
    domain = pv_domain(width=width)
    table = next(pfn for pfn in sorted(domain.types) if domain.types[pfn] & ~PIN == 1)
    slot = int(np.flatnonzero(domain.table(table) & np.uint64(1))[-1])
    domain.table(table)[slot] = domain.entries << 12 | 1
    e = refused(domain.to_stream("xl"))
    assert isinstance(e, Fault)
    assert (e.address, e.level, e.entry) == (table, 1, slot)
    assert f"Bad entry L1[{slot}] of pfn {table:#x}: pfn {domain.entries:#x} is beyond the end of its p2m" in str(e)


def test_a_superpage_is_named() -> None:
    domain = pv_domain()
    table = next(pfn for pfn in sorted(domain.types) if domain.types[pfn] & ~PIN == L2TAB)
    domain.table(table)[7] = 3 << 12 | 0x81
    e = refused(domain.to_stream("xl"))
    assert "superpage (0x3081), which PV has not" in str(e)


def test_a_four_level_table_in_a_32_bit_guest() -> None:
    domain = pv_domain(width=4)
    page = domain.places.data[0]
    domain.types[page] = 4
    assert "a table of that level in a 32-bit guest" in str(refused(domain.to_stream("xl")))


@BOTH
def test_what_start_info_and_vcpus_name_must_be_there(width: Width) -> None:
    levels = 4 if width == 8 else 3

    def why(change: Any) -> str:
        domain = pv_domain(width=width, vcpus=2)
        change(domain)
        e = refused(domain.to_stream("xl"))
        assert isinstance(e, GuestError)
        return str(e)

    register = "rdx" if width == 8 else "edx"

    def put(path: str, value: int, vcpu: int = 0) -> Any:
        def change(domain: Any) -> None:
            context = domain.vcpus[vcpu]
            if path == "rdx":
                context["user_regs"][register] = value
            elif path == "gdt":
                context["gdt_frames"][0] = value
            elif path == "ents":
                context["gdt_ents"] = value
            elif path == "cr3":
                context["ctrlreg"][3] = (value << 12) & (256**width - 1)
            elif path == "cr1":
                context["ctrlreg"][1] = value
            elif path == "store":
                domain.start_info["store_mfn"] = value
            else:
                domain.start_info["console"]["domU"]["mfn"] = value

        return change

    assert "Start Info (pfn 0xfffff) out of range" in why(put("rdx", 0xFFFFF))
    assert "is no start info page" in why(lambda d: put("rdx", d.places.data[0])(d))
    assert f"has bad type L{levels}TAB_PIN, expected NOTAB" in why(lambda d: put("rdx", d.places.top)(d))
    assert "vcpu1's GDT frame 0 (pfn 0x60) has bad mfn: the stream has no such page" in why(put("gdt", 0x60, 1))
    assert "GDT entry count (7169) of vcpu0 out of range (max 7168)" in why(put("ents", 7169))
    assert f"vcpu1's cr3 (pfn 0x5) has bad type NOTAB, expected L{levels}TAB" in why(put("cr3", 5, 1))
    assert "XenStore (pfn 0x60) has bad mfn" in why(put("store", 0x60))
    assert "Console (pfn 0x70) out of range" in why(put("console", 0x70))
    if width == 8:
        assert "vcpu0's cr1 is 0x5000, without the mark of a pfn" in why(put("cr1", 0x5000))
        assert "vcpu1's cr1 (pfn 0x5) has bad type NOTAB" in why(put("cr1", 0x5001, 1))


def test_vcpu_0_must_have_come() -> None:
    domain = pv_domain(vcpus=2)
    stream = domain.to_stream("xl")
    at = stream.find("X86_PV_VCPU_BASIC")
    del stream[at]
    assert "Sender didn't send vcpu0's basic state" in str(refused(stream))


def test_a_table_that_xen_does_not_take_is_xens_to_refuse() -> None:
    """The page table that maps itself writable: what Xen says, and nothing is left."""
    domain = pv_domain()
    table = next(pfn for pfn in sorted(domain.types) if domain.types[pfn] & ~PIN == 1)
    domain.table(table)[:] = table << 12 | 3
    assert isinstance(refused(domain.to_stream("xl")), HostError)


@BOTH
def test_the_p2ms_own_frames(width: Width) -> None:
    def why(change: Any) -> str:
        domain = pv_domain(width=width, pfns=[*range(60), *range(5000, 5010)])
        change(domain)
        e = refused(domain.to_stream("xl"))
        assert isinstance(e, GuestError)
        return str(e)

    def frame(at: int, pfn: int) -> Any:
        def change(domain: Any) -> None:
            domain.p2m_pfns[at] = pfn

        return change

    assert "p2m_frame_list[0] (pfn 0x40) has bad mfn: the stream has no such page" in why(frame(0, 64))
    assert "p2m_frame_list[1] (pfn 0xffffff) out of range" in why(frame(1, 0xFFFFFF))
    assert "expected NOTAB" in why(lambda d: frame(0, d.places.top)(d))
    last = len(pv_domain(width=width, pfns=[*range(60), *range(5000, 5010)]).p2m_pfns) - 1
    said = why(lambda d: frame(last, int(d.p2m_pfns[0]))(d))
    assert "has pages, and stands in more places: one would overwrite the other" in said


def test_a_p2m_with_a_hole_between_its_records() -> None:
    domain = pv_domain()
    stream = domain.to_stream("xl")
    stream.after("X86_PV_P2M_FRAMES", WIRE.p2m_frames(1024, 1100, [int(domain.p2m_pfns[0])]))
    assert "p2m_frame_list[1] did not come" in str(refused(stream))


def test_a_checkpoint_before_all_state_came_is_no_state() -> None:
    domain = pv_domain()
    stream = domain.to_stream("libxc")
    stream.after("PAGE_DATA", WIRE.checkpoint(), WIRE.page_data([(0, NOTAB)], [bytes(PAGE)]), nth=-1)
    e = refused(stream)
    assert "Sender didn't send vcpu0's basic state" in str(e)
    stream = domain.to_stream("libxc")
    stream.drop("SHARED_INFO")
    stream.before("END", WIRE.checkpoint(), WIRE.shared_info(bytes(domain.shared_page)))
    assert "its shared info did not come before the last checkpoint" in str(refused(stream))


@pytest.mark.parametrize("kind", [OutOfOrder, Malformed, Truncated])
def test_whatever_rule_breaks_ends_it(kind: type[StreamError]) -> None:
    stream = pv_domain().to_stream("xl")
    if kind is OutOfOrder:
        stream.drop("X86_PV_INFO")
    elif kind is Malformed:
        stream.before("END", WIRE.page_data([(5000, NOTAB)], [bytes(PAGE)]))
    else:
        stream.drop("libxl END")
    assert type(refused(stream)) is kind
