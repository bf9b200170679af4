"""Ways to break vcpu state, TSC and CPU policy so that Xen refuses them."""

from __future__ import annotations

import struct
from collections.abc import Callable

from tests.support.breakage import Where, at_page, at_record, case, nowhere
from tests.support.writers.domain import RW, Domain
from tests.support.writers.stream import PAGE, Stream
from tests.support.xsave import xsave
from xenpv.abi.declare import Width
from xenpv.findings import Rule
from xenpv.verify import rules

NO_SUBLEAF = 0xFFFF_FFFF
HOLE = 0x0000_9000_0000_0000  # not canonical
TSC, XSAVE, MSRS, EXTENDED = "X86_TSC_INFO", "X86_PV_VCPU_XSAVE", "X86_PV_VCPU_MSRS", "X86_PV_VCPU_EXTENDED"
RECORD_HEADER, VCPU_HEADER = 8, 16  # bytes before the body, and before a vcpu's context


# --- TSC: xen.git:xen/arch/x86/time.c tsc_set_info() -----------------------------------------------------------------


def _tsc(rule: Rule, name: str, *fields: tuple[int, int]) -> None:
    """Register a way to break the TSC: (offset in the body, 32-bit value) of each field."""

    def rewrite(stream: Stream) -> None:
        for at, value in fields:
            stream.patch(TSC, RECORD_HEADER + at, struct.pack("<I", value))

    @case(rule, name, rewrite=rewrite)
    def _(_: Domain) -> Where:
        return at_record(TSC)


_tsc(rules.TSC_INFO, "PVRDTSCP", (0, 3))
_tsc(rules.TSC_INFO, "no mode", (0, 0xFFFF_FFFF))
_tsc(rules.TSC_INFO, "a frequency on which Xen hangs", (4, 1 << 29))
_tsc(rules.TSC_CLOCK, "no frequency", (4, 0))


@case(rules.TSC_CLOCK, "no record", rewrite=lambda stream: stream.replace(TSC))
def _(_: Domain) -> Where:
    return nowhere()


# --- XSAVE: xen.git:xen/arch/x86/domctl.c XEN_DOMCTL_setvcpuextstate, xstate.c validate_xstate() ---------------------

Bytes = Callable[[bytes], bytes]


def _xsave(name: str, data: bytes, make: Callable[[Domain], object] | None = None) -> None:
    @case(rules.VCPU_XSAVE, name, vcpus=2, prepare=make)
    def _(d: Domain) -> Where:
        d.xsave[1] = data
        return at_record(XSAVE, 1, vcpu=1, extent=0)


def without_avx(d: Domain) -> None:
    """Give the domain XSAVE, and no AVX."""
    d.cpuid_policy.append((1, NO_SUBLEAF, 0, 0, 1 << 26, 0))
    d.xsave = dict.fromkeys(d.xsave, xsave(3, 3, 576))


_xsave("a byte too short", xsave(7, 7, 831))
_xsave("a byte too long", xsave(7, 7, 833))
_xsave("AVX, and an area for SSE", xsave(7, 7, 576))
_xsave("SSE, and an area for AVX", xsave(3, 3, 832))
_xsave("shorter than any area", xsave(3, 3, 575))
_xsave("no area at all", xsave(3, 3, 0))
_xsave("an area for nothing", xsave(0, 0, 576, 0))
_xsave("xcr0 without xcr0_accum", xsave(3, 0, 0))
_xsave("xcr0 beyond xcr0_accum", xsave(7, 3, 576))
_xsave("xstate_bv beyond xcr0_accum", xsave(3, 3, 576, 7))
_xsave("xcr0 without x87", xsave(6, 7, 832))
_xsave("xcr0 with AVX and without SSE", xsave(5, 7, 832))
_xsave("xcr0 with a part of AVX-512", xsave(0x27, 0xE7, 2688), lambda d: d.cpuid_policy.pop())
_xsave("a compressed area", xsave(3, 3, 576, xcomp_bv=1 << 63 | 3))
_xsave("a reserved byte", xsave(3, 3, 576, reserved=1))
_xsave("states of protection keys, which only HVM has", xsave(3, 0x203, 576))
_xsave("AVX, which the policy lacks", xsave(3, 7, 832), without_avx)


# --- descriptors: xen.git:xen/arch/x86/pv/descriptor-tables.c check_descriptor() -------------------------------------

PRESENT = 1 << 47
CALL_GATE = PRESENT | 0xC << 40
TSS, LDT, INTERRUPT_GATE, TASK_GATE = (PRESENT | kind << 40 for kind in (9, 2, 0xE, 5))


def set_descriptor(d: Domain, pfn: int, index: int, value: int) -> Where:
    d.pages[pfn][index * 8 : index * 8 + 8] = struct.pack("<Q", value)
    return at_page(pfn, at=index * 8, extent=8)


def _gdt(name: str, value: int, widths: tuple[Width, ...] = (8, 4)) -> None:
    @case(rules.GDT_DESCRIPTOR, name, widths=widths, vcpus=2, gdt_frames=2)
    def _(d: Domain) -> Where:
        return set_descriptor(d, d.places.gdt[3], 511, value)


_gdt("a task state segment", TSS)
_gdt("an LDT", LDT)
_gdt("an interrupt gate", INTERRUPT_GATE)
_gdt("a task gate", TASK_GATE)
_gdt("a gate to a segment of Xen", CALL_GATE | 0xE008 << 16)
_gdt("a gate to Xen's code segment for the other width", CALL_GATE | 0xE019 << 16, (8,))
_gdt("a gate to Xen's code segment for the other width", CALL_GATE | 0xE033 << 16, (4,))
_gdt("a gate with a reserved bit", CALL_GATE | 1 << 39)
_gdt("a 64-bit segment", 0x00AF_FB00_0000_FFFF, (4,))


def map_ldt(d: Domain) -> None:
    """Give vcpu 1 an LDT, mapped read-only."""
    pfn = d.places.data[0]
    d.pages[pfn][:] = bytes(8) + struct.pack("<Q", 0x00CF_FB00_0000_FFFF) + bytes(PAGE - 16)
    vaddr = d.vaddrs[pfn]
    d.set_pte(vaddr, d.walk(vaddr)[-1].pte & ~RW)
    d.vcpus[1]["ldt_base"], d.vcpus[1]["ldt_ents"] = vaddr, 16


@case(rules.LDT_DESCRIPTOR, "a task state segment", vcpus=2, prepare=map_ldt)
def _(d: Domain) -> Where:
    return set_descriptor(d, d.places.data[0], 5, TSS)


# --- MSRs: xen.git:xen/arch/x86/domctl.c XEN_DOMCTL_set_vcpu_msrs ----------------------------------------------------


def _msrs(name: str, *entries: tuple[int, int, int]) -> None:
    @case(rules.VCPU_MSRS, name, vcpus=2)
    def _(d: Domain) -> Where:
        d.msrs[1] = b"".join(struct.pack("<IIQ", *entry) for entry in entries)
        return at_record(MSRS, 1, vcpu=1, extent=0)


_msrs("of an unknown index", (0xC000_0080, 0, 1))
_msrs("reserved is not 0", (0x140, 1, 1))
_msrs("too many", *[(0x140, 0, 1)] * 8)
_msrs("TSC_AUX of 33 bits", (0xC000_0103, 0, 1 << 32))
_msrs("a bit that no guest sets", (0x48, 0, 1 << 9))


# --- extended state: xen.git:xen/arch/x86/domctl.c XEN_DOMCTL_set_ext_vcpucontext ------------------------------------


def _extended(name: str, at: int, value: int) -> None:
    @case(rules.VCPU_EXTENDED, name, widths=(8, 4), vcpus=2)
    def _(d: Domain) -> Where:
        d.extended[1] = d.extended[1][:at] + struct.pack("<Q", value) + d.extended[1][at + 8 :]
        return at_record(EXTENDED, 1, vcpu=1)


_extended("syscall32's handler is not canonical", 8, HOLE)
_extended("sysenter's handler is not canonical", 16, 1 << 63)
_extended("an unknown machine-check capability", 32, 1 << 25 | 2)


# --- CPU policy: xen.git:xen/lib/x86/cpuid.c, msr.c, policy.c --------------------------------------------------------


def _leaf(name: str, leaf: int, subleaf: int, eax: int = 0) -> None:
    @case(rules.CPUID_POLICY, name)
    def _(d: Domain) -> Where:
        d.cpuid_policy.append((leaf, subleaf, eax, 0, 0, 0))
        return at_record("X86_CPUID_POLICY", extent=0)


_leaf("a basic leaf too far", 0xE, NO_SUBLEAF)
_leaf("an extended leaf too far", 0x8000_0022, NO_SUBLEAF)
_leaf("a hypervisor's leaf", 0x4000_0001, NO_SUBLEAF)
_leaf("a subleaf of a leaf without any", 1, 0)
_leaf("a cache too far", 4, 6)
_leaf("a topology too far", 0xB, 2)
_leaf("a state too far", 0xD, 63)
_leaf("leaf 7 without a subleaf", 7, NO_SUBLEAF)
_leaf("more basic leaves than Xen has", 0, NO_SUBLEAF, 0xE)
_leaf("more extended leaves than Xen has", 0x8000_0000, NO_SUBLEAF, 0x8000_0022)


@case(rules.CPUID_POLICY, "too many leaves")
def _(d: Domain) -> Where:
    d.cpuid_policy = [(5, NO_SUBLEAF, 0, 0, 0, 0)] * 121
    return at_record("X86_CPUID_POLICY", extent=0)


def _msr(name: str, *entries: tuple[int, int, int]) -> None:
    @case(rules.MSR_POLICY, name)
    def _(d: Domain) -> Where:
        d.msr_policy = list(entries)
        return at_record("X86_MSR_POLICY", extent=0)


_msr("an unknown MSR", (0x1B, 0, 0))
_msr("flags", (0xCE, 1, 0))
_msr("too many", *[(0xCE, 0, 0)] * 3)
_msr("wider than Xen has it", (0xCE, 0, 1 << 32))
_msr("a bit that Xen does not know", (0xCE, 0, 1 << 30))
