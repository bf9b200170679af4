"""Files of `xl dump-core`: what is in them, and what becomes of damaged ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.writers.build import USER_VADDR, pv_domain
from tests.writers.core import Core, core_of
from tests.writers.domain import Domain
from xenpv.abi.declare import Width
from xenpv.domain.core import CoreDomain
from xenpv.domain.opening import open_domain
from xenpv.frames import ABSENT, HAS_DATA, U64
from xenpv.stream.reader import FaultHandler

SPREAD = [*range(100), 0x1_0000, 0x1_0001]


def opened(core: Core, tmp_path: Path, fault: FaultHandler | None = None) -> CoreDomain:
    path = tmp_path / "made.core"
    path.write_bytes(bytes(core))
    domain = open_domain(str(path), fault=fault)
    assert isinstance(domain, CoreDomain)
    return domain


def array(*pfns: int) -> U64:
    return np.array(pfns, np.uint64)


@pytest.fixture(params=[8, 4])
def domain(request: pytest.FixtureRequest) -> Domain:
    return pv_domain(width=request.param, pfns=SPREAD, vcpus=2, tree=True, ballooned=[200])


def test_memory_is_that_of_the_domain_with_pfns_in_its_tables(domain: Domain, tmp_path: Path) -> None:
    with opened(core_of(domain), tmp_path) as core:
        pfns = array(*sorted(domain.pages))
        assert (core.hvm, core.width, core.vcpus) == (False, domain.width, [0, 1])
        for pfn, content in domain.pages.items():
            assert core.frames.pages(array(pfn)).tobytes() == bytes(content), hex(pfn)
        kinds = [domain.types[int(pfn)] & 7 for pfn in pfns]
        assert core.frames.types(pfns).tolist() == kinds
        assert core.frames.types(array(150, 0xFFFF, 1 << 40)).tolist() == [ABSENT] * 3
        assert core.shared_info() == bytes(domain.shared_page)
        assert core.layout.xen == "4.17.5-test"


def test_virtual_addresses(domain: Domain, tmp_path: Path) -> None:
    with opened(core_of(domain), tmp_path) as core:
        assert core.cr3(0) == core.cr3(1) == domain.places.top
        for pfn, vaddr in domain.vaddrs.items():
            way = core.memory.walk(vaddr)
            assert (way.pfn, [s.table for s in way.steps]) == (pfn, [s.table for s in domain.walk(vaddr)])
            assert core.memory.read_virtual(vaddr + 1, 100) == bytes(domain.pages[pfn])[1:101]
        if domain.width == 8:
            assert core.memory.walk(USER_VADDR, top=core.cr3(0, user=True)).pfn == domain.places.user
        else:
            assert core.cr3(0, user=True) is None


def test_registers(domain: Domain, tmp_path: Path) -> None:
    with opened(core_of(domain), tmp_path) as core:
        registers = core.registers(1)
        assert registers is not None
        assert registers.ip == domain.vaddrs[domain.places.text] + 0x3AA
        assert core.registers(2) is None is core.cr3(2)


def test_the_p2m_is_the_guests_own(domain: Domain, tmp_path: Path) -> None:
    with opened(core_of(domain), tmp_path) as core:
        pfns = array(*sorted(domain.pages))
        assert core.anchors is not None
        assert core.p2m.entries == domain.entries
        assert core.p2m.lookup(pfns).tolist() == [domain.mfns[int(pfn)] for pfn in pfns]


@pytest.mark.parametrize("width", [8, 4])
def test_extents_are_runs_of_one_type(width: Width, tmp_path: Path) -> None:
    domain = pv_domain(width=width, pfns=SPREAD)
    with opened(core_of(domain), tmp_path) as core:
        found: dict[int, int] = {}
        last = -1
        for extents in core.extents():
            for start, pages, kind in zip(*(column.tolist() for column in extents), strict=True):
                assert start > last
                assert HAS_DATA[kind]
                last = start + pages - 1
                found |= dict.fromkeys(range(start, last + 1), kind)
        assert found == {pfn: domain.types[pfn] & 7 for pfn in domain.pages}
