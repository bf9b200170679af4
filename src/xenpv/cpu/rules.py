"""The rules for vcpu state, TSC and CPU policy: what Xen refuses.

Unless a rule says otherwise, Xen 4.14 to 4.20 agree. What a host lacks, such as AVX, no file can tell: these rules are
those of a host that has all that Xen knows.
"""

from __future__ import annotations

from xenpv.findings import Rule, Severity

TSC_INFO = Rule(
    "tsc-info",
    "the TSC's mode is 0, 1 or 2, and its frequency no multiple of 2^29 kHz (Xen 4.17.0 and older hang on it)",
    "xen/arch/x86/time.c tsc_set_info(), set_time_scale()",
)
TSC_CLOCK = Rule(
    "tsc-clock",
    "the stream has the frequency of the guest's TSC; otherwise that of the new host counts",
    "xen/arch/x86/time.c tsc_set_info()",
    Severity.WARNING,
)
VCPU_XSAVE = Rule(
    "vcpu-xsave",
    "an xsave area has the length that xcr0_accum demands, and a header that Xen takes (a host without XSAVE: none)",
    "xen/arch/x86/domctl.c XEN_DOMCTL_setvcpuextstate; xstate.c validate_xstate(), valid_xcr0()",
)
VCPU_MSRS = Rule(
    "vcpu-msrs",
    "a vcpu's MSRs are at most the 7 that Xen sends, with settable values (Xen 4.17 and older take 11 with DBEXT)",
    "xen/arch/x86/domctl.c XEN_DOMCTL_set_vcpu_msrs; msr.c guest_wrmsr()",
)
VCPU_EXTENDED = Rule(
    "vcpu-extended",
    "the extended state names its record's vcpu and size, has canonical handlers and known machine-check capabilities"
    " (hosts of AMD know none of Intel's)",
    "process_vcpu_extended(); xen/arch/x86/domctl.c XEN_DOMCTL_set_ext_vcpucontext; vmce.c vmce_restore_vcpu()",
)
CPUID_POLICY = Rule(
    "cpuid-policy",
    "the CPUID policy has at most 120 leaves, all known to Xen, and no maximum above Xen's (leaf 7's since 4.17)",
    "xen/lib/x86/cpuid.c x86_cpuid_copy_from_buffer(); policy.c x86_cpu_policies_are_compatible()",
)
MSR_POLICY = Rule(
    "msr-policy",
    "the MSR policy has at most 2 MSRs, 0xce and 0x10a, without flags, of values that fit (0x10a: 32 bits in Xen 4.17)",
    "xen/lib/x86/msr.c x86_msr_copy_from_buffer(); policy.c x86_cpu_policies_are_compatible()",
)
GDT_DESCRIPTOR = Rule(
    "gdt-descriptor",
    "no frame of a GDT holds a present system descriptor that is no call gate, or a gate to one of Xen's segments",
    "xen/arch/x86/pv/descriptor-tables.c check_descriptor(); pv_set_gdt()",
)
LDT_DESCRIPTOR = Rule(
    "ldt-descriptor",
    "nor does one of an LDT; Xen checks it when the guest first uses it, which then faults",
    "xen/arch/x86/pv/descriptor-tables.c check_descriptor(); mm.c pv_map_ldt_shadow_page()",
    Severity.WARNING,
)
VCPU_STATE = Rule(
    "vcpu-state", "addresses in a vcpu's context are canonical, its registers settable", "arch_set_info_guest()"
)
