"""Layouts, compared with those of stock libxc on real Xen, and with independent arithmetic."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from tests.support.images import GIB, MIB, P2M, TIB, UNMAPPED, image, layouts, sized
from tests.support.memory_limit import peak_memory_below
from tests.support.writers.kernel import BASE, LEGACY, PV32, PV64, Kernel, Load, kernel32, note, quad, word
from tests.vectors.make import DEMO, FOR_DEMO, RECIPES, Recipe
from xenpv.abi.x86 import LEVELS, PTE_RW, VCPU_GUEST_CONTEXT
from xenpv.abi.xen import SHARED_INFO, SIF_MOD_START_PFN, SIF_VIRT_P2M_4TOOLS, START_INFO
from xenpv.errors import ImageError, RequestError
from xenpv.frames import U8, U64, Mask
from xenpv.image import start
from xenpv.image.kernel import KernelImage
from xenpv.image.layout import Layout, Part, plan
from xenpv.image.request import Request
from xenpv.memory import frame_tree
from xenpv.memory.page_tables import as_ptes, count_tables, decode_page_tables, pte_frames
from xenpv.source.saved import SavedDomain


def start_of(layout: Layout, part: Part) -> int:
    segment = layout.segment(part)
    assert segment is not None
    return segment.first


# --- against stock libxc ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [*RECIPES], ids=lambda recipe: recipe.name)
def test_is_what_libxc_built(recipe: Recipe, tmp_path: Path) -> None:
    """Stock toolstacks of Xen 4.14, 4.17 and 4.20 built these domains, whose start info is as it was, and whose page
    tables still map what they did: litmus adds entries to the top one only.
    """
    path = tmp_path / "vector.save"
    path.write_bytes(lzma.decompress((DEMO if recipe is FOR_DEMO else recipe.path).read_bytes()))
    with SavedDomain.open(str(path)) as saved:
        assert saved.start_info_pfn is not None
        page = saved.memory.page(saved.start_info_pfn)
        info = START_INFO.read(page, 8)
        # What litmus was when it was built shows in where its page tables begin: behind it and three pages.
        end = int(info["pt_base"]) - BASE - 3 * 4096
        litmus = image(Kernel(notes=[*PV64, P2M], loads=[Load(0x10_0000, b"", end - 0x10_0000)]))
        request = Request(recipe.memory * MIB, vcpus=recipe.vcpus, cmdline=f"p2m={recipe.form}", virt_p2m_4tools=False)
        layout = plan(litmus, request)
        # A domain that is being saved has pfns in the place of these two mfns.
        assert page == start.start_info(
            layout,
            shared_info=int(info["shared_info"]),
            store_mfn=layout.start_info.store_pfn,
            store_evtchn=int(info["store_evtchn"]),
            console_mfn=layout.start_info.console_pfn,
            console_evtchn=int(info["console"]["domU"]["evtchn"]),
        )
        assert layout.start_info.pfn == saved.start_info_pfn
        table_pfns = []
        for level, pfns, planned in start.iter_page_tables(layout):
            theirs = as_ptes(saved.frames.pages(pfns))
            compared = planned != 0 if level == 4 else np.ones(planned.shape, np.bool_)
            assert (pte_frames(theirs) == pte_frames(planned))[compared].all()
            assert ((theirs ^ planned) & np.uint64(1) == 0)[compared].all()
            assert (theirs & planned & PTE_RW == theirs & PTE_RW)[compared].all()
            lost = pte_frames(planned)[compared & (theirs & PTE_RW != planned & PTE_RW)]
            assert (lost >= layout.segments[10].first).all(), (
                "only litmus's own tables and GDT, which are in the padding, differ"
            )
            table_pfns += pfns.tolist()
        assert len(table_pfns) == 8
        assert set(layout.mapped[1].pfns) | set(layout.read_only[1]) == set(
            range(int(info["first_p2m_pfn"]), int(info["first_p2m_pfn"]) + int(info["nr_p2m_frames"]))
        )


# --- any kernel, any size --------------------------------------------------------------------------------------------


@given(layouts())
def test_plan_every_page_is_in_one_segment(case: tuple[KernelImage, Request, Layout]) -> None:
    """Rule: segments cover every pfn exactly once, ascending."""
    kernel, request, layout = case
    at = 0
    for segment in layout.segments:
        assert segment.first == at
        assert segment.pages > 0
        assert segment.part is Part.FREE or -(-segment.size // 4096) == segment.pages
        at += segment.pages
    assert at == layout.nr_pages == request.pages
    for segment in layout.segments:
        if segment.vaddr is not None:
            assert layout.pfn_of(segment.vaddr) == segment.first
            assert layout.pfn_of(segment.vaddr + segment.pages * 4096 - 1) == segment.pfns[-1]
    assert layout.pfn_of(kernel.kernel_start) == start_of(layout, Part.KERNEL)
    assert layout.pfn_of(layout.mapping_end) is None


@given(layouts())
def test_plan_initial_mapping_ends_as_xen_h_says(case: tuple[KernelImage, Request, Layout]) -> None:
    """Rule (xen.h, start-of-day memory layout): it ends at 4 MiB, after at least 512 KiB of padding."""
    kernel, _, layout = case
    stack = layout.segment(Part.STACK)
    assert stack is not None
    assert stack.vaddr is not None
    assert layout.mapping_end % (4 * MIB) == 0
    padding = layout.mapping_end - stack.vaddr - 4096
    assert padding >= 512 << 10
    assert padding < (512 << 10) + 8 * MIB
    assert layout.mapping_end == kernel.virt_base + layout.mapped[0].count * 4096
    order = [Part.KERNEL, Part.START_INFO, Part.XENSTORE, Part.CONSOLE, Part.TABLES, Part.STACK, Part.PADDING]
    assert [start_of(layout, part) for part in order] == sorted(start_of(layout, part) for part in order)


@given(layouts())
def test_plan_has_exactly_the_page_tables_needed(case: tuple[KernelImage, Request, Layout]) -> None:
    """Rule: there is one table for each place that maps a page; 32-bit guests also have all later L2 tables."""
    _, _, layout = case
    first = layout.mapped[0]
    needed = count_tables(first.vaddr, first.count, layout.width)  # type: ignore[arg-type]
    if layout.width == 4:  # Xen wants all L2 up to the last
        needed[2] = 4 - (layout.virt_base >> 30)
    assert layout.start_info.nr_pt_frames == sum(needed.values())
    places = {
        level: [at for span in layout.spans(level) for at in range(span.place, span.place + span.count)]
        for level in range(1, LEVELS[layout.width] + 1)
    }
    for level, at in places.items():
        assert len(at) == len(set(at)), "two tables at one place"
        naive = {
            p >> 9 * level
            for span in layout.mapped
            for p in (*range(span.place, span.place + span.count, 1 << 9 * level), span.place + span.count - 1)
        }
        assert naive <= set(at)
        if layout.width == 8:
            assert naive == set(at)
    assert (
        sum(map(len, places.values())) == sum(span.count for span in layout.tables) == sum(map(len, layout.read_only))
    )


@given(layouts(most=1 << 17))
def test_page_tables_map_exactly_the_mapping_and_are_read_only(
    case: tuple[KernelImage, Request, Layout],
) -> None:
    """Rule: the tables map what ``mapped`` says, and no table writable. The walk is that of saved domains."""
    _, _, layout = case
    content: dict[int, U64] = {}
    for _, pfns, entries in start.iter_page_tables(layout, batch=3):
        assert not content.keys() & set(pfns.tolist())
        content |= dict(zip(pfns.tolist(), entries, strict=True))
    assert sorted(content) == [pfn for part in layout.read_only for pfn in part]

    def read(pfns: U64) -> tuple[U8, Mask]:
        pages = np.array([content[pfn] for pfn in pfns.tolist()])
        return pages.view(np.uint8).reshape(-1, 4096), np.ones(len(pfns), np.bool_)

    levels = LEVELS[layout.width]
    leaves, unreadable = frame_tree.walk_tree(
        read, layout.registers.cr3_pfn, levels, range(1 << 9 * levels), decode_page_tables
    )
    assert unreadable == []
    assert (leaves.count == 1).all()
    expected = sorted((span.place + n, span.first + n) for span in layout.mapped for n in range(span.count))
    assert list(zip(leaves.first.tolist(), leaves.frame.tolist(), strict=True)) == expected
    for span in layout.spans(1):
        entries = start.table_entries(layout, span, range(span.count))
        there = entries != 0
        assert ((entries[there] & PTE_RW == 0) == np.isin(pte_frames(entries[there]), list(content))).all()


@given(layouts())
def test_plan_start_info_and_registers_name_the_segments(case: tuple[KernelImage, Request, Layout]) -> None:
    """Rule: every address and pfn in start info and registers is that of a segment."""
    kernel, request, layout = case
    info, base = layout.start_info, layout.virt_base
    assert info.nr_pages == request.pages
    assert info.pt_base == base + layout.registers.cr3_pfn * 4096 == base + layout.tables[0].first * 4096
    assert layout.registers.si == base + info.pfn * 4096
    assert layout.registers.sp == base + (start_of(layout, Part.STACK) + 1) * 4096
    assert layout.registers.ip == kernel.entry
    assert [info.store_pfn, info.console_pfn] == [info.pfn + 1, info.pfn + 2]
    assert layout.pfn_of(info.mfn_list) == start_of(layout, Part.P2M)
    if layout.p2m_outside:
        assert info.mfn_list == kernel.parameters.init_p2m
        assert info.first_p2m_pfn == start_of(layout, Part.P2M) >= layout.mapped[0].count
        assert info.first_p2m_pfn + info.nr_p2m_frames == layout.used
    else:
        assert (info.first_p2m_pfn, info.nr_p2m_frames) == (0, 0)
    unmapped = kernel.parameters.mod_start_pfn and request.ramdisk > 0
    assert bool(info.flags & SIF_MOD_START_PFN) == unmapped
    assert info.flags & SIF_VIRT_P2M_4TOOLS
    if request.ramdisk:
        at = info.mod_start if unmapped else layout.pfn_of(info.mod_start)
        assert at == start_of(layout, Part.RAMDISK)
        assert (at >= layout.mapped[0].count) == unmapped
        assert info.mod_len == (-(-request.ramdisk // 4096) * 4096 if unmapped else request.ramdisk)
    page = start.start_info(layout, shared_info=0x5000, store_mfn=7, store_evtchn=1, console_mfn=8, console_evtchn=2)
    read = START_INFO.read(page, layout.width)
    assert len(page) == 4096
    for name in ("pt_base", "nr_pt_frames", "mfn_list", "mod_start", "mod_len", "nr_pages", "flags", "first_p2m_pfn"):
        assert int(read[name]) == getattr(info, name)
    assert (int(read["store_mfn"]), int(read["console"]["domU"]["mfn"]), int(read["shared_info"])) == (7, 8, 0x5000)
    assert bytes(read["cmd_line"]) == request.cmdline.encode()


def test_plan_of_any_size_allocates_little() -> None:
    kernel = sized(20, P2M, UNMAPPED)
    for memory in (32 * MIB, 640 * GIB, 16 * TIB):
        with peak_memory_below(1 << 20):
            layout = plan(kernel, Request(memory, ramdisk=4 * MIB))
        assert len(layout.segments) <= 18
    at, outside = layout.segment(Part.P2M), layout.spans(1)[1]
    assert at is not None
    assert (at.pages, outside.count, layout.spans(2)[1].count) == (1 << 23, 1 << 14, 32)
    last = start.table_entries(layout, outside, range(outside.count - 1, outside.count))
    assert pte_frames(last)[0, -1] == at.pfns[-1]


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_plan_equals_a_layout_by_hand() -> None:
    layout = plan(sized(2, P2M, UNMAPPED), Request(64 * MIB, ramdisk=10_000, cmdline="console=hvc0"))
    rows = [(str(s.part), s.first, s.pages, s.level) for s in layout.segments]
    assert rows == [
        ("gap", 0, 256, None),
        ("kernel", 256, 256, None),
        ("start info", 512, 1, None),
        ("xenstore", 513, 1, None),
        ("console", 514, 1, None),
        ("page tables", 515, 1, 4),
        ("page tables", 516, 1, 3),
        ("page tables", 517, 1, 2),
        ("page tables", 518, 2, 1),
        ("boot stack", 520, 1, None),
        ("padding", 521, 503, None),
        ("ramdisk", 1024, 3, None),
        ("p2m list", 1027, 32, None),
        ("p2m's page tables", 1059, 1, 3),
        ("p2m's page tables", 1060, 1, 2),
        ("p2m's page tables", 1061, 1, 1),
        ("free", 1062, 16384 - 1062, None),
    ]
    assert layout.read_only == (range(515, 520), range(1059, 1062))
    assert (layout.start_info.mod_start, layout.start_info.mod_len) == (1024, 3 * 4096)
    assert layout.remarks == ()
    assert [layout.pfn_of(at) for at in (BASE, (1 << 39) + 4096, 1 << 47, 0, BASE + 4 * MIB)] == [
        0,
        1028,
        None,
        None,
        None,
    ]


def test_plan_of_32_bit_kernel() -> None:
    layout = plan(image(kernel32()), Request(64 * MIB))
    assert layout.guest_type == "xen-3.0-x86_32p"
    context = VCPU_GUEST_CONTEXT.read(start.vcpu_context(layout, cr3=0x1234_5000), 4)
    assert (int(context["user_regs"]["eip"]), int(context["user_regs"]["cs"])) == (0xC010_0000, 0xE019)
    assert {int(context["user_regs"][name]) for name in ("ds", "es", "fs", "gs", "ss")} == {0xE021}
    assert (int(context["vm_assist"]), int(context["ctrlreg"][3])) == (8, 0x1234_5000)
    # The L2 of the last GiB is there, whatever is mapped.
    low = plan(
        image(kernel32(notes=[*PV32, note(3, word(0x4000_0000)), note(1, word(0x4010_0000))])), Request(64 * MIB)
    )
    [l2] = low.spans(2)
    [top] = start.table_entries(low, low.tables[0], range(1))
    assert (l2.place, l2.count) == (1, 3)
    assert pte_frames(top[:5]).tolist() == [0, l2.first, l2.first + 1, l2.first + 2, 0]
    assert not low.top_below_4g
    old = LEGACY.replace("[extended-cr3]", "")
    loads = [Load(0xC010_0000, b"", 5)]
    legacy = image(kernel32(place="__xen_guest", legacy=old, loads=loads, entry=0xC010_0000))
    assert plan(legacy, Request(64 * MIB)).top_below_4g


def test_vcpu_context_of_64_bit_kernel() -> None:
    layout = plan(sized(2, P2M), Request(64 * MIB))
    context = VCPU_GUEST_CONTEXT.read(start.vcpu_context(layout, cr3=0x77_7000), 8)
    user = context["user_regs"]
    assert [int(user[name]) for name in ("rip", "rsp", "rsi", "rflags", "cs", "ss", "ds", "gs")] == [
        BASE + 0x10_0000, BASE + 521 * 4096, BASE + 512 * 4096, 0x200, 0xE033, 0xE02B, 0, 0,
    ]  # fmt: skip
    assert [int(context[name]) for name in ("flags", "kernel_ss", "kernel_sp", "vm_assist")] == [
        0x24, 0xE02B, BASE + 521 * 4096, 0,
    ]  # fmt: skip
    assert (int(context["debugreg"][6]), int(context["debugreg"][7])) == (0xFFFF_0FF0, 0x400)
    shared = SHARED_INFO.read(start.shared_info(8), 8)
    assert (shared["vcpu_info"]["evtchn_upcall_mask"] == 1).all()
    assert sum(start.shared_info(4)) == 32


def test_plan_ramdisk_without_mod_start_pfn_is_mapped() -> None:
    layout = plan(sized(2), Request(64 * MIB, ramdisk=10_000))
    assert (layout.start_info.mod_start, layout.start_info.mod_len) == (BASE + 2 * MIB, 10_000)
    assert start_of(layout, Part.P2M) == 512 + 3
    assert layout.start_info.mfn_list == BASE + 515 * 4096
    assert layout.start_info.flags == SIF_VIRT_P2M_4TOOLS


def test_plan_hypercall_page() -> None:
    assert plan(sized(2, note(2, quad(BASE + 0x10_3000))), Request(64 * MIB)).hypercall_pfn == 0x103
    assert plan(sized(2), Request(64 * MIB)).hypercall_pfn is None
    with pytest.raises(ImageError, match=r"0xffffffff84000000 .*0x4000\b") as e:
        plan(sized(2, note(2, quad(BASE + 64 * MIB))), Request(64 * MIB))
    assert e.value.note == "HYPERCALL_PAGE"


def test_plan_memory_with_holes() -> None:
    ranges = (range(0x2000, 0x3000), range(0x8000, 0x9000), range(0x2000))
    layout = plan(sized(2, P2M), Request(64 * MIB, ranges=ranges))
    assert layout.ranges == (range(0x3000), range(0x8000, 0x9000))
    assert (layout.nr_pages, layout.p2m_entries, layout.start_info.nr_pages) == (0x4000, 0x9000, 0x4000)
    assert start_of(layout, Part.FREE) == layout.used == 1024 + 0x9000 // 512 + 3
    assert [s.pfns for s in layout.segments if s.part is Part.FREE] == [range(layout.used, 0x3000), ranges[1]]
    for bad, numbers in (
        ((range(0x1000), range(0x2000, 0x5000)), "0x1000 pages"),
        ((range(1, 0x4001),), "0x0 pages"),
        ((range(0x3000), range(0x2000, 0x3000)), "0x0 to 0x3000 and 0x2000 to 0x3000"),
        ((range(0x3000),), "0x3000 pages .* 0x4000 pages"),
        ((range(0, 0x8000, 2),), "step 2"),
    ):
        kernel = sized(2, P2M) if bad[0] != range(0x1000) else sized(20, P2M)
        with pytest.raises(RequestError, match=numbers):
            plan(kernel, Request(64 * MIB, ranges=bad))


def test_plan_remarks() -> None:
    [remark] = plan(sized(20), Request(505 * GIB)).remarks
    assert remark.startswith("the initial mapping reaches beyond the addresses of one L2 page, 0xffffffff80000000 to")
    assert plan(sized(20), Request(400 * GIB)).remarks == ()
    assert "libxc counts pages in 32 bits" in plan(sized(20, P2M), Request(16 * TIB)).remarks[0]
    kernel = sized(20, P2M, UNMAPPED)
    assert plan(kernel, Request(4 * GIB, ramdisk=1 * GIB)).remarks == ()
    assert "no ramdisk of more than" in plan(kernel, Request(4 * GIB, ramdisk=GIB + 1)).remarks[0]
    assert "xl gives whole MiB only" in plan(sized(20, P2M), Request(64 * MIB + 4096)).remarks[0]


@pytest.mark.parametrize("kernel", [sized(2, P2M), image(kernel32())], ids=["64-bit", "32-bit"])
def test_table_entries_have_the_flags_of_libxc(kernel: KernelImage) -> None:
    layout = plan(kernel, Request(64 * MIB))
    for level, _, entries in start.iter_page_tables(layout):
        there = entries[entries != 0]
        assert (pte_frames(there) < 0x4000).all()
        flags = there & np.uint64(0xFFF)
        if level > 1:
            assert set(flags.tolist()) == {0x67}  # P, RW, US, A, D
        else:
            tables = np.isin(pte_frames(there), [pfn for part in layout.read_only for pfn in part])
            assert (flags == np.where(tables, 0x21, 0x23)).all()  # P, RW but for tables, A
