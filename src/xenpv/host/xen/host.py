"""XenHost: the Xen that this dom0 runs on, as a Host, Toolstack and Mover."""

from __future__ import annotations

import contextlib
import errno
import uuid as uuids
from collections.abc import Callable, Iterator
from struct import pack, unpack_from
from types import TracebackType
from typing import Self

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.domctl import PageType
from xenpv.abi.x86 import PAGE_SIZE, VCPU_GUEST_CONTEXT
from xenpv.abi.xen import SHARED_INFO
from xenpv.errors import HostError
from xenpv.frames import U8, U64, DomId, Mask, first_bad
from xenpv.host import xenstore_nodes
from xenpv.host.errors import host_error
from xenpv.host.protocol import (
    DOM0,
    CpuPolicy,
    Daemons,
    DomainInfo,
    Ring,
    TscInfo,
    VcpuState,
    XenVersion,
    destroy_unfinished,
)
from xenpv.host.xen import domctl, shared_libraries, userdata
from xenpv.host.xen.cpu_state import CpuState
from xenpv.host.xen.log_dirty import LogDirty
from xenpv.host.xen.m2p import M2P
from xenpv.host.xen.xenstore import XenStore

_DOMAINS_AT_ONCE = 256
_EXTENTS_AT_ONCE = 1 << 16  # half a MiB of frame numbers in memory that Xen can reach
_PINS_AT_ONCE = 1024
_KIB_PER_PAGE = PAGE_SIZE >> 10
_EVENT_CHANNELS = 1023  # libxl's default
_FIRST_MIB = (1 << 20) // PAGE_SIZE


class XenHost:
    """The Xen that this dom0 runs on.

    Opening it needs root in dom0 and changes nothing; else HostError says why.

    Threads may share one: Xen's libraries lock what they share, ctypes releases the GIL in each call, and no call
    keeps state for another. Only close() must come last.
    """

    def __init__(self) -> None:
        shared_libraries.check_privcmd()
        self._calls = shared_libraries.Hypercalls()
        self._memory: shared_libraries.ForeignMemory | None = None
        self._store: XenStore | None = None
        self._m2p: M2P | None = None
        self._cpu_state = CpuState(self._calls, self._max_vcpu)
        self._log_dirty = LogDirty(self._calls)
        try:
            self._version = self._read_version()
            interface = domctl.INTERFACES.get((self._version.major, self._version.minor))
            if interface is None:
                raise unknown_version(self._version)
            self._interface = self._calls.interface = interface
            self._memory = shared_libraries.ForeignMemory()
            frames = self._calls.call(domctl.MEMORY_OP, domctl.XENMEM_MAXIMUM_RAM_PAGE, 0, "maximum_ram_page")
            self._max_mfn = frames - 1  # Xen returns its max_page, which is one more
            self._ram_bounds = self._read_ram_bounds()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close Xen's libraries. Arrays that map_frames returned stay readable."""
        self._m2p = None
        if self._store:
            self._store.close()
        if self._memory:
            self._memory.close()
        self._calls.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def version(self) -> XenVersion:
        """See Host."""
        return self._version

    def _read_version(self) -> XenVersion:
        number = self._calls.call(domctl.XEN_VERSION, domctl.XENVER_VERSION, 0, "xen_version")
        with self._calls.buffer(16) as buffer:
            self._calls.call(domctl.XEN_VERSION, domctl.XENVER_EXTRAVERSION, buffer.address, "xen_version")
            extra = buffer.array.tobytes().partition(b"\0")[0].decode("ascii", "replace")
        return XenVersion(number >> 16, number & 0xFFFF, extra)

    # -- inspecting domains

    def domains(self) -> list[DomainInfo]:
        """See Host."""
        domains: list[DomainInfo] = []
        first = 0
        while True:
            infos = self._getdomaininfolist(DomId(first), _DOMAINS_AT_ONCE)
            for info in infos:
                try:
                    domains.append(self._domain_info(info))
                except HostError as error:  # skip a domain that has been destroyed meanwhile
                    if error.domid != int(info["domain"]):
                        raise
            if len(infos) < _DOMAINS_AT_ONCE:
                return domains
            first = int(infos[-1]["domain"]) + 1

    def info(self, domid: DomId) -> DomainInfo:
        """See Host."""
        return self._domain_info(self._getdomaininfo(domid))

    def _getdomaininfolist(self, first: DomId, count: int) -> np.ndarray:
        """Return the getdomaininfo of up to ``count`` domains, from ``first`` on."""
        struct = self._interface.getdomaininfo
        size = struct.size(8)
        with self._calls.buffer(count * size) as buffer:
            result = self._calls.sysctl(
                domctl.SYSCTL_GETDOMAININFOLIST,
                "getdomaininfolist",
                domctl.GETDOMAININFOLIST,
                first_domain=first,
                max_domains=count,
                buffer=buffer.address,
            )
            return buffer.array[: int(result["num_domains"]) * size].view(struct[8]).copy()

    def _getdomaininfo(self, domid: DomId) -> np.void:
        if 0 <= domid < domctl.DOMID_FIRST_RESERVED:
            infos = self._getdomaininfolist(domid, 1)  # Xen starts with the next domain if this one does not exist
            if len(infos) and int(infos[0]["domain"]) == domid:
                return infos[0]  # type: ignore[no-any-return]
        raise host_error("getdomaininfo", errno.ESRCH, domid)

    def _domain_info(self, raw: np.void) -> DomainInfo:
        """Return the DomainInfo of a struct xen_domctl_getdomaininfo."""
        domid, flags = DomId(int(raw["domain"])), int(raw["flags"])
        shutdown = bool(flags & domctl.DOMINF_SHUTDOWN)
        handle = raw["handle"].tobytes()
        return DomainInfo(
            domid=domid,
            name=self._name(domid),
            uuid=str(uuids.UUID(bytes=handle)) if any(handle) else None,
            hvm=bool(flags & domctl.DOMINF_HVM_GUEST),
            width=self._width(domid),
            pages=int(raw["tot_pages"]),
            max_pages=int(raw["max_pages"]),
            shared_info_mfn=int(raw["shared_info_frame"]),
            max_vcpu=_max_vcpu_of(raw),
            paused=bool(flags & domctl.DOMINF_PAUSED),
            shutdown=shutdown,
            shutdown_reason=flags >> domctl.DOMINF_SHUTDOWN_SHIFT & domctl.DOMINF_SHUTDOWN_MASK if shutdown else None,
            dying=bool(flags & domctl.DOMINF_DYING),
        )

    def _name(self, domid: DomId) -> str | None:
        return self._xenstore().read(f"/local/domain/{domid}/name")

    @property
    def xenstore_error(self) -> str | None:
        """Why xenstore cannot be reached, so that no domain has a name; None if it can."""
        return self._xenstore().error

    def _max_vcpu(self, domid: DomId) -> int:
        """Return a domain's highest vcpu number; -1 if it has none."""
        return _max_vcpu_of(self._getdomaininfo(domid))

    def _xenstore(self) -> XenStore:
        if self._store is None:
            self._store = XenStore()
            if not self._store.reachable and self._has_xenstore_domain():
                self._store = XenStore(socket=False)
        return self._store

    def _has_xenstore_domain(self) -> bool:
        return bool((self._getdomaininfolist(DomId(0), _DOMAINS_AT_ONCE)["flags"] & domctl.DOMINF_XS_DOMAIN).any())

    def _width(self, domid: DomId) -> Width:
        result = self._calls.domctl(domctl.GET_ADDRESS_SIZE, "get_address_size", domid, domctl.ADDRESS_SIZE)
        return 4 if int(result["size"]) == 32 else 8

    def pause(self, domid: DomId) -> None:
        """See Host."""
        self._calls.domctl(domctl.PAUSEDOMAIN, "pausedomain", domid, domctl.NOTHING)

    def unpause(self, domid: DomId) -> None:
        """See Host."""
        self._calls.domctl(domctl.UNPAUSEDOMAIN, "unpausedomain", domid, domctl.NOTHING)

    def vcpu_context(self, domid: DomId, vcpu: int) -> bytes:
        """See Host."""
        width = self._width(domid)
        with self._calls.buffer(VCPU_GUEST_CONTEXT.size(8)) as buffer:
            arguments = {"vcpu": vcpu, "ctxt": buffer.address}
            self._calls.domctl(domctl.GETVCPUCONTEXT, "getvcpucontext", domid, domctl.VCPUCONTEXT, **arguments)
            return buffer.array[: VCPU_GUEST_CONTEXT.size(width)].tobytes()

    # -- inspecting memory

    def max_mfn(self) -> int:
        """See Host."""
        return self._max_mfn

    def _read_ram_bounds(self) -> U64:
        """Read the host's memory map. See ram_bounds."""
        with self._calls.buffer(domctl.E820_MAX * domctl.E820_ENTRY) as entries:
            with self._calls.buffer(domctl.MEMORY_MAP.size(8)) as argument:
                members = argument.array.view(domctl.MEMORY_MAP[8])
                members["nr_entries"], members["buffer"] = domctl.E820_MAX, entries.address
                command, op = domctl.XENMEM_MACHINE_MEMORY_MAP, "machine_memory_map"
                self._calls.call(domctl.MEMORY_OP, command, argument.address, op)
                count = min(int(members["nr_entries"][0]), domctl.E820_MAX)
            e820 = entries.array[: count * domctl.E820_ENTRY].tobytes()
        return ram_bounds(e820)

    def is_ram(self, mfns: U64) -> Mask:
        """Return which frames are certainly RAM, and so no device's registers.

        Frames below 1 MiB never are.
        """
        bounds_passed = np.searchsorted(self._ram_bounds, mfns, side="right")
        return (bounds_passed & 1).astype(np.bool_)

    def map_frames(self, domid: DomId, mfns: U64) -> tuple[U8, U8]:
        """See Host. The mapping lives as long as anything refers to the array.

        Xen would map a device's registers too for a domain that may use them, and reading them can change them. So
        frames that may not be RAM are mapped only if getpageframeinfo3 knows them as the domain's, or if they are its
        shared info.
        """
        assert self._memory
        mfns = np.asarray(mfns, dtype=np.uint64)
        safe = self.is_ram(mfns)
        if safe.all() and len(mfns):
            pages, mapped = self._memory.map_read_only(domid, mfns)
            return pages, mapped.astype(np.uint8)
        types = self.page_types(domid, mfns[~safe])
        safe[~safe] = (types != PageType.XTAB) & (types != PageType.BROKEN)
        if not safe.all():
            safe |= mfns == np.uint64(self._getdomaininfo(domid)["shared_info_frame"])
        out = np.zeros((len(mfns), PAGE_SIZE), np.uint8)
        rows = np.flatnonzero(safe)
        if len(rows):
            out[rows], safe[rows] = self._memory.map_read_only(domid, mfns[rows])
        return out, safe.astype(np.uint8)

    def page_types(self, domid: DomId, mfns: U64) -> U8:
        """See Host."""
        mfns = np.asarray(mfns, dtype=np.uint64)
        out = np.full(len(mfns), PageType.XTAB, np.uint8)
        batch_size = domctl.PAGEFRAMEINFO_MAX
        with self._calls.buffer(8 * batch_size) as buffer:
            array = buffer.array.view("<u8")
            for start in range(0, max(len(mfns), 1), batch_size):  # also without frames, to fail without the domain
                batch = mfns[start : start + batch_size]
                array[: len(batch)] = batch
                arguments = {"num": len(batch), "array": buffer.address}
                op = "getpageframeinfo3"
                self._calls.domctl(domctl.GETPAGEFRAMEINFO3, op, domid, domctl.PAGEFRAMEINFO3, **arguments)
                out[start : start + batch_size] = array[: len(batch)] >> np.uint64(domctl.PFINFO_LTAB_SHIFT)
        out[mfns > np.uint64(self._max_mfn)] = PageType.XTAB
        return out

    def m2p(self, mfns: U64) -> U64:
        """See Host."""
        assert self._memory
        if self._m2p is None:
            self._m2p = M2P(self._calls, self._memory, self._max_mfn + 1)
        try:
            return self._m2p.lookup(np.asarray(mfns, dtype=np.uint64))
        except HostError:
            self._m2p = None  # a chunk that could not be mapped leaves a gap in the reserved addresses
            raise

    def shared_info(self, domid: DomId) -> bytes:
        """See Host."""
        assert self._memory
        frame = np.array([self._getdomaininfo(domid)["shared_info_frame"]], np.uint64)
        pages, mapped = self._memory.map_read_only(domid, frame)
        if not mapped[0]:
            raise HostError(f"dom{domid}: shared info, mfn {int(frame[0]):#x}: cannot be mapped", op="map", domid=domid)
        return pages.tobytes()

    # -- building domains

    def create(
        self,
        width: Width = 8,
        *,
        vcpus: int = 1,
        max_pages: int = 0,
        name: str | None = None,
        uuid: str | None = None,
    ) -> DomId:
        """See Toolstack."""
        limit = domctl.MAX_VIRT_CPUS
        if not 1 <= vcpus <= limit:
            raise host_error("createdomain", errno.EINVAL, None, f"a PV domain has 1 to {limit} vcpus, not {vcpus}")
        domid = self._createdomain(vcpus, uuid)
        try:
            self.set_width(domid, width)
            self._calls.domctl(domctl.MAX_VCPUS, "max_vcpus", domid, domctl.VCPUS, max=vcpus)
            self.set_max_mem(domid, max_pages)
            self._xenstore().write(domid, xenstore_nodes.creation_nodes(domid, name, uuid))
        except BaseException as failure:
            destroy_unfinished(self, domid, failure)
            raise
        return domid

    def _createdomain(self, vcpus: int, uuid: str | None) -> DomId:
        struct = self._interface.createdomain
        arguments = {
            "handle": np.frombuffer(uuids.UUID(uuid).bytes if uuid is not None else bytes(16), np.uint8),
            "max_vcpus": vcpus,
            "max_evtchn_port": max(_EVENT_CHANNELS, 16 * vcpus),
            "max_grant_frames": domctl.HOST_DEFAULT,
            "max_maptrack_frames": domctl.HOST_DEFAULT,
        }
        physinfo = self._physinfo()
        if "grant_opts" in dict(struct.members(8)):
            arguments["grant_opts"] = 2 if int(physinfo["capabilities"]) & domctl.PHYSCAP_GNTTAB_V2 else 1
        try:
            return self._calls.create_domain(domctl.CREATEDOMAIN, "createdomain", struct, **arguments)
        except HostError as error:
            if error.errno != errno.ENOMEM:
                raise
            free_kib = int(physinfo["free_pages"]) * _KIB_PER_PAGE
            reason = f"only {free_kib} KiB are free on this host; destroy a domain, or give dom0 less memory"
            raise host_error("createdomain", errno.ENOMEM, None, reason) from None

    def set_width(self, domid: DomId, width: Width) -> None:
        """See Toolstack."""
        op, struct = "set_address_size", domctl.ADDRESS_SIZE
        try:
            self._calls.domctl(domctl.SET_ADDRESS_SIZE, op, domid, struct, size=8 * width)
        except HostError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            reason = "this Xen runs no 32-bit PV domains (built without CONFIG_PV32, or booted with pv=no-32)"
            raise host_error(op, errno.EOPNOTSUPP, domid, reason) from None

    def destroy(self, domid: DomId) -> None:
        """See Toolstack."""
        if domid == DOM0:
            raise host_error("destroydomain", errno.EINVAL, domid, "dom0 cannot destroy itself")
        store, daemons = self._xenstore(), self.daemons()
        no_such_domain: HostError | None = None
        try:
            self._calls.domctl(domctl.DESTROYDOMAIN, "destroydomain", domid, domctl.NOTHING)
        except HostError as error:
            if error.errno != errno.ESRCH:
                raise
            no_such_domain = error
        vm = store.read(f"{xenstore_nodes.home(domid)}/vm") or ""
        uuid = vm.rpartition("/")[2] if vm.startswith("/vm/") else None
        userdata.remove(domid, uuid)
        if any(info.uuid == uuid for info in self.domains() if info.domid != domid):
            uuid = None
        # Remove the nodes last: by now no client that knew the domain writes to them.
        nodes_existed = store.remove(domid, xenstore_nodes.root_paths(domid, daemons, uuid))
        if no_such_domain and not nodes_existed:
            raise no_such_domain

    def rename(self, domid: DomId, name: str) -> None:
        """See Toolstack."""
        info = self.info(domid)
        self._xenstore().write(domid, xenstore_nodes.name_nodes(domid, name, info.uuid))

    def set_max_mem(self, domid: DomId, pages: int) -> None:
        """See Toolstack."""
        struct = domctl.MAX_MEM_KIB
        self._calls.domctl(domctl.MAX_MEM, "max_mem", domid, struct, max_memkb=pages * _KIB_PER_PAGE)

    def set_memory_map(self, domid: DomId, pages: int) -> None:
        """See Toolstack."""
        op, struct = "set_memory_map", domctl.FOREIGN_MEMORY_MAP
        entry = pack("<QQI", 0, pages * PAGE_SIZE, domctl.E820_RAM)
        with self._calls.buffer(len(entry)) as entries, self._calls.buffer(struct.size(8)) as argument:
            entries.array[: len(entry)] = np.frombuffer(entry, np.uint8)
            members = argument.array.view(struct[8])
            members["domid"], members["map"]["nr_entries"], members["map"]["buffer"] = domid, 1, entries.address
            command = domctl.XENMEM_SET_MEMORY_MAP
            self._calls.call(domctl.MEMORY_OP, command, argument.address, op, domid)

    def _physinfo(self) -> np.void:
        return self._calls.sysctl(domctl.SYSCTL_PHYSINFO, "physinfo", self._interface.physinfo)

    def free_pages(self) -> int:
        """See Toolstack."""
        physinfo = self._physinfo()
        return max(int(physinfo["free_pages"]) - int(physinfo["outstanding_pages"]), 0)

    def populate_physmap(self, domid: DomId, pfns: U64, order: int = 0) -> U64:
        """See Toolstack."""
        mfns = np.array(pfns, np.uint64)
        populated = 0
        while populated < len(mfns):
            batch = mfns[populated : populated + _EXTENTS_AT_ONCE]
            count = self._populate_batch(domid, batch, order)
            populated += count
            if count < len(batch):
                break
        if not populated:
            self._getdomaininfo(domid)  # raises ESRCH: Xen populates 0 extents of a domain that does not exist
        return mfns[:populated]

    def _populate_batch(self, domid: DomId, extents: U64, order: int) -> int:
        """Populate pfns; replace them by the (first) mfns in place.

        Return how many were populated.
        """
        op, struct = "populate_physmap", domctl.RESERVATION
        with self._calls.buffer(extents.nbytes) as numbers, self._calls.buffer(struct.size(8)) as argument:
            array = numbers.array.view("<u8")[: len(extents)]
            array[:] = extents
            members = argument.array.view(struct[8])
            members["extent_start"], members["nr_extents"] = numbers.address, len(extents)
            members["extent_order"], members["domid"] = order, domid
            command = domctl.XENMEM_POPULATE_PHYSMAP
            count = self._calls.call(domctl.MEMORY_OP, command, argument.address, op, domid)
            extents[:count] = array[:count]
        return count

    @contextlib.contextmanager
    def map_writable(self, domid: DomId, mfns: U64) -> Iterator[U8]:
        """See Toolstack."""
        assert self._memory
        op, mfns = "map_writable", np.asarray(mfns, dtype=np.uint64)
        is_ram = self.is_ram(mfns)
        if not is_ram.all() or not len(mfns):
            self._check_ownership(op, domid, mfns[~is_ram])
        with self._memory.map_writable(domid, mfns) as (pages, errors):
            if (first := first_bad(errors != 0)) is not None:
                self._check_ownership(op, domid, mfns)
                reason = f"mfn {int(mfns[first]):#x} cannot be mapped writable: is it a page table?"
                raise host_error(op, -int(errors[first]), domid, reason)
            yield pages

    def write_frames(self, domid: DomId, mfns: U64, pages: U8) -> None:
        """See Toolstack."""
        with self.map_writable(domid, mfns) as mapped:
            mapped[:] = pages

    def init_hypercall_page(self, domid: DomId, mfn: int) -> None:
        """See Toolstack."""
        op, struct = "hypercall_init", domctl.HYPERCALL_PAGE
        self._check_ownership(op, domid, np.array([mfn], np.uint64))
        try:
            self._calls.domctl(domctl.HYPERCALL_INIT, op, domid, struct, gmfn=mfn)
        except HostError as error:
            if error.errno != errno.EPERM:
                raise
            reason = f"mfn {mfn:#x} is not writable: is it a page table?"
            raise host_error(op, errno.EPERM, domid, reason) from None

    def pin_tables(self, domid: DomId, mfns: U64, levels: U8) -> None:
        """See Toolstack."""
        op, mfns = "mmuext_op", np.asarray(mfns, dtype=np.uint64)
        commands = np.asarray(levels, np.uint8) - np.uint8(1) + np.uint8(domctl.MMUEXT_PIN_L1_TABLE)
        for start in range(0, max(len(mfns), 1), _PINS_AT_ONCE):
            batch = slice(start, start + _PINS_AT_ONCE)
            pinned, number = self._calls.mmuext_op(domid, commands[batch], mfns[batch])
            if number == errno.ESRCH or (number and not len(mfns)):
                raise host_error(op, number, domid)
            if number:
                mfn, level = int(mfns[start + pinned]), int(levels[start + pinned])
                reason = f"mfn {mfn:#x} cannot be pinned as an L{level} table; `xl dmesg` may name the entry"
                raise host_error(op, number, domid, reason)

    def _check_ownership(self, op: str, domid: DomId, mfns: U64) -> None:
        """Raise HostError (EINVAL) unless all frames are the domain's memory.

        A device's registers are not.
        """
        types = self.page_types(domid, mfns)
        foreign = (types == PageType.XTAB) | (types == PageType.BROKEN)
        if (first := first_bad(foreign)) is not None:
            raise host_error(op, errno.EINVAL, domid, f"mfn {int(mfns[first]):#x} is not the domain's")

    # -- vcpus, shared info, event channels, grants

    def set_vcpu_context(self, domid: DomId, vcpu: int, context: bytes) -> None:
        """See Toolstack."""
        op, size = "setvcpucontext", VCPU_GUEST_CONTEXT.size(self._width(domid))
        if len(context) != size:
            raise host_error(op, errno.EINVAL, domid, f"a context has {size} bytes, not {len(context)}")
        with self._calls.buffer(VCPU_GUEST_CONTEXT.size(8)) as buffer:
            buffer.array[:size] = np.frombuffer(context, np.uint8)
            arguments = {"vcpu": vcpu, "ctxt": buffer.address}
            self._calls.domctl(domctl.SETVCPUCONTEXT, op, domid, domctl.VCPUCONTEXT, **arguments)

    def write_shared_info(self, domid: DomId, data: bytes, offset: int = 0) -> None:
        """See Toolstack."""
        assert self._memory
        op = "shared_info"
        frame = np.array([self._getdomaininfo(domid)["shared_info_frame"]], np.uint64)
        if offset < 0 or offset + len(data) > PAGE_SIZE:
            raise host_error(op, errno.EINVAL, domid, f"{len(data)} bytes at {offset:#x} do not fit the page")
        with self._memory.map_writable(domid, frame) as (pages, errors):
            if errors.any():
                raise host_error(op, -int(errors[0]), domid, f"mfn {int(frame[0]):#x} cannot be mapped writable")
            pages[0, offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    def daemons(self) -> Daemons:
        """See Toolstack."""
        store = self._xenstore()
        console, xenstore = (store.read(f"/tool/{name}/domid") for name in ("xenconsoled", "xenstored"))
        return Daemons(DomId(int(console or 0)), DomId(int(xenstore or 0)))

    def alloc_event_channel(self, domid: DomId, remote: DomId = DOM0) -> int:
        """See Toolstack."""
        command, op = domctl.EVTCHNOP_ALLOC_UNBOUND, "evtchn_alloc_unbound"
        struct = domctl.EVTCHN_ALLOC_UNBOUND
        return int(self._calls.event_channel_op(command, op, domid, struct, dom=domid, remote_dom=remote)["port"])

    def seed_grants(self, domid: DomId, *, console: int, xenstore: int) -> None:
        """See Toolstack."""
        assert self._memory
        op, daemons = "seed_grants", self.daemons()
        self._check_ownership(op, domid, np.array([console, xenstore], np.uint64))
        if max(console, xenstore) >> 32:
            reason = f"mfn {max(console, xenstore):#x} does not fit a grant entry, which has 32 bits"
            raise host_error(op, errno.EINVAL, domid, reason)
        kind, number = domctl.RESOURCE_GRANT_TABLE, domctl.RESOURCE_GRANT_TABLE_SHARED
        with self._memory.map_resource(domid, kind, number) as frame:
            table = frame.view(domctl.GRANT_ENTRY_V1[8])
            for entry, remote, mfn in (
                (domctl.GNTTAB_RESERVED_CONSOLE, daemons.console, console),
                (domctl.GNTTAB_RESERVED_XENSTORE, daemons.xenstore, xenstore),
            ):
                table[entry]["domid"], table[entry]["frame"] = remote, mfn
                table[entry]["flags"] = domctl.GTF_PERMIT_ACCESS

    def introduce(self, domid: DomId, *, console: Ring, xenstore: Ring) -> None:
        """See Toolstack."""
        store = self._xenstore()
        store.write(domid, xenstore_nodes.introduction_nodes(self.info(domid), self.daemons(), console, xenstore))
        store.introduce(domid, xenstore.mfn, xenstore.port)

    def set_configuration(self, domid: DomId, config: bytes) -> None:
        """See Toolstack."""
        userdata.write(domid, self.info(domid).uuid, config)

    def configuration(self, domid: DomId) -> bytes | None:
        """See Toolstack."""
        return userdata.read(domid, self.info(domid).uuid)

    # -- saving and restoring

    def vcpu_state(self, domid: DomId, vcpu: int) -> VcpuState:
        """See Mover."""
        return self._cpu_state.vcpu_state(domid, vcpu)

    def set_vcpu_state(self, domid: DomId, vcpu: int, state: VcpuState) -> None:
        """See Mover."""
        self._cpu_state.set_vcpu_state(domid, vcpu, state)

    def tsc_info(self, domid: DomId) -> TscInfo:
        """See Mover."""
        return self._cpu_state.tsc_info(domid)

    def set_tsc_info(self, domid: DomId, info: TscInfo) -> None:
        """See Mover."""
        self._cpu_state.set_tsc_info(domid, info)

    def cpu_policy(self, domid: DomId) -> CpuPolicy:
        """See Mover."""
        return self._cpu_state.cpu_policy(domid)

    def set_cpu_policy(self, domid: DomId, policy: CpuPolicy) -> None:
        """See Mover."""
        self._cpu_state.set_cpu_policy(domid, policy)

    def log_dirty(self, domid: DomId, *, on: bool) -> None:
        """See Mover."""
        if on:
            info = self.info(domid)
            max_pfn = int(SHARED_INFO.read(self.shared_info(domid), info.width)["arch"]["max_pfn"])
            self._log_dirty.enable(info, max_pfn)
        else:
            self._log_dirty.disable(domid)

    def dirty_pfns(self, domid: DomId, pages: int, *, clean: bool) -> U64:
        """See Mover.

        Allocates a bit for each of ``pages`` while it runs: 512 MiB for 2^32.
        """
        return self._log_dirty.dirty_pfns(domid, pages, clean=clean)

    def request_shutdown(self, domid: DomId, value: str) -> None:
        """See Mover.

        A guest that has seen a request empties the node itself: there is nothing to withdraw then.
        """
        self._getdomaininfo(domid)
        home = xenstore_nodes.home(domid)
        path = f"{home}/{xenstore_nodes.CONTROL_SHUTDOWN}"

        def is_needed(read: Callable[[str], str | None]) -> bool:
            if read(home) is None:
                raise host_error("xenstore", errno.ESRCH, domid)
            return bool(value) or bool(read(path))

        self._xenstore().write_if(domid, xenstore_nodes.Node(path, value, xenstore_nodes.Access.WRITE), is_needed)

    def shutdown_request(self, domid: DomId) -> str:
        """See Mover."""
        self._getdomaininfo(domid)
        store = self._xenstore()
        store.check_reachable("xenstore", domid)
        return store.read(f"{xenstore_nodes.home(domid)}/{xenstore_nodes.CONTROL_SHUTDOWN}") or ""

    def devices(self, domid: DomId) -> list[str]:
        """See Mover."""
        self._getdomaininfo(domid)
        store = self._xenstore()
        store.check_reachable("xenstore", domid)
        return xenstore_nodes.find_devices(domid, store.list)

    def resume(self, domid: DomId) -> None:
        """See Mover."""
        self._calls.domctl(domctl.RESUMEDOMAIN, "resumedomain", domid, domctl.NOTHING)


def _max_vcpu_of(info: np.void) -> int:
    """Return the highest vcpu number in a struct xen_domctl_getdomaininfo.

    -1 if the domain has no vcpu.
    """
    max_vcpu_id = int(info["max_vcpu_id"])
    return -1 if max_vcpu_id == domctl.INVALID_MAX_VCPU_ID else max_vcpu_id


def ram_bounds(e820: bytes) -> U64:
    """Return where RAM starts and ends, in mfns: start, end, start, and so on.

    Pages that are RAM in part are left out, and so is the first MiB, which Xen gives to any domain that may do I/O.

    Args:
        e820: The host's memory map, entries of struct e820entry.
    """
    entries = [unpack_from("<QQI", e820, offset) for offset in range(0, len(e820), domctl.E820_ENTRY)]
    bounds: list[int] = []
    for base, size, kind in sorted(entries):
        first, end = max(-(-base // PAGE_SIZE), _FIRST_MIB), (base + size) // PAGE_SIZE
        if kind == domctl.E820_RAM and max([first, *bounds[-1:]]) < end:
            bounds += [max([first, *bounds[-1:]]), end]
    return np.array(bounds, np.uint64)


def unknown_version(version: XenVersion) -> HostError:
    """Return the error for a Xen whose control interface is not in domctl.INTERFACES."""
    known = ", ".join(f"{major}.{minor}" for major, minor in domctl.INTERFACES)
    name = f"Xen {version.major}.{version.minor}{version.extra}"
    return HostError(f"{name}: unknown control interface; xenpv supports Xen {known}", op="xen_version")
