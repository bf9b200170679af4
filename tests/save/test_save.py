"""Domains on ModelHost, saved: what is in the file is what the host had, and nothing is found wrong with it."""

from __future__ import annotations

import lzma
from dataclasses import replace
from pathlib import Path
from struct import pack
from typing import Any

import numpy as np
import pytest

import lab
from tests.support.kernel_guest import SOME_FORMS, WIDTHS, Guest
from tests.support.memory_limit import peak_memory_below
from tests.support.model_guest import pfns
from tests.support.reference_restore import restored_from
from tests.support.requirements import cannot_run
from tests.support.saved_files import verify_file, verify_pipe
from tests.support.saving import (
    BOTH,
    CONFIG,
    MemorySink,
    PatchedHost,
    a_page,
    arch,
    failed,
    of_host,
    rewriting,
    saved,
    second_list,
    suspended,
    tree_of,
    with_context,
)
from tests.support.stream_reading import one_chunk, read
from tests.support.stream_rewriting import rewrite_stream
from tests.vectors.make import DEMO, FOR_DEMO, RECIPES
from xenpv.abi.declare import Width
from xenpv.abi.domctl import EXT_VCPUCONTEXT
from xenpv.abi.x86 import PAGE_SIZE, PTE_P, PTE_PSE, VCPU_GUEST_CONTEXT, XEN_PAE_L2_FIRST
from xenpv.errors import Fault, HostError
from xenpv.frames import FOREIGN, IDENTITY, IS_POPULATED, IS_TABLE, NO_FRAME, PAGES_PER_BATCH, U8, U64, DomId, PageType
from xenpv.host.model.host import ModelHost
from xenpv.host.protocol import DomainInfo, VcpuState
from xenpv.io.progress import Phase, Progress
from xenpv.io.stream_input import Input
from xenpv.memory.p2m_reader import names_local_frame
from xenpv.memory.p2m_writer import encode_entries
from xenpv.memory.page_tables import as_ptes, pte_frames
from xenpv.restore.restore import restore_domain
from xenpv.save.pages import ENTRIES_MAX
from xenpv.save.save import save
from xenpv.source.saved import SavedDomain
from xenpv.stream.envelope import Kind
from xenpv.stream.page_data import PageData
from xenpv.stream.records import P2MLeaves, X86PVP2MFrames
from xenpv.stream.writer import KINDS


@pytest.mark.parametrize(("width", "form"), SOME_FORMS)
def test_save_file_holds_what_the_host_has(width: Width, form: str, tmp_path: Path) -> None:
    guest = suspended(form, width)
    path = tmp_path / "x.save"
    summary = saved(guest, path, config=CONFIG)
    result = verify_file(path)
    assert not result.findings, str(result)
    assert verify_pipe(path.read_bytes()).rules <= {"not-checked"}, "a tree's tables may have gone by"
    at, kinds, pages = of_host(guest)
    assert (summary.pages, summary.page_tables) == (len(at), int(np.count_nonzero(IS_TABLE[kinds])))
    assert summary.bytes == path.stat().st_size
    assert (summary.entries, summary.not_owned, summary.without_content) == (70_600, 0, 0)
    with SavedDomain.open(str(path)) as domain:
        contents = domain.contents
        extents = contents.index.extents
        assert (extents.total, extents.stop) == (len(at), 70_600)
        np.testing.assert_array_equal(domain.frames.types(at), kinds)
        np.testing.assert_array_equal(domain.frames.pages(at), pages)
        assert domain.start_info_pfn == guest.layout.start_info
        assert domain.cr3(0) == guest.layout.tables
        assert contents.shared_info is not None
        assert contents.shared_info.data == guest.host.shared_info(guest.domid)
        p2m = guest.live.p2m
        leaves = p2m.leaves.frame_of(np.arange(p2m.leaf_count))
        np.testing.assert_array_equal(contents.p2m_frames, guest.host.m2p(leaves))


@pytest.mark.parametrize(("width", "form"), SOME_FORMS)
def test_save_restored_guest_runs_on_another_host(width: Width, form: str, tmp_path: Path) -> None:
    """On another host, where every mfn is another: its pages are as they were, and its p2m says where they are now."""
    guest = suspended(form, width)
    saved(guest, tmp_path / "x")
    free = pfns(600, 70_000)
    other = ModelHost(1 << 30, seed=9)
    moved = Guest(other, restored_from(tmp_path / "x", other), guest.kernel, guest.layout)
    assert moved.do("resume") is False
    assert set(moved.assert_consistent()) <= {"physmap-invalid"}
    assert not len(moved.do("check_pattern", moved.do("free_pfns"), 7))
    assert np.isin(free, moved.do("free_pfns")).all()
    assert (moved.live.p2m.lookup(free) != guest.live.p2m.lookup(free)).all()
    moved.do("balloon_in", pfns(100, 200_000))
    assert set(moved.assert_consistent()) <= {"physmap-invalid"}


def test_save_restored_stock_file_gives_the_same_records(tmp_path: Path) -> None:
    """A file of real Xen's, given to a host as it was when xl saved it, and saved again: the same pages and records."""
    recipe = next(recipe for recipe in RECIPES if recipe.form == "linear")
    theirs, ours, host = tmp_path / "theirs", tmp_path / "ours", ModelHost(1 << 30)
    theirs.write_bytes(lzma.decompress((DEMO if recipe is FOR_DEMO else recipe.path).read_bytes()))
    domid = restored_from(theirs, host, suspended=True)
    heap = MemorySink()
    summary = save(host, domid, heap)
    ours.write_bytes(heap.data)
    assert not verify_file(ours).findings, str(verify_file(ours))
    with SavedDomain.open(str(theirs)) as a, SavedDomain.open(str(ours)) as b:
        assert a.contents.pv_info == b.contents.pv_info
        assert a.contents.p2m_record == b.contents.p2m_record
        assert a.contents.vcpus[0].basic == b.contents.vcpus[0].basic
        there = a.contents.index.pfns(IS_POPULATED)
        assert summary.pages == len(there)
        np.testing.assert_array_equal(b.contents.index.pfns(IS_POPULATED), there)
        np.testing.assert_array_equal(b.frames.types(there), a.frames.types(there))
        same = there[~np.isin(there, a.contents.p2m_frames)]  # which are mfns of another host here
        np.testing.assert_array_equal(b.frames.pages(same), a.frames.pages(same))


@pytest.mark.parametrize("kind", KINDS)
@BOTH
def test_save_every_envelope_is_rewritten_byte_for_byte(kind: Kind, width: Width) -> None:
    """What was saved and read, and is written again from what was read, is the same."""
    heap = MemorySink()
    save(suspended("both", width).host, DomId(1), heap, envelope=kind, config=CONFIG if kind is Kind.XL else b"")
    assert rewrite_stream(bytes(heap.data)) == heap.data


@BOTH
def test_save_records_are_in_libxenguests_order(width: Width) -> None:
    """xg_sr_save.c: 1024 pfns to a record, ascending; the records of a PV save in their order."""
    heap = MemorySink()
    save(suspended("linear", width).host, DomId(1), heap, envelope=Kind.LIBXC)
    reading = read(one_chunk(bytes(heap.data)), collect=True)
    assert reading.breaches == []
    names = [name for i, name in enumerate(reading.names) if name != "PAGE_DATA" or reading.names[i - 1] != name]
    assert names == [
        "image header", "domain header", "X86_PV_INFO", "X86_CPUID_POLICY", "X86_MSR_POLICY", "STATIC_DATA_END",
        "X86_PV_P2M_FRAMES", "PAGE_DATA", "X86_TSC_INFO", "SHARED_INFO", "X86_PV_VCPU_BASIC", "X86_PV_VCPU_EXTENDED",
        "X86_PV_VCPU_XSAVE", "END",
    ]  # fmt: skip
    data = [event for event in reading.events if isinstance(event, PageData)]
    assert [len(event.entries) for event in data] == [PAGES_PER_BATCH] * 3 + [4096 - 95 - 3 * PAGES_PER_BATCH]
    sent = np.concatenate([event.pfns for event in data])
    assert (np.diff(sent.astype(np.int64)) > 0).all()


def test_save_pages_without_content_fill_long_records() -> None:
    """A restorer bounds a record's entries by its length alone, xg_sr_restore.c handle_page_data()."""
    guest = Guest.boot("linear", pages=1 << 18, order=9)
    guest.do("write_pattern", pfns(2000, 100_000), 7)
    guest.do("suspend")

    def page_types(domid: DomId, mfns: U64) -> U8:
        kinds = guest.host.page_types(domid, mfns)
        kinds[(kinds == PageType.NOTAB) & ~guest.host.frames.was_written(mfns)] = PageType.XALLOC
        return kinds

    heap = MemorySink()
    summary = save(PatchedHost(guest, page_types=page_types), guest.domid, heap, envelope=Kind.LIBXC)
    reading = read(one_chunk(bytes(heap.data)), collect=True)
    assert reading.breaches == []
    data = [event for event in reading.events if isinstance(event, PageData)]
    np.testing.assert_array_equal(np.concatenate([event.pfns for event in data]), pfns(1 << 18))
    assert max(len(event.entries) for event in data) == ENTRIES_MAX
    assert max(event.pages for event in data) == PAGES_PER_BATCH
    assert len(data) <= summary.pages // PAGES_PER_BATCH + (1 << 18) // ENTRIES_MAX + 1
    assert summary.pages + summary.without_content == 1 << 18


def test_save_every_envelope_passes_verify_stream_v2(tmp_path: Path) -> None:
    try:
        tools = lab.peer_tools("4.17")
    except lab.LabError as e:
        cannot_run(str(e))
    for width in WIDTHS:
        for kind in KINDS:
            path = tmp_path / f"{width}.{kind}"
            saved(suspended("linear", width), path, envelope=kind, config=CONFIG if kind is Kind.XL else b"")
            done = tools.run("verify-stream-v2", "-f", str(kind), "-i", str(path))
            assert done.returncode == 0, done


def test_save_progress_reaches_its_end(tmp_path: Path) -> None:
    guest, seen = suspended("linear"), list[Progress]()
    summary = saved(guest, tmp_path / "x", progress=seen.append)
    pages = guest.host.info(guest.domid).pages
    told = [0, *range(PAGES_PER_BATCH, pages, PAGES_PER_BATCH), pages, pages]
    assert [(one.done, one.total) for one in seen] == [(n, pages) for n in told]
    transfers = [one.transfer for one in seen if one.transfer is not None]
    assert [(one.iteration, one.pages) for one in transfers] == [(0, n) for n in told]
    assert [one.phase for one in transfers] == [Phase.COPYING] * (len(seen) - 1) + [Phase.DONE]
    assert transfers[-1].bytes == summary.bytes


@pytest.mark.parametrize(
    ("form", "width", "stretch"),
    [
        ("linear", 8, 1 << 32),
        ("rooted4", 8, 1 << 32),
        ("marked", 8, 1 << 30),
        ("tree3", 8, 1 << 27),
        ("linear", 4, 1 << 28),
        ("tree3", 4, 1 << 28),
    ],
)
def test_save_sparse_domain_of_16_tib_costs_by_its_pages(form: str, width: Width, stretch: int, tmp_path: Path) -> None:
    guest = Guest.boot(form, width)
    guest.do("spread", stretch)
    guest.do("write_pattern", guest.do("free_pfns"), 3)
    guest.do("suspend")
    path = tmp_path / "x"
    frames_of_p2m = stretch * width // PAGE_SIZE * 8  # a record has no holes: 64 MiB of it at 16 TiB
    mapped = list[int]()

    def map_frames(domid: DomId, mfns: U64) -> tuple[U8, U8]:
        mapped.append(len(mfns))
        return guest.host.map_frames(domid, mfns)

    # The model copies what is mapped: 8 MiB, and 8 MiB that are being written.
    with peak_memory_below((20 << 20) + frames_of_p2m * 6 // 5):
        summary = saved(guest, path, PatchedHost(guest, map_frames=map_frames))
    assert (summary.entries, summary.pages) == (stretch, 4096)
    assert path.stat().st_size < frames_of_p2m + 4096 * 4104 + (1 << 16)
    assert sum(mapped) < 1 << 16, "frames mapped: its pages, and as much again for each read of the p2m"
    if stretch <= 1 << 30:  # a verifier looks at every entry of the record
        result = verify_file(path)
        assert not result.findings, str(result)


@pytest.mark.parametrize("stretch", [(1 << 32) + 512, 1 << 36])
def test_save_beyond_16_tib_restores_by_xenpvs_record(stretch: int, tmp_path: Path) -> None:
    """And back: the guest goes on, on another host."""
    guest = Guest.boot("linear", pages=3000)
    guest.do("spread", stretch)
    free = guest.do("free_pfns")
    guest.do("write_pattern", free, 3)
    guest.do("suspend")
    path, host = tmp_path / "x", ModelHost(1 << 30, seed=5)
    with peak_memory_below(24 << 20):
        summary = saved(guest, path, libxc_compatible=False)
    assert (summary.entries, summary.pages) == (stretch, 3000)
    assert path.stat().st_size < 3000 * 4104 + (1 << 16)
    result = verify_file(path)
    assert not result.findings, str(result)
    with SavedDomain.open(str(path)) as domain:
        record = domain.contents.p2m_record
        assert isinstance(record, P2MLeaves)
        assert record.entries == domain.p2m.entries == stretch
        np.testing.assert_array_equal(domain.p2m.lookup(free), guest.live.p2m.lookup(free))
    source = Input.open(str(path))
    restored = restore_domain(host, source, name="moved")
    source.close()
    moved = Guest(host, restored.domid, guest.kernel, guest.layout)
    assert moved.do("resume") is False
    assert not len(moved.do("check_pattern", free, 3))


def test_save_xenpv_record_is_used_only_if_allowed_and_shorter(tmp_path: Path) -> None:
    guest = Guest.boot("linear")
    guest.do("spread", 1 << 30)
    guest.do("suspend")
    stock, ours = tmp_path / "stock", tmp_path / "ours"
    saved(guest, stock)
    saved(guest, ours, libxc_compatible=False)
    assert ours.stat().st_size < stock.stat().st_size - (15 << 20)
    assert not verify_file(ours).findings, str(verify_file(ours))
    with SavedDomain.open(str(stock)) as a, SavedDomain.open(str(ours)) as b:
        assert isinstance(a.contents.p2m_record, X86PVP2MFrames)
        assert isinstance(b.contents.p2m_record, P2MLeaves)
        assert a.contents.p2m_leaf_runs.equals(b.contents.p2m_leaf_runs)


@BOTH
def test_save_p2m_uniform_end_is_cut_to_one_leaf(width: Width, tmp_path: Path) -> None:
    """map_p2m_tree(): "Check for actual lower max_pfn"; here by leaves."""
    guest = Guest.boot("tree3", width)
    per, n = PAGE_SIZE // width, 4096 * width // PAGE_SIZE
    missing = a_page(guest)
    guest.do("suspend")
    tree_of(guest, dict.fromkeys(range(n, n + 100), missing), (n + 100) * per)
    path = tmp_path / "x"
    summary = saved(guest, path)
    assert summary.entries == (n + 1) * per
    assert not verify_file(path).findings, str(verify_file(path))
    with SavedDomain.open(str(path)) as domain:
        assert len(domain.contents.p2m_frames) == n + 1


def test_save_p2m_uniform_end_across_frame_lists_is_cut_to_one_leaf(tmp_path: Path) -> None:
    """The rest of one frame list, and all of the next."""
    guest = Guest.boot("tree3")
    missing, mid = a_page(guest), a_page(guest, 2)
    guest.do("suspend")
    words_of = np.full((1, 512), missing, np.uint64)
    guest.host.write_frames(guest.domid, np.array([mid], np.uint64), words_of.view(np.uint8))
    tree_of(guest, dict.fromkeys(range(8, 512), missing), 2 << 18)
    second_list(guest, mid)
    assert saved(guest, tmp_path / "x").entries == 9 * 512
    assert not verify_file(tmp_path / "x").findings


def test_save_p2m_end_of_two_leaves_is_kept(tmp_path: Path) -> None:
    guest = Guest.boot("tree3")
    one, other = a_page(guest), a_page(guest, 2)
    guest.do("suspend")
    tree_of(guest, {8: one, 9: other, 10: one}, 11 * 512)
    assert saved(guest, tmp_path / "x").entries == 11 * 512
    assert not verify_file(tmp_path / "x").findings


def test_save_odd_generation_without_a_linear_p2m_is_ignored(tmp_path: Path) -> None:
    guest = Guest.boot("tree3")
    guest.do("suspend")
    arch(guest, p2m_generation=3)
    saved(guest, tmp_path / "x")


@BOTH
def test_save_foreign_and_identity_entries_are_counted_only(width: Width, tmp_path: Path) -> None:
    guest = Guest.boot("tree3", width)
    guest.do("balloon_out", guest.do("free_pfns")[-10:])
    leaf = guest.live.p2m.leaves.frame[-1:]
    guest.do("suspend")
    table = guest.host.frames.read(leaf).view(f"<u{width}").copy()
    shift = np.uint64(0 if width == 8 else 32)
    table[0, -10:-7] = (FOREIGN >> shift) | np.uint64(0x1234)
    table[0, -7:-5] = (IDENTITY >> shift) | np.uint64(0x5678)
    guest.host.write_frames(guest.domid, leaf, table.view(np.uint8))
    summary = saved(guest, tmp_path / "x")
    assert (summary.foreign, summary.identity, summary.not_owned, summary.pages) == (3, 2, 0, 4086)
    assert not verify_file(tmp_path / "x").findings


def test_save_shared_leaf_of_marks_counts_per_place(tmp_path: Path) -> None:
    """Linux has one leaf for all stretches that are identity, or nothing."""
    guest = Guest.boot("tree3")
    leaf, end = a_page(guest), a_page(guest, 2)
    guest.do("suspend")
    page = np.full((1, PAGE_SIZE // 8), IDENTITY | np.uint64(5), np.uint64)
    guest.host.write_frames(guest.domid, np.array([leaf], np.uint64), page.view(np.uint8))
    tree_of(guest, {8: leaf, 9: leaf, 10: leaf, 11: end}, 12 * 512)
    assert saved(guest, tmp_path / "x").identity == 3 * 512
    assert not verify_file(tmp_path / "x").findings


def test_save_entry_with_another_domains_frame_is_sent_as_xtab(tmp_path: Path) -> None:
    """write_batch(): getpageframeinfo says XTAB of what is not the domain's, and that is what is sent."""
    guest = Guest.boot("tree3")
    guest.do("balloon_out", guest.do("free_pfns")[-2:])
    leaf = guest.live.p2m.leaves.frame[-1:]
    guest.do("suspend")
    table = guest.host.frames.read(leaf).view("<u8").copy()
    table[0, -1] = guest.host.frames.owned(1)[7]
    guest.host.write_frames(guest.domid, leaf, table.view(np.uint8))
    summary = saved(guest, tmp_path / "x")
    assert (summary.not_owned, summary.pages) == (1, 4094)
    with SavedDomain.open(str(tmp_path / "x")) as domain:
        kind = domain.frames.types(np.array([4095], np.uint64))[0]
    assert kind == PageType.XTAB
    assert verify_file(tmp_path / "x").rules == {"page-missing"}


def test_save_pages_without_content_keep_their_type(tmp_path: Path) -> None:
    guest = Guest.boot("linear")
    guest.do("suspend")
    mfns = guest.live.p2m.lookup(np.array([4000, 4001], np.uint64))

    def page_types(domid: DomId, wanted: U64) -> U8:
        kinds = guest.host.page_types(domid, wanted)
        kinds[wanted == mfns[0]], kinds[wanted == mfns[1]] = PageType.BROKEN, PageType.XALLOC
        return kinds

    summary = saved(guest, tmp_path / "x", PatchedHost(guest, page_types=page_types))
    assert (summary.without_content, summary.pages) == (2, 4094)
    with SavedDomain.open(str(tmp_path / "x")) as domain:
        assert domain.frames.types(np.array([4000, 4001], np.uint64)).tolist() == [PageType.BROKEN, PageType.XALLOC]


def test_save_xens_entries_of_a_pae_l2_are_cleared(tmp_path: Path) -> None:
    """normalise_pagetable(): the L2 that has Xen's mappings is known by the first of them."""
    guest = suspended("tree3", 4)
    top = guest.host.frames.read(guest.live.p2m.lookup(np.array([guest.layout.tables], np.uint64)))
    last = pte_frames(as_ptes(top))[0, 3:4]
    xens = int(guest.host.frames.owned(1)[7])
    host = rewriting(guest, last, slice(XEN_PAE_L2_FIRST, 512), xens << 12 | PTE_P | PTE_PSE)
    saved(guest, tmp_path / "x", host)
    assert not verify_file(tmp_path / "x").findings
    other = next(m for m in pte_frames(as_ptes(top))[0, :3].tolist() if m)
    host = rewriting(guest, np.array([other], np.uint64), [XEN_PAE_L2_FIRST + 1], xens << 12 | PTE_P)
    e = failed(guest, host)
    assert isinstance(e, Fault)
    assert e.entry == XEN_PAE_L2_FIRST + 1


@BOTH
def test_save_content_is_written_before_the_next_mapping(width: Width, tmp_path: Path) -> None:
    """Host.map_frames: "it is gone when the next call of map_frames on this host returns"."""
    guest = suspended("both", width)
    expected, live = MemorySink(), list[U8]()
    save(guest.host, guest.domid, expected)

    def map_frames(domid: DomId, mfns: U64) -> tuple[U8, U8]:
        pages, mapped = guest.host.map_frames(domid, mfns)
        for gone in live:
            gone[:] = 0xDB
        live[:] = [pages]
        return pages, mapped

    heap = MemorySink()
    save(PatchedHost(guest, map_frames=map_frames), guest.domid, heap)
    assert heap.data == expected.data
    assert max(max(call) for call in heap.calls) > 512 * PAGE_SIZE, "runs of pages are one buffer"


@BOTH
def test_save_vcpu_context_holds_pfns(width: Width, tmp_path: Path) -> None:
    guest = Guest.boot("tree3", width)  # which has mapped nothing that could be a GDT
    guest.do("suspend")
    gdt = guest.live.p2m.lookup(np.array([4000, 4001], np.uint64))
    top = guest.live.p2m.lookup(np.array([guest.layout.tables], np.uint64))[0]
    fields: dict[str, Any] = {"gdt_ents": 600, "gdt_frames": [*gdt.tolist(), *[99] * 14]}
    if width == 8:
        fields["ctrlreg_1"] = int(top) << 12
    saved(guest, tmp_path / "x", with_context(guest, **fields))
    assert not verify_file(tmp_path / "x").findings
    with SavedDomain.open(str(tmp_path / "x")) as domain:
        context = domain.vcpu_context(0)
        assert context is not None
        assert context["gdt_frames"].tolist() == [4000, 4001, *[99] * 14], "what is in use; the rest is as it was"
        assert domain.cr3(0, user=True) == (guest.layout.tables if width == 8 else None)


def test_save_offline_vcpus_are_left_out(tmp_path: Path) -> None:
    guest = suspended("tree3")
    offline = np.frombuffer(bytearray(guest.host.vcpu_context(guest.domid, 0)), VCPU_GUEST_CONTEXT[8]).copy()
    offline["flags"] = 0

    def vcpu_context(domid: DomId, vcpu: int) -> bytes:
        if vcpu in {0, 3}:
            return guest.host.vcpu_context(domid, 0)
        if vcpu == 1:
            return offline.tobytes()
        raise HostError("not initialised", op="getvcpucontext", errno=61)

    def info(domid: DomId) -> DomainInfo:
        return replace(guest.host.info(domid), max_vcpu=3)

    def vcpu_state(domid: DomId, vcpu: int) -> VcpuState:
        extended = pack("<II", vcpu, EXT_VCPUCONTEXT.size(8)).ljust(EXT_VCPUCONTEXT.size(8), b"\0")
        return VcpuState(extended=extended, xsave=bytes(16 * vcpu), msrs=bytes(16 * vcpu))

    host = PatchedHost(guest, vcpu_context=vcpu_context, vcpu_state=vcpu_state, info=info)
    saved(guest, tmp_path / "x", host)
    with SavedDomain.open(str(tmp_path / "x")) as domain:
        assert domain.vcpus == [0, 3]
        third = domain.vcpu_context(3)
        assert third is not None
        record = int(guest.live.p2m.lookup(np.array([guest.layout.start_info], np.uint64))[0])
        assert third["user_regs"]["rdx"] == record, "only vcpu 0's is the suspend record"
        names = [run.name.removeprefix("X86_PV_VCPU_") for run in domain.contents.record_groups if "VCPU" in run.name]
        assert names == ["BASIC", "EXTENDED", "BASIC", "EXTENDED", "XSAVE", "MSRS"], "what is empty is left out"


def test_save_suspended_and_paused_domain_stays_paused(tmp_path: Path) -> None:
    guest = suspended("linear")
    guest.host.pause(guest.domid)
    saved(guest, tmp_path / "x")
    assert guest.host.info(guest.domid).paused


def test_save_leaves_the_domain_unchanged(tmp_path: Path) -> None:
    """And its own p2m is in the file as it is: mfns of this host."""
    guest = suspended("both")
    before = of_host(guest), guest.host.info(guest.domid), guest.host.vcpu_context(guest.domid, 0)
    saved(guest, tmp_path / "x")
    after = of_host(guest), guest.host.info(guest.domid), guest.host.vcpu_context(guest.domid, 0)
    for a, b in zip(before[0], after[0], strict=True):
        np.testing.assert_array_equal(a, b)
    assert before[1:] == after[1:]
    with SavedDomain.open(str(tmp_path / "x")) as domain:
        for leaves in domain.p2m.iter_leaves():
            wanted = leaves.pfns.reshape(-1)
            np.testing.assert_array_equal(leaves.mfns.reshape(-1), guest.live.p2m.lookup(wanted))
            assert names_local_frame(leaves.mfns[leaves.mfns != NO_FRAME]).all()
            assert len(encode_entries(leaves.mfns, 8)) == len(leaves.mfns)
