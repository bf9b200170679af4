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


def test_page_returns_content_and_type(domain: Domain) -> None:
    memory = memory_of(domain)
    for pfn, content in domain.pages.items():
        assert memory.page(pfn) == bytes(content)
        assert memory.type(pfn) == domain.types[pfn]
    assert memory.type(77) == ABSENT
    with pytest.raises(Fault) as e:
        memory.page(77)
    assert (e.value.space, e.value.address) == ("pfn", 77)


@pytest.mark.parametrize(
    ("at", "length"), [(0, 1), (0, PAGE), (1, PAGE), (4095, 2), (100, 3 * PAGE), (PAGE - 1, 1), (5, 0), (PAGE, 0)]
)
def test_read_across_pages_joins_them(domain: Domain, at: int, length: int) -> None:
    whole = b"".join(bytes(domain.pages[pfn]) for pfn in range(64))
    assert memory_of(domain).read(at, length) == whole[at : at + length]


def test_read_to_last_byte_of_page_succeeds(domain: Domain) -> None:
    """The page behind it is not there, and is not asked for."""
    assert memory_of(domain).read(63 * PAGE, PAGE) == bytes(domain.pages[63])
    assert memory_of(domain).read(64 * PAGE - 1, 1) == bytes(domain.pages[63][-1:])


def test_read_at_high_address_succeeds(domain: Domain) -> None:
    far = 0x1_0000_0000
    assert memory_of(domain).read(far * PAGE + 8, 16) == bytes(domain.pages[far][8:24])


def test_read_hole_raises_fault_with_first_missing_pfn(domain: Domain) -> None:
    with pytest.raises(Fault) as e:
        memory_of(domain).read(63 * PAGE + 4000, 200)
    assert (e.value.space, e.value.address) == ("pfn", 64)


@pytest.mark.parametrize("width", [8, 4])
@pytest.mark.parametrize(("at", "length"), [(0, 0), (0, 10), (4090, 12), (63 * PAGE + 5, 3 * PAGE), (0, 67 * PAGE)])
def test_read_virtual_across_scattered_pages_joins_them(width: Width, at: int, length: int) -> None:
    domain = pv_domain(width=width, pfns=[*range(64), 80, 79, 78])
    whole = b"".join(bytes(domain.pages[pfn]) for pfn in domain.vaddrs)
    start = min(domain.vaddrs.values())
    assert memory_of(domain).read_virtual(start + at, length) == whole[at : at + length]


def test_read_virtual_hole_raises_fault_with_level_and_entry(domain: Domain) -> None:
    end = max(domain.vaddrs.values()) + PAGE
    with pytest.raises(Fault) as e:
        memory_of(domain).read_virtual(end - 8, 16)
    assert (e.value.space, e.value.address, e.value.level) == ("vaddr", end, 1)


def test_read_virtual_with_user_top_uses_that_table(domain: Domain) -> None:
    memory = memory_of(domain)
    assert memory.user_top is not None
    assert memory.read_virtual(USER_VADDR, 32, top=memory.user_top) == bytes(domain.pages[domain.places.user][:32])
    with pytest.raises(Fault):
        memory.read_virtual(domain.vaddrs[0], 32, top=memory.user_top)


def test_read_virtual_at_end_of_address_space_raises_fault(domain: Domain) -> None:
    with pytest.raises(Fault):
        memory_of(domain).read_virtual((1 << 64) - 8, 16)
