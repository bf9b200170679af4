"""XenHost: the Host protocol over the Xen that this dom0 runs on."""

from __future__ import annotations

import errno
import mmap
import uuid
from struct import unpack_from
from types import TracebackType
from typing import Self

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.domctl import PageType
from xenpv.abi.x86 import PAGE_SIZE, VCPU_GUEST_CONTEXT
from xenpv.errors import HostError
from xenpv.frames import U8, U64, DomId, Mask
from xenpv.host.protocol import DomainInfo, XenVersion
from xenpv.host.xen import domctl, libxen
from xenpv.host.xen.xenstore import Store

_ALL_ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_DOMAINS_AT_ONCE = 256
_CHUNK_SHIFT = 18  # Xen hands out its m2p in pieces of 2 MiB: 2^18 entries, 1 GiB worth of frames
_CHUNK_BYTES = 8 << _CHUNK_SHIFT
_CHUNK_PAGES = _CHUNK_BYTES // PAGE_SIZE
_FIRST_MIB = (1 << 20) // PAGE_SIZE
_UNKNOWN, _MAPPED, _HOLE = 0, 1, 2


class XenHost:
    """The Xen below us. Opening it needs root in dom0 and changes nothing; HostError says what is missing.

    Several threads may use one at once: Xen's libraries lock what they share, ctypes lets go of the GIL in each call,
    and a call keeps nothing that another would see. Only close() must come after all of them.
    """

    def __init__(self) -> None:
        libxen.check_privcmd()
        self._calls = libxen.Calls()
        self._memory: libxen.ForeignMemory | None = None
        self._store: Store | None = None
        self._m2p: _M2P | None = None
        try:
            self._version = self._ask_version()
            known = domctl.INTERFACES.get((self._version.major, self._version.minor))
            if known is None:
                raise unknown_version(self._version)
            self._calls.interface = known
            self._info = known.getdomaininfo
            self._memory = libxen.ForeignMemory()
            frames = self._calls.two(domctl.MEMORY_OP, domctl.XENMEM_MAXIMUM_RAM_PAGE, 0, "maximum_ram_page")
            self._max_mfn = frames - 1  # Xen answers with its max_page, which is one above
            self._ram = self._ask_ram()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of Xen. What map_frames has given stays readable as long as it is held."""
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
        return self._version

    def _ask_version(self) -> XenVersion:
        number = self._calls.two(domctl.XEN_VERSION, domctl.XENVER_VERSION, 0, "xen_version")
        with self._calls.buffer(16) as buffer:
            self._calls.two(domctl.XEN_VERSION, domctl.XENVER_EXTRAVERSION, buffer.address, "xen_version")
            extra = buffer.array.tobytes().partition(b"\0")[0].decode("ascii", "replace")
        return XenVersion(number >> 16, number & 0xFFFF, extra)

    # -- domains

    def domains(self) -> list[DomainInfo]:
        out: list[DomainInfo] = []
        first = 0
        while True:
            raw = self._list(DomId(first), _DOMAINS_AT_ONCE)
            for one in raw:
                try:
                    out.append(self._domain(one))
                except HostError as error:
                    if error.domid != int(one["domain"]):
                        raise
                    # went meanwhile: not there any more
            if len(raw) < _DOMAINS_AT_ONCE:
                return out
            first = int(raw[-1]["domain"]) + 1

    def info(self, domid: DomId) -> DomainInfo:
        return self._domain(self._raw(domid))

    def _list(self, first: DomId, most: int) -> np.ndarray:
        size = self._info.size(8)
        with self._calls.buffer(most * size) as buffer:
            done = self._calls.sysctl(
                domctl.SYSCTL_GETDOMAININFOLIST,
                "getdomaininfolist",
                domctl.GETDOMAININFOLIST,
                first_domain=first,
                max_domains=most,
                buffer=buffer.address,
            )
            return buffer.array[: int(done["num_domains"]) * size].view(self._info[8]).copy()

    def _raw(self, domid: DomId) -> np.void:
        if 0 <= domid < 0x7FF0:  # above are names for others: self, Xen, I/O
            raw = self._list(domid, 1)  # of this number, or the next that there is
            if len(raw) and int(raw[0]["domain"]) == domid:
                return raw[0]  # type: ignore[no-any-return]
        raise libxen.failed("getdomaininfo", errno.ESRCH, domid)

    def _domain(self, raw: np.void) -> DomainInfo:
        domid, flags = DomId(int(raw["domain"])), int(raw["flags"])
        shutdown = bool(flags & domctl.DOMINF_SHUTDOWN)
        handle = raw["handle"].tobytes()
        last = int(raw["max_vcpu_id"])
        return DomainInfo(
            domid=domid,
            name=self._name(domid),
            uuid=str(uuid.UUID(bytes=handle)) if any(handle) else None,
            hvm=bool(flags & domctl.DOMINF_HVM_GUEST),
            width=self._width(domid),
            pages=int(raw["tot_pages"]),
            max_pages=int(raw["max_pages"]),
            shared_info_mfn=int(raw["shared_info_frame"]),
            max_vcpu=-1 if last == domctl.INVALID_MAX_VCPU_ID else last,
            paused=bool(flags & domctl.DOMINF_PAUSED),
            shutdown=shutdown,
            shutdown_reason=flags >> domctl.DOMINF_SHUTDOWN_SHIFT & domctl.DOMINF_SHUTDOWN_MASK if shutdown else None,
            dying=bool(flags & domctl.DOMINF_DYING),
        )

    def _name(self, domid: DomId) -> str | None:
        return self._xenstore().read(f"/local/domain/{domid}/name")

    def _xenstore(self) -> Store:
        if self._store is None:
            self._store = Store()
            if not self._store.reachable and self._has_xenstore_domain():
                self._store = Store(socket=False)
        return self._store

    def _has_xenstore_domain(self) -> bool:
        return bool((self._list(DomId(0), _DOMAINS_AT_ONCE)["flags"] & domctl.DOMINF_XS_DOMAIN).any())

    def _width(self, domid: DomId) -> Width:
        done = self._calls.domctl(domctl.GET_ADDRESS_SIZE, "get_address_size", domid, domctl.ADDRESS_SIZE)
        return 4 if int(done["size"]) == 32 else 8

    def pause(self, domid: DomId) -> None:
        self._calls.domctl(domctl.PAUSEDOMAIN, "pausedomain", domid, domctl.NOTHING)

    def unpause(self, domid: DomId) -> None:
        self._calls.domctl(domctl.UNPAUSEDOMAIN, "unpausedomain", domid, domctl.NOTHING)

    def vcpu_context(self, domid: DomId, vcpu: int) -> bytes:
        width = self._width(domid)
        with self._calls.buffer(VCPU_GUEST_CONTEXT.size(8)) as buffer:
            arguments = {"vcpu": vcpu, "ctxt": buffer.address}
            self._calls.domctl(domctl.GETVCPUCONTEXT, "getvcpucontext", domid, domctl.VCPUCONTEXT, **arguments)
            return buffer.array[: VCPU_GUEST_CONTEXT.size(width)].tobytes()

    # -- memory

    def max_mfn(self) -> int:
        return self._max_mfn

    def _ask_ram(self) -> U64:
        """First mfns of what is memory, and of what is not, in turn."""
        with self._calls.buffer(domctl.E820_MAX * domctl.E820_ENTRY) as entries:
            with self._calls.buffer(domctl.MEMORY_MAP.size(8)) as argument:
                given = argument.array.view(domctl.MEMORY_MAP[8])
                given["nr_entries"], given["buffer"] = domctl.E820_MAX, entries.address
                command, op = domctl.XENMEM_MACHINE_MEMORY_MAP, "machine_memory_map"
                self._calls.two(domctl.MEMORY_OP, command, argument.address, op)
                count = min(int(given["nr_entries"][0]), domctl.E820_MAX)
            told = entries.array[: count * domctl.E820_ENTRY].tobytes()
        return ram_bounds(told)

    def is_ram(self, mfns: U64) -> Mask:
        """Which of these are memory, and thus no device's registers. Not all that is: none below 1 MiB is."""
        passed = np.searchsorted(self._ram, mfns, side="right")
        return (passed & 1).astype(np.bool_)

    def map_frames(self, domid: DomId, mfns: U64) -> tuple[U8, U8]:
        """See Host. The mapping lives as long as anything refers to the array.

        Xen would also map a device's registers for whoever may use them, and reading those can change them. So of what
        is not memory for certain only what getpageframeinfo3 calls the domain's is mapped, and its shared info.
        """
        assert self._memory
        wanted = np.asarray(mfns, dtype=np.uint64)
        good = self.is_ram(wanted)
        if good.all() and len(wanted):
            pages, mapped = self._memory.view(domid, wanted)
            return pages, mapped.astype(np.uint8)
        types = self.page_types(domid, wanted[~good])
        good[~good] = (types != PageType.XTAB) & (types != PageType.BROKEN)
        if not good.all():
            good |= wanted == np.uint64(self._raw(domid)["shared_info_frame"])
        out = np.zeros((len(wanted), PAGE_SIZE), np.uint8)
        which = np.flatnonzero(good)
        if len(which):
            out[which], good[which] = self._memory.view(domid, wanted[which])
        return out, good.astype(np.uint8)

    def page_types(self, domid: DomId, mfns: U64) -> U8:
        wanted = np.asarray(mfns, dtype=np.uint64)
        out = np.full(len(wanted), PageType.XTAB, np.uint8)
        most = domctl.PAGEFRAMEINFO_MAX
        with self._calls.buffer(8 * most) as buffer:
            array = buffer.array.view("<u8")
            for at in range(0, max(len(wanted), 1), most):  # with no frames too: is the domain there?
                batch = wanted[at : at + most]
                array[: len(batch)] = batch
                arguments = {"num": len(batch), "array": buffer.address}
                op = "getpageframeinfo3"
                self._calls.domctl(domctl.GETPAGEFRAMEINFO3, op, domid, domctl.PAGEFRAMEINFO3, **arguments)
                out[at : at + most] = array[: len(batch)] >> np.uint64(domctl.PFINFO_LTAB_SHIFT)
        out[wanted > np.uint64(self._max_mfn)] = PageType.XTAB
        return out

    def m2p(self, mfns: U64) -> U64:
        assert self._memory
        if self._m2p is None:
            self._m2p = _M2P(self._calls, self._memory, self._max_mfn + 1)
        try:
            return self._m2p.lookup(np.asarray(mfns, dtype=np.uint64))
        except HostError:
            self._m2p = None  # a chunk that could not be mapped has left a gap in the reserved addresses
            raise

    def shared_info(self, domid: DomId) -> bytes:
        assert self._memory
        frame = np.array([self._raw(domid)["shared_info_frame"]], np.uint64)
        pages, mapped = self._memory.view(domid, frame)
        if not mapped[0]:
            raise HostError(f"dom{domid}: shared info, mfn {int(frame[0]):#x}: cannot be mapped", op="map", domid=domid)
        return pages.tobytes()


class _M2P:
    """Xen's machine-to-phys table: its addresses reserved at once, each chunk mapped when first asked for."""

    def __init__(self, calls: libxen.Calls, memory: libxen.ForeignMemory, frames: int) -> None:
        self._memory = memory
        self._frames = frames
        chunks = -(-frames >> _CHUNK_SHIFT)
        with calls.buffer(8 * chunks) as buffer, calls.buffer(domctl.MACHPHYS_MFN_LIST.size(8)) as argument:
            given = argument.array.view(domctl.MACHPHYS_MFN_LIST[8])
            given["max_extents"], given["extent_start"] = chunks, buffer.address
            calls.two(domctl.MEMORY_OP, domctl.XENMEM_MACHPHYS_MFN_LIST, argument.address, "machphys_mfn_list")
            self._extents = buffer.array.view("<u8")[: int(given["nr_extents"][0])].copy()
        self._state: U8 = np.full(chunks, _HOLE, np.uint8)
        self._state[: len(self._extents)] = _UNKNOWN
        # Where the host has no memory, Xen repeats the chunk before, so that tools map something (or says 0).
        self._state[1 : len(self._extents)][self._extents[1:] == self._extents[:-1]] = _HOLE
        self._state[: len(self._extents)][self._extents == 0] = _HOLE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._table: U64 = np.frombuffer(mmap.mmap(-1, chunks * _CHUNK_BYTES, flags, mmap.PROT_READ), np.uint64)

    def lookup(self, mfns: U64) -> U64:
        if len(mfns) and int(mfns.max()) < self._frames:
            first, last = int(mfns.min()) >> _CHUNK_SHIFT, int(mfns.max()) >> _CHUNK_SHIFT
            if (self._state[first : last + 1] == _MAPPED).all():  # as nearly always: no chunk need be asked for
                known: U64 = self._table.take(mfns.astype(np.int64))
                return known
        inside: Mask = mfns < np.uint64(self._frames)
        everything = bool(inside.all())
        index = (mfns if everything else np.where(inside, mfns, np.uint64(0))).astype(np.int64)
        chunks = index >> _CHUNK_SHIFT
        states = self._state[chunks]
        unknown = states == _UNKNOWN
        if unknown.any():
            for chunk in np.unique(chunks[unknown]):
                self._map(int(chunk))
            states = self._state[chunks]
        found: U64 = self._table[index]
        if not everything or (states == _HOLE).any():
            found[~inside | (states == _HOLE)] = _ALL_ONES
        return found

    def _map(self, chunk: int) -> None:
        frames = self._extents[chunk] + np.arange(_CHUNK_PAGES, dtype=np.uint64)
        at = self._table.ctypes.data + chunk * _CHUNK_BYTES
        _, errors = self._memory.map(domctl.DOMID_XEN, frames, at)
        if errors.any():
            raise libxen.failed(f"map the m2p's chunk {chunk:#x}", -int(errors[errors != 0][0]))
        self._state[chunk] = _MAPPED


def ram_bounds(e820: bytes) -> U64:
    """First mfns of what is memory and of what is not, in turn, ascending, by the host's memory map.

    The first MiB is left out: Xen gives it to whoever may do I/O, memory or not. Pages that are memory in part, too.
    """
    entries = [unpack_from("<QQI", e820, at) for at in range(0, len(e820), domctl.E820_ENTRY)]
    bounds: list[int] = []
    for base, size, kind in sorted(entries):
        first, end = max(-(-base // PAGE_SIZE), _FIRST_MIB), (base + size) // PAGE_SIZE
        if kind == domctl.E820_RAM and max([first, *bounds[-1:]]) < end:
            bounds += [max([first, *bounds[-1:]]), end]
    return np.array(bounds, np.uint64)


def unknown_version(version: XenVersion) -> HostError:
    """What becomes of a Xen that is not in the table."""
    known = ", ".join(f"{major}.{minor}" for major, minor in domctl.INTERFACES)
    what = f"Xen {version.major}.{version.minor}{version.extra}"
    return HostError(f"{what}: an unknown control interface; xenpv knows those of Xen {known}", op="xen_version")
