"""build() on ModelHost: content page for page, and that a failure leaves nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.images import GIB, MIB, P2M, UNMAPPED, image, layouts
from tests.support.model_invariants import check_invariants
from tests.support.refused_calls import BUILDING, RefusingCall
from tests.support.restoring import xenstore_nodes
from tests.support.writers.kernel import BASE, PV64, Kernel, Load, Section, kernel32, note, quad, text
from xenpv.abi.x86 import PAGE_SIZE
from xenpv.abi.xen import START_INFO
from xenpv.build.build import Built, build
from xenpv.errors import HostError, RequestError
from xenpv.findings import Findings
from xenpv.frames import NO_FRAME, U64, DomId
from xenpv.guest_model.kernel import Kernel as GuestKernel
from xenpv.guest_model.p2m_forms import parse_form
from xenpv.host.model.host import ModelHost
from xenpv.image.kernel import KernelImage
from xenpv.image.layout import Layout, Part, plan
from xenpv.image.request import Request
from xenpv.memory.domain import DomainMemory
from xenpv.runs import FrameMap, Runs
from xenpv.source.live import LiveDomain
from xenpv.verify.physmap import PhysmapCheck

RAMDISK = bytes(range(256)) * 40 + b"end"
KERNELS = {
    "64 bit, p2m outside": image(Kernel(notes=[*PV64, P2M, UNMAPPED])),
    "64 bit, p2m inside": image(Kernel()),
    "32 bit": image(kernel32()),
}


class FragmentedHost(ModelHost):
    """A host that has only three extents of 2 MiB, and otherwise single pages in no order."""

    extents_left = 3

    def populate_physmap(self, domid: DomId, pfns: U64, order: int = 0) -> U64:
        if order and domid:
            pfns, self.extents_left = pfns[: self.extents_left], max(0, self.extents_left - len(pfns))
        return super().populate_physmap(domid, pfns, order)


def build_kernel(
    kernel: KernelImage, memory: int = 32 * MIB, host: ModelHost | None = None
) -> tuple[ModelHost, Layout, Built]:
    """Build a domain with RAMDISK, by default on a host of 2 GiB."""
    host = host or ModelHost(2 * GIB)
    layout = plan(kernel, Request(memory, ramdisk=len(RAMDISK), cmdline="a=b"))
    return host, layout, build(host, kernel, layout, RAMDISK, name="built")


def memory_of(host: ModelHost, layout: Layout, built: Built) -> DomainMemory:
    """Read the domain by pfn, and by its own page tables."""

    class Frames:
        """Frames of a domain that publishes no p2m yet: the builder's own record serves."""

        def types(self, pfns: U64) -> Any:
            return host.page_types(built.domid, built.memory.lookup(pfns))

        def pages(self, pfns: U64) -> Any:
            pages = host.map_frames(built.domid, built.memory.lookup(pfns))[0].copy()
            tables = np.isin(pfns, np.concatenate([np.array(span.pfns, np.uint64) for span in layout.tables]))
            ptes = pages[tables].view("<u8").reshape(-1, 512)
            present = ptes & np.uint64(1) != 0
            ptes[present] = host.m2p((ptes[present] & np.uint64((1 << 52) - 4096)) >> np.uint64(12)) << np.uint64(
                12
            ) | (ptes[present] & np.uint64(0xFFF))
            pages[tables] = ptes.view(np.uint8).reshape(-1, PAGE_SIZE)
            return pages

    return DomainMemory(Frames(), layout.width, top=layout.registers.cr3_pfn)  # type: ignore[arg-type]


@pytest.mark.parametrize("host_type", [ModelHost, FragmentedHost])
@pytest.mark.parametrize("kernel", KERNELS)
def test_build_puts_everything_where_the_layout_says(kernel: str, host_type: type[ModelHost]) -> None:
    host, layout, built = build_kernel(KERNELS[kernel], host=host_type(2 * GIB))
    memory, info = memory_of(host, layout, built), host.info(built.domid)
    assert (info.pages, info.paused, info.name) == (layout.nr_pages, True, "built")
    pfns = np.arange(layout.nr_pages, dtype=np.uint64)
    mfns = built.memory.lookup(pfns)
    assert len(np.unique(mfns)) == layout.nr_pages
    assert host.m2p(mfns).tolist() == pfns.tolist()
    for segment in KERNELS[kernel].segments:
        content = bytes(KERNELS[kernel].content(segment))
        vaddr = KERNELS[kernel].virtual(segment.paddr)
        assert memory.read_virtual(vaddr, segment.memsz) == content.ljust(segment.memsz, b"\0")
    ramdisk = layout.segment(Part.RAMDISK)
    assert ramdisk is not None
    assert memory.read(ramdisk.first * PAGE_SIZE, ramdisk.pages * PAGE_SIZE).rstrip(b"\0") == RAMDISK
    p2m = memory.read_virtual(layout.start_info.mfn_list, layout.p2m_entries * layout.width)
    assert np.frombuffer(p2m, f"<u{layout.width}").astype(np.uint64).tolist() == mfns.tolist()
    start_info = START_INFO.read(memory.page(layout.start_info.pfn), layout.width)
    assert bytes(start_info["cmd_line"]).rstrip(b"\0") == b"a=b"
    assert (int(start_info["store_mfn"]), int(start_info["console"]["domU"]["mfn"])) == (
        built.xenstore.mfn,
        built.console.mfn,
    )
    assert int(start_info["shared_info"]) == info.shared_info_mfn * PAGE_SIZE
    assert not any(memory.page(layout.start_info.store_pfn) + memory.page(layout.start_info.console_pfn))
    kinds = host.page_types(built.domid, mfns) & 7
    tables = {pfn: span.level for span in layout.tables for pfn in span.pfns}
    assert {pfn: int(kinds[pfn]) for pfn in np.flatnonzero(kinds).tolist()} == tables
    assert host.store.read(f"/local/domain/{built.domid}/console/ring-ref") == str(built.console.mfn).encode()
    check_invariants(host)


@pytest.mark.parametrize("form", ["linear", "tree3", "rooted4"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_build_then_guest_boots_with_sound_physmap(kernel: str, form: str) -> None:
    host, layout, built = build_kernel(KERNELS[kernel], 64 * MIB)
    host.unpause(built.domid)
    assert host.run(built.domid, lambda view: view.memory_map) == layout.nr_pages
    host.run(built.domid, GuestKernel(parse_form(form)).boot)
    findings = Findings()
    PhysmapCheck(LiveDomain(host, host.info(built.domid)), findings).run()
    assert [str(finding) for finding in findings if finding.pfn is None or finding.pfn < layout.nr_pages] == []


def test_build_overlapping_segments_later_content_and_zeros_overwrite() -> None:
    """As libelf loads them; the symbol table that the kernel asks for follows."""
    loads = [Load(0x10_0000, b"a" * 0x2000, 0x2000), Load(0x10_0800, b"b" * 0x400, 0x800), Load(0x10_0C00, b"", 0x100)]
    sections = [Section(".strtab", 3, b"\0name\0"), Section(".symtab", 2, b"s" * 24, link=1)]
    kernel = image(Kernel(notes=[*PV64, note(11, text("yes"))], loads=loads, sections=sections))
    memory = memory_of(*build_kernel(kernel))
    expected = b"a" * 0x800 + b"b" * 0x400 + bytes(0x400) + b"a" * 0x1000
    assert memory.read_virtual(BASE + 0x10_0000, 0x2000) == expected
    assert memory.read_virtual(BASE + 0x10_2000 + 264, 30) == b"s" * 24 + b"\0name\0"


@settings(max_examples=25, deadline=None)
@given(layouts(most=1 << 15))
def test_build_any_plan_populates_all_its_pages(planned: tuple[KernelImage, Request, Layout]) -> None:
    """Rule: whatever plan() accepts can be built, and holds exactly nr_pages pages."""
    kernel, request, layout = planned
    host = ModelHost(2 * GIB)
    built = build(host, kernel, layout, bytes(request.ramdisk))
    assert host.info(built.domid).pages == layout.nr_pages
    host.destroy(built.domid)
    assert [info.domid for info in host.domains()] == [0]


def test_build_keeps_memory_as_runs() -> None:
    _, layout, built = build_kernel(KERNELS["64 bit, p2m outside"], GIB)
    assert len(built.memory.runs) <= layout.nr_pages // 512
    assert built.memory.lookup_range(range(layout.nr_pages, layout.nr_pages + 2)).tolist() == [int(NO_FRAME)] * 2


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5), st.integers(0, 1 << 40)), max_size=6),
    st.integers(0, 40),
    st.integers(0, 40),
)
def test_lookup_range_equals_lookup(runs: list[tuple[int, int, int]], start: int, count: int) -> None:
    """Rule: lookup_range() gives what lookup() gives for each pfn of the range."""
    at, first = 0, []
    for gap, pages, _ in runs:
        first.append(at + gap)
        at += gap + pages
    pfns = Runs(np.array(first, np.uint64), np.array([n for _, n, _ in runs], np.int64))
    memory = FrameMap(pfns, np.array([m for *_, m in runs], np.uint64))
    each = memory.lookup(np.arange(start, start + count, dtype=np.uint64))
    assert memory.lookup_range(range(start, start + count)).tolist() == each.tolist()


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", BUILDING)
def test_build_host_refuses_call_leaves_nothing(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call is refused at its first time and at its last, which another build counts."""
    kernel = image(Kernel(notes=[*PV64, P2M, UNMAPPED, note(2, quad(BASE + 0x10_3000))]))  # with a hypercall page
    layout = plan(kernel, Request(32 * MIB, ramdisk=len(RAMDISK)))
    last = 0
    for nth in ("first", "count", "last"):
        host = ModelHost(2 * GIB)
        before = host.free_pages(), xenstore_nodes(host, "/")
        refusing = RefusingCall(getattr(host, call), {"first": 0, "count": -1, "last": last}[nth])
        monkeypatch.setattr(host, call, refusing)
        if nth == "count":
            build(host, kernel, layout, RAMDISK, config=b"{}")
            last = refusing.calls - 1
            continue
        with pytest.raises(HostError) as e:
            build(host, kernel, layout, RAMDISK, config=b"{}")
        assert e.value.op == "test"
        monkeypatch.undo()
        assert [info.domid for info in host.domains()] == [0]
        assert (host.free_pages(), xenstore_nodes(host, "/")) == before


def test_build_that_fails_and_cannot_destroy_raises_the_first_error(monkeypatch: pytest.MonkeyPatch) -> None:
    host, kernel = ModelHost(256 * MIB), KERNELS["64 bit, p2m outside"]
    monkeypatch.setattr(host, "set_memory_map", RefusingCall(host.set_memory_map, 0))
    monkeypatch.setattr(host, "destroy", RefusingCall(host.destroy, 0))
    with pytest.raises(HostError) as e:
        build(host, kernel, plan(kernel, Request(32 * MIB)))
    [note] = e.value.__notes__
    assert "xl destroy 1" in note
    assert [info.domid for info in host.domains()] == [0, 1]


def test_build_host_with_too_little_memory_raises_before_creating() -> None:
    host = ModelHost(256 * MIB)
    kernel = KERNELS["64 bit, p2m outside"]
    with pytest.raises(RequestError) as e:
        build(host, kernel, plan(kernel, Request(512 * MIB)))
    assert (e.value.needed, e.value.available) == (0x2_0000, host.free_pages())
    assert [info.domid for info in host.domains()] == [0]


def test_build_host_that_populates_too_few_pages_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    host = ModelHost(256 * MIB)
    monkeypatch.setattr(host, "free_pages", lambda: 1 << 40)
    kernel = KERNELS["64 bit, p2m outside"]
    with pytest.raises(HostError) as e:
        build(host, kernel, plan(kernel, Request(512 * MIB)))
    assert e.value.op == "populate_physmap"
    assert [info.domid for info in host.domains()] == [0]


def test_build_ramdisk_of_other_size_than_planned_raises() -> None:
    host, kernel = ModelHost(256 * MIB), KERNELS["64 bit, p2m outside"]
    with pytest.raises(RequestError) as e:
        build(host, kernel, plan(kernel, Request(32 * MIB)), b"12345")
    assert (e.value.needed, e.value.available) == (5, 0)


def test_build_clears_what_the_last_owner_wrote() -> None:
    host, kernel = ModelHost(96 * MIB), image(Kernel(loads=[Load(0x10_0000, b"\x90" * 5000, 9000)]))
    first = host.create(max_pages=6000)
    mfns = host.populate_physmap(first, np.arange(6000, dtype=np.uint64))
    host.write_frames(first, mfns, np.full((len(mfns), PAGE_SIZE), 0xEE, np.uint8))
    host.destroy(first)
    layout = plan(kernel, Request(16 * MIB))
    memory = memory_of(host, layout, build(host, kernel, layout))
    assert memory.read_virtual(kernel.virtual(0x10_0000), 9000) == b"\x90" * 5000 + bytes(4000)
