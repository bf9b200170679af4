"""The declarations in domctl.py, checked by gcc against Xen's public headers of each version."""

from __future__ import annotations

import pytest

from tests.support.gcc import NoCompiler, evaluate, header_folders
from tests.support.requirements import cannot_run
from xenpv.abi.declare import Struct
from xenpv.host.xen import domctl

STRUCTS = (
    domctl.MACHPHYS_MFN_LIST,
    domctl.GETDOMAININFOLIST,
    domctl.PAGEFRAMEINFO3,
    domctl.VCPUCONTEXT,
    domctl.ADDRESS_SIZE,
    domctl.MAX_MEM_KIB,
    domctl.VCPUS,
    domctl.HYPERCALL_PAGE,
    domctl.RESERVATION,
    domctl.MEMORY_MAP,
    domctl.FOREIGN_MEMORY_MAP,
    domctl.EVTCHN_ALLOC_UNBOUND,
    domctl.GRANT_ENTRY_V1,
    domctl.MMUEXT,
    domctl.SHADOW_OP_STATS,
    domctl.SHADOW,
    domctl.VCPUEXTSTATE,
    domctl.VCPU_MSRS,
    domctl.TSC_INFO,
    domctl.CPU_POLICY,
)
ARCH = ("emulation_flags", "misc_flags")  # members of struct xen_arch_domainconfig, the last member of createdomain


@pytest.mark.parametrize("version", domctl.INTERFACES, ids=lambda v: f"{v[0]}.{v[1]}")
def test_structs_and_numbers_equal_those_of_xens_headers(version: tuple[int, int]) -> None:
    folder = header_folders().get(f"{version[0]}.{version[1]}")
    if folder is None:
        cannot_run("no headers of that version: python -m lab fetch")
        raise AssertionError
    interface = domctl.INTERFACES[version]
    expected = {
        "XEN_SYSCTL_INTERFACE_VERSION": interface.sysctl,
        "XEN_DOMCTL_INTERFACE_VERSION": interface.domctl,
        "XEN_SYSCTL_getdomaininfolist": domctl.SYSCTL_GETDOMAININFOLIST,
        "XEN_DOMCTL_pausedomain": domctl.PAUSEDOMAIN,
        "XEN_DOMCTL_unpausedomain": domctl.UNPAUSEDOMAIN,
        "XEN_SYSCTL_physinfo": domctl.SYSCTL_PHYSINFO,
        "XEN_DOMCTL_createdomain": domctl.CREATEDOMAIN,
        "XEN_DOMCTL_destroydomain": domctl.DESTROYDOMAIN,
        "XEN_DOMCTL_max_mem": domctl.MAX_MEM,
        "XEN_DOMCTL_setvcpucontext": domctl.SETVCPUCONTEXT,
        "XEN_DOMCTL_max_vcpus": domctl.MAX_VCPUS,
        "XEN_DOMCTL_hypercall_init": domctl.HYPERCALL_INIT,
        "XEN_DOMCTL_set_address_size": domctl.SET_ADDRESS_SIZE,
        "XENMEM_set_memory_map": domctl.XENMEM_SET_MEMORY_MAP,
        "XENMEM_populate_physmap": domctl.XENMEM_POPULATE_PHYSMAP,
        "XENMEM_resource_grant_table": domctl.RESOURCE_GRANT_TABLE,
        "XENMEM_resource_grant_table_id_shared": domctl.RESOURCE_GRANT_TABLE_SHARED,
        "MMUEXT_PIN_L1_TABLE": domctl.MMUEXT_PIN_L1_TABLE,
        "MMUEXT_PIN_L4_TABLE": domctl.MMUEXT_PIN_L1_TABLE + 3,
        "EVTCHNOP_alloc_unbound": domctl.EVTCHNOP_ALLOC_UNBOUND,
        "GTF_permit_access": domctl.GTF_PERMIT_ACCESS,
        "GNTTAB_RESERVED_CONSOLE": domctl.GNTTAB_RESERVED_CONSOLE,
        "GNTTAB_RESERVED_XENSTORE": domctl.GNTTAB_RESERVED_XENSTORE,
        "__HYPERVISOR_mmuext_op": domctl.MMUEXT_OP,
        "__HYPERVISOR_event_channel_op": domctl.EVENT_CHANNEL_OP,
        "XEN_DOMCTL_shadow_op": domctl.SHADOW_OP,
        "XEN_DOMCTL_SHADOW_OP_OFF": domctl.SHADOW_OP_OFF,
        "XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY": domctl.SHADOW_OP_ENABLE_LOGDIRTY,
        "XEN_DOMCTL_SHADOW_OP_CLEAN": domctl.SHADOW_OP_CLEAN,
        "XEN_DOMCTL_SHADOW_OP_PEEK": domctl.SHADOW_OP_PEEK,
        "XEN_DOMCTL_SHADOW_OP_GET_ALLOCATION": domctl.SHADOW_OP_GET_ALLOCATION,
        "XEN_DOMCTL_SHADOW_OP_SET_ALLOCATION": domctl.SHADOW_OP_SET_ALLOCATION,
        "XEN_DOMCTL_resumedomain": domctl.RESUMEDOMAIN,
        "XEN_DOMCTL_set_ext_vcpucontext": domctl.SET_EXT_VCPUCONTEXT,
        "XEN_DOMCTL_get_ext_vcpucontext": domctl.GET_EXT_VCPUCONTEXT,
        "XEN_DOMCTL_gettscinfo": domctl.GETTSCINFO,
        "XEN_DOMCTL_settscinfo": domctl.SETTSCINFO,
        "XEN_DOMCTL_setvcpuextstate": domctl.SETVCPUEXTSTATE,
        "XEN_DOMCTL_getvcpuextstate": domctl.GETVCPUEXTSTATE,
        "XEN_DOMCTL_get_vcpu_msrs": domctl.GET_VCPU_MSRS,
        "XEN_DOMCTL_set_vcpu_msrs": domctl.SET_VCPU_MSRS,
        "XEN_DOMCTL_get_cpu_policy": domctl.GET_CPU_POLICY,
        "XEN_DOMCTL_set_cpu_policy": domctl.SET_CPU_POLICY,
        "XEN_DOMCTL_getvcpucontext": domctl.GETVCPUCONTEXT,
        "XEN_DOMCTL_get_address_size": domctl.GET_ADDRESS_SIZE,
        "XEN_DOMCTL_getpageframeinfo3": domctl.GETPAGEFRAMEINFO3,
        "XEN_DOMCTL_PFINFO_LTAB_SHIFT": domctl.PFINFO_LTAB_SHIFT,
        "XEN_DOMINF_dying": domctl.DOMINF_DYING,
        "XEN_DOMINF_hvm_guest": domctl.DOMINF_HVM_GUEST,
        "XEN_DOMINF_shutdown": domctl.DOMINF_SHUTDOWN,
        "XEN_DOMINF_paused": domctl.DOMINF_PAUSED,
        "XEN_DOMINF_xs_domain": domctl.DOMINF_XS_DOMAIN,
        "XEN_DOMINF_shutdownshift": domctl.DOMINF_SHUTDOWN_SHIFT,
        "XEN_DOMINF_shutdownmask": domctl.DOMINF_SHUTDOWN_MASK,
        "XEN_INVALID_MAX_VCPU_ID": domctl.INVALID_MAX_VCPU_ID,
        "XENMEM_maximum_ram_page": domctl.XENMEM_MAXIMUM_RAM_PAGE,
        "XENMEM_machphys_mfn_list": domctl.XENMEM_MACHPHYS_MFN_LIST,
        "XENVER_version": domctl.XENVER_VERSION,
        "XENVER_extraversion": domctl.XENVER_EXTRAVERSION,
        "sizeof(xen_extraversion_t)": 16,
        "__HYPERVISOR_memory_op": domctl.MEMORY_OP,
        "__HYPERVISOR_xen_version": domctl.XEN_VERSION,
        "__HYPERVISOR_sysctl": domctl.SYSCTL,
        "__HYPERVISOR_domctl": domctl.DOMCTL,
        "DOMID_XEN": domctl.DOMID_XEN,
        "DOMID_SELF": domctl.DOMID_SELF,
        "__builtin_offsetof(struct xen_sysctl, u)": domctl.SYSCTL_U,
        "__builtin_offsetof(struct xen_domctl, u)": domctl.DOMCTL_U,
        "__builtin_offsetof(struct xen_domctl, domain)": 8,
        "sizeof(struct xen_sysctl)": domctl.SYSCTL_SIZE,
        "sizeof(struct xen_domctl)": domctl.DOMCTL_SIZE,
        **layout(interface.getdomaininfo),
        **layout(interface.physinfo),
        **layout(interface.createdomain, inner=("arch", ARCH)),
    }
    if version > (4, 14):
        expected["XEN_SYSCTL_PHYSCAP_gnttab_v2"] = domctl.PHYSCAP_GNTTAB_V2
    for struct in STRUCTS:
        expected |= layout(struct)
    headers = ["xen.h", "version.h", "memory.h", "event_channel.h", "grant_table.h", "domctl.h", "sysctl.h"]
    try:
        found = evaluate(folder, headers, list(expected), 8)
    except NoCompiler as error:
        cannot_run(str(error))
        raise
    assert dict(zip(expected, found, strict=True)) == expected


def layout(struct: Struct, inner: tuple[str, tuple[str, ...]] = ("", ())) -> dict[str, int]:
    """Return C expressions for a struct's size and its members' offsets and sizes, with the values that we declare.

    Args:
        struct: Our declaration.
        inner: A member that is a struct in C, and those of its members that we declare as members of ``struct``.
    """
    out = {f"sizeof(struct {struct.name})": struct.size(8)}
    for name, member in struct.members(8):
        if not name.startswith("_"):
            path = f"{inner[0]}.{name}" if name in inner[1] else name
            out[f"__builtin_offsetof(struct {struct.name}, {path})"] = struct.offset(8, name)
            out[f"sizeof(((struct {struct.name} *)0)->{path})"] = member.size(8)
    return out
