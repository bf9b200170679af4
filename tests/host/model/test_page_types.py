"""Xen's rules for page types, one by one, with its errnos (xen.git:xen/arch/x86/mm.c)."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from tests.support.model_guest import (
    READ_ONLY,
    TABLE,
    ModelGuest,
    array,
    context,
    make_guest,
    page,
    pfns,
    write_page_tables,
)
from tests.support.model_invariants import check_invariants
from xenpv.abi.declare import Width
from xenpv.abi.domctl import PageType
from xenpv.abi.x86 import (
    PTE_FRAME_MASK,
    PTE_P,
    PTE_PSE,
    PTE_RW,
    PTE_US,
    VCPU_GUEST_CONTEXT,
    XEN_L4_SLOTS,
    XEN_PAE_L2_FIRST,
)
from xenpv.errors import HostError
from xenpv.frames import DomId
from xenpv.host.model.host import ModelHost


def refused(call: Callable[[], object], number: int, culprit: str = "dom") -> None:
    """Check that a call raises HostError with this errno, and names what is at fault."""
    with pytest.raises(HostError, match=culprit) as e:
        call()
    assert e.value.errno == number, e.value


@dataclass
class Bare:
    """A domain with a few frames and no tables."""

    host: ModelHost
    domid: DomId
    mfns: list[int]

    def fill(self, n: int, entries: dict[int, int]) -> int:
        self.host.write_frames(self.domid, array(self.mfns[n]), page(entries))
        return self.mfns[n]

    def pte(self, n: int, flags: int = TABLE) -> int:
        return self.mfns[n] << 12 | flags

    def pin(self, n: int, level: int) -> None:
        self.host.hypervisor.pin(self.domid, self.mfns[n], level)

    def types(self, *frames: int) -> list[int]:
        return [int(t) for t in self.host.page_types(self.domid, array(*(self.mfns[n] for n in frames)))]

    def entries(self, n: int) -> list[int]:
        return [int(e) for e in self.host.map_frames(self.domid, array(self.mfns[n]))[0].view("<u8")[0]]


def bare(width: Width = 8, size: int = 1 << 30) -> Bare:
    host = ModelHost(size)
    domid = host.create(width, max_pages=16)
    return Bare(host, domid, host.populate_physmap(domid, pfns(16)).tolist())


def tree(b: Bare) -> None:
    """Frame 4 an L4, 3 its L3, 2 its L2, 1 its L1, which maps frame 0."""
    for n in (1, 2, 3, 4):
        b.fill(n, {9: b.pte(n - 1)})


def test_pin_of_an_l4_types_all_tables_below_and_unpin_untypes_them() -> None:
    b = bare()
    tree(b)
    b.pin(4, 4)
    assert b.types(0, 1, 2, 3, 4) == [0, 1, 2, 3, PageType.L4TAB_PIN]
    check_invariants(b.host)
    b.host.hypervisor.unpin(b.domid, b.mfns[4])
    assert b.types(0, 1, 2, 3, 4) == [0] * 5
    check_invariants(b.host)
    b.fill(1, {})


def test_pin_of_a_lower_table_keeps_it_typed() -> None:
    b = bare()
    tree(b)
    b.pin(4, 4)
    b.pin(2, 2)
    b.host.hypervisor.unpin(b.domid, b.mfns[4])
    assert b.types(1, 2, 3, 4) == [1, PageType.L2TAB_PIN, 0, 0]
    check_invariants(b.host)


def test_pin_twice_and_unpin_twice_raise_einval() -> None:
    b = bare()
    b.pin(1, 1)
    refused(lambda: b.pin(1, 1), errno.EINVAL, f"{b.mfns[1]:#x}")
    b.host.hypervisor.unpin(b.domid, b.mfns[1])
    refused(lambda: b.host.hypervisor.unpin(b.domid, b.mfns[1]), errno.EINVAL, f"{b.mfns[1]:#x}")
    check_invariants(b.host)


def test_pin_of_a_foreign_frame_raises_einval() -> None:
    b = bare()
    [theirs] = b.host.populate_physmap(b.host.create(max_pages=1), pfns(1)).tolist()
    for mfn in (theirs, b.host.max_mfn() + 1, (1 << 40) - 1):
        refused(lambda mfn=mfn: b.host.hypervisor.pin(b.domid, mfn, 1), errno.EINVAL)  # type: ignore[misc]
        b.fill(2, {0: mfn << 12 | TABLE})
        refused(lambda: b.pin(2, 2), errno.EINVAL)


@pytest.mark.parametrize("flags", [TABLE, READ_ONLY])
def test_pin_of_an_l1_that_maps_a_foreign_frame_raises_xens_errno(flags: int) -> None:
    b = bare()
    [theirs] = b.host.populate_physmap(b.host.create(max_pages=1), pfns(1)).tolist()
    for mfn, number in (
        (theirs, errno.EBUSY),
        (b.host.info(DomId(0)).shared_info_mfn, errno.EBUSY),
        (b.host.max_mfn() + 1, errno.EPERM),
        ((1 << 40) - 1, errno.EINVAL),
    ):
        b.fill(1, {0: b.pte(5), 7: mfn << 12 | flags})
        refused(lambda: b.pin(1, 1), number, r"L1\[7\]")
    b.fill(1, {7: b.host.info(b.domid).shared_info_mfn << 12 | flags})
    b.pin(1, 1)
    check_invariants(b.host)
    shared = array(b.host.info(b.domid).shared_info_mfn)
    assert b.host.page_types(b.domid, shared).tolist() == [PageType.XTAB]


def test_pin_of_an_l1_reports_its_first_bad_entry() -> None:
    b = bare()
    b.fill(1, {3: b.host.max_mfn() + 1 << 12 | TABLE, 5: b.pte(0, TABLE | PTE_PSE)})
    refused(lambda: b.pin(1, 1), errno.EPERM, r"L1\[3\]")


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_pin_of_a_table_with_forbidden_flags_raises_einval(level: int) -> None:
    b = bare()
    b.fill(level, {9: b.pte(level - 1, TABLE | PTE_PSE)})
    refused(lambda: b.pin(level, level), errno.EINVAL)
    check_invariants(b.host)


def test_pin_of_a_table_that_maps_a_table_writable_raises_ebusy() -> None:
    b = bare()
    b.fill(1, {0: b.pte(2)})
    b.fill(2, {0: b.pte(1)})
    refused(lambda: b.pin(2, 2), errno.EBUSY, r"L1\[0\]")  # the L1 would map the L2 above it
    b.fill(1, {0: b.pte(1)})
    refused(lambda: b.pin(1, 1), errno.EBUSY)  # or itself
    b.fill(1, {0: b.pte(2, READ_ONLY), 1: b.pte(1, READ_ONLY)})
    b.pin(2, 2)
    check_invariants(b.host)


def test_pin_of_a_frame_mapped_writable_raises_einval() -> None:
    b = bare()
    b.fill(1, {0: b.pte(2)})
    b.pin(1, 1)
    for level in (1, 2, 3, 4):
        refused(lambda level=level: b.pin(2, level), errno.EINVAL)  # type: ignore[misc]
    b.host.hypervisor.mmu_update(b.domid, [(b.mfns[1], 0, 0)])
    b.pin(2, 4)


def test_write_frames_of_a_table_raises_ebusy() -> None:
    b = bare()
    b.pin(1, 1)
    refused(lambda: b.fill(1, {}), errno.EBUSY)
    assert b.host.map_frames(b.domid, array(b.mfns[1]))[1].all()
    refused(lambda: b.host.write_frames(DomId(0), array(b.mfns[0]), page({})), errno.EINVAL)


def test_pin_as_a_table_of_two_levels_raises_einval() -> None:
    b = bare()
    b.pin(1, 1)
    refused(lambda: b.pin(1, 2), errno.EINVAL)
    b.fill(3, {0: b.pte(1)})
    refused(lambda: b.pin(3, 3), errno.EINVAL)
    b.fill(2, {0: b.pte(1), 1: b.pte(1), 511: b.pte(1)})
    b.pin(2, 2)
    check_invariants(b.host)


def test_pin_that_fails_deep_down_drops_all_references() -> None:
    b = bare()
    b.fill(1, {0: b.pte(0)})
    b.fill(2, {0: b.pte(1), 1: b.pte(5)})
    b.fill(5, {0: b.pte(0, TABLE | PTE_PSE)})
    b.fill(3, {0: b.pte(2)})
    refused(lambda: b.pin(3, 3), errno.EINVAL)
    assert b.types(0, 1, 2, 3, 5) == [0] * 5
    check_invariants(b.host)
    b.fill(1, {})


def test_pin_adjusts_entries_as_xen_does() -> None:
    b = bare()
    b.fill(1, {0: b.pte(0, PTE_P | PTE_RW), 1: b.pte(0, PTE_P | PTE_US)})
    b.fill(2, {0: b.pte(1, PTE_P | PTE_RW)})
    b.pin(2, 2)
    assert b.entries(2)[0] == b.pte(1, PTE_P | PTE_RW | PTE_US)
    assert b.entries(1)[:2] == [b.pte(0, 1 << 52 | PTE_P | PTE_RW | PTE_US), b.pte(0, 1 << 8 | PTE_P | PTE_US)]
    b = bare(4)
    b.fill(1, {0: b.pte(0, PTE_P | PTE_RW)})
    b.pin(1, 1)
    assert b.entries(1)[0] == b.pte(0, PTE_P | PTE_RW)


def test_pin_of_an_l4_fills_xens_slots_which_mmu_update_refuses() -> None:
    b = bare()
    tree(b)
    b.fill(4, {9: b.pte(3), 256: 1 << 63 | 0x7F, 271: b.pte(5)})
    b.pin(4, 4)
    entries = b.entries(4)
    assert entries[258] & PTE_FRAME_MASK == b.mfns[4] << 12
    theirs = array(*(entries[i] >> 12 & (1 << 40) - 1 for i in XEN_L4_SLOTS if entries[i] and i != 258))
    assert (b.host.page_types(b.domid, theirs) == PageType.XTAB).all()
    for slot in (256, 271):
        refused(lambda slot=slot: b.host.hypervisor.mmu_update(b.domid, [(b.mfns[4], slot, 0)]), errno.EINVAL)  # type: ignore[misc]
    check_invariants(b.host)


def test_linear_page_tables_are_read_only_and_one_deep() -> None:
    b = bare()
    b.fill(4, {300: b.pte(4)})
    refused(lambda: b.pin(4, 4), errno.EINVAL)
    b.fill(4, {300: b.pte(4, READ_ONLY)})
    b.pin(4, 4)  # itself
    b.fill(5, {300: b.pte(4, READ_ONLY)})
    b.pin(5, 4)  # another
    check_invariants(b.host)
    b.fill(6, {300: b.pte(5, READ_ONLY)})
    refused(lambda: b.pin(6, 4), errno.EINVAL)  # one that has linear entries itself
    refused(lambda: b.host.hypervisor.mmu_update(b.domid, [(b.mfns[4], 301, b.pte(5, READ_ONLY))]), errno.EINVAL)
    b.host.hypervisor.mmu_update(b.domid, [(b.mfns[5], 300, 0)])
    b.pin(6, 4)
    check_invariants(b.host)
    b.fill(7, {300: b.pte(8, READ_ONLY)})
    b.fill(1, {0: b.pte(8)})
    b.pin(1, 1)
    refused(lambda: b.pin(7, 4), errno.EINVAL)  # one that is no table
    b.host.hypervisor.mmu_update(b.domid, [(b.mfns[1], 0, 0)])
    b.pin(7, 4)
    assert b.types(8) == [PageType.L3TAB]  # nor must it be: it becomes what an entry of an L4 names
    check_invariants(b.host)


def test_mmu_update_takes_new_and_drops_old_references() -> None:
    b = bare()
    tree(b)
    b.pin(4, 4)
    l1 = b.mfns[1]
    b.host.hypervisor.mmu_update(b.domid, [(l1, 9, b.pte(5)), (l1, 10, b.pte(5, READ_ONLY))])
    check_invariants(b.host)
    b.pin(0, 1)  # no longer mapped writable
    refused(
        lambda: b.host.hypervisor.mmu_update(b.domid, [(l1, 11, b.pte(6)), (l1, 9, b.pte(2)), (l1, 0, 0)]), errno.EBUSY
    )
    assert [b.entries(1)[i] >> 12 & (1 << 40) - 1 for i in (9, 11)] == [b.mfns[5], b.mfns[6]], "up to the bad one"
    b.host.hypervisor.mmu_update(b.domid, [(b.mfns[3], 9, b.pte(2, READ_ONLY)), (b.mfns[2], 9, 0)])
    assert b.types(1, 2, 3) == [0, 2, 3]
    refused(lambda: b.host.hypervisor.mmu_update(b.domid, [(b.mfns[2], 0, b.pte(3))]), errno.EINVAL)
    refused(lambda: b.host.hypervisor.mmu_update(DomId(0), [(l1, 9, 0)]), errno.EINVAL)
    check_invariants(b.host)


def test_mmu_update_of_a_frame_that_is_no_table_writes_it() -> None:
    b = bare()
    b.host.hypervisor.mmu_update(b.domid, [(b.mfns[7], 3, 0xFFF)])
    assert b.entries(7)[3] == 0xFFF


def pae(b: Bare) -> None:
    """Frame 3 the L3, whose L3[3] is frame 2 and L3[0] frame 4."""
    b.fill(3, {0: b.pte(4, PTE_P), 3: b.pte(2, PTE_P), 4: 0xFFF, 511: b.pte(0)})


def test_pin_of_a_pae_l3_needs_entry_3_and_fills_xens_slots() -> None:
    b = bare(4)
    b.fill(3, {0: b.pte(4, PTE_P)})
    refused(lambda: b.pin(3, 3), errno.EINVAL, r"L3\[3\]")
    pae(b)
    b.pin(3, 3)
    assert b.entries(3)[4:] == [0] * 508
    assert all(b.entries(2)[XEN_PAE_L2_FIRST:])
    refused(lambda: b.host.hypervisor.mmu_update(b.domid, [(b.mfns[2], 511, 0)]), errno.EPERM)
    refused(lambda: b.host.hypervisor.mmu_update(b.domid, [(b.mfns[3], 3, 0)]), errno.EINVAL)
    b.host.hypervisor.mmu_update(b.domid, [(b.mfns[4], 511, 0), (b.mfns[3], 0, 0)])
    check_invariants(b.host)


def test_pin_of_the_last_pae_l2_twice_raises_einval() -> None:
    b = bare(4)
    b.fill(3, {0: b.pte(2, PTE_P), 3: b.pte(2, PTE_P)})
    refused(lambda: b.pin(3, 3), errno.EINVAL)
    pae(b)
    b.pin(3, 3)
    b.fill(5, {3: b.pte(2, PTE_P)})
    refused(lambda: b.pin(5, 3), errno.EINVAL)
    refused(lambda: b.pin(2, 2), errno.EINVAL)
    check_invariants(b.host)


def test_unpin_makes_the_last_pae_l2_an_ordinary_frame() -> None:
    b = bare(4)
    pae(b)
    b.pin(3, 3)
    b.host.hypervisor.unpin(b.domid, b.mfns[3])
    b.fill(2, {XEN_PAE_L2_FIRST: b.pte(1)})
    b.pin(2, 2)
    assert b.types(1) == [PageType.L1TAB]
    b.host.hypervisor.mmu_update(b.domid, [(b.mfns[2], 511, 0)])
    check_invariants(b.host)


def test_pin_of_a_linear_pae_l3_raises_einval() -> None:
    b = bare(4)
    b.fill(3, {0: b.pte(3, PTE_P), 3: b.pte(2, PTE_P)})
    refused(lambda: b.pin(3, 3), errno.EINVAL)


def test_destroy_forgets_linear_page_tables() -> None:
    b = bare()
    b.pin(4, 4)
    b.fill(5, {300: b.pte(4, READ_ONLY)})
    b.pin(5, 4)
    b.host.destroy(b.domid)
    heir = b.host.create(max_pages=120_000)
    mfns = b.host.populate_physmap(heir, pfns(120_000))
    assert np.isin(array(b.mfns[4], b.mfns[5]), mfns).all()
    again = Bare(b.host, heir, b.mfns)
    again.pin(5, 4)
    again.fill(4, {300: b.pte(5, READ_ONLY)})
    again.pin(4, 4)


def test_pin_of_an_l4_of_a_32_bit_domain_is_ignored() -> None:
    b = bare(4)
    b.pin(4, 4)
    assert b.types(4) == [0]


def test_pin_of_a_pae_l3_above_4_gib_after_the_start_raises_erange() -> None:
    host = ModelHost(8 << 30)
    domid = host.create(4, max_pages=512 * 2048)
    mfns = host.populate_physmap(domid, pfns(2048) * np.uint64(512), 9)
    high, low = array(*mfns[mfns >= 1 << 20].tolist()), array(*mfns[mfns < 1 << 20].tolist())
    host.write_frames(domid, high[:1], page({3: int(high[1]) << 12 | PTE_P}))
    host.hypervisor.pin(domid, int(high[0]), 3)
    host.hypervisor.unpin(domid, int(high[0]))
    host.write_frames(domid, low[:1], page({3: int(low[1]) << 12 | PTE_P}))
    guest = ModelGuest(domid, 4, low[4:], low[:1], 0, 0, int(low[0]))
    host.set_vcpu_context(domid, 0, context(guest))
    refused(lambda: host.hypervisor.pin(domid, int(high[0]), 3), errno.ERANGE)


@pytest.mark.parametrize("width", [8, 4])
def test_set_vcpu_context_holds_its_tables_and_its_gdt(width: Width) -> None:
    host = ModelHost(1 << 30)
    domid = host.create(width, max_pages=64, vcpus=2)
    guest = write_page_tables(host, domid, width, host.populate_physmap(domid, pfns(64)))
    refused(lambda: host.vcpu_context(domid, 0), errno.ENODATA)
    host.hypervisor.mmu_update(domid, [(*guest.entry_of(1), int(guest.mfns[1]) << 12 | READ_ONLY)])
    host.set_vcpu_context(domid, 0, context(guest))
    check_invariants(host)
    assert host.vcpu_context(domid, 0) == context(guest)
    assert host.page_types(domid, array(guest.top)).tolist() == [4 if width == 8 else 3]
    refused(lambda: host.write_frames(domid, guest.mfns[1:2], page({})), errno.EBUSY)
    refused(lambda: host.hypervisor.mmu_update(domid, [(int(guest.mfns[1]), 0, 0)]), errno.EINVAL)
    data = np.frombuffer(bytearray(context(guest)), VCPU_GUEST_CONTEXT[width])
    data["user_regs"]["cs"] = 9
    host.set_vcpu_context(domid, 0, data.tobytes())
    data["ctrlreg"][0, 3] = 0x5000
    refused(lambda: host.set_vcpu_context(domid, 0, data.tobytes()), errno.EOPNOTSUPP)
    refused(lambda: host.set_vcpu_context(domid, 1, data.tobytes()), errno.EINVAL)
    check_invariants(host)
    refused(lambda: host.set_vcpu_context(domid, 1, b"short"), errno.EINVAL)
    refused(lambda: host.set_vcpu_context(domid, 2, data.tobytes()), errno.EINVAL)


def test_load_cr3_drops_the_old_table() -> None:
    host = ModelHost(1 << 30)
    guest = make_guest(host, 8, 64)
    host.hypervisor.mmu_update(guest.domid, [(*guest.entry_of(2), 0), (*guest.entry_of(3), 0)])
    empty, other = int(guest.mfns[2]), int(guest.mfns[3])
    host.hypervisor.load_cr3(guest.domid, empty)
    host.hypervisor.load_cr3(guest.domid, other, user=True)
    assert host.page_types(guest.domid, array(guest.top, empty, other)).tolist() == [PageType.L4TAB_PIN, 4, 4]
    host.hypervisor.unpin(guest.domid, guest.top)
    assert host.page_types(guest.domid, array(guest.top)).tolist() == [0]
    host.hypervisor.load_cr3(guest.domid, 0, user=True)
    refused(lambda: host.hypervisor.load_cr3(guest.domid, host.max_mfn() + 1), errno.EINVAL)
    check_invariants(host)
