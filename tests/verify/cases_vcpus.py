"""Ways to break vcpus and start info."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.support.breakage import BASIC, UNMAPPED, WIDTHS, Where, at_page, at_record, case, nowhere
from tests.support.writers.domain import Domain
from tests.support.writers.stream import XALLOC
from xenpv.abi.declare import Width
from xenpv.abi.xen import START_INFO
from xenpv.verify import rules

EXTENDED = "X86_PV_VCPU_EXTENDED"
HOLE = 0x0000_9000_0000_0000  # not canonical


def set_suspend_record(domain: Domain, pfn: int) -> Where:
    domain.vcpus[0]["user_regs"]["rdx" if domain.width == 8 else "edx"] = pfn
    return at_record(BASIC, pfn=pfn, vcpu=0)


def absent(domain: Domain) -> int:
    """The pfn, within the domain, that has no page."""
    return domain.entries - 1


@case(rules.VCPU0, "the other vcpus came", widths=WIDTHS, vcpus=3, config={"vcpus": 3})
def _(d: Domain) -> Where:
    del d.vcpus[0]
    return nowhere(vcpu=0)


@case(rules.VCPU_BASIC, "the rest of it came", widths=WIDTHS, vcpus=3, rewrite=lambda s: s.replace(BASIC, nth=1))
def _(d: Domain) -> Where:
    return nowhere(vcpu=1)


@case(rules.VCPU_COUNT, "three vcpus, two allowed", widths=WIDTHS, vcpus=3, config={"vcpus": 2})
def _(d: Domain) -> Where:
    return at_record(BASIC, 2, vcpu=2, record=None, extent=0)


@case(rules.START_INFO, "beyond the end", widths=WIDTHS)
def _(d: Domain) -> Where:
    return set_suspend_record(d, d.entries)


@case(rules.START_INFO, "a page table", widths=WIDTHS)
def _(d: Domain) -> Where:
    return set_suspend_record(d, d.places.top)


@case(rules.START_INFO, "no such page", widths=WIDTHS)
def _(d: Domain) -> Where:
    return set_suspend_record(d, absent(d))


@case(rules.START_INFO, "no content")
def _(d: Domain) -> Where:
    d.types[d.places.start_info] = XALLOC
    return at_record(BASIC, pfn=d.places.start_info, vcpu=0, extent=0)


@case(rules.START_INFO_MAGIC, "another page", widths=WIDTHS)
def _(d: Domain) -> Where:
    d.start_info["magic"] = b"xen-2.0-x86_64"
    return at_page(d.places.start_info, extent=32)


@case(rules.START_INFO_MAGIC, "of the other width", widths=WIDTHS)
def _(d: Domain) -> Where:
    d.start_info["magic"] = b"xen-3.0-x86_32p" if d.width == 8 else b"xen-3.0-x86_64"
    return at_page(d.places.start_info, extent=32)


def at_start_info(d: Domain, member: str, pfn: int) -> Where:
    at = START_INFO.offset(d.width, member)
    return at_page(d.places.start_info, at=at, extent=d.width, pfn=pfn)


@case(rules.START_INFO_FRAMES, "xenstore beyond the end", widths=WIDTHS)
def _(d: Domain) -> Where:
    d.start_info["store_mfn"] = d.entries + 7
    return at_start_info(d, "store_mfn", d.entries + 7)


@case(rules.START_INFO_FRAMES, "no console page", widths=WIDTHS)
def _(d: Domain) -> Where:
    d.start_info["console"]["domU"]["mfn"] = absent(d)
    return at_start_info(d, "console.domU.mfn", absent(d))


# process_start_info() takes any page; Xen then lets no daemon map it, or two programs write to one page.
RING_CONFLICTS: dict[str, Callable[[Domain], int]] = {
    "page table": lambda d: d.tables(1)[0],
    "top table": lambda d: d.places.top,
    "GDT frame": lambda d: d.places.gdt[0],
    "leaf of the p2m": lambda d: int(d.p2m_pfns[0]),
    "start info": lambda d: d.places.start_info,
}
for page, find_page in RING_CONFLICTS.items():

    @case(rules.START_INFO_FRAMES, f"xenstore is a {page}", widths=WIDTHS, vcpus=2)
    def _(d: Domain, find_page: Callable[[Domain], int] = find_page) -> Where:
        d.start_info["store_mfn"] = find_page(d)
        return at_start_info(d, "store_mfn", find_page(d))

    @case(rules.START_INFO_FRAMES, f"console is a {page}", widths=WIDTHS, vcpus=2)
    def _(d: Domain, find_page: Callable[[Domain], int] = find_page) -> Where:
        d.start_info["console"]["domU"]["mfn"] = find_page(d)
        return at_start_info(d, "console.domU.mfn", find_page(d))


@case(rules.START_INFO_FRAMES, "one ring for both", widths=WIDTHS, also=[rules.START_INFO_FRAMES])
def _(d: Domain) -> Where:
    ring = int(d.start_info["store_mfn"])
    d.start_info["console"]["domU"]["mfn"] = ring
    return at_start_info(d, "console.domU.mfn", ring).without_bytes()


@case(rules.START_INFO_FRAMES, "console beyond the end", widths=WIDTHS)
def _(d: Domain) -> Where:
    d.start_info["console"]["domU"]["mfn"] = d.entries
    return at_start_info(d, "console.domU.mfn", d.entries)


@case(rules.GDT_COUNT, "one too many", widths=WIDTHS, vcpus=2)
def _(d: Domain) -> Where:
    d.vcpus[1]["gdt_ents"] = 7169
    return at_record(BASIC, 1, vcpu=1)


def gdt_frame(d: Domain, pfn: int) -> Where:
    d.vcpus[1]["gdt_frames"][1] = pfn
    return at_record(BASIC, 1, vcpu=1, pfn=pfn)


@case(rules.GDT_FRAME, "beyond the end", widths=WIDTHS, vcpus=2, gdt_frames=2)
def _(d: Domain) -> Where:
    return gdt_frame(d, d.entries)


@case(rules.GDT_FRAME, "a page table", widths=WIDTHS, vcpus=2, gdt_frames=2)
def _(d: Domain) -> Where:
    return gdt_frame(d, d.tables(1)[0])


@case(rules.GDT_FRAME, "no such page", widths=WIDTHS, vcpus=2, gdt_frames=2)
def _(d: Domain) -> Where:
    return gdt_frame(d, absent(d))


def set_cr3(d: Domain, pfn: int) -> Where:
    d.vcpus[1]["ctrlreg"][3] = d.cr3(pfn)
    return at_record(BASIC, 1, vcpu=1, pfn=pfn)


@case(rules.CR3, "beyond the end", widths=WIDTHS, vcpus=2, may=UNMAPPED)
def _(d: Domain) -> Where:
    return set_cr3(d, d.entries)


@case(rules.CR3, "an ordinary page", widths=WIDTHS, vcpus=2, may=UNMAPPED)
def _(d: Domain) -> Where:
    return set_cr3(d, d.places.text)


@case(rules.CR3, "a table below the top", widths=WIDTHS, vcpus=2, may=UNMAPPED)
def _(d: Domain) -> Where:
    return set_cr3(d, d.tables(d.levels - 1)[0])


@case(rules.CR3, "no such page", widths=WIDTHS, vcpus=2, may=UNMAPPED)
def _(d: Domain) -> Where:
    return set_cr3(d, absent(d))


def set_user_cr3(d: Domain, pfn: int) -> Where:
    d.vcpus[1]["ctrlreg"][1] = pfn << 12 | 1
    return at_record(BASIC, 1, vcpu=1, pfn=pfn)


@case(rules.USER_CR3, "beyond the end", vcpus=2)
def _(d: Domain) -> Where:
    return set_user_cr3(d, 1 << 39)


@case(rules.USER_CR3, "an ordinary page", vcpus=2)
def _(d: Domain) -> Where:
    return set_user_cr3(d, d.places.data[0])


@case(rules.USER_CR3, "no such page", vcpus=2)
def _(d: Domain) -> Where:
    return set_user_cr3(d, absent(d))


@case(rules.USER_CR3, "the bit that marks a pfn is not set", vcpus=2)
def _(d: Domain) -> Where:
    d.vcpus[1]["ctrlreg"][1] -= 1
    return at_record(BASIC, 1, vcpu=1, pfn=None)


@case(rules.VCPU_STATE, "in user mode without user page tables", vcpus=2, user=False)
def _(d: Domain) -> Where:
    d.vcpus[1]["flags"] = 1 << 5
    return at_record(BASIC, 1, vcpu=1, pfn=None)


def _state(name: str, change: Callable[[Any], None], widths: tuple[Width, ...] = (8,), vcpu: int = 1) -> None:
    @case(rules.VCPU_STATE, name, widths=widths, vcpus=2, may=UNMAPPED)
    def _(d: Domain) -> Where:
        change(d.vcpus[vcpu])
        return at_record(BASIC, vcpu, vcpu=vcpu, pfn=None)


def _set(*path: str | int, to: int) -> Callable[[Any], None]:
    def change(context: Any) -> None:
        for name in path[:-1]:
            context = context[name]
        context[path[-1]] = to

    return change


for register in ("kernel_sp", "fs_base", "gs_base_kernel", "gs_base_user", "event_callback_eip",
                 "failsafe_callback_eip", "syscall_callback_eip"):  # fmt: skip
    _state(f"{register} is not canonical", _set(register, to=HOLE))
for register in ("rip", "rsp"):
    _state(f"{register} is not canonical", _set("user_regs", register, to=HOLE))
_state("a trap's handler is not canonical", _set("trap_ctxt", 14, "address", to=HOLE))
_state("dr6 is too wide", _set("debugreg", 6, to=1 << 32 | 0xFFFF0FF0))
_state("dr7 is too wide", _set("debugreg", 7, to=1 << 40 | 0x400))
_state("dr3 is not canonical", _set("debugreg", 3, to=HOLE))
_state("dr0 is in Xen, 64 bit", _set("debugreg", 0, to=0xFFFF_8300_0000_0000))
_state("dr0 is in Xen", _set("debugreg", 0, to=0xFFC0_0000), (4,))
_state("the LDT is in the midst of a page", _set("ldt_base", to=0xC000_0008), WIDTHS)
_state("the LDT is in Xen", _set("ldt_base", to=0xFFFF_8300_0000_0000))
_state("the LDT has too many entries", _set("ldt_ents", to=8193), WIDTHS)
_state("vm_assist has unknown bits", _set("vm_assist", to=1 << 9), WIDTHS, 0)


def set_extended(d: Domain, at: int, value: int) -> Where:
    d.extended[1] = d.extended[1][:at] + value.to_bytes(4, "little") + d.extended[1][at + 4 :]
    return at_record(EXTENDED, 1, vcpu=1)


@case(rules.VCPU_EXTENDED, "of another vcpu", widths=WIDTHS, vcpus=2)
def _(d: Domain) -> Where:
    return set_extended(d, 0, 0)


@case(rules.VCPU_EXTENDED, "larger than it is", widths=WIDTHS, vcpus=2)
def _(d: Domain) -> Where:
    return set_extended(d, 4, 129)


@case(rules.VCPU_EXTENDED, "smaller than any Xen's", widths=WIDTHS, vcpus=2)
def _(d: Domain) -> Where:
    return set_extended(d, 4, 8)


@case(rules.VCPU_EXTENDED, "next to nothing", vcpus=2)
def _(d: Domain) -> Where:
    d.extended[1] = d.extended[1][:4]
    return at_record(EXTENDED, 1, vcpu=1, extent=0)
