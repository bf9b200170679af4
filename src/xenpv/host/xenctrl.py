"""What XenHost calls, bare: Xen's libraries through ctypes, hypercalls, and the structs that they take.

Nothing native is loaded when this module is imported. The libraries with a stable interface (libxencall,
libxenforeignmemory, libxenstore) are opened when a host is; sysctls and domctls, whose interface is not stable, go by
the structs declared here, for the versions in INTERFACES and no others.

xen.git:xen/include/public/{version,memory,sysctl,domctl}.h, tools/libs/{call,foreignmemory,store}
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from xenpv import frames
from xenpv.abi.declare import U8, U16, U32, U64, Struct, array
from xenpv.abi.x86 import PAGE_SIZE
from xenpv.errors import HostError
from xenpv.frames import I64, DomId, Mask

PRIVCMD = ("/dev/xen/privcmd", "/proc/xen/privcmd")
LIBXENCALL = ("libxencall.so.1",)
LIBXENFOREIGNMEMORY = ("libxenforeignmemory.so.1",)
LIBXENSTORE = ("libxenstore.so.4", "libxenstore.so.3.0")
XS_OPEN_SOCKETONLY = 1 << 1
MAP_FIXED = 0x10  # Linux's; the mmap module does not name it

MEMORY_OP, XEN_VERSION, SYSCTL, DOMCTL = 12, 17, 35, 36
XENVER_VERSION, XENVER_EXTRAVERSION = 0, 1
XENMEM_MAXIMUM_RAM_PAGE, XENMEM_MACHPHYS_MFN_LIST = 2, 5
SYSCTL_GETDOMAININFOLIST = 6
PAUSEDOMAIN, UNPAUSEDOMAIN, GETVCPUCONTEXT, GET_ADDRESS_SIZE, GETPAGEFRAMEINFO3 = 3, 4, 13, 36, 61
PAGEFRAMEINFO_MAX = 1024
PFINFO_LTAB_SHIFT = 28
DOMID_SELF, DOMID_XEN = DomId(0x7FF0), DomId(0x7FF2)
DOMINF_DYING, DOMINF_HVM_GUEST, DOMINF_SHUTDOWN, DOMINF_PAUSED = 1 << 0, 1 << 1, 1 << 2, 1 << 3
DOMINF_XS_DOMAIN = 1 << 7
DOMINF_SHUTDOWN_SHIFT, DOMINF_SHUTDOWN_MASK = 16, 255
INVALID_MAX_VCPU_ID = 0xFFFF_FFFF

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
ADDRESS_SIZE = Struct("xen_domctl_address_size", "domctl.h", size=U32)
NOTHING = Struct("", "domctl.h", _pad=array(U8, 1))  # a domctl without arguments

SYSCTL_U, DOMCTL_U = 8, 16  # where the arguments are in struct xen_sysctl and struct xen_domctl
SYSCTL_SIZE, DOMCTL_SIZE = 136, 144


@dataclass(frozen=True, slots=True)
class Interface:
    """The unstable interfaces of one version of Xen."""

    sysctl: int  # XEN_SYSCTL_INTERFACE_VERSION
    domctl: int  # XEN_DOMCTL_INTERFACE_VERSION
    getdomaininfo: Struct


INTERFACES = {
    (4, 14): Interface(0x13, 0x12, GETDOMAININFO_0X12),
    (4, 17): Interface(0x15, 0x15, GETDOMAININFO_0X15),
    (4, 20): Interface(0x15, 0x17, GETDOMAININFO_0X15),
}


def failed(op: str, number: int, domid: int | None = None) -> HostError:
    """What Xen's errno means, in words."""
    who = "" if domid is None else f"dom{domid}: "
    if number == errno.ESRCH and domid is not None:
        why = "there is no such domain, or it has gone meanwhile"
    elif number in {errno.EPERM, errno.EACCES}:
        why = "needs root in dom0"
    else:
        why = os.strerror(number)
    name = errno.errorcode.get(number, str(number))
    return HostError(f"{who}{op}: {why} ({name})", op=op, domid=domid, errno=number)


def check_privcmd() -> None:
    """Raises HostError where there is no Xen below us, or we may not talk to it."""
    for path in PRIVCMD:
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except PermissionError as error:
            raise HostError(f"{path}: {error.strerror}; needs root in dom0", op="open", errno=error.errno) from error
        except OSError:
            continue  # not there, or a node without a device behind it
        return
    raise HostError(f"not on a Xen host: neither {' nor '.join(PRIVCMD)} can be opened", op="open", errno=errno.ENODEV)


def _library(names: tuple[str, ...]) -> ctypes.CDLL:
    why: list[str] = []
    for name in names:
        try:
            return ctypes.CDLL(name, use_errno=True)
        except OSError as error:
            why.append(str(error))
    raise HostError(f"{' or '.join(names)} is missing; is it Xen's dom0? ({'; '.join(why)})", op="dlopen")


def _function(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function


def _bytes_of(memory: ctypes.Array[ctypes.c_uint8]) -> frames.U8:
    """As an array, which keeps the ctypes object alive."""
    return np.frombuffer(memory, np.uint8)  # type: ignore[call-overload, no-any-return]


class Buffer:
    """Memory that a hypercall may write to: ``address`` for Xen, ``array`` (uint8) for us."""

    __slots__ = ("address", "array")

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.array: frames.U8 = _bytes_of((ctypes.c_uint8 * size).from_address(address))


class Calls:
    """Hypercalls, by libxencall."""

    def __init__(self) -> None:
        library = _library(LIBXENCALL)
        pointer, number = ctypes.c_void_p, ctypes.c_uint64
        self._close = _function(library, "xencall_close", ctypes.c_int, pointer)
        self._call1 = _function(library, "xencall1", ctypes.c_int, pointer, ctypes.c_uint, number)
        # Before 4.15 results are ints: of a host of 8 TiB and more, the number of frames is to be read as unsigned.
        wide = hasattr(library, "xencall2L")
        result = ctypes.c_long if wide else ctypes.c_int
        name = "xencall2L" if wide else "xencall2"
        self._call2 = _function(library, name, result, pointer, ctypes.c_uint, number, number)
        self._alloc = _function(library, "xencall_alloc_buffer", pointer, pointer, ctypes.c_size_t)
        self._free = _function(library, "xencall_free_buffer", None, pointer, pointer)
        opened = _function(library, "xencall_open", pointer, pointer, ctypes.c_uint)(None, 0)
        if not opened:
            raise failed("xencall_open", ctypes.get_errno())
        self._handle: int | None = opened
        self.interface: Interface | None = None

    def close(self) -> None:
        if self._handle is not None:
            self._close(self._handle)
            self._handle = None

    @contextlib.contextmanager
    def buffer(self, size: int) -> Iterator[Buffer]:
        """Zeroed memory; gone when the block ends."""
        self._opened()
        address = self._alloc(self._handle, max(size, 1))
        if not address:
            raise failed("xencall_alloc_buffer", ctypes.get_errno())
        try:
            ctypes.memset(address, 0, size)
            yield Buffer(address, size)
        finally:
            self._free(self._handle, address)

    def _opened(self) -> None:
        if self._handle is None:
            raise HostError("this host has been closed", op="close")

    def two(self, hypercall: int, command: int, address: int, op: str) -> int:
        """``hypercall(command, pointer)``; its result, at least 0."""
        self._opened()
        result = int(self._call2(self._handle, hypercall, command, address))
        if result == -1:
            raise failed(op, ctypes.get_errno())
        return result & 0xFFFF_FFFF if result < 0 else result

    def sysctl(self, command: int, op: str, struct: Struct, **arguments: int) -> np.void:
        """A sysctl; its arguments as Xen leaves them."""
        assert self.interface
        return self._control(SYSCTL, (command, self.interface.sysctl), op, struct, arguments)

    def domctl(self, command: int, op: str, domid: DomId, struct: Struct, **arguments: int) -> np.void:
        """A domctl; its arguments as Xen leaves them."""
        assert self.interface
        return self._control(DOMCTL, (command, self.interface.domctl, domid), op, struct, arguments)

    def _control(
        self, hypercall: int, head: tuple[int, ...], op: str, struct: Struct, arguments: dict[str, int]
    ) -> np.void:
        at, domid = (SYSCTL_U, None) if hypercall == SYSCTL else (DOMCTL_U, head[2])
        with self.buffer(max(SYSCTL_SIZE, DOMCTL_SIZE)) as buffer:
            buffer.array.view("<u4")[: len(head)] = head
            given = buffer.array[at : at + struct.size(8)].view(struct[8])
            for name, value in arguments.items():
                given[name] = value
            if self._call1(self._handle, hypercall, buffer.address) >= 0:
                return given[0].copy()  # type: ignore[no-any-return]
            number = ctypes.get_errno()  # now: freeing the buffer may change it
        if number == errno.EACCES:  # Xen's way to say that it speaks another version
            message = f"{op}: this Xen does not take interface version {head[1]:#x} (EACCES)"
            raise HostError(message, op=op, domid=domid, errno=number)
        raise failed(op, number, domid)


class ForeignMemory:
    """Mappings of other domains' frames, by libxenforeignmemory."""

    def __init__(self) -> None:
        library = _library(LIBXENFOREIGNMEMORY)
        pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        self._close = _function(library, "xenforeignmemory_close", integer, pointer)
        self._unmap = _function(library, "xenforeignmemory_unmap", integer, pointer, pointer, size)
        arguments = (pointer, ctypes.c_uint32, pointer, integer, integer, size, pointer, pointer)
        self._map = _function(library, "xenforeignmemory_map2", pointer, *arguments)
        opened = _function(library, "xenforeignmemory_open", pointer, pointer, ctypes.c_uint)(None, 0)
        if not opened:
            raise failed("xenforeignmemory_open", ctypes.get_errno())
        self._handle = opened
        self._mapped = 0
        self._closing = False

    def map(self, domid: DomId, mfns: frames.U64, at: int | None = None) -> tuple[int, I64]:
        """Map frames read-only, at that address (over what is there) or where there is room.

        The address, and for each frame 0 or its negative errno: those with one must not be touched.
        """
        if self._closing:
            raise HostError("this host has been closed", op="close")
        wanted = np.ascontiguousarray(mfns, dtype=np.uint64)
        errors = np.zeros(len(wanted), np.int32)
        flags = 0 if at is None else MAP_FIXED
        addresses = (wanted.ctypes.data, errors.ctypes.data)
        address = self._map(self._handle, domid, at, mmap.PROT_READ, flags, len(wanted), *addresses)
        if not address:
            raise failed("map frames", ctypes.get_errno(), domid)
        return int(address), errors.astype(np.int64)

    def view(self, domid: DomId, mfns: frames.U64) -> tuple[frames.U8, Mask]:
        """Frames as a read-only array (n, 4096), mapped as long as anything refers to it; and which could be mapped.

        Where some could not, it is a copy with zeroes for those: touching their place in the mapping would be SIGBUS.
        """
        if not len(mfns):
            return np.zeros((0, PAGE_SIZE), np.uint8), np.zeros(0, np.bool_)
        # Xen knows nobody as foreign to itself: dom0, where we are, maps its own frames under another name.
        address, errors = self.map(domid or DOMID_SELF, mfns)
        memory = (ctypes.c_uint8 * (len(mfns) * PAGE_SIZE)).from_address(address)
        self._mapped += 1
        weakref.finalize(memory, self._forget, address, len(mfns))
        pages = _bytes_of(memory).reshape(-1, PAGE_SIZE)
        pages.flags.writeable = False
        good = errors == 0
        if good.all():
            return pages, good
        if (errors == -errno.ESRCH).all():
            raise failed("map frames", errno.ESRCH, domid)
        copy = np.zeros(pages.shape, np.uint8)
        copy[good] = pages[good]
        return copy, good

    def _forget(self, address: int, pages: int) -> None:
        self._unmap(self._handle, address, pages)
        self._mapped -= 1
        self._close_when_unused()

    def close(self) -> None:
        """Maps nothing more; the handle goes with the last view."""
        if not self._closing:
            self._closing = True
            self._close_when_unused()

    def _close_when_unused(self) -> None:
        if self._closing and not self._mapped:
            self._close(self._handle)


class Store:
    """Xenstore, read by libxenstore; ``read`` gives None for whatever is not there."""

    def __init__(self, *, socket: bool = True) -> None:
        """Through the daemon's socket; else through the kernel, which waits for a xenstore that need not come."""
        self._handle: int | None = None
        try:
            library = _library(LIBXENSTORE)
        except HostError:
            return  # names are a courtesy
        pointer, text = ctypes.c_void_p, ctypes.c_char_p
        length = ctypes.POINTER(ctypes.c_uint)
        self._close = _function(library, "xs_close", None, pointer)
        self._read = _function(library, "xs_read", pointer, pointer, ctypes.c_uint32, text, length)
        self._free = _function(ctypes.CDLL(None), "free", None, pointer)
        opened = _function(library, "xs_open", pointer, ctypes.c_ulong)
        self._handle = opened(XS_OPEN_SOCKETONLY if socket else 0)

    @property
    def reachable(self) -> bool:
        return bool(self._handle)

    def read(self, path: str) -> str | None:
        if not self._handle:
            return None
        length = ctypes.c_uint()
        value = self._read(self._handle, 0, path.encode(), ctypes.byref(length))
        if not value:
            return None
        try:
            return ctypes.string_at(value, length.value).decode("utf-8", "replace")
        finally:
            self._free(value)

    def close(self) -> None:
        if self._handle:
            self._close(self._handle)
            self._handle = None
