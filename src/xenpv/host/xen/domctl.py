"""Numbers and structs of XenHost's hypercalls, by version of Xen.

The interface of domctls and sysctls is not stable: XenHost supports the versions in INTERFACES and no others. A test
in tests/host/xen checks all of it against Xen's public headers with gcc.

Source: xen.git:xen/include/public/{version,memory,event_channel,grant_table,sysctl,domctl}.h, arch-x86/xen.h
"""

from __future__ import annotations

from typing import Any, NamedTuple

from xenpv.abi.declare import U8, U16, U32, U64, Struct, array
from xenpv.frames import DomId

MEMORY_OP, XEN_VERSION, MMUEXT_OP, EVENT_CHANNEL_OP, SYSCTL, DOMCTL = 12, 17, 26, 32, 35, 36
XENVER_VERSION, XENVER_EXTRAVERSION = 0, 1
XENMEM_MAXIMUM_RAM_PAGE, XENMEM_MACHPHYS_MFN_LIST, XENMEM_POPULATE_PHYSMAP = 2, 5, 6
XENMEM_MACHINE_MEMORY_MAP, XENMEM_SET_MEMORY_MAP = 10, 13
RESOURCE_GRANT_TABLE, RESOURCE_GRANT_TABLE_SHARED = 1, 0
MMUEXT_PIN_L1_TABLE = 0  # and the three levels above it
EVTCHNOP_ALLOC_UNBOUND = 6
SYSCTL_PHYSINFO, SYSCTL_GETDOMAININFOLIST = 3, 6
CREATEDOMAIN, DESTROYDOMAIN, PAUSEDOMAIN, UNPAUSEDOMAIN, MAX_MEM, SETVCPUCONTEXT = 1, 2, 3, 4, 11, 12
GETVCPUCONTEXT, MAX_VCPUS, HYPERCALL_INIT, SET_ADDRESS_SIZE, GET_ADDRESS_SIZE = 13, 15, 22, 35, 36
SHADOW_OP, RESUMEDOMAIN, SET_EXT_VCPUCONTEXT, GET_EXT_VCPUCONTEXT = 10, 27, 42, 43
GETTSCINFO, SETTSCINFO, GETPAGEFRAMEINFO3, SETVCPUEXTSTATE, GETVCPUEXTSTATE = 59, 60, 61, 62, 63
GET_VCPU_MSRS, SET_VCPU_MSRS, GET_CPU_POLICY, SET_CPU_POLICY = 72, 73, 82, 83
SHADOW_OP_OFF, SHADOW_OP_ENABLE_LOGDIRTY, SHADOW_OP_CLEAN, SHADOW_OP_PEEK = 0, 2, 11, 12
SHADOW_OP_GET_ALLOCATION, SHADOW_OP_SET_ALLOCATION = 30, 31
PAGEFRAMEINFO_MAX = 1024
PFINFO_LTAB_SHIFT = 28
DOMID_FIRST_RESERVED, DOMID_SELF, DOMID_XEN = DomId(0x7FF0), DomId(0x7FF0), DomId(0x7FF2)
DOMINF_DYING, DOMINF_HVM_GUEST, DOMINF_SHUTDOWN, DOMINF_PAUSED = 1 << 0, 1 << 1, 1 << 2, 1 << 3
DOMINF_XS_DOMAIN = 1 << 7
DOMINF_SHUTDOWN_SHIFT, DOMINF_SHUTDOWN_MASK = 16, 255
INVALID_MAX_VCPU_ID = 0xFFFF_FFFF
MAX_VIRT_CPUS = 8192  # of a PV domain; in no public header (xen.git:xen/arch/x86/include/asm/config.h)
PHYSCAP_GNTTAB_V2 = 1 << 9
HOST_DEFAULT = 0xFFFF_FFFF  # -1 for a domain's grant table and maptrack frames
GTF_PERMIT_ACCESS = 1
GNTTAB_RESERVED_CONSOLE, GNTTAB_RESERVED_XENSTORE = 0, 1

MACHPHYS_MFN_LIST = Struct("xen_machphys_mfn_list", "memory.h", max_extents=U32, extent_start=U64, nr_extents=U32)
_GETDOMAININFO: dict[str, Any] = {
    "domain": U16,
    "_pad1": U16,
    "flags": U32,
    "tot_pages": U64,
    "max_pages": U64,
    "outstanding_pages": U64,
    "shr_pages": U64,
    "paged_pages": U64,
    "shared_info_frame": U64,
    "cpu_time": U64,
    "nr_online_vcpus": U32,
    "max_vcpu_id": U32,
    "ssidref": U32,
    "handle": array(U8, 16),
    "cpupool": U32,
}
GETDOMAININFO_0X12 = Struct("xen_domctl_getdomaininfo", "domctl.h", **_GETDOMAININFO, arch_config=U32, _pad2=U32)
GETDOMAININFO_0X15 = Struct(
    "xen_domctl_getdomaininfo",
    "domctl.h",
    **_GETDOMAININFO,
    gpaddr_bits=U8,
    _pad2=array(U8, 7),
    arch_config=array(U32, 2),
)
GETDOMAININFOLIST = Struct(
    "xen_sysctl_getdomaininfolist", "sysctl.h", first_domain=U16, max_domains=U32, buffer=U64, num_domains=U32
)
PAGEFRAMEINFO3 = Struct("xen_domctl_getpageframeinfo3", "domctl.h", num=U64, array=U64)
VCPUCONTEXT = Struct("xen_domctl_vcpucontext", "domctl.h", vcpu=U32, ctxt=U64)
MAX_MEM_KIB = Struct("xen_domctl_max_mem", "domctl.h", max_memkb=U64)
VCPUS = Struct("xen_domctl_max_vcpus", "domctl.h", max=U32)
SHADOW_OP_STATS = Struct("xen_domctl_shadow_op_stats", "domctl.h", fault_count=U32, dirty_count=U32)
SHADOW = Struct(
    "xen_domctl_shadow_op",
    "domctl.h",
    op=U32,
    mode=U32,
    mb=U32,
    dirty_bitmap=U64,
    pages=U64,
    stats=SHADOW_OP_STATS,
)
VCPUEXTSTATE = Struct("xen_domctl_vcpuextstate", "domctl.h", vcpu=U32, xfeature_mask=U64, size=U64, buffer=U64)
VCPU_MSRS = Struct("xen_domctl_vcpu_msrs", "domctl.h", vcpu=U32, msr_count=U32, msrs=U64)
TSC_INFO = Struct(
    "xen_domctl_tsc_info", "domctl.h", tsc_mode=U32, gtsc_khz=U32, incarnation=U32, pad=U32, elapsed_nsec=U64
)
CPU_POLICY = Struct(
    "xen_domctl_cpu_policy",
    "domctl.h",
    nr_leaves=U32,
    nr_msrs=U32,
    leaves=U64,
    msrs=U64,
    err_leaf=U32,
    err_subleaf=U32,
    err_msr=U32,
)
HYPERCALL_PAGE = Struct("xen_domctl_hypercall_init", "domctl.h", gmfn=U64)
ADDRESS_SIZE = Struct("xen_domctl_address_size", "domctl.h", size=U32)
RESERVATION = Struct(
    "xen_memory_reservation", "memory.h", extent_start=U64, nr_extents=U64, extent_order=U32, mem_flags=U32, domid=U16
)
MEMORY_MAP = Struct("xen_memory_map", "memory.h", nr_entries=U32, buffer=U64)
FOREIGN_MEMORY_MAP = Struct("xen_foreign_memory_map", "memory.h", domid=U16, map=MEMORY_MAP)
E820_RAM = 1
E820_MAX = 1024  # entries, the most that any Xen keeps (4.17: xen.git:xen/arch/x86/include/asm/e820.h)
E820_ENTRY = 20  # bytes: a base and a size (in bytes, of 8 bytes each) and 4 bytes of type, without a gap
EVTCHN_ALLOC_UNBOUND = Struct("evtchn_alloc_unbound", "event_channel.h", dom=U16, remote_dom=U16, port=U32)
GRANT_ENTRY_V1 = Struct("grant_entry_v1", "grant_table.h", flags=U16, domid=U16, frame=U32)
MMUEXT = Struct("mmuext_op", "xen.h", cmd=U32, arg1=U64, arg2=U64)
_CREATEDOMAIN: dict[str, Any] = {
    "ssidref": U32,
    "handle": array(U8, 16),
    "flags": U32,
    "iommu_opts": U32,
    "max_vcpus": U32,
    "max_evtchn_port": U32,
    "max_grant_frames": U32,
    "max_maptrack_frames": U32,
}
_ARCH_0X15 = {"emulation_flags": U32, "misc_flags": U32}  # struct xen_arch_domainconfig, the last member
CREATEDOMAIN_0X12 = Struct("xen_domctl_createdomain", "domctl.h", **_CREATEDOMAIN, emulation_flags=U32)
CREATEDOMAIN_0X15 = Struct(
    "xen_domctl_createdomain",
    "domctl.h",
    **_CREATEDOMAIN,
    grant_opts=U32,
    vmtrace_size=U32,
    cpupool_id=U32,
    **_ARCH_0X15,
)
CREATEDOMAIN_0X17 = Struct(
    "xen_domctl_createdomain",
    "domctl.h",
    **_CREATEDOMAIN,
    grant_opts=U32,
    altp2m_opts=U32,
    vmtrace_size=U32,
    cpupool_id=U32,
    **_ARCH_0X15,
)
_PHYSINFO: dict[str, Any] = {
    "threads_per_core": U32,
    "cores_per_socket": U32,
    "nr_cpus": U32,
    "max_cpu_id": U32,
    "nr_nodes": U32,
    "max_node_id": U32,
    "cpu_khz": U32,
    "capabilities": U32,
}
_PAGES: dict[str, Any] = {
    "total_pages": U64,
    "free_pages": U64,
    "scrub_pages": U64,
    "outstanding_pages": U64,
    "max_mfn": U64,
    "hw_cap": array(U32, 8),
}
PHYSINFO_0X13 = Struct("xen_sysctl_physinfo", "sysctl.h", **_PHYSINFO, **_PAGES)
PHYSINFO_0X15 = Struct("xen_sysctl_physinfo", "sysctl.h", **_PHYSINFO, arch_capabilities=U32, _pad=U32, **_PAGES)
NOTHING = Struct("", "domctl.h", _pad=array(U8, 1))  # a domctl without arguments

SYSCTL_U, DOMCTL_U = 8, 16  # where the arguments are in struct xen_sysctl and struct xen_domctl
SYSCTL_SIZE, DOMCTL_SIZE = 136, 144


class Interface(NamedTuple):
    """The unstable interfaces of one version of Xen."""

    sysctl: int  # XEN_SYSCTL_INTERFACE_VERSION
    domctl: int  # XEN_DOMCTL_INTERFACE_VERSION
    getdomaininfo: Struct
    createdomain: Struct
    physinfo: Struct


INTERFACES = {
    (4, 14): Interface(0x13, 0x12, GETDOMAININFO_0X12, CREATEDOMAIN_0X12, PHYSINFO_0X13),
    (4, 17): Interface(0x15, 0x15, GETDOMAININFO_0X15, CREATEDOMAIN_0X15, PHYSINFO_0X15),
    (4, 20): Interface(0x15, 0x17, GETDOMAININFO_0X15, CREATEDOMAIN_0X17, PHYSINFO_0X15),
}
