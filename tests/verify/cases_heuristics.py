"""Ways to look like no kernel does, where no rule of Xen's is broken."""

from __future__ import annotations

from tests.support.breakage import BASIC, WIDTHS, Where, at_entry, at_record, case, free_entry
from tests.support.writers.domain import RW, Domain, P
from xenpv.verify import rules

US, AVAILABLE, GLOBAL = 1 << 2, 1 << 10, 1 << 8
NOWHERE = 0xFFFF_A000_0000_0000  # canonical, the guest's own, and not mapped


def at_vcpu_1() -> Where:
    return at_record(BASIC, 1, vcpu=1)


def trap_table(d: Domain) -> None:
    """Handlers for the first twenty vectors, and a null selector as Xen hands it out for one that has none."""
    for vector in range(20):
        trap = d.vcpus[1]["trap_ctxt"][vector]
        trap["vector"], trap["flags"], trap["cs"] = vector, 3 if vector == 3 else 0, 0xE033
        trap["address"] = d.vaddrs[d.places.text] + 0x200 + vector * 16
    d.vcpus[1]["trap_ctxt"][30]["cs"] = 3


@case(rules.VCPU_RESUME, "rip is not mapped", vcpus=2)
def _(d: Domain) -> Where:
    d.vcpus[1]["user_regs"]["rip"] = NOWHERE
    return at_vcpu_1()


@case(rules.VCPU_RESUME, "rsp is not mapped", vcpus=2)
def _(d: Domain) -> Where:
    d.vcpus[1]["user_regs"]["rsp"] = NOWHERE + 4096
    return at_vcpu_1()


@case(rules.VCPU_HANDLER, "event callback is not mapped", vcpus=2)
def _(d: Domain) -> Where:
    d.vcpus[1]["event_callback_eip"] = NOWHERE
    return at_vcpu_1()


@case(rules.VCPU_HANDLER, "failsafe callback is not mapped", vcpus=2)
def _(d: Domain) -> Where:
    d.vcpus[1]["failsafe_callback_eip"] = NOWHERE
    return at_vcpu_1()


@case(rules.VCPU_HANDLER, "syscall entry is not mapped", vcpus=2)
def _(d: Domain) -> Where:
    d.vcpus[1]["syscall_callback_eip"] = NOWHERE
    return at_vcpu_1()


@case(rules.VCPU_HANDLER, "a trap has another's vector", vcpus=2, prepare=trap_table)
def _(d: Domain) -> Where:
    d.vcpus[1]["trap_ctxt"][14]["vector"] = 15
    return at_vcpu_1()


@case(rules.VCPU_HANDLER, "a trap has unknown flags", vcpus=2, prepare=trap_table)
def _(d: Domain) -> Where:
    d.vcpus[1]["trap_ctxt"][14]["flags"] = 8
    return at_vcpu_1()


@case(rules.VCPU_HANDLER, "a trap's handler is not mapped", vcpus=2, prepare=trap_table)
def _(d: Domain) -> Where:
    d.vcpus[1]["trap_ctxt"][14]["address"] = NOWHERE
    return at_vcpu_1()


@case(rules.VCPU_HANDLER, "a trap has a selector of its own", vcpus=2, prepare=trap_table)
def _(d: Domain) -> Where:
    d.vcpus[1]["trap_ctxt"][14]["cs"] = 0xE03B
    return at_vcpu_1()


@case(rules.VCPU_HANDLER, "a trap without a handler is not empty", vcpus=2, prepare=trap_table)
def _(d: Domain) -> Where:
    d.vcpus[1]["trap_ctxt"][200]["flags"] = 4
    return at_vcpu_1()


def lone_bit(d: Domain, level: int, bit: int) -> Where:
    table = next(s.table for s in d.walk(d.vaddrs[d.places.text]) if s.level == level)
    entry = free_entry(d, table)
    d.table(table)[entry] = 1 << bit
    return at_entry(table, level, entry)


@case(rules.PTE_OUTLIER, "a single bit in L1", widths=WIDTHS, also=[rules.PTE_L1TF])
def _(d: Domain) -> Where:
    return lone_bit(d, 1, 44)


@case(rules.PTE_OUTLIER, "a single bit in L2", widths=WIDTHS)
def _(d: Domain) -> Where:
    return lone_bit(d, 2, 63)


@case(rules.PTE_OUTLIER, "a single bit in L4")
def _(d: Domain) -> Where:
    return lone_bit(d, 4, 6)


def leaf_in_a_run(d: Domain, flip: int) -> Where:
    step = d.walk(d.vaddrs[d.places.data[100]])[-1]
    d.table(step.table)[step.entry] = step.pte ^ flip
    return at_entry(step.table, 1, step.entry)


@case(rules.PTE_OUTLIER, "another pfn", widths=WIDTHS, pfns=range(600))
def _(d: Domain) -> Where:
    return leaf_in_a_run(d, (d.places.data[100] ^ d.places.data[5]) << 12)


@case(rules.PTE_OUTLIER, "not present any more", widths=WIDTHS, pfns=range(600), also=[rules.PTE_L1TF])
def _(d: Domain) -> Where:
    return leaf_in_a_run(d, P)


@case(rules.PTE_OUTLIER, "alone not for the user", widths=WIDTHS, pfns=range(600))
def _(d: Domain) -> Where:
    return leaf_in_a_run(d, US)


@case(rules.PTE_OUTLIER, "alone global", widths=WIDTHS, pfns=range(600))
def _(d: Domain) -> Where:
    return leaf_in_a_run(d, GLOBAL)


@case(rules.PTE_OUTLIER, "alone with a bit of software's", widths=WIDTHS, pfns=range(600))
def _(d: Domain) -> Where:
    return leaf_in_a_run(d, AVAILABLE)


def protect_one(d: Domain) -> None:
    """A page that is read-only in the midst of others: nothing odd."""
    step = d.walk(d.vaddrs[d.places.data[50]])[-1]
    d.table(step.table)[step.entry] &= ~RW & (1 << 64) - 1


@case(rules.PTE_OUTLIER, "another pfn, beside a protected page", pfns=range(600), prepare=protect_one)
def _(d: Domain) -> Where:
    return leaf_in_a_run(d, (d.places.data[100] ^ d.places.data[6]) << 12)
