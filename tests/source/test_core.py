"""Cores of `xl dump-core`: their contents, and errors of damaged ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.frames import array, columns, words
from tests.support.made_cores import LONG_MODE, NON_PAE, BreachRecorder, made_core, open_core
from tests.support.writers.build import USER_VADDR, pattern, pv_domain
from tests.support.writers.core import core_of, hvm_core
from tests.support.writers.domain import Domain
from xenpv.abi.declare import Width
from xenpv.abi.x86 import VCPU_GUEST_CONTEXT
from xenpv.errors import Fault, GuestError, Malformed, StreamError, Unsupported
from xenpv.export.export import export
from xenpv.frames import ABSENT, HAS_DATA
from xenpv.source.open import open_domain

SPREAD = [*range(100), 0x1_0000, 0x1_0001]


@pytest.fixture(params=[8, 4])
def domain(request: pytest.FixtureRequest) -> Domain:
    return pv_domain(width=request.param, pfns=SPREAD, vcpus=2, tree=True, ballooned=[200])


def test_frames_of_a_core_have_pfns_in_page_tables(domain: Domain, tmp_path: Path) -> None:
    with open_core(core_of(domain), tmp_path) as core:
        pfns = array(*sorted(domain.pages))
        assert (core.hvm, core.width, core.vcpus) == (False, domain.width, [0, 1])
        for pfn, content in domain.pages.items():
            assert core.frames.pages(array(pfn)).tobytes() == bytes(content), hex(pfn)
        kinds = [domain.types[int(pfn)] & 7 for pfn in pfns]
        assert core.frames.types(pfns).tolist() == kinds
        assert core.frames.types(array(150, 0xFFFF, 1 << 40)).tolist() == [ABSENT] * 3
        assert core.shared_info() == bytes(domain.shared_page)
        assert core.layout.xen == "4.17.5-test"


def test_memory_of_a_core_translates_virtual_addresses(domain: Domain, tmp_path: Path) -> None:
    with open_core(core_of(domain), tmp_path) as core:
        assert core.cr3(0) == core.cr3(1) == domain.places.top
        for pfn, vaddr in domain.vaddrs.items():
            walk = core.memory.walk(vaddr)
            assert (walk.pfn, [s.table for s in walk.steps]) == (pfn, [s.table for s in domain.walk(vaddr)])
            assert core.memory.read_virtual(vaddr + 1, 100) == bytes(domain.pages[pfn])[1:101]
        if domain.width == 8:
            assert core.memory.walk(USER_VADDR, top=core.cr3(0, user=True)).pfn == domain.places.user
        else:
            assert core.cr3(0, user=True) is None


def test_registers_of_a_core_are_those_of_the_contexts(domain: Domain, tmp_path: Path) -> None:
    with open_core(core_of(domain), tmp_path) as core:
        registers = core.registers(1)
        assert registers is not None
        assert registers.ip == domain.vaddrs[domain.places.text] + 0x3AA
        assert core.registers(2) is None is core.cr3(2)


def test_p2m_of_a_core_is_the_guests_own(domain: Domain, tmp_path: Path) -> None:
    with open_core(core_of(domain), tmp_path) as core:
        pfns = array(*sorted(domain.pages))
        assert core.anchors is not None
        assert core.p2m.entries == domain.entries
        assert core.p2m.lookup(pfns).tolist() == [domain.mfns[int(pfn)] for pfn in pfns]


@pytest.mark.parametrize("width", [8, 4])
def test_extents_of_a_core_are_runs_of_one_type(width: Width, tmp_path: Path) -> None:
    domain = pv_domain(width=width, pfns=SPREAD)
    with open_core(core_of(domain), tmp_path) as core:
        types: dict[int, int] = {}
        last = -1
        for extents in core.extents():
            for start, pages, kind in columns(extents):
                assert start > last
                assert HAS_DATA[kind]
                last = start + pages - 1
                types |= dict.fromkeys(range(start, last + 1), kind)
        assert types == {pfn: domain.types[pfn] & 7 for pfn in domain.pages}


# --- HVM -------------------------------------------------------------------------------------------------------------


def test_hvm_core_has_gfns_and_no_p2m(tmp_path: Path) -> None:
    tables = {5: words({511: 6 << 12 | 0x67}), 6: words({510: 7 << 12 | 0x67}), 7: words({8: 0xE7})}
    narrow = words({0x300: 0xE7}, 4)
    pages = {pfn: bytes(pattern(pfn)) for pfn in [*range(16), 0x10_0000]} | tables | {2: narrow}
    with open_core(hvm_core(pages, [LONG_MODE, NON_PAE]), tmp_path) as core:
        assert (core.hvm, core.width, core.vcpus, core.shared_info()) == (True, 8, [0, 1], None)
        for pfn, content in pages.items():
            assert core.memory.page(pfn) == content
        assert core.frames.types(array(5, 99, 0x10_0000)).tolist() == [0, ABSENT, 0]
        assert [(e.first.tolist(), e.pages.tolist()) for e in core.extents()] == [([0, 0x10_0000], [16, 1])]
        assert core.memory.read_virtual(0xFFFF_FFFF_8100_1000, 64) == pages[1][:64]
        registers = core.registers(1)
        assert registers is not None
        assert (registers.width, registers.ip, registers.general["eax"], registers.paging.name) == (
            4,
            0xC010_0000,
            7,
            "2 levels",
        )
        assert core.memory_of(1).walk(0xC000_3000).pfn == 3
        assert core.cr3(0, user=True) is None


# --- damaged ---------------------------------------------------------------------------------------------------------


def test_core_list_out_of_order_is_read_and_reported(tmp_path: Path) -> None:
    domain, core = made_core()
    order = np.random.default_rng(3).permutation(len(core.pages))
    core.pages, core.p2m = [core.pages[i] for i in order], core.p2m[order]
    breaches = BreachRecorder()
    with open_core(core, tmp_path, breaches) as opened:
        for pfn, content in domain.pages.items():
            assert opened.frames.pages(array(pfn)).tobytes() == bytes(content)
    assert [rule for rule, _ in breaches] == ["core-order"]
    open_core(core, tmp_path).close()  # it is a warning


def test_core_list_with_unused_entries_is_read(tmp_path: Path) -> None:
    domain, core = made_core()
    for row in (0, 5, 5, 40, len(core.pages)):
        core.pages.insert(row, bytes(4096))
        core.p2m = np.insert(core.p2m, row, 2**64 - 1, axis=0)
    breaches = BreachRecorder()
    with open_core(core, tmp_path, breaches) as opened:
        for pfn, content in domain.pages.items():
            assert opened.frames.pages(array(pfn)).tobytes() == bytes(content)
    assert breaches == []


def test_core_list_with_a_repeated_pfn_is_reported(tmp_path: Path) -> None:
    domain, core = made_core()
    core.pages.append(bytes(pattern(77)))
    core.p2m = np.append(core.p2m, [[50, core.p2m[50, 1]]], axis=0)
    breaches = BreachRecorder()
    with open_core(core, tmp_path, breaches) as opened:
        assert opened.frames.pages(array(50)).tobytes() == bytes(domain.pages[50])
        assert opened.frames.types(array(49, 50, 51)).tolist() == [domain.types[pfn] & 7 for pfn in (49, 50, 51)]
    assert [rule for rule, _ in breaches] == ["core-order", "core-repeated"]
    assert "pfn 0x32 " in breaches[1][1]


def test_core_list_with_impossible_numbers_is_reported(tmp_path: Path) -> None:
    _, core = made_core()
    core.p2m[7, 0] = 1 << 60
    core.p2m[9, 1] = (1 << 40) - 1
    breaches = BreachRecorder()
    with open_core(core, tmp_path, breaches) as opened:
        assert opened.frames.types(array(6, 7, 8, 9)).tolist() != [0, 0, 0, 0]
        assert (opened.frames.types(array(7, 9)) == ABSENT).all()
    assert breaches == [("core-range", f"entry 0x7 names pfn {1 << 60:#x}, mfn {int(core.p2m[7, 1]):#x}")]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"nr_pages": 1 << 62}, "core-counts"),
        ({"nr_vcpus": 1 << 62}, "core-counts"),
        ({"sizes": {".xen_p2m": 1 << 63}}, "core-section"),
        ({"sizes": {".xen_p2m": 160}}, "core-counts"),
        ({"sizes": {".xen_pages": 1 << 62}}, "core-section"),
        ({"sizes": {".xen_pages": 8192}}, "core-counts"),
        ({"offsets": {".xen_pages": 1 << 62}}, "core-section"),
        ({"left_out": {".xen_p2m"}}, "core-section"),
        ({"left_out": {".xen_pages"}}, "core-section"),
        ({"left_out": {".xen_prstatus"}}, "core-counts"),
    ],
)
def test_core_with_false_section_sizes_is_reported(change: dict[str, object], rule: str, tmp_path: Path) -> None:
    """An error; or, for who collects what is wrong, as much as there is."""
    _, core = made_core()
    for name, value in change.items():
        setattr(core, name, value)
    with pytest.raises(Malformed):
        open_core(core, tmp_path)
    breaches = BreachRecorder()
    with open_core(core, tmp_path, breaches) as opened:
        pages = sum(int(extents.pages.sum()) for extents in opened.extents())
        assert pages <= len(core.pages)
        present = [pfn for pfn in SPREAD if (opened.frames.types(array(pfn)) != ABSENT).all()]
        assert pages == len(present) == len(opened.frames.pages(array(*present)))
    assert rule in [name for name, _ in breaches]


def test_core_with_more_pages_than_announced_ends_there(tmp_path: Path) -> None:
    _, core = made_core()
    core.nr_pages = 10
    with open_core(core, tmp_path) as opened:
        assert [extents.pages.sum() for extents in opened.extents()] == [10]


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ({"magic": 0x1234}, "0x1234"),
        ({"page_size": 65536}, "65536"),
        ({"version": 1 << 32}, r"1\.0"),
        ({"left_out": {".note.Xen"}}, r"\.note\.Xen"),
    ],
    ids=["magic", "page-size", "version", "no-notes"],
)
def test_core_of_another_format_is_unsupported(change: dict[str, object], value: str, tmp_path: Path) -> None:
    _, core = made_core()
    for name, changed in change.items():
        setattr(core, name, changed)
    with pytest.raises(Unsupported, match=rf" {value}\b"):  # the value that is not supported
        open_core(core, tmp_path)


def test_core_cut_short_raises_stream_error(tmp_path: Path) -> None:
    """Xl writes the list behind the pages: without it nobody knows which page is which."""
    path, data = tmp_path / "cut.core", bytes(made_core()[1])
    for end in (18, 63, 64, 100, 2000, 5000, len(data) // 2, len(data) - 3000):
        path.write_bytes(data[:end])
        with pytest.raises(StreamError) as e:
            open_domain(str(path))
        assert end < 64 or e.value.rule in {"truncated", "core-section"}


def test_cr3_outside_the_core_raises_guest_error(tmp_path: Path) -> None:
    domain, core = made_core()
    context = np.frombuffer(bytearray(core.contexts[0]), VCPU_GUEST_CONTEXT[8])
    context["ctrlreg"][0, 3] = 0xDEAD_BEEF_000
    core.contexts[0] = context.tobytes()
    with open_core(core, tmp_path) as opened:
        with pytest.raises(GuestError) as invalid:
            opened.cr3(0)
        assert invalid.value.mfn == 0xDEAD_BEEF
        with pytest.raises(Fault) as e:
            opened.memory.read_virtual(domain.vaddrs[0], 1)
        assert (e.value.space, e.value.address, e.value.level) == ("vaddr", domain.vaddrs[0], None)
        assert "mfn 0xdeadbeef" in str(e.value), "and not only that cr3 is not known"
        assert opened.memory.user_top == domain.places.user_top
        assert [error.mfn for error in opened.invalid_cr3s] == [0xDEAD_BEEF]
        exported = export(opened, str(tmp_path / "out"), "raw")
        assert ["mfn 0xdeadbeef" in remark for remark in exported.remarks].count(True) == 1
        assert opened.cr3(1) == domain.places.top
        assert opened.frames.types(array(domain.places.top)).tolist() == [4], "found by vcpu 1"


def test_page_tables_in_a_circle_are_found_once(tmp_path: Path) -> None:
    domain, core = made_core()
    top = sorted(domain.pages).index(domain.places.top)
    entries = np.frombuffer(bytearray(core.pages[top]), "<u8")
    entries[:256] = core.p2m[top, 1] << np.uint64(12) | np.uint64(0x67)
    core.pages[top] = entries.tobytes()
    with open_core(core, tmp_path) as opened:
        assert opened.frames.types(array(domain.places.top)).tolist() == [4]
        assert len(opened.frames.tables.pfns) == len(set(opened.frames.tables.pfns.tolist()))
        assert opened.memory.walk(0).pfn == domain.places.top


def test_core_section_beyond_the_file_is_malformed(tmp_path: Path) -> None:
    _, core = made_core()
    core.offsets, core.sizes = {".xen_pages": (1 << 64) - 8}, {".xen_pages": 0}
    with open_core(core, tmp_path, BreachRecorder()) as opened:
        assert not [extents for extents in opened.extents() if len(extents.first)]


def test_page_tables_of_other_processes_are_found_by_the_linear_page_table(tmp_path: Path) -> None:
    """A top table that no vcpu runs on, with a table below; a page that once was one, and is mapped writable; and one
    that cannot be written and is none. What the top table names and is mapped writable is no table either.
    """
    domain = pv_domain(pfns=range(128))
    top, third, stale, data = domain.places.data[-4:]
    mapping = domain.table(domain.places.top).copy()
    for pfn, table in ((top, mapping), (stale, mapping)):
        domain.pages[pfn][:] = table.tobytes()
    domain.types[top] = domain.types[stale] = 4
    domain.table(top)[0] = third << 12 | 0x67
    domain.table(top)[1] = data << 12 | 0x67
    text = domain.table(domain.places.text)
    text[258] = top << 12 | 0x63
    domain.pages[third][:] = bytes(4096)
    domain.types[third] = 3
    core = core_of(domain)
    domain.types[stale] = 0
    for pfn in (top, third, domain.places.text):
        domain.set_pte(domain.vaddrs[pfn], pfn << 12 | 0x65)
    read_only_core = core_of(domain)
    for level1 in domain.tables(1):
        core.pages[level1] = read_only_core.pages[level1]
    with open_core(core, tmp_path) as opened:
        kinds = opened.frames.types(array(top, third, stale, data, domain.places.text))
        assert kinds.tolist() == [4, 3, 0, 0, 0]
        assert opened.frames.pages(array(top)).tobytes() == bytes(domain.pages[top])


def test_page_tables_of_other_32_bit_processes_are_found_by_xens_l2_entries(tmp_path: Path) -> None:
    """By the end of the L2 below the last entry. One that has more than four entries, or leads elsewhere, is none."""
    domain = pv_domain(width=4, pfns=range(128))
    top, below, five_entries, wrong_l2 = domain.places.data[-4:]
    mapping = domain.table(domain.places.top)
    for pfn in (top, five_entries, wrong_l2):
        domain.pages[pfn][:] = mapping.tobytes()
        domain.types[pfn] = 3
    domain.table(top)[0] = below << 12 | 1
    domain.table(five_entries)[4] = below << 12 | 1
    domain.table(wrong_l2)[3] = domain.places.text << 12 | 1
    domain.pages[below][:] = bytes(4096)
    domain.types[below] = 2
    for pfn in (top, below, five_entries, wrong_l2):
        domain.set_pte(domain.vaddrs[pfn], pfn << 12 | 0x65)
    core = core_of(domain)
    text = sorted(domain.pages).index(domain.places.text)
    core.pages[text] = bytes(domain.pages[domain.places.text])
    with open_core(core, tmp_path) as opened:
        assert opened.frames.types(array(top, below, five_entries, wrong_l2)).tolist() == [3, 2, 0, 0]
        assert opened.frames.pages(array(top)).tobytes() == bytes(domain.pages[top])
