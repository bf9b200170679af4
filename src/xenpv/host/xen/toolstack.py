"""XenToolstack: the Toolstack protocol over the Xen that this dom0 runs on."""

from __future__ import annotations

import contextlib
import errno
import uuid as uuids
from collections.abc import Iterator
from struct import pack

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.domctl import PageType
from xenpv.abi.x86 import PAGE_SIZE, VCPU_GUEST_CONTEXT
from xenpv.errors import HostError
from xenpv.frames import U8, U64, DomId
from xenpv.host import xenstore_nodes
from xenpv.host.protocol import DOM0, Daemons, Ring
from xenpv.host.xen import domctl, userdata
from xenpv.host.xen.host import XenHost
from xenpv.host.xen.libxen import failed, refused

_EXTENTS_AT_ONCE = 1 << 16  # half a MiB of frame numbers in memory that Xen can reach
_PINS_AT_ONCE = 1024
_KIB = PAGE_SIZE >> 10
_EVENT_CHANNELS = 1023  # libxl's default


class XenToolstack(XenHost):
    """XenHost, and what builds PV domains."""

    # -- domains

    def create(
        self,
        width: Width = 8,
        *,
        vcpus: int = 1,
        max_pages: int = 0,
        name: str | None = None,
        uuid: str | None = None,
    ) -> DomId:
        most = domctl.MAX_VIRT_CPUS
        if not 1 <= vcpus <= most:
            raise refused("createdomain", None, errno.EINVAL, f"{vcpus} vcpus; a PV domain has from 1 to {most}")
        domid = self._create(vcpus, uuid)
        try:
            self.set_width(domid, width)
            self._calls.domctl(domctl.MAX_VCPUS, "max_vcpus", domid, domctl.VCPUS, max=vcpus)
            self.set_max_mem(domid, max_pages)
            self._xenstore().write(domid, xenstore_nodes.created(domid, name, uuid))
        except BaseException:
            with contextlib.suppress(HostError):
                self.destroy(domid)
            raise
        return domid

    def _create(self, vcpus: int, uuid: str | None) -> DomId:
        assert self._calls.interface
        struct = self._calls.interface.createdomain
        wanted = {
            "handle": np.frombuffer(uuids.UUID(uuid).bytes if uuid is not None else bytes(16), np.uint8),
            "max_vcpus": vcpus,
            "max_evtchn_port": max(_EVENT_CHANNELS, 16 * vcpus),
            "max_grant_frames": domctl.HOST_DEFAULT,
            "max_maptrack_frames": domctl.HOST_DEFAULT,
        }
        physinfo = self._physinfo()
        if "grant_opts" in dict(struct.members(8)):
            wanted["grant_opts"] = 2 if int(physinfo["capabilities"]) & domctl.PHYSCAP_GNTTAB_V2 else 1
        try:
            return self._calls.new_domain(domctl.CREATEDOMAIN, "createdomain", struct, **wanted)
        except HostError as error:
            if error.errno != errno.ENOMEM:
                raise
            why = f"{int(physinfo['free_pages']) * _KIB} KiB are free on this host; end a domain, or give dom0 less"
            raise refused("createdomain", None, errno.ENOMEM, why) from None

    def set_width(self, domid: DomId, width: Width) -> None:
        op, struct = "set_address_size", domctl.ADDRESS_SIZE
        try:
            self._calls.domctl(domctl.SET_ADDRESS_SIZE, op, domid, struct, size=8 * width)
        except HostError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            why = "this Xen runs no 32-bit PV domains (built without CONFIG_PV32, or started with pv=no-32)"
            raise refused(op, domid, errno.EOPNOTSUPP, why) from None

    def destroy(self, domid: DomId) -> None:
        if domid == DOM0:
            raise refused("destroydomain", domid, errno.EINVAL, "it is the domain that asks")
        store, daemons = self._xenstore(), self.daemons()
        gone: HostError | None = None
        try:
            self._calls.domctl(domctl.DESTROYDOMAIN, "destroydomain", domid, domctl.NOTHING)
        except HostError as error:
            if error.errno != errno.ESRCH:
                raise
            gone = error
        vm = store.read(f"{xenstore_nodes.home(domid)}/vm") or ""
        uuid = vm.rpartition("/")[2] if vm.startswith("/vm/") else None
        userdata.remove(domid, uuid)
        if any(d.uuid == uuid for d in self.domains() if d.domid != domid):
            uuid = None
        # Only now: nobody who saw it alive writes to its nodes any more.
        left = store.remove(domid, xenstore_nodes.all_of(domid, daemons, uuid))
        if gone and not left:
            raise gone

    def rename(self, domid: DomId, name: str) -> None:
        info = self.info(domid)
        self._xenstore().write(domid, xenstore_nodes.named(domid, name, info.uuid))

    def set_max_mem(self, domid: DomId, pages: int) -> None:
        struct = domctl.MAX_MEM_KIB
        self._calls.domctl(domctl.MAX_MEM, "max_mem", domid, struct, max_memkb=pages * _KIB)

    # -- memory

    def set_memory_map(self, domid: DomId, pages: int) -> None:
        op, struct = "set_memory_map", domctl.FOREIGN_MEMORY_MAP
        entry = pack("<QQI", 0, pages * PAGE_SIZE, domctl.E820_RAM)
        with self._calls.buffer(len(entry)) as entries, self._calls.buffer(struct.size(8)) as argument:
            entries.array[: len(entry)] = np.frombuffer(entry, np.uint8)
            given = argument.array.view(struct[8])
            given["domid"], given["map"]["nr_entries"], given["map"]["buffer"] = domid, 1, entries.address
            command = domctl.XENMEM_SET_MEMORY_MAP
            self._calls.two(domctl.MEMORY_OP, command, argument.address, op, domid)

    def _physinfo(self) -> np.void:
        assert self._calls.interface
        return self._calls.sysctl(domctl.SYSCTL_PHYSINFO, "physinfo", self._calls.interface.physinfo)

    def free_pages(self) -> int:
        told = self._physinfo()
        return max(int(told["free_pages"]) - int(told["outstanding_pages"]), 0)

    def populate_physmap(self, domid: DomId, pfns: U64, order: int = 0) -> U64:
        mfns = np.array(pfns, np.uint64)
        done = 0
        while done < len(mfns):
            batch = mfns[done : done + _EXTENTS_AT_ONCE]
            given = self._populate(domid, batch, order)
            done += given
            if given < len(batch):
                break
        if not done:
            self._raw(domid)  # Xen says 0 for a domain that is not there, too
        return mfns[:done]

    def _populate(self, domid: DomId, extents: U64, order: int) -> int:
        """Turn pfns into mfns, in place. How many were."""
        op, struct = "populate_physmap", domctl.RESERVATION
        with self._calls.buffer(extents.nbytes) as numbers, self._calls.buffer(struct.size(8)) as argument:
            array = numbers.array.view("<u8")[: len(extents)]
            array[:] = extents
            given = argument.array.view(struct[8])
            given["extent_start"], given["nr_extents"] = numbers.address, len(extents)
            given["extent_order"], given["domid"] = order, domid
            command = domctl.XENMEM_POPULATE_PHYSMAP
            done = self._calls.two(domctl.MEMORY_OP, command, argument.address, op, domid)
            extents[:done] = array[:done]
        return done

    @contextlib.contextmanager
    def map_writable(self, domid: DomId, mfns: U64) -> Iterator[U8]:
        assert self._memory
        op, wanted = "map_writable", np.asarray(mfns, dtype=np.uint64)
        memory = self.is_ram(wanted)
        if not memory.all() or not len(wanted):
            self._own(op, domid, wanted[~memory])
        with self._memory.writable(domid, wanted) as (pages, errors):
            if errors.any():
                self._own(op, domid, wanted)
                at = int(np.argmax(errors != 0))
                why = f"mfn {int(wanted[at]):#x} cannot be mapped writable: is it a page table?"
                raise refused(op, domid, -int(errors[at]), why)
            yield pages

    def write_frames(self, domid: DomId, mfns: U64, pages: U8) -> None:
        with self.map_writable(domid, mfns) as mapped:
            mapped[:] = pages

    def init_hypercall_page(self, domid: DomId, mfn: int) -> None:
        op, struct = "hypercall_init", domctl.HYPERCALL_PAGE
        self._own(op, domid, np.array([mfn], np.uint64))
        try:
            self._calls.domctl(domctl.HYPERCALL_INIT, op, domid, struct, gmfn=mfn)
        except HostError as error:
            if error.errno != errno.EPERM:
                raise
            why = f"mfn {mfn:#x} cannot be written to: is it a page table?"
            raise refused(op, domid, errno.EPERM, why) from None

    def pin_tables(self, domid: DomId, mfns: U64, levels: U8) -> None:
        wanted = np.asarray(mfns, dtype=np.uint64)
        commands = np.asarray(levels, np.uint8) - np.uint8(1) + np.uint8(domctl.MMUEXT_PIN_L1_TABLE)
        for at in range(0, max(len(wanted), 1), _PINS_AT_ONCE):
            batch = slice(at, at + _PINS_AT_ONCE)
            done, number = self._calls.mmuext(domid, commands[batch], wanted[batch])
            if number == errno.ESRCH or (number and not len(wanted)):
                raise failed("mmuext_op", number, domid)
            if number:
                which = f"mfn {int(wanted[at + done]):#x} cannot be pinned as an L{int(levels[at + done])} table"
                raise refused("mmuext_op", domid, number, f"{which}; `xl dmesg` may say which entry")

    def _own(self, op: str, domid: DomId, mfns: U64) -> None:
        """All of these are the domain's memory, which a device's registers are not."""
        types = self.page_types(domid, mfns)
        foreign = (types == PageType.XTAB) | (types == PageType.BROKEN)
        if foreign.any():
            why = f"mfn {int(mfns[np.argmax(foreign)]):#x} is not the domain's"
            raise refused(op, domid, errno.EINVAL, why)

    # -- what it starts with

    def set_vcpu_context(self, domid: DomId, vcpu: int, context: bytes) -> None:
        op, needed = "setvcpucontext", VCPU_GUEST_CONTEXT.size(self._width(domid))
        if len(context) != needed:
            raise refused(op, domid, errno.EINVAL, f"a context of {len(context)} bytes, not {needed}")
        with self._calls.buffer(VCPU_GUEST_CONTEXT.size(8)) as buffer:
            buffer.array[:needed] = np.frombuffer(context, np.uint8)
            arguments = {"vcpu": vcpu, "ctxt": buffer.address}
            self._calls.domctl(domctl.SETVCPUCONTEXT, op, domid, domctl.VCPUCONTEXT, **arguments)

    def write_shared_info(self, domid: DomId, data: bytes, offset: int = 0) -> None:
        assert self._memory
        op = "shared_info"
        frame = np.array([self._raw(domid)["shared_info_frame"]], np.uint64)
        if offset < 0 or offset + len(data) > PAGE_SIZE:
            raise refused(op, domid, errno.EINVAL, f"{len(data)} bytes at {offset:#x} are beyond its end")
        with self._memory.writable(domid, frame) as (pages, errors):
            if errors.any():
                raise refused(op, domid, -int(errors[0]), f"mfn {int(frame[0]):#x} cannot be mapped writable")
            pages[0, offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    def daemons(self) -> Daemons:
        store = self._xenstore()
        console, xenstore = (store.read(f"/tool/{name}/domid") for name in ("xenconsoled", "xenstored"))
        return Daemons(DomId(int(console or 0)), DomId(int(xenstore or 0)))

    def alloc_event_channel(self, domid: DomId, remote: DomId = DOM0) -> int:
        command, op = domctl.EVTCHNOP_ALLOC_UNBOUND, "evtchn_alloc_unbound"
        struct = domctl.EVTCHN_ALLOC_UNBOUND
        return int(self._calls.event_channel(command, op, domid, struct, dom=domid, remote_dom=remote)["port"])

    def seed_grants(self, domid: DomId, *, console: int, xenstore: int) -> None:
        assert self._memory
        op, daemons = "seed_grants", self.daemons()
        self._own(op, domid, np.array([console, xenstore], np.uint64))
        if max(console, xenstore) >> 32:
            raise refused(op, domid, errno.EINVAL, f"a grant holds no mfn like {max(console, xenstore):#x}: 32 bits")
        kind, number = domctl.RESOURCE_GRANT_TABLE, domctl.RESOURCE_GRANT_TABLE_SHARED
        with self._memory.resource(domid, kind, number) as frame:
            table = frame.view(domctl.GRANT_ENTRY_V1[8])
            for entry, remote, mfn in (
                (domctl.GNTTAB_RESERVED_CONSOLE, daemons.console, console),
                (domctl.GNTTAB_RESERVED_XENSTORE, daemons.xenstore, xenstore),
            ):
                table[entry]["domid"], table[entry]["frame"] = remote, mfn
                table[entry]["flags"] = domctl.GTF_PERMIT_ACCESS

    def introduce(self, domid: DomId, *, console: Ring, xenstore: Ring) -> None:
        store = self._xenstore()
        store.write(domid, xenstore_nodes.introduced(self.info(domid), self.daemons(), console, xenstore))
        store.introduce(domid, xenstore.mfn, xenstore.port)

    def set_configuration(self, domid: DomId, config: bytes) -> None:
        userdata.write(domid, self.info(domid).uuid, config)

    def configuration(self, domid: DomId) -> bytes | None:
        return userdata.read(domid, self.info(domid).uuid)
