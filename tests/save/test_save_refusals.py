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


def place_of(e: BaseException) -> tuple[int | None, int | None]:
    """The pfn and the mfn that a GuestError names."""
    assert isinstance(e, GuestError)
    return e.pfn, e.mfn


def test_save_p2m_beyond_2_to_the_32_pfns_is_refused() -> None:
    guest = Guest.boot("linear")
    guest.do("spread", (1 << 32) + 512)
    guest.do("suspend")
    e = refused(guest)
    assert isinstance(e, RequestError)
    assert (e.needed, e.available) == ((1 << 32) + 512, 1 << 32)
    assert "--xenpv-only" in str(e), "the option to give"


def test_save_p2m_with_a_hole_is_refused() -> None:
    guest = Guest.boot("tree3")
    missing = a_page(guest)
    guest.do("suspend")
    tree_of(guest, {8: 0, 9: missing}, 10 * 512)
    assert place_of(refused(guest)) == (0x1000, None)


def test_save_unreadable_p2m_table_is_refused_with_its_mfn() -> None:
    guest = Guest.boot("tree3")
    guest.do("suspend")
    arch(guest, max_pfn=2 << 18)
    foreign = int(guest.host.frames.owned(1)[7])
    second_list(guest, foreign)
    assert place_of(refused(guest)) == (None, foreign)


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
    assert place_of(refused(guest)) == (0, None)


def test_save_leaf_of_another_domain_is_refused_with_its_mfn() -> None:
    guest = Guest.boot("tree3")
    guest.do("suspend")
    foreign = int(guest.host.frames.owned(1)[7])
    tree_of(guest, {8: foreign}, 9 * 512)
    e = refused(guest)
    assert place_of(e) == (None, foreign)
    assert f"Bad mfn for p2m_frame_list[8]: mfn {foreign:#x}" in str(e)  # contract: libxenguest's own text


def test_save_leaf_unknown_to_m2p_is_refused_with_its_mfn() -> None:
    guest = Guest.boot("tree3")
    guest.do("suspend")
    leaf = guest.live.p2m.leaves.frame[3:4]
    guest.host.hypervisor.machphys_update(guest.domid, leaf, np.array([5], np.uint64))
    e = refused(guest)
    assert place_of(e) == (None, int(leaf[0]))
    assert f"m2p[{int(leaf[0]):#x}] = 0x5" in str(e)  # contract: libxenguest's own text


@pytest.mark.parametrize(
    ("form", "frame_list_list"),
    [("none", "0x0"), ("invalid", "0xffffffffffffffff")],
)
def test_save_guest_without_p2m_is_refused(form: str, frame_list_list: str) -> None:
    guest = Guest.boot(form)
    guest.do("suspend")
    e = refused(guest)
    assert isinstance(e, GuestError)
    assert f" {frame_list_list}," in str(e)


def test_save_tree_short_of_max_pfn_is_refused() -> None:
    """Four levels in the kernel, three exposed: "must be refused beyond what is exposed, never truncated"."""
    guest = Guest.boot("tree4hidden")
    guest.do("move", guest.do("free_pfns")[:5], pfns(5, 1 << 27))
    guest.do("suspend")
    e = refused(guest)
    assert isinstance(e, GuestError)
    assert "max_pfn 0x8000004 too large for p2m tree" in str(e)  # contract: libxenguest's own text


def test_save_guest_stopped_during_p2m_change_is_refused() -> None:
    guest = Guest.boot("linear")
    guest.do("suspend")
    arch(guest, p2m_generation=3)
    assert "p2m_generation 0x3 " in str(refused(guest))  # the field and its value
    arch(guest, p2m_generation=4, max_pfn=0)
    assert "arch.max_pfn " in str(refused(guest))


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
    assert f"mfn {foreign:#x} " in str(e)


def test_save_superpage_is_refused_with_its_entry() -> None:
    guest = suspended("tree3")
    table = table_of(guest, 2)
    own = int(guest.live.p2m.lookup(pfns(1, 2048))[0])
    e = failed(guest, rewriting(guest, table, [77], own << 12 | PTE_P | PTE_PSE))
    assert isinstance(e, Fault)
    assert (e.level, e.entry) == (2, 77)


def test_save_bad_entry_with_foreign_p2m_entries_hints_at_them() -> None:
    guest = Guest.boot("tree3")
    guest.do("balloon_out", guest.do("free_pfns")[-1:])
    leaf = guest.live.p2m.leaves.frame[-1:]
    guest.do("suspend")
    words_of = guest.host.frames.read(leaf).view("<u8").copy()
    words_of[0, -1] = FOREIGN | np.uint64(0x1234)
    guest.host.write_frames(guest.domid, leaf, words_of.view(np.uint8))
    e = failed(guest, rewriting(guest, table_of(guest, 1), [77], 0x1234 << 12 | PTE_P))
    assert isinstance(e, Fault)
    assert (e.level, e.entry) == (1, 77)
    assert " 1 pages " in str(e), "how many the p2m has of other domains"


def test_save_l4_table_of_a_32_bit_guest_is_refused() -> None:
    guest = suspended("tree3", 4)
    mfn = guest.live.p2m.lookup(np.array([4000], np.uint64))[0]

    def page_types(domid: DomId, wanted: U64) -> U8:
        return np.where(wanted == mfn, np.uint8(PageType.L4TAB), guest.host.page_types(domid, wanted))

    e = failed(guest, PatchedHost(guest, page_types=page_types))
    assert isinstance(e, Fault)
    assert (e.address, e.level, e.entry) == (4000, 4, None)


def test_save_unknown_page_type_and_unmappable_page_are_refused() -> None:
    guest = suspended("tree3")
    mfn = guest.live.p2m.lookup(np.array([4000], np.uint64))[0]

    def page_types(domid: DomId, wanted: U64) -> U8:
        return np.where(wanted == mfn, np.uint8(6), guest.host.page_types(domid, wanted))

    def map_frames(domid: DomId, mfns: U64) -> tuple[U8, U8]:
        pages, mapped = guest.host.map_frames(domid, mfns)
        mapped[mfns == mfn] = 0
        return pages, mapped

    e = failed(guest, PatchedHost(guest, page_types=page_types))
    assert "Unknown type 0x6 for pfn 0xfa0" in str(e)  # contract: libxenguest's own text
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
        ({"flags": 0}, "vcpu 0 "),
    ):
        assert why in str(refused(guest, with_context(guest, **fields)))  # contract: libxenguest's own texts


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
    assert "dom1 (litmus) " in str(e)


def test_save_paused_domain_not_suspended_is_refused() -> None:
    """Its rdx may be anything; what a restorer writes to has to be start info."""
    guest = Guest.boot("linear")
    guest.host.pause(guest.domid)
    e = refused(guest)
    assert isinstance(e, GuestError)
    assert "Bad mfn for suspend record" in str(e)  # contract: libxenguest's own text
    other = int(guest.live.p2m.lookup(np.array([4000], np.uint64))[0])
    e = refused(guest, with_context(guest, user_regs_rdx=other))
    assert place_of(e) == (4000, None)


@pytest.mark.parametrize("changed", [{"hvm": True}, {"dying": True}], ids=["hvm", "dying"])
def test_save_hvm_or_dying_domain_is_refused(changed: dict[str, Any]) -> None:
    guest = suspended("linear")
    host = PatchedHost(guest, info=lambda domid: replace(guest.host.info(domid), **changed))
    assert isinstance(refused(guest, host), RequestError)


def test_save_domain_resumed_meanwhile_is_refused(tmp_path: Path) -> None:
    guest = suspended("linear")

    def progress(status: Progress) -> None:
        if status.done == status.total:
            guest.host.resume(guest.domid)

    with pytest.raises(HostError) as e:
        saved(guest, tmp_path / "x", progress=progress)
    assert (e.value.op, e.value.errno) == ("save", None)
    assert os.listdir(tmp_path) == []


def test_save_config_without_place_in_envelope_is_refused() -> None:
    guest, heap = suspended("linear"), MemorySink()
    for kind, config in ((Kind.LIBXC, CONFIG), (Kind.XL, b"name = 'x'")):
        with pytest.raises(RequestError):
            save(guest.host, guest.domid, heap, envelope=kind, config=config)
    assert heap.calls == []
