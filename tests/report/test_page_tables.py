"""Page table statistics, against a plain loop over the writer's tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.writers.build import pv_domain
from tests.support.writers.domain import FRAME, Domain, P
from tests.support.writers.hvm import hvm_stream
from tests.support.writers.stream import PIN
from xenpv.abi.declare import Width
from xenpv.report import page_tables
from xenpv.report.page_tables import FLAGS, PageTableStats, count_page_tables
from xenpv.report.pfn_map import collect_extents
from xenpv.source.saved import SavedDomain


def stats_of(domain: Domain, tmp_path: Path) -> PageTableStats:
    file = tmp_path / "made.save"
    file.write_bytes(domain.to_bytes())
    with SavedDomain.open(str(file)) as saved:
        return count_page_tables(saved.frames, collect_extents(saved.extents())[0])


@pytest.mark.parametrize("width", [4, 8])
def test_count_page_tables_equals_the_written_tables(width: Width, tmp_path: Path) -> None:
    domain = pv_domain(pfns=[*range(300), 5000, 5001, 1 << 20], width=width)
    l1 = domain.table(domain.tables(1)[0])
    l1[300:303] = l1[5]  # one page mapped four times, at least
    l1[310] = FRAME | P  # somebody else's
    stats = stats_of(domain, tmp_path)
    assert [level.level for level in stats.levels] == list(range(domain.levels, 0, -1))
    for level in stats.levels:
        pfns = domain.tables(level.level)
        ptes = [[int(pte) for pte in domain.table(pfn) if int(pte) & P] for pfn in pfns]
        flat = [pte for table in ptes for pte in table]
        assert level.tables == len(pfns)
        assert level.pinned == sum(bool(domain.types[pfn] & PIN) for pfn in pfns)
        assert level.empty == ptes.count([])
        assert level.entries == len(flat)
        assert level.flags == {name: sum(bool(pte & bit) for pte in flat) for name, bit in FLAGS.items()}
        assert level.other == sum(pte & FRAME == FRAME for pte in flat)
    leaves = [int(pte) for pfn in domain.tables(1) for pte in domain.table(pfn) if int(pte) & P]
    named = [pte >> 12 & (FRAME >> 12) for pte in leaves]
    present = set(named) & set(domain.pages)
    assert stats.mapped == len(present)
    assert stats.several == sum(named.count(pfn) > 1 for pfn in present) > 0
    assert stats.writable == len({pte >> 12 & (FRAME >> 12) for pte in leaves if pte & 2} & present)
    assert stats.loose == sum(bool(pte & 2) and not pte >> 63 for pte in leaves)
    assert stats.populated == len(domain.pages)


def test_count_page_tables_in_batches_of_one_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = pv_domain(pfns=range(1200))
    once = stats_of(domain, tmp_path)
    monkeypatch.setattr(page_tables, "PAGES_PER_BATCH", 1)
    assert stats_of(domain, tmp_path) == once


def test_count_page_tables_beyond_the_maximum_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    domain = pv_domain(pfns=range(1200))
    monkeypatch.setattr(page_tables, "TABLES_MAX", 3)
    stats = stats_of(domain, tmp_path)
    total = sum(len(domain.tables(level)) for level in (1, 2, 3, 4))
    assert stats.left_out == total - 3
    assert sum(level.tables for level in stats.levels) == total
    assert stats.mapped == 0  # the tables of the upper levels came first


def test_count_page_tables_of_a_large_domain_counts_no_mappings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_tables, "PAGES_MAX", 99)
    stats = stats_of(pv_domain(pfns=range(200)), tmp_path)
    assert (stats.mapped, stats.several, stats.writable) == (None, None, None)


def test_count_page_tables_without_tables_has_no_levels(tmp_path: Path) -> None:
    file = tmp_path / "hvm.save"
    file.write_bytes(bytes(hvm_stream(pages=16)))
    with SavedDomain.open(str(file)) as saved:
        stats = count_page_tables(saved.frames, collect_extents(saved.extents())[0])
    assert (stats.levels, stats.mapped, stats.populated) == ([], 0, 16)
