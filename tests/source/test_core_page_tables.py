"""Cores of domains that ran while they were dumped: a stale page table stays unchanged data."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.frames import array
from tests.support.writers.build import SHARED_INFO_MFN, pv_domain
from tests.support.writers.core import Core, core_of
from tests.support.writers.domain import RW, Domain
from xenpv.abi.declare import Width
from xenpv.export.export import export
from xenpv.frames import PageType
from xenpv.memory.page_tables import NO_PFN
from xenpv.source.core import CoreDomain
from xenpv.source.core_page_tables import PageTables, PageTableSearch

PAGE = 4096
ENTRY = 0x67
L1, L2 = 1, 2


class Ran:
    """A domain that ran while it was dumped: an L2 entry still names ``ended``, a page of data, as a table.

    Change the domain before ``dumped`` makes a core of it; change the core's pages after that.
    """

    def __init__(self, width: Width) -> None:
        self.domain: Domain = pv_domain(width=width, pfns=range(128))
        self.ended, self.other = self.domain.places.data[:2]
        self.l1, self.l2 = (step.table for step in reversed(self.domain.walk(self.domain.vaddrs[0])[-2:]))
        self.name(self.ended)

    def name(self, pfn: int, flags: int = ENTRY) -> None:
        """Add an entry to the L2."""
        table = self.domain.table(self.l2)
        table[int(np.flatnonzero(table == 0)[0])] = pfn << 12 | flags

    def dumped(self, content: bytes | None = None) -> Core:
        core = core_of(self.domain)
        if content is not None:
            core.pages[self.ended] = content
        return core

    def open_core(self, core: Core, folder: Path) -> CoreDomain:
        path = folder / "ran.core"
        path.write_bytes(bytes(core))
        return CoreDomain.open(str(path))

    def map_read_only(self, pfn: int) -> None:
        step = self.domain.walk(self.domain.vaddrs[pfn])[-1]
        self.domain.table(step.table)[step.entry] &= np.uint64((1 << 64) - 1 - RW)


@pytest.fixture(params=[8, 4])
def ran(request: pytest.FixtureRequest) -> Ran:
    return Ran(request.param)


def assert_others_are_tables(ran: Ran, core: CoreDomain) -> None:
    for pfn, content in ran.domain.pages.items():
        if pfn not in (ran.ended, ran.other, ran.l2) and ran.domain.is_table(pfn):
            assert core.frames.types(array(pfn)).tolist() == [ran.domain.types[pfn] & 7]
            assert core.frames.pages(array(pfn)).tobytes() == bytes(content)


# What may be in a page, with words that have the bit of a present entry.
CONTENT: dict[str, Callable[[Ran], bytes]] = {
    "text": lambda _: b"init_task\nstart_kernel\nxen_start_info\n".ljust(PAGE, b"1"),
    "numbers": lambda _: struct.pack("<512Q", *range(512)),
    "mfns": lambda ran: struct.pack("<512Q", *sorted(ran.domain.mfns.values()), *[1] * (512 - len(ran.domain.mfns))),
    "the rest of a table": lambda ran: (
        struct.pack("<64Q", *[m << 12 | ENTRY for m in ran.domain.mfns.values()][:64])
        + b"spoken in a sentence or two, of which some have an end in 1".ljust(PAGE - 512, b"\0")
    ),
    "pattern": lambda ran: bytes(ran.domain.pages[ran.other]),
}


@pytest.mark.parametrize("content", CONTENT)
@pytest.mark.parametrize("writable", [True, False])
def test_stale_page_table_reads_as_its_new_content(content: str, writable: bool, ran: Ran, tmp_path: Path) -> None:
    """Also where the mapping that Linux made writable again was dumped before it was."""
    if not writable:
        ran.map_read_only(ran.ended)
    data = CONTENT[content](ran)
    with ran.open_core(ran.dumped(data), tmp_path) as core:
        assert core.frames.pages(array(ran.ended)).tobytes() == data
        assert core.frames.types(array(ran.ended)).tolist() == [PageType.NOTAB]
        assert core.frames.tables.stale == 1
        assert core.frames.types(array(ran.l2)).tolist() == [L2]
        assert_others_are_tables(ran, core)


def test_page_with_forbidden_flags_is_no_page_table(ran: Ran, tmp_path: Path) -> None:
    """As an L2 is named what could be an L1, since it has the global bit, and superpages."""
    ran.map_read_only(ran.other)
    ran.domain.table(ran.domain.walk(ran.domain.vaddrs[0])[-3].table)[0] = ran.other << 12 | 1
    core = ran.dumped(bytes(PAGE))
    core.pages[ran.other] = struct.pack("<8Q", *[ran.domain.mfns[n] << 12 | 0x1E7 for n in range(8)]).ljust(PAGE, b"\0")
    with ran.open_core(core, tmp_path) as opened:
        assert opened.frames.types(array(ran.other)).tolist() == [PageType.NOTAB]
        assert opened.frames.pages(array(ran.other)).tobytes() == core.pages[ran.other]


def test_page_that_is_mapped_writable_is_no_page_table(ran: Ran, tmp_path: Path) -> None:
    """A copy of a real one, as a kernel makes it that forks; and it is not asked what it maps."""
    original = core_of(ran.domain).pages[ran.l1]
    with ran.open_core(ran.dumped(original), tmp_path) as core:
        assert core.frames.pages(array(ran.ended)).tobytes() == original
        assert core.frames.tables.stale == 1
        assert_others_are_tables(ran, core)


def test_stale_page_table_changes_no_other_pages_type(ran: Ran, tmp_path: Path) -> None:
    """Two pages like tables: one names another page as a table, and one maps real tables writable."""
    names, maps = ran.ended, ran.other
    ran.name(maps)
    core = ran.dumped()
    domain, last = ran.domain, ran.domain.places.data[-1]
    core.pages[names] = struct.pack("<Q", domain.mfns[last] << 12 | ENTRY).ljust(PAGE, b"\0")
    tables = [domain.mfns[pfn] << 12 | ENTRY for pfn in domain.pages if domain.is_table(pfn) and pfn != ran.l1]
    core.pages[maps] = struct.pack(f"<{len(tables)}Q", *tables).ljust(PAGE, b"\0")
    with ran.open_core(core, tmp_path) as opened:
        for pfn in (names, maps, last):
            assert opened.frames.types(array(pfn)).tolist() == [PageType.NOTAB]
            assert opened.frames.pages(array(pfn)).tobytes() == core.pages[pfn]
        assert opened.frames.tables.stale == 2
        assert_others_are_tables(ran, opened)


def test_read_only_page_table_with_foreign_entries_is_a_page_table(ran: Ran, tmp_path: Path) -> None:
    """Shared info, and a page that came while the core was written: no pfn has either."""
    ran.map_read_only(ran.ended)
    core = ran.dumped()
    own = [ran.domain.mfns[pfn] << 12 | ENTRY for pfn in ran.domain.places.data[:2]]
    foreign = [mfn << 12 | ENTRY for mfn in (SHARED_INFO_MFN, 0x77_7777)]
    core.pages[ran.ended] = struct.pack("<4Q", *own, *foreign).ljust(PAGE, b"\0")
    with ran.open_core(core, tmp_path) as opened:
        assert opened.frames.types(array(ran.ended)).tolist() == [L1]
        entries = opened.frames.pages(array(ran.ended)).view("<u8")[0, :4].tolist()
        assert [entry >> 12 for entry in entries] == [*ran.domain.places.data[:2], NO_PFN, NO_PFN]
        assert opened.frames.tables.stale == 0


def test_pae_top_tables_are_found_after_a_batch_without_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Xen's entries are known only from the first batch that has a top table, which need not be the first one."""
    monkeypatch.setattr("xenpv.source.core_page_tables.PAGES_PER_BATCH", 1)
    domain = pv_domain(width=4, pfns=range(128))
    path = tmp_path / "pae.core"
    path.write_bytes(bytes(core_of(domain)))
    with CoreDomain.open(str(path)) as core:
        pages = core.page_list
        search = PageTableSearch(pages.raw, 4, pages.pfns_of, pages.mfns_of, pages.runs)
        tops = sorted(domain.tables(3))
        candidates = array(*domain.places.data[:2], *tops)
        assert search._select_pae_l3(candidates, PageTables.empty()).tolist() == tops


def test_export_of_a_core_with_stale_page_tables_has_a_remark(ran: Ran, tmp_path: Path) -> None:
    with ran.open_core(ran.dumped(), tmp_path) as core:
        assert core.stale_page_tables == 1
        assert len(export(core, str(tmp_path / "out"), "lime").remarks) == 1
    with ran.open_core(core_of(pv_domain()), tmp_path) as core:
        assert core.stale_page_tables == 0
        assert export(core, str(tmp_path / "out"), "lime").remarks == []
