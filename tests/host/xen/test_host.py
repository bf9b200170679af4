"""XenHost where there is no Xen: what it says, and what of it needs none."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.gcc import NoCompiler, evaluate, header_folders
from tests.support.host_stub import HostStub, domain_info
from tests.support.requirements import cannot_run
from xenpv.abi.declare import Struct
from xenpv.errors import HostError
from xenpv.frames import I64, U64, DomId
from xenpv.host.protocol import find_domain
from xenpv.host.xen import domctl, libxen, xenstore
from xenpv.host.xen.host import XenHost
from xenpv.host.xen.m2p import M2P

ALL_ONES = (1 << 64) - 1


@pytest.fixture
def privcmd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Something that opens as the privileged command device does."""
    path = tmp_path / "privcmd"
    path.touch()
    monkeypatch.setattr(libxen, "PRIVCMD", (str(tmp_path / "absent"), str(path)))
    return path


def test_no_xen_below_us(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(libxen, "PRIVCMD", (str(tmp_path / "one"), str(tmp_path / "two")))
    with pytest.raises(HostError, match=r"^not on a Xen host: neither .*/one nor .*/two can be opened$") as caught:
        XenHost()
    assert caught.value.errno == errno.ENODEV


def test_no_root(privcmd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:
        if path != str(privcmd):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(HostError, match=r"privcmd: Permission denied; needs root in dom0$") as caught:
        XenHost()
    assert caught.value.errno == errno.EACCES


def test_no_library(privcmd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libxen, "LIBXENCALL", ("libxenpv-no-such.so.1", "libxenpv-no-such.so.2"))
    with pytest.raises(HostError, match=r"^libxenpv-no-such\.so\.1 or libxenpv-no-such\.so\.2 is missing"):
        XenHost()


def test_no_xenstore_is_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xenstore, "LIBXENSTORE", ("libxenpv-no-such.so.1",))
    store = xenstore.XenStore()
    assert not store.reachable
    assert store.read("/local/domain/0/name") is None
    store.close()


class Calls:
    """Hypercalls answered by the test: the version, and the m2p's extents."""

    def __init__(self, version: tuple[int, int] = (4, 17), extents: tuple[int, ...] = ()) -> None:
        self.version, self.extents = version, extents
        self.interface: domctl.Interface | None = None
        self.closed = False

    def close(self) -> None:
        self.closed = True

    @contextlib.contextmanager
    def buffer(self, size: int) -> Iterator[libxen.Buffer]:
        memory = (ctypes.c_uint8 * size)()
        yield libxen.Buffer(ctypes.addressof(memory), size)

    def call(self, hypercall: int, command: int, address: int, op: str) -> int:  # noqa: ARG002
        if (hypercall, command) == (domctl.XEN_VERSION, domctl.XENVER_VERSION):
            return self.version[0] << 16 | self.version[1]
        if (hypercall, command) == (domctl.XEN_VERSION, domctl.XENVER_EXTRAVERSION):
            ctypes.memmove(address, b".9-rc1\0", 7)
        if (hypercall, command) == (domctl.MEMORY_OP, domctl.XENMEM_MACHPHYS_MFN_LIST):
            argument = (ctypes.c_uint8 * domctl.MACHPHYS_MFN_LIST.size(8)).from_address(address)
            given = np.frombuffer(argument, domctl.MACHPHYS_MFN_LIST[8])  # type: ignore[call-overload]
            extents = np.array(self.extents[: int(given["max_extents"][0])], np.uint64)
            ctypes.memmove(int(given["extent_start"][0]), extents.ctypes.data, extents.nbytes)
            given["nr_extents"] = len(extents)
        return 0


def test_a_version_that_is_not_in_the_table(privcmd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(version=(4, 99))
    monkeypatch.setattr(libxen, "Hypercalls", lambda: calls)
    with pytest.raises(HostError, match=r"^Xen 4\.99\.9-rc1: unknown control interface; .* 4\.14, 4\.17, 4\.20$"):
        XenHost()
    assert calls.closed


def test_errnos_in_words() -> None:
    error = libxen.host_error("getvcpucontext", errno.ESRCH, 7)
    assert str(error) == "dom7: getvcpucontext: no such domain, or it has been destroyed meanwhile (ESRCH)"
    assert (error.op, error.domid, error.errno) == ("getvcpucontext", 7, errno.ESRCH)
    assert str(libxen.host_error("xen_version", errno.EPERM)) == "xen_version: needs root in dom0 (EPERM)"
    assert str(libxen.host_error("pausedomain", errno.EINVAL, 0)) == "dom0: pausedomain: Invalid argument (EINVAL)"


class Memory:
    """Maps chunks of an m2p in which frame mfn is pfn 2 * mfn, and counts."""

    def __init__(self, chunk_of: dict[int, int]) -> None:
        self.chunk_of, self.mapped = chunk_of, 0

    def map(self, domid: DomId, mfns: U64, at: int | None = None) -> tuple[int, I64]:
        assert domid == domctl.DOMID_XEN
        assert at is not None
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | libxen.MAP_FIXED
        assert libc.mmap(at, 4096 * len(mfns), mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == at
        first = self.chunk_of[int(mfns[0])] << 18
        content = 2 * np.arange(first, first + (1 << 18), dtype=np.uint64)
        ctypes.memmove(at, content.ctypes.data, content.nbytes)
        self.mapped += 1
        return at, np.zeros(len(mfns), np.int64)


def test_the_m2p_is_mapped_where_it_is_asked_about_and_nowhere_else() -> None:
    """700 GiB of host; chunks 2 and 5 are holes: one is the chunk before it again, the other 0."""
    extents = [0x1000 + 512 * n for n in range(700)]
    extents[2], extents[5] = extents[1], 0
    memory = Memory({extent: n for n, extent in enumerate(extents) if n not in {2, 5}})
    frames = (700 << 18) - 100
    m2p = M2P(Calls(extents=tuple(extents)), memory, frames)  # type: ignore[arg-type]
    assert memory.mapped == 0
    asked = np.array([1, 699 << 18, 3, frames - 1, frames, ALL_ONES, 2 << 18, 5 << 18, (2 << 18) - 1], np.uint64)
    expected = [2, 699 << 19, 6, 2 * (frames - 1), *[ALL_ONES] * 4, (4 << 18) - 2]
    assert m2p.lookup(asked).tolist() == expected
    assert memory.mapped == 3
    assert m2p.lookup(asked).tolist() == expected
    assert memory.mapped == 3


def test_find() -> None:
    uuid = "01234567-89ab-cdef-0123-456789abcdef"
    host: Any = HostStub(
        domain_info(0), domain_info(3, "web", uuid), domain_info(4, "5"), domain_info(6, "twin"), domain_info(7, "twin")
    )
    for text in ("3", "web", uuid, uuid.upper(), uuid.replace("-", "")):
        assert find_domain(host, text).domid == 3, text
    with pytest.raises(HostError, match=r"dom5: .*no such domain"):
        find_domain(host, "5")  # an id, as for xl
    with pytest.raises(HostError, match="no domain is called 'mail'"):
        find_domain(host, "mail")
    with pytest.raises(HostError, match="'twin' may be any of dom6, dom7; say its id"):
        find_domain(host, "twin")


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
ARCH = ("emulation_flags", "misc_flags")  # members of struct xen_arch_domainconfig, which stands last in createdomain


@pytest.mark.parametrize("version", domctl.INTERFACES, ids=lambda v: f"{v[0]}.{v[1]}")
def test_structs_and_numbers_are_those_of_the_headers(version: tuple[int, int]) -> None:
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
    """Expressions of C for a struct's size and its members' offsets and sizes, and what we declare.

    ``inner``: a member that is a struct in C, and those of its members that we declare as if they stood outside.
    """
    out = {f"sizeof(struct {struct.name})": struct.size(8)}
    for name, member in struct.members(8):
        if not name.startswith("_"):
            path = f"{inner[0]}.{name}" if name in inner[1] else name
            out[f"__builtin_offsetof(struct {struct.name}, {path})"] = struct.offset(8, name)
            out[f"sizeof(((struct {struct.name} *)0)->{path})"] = member.size(8)
    return out
