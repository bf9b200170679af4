"""Reading memory by pfn, by pseudo-physical and by virtual address."""

from __future__ import annotations

import pytest

from tests.support.frames import DictFrames
from tests.support.writers.build import USER_VADDR, pv_domain
from tests.support.writers.domain import Domain
from xenpv.abi.declare import Width
from xenpv.errors import Fault
from xenpv.frames import ABSENT, Pfn
from xenpv.memory.domain import DomainMemory

PAGE = 4096


def memory_of(domain: Domain) -> DomainMemory:
    user = Pfn(domain.places.user_top) if domain.places.user_top >= 0 else None
    return DomainMemory(DictFrames.of(domain), domain.width, Pfn(domain.places.top), user)


@pytest.fixture(scope="module")
def domain() -> Domain:
    """Its virtual order is not that of its pfns."""
    return pv_domain(pfns=[*range(64), 80, 79, 78, 0x1_0000_0000])


def test_one_page(domain: Domain) -> None:
    memory = memory_of(domain)
    for pfn, content in domain.pages.items():
        assert memory.page(pfn) == bytes(content)
        assert memory.type(pfn) == domain.types[pfn]
    assert memory.type(77) == ABSENT
    with pytest.raises(Fault, match="pfn 0x4d is not there"):
        memory.page(77)


@pytest.mark.parametrize(
    ("at", "length"), [(0, 1), (0, PAGE), (1, PAGE), (4095, 2), (100, 3 * PAGE), (PAGE - 1, 1), (5, 0), (PAGE, 0)]
)
def test_pseudo_physical_across_pages(domain: Domain, at: int, length: int) -> None:
    whole = b"".join(bytes(domain.pages[pfn]) for pfn in range(64))
    assert memory_of(domain).read(at, length) == whole[at : at + length]


def test_pseudo_physical_up_to_the_last_byte(domain: Domain) -> None:
    """The page behind it is not there, and is not asked for."""
    assert memory_of(domain).read(63 * PAGE, PAGE) == bytes(domain.pages[63])
    assert memory_of(domain).read(64 * PAGE - 1, 1) == bytes(domain.pages[63][-1:])


def test_pseudo_physical_far_up(domain: Domain) -> None:
    far = 0x1_0000_0000
    assert memory_of(domain).read(far * PAGE + 8, 16) == bytes(domain.pages[far][8:24])


def test_pseudo_physical_hole_names_the_first_page_that_is_missing(domain: Domain) -> None:
    with pytest.raises(Fault, match="pfn 0x40 is not there") as e:
        memory_of(domain).read(63 * PAGE + 4000, 200)
    assert (e.value.space, e.value.address) == ("pfn", 64)


@pytest.mark.parametrize("width", [8, 4])
@pytest.mark.parametrize(("at", "length"), [(0, 0), (0, 10), (4090, 12), (63 * PAGE + 5, 3 * PAGE), (0, 67 * PAGE)])
def test_virtual_across_pages_that_do_not_lie_side_by_side(width: Width, at: int, length: int) -> None:
    domain = pv_domain(width=width, pfns=[*range(64), 80, 79, 78])
    whole = b"".join(bytes(domain.pages[pfn]) for pfn in domain.vaddrs)
    start = min(domain.vaddrs.values())
    assert memory_of(domain).read_virtual(start + at, length) == whole[at : at + length]


def test_virtual_hole_names_where_the_walk_ended(domain: Domain) -> None:
    end = max(domain.vaddrs.values()) + PAGE
    with pytest.raises(Fault) as e:
        memory_of(domain).read_virtual(end - 8, 16)
    assert (e.value.space, e.value.address, e.value.level) == ("vaddr", end, 1)


def test_another_top_table(domain: Domain) -> None:
    memory = memory_of(domain)
    assert memory.user_top is not None
    assert memory.read_virtual(USER_VADDR, 32, top=memory.user_top) == bytes(domain.pages[domain.places.user][:32])
    with pytest.raises(Fault):
        memory.read_virtual(domain.vaddrs[0], 32, top=memory.user_top)


def test_the_end_of_the_address_space(domain: Domain) -> None:
    with pytest.raises(Fault):
        memory_of(domain).read_virtual((1 << 64) - 8, 16)
