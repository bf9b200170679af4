"""Zero and duplicate pages, against a dictionary of contents."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from tests.support.writers.stream import PAGE
from xenpv.frames import U8, U64, Frames
from xenpv.report.content import ContentStats, analyse_content
from xenpv.report.pfn_map import collect_extents
from xenpv.report.pfn_ranges import PfnRanges
from xenpv.source.saved import SavedDomain


def content(domain: Domain, tmp_path: Path, limit: int = 1 << 20) -> ContentStats:
    file = tmp_path / "made.save"
    file.write_bytes(domain.to_bytes())
    with SavedDomain.open(str(file)) as saved:
        return analyse_content(saved.frames, collect_extents(saved.extents())[0], limit)


def pfns_of(parts: PfnRanges) -> list[int]:
    flat = parts.rows()
    return [pfn for start, span in zip(flat[::3], flat[1::3], strict=True) for pfn in range(start, start + span)]


@pytest.fixture
def domain() -> Domain:
    domain = pv_domain(pfns=[*range(700), 9000])
    data = domain.places.data
    for pfn in data[10:40]:
        domain.pages[pfn][:] = bytes(PAGE)
    for pfn in [*data[100:140:2], data[-1]]:
        domain.pages[pfn][:] = b"twin" * (PAGE // 4)
    for pfn in data[200:203]:
        domain.pages[pfn][:] = domain.pages[domain.tables(1)[0]]
    return domain


def test_analyse_content_counts_zero_and_duplicate_pages(domain: Domain, tmp_path: Path) -> None:
    stats = content(domain, tmp_path)
    by_content: dict[bytes, list[int]] = defaultdict(list)
    for pfn, page in domain.pages.items():
        by_content[bytes(page)].append(pfn)
    zero = by_content.pop(bytes(PAGE))
    alike = [sorted(pfns) for pfns in by_content.values() if len(pfns) > 1]
    assert stats.looked_at == len(domain.pages)
    assert (stats.unread, stats.left_out) == (0, 0)
    assert stats.zero == len(zero) >= 30
    assert pfns_of(stats.zero_at) == sorted(zero)
    assert stats.contents == len(alike) >= 2
    assert stats.duplicate == sum(map(len, alike))
    assert pfns_of(stats.duplicate_at) == sorted(pfn for pfns in alike for pfn in pfns)
    assert stats.saving == len(domain.pages) - len(by_content)
    groups = [(group.pages, group.first, group.table) for group in stats.groups]
    largest = sorted(((len(pfns), pfns[0], domain.is_table(pfns[0])) for pfns in alike), key=lambda g: (-g[0], g[1]))
    assert sorted(groups) == sorted(largest[:8])
    assert groups[0] == largest[0]


def test_analyse_content_of_pages_differing_in_one_bit_finds_none(tmp_path: Path) -> None:
    domain = pv_domain(pfns=range(2200))
    for n, pfn in enumerate(domain.places.data[: 2 * 1024]):  # each bit 63 of two words, and the like
        words = np.zeros(PAGE // 4, "<u4")
        words[n % 1024] = 1 << 31 if n < 1024 else 1
        words[(n + 1 + n // 1024) % 1024] ^= np.uint32(1 << 31)
        words[7] ^= np.uint32(0xABCDEF)
        domain.pages[pfn][:] = words.tobytes()
    distinct = len({bytes(domain.pages[pfn]) for pfn in domain.places.data[: 2 * 1024]})
    stats = content(domain, tmp_path)
    assert len(domain.places.data[: 2 * 1024]) - distinct == stats.duplicate - stats.contents


def test_analyse_content_with_a_limit_leaves_out_the_rest(domain: Domain, tmp_path: Path) -> None:
    stats = content(domain, tmp_path, limit=300)
    assert (stats.looked_at, stats.left_out) == (300, len(domain.pages) - 300)
    assert max(pfns_of(stats.zero_at)) < 300
    assert content(domain, tmp_path, limit=0).looked_at == 0


def test_analyse_content_counts_unreadable_pages(domain: Domain, tmp_path: Path) -> None:
    file = tmp_path / "cut.save"
    data = domain.to_bytes()
    file.write_bytes(data)
    with SavedDomain.open(str(file)) as saved:
        file.write_bytes(data[: len(data) // 2])  # the file shrinks under us
        stats = analyse_content(saved.frames, collect_extents(saved.extents())[0], 1 << 20)
    assert 300 < stats.unread < 400
    assert stats.looked_at == len(domain.pages)


def test_analyse_content_reads_scattered_pages_in_batches(tmp_path: Path) -> None:
    file = tmp_path / "made.save"
    file.write_bytes(pv_domain(pfns=range(0, 4000, 2)).to_bytes())
    with SavedDomain.open(str(file)) as saved:
        frames = Counting(saved.frames)
        extents = collect_extents(saved.extents())[0]
        stats = analyse_content(frames, extents, 1 << 20)
        assert len(extents) > 1900
        assert stats.looked_at == 2000
        assert frames.calls <= 2000 // 256 + 1


@dataclass
class Counting:
    """Frames, and how often they were read."""

    frames: Frames
    calls: int = 0

    def types(self, pfns: U64) -> U8:
        return self.frames.types(pfns)

    def pages(self, pfns: U64) -> U8:
        self.calls += 1
        return self.frames.pages(pfns)


def test_analyse_content_skips_pages_without_content(domain: Domain, tmp_path: Path) -> None:
    file = tmp_path / "made.save"
    file.write_bytes(domain.to_bytes())
    with SavedDomain.open(str(file)) as saved:
        frames = Counting(saved.frames)
        extents = collect_extents(saved.extents())[0]
        stats = analyse_content(frames, extents, 1 << 20, has_content=lambda pfns: pfns % np.uint64(2) == 0)
        assert stats.unread == sum(pfn % 2 for pfn in domain.pages)
        assert all(pfn % 2 == 0 for pfn in pfns_of(stats.zero_at))
        assert frames.calls <= len(domain.pages) // 256 + 1
