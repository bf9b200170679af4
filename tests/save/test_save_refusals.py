"""Domains that cannot be saved: said in words, with the numbers, and before a byte is written wherever it can be."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.kernel_guest import Guest
from tests.support.model_guest import pfns
from tests.support.saving import (
    CONFIG,
    MemorySink,
    PatchedHost,
    a_page,
    arch,
    failed,
    refused,
    rewriting,
    saved,
    second_list,
    suspended,
    table_of,
    tree_of,
    with_context,
)
from xenpv.abi.declare import Width
from xenpv.abi.x86 import PTE_P, PTE_PSE
from xenpv.errors import Fault, GuestError, HostError, RequestError
from xenpv.frames import FOREIGN, U8, U64, DomId, PageType
from xenpv.host.protocol import DomainInfo
from xenpv.io.progress import Progress
from xenpv.save.save import save
from xenpv.stream.envelope import Kind


def test_save_p2m_beyond_2_to_the_32_pfns_is_refused() -> None:
    guest = Guest.boot("linear")
    guest.do("spread", (1 << 32) + 512)
    guest.do("suspend")
    e = refused(guest)
    assert isinstance(e, RequestError)
    assert (e.needed, e.available) == ((1 << 32) + 512, 1 << 32)
    assert "0x1000001ff" in str(e)
    assert "--xenpv-only" in str(e)


def test_save_p2m_with_a_hole_is_refused() -> None:
    guest = Guest.boot("tree3")
    missing = a_page(guest)
    guest.do("suspend")
    tree_of(guest, {8: 0, 9: missing}, 10 * 512)
    assert "no leaf for pfns 0x1000 to 0x11ff" in str(refused(guest))


def test_save_unreadable_p2m_table_is_refused_with_its_mfn() -> None:
    guest = Guest.boot("tree3")
    guest.do("suspend")
    arch(guest, max_pfn=2 << 18)
    foreign = int(guest.host.frames.owned(1)[7])
    second_list(guest, foreign)
    assert str(refused(guest)).endswith(f"its p2m cannot be read: the table at mfn {foreign:#x}, 1 above the leaves")


def test_save_domain_gone_during_vcpus_is_refused() -> None:
    """ESRCH may be of a vcpu, which is then offline, or of the domain."""
    guest, asked = suspended("tree3"), list[int]()

    def vcpu_context(domid: DomId, vcpu: int) -> bytes:
        asked.append(vcpu)
        if vcpu:
            raise HostError("gone", op="getvcpucontext", errno=3)
        return guest.host.vcpu_context(domid, vcpu)

    def info(domid: DomId) -> DomainInfo:
        if 1 in asked:
            raise HostError("no such domain", op="getdomaininfo", errno=3)
        return replace(guest.host.info(domid), max_vcpu=1)

    e = refused(guest, PatchedHost(guest, vcpu_context=vcpu_context, info=info))
    assert isinstance(e, HostError)
    assert e.op == "getdomaininfo"


def test_save_populated_leaf_in_two_places_is_refused() -> None:
    guest = Guest.boot("tree3")
    guest.do("suspend")
    leaf = int(guest.live.p2m.leaves.frame[0])
    tree_of(guest, {8: leaf, 9: a_page(guest)}, 10 * 512)
    assert "p2m_frame_list[0] names 512 pages and is used 2 times" in str(refused(guest))


def test_save_leaf_of_another_domain_is_refused_with_its_mfn() -> None:
    guest = Guest.boot("tree3")
    guest.do("suspend")
    foreign = int(guest.host.frames.owned(1)[7])
    tree_of(guest, {8: foreign}, 9 * 512)
    assert f"Bad mfn for p2m_frame_list[8]: mfn {foreign:#x}" in str(refused(guest))


def test_save_leaf_unknown_to_m2p_is_refused_with_its_mfn() -> None:
    guest = Guest.boot("tree3")
    guest.do("suspend")
    leaf = guest.live.p2m.leaves.frame[3:4]
    guest.host.hypervisor.machphys_update(guest.domid, leaf, np.array([5], np.uint64))
    e = refused(guest)
    assert f"Bad mfn for p2m_frame_list[3]: mfn {int(leaf[0]):#x}, m2p[{int(leaf[0]):#x}] = 0x5" in str(e)


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ("none", "dom1 exposes no p2m: its anchor is 0x0, which is not set up yet"),
        ("invalid", "exposes no p2m: its anchor is 0xffffffffffffffff, which is to be looked for elsewhere"),
    ],
)
def test_save_guest_without_p2m_is_refused(form: str, why: str) -> None:
    guest = Guest.boot(form)
    guest.do("suspend")
    e = refused(guest)
    assert isinstance(e, GuestError)
    assert why in str(e)


def test_save_tree_short_of_max_pfn_is_refused() -> None:
    """Four levels in the kernel, three exposed: "must be refused beyond what is exposed, never truncated"."""
    guest = Guest.boot("tree4hidden")
    guest.do("move", guest.do("free_pfns")[:5], pfns(5, 1 << 27))
    guest.do("suspend")
    assert "max_pfn 0x8000004 too large for p2m tree: the guest exposes 3 levels" in str(refused(guest))


def test_save_guest_stopped_during_p2m_change_is_refused() -> None:
    guest = Guest.boot("linear")
    guest.do("suspend")
    arch(guest, p2m_generation=3)
    assert "p2m_generation 0x3 is odd" in str(refused(guest))
    arch(guest, p2m_generation=4, max_pfn=0)
    assert "arch.max_pfn is 0" in str(refused(guest))


@pytest.mark.parametrize(("width", "level"), [(8, 1), (8, 2), (8, 4), (4, 1), (4, 2), (4, 3)])
def test_save_page_table_entry_with_foreign_mfn_is_refused(width: Width, level: int) -> None:
    guest = suspended("tree3", width)
    table = table_of(guest, level)
    slot = 3 if level == 3 else 77
    foreign = int(guest.host.frames.owned(1)[7])
    e = failed(guest, rewriting(guest, table, [slot], foreign << 12 | PTE_P))
    assert isinstance(e, Fault)
    pfn = int(guest.host.m2p(table)[0])
    assert (e.space, e.address, e.level, e.entry) == ("pfn", pfn, level, slot)
    assert f"Bad entry L{level}[{slot}] of pfn {pfn:#x}: mfn {foreign:#x} is no frame of the domain" in str(e)


def test_save_superpage_is_refused_with_its_entry() -> None:
    guest = suspended("tree3")
    table = table_of(guest, 2)
    own = int(guest.live.p2m.lookup(pfns(1, 2048))[0])
    e = failed(guest, rewriting(guest, table, [77], own << 12 | PTE_P | PTE_PSE))
    assert isinstance(e, Fault)
    assert (e.level, e.entry) == (2, 77)
    assert "superpage" in str(e)


def test_save_bad_entry_with_foreign_p2m_entries_hints_at_them() -> None:
    guest = Guest.boot("tree3")
    guest.do("balloon_out", guest.do("free_pfns")[-1:])
    leaf = guest.live.p2m.leaves.frame[-1:]
    guest.do("suspend")
    words_of = guest.host.frames.read(leaf).view("<u8").copy()
    words_of[0, -1] = FOREIGN | np.uint64(0x1234)
    guest.host.write_frames(guest.domid, leaf, words_of.view(np.uint8))
    e = failed(guest, rewriting(guest, table_of(guest, 1), [77], 0x1234 << 12 | PTE_P))
    assert "; its p2m maps 1 pages of other domains" in str(e)


def test_save_l4_table_of_a_32_bit_guest_is_refused() -> None:
    guest = suspended("tree3", 4)
    mfn = guest.live.p2m.lookup(np.array([4000], np.uint64))[0]

    def page_types(domid: DomId, wanted: U64) -> U8:
        return np.where(wanted == mfn, np.uint8(PageType.L4TAB), guest.host.page_types(domid, wanted))

    assert "an L4 table in a 32-bit guest" in str(failed(guest, PatchedHost(guest, page_types=page_types)))


def test_save_unknown_page_type_and_unmappable_page_are_refused() -> None:
    guest = suspended("tree3")
    mfn = guest.live.p2m.lookup(np.array([4000], np.uint64))[0]

    def page_types(domid: DomId, wanted: U64) -> U8:
        return np.where(wanted == mfn, np.uint8(6), guest.host.page_types(domid, wanted))

    def map_frames(domid: DomId, mfns: U64) -> tuple[U8, U8]:
        pages, mapped = guest.host.map_frames(domid, mfns)
        mapped[mfns == mfn] = 0
        return pages, mapped

    assert "Unknown type 0x6 for pfn 0xfa0" in str(failed(guest, PatchedHost(guest, page_types=page_types)))
    e = failed(guest, PatchedHost(guest, map_frames=map_frames))
    assert isinstance(e, HostError)
    assert "pfn 0xfa0" in str(e)


def test_save_invalid_vcpu_context_is_refused() -> None:
    guest = suspended("tree3")
    foreign = int(guest.host.frames.owned(1)[7])
    for fields, why in (
        ({"gdt_ents": 7169}, "GDT entry count (7169) of vcpu0 out of range (max 7168)"),
        ({"gdt_ents": 1, "gdt_frames": [foreign] * 16}, f"Bad mfn for frame 0 of vcpu0's GDT: mfn {foreign:#x}"),
        ({"ctrlreg_3": foreign << 12}, f"Bad mfn for vcpu0's cr3: mfn {foreign:#x}"),
        ({"ctrlreg_1": foreign << 12}, f"Bad mfn for vcpu0's cr1: mfn {foreign:#x}"),
        ({"user_regs_rdx": foreign}, f"Bad mfn for suspend record: mfn {foreign:#x}"),
        ({"flags": 0}, "vcpu 0 is offline"),
    ):
        assert why in str(refused(guest, with_context(guest, **fields)))


def test_save_vcpu_context_refused_by_xen_is_refused() -> None:
    guest = suspended("tree3")

    def refusing(no: int, last: int) -> PatchedHost:
        def vcpu_context(domid: DomId, vcpu: int) -> bytes:
            if vcpu == max(last, 0):
                raise HostError("no", op="getvcpucontext", errno=no)
            return guest.host.vcpu_context(domid, vcpu)

        def info(domid: DomId) -> DomainInfo:
            return replace(guest.host.info(domid), max_vcpu=last)

        return PatchedHost(guest, vcpu_context=vcpu_context, info=info)

    assert isinstance(refused(guest, refusing(61, 0)), HostError)
    assert isinstance(refused(guest, refusing(1, 1)), HostError)
    e = refused(guest, refusing(22, -1))
    assert isinstance(e, HostError), "a domain without vcpus"


def test_save_running_domain_is_refused() -> None:
    e = refused(Guest.boot("linear"))
    assert isinstance(e, RequestError)
    assert str(e) == "dom1 (litmus) is running: suspend it first"


def test_save_paused_domain_not_suspended_is_refused() -> None:
    """Its rdx may be anything; what a restorer writes to has to be start info."""
    guest = Guest.boot("linear")
    guest.host.pause(guest.domid)
    e = refused(guest)
    assert "Bad mfn for suspend record" in str(e)
    assert str(e).endswith("its kernel has not suspended")
    other = int(guest.live.p2m.lookup(np.array([4000], np.uint64))[0])
    e = refused(guest, with_context(guest, user_regs_rdx=other))
    assert "pfn 0xfa0, its suspend record, is no start info page: it is stopped" in str(e)


@pytest.mark.parametrize(("changed", "why"), [({"hvm": True}, "is an HVM domain"), ({"dying": True}, "is dying")])
def test_save_hvm_or_dying_domain_is_refused(changed: dict[str, Any], why: str) -> None:
    guest = suspended("linear")
    host = PatchedHost(guest, info=lambda domid: replace(guest.host.info(domid), **changed))
    e = refused(guest, host)
    assert isinstance(e, RequestError)
    assert why in str(e)


def test_save_domain_resumed_meanwhile_is_refused(tmp_path: Path) -> None:
    guest = suspended("linear")

    def progress(status: Progress) -> None:
        if status.done == status.total:
            guest.host.resume(guest.domid)

    with pytest.raises(HostError, match="was resumed during the save"):
        saved(guest, tmp_path / "x", progress=progress)
    assert os.listdir(tmp_path) == []


def test_save_config_without_place_in_envelope_is_refused() -> None:
    guest, heap = suspended("linear"), MemorySink()
    for kind, config in ((Kind.LIBXC, CONFIG), (Kind.XL, b"name = 'x'")):
        with pytest.raises(RequestError):
            save(guest.host, guest.domid, heap, envelope=kind, config=config)
    assert heap.calls == []
