"""Domain.pages(), Domain.search() and Domain.kernel, over save files and running domains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.frames import DictFrames
from tests.support.kernel_guest import Guest
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain as Made
from tests.support.writers.stream import BROKEN, XALLOC
from tests.support.writers.vmcoreinfo import RELEASE, UTS_OFFSET, text
from xenpv.frames import PAGE_SIZE
from xenpv.memory.domain import DomainMemory
from xenpv.runs import Extents
from xenpv.source.domain import Domain
from xenpv.source.open import open_domain
from xenpv.source.scan import search

BANNER = b"Linux version " + RELEASE + b" (builder@example) (gcc) #1 SMP"


@contextmanager
def opened(made: Made, folder: Path) -> Iterator[Domain]:
    path = folder / "made.save"
    path.write_bytes(made.to_bytes())
    with open_domain(str(path)) as domain:
        yield domain


def addresses(pages: dict[int, bytes], needle: bytes) -> list[int]:
    """All matches, found the slow way: by every run of consecutive pfns as one text."""
    matches, pfns = [], sorted(pages)
    while pfns:
        run = [pfns.pop(0)]
        while pfns and pfns[0] == run[-1] + 1:
            run.append(pfns.pop(0))
        content = b"".join(pages[pfn] for pfn in run)
        matches += [run[0] * PAGE_SIZE + i for i in range(len(content)) if content.startswith(needle, i)]
    return matches


class Scanned:
    """Pages of a domain, each in a piece of its own."""

    def __init__(self, pages: dict[int, bytes]) -> None:
        self.frames = DictFrames(pages)
        self.memory = DomainMemory(self.frames)
        self._pfns = np.array(sorted(pages), np.uint64)

    def extents(self) -> Iterator[Extents]:
        for pfn in self._pfns:
            yield Extents(np.array([pfn]), np.ones(1, np.int64), np.zeros(1, np.uint8))


@settings(deadline=None, max_examples=60)
@given(
    pfns=st.sets(st.integers(0, 12), min_size=1),
    needle=st.binary(min_size=1, max_size=5000).map(lambda data: bytes(byte & 1 for byte in data)),
    places=st.lists(st.integers(0, 13 * PAGE_SIZE), max_size=4),
)
def test_search_finds_every_match_within_consecutive_pfns(pfns: set[int], needle: bytes, places: list[int]) -> None:
    """Each run of consecutive pfns is one text; matches overlap; what lies between runs matches nothing."""
    memory = bytearray(b"\2" * (16 * PAGE_SIZE))
    for place in places:
        memory[place : place + len(needle)] = needle
    pages = {pfn: bytes(memory[pfn * PAGE_SIZE : (pfn + 1) * PAGE_SIZE]) for pfn in pfns}
    assert list(search(Scanned(pages), needle)) == addresses(pages, needle)


@pytest.mark.parametrize("size", [1, 2, PAGE_SIZE, PAGE_SIZE + 1, 3 * PAGE_SIZE - 7], ids=hex)
def test_search_across_pieces_of_one_page_finds_the_match(size: int) -> None:
    content = np.random.default_rng(1).bytes(4 * PAGE_SIZE)
    pages = {5 + i: content[i * PAGE_SIZE : (i + 1) * PAGE_SIZE] for i in range(4)}
    start = PAGE_SIZE - 1
    assert 5 * PAGE_SIZE + start in list(search(Scanned(pages), content[start : start + size]))


def test_search_for_no_bytes_raises_at_once(tmp_path: Path) -> None:
    with opened(pv_domain(), tmp_path) as domain, pytest.raises(ValueError, match=r"^search: "):
        domain.search(b"")


def test_pages_yields_each_page_with_content_once(tmp_path: Path) -> None:
    made = pv_domain(pfns=[*range(60), 1000, 0x12_3456])
    places = made.places
    for pfn, page_type in ((places.data[0], XALLOC), (places.data[1], BROKEN)):
        made.types[pfn] = page_type
        del made.pages[pfn]
    with opened(made, tmp_path) as domain:
        pages = list(domain.pages())
    assert [pfn for pfn, _, _ in pages] == sorted(made.pages)
    assert {pfn: page for pfn, _, page in pages} == {pfn: bytes(page) for pfn, page in made.pages.items()}
    assert {pfn: page_type for pfn, page_type, _ in pages} == {pfn: made.types[pfn] for pfn in made.pages}


def test_pages_of_a_cut_off_file_ends_where_it_ends(tmp_path: Path) -> None:
    made, path = pv_domain(), tmp_path / "cut.save"
    data = made.to_bytes()
    last = data.index(bytes(made.pages[max(made.pages)]))
    path.write_bytes(data[: last + 100])
    with open_domain(str(path), on_breach=lambda *_: None) as domain:
        assert domain.error is not None
        assert [pfn for pfn, _, _ in domain.pages()] == sorted(made.pages)[:-1]


def test_running_domain_gives_the_same_pages_as_its_frames() -> None:
    domain: Domain = Guest.boot("linear", pages=1100).live
    pages = {pfn: page for pfn, _, page in domain.pages()}
    assert len(pages) == 1100
    pfns = np.array(sorted(pages), np.uint64)
    assert domain.frames.pages(pfns).tobytes() == b"".join(pages[pfn] for pfn in sorted(pages))


def linux(*, vmcoreinfo: bool, banner: bytes) -> Made:
    made = pv_domain()
    places = made.places
    if vmcoreinfo:
        names = b"".join(part.ljust(65, b"\0") for part in (b"Linux", b"web", RELEASE))
        made.pages[places.data[1]][UTS_OFFSET : UTS_OFFSET + len(names)] = names
        content = text(made.vaddrs[places.data[1]], top=made.vaddrs[places.top])
        made.pages[places.data[0]][:] = content.ljust(PAGE_SIZE, b"\0")
    first, second = places.data[5:7]
    made.pages[first][-10:], made.pages[second][: len(banner) - 10] = banner[:10], banner[10:]
    return made


def test_kernel_of_linux_has_version_banner_and_symbols(tmp_path: Path) -> None:
    with opened(linux(vmcoreinfo=True, banner=BANNER + b"\n"), tmp_path) as domain:
        kernel = domain.kernel
        assert kernel is not None
        assert (kernel.version, kernel.banner) == (RELEASE.decode(), BANNER.decode())
        assert kernel.symbols["_stext"] == 0xFFFF_FFFF_8100_0000
        assert domain.kernel is kernel  # found once


def test_kernel_with_another_release_in_a_banner_has_no_banner(tmp_path: Path) -> None:
    with opened(linux(vmcoreinfo=True, banner=b"Linux version 5.4.0 (a@b) #1\n"), tmp_path) as domain:
        assert domain.kernel is not None
        assert (domain.kernel.version, domain.kernel.banner) == (RELEASE.decode(), "")


def test_kernel_without_vmcoreinfo_is_told_by_its_banner(tmp_path: Path) -> None:
    with opened(linux(vmcoreinfo=False, banner=BANNER + b"\n"), tmp_path) as domain:
        assert domain.kernel is not None
        assert (domain.kernel.version, domain.kernel.symbols) == (RELEASE.decode(), {})


@pytest.mark.parametrize(
    "banner", [b"Linux version %s (%s) %s\n", BANNER, b"no banner in here"], ids=["format", "open", "none"]
)
def test_kernel_without_a_complete_banner_is_none(banner: bytes, tmp_path: Path) -> None:
    with opened(linux(vmcoreinfo=False, banner=banner), tmp_path) as domain:
        assert domain.kernel is None
