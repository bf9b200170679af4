"""What XenHost calls, bare: hypercalls and mappings, by Xen's libraries through ctypes.

Nothing native is loaded when this module is imported. The libraries, whose interface is stable, are opened when a host
is: libxencall and libxenforeignmemory here, libxenstore in xenctrl_store.

xen.git:tools/libs/{call,foreignmemory}
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from xenpv import frames
from xenpv.abi.declare import Struct
from xenpv.abi.x86 import PAGE_SIZE
from xenpv.errors import HostError
from xenpv.frames import I64, DomId, Mask
from xenpv.host.xen.domctl import (
    DOMCTL,
    DOMCTL_SIZE,
    DOMCTL_U,
    DOMID_SELF,
    EVENT_CHANNEL_OP,
    MMUEXT,
    MMUEXT_OP,
    SYSCTL,
    SYSCTL_SIZE,
    SYSCTL_U,
    Interface,
)

PRIVCMD = ("/dev/xen/privcmd", "/proc/xen/privcmd")
LIBXENCALL = ("libxencall.so.1",)
LIBXENFOREIGNMEMORY = ("libxenforeignmemory.so.1",)
MAP_FIXED = 0x10  # Linux's; the mmap module does not name it


def failed(op: str, number: int, domid: int | None = None) -> HostError:
    """What Xen's errno means, in words."""
    who = "" if domid is None else f"dom{domid}: "
    if number == errno.ESRCH and domid is not None:
        why = "there is no such domain, or it has gone meanwhile"
    elif number in {errno.EPERM, errno.EACCES}:
        why = "needs root in dom0"
    else:
        why = os.strerror(number)
    return HostError(f"{who}{op}: {why} ({name_of(number)})", op=op, domid=domid, errno=number)


def refused(op: str, domid: int | None, number: int, why: str) -> HostError:
    """As failed, with the reason in our words."""
    who = "" if domid is None else f"dom{domid}: "
    return HostError(f"{who}{op}: {why} ({name_of(number)})", op=op, domid=domid, errno=number)


def name_of(number: int) -> str:
    """An errno's name, of two the one that Xen has."""
    return "EOPNOTSUPP" if number == errno.EOPNOTSUPP else errno.errorcode.get(number, str(number))


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


def library(names: tuple[str, ...]) -> ctypes.CDLL:
    """The first of these that is there. HostError when none is."""
    why: list[str] = []
    for name in names:
        try:
            return ctypes.CDLL(name, use_errno=True)
        except OSError as error:
            why.append(str(error))
    raise HostError(f"{' or '.join(names)} is missing; is it Xen's dom0? ({'; '.join(why)})", op="dlopen")


def function(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    """A function of a library, with its types."""
    found = getattr(library, name)
    found.restype, found.argtypes = result, arguments
    return found


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
        found = library(LIBXENCALL)
        pointer, number = ctypes.c_void_p, ctypes.c_uint64
        self._close = function(found, "xencall_close", ctypes.c_int, pointer)
        self._call1 = function(found, "xencall1", ctypes.c_int, pointer, ctypes.c_uint, number)
        # Before 4.15 results are ints: of a host of 8 TiB and more, the number of frames is to be read as unsigned.
        wide = hasattr(found, "xencall2L")
        result = ctypes.c_long if wide else ctypes.c_int
        name = "xencall2L" if wide else "xencall2"
        self._call2 = function(found, name, result, pointer, ctypes.c_uint, number, number)
        self._call4 = function(found, "xencall4", ctypes.c_int, pointer, ctypes.c_uint, *[number] * 4)
        self._alloc = function(found, "xencall_alloc_buffer", pointer, pointer, ctypes.c_size_t)
        self._free = function(found, "xencall_free_buffer", None, pointer, pointer)
        opened = function(found, "xencall_open", pointer, pointer, ctypes.c_uint)(None, 0)
        if not opened:
            raise failed("xencall_open", ctypes.get_errno())
        self._handle: int | None = opened
        self.interface: Interface | None = None

    def close(self) -> None:
        if self._handle is not None:
            self._close(self._handle)
            self._handle = None

    @contextlib.contextmanager
    def buffer(self, size: int, *, zeroed: bool = True) -> Iterator[Buffer]:
        """Memory; gone when the block ends."""
        self._opened()
        address = self._alloc(self._handle, max(size, 1))
        if not address:
            raise failed("xencall_alloc_buffer", ctypes.get_errno())
        try:
            if zeroed:
                ctypes.memset(address, 0, size)
            yield Buffer(address, size)
        finally:
            self._free(self._handle, address)

    def _opened(self) -> None:
        if self._handle is None:
            raise HostError("this host has been closed", op="close")

    def two(self, hypercall: int, command: int, address: int, op: str, domid: DomId | None = None) -> int:
        """``hypercall(command, pointer)``; its result, at least 0."""
        self._opened()
        result = int(self._call2(self._handle, hypercall, command, address))
        if result == -1:
            raise failed(op, ctypes.get_errno(), domid)
        return result & 0xFFFF_FFFF if result < 0 else result

    def sysctl(self, command: int, op: str, struct: Struct, **arguments: int) -> np.void:
        """A sysctl; its arguments as Xen leaves them."""
        assert self.interface
        return self._control(SYSCTL, (command, self.interface.sysctl), op, struct, arguments)[1]

    def domctl(self, command: int, op: str, domid: DomId, struct: Struct, /, **arguments: int) -> np.void:
        """A domctl; its arguments as Xen leaves them."""
        assert self.interface
        return self._control(DOMCTL, (command, self.interface.domctl, domid), op, struct, arguments)[1]

    def answered(self, command: int, op: str, domid: DomId, struct: Struct, /, **arguments: Any) -> tuple[int, np.void]:
        """A domctl that says more when it fails: its errno or 0, and its arguments as Xen leaves them."""
        assert self.interface
        head = (command, self.interface.domctl, domid)
        number, _, left = self._try_control(DOMCTL, head, op, struct, arguments)
        return number, left

    def new_domain(self, command: int, op: str, struct: Struct, **arguments: Any) -> DomId:
        """The domctl that takes no domain and gives one."""
        assert self.interface
        head = (command, self.interface.domctl, 0)
        try:
            return DomId(self._control(DOMCTL, head, op, struct, arguments)[0])
        except HostError as error:
            raise failed(op, error.errno or 0) from None

    def event_channel(self, command: int, op: str, domid: DomId, struct: Struct, **arguments: int) -> np.void:
        """An event channel operation; its arguments as Xen leaves them."""
        with self.buffer(struct.size(8)) as buffer:
            given = buffer.array.view(struct[8])
            for name, value in arguments.items():
                given[name] = value
            self.two(EVENT_CHANNEL_OP, command, buffer.address, op, domid)
            return given[0].copy()  # type: ignore[no-any-return]

    def mmuext(self, domid: DomId, commands: frames.U8, mfns: frames.U64) -> tuple[int, int]:
        """MMU operations on a domain's frames: how many were done, and the errno of the one that was not, or 0."""
        self._opened()
        size = MMUEXT.size(8)
        with self.buffer(size * len(mfns)) as buffer, self.buffer(8) as done:
            ops = buffer.array[: size * len(mfns)].view(MMUEXT[8])
            ops["cmd"], ops["arg1"] = commands, mfns
            if self._call4(self._handle, MMUEXT_OP, buffer.address, len(mfns), done.address, domid) >= 0:
                return len(mfns), 0
            number = ctypes.get_errno()
            return int(done.array.view("<u4")[0]), number

    def _control(
        self, hypercall: int, head: tuple[int, ...], op: str, struct: Struct, arguments: dict[str, Any]
    ) -> tuple[int, np.void]:
        """The domain and the arguments as Xen leaves them."""
        number, domid, left = self._try_control(hypercall, head, op, struct, arguments)
        if number:
            raise failed(op, number, None if hypercall == SYSCTL else head[2])
        return domid, left

    def _try_control(
        self, hypercall: int, head: tuple[int, ...], op: str, struct: Struct, arguments: dict[str, Any]
    ) -> tuple[int, int, np.void]:
        """Errno or 0, and the domain and the arguments as Xen leaves them."""
        at, domid = (SYSCTL_U, None) if hypercall == SYSCTL else (DOMCTL_U, head[2])
        with self.buffer(max(SYSCTL_SIZE, DOMCTL_SIZE)) as buffer:
            words = buffer.array.view("<u4")
            words[: len(head)] = head
            given = buffer.array[at : at + struct.size(8)].view(struct[8])
            for name, value in arguments.items():
                given[name] = value
            done = self._call1(self._handle, hypercall, buffer.address) >= 0
            number = 0 if done else ctypes.get_errno()  # now: freeing the buffer may change it
            left = int(words[2]) & 0xFFFF, given[0].copy()
        if number == errno.EACCES:  # Xen's way to say that it speaks another version
            message = f"{op}: this Xen does not take interface version {head[1]:#x} (EACCES)"
            raise HostError(message, op=op, domid=domid, errno=number)
        return number, *left


class ForeignMemory:
    """Mappings of other domains' frames, by libxenforeignmemory."""

    def __init__(self) -> None:
        found = library(LIBXENFOREIGNMEMORY)
        pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        self._close = function(found, "xenforeignmemory_close", integer, pointer)
        self._unmap = function(found, "xenforeignmemory_unmap", integer, pointer, pointer, size)
        arguments = (pointer, ctypes.c_uint32, pointer, integer, integer, size, pointer, pointer)
        self._map = function(found, "xenforeignmemory_map2", pointer, *arguments)
        which = (pointer, ctypes.c_uint32, ctypes.c_uint, ctypes.c_uint, ctypes.c_ulong, ctypes.c_ulong)
        where = (ctypes.POINTER(pointer), integer, integer)
        self._map_resource = function(found, "xenforeignmemory_map_resource", pointer, *which, *where)
        self._unmap_resource = function(found, "xenforeignmemory_unmap_resource", integer, pointer, pointer)
        self._mmap = function(ctypes.CDLL(None, use_errno=True), "mmap", pointer, pointer, size, *[integer] * 3, size)
        opened = function(found, "xenforeignmemory_open", pointer, pointer, ctypes.c_uint)(None, 0)
        if not opened:
            raise failed("xenforeignmemory_open", ctypes.get_errno())
        self._handle = opened
        self._mapped = 0
        self._closing = False
        self._lock = threading.RLock()  # a view may end in any thread, and while its own has the lock

    def map(
        self, domid: DomId, mfns: frames.U64, at: int | None = None, protection: int = mmap.PROT_READ
    ) -> tuple[int, I64]:
        """Map frames at that address (over what is there) or where there is room.

        The address, and for each frame 0 or its negative errno: those with one must not be touched.
        """
        if self._closing:
            raise HostError("this host has been closed", op="close")
        wanted = np.ascontiguousarray(mfns, dtype=np.uint64)
        errors = np.zeros(len(wanted), np.int32)
        flags = 0 if at is None else MAP_FIXED
        addresses = (wanted.ctypes.data, errors.ctypes.data)
        address = self._map(self._handle, domid, at, protection, flags, len(wanted), *addresses)
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
        with self._lock:
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

    @contextlib.contextmanager
    def writable(self, domid: DomId, mfns: frames.U64) -> Iterator[tuple[frames.U8, I64]]:
        """Frames as an array to write to, (n, 4096), and for each 0 or its negative errno.

        They are mapped until the block ends. Who holds the array longer has memory of their own, not the domain's.
        """
        if not len(mfns):
            yield np.zeros((0, PAGE_SIZE), np.uint8), np.zeros(0, np.int64)
            return
        size = len(mfns) * PAGE_SIZE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        pages: frames.U8 = np.frombuffer(mmap.mmap(-1, size, flags), np.uint8).reshape(-1, PAGE_SIZE)
        address, both = pages.ctypes.data, mmap.PROT_READ | mmap.PROT_WRITE
        try:
            yield pages, self.map(domid or DOMID_SELF, mfns, address, both)[1]
        finally:
            if self._mmap(address, size, both, flags | MAP_FIXED, -1, 0) != address:
                raise failed("unmap frames", ctypes.get_errno(), domid)

    @contextlib.contextmanager
    def resource(self, domid: DomId, kind: int, number: int) -> Iterator[frames.U8]:
        """The first frame of what Xen keeps for a domain, to write to; gone when the block ends."""
        address = ctypes.c_void_p()
        both = mmap.PROT_READ | mmap.PROT_WRITE
        mapped = self._map_resource(self._handle, domid, kind, number, 0, 1, ctypes.byref(address), both, 0)
        if not mapped or not address.value:
            raise failed("map the grant table", ctypes.get_errno(), domid)
        try:
            yield _bytes_of((ctypes.c_uint8 * PAGE_SIZE).from_address(address.value))
        finally:
            self._unmap_resource(self._handle, mapped)

    def _forget(self, address: int, pages: int) -> None:
        self._unmap(self._handle, address, pages)
        with self._lock:
            self._mapped -= 1
            self._close_when_unused()

    def close(self) -> None:
        """Maps nothing more; the handle goes with the last view."""
        with self._lock:
            if not self._closing:
                self._closing = True
                self._close_when_unused()

    def _close_when_unused(self) -> None:
        if self._closing and not self._mapped:
            self._close(self._handle)
