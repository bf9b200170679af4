"""Arguments of domctls that streams contain.

xen.git:xen/include/public/domctl.h, arch-x86/xen.h, arch-x86/hvm/save.h
"""

from __future__ import annotations

from enum import IntEnum

from xenpv.abi.declare import U8, U16, U32, U64, Struct, array

HVM_VMCE_VCPU = Struct(
    "hvm_vmce_vcpu", "arch-x86/hvm/save.h", caps=U64, mci_ctl2_bank0=U64, mci_ctl2_bank1=U64, mcg_ext_ctl=U64
)
# X86_PV_VCPU_EXTENDED: XEN_DOMCTL_{get,set}_ext_vcpucontext
EXT_VCPUCONTEXT = Struct(
    "xen_domctl_ext_vcpucontext",
    "domctl.h",
    vcpu=U32,
    size=U32,
    syscall32_callback_eip=U64,
    sysenter_callback_eip=U64,
    syscall32_callback_cs=U16,
    sysenter_callback_cs=U16,
    syscall32_disables_events=U8,
    sysenter_disables_events=U8,
    _pad=array(U8, 2),
    vmce=HVM_VMCE_VCPU,  # a union with mcg_cap, which is vmce.caps
)
EXT_VCPUCONTEXT_MAX = 128  # bytes that libxenguest copies at most: the size of the union in struct xen_domctl

VCPU_MSR = Struct("xen_domctl_vcpu_msr", "domctl.h", index=U32, reserved=U32, value=U64)
CPUID_LEAF = Struct("xen_cpuid_leaf", "arch-x86/xen.h", leaf=U32, subleaf=U32, a=U32, b=U32, c=U32, d=U32)
MSR_ENTRY = Struct("xen_msr_entry", "arch-x86/xen.h", idx=U32, flags=U32, val=U64)
XSAVE_HEADER_SIZE = 16  # {u64 xfeature_mask, u64 xcr0_accum} in front of the area


class PageType(IntEnum):
    """XEN_DOMCTL_PFINFO_* without its shift of 28."""

    NOTAB = 0x0
    L1TAB = 0x1
    L2TAB = 0x2
    L3TAB = 0x3
    L4TAB = 0x4
    L1TAB_PIN = 0x9
    L2TAB_PIN = 0xA
    L3TAB_PIN = 0xB
    L4TAB_PIN = 0xC
    BROKEN = 0xD
    XALLOC = 0xE
    XTAB = 0xF


PINNED = 0x8  # the bit that tells L1TAB_PIN from L1TAB
