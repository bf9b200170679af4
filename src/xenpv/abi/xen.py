"""start_info, shared_info and their parts.

Source: xen.git:xen/include/public/xen.h, arch-x86/xen.h.
"""

from __future__ import annotations

from xenpv.abi.declare import U8, U32, U64, ULONG, Chars, Struct, WidthOnly, array

INVALID_MFN = {8: (1 << 64) - 1, 4: (1 << 32) - 1}  # all ones of the guest's width; no header declares it

DOMU_INFO = Struct("", "xen.h", mfn=ULONG, evtchn=U32)
CONSOLE = Struct("", "xen.h", domU=DOMU_INFO)  # a union with dom0 {info_off, info_size}, which no saved domain has

START_INFO = Struct(
    "start_info",
    "xen.h",
    magic=Chars(32),
    nr_pages=ULONG,
    shared_info=ULONG,  # a machine address, not a frame
    flags=U32,
    store_mfn=ULONG,
    store_evtchn=U32,
    console=CONSOLE,
    pt_base=ULONG,  # from here on valid at boot only
    nr_pt_frames=ULONG,
    mfn_list=ULONG,
    mod_start=ULONG,
    mod_len=ULONG,
    cmd_line=Chars(1024),
    first_p2m_pfn=ULONG,
    nr_p2m_frames=ULONG,
)
START_INFO_MAGIC = {8: b"xen-3.0-x86_64", 4: b"xen-3.0-x86_32p"}

SIF_PRIVILEGED = 1 << 0
SIF_INITDOMAIN = 1 << 1
SIF_MULTIBOOT_MOD = 1 << 2
SIF_MOD_START_PFN = 1 << 3
SIF_VIRT_P2M_4TOOLS = 1 << 4

VCPU_TIME_INFO = Struct(
    "vcpu_time_info",
    "xen.h",
    version=U32,
    pad0=U32,
    tsc_timestamp=U64,
    system_time=U64,
    tsc_to_system_mul=U32,
    tsc_shift=U8,
    flags=U8,
    pad1=array(U8, 2),
)
ARCH_VCPU_INFO = Struct("arch_vcpu_info", "arch-x86/xen.h", cr2=ULONG, pad=array(ULONG, 1, count4=5))
VCPU_INFO = Struct(
    "vcpu_info",
    "xen.h",
    evtchn_upcall_pending=U8,
    evtchn_upcall_mask=U8,
    evtchn_pending_sel=ULONG,
    arch=ARCH_VCPU_INFO,
    time=VCPU_TIME_INFO,
)
ARCH_SHARED_INFO = Struct(
    "arch_shared_info",
    "arch-x86/xen.h",
    max_pfn=ULONG,  # the number of p2m entries, not the highest pfn
    pfn_to_mfn_frame_list_list=ULONG,
    nmi_reason=ULONG,
    p2m_cr3=ULONG,
    p2m_vaddr=ULONG,
    p2m_generation=ULONG,
    wc_sec_hi=WidthOnly(4, U32),
)
# Proposed on xen-devel in 2014 and never merged (docs/reference/abi-p2m-root.md): the offset of p2m_levels in
# arch_shared_info. p2m_root follows; each has the guest's width.
P2M_LEVELS_AT = {8: 48, 4: 28}
XEN_LEGACY_MAX_VCPUS = 32
SHARED_INFO = Struct(
    "shared_info",
    "xen.h",
    vcpu_info=array(VCPU_INFO, XEN_LEGACY_MAX_VCPUS),
    evtchn_pending=array(ULONG, 64, count4=32),
    evtchn_mask=array(ULONG, 64, count4=32),
    wc_version=U32,
    wc_sec=U32,
    wc_nsec=U32,
    wc_sec_hi=WidthOnly(8, U32),
    arch=ARCH_SHARED_INFO,
)
