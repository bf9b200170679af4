"""Hypercalls and foreign mappings: libxencall and libxenforeignmemory.

Importing this module loads nothing native. XenHost opens the libraries, whose interface is stable; xenstore.py binds
libxenstore in the same way.

Source: xen.git:tools/libs/{call,foreignmemory}
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
from xenpv.host.errors import host_error
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


def check_privcmd() -> None:
    """Raise HostError unless this is dom0 of a Xen host and we may make hypercalls."""
    for path in PRIVCMD:
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except PermissionError as error:
            raise HostError(f"{path}: {error.strerror}; needs root in dom0", op="open", errno=error.errno) from error
        except OSError:
            continue  # absent, or a node without a device
        return
    raise HostError(f"not on a Xen host: neither {' nor '.join(PRIVCMD)} can be opened", op="open", errno=errno.ENODEV)


def open_library(names: tuple[str, ...]) -> ctypes.CDLL:
    """Open the first of these libraries that exists. HostError if none does."""
    errors: list[str] = []
    for name in names:
        try:
            return ctypes.CDLL(name, use_errno=True)
        except OSError as error:
            errors.append(str(error))
    raise HostError(f"{' or '.join(names)} is missing; is this Xen's dom0? ({'; '.join(errors)})", op="dlopen")


def bind(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    """Return a function of a library, with its result and argument types set."""
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function


def _as_array(memory: ctypes.Array[ctypes.c_uint8]) -> frames.U8:
    """Return ctypes memory as an array, which keeps the ctypes object alive."""
    return np.frombuffer(memory, np.uint8)  # type: ignore[call-overload, no-any-return]


class Buffer:
    """Memory for a hypercall: ``address`` for Xen, ``array`` (uint8) for us."""

    __slots__ = ("address", "array")

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.array: frames.U8 = _as_array((ctypes.c_uint8 * size).from_address(address))


class Hypercalls:
    """Hypercalls through libxencall.

    ``interface`` must be set before the first domctl or sysctl.
    """

    def __init__(self) -> None:
        library = open_library(LIBXENCALL)
        pointer, number = ctypes.c_void_p, ctypes.c_uint64
        self._close = bind(library, "xencall_close", ctypes.c_int, pointer)
        self._call1 = bind(library, "xencall1", ctypes.c_int, pointer, ctypes.c_uint, number)
        # Before 4.15 results are ints. The number of frames of a host of 8 TiB or more is negative then.
        wide = hasattr(library, "xencall2L")
        result = ctypes.c_long if wide else ctypes.c_int
        name = "xencall2L" if wide else "xencall2"
        self._call2 = bind(library, name, result, pointer, ctypes.c_uint, number, number)
        self._call4 = bind(library, "xencall4", ctypes.c_int, pointer, ctypes.c_uint, *[number] * 4)
        self._alloc = bind(library, "xencall_alloc_buffer", pointer, pointer, ctypes.c_size_t)
        self._free = bind(library, "xencall_free_buffer", None, pointer, pointer)
        handle = bind(library, "xencall_open", pointer, pointer, ctypes.c_uint)(None, 0)
        if not handle:
            raise host_error("xencall_open", ctypes.get_errno())
        self._handle: int | None = handle
        self.interface: Interface | None = None

    def close(self) -> None:
        """Close the library's handle; no call may follow."""
        if self._handle is not None:
            self._close(self._handle)
            self._handle = None

    @contextlib.contextmanager
    def buffer(self, size: int, *, zeroed: bool = True) -> Iterator[Buffer]:
        """Allocate memory for arguments of hypercalls; free it when the block ends."""
        self._check_open()
        address = self._alloc(self._handle, max(size, 1))
        if not address:
            raise host_error("xencall_alloc_buffer", ctypes.get_errno())
        try:
            if zeroed:
                ctypes.memset(address, 0, size)
            yield Buffer(address, size)
        finally:
            self._free(self._handle, address)

    def _check_open(self) -> None:
        if self._handle is None:
            raise HostError("this host has been closed", op="close")

    def call(self, hypercall: int, command: int, address: int, op: str, domid: DomId | None = None) -> int:
        """Make the hypercall ``hypercall(command, address)``.

        Its result, which is never negative.
        """
        self._check_open()
        result = int(self._call2(self._handle, hypercall, command, address))
        if result == -1:
            raise host_error(op, ctypes.get_errno(), domid)
        return result & 0xFFFF_FFFF if result < 0 else result

    def sysctl(self, command: int, op: str, struct: Struct, **arguments: int) -> np.void:
        """Make a sysctl. Its arguments as Xen leaves them."""
        assert self.interface
        return self._checked_control(SYSCTL, (command, self.interface.sysctl), op, struct, arguments)[1]

    def domctl(self, command: int, op: str, domid: DomId, struct: Struct, /, **arguments: int) -> np.void:
        """Make a domctl. Its arguments as Xen leaves them."""
        assert self.interface
        return self._checked_control(DOMCTL, (command, self.interface.domctl, domid), op, struct, arguments)[1]

    def try_domctl(
        self, command: int, op: str, domid: DomId, struct: Struct, /, **arguments: Any
    ) -> tuple[int, np.void]:
        """Make a domctl whose arguments explain a failure.

        Return the errno or 0, and the arguments as Xen leaves them.
        """
        assert self.interface
        head = (command, self.interface.domctl, domid)
        number, _, result = self._control(DOMCTL, head, op, struct, arguments)
        return number, result

    def create_domain(self, command: int, op: str, struct: Struct, **arguments: Any) -> DomId:
        """Make the domctl that takes no domain and returns a new one."""
        assert self.interface
        head = (command, self.interface.domctl, 0)
        try:
            return DomId(self._checked_control(DOMCTL, head, op, struct, arguments)[0])
        except HostError as error:
            raise host_error(op, error.errno or 0) from None

    def event_channel_op(self, command: int, op: str, domid: DomId, struct: Struct, **arguments: int) -> np.void:
        """Make an event channel operation. Its arguments as Xen leaves them."""
        with self.buffer(struct.size(8)) as buffer:
            members = buffer.array.view(struct[8])
            for name, value in arguments.items():
                members[name] = value
            self.call(EVENT_CHANNEL_OP, command, buffer.address, op, domid)
            return members[0].copy()  # type: ignore[no-any-return]

    def mmuext_op(self, domid: DomId, commands: frames.U8, mfns: frames.U64) -> tuple[int, int]:
        """Make MMU operations on a domain's frames.

        Return how many succeeded, and the errno of the one that failed, or 0.
        """
        self._check_open()
        size = MMUEXT.size(8)
        with self.buffer(size * len(mfns)) as buffer, self.buffer(8) as done_count:
            ops = buffer.array[: size * len(mfns)].view(MMUEXT[8])
            ops["cmd"], ops["arg1"] = commands, mfns
            if self._call4(self._handle, MMUEXT_OP, buffer.address, len(mfns), done_count.address, domid) >= 0:
                return len(mfns), 0
            number = ctypes.get_errno()
            return int(done_count.array.view("<u4")[0]), number

    def _checked_control(
        self, hypercall: int, head: tuple[int, ...], op: str, struct: Struct, arguments: dict[str, Any]
    ) -> tuple[int, np.void]:
        """Make a domctl or sysctl. The domain and the arguments as Xen leaves them."""
        number, domid, result = self._control(hypercall, head, op, struct, arguments)
        if number:
            raise host_error(op, number, None if hypercall == SYSCTL else head[2])
        return domid, result

    def _control(
        self, hypercall: int, head: tuple[int, ...], op: str, struct: Struct, arguments: dict[str, Any]
    ) -> tuple[int, int, np.void]:
        """Make a domctl or sysctl.

        Return the errno or 0, and the domain and the arguments as Xen leaves them.

        Args:
            hypercall: DOMCTL or SYSCTL.
            head: The command, the interface version and, for a domctl, the domain.
            op: The operation's name, for errors.
            struct: The command's member of the union in struct xen_domctl or xen_sysctl.
            arguments: Values of its members; all others are 0.
        """
        offset, domid = (SYSCTL_U, None) if hypercall == SYSCTL else (DOMCTL_U, head[2])
        with self.buffer(max(SYSCTL_SIZE, DOMCTL_SIZE)) as buffer:
            words = buffer.array.view("<u4")
            words[: len(head)] = head
            members = buffer.array[offset : offset + struct.size(8)].view(struct[8])
            for name, value in arguments.items():
                members[name] = value
            succeeded = self._call1(self._handle, hypercall, buffer.address) >= 0
            number = 0 if succeeded else ctypes.get_errno()  # read it now: freeing the buffer may change it
            result = int(words[2]) & 0xFFFF, members[0].copy()
        if number == errno.EACCES:  # Xen's answer to an interface version that is not its own
            message = f"{op}: this Xen does not accept interface version {head[1]:#x} (EACCES)"
            raise HostError(message, op=op, domid=domid, errno=number)
        return number, *result


class ForeignMemory:
    """Mappings of other domains' frames, through libxenforeignmemory."""

    def __init__(self) -> None:
        library = open_library(LIBXENFOREIGNMEMORY)
        pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        self._close = bind(library, "xenforeignmemory_close", integer, pointer)
        self._unmap = bind(library, "xenforeignmemory_unmap", integer, pointer, pointer, size)
        arguments = (pointer, ctypes.c_uint32, pointer, integer, integer, size, pointer, pointer)
        self._map = bind(library, "xenforeignmemory_map2", pointer, *arguments)
        resource = (pointer, ctypes.c_uint32, ctypes.c_uint, ctypes.c_uint, ctypes.c_ulong, ctypes.c_ulong)
        mapping = (ctypes.POINTER(pointer), integer, integer)
        self._map_resource = bind(library, "xenforeignmemory_map_resource", pointer, *resource, *mapping)
        self._unmap_resource = bind(library, "xenforeignmemory_unmap_resource", integer, pointer, pointer)
        self._mmap = bind(ctypes.CDLL(None, use_errno=True), "mmap", pointer, pointer, size, *[integer] * 3, size)
        handle = bind(library, "xenforeignmemory_open", pointer, pointer, ctypes.c_uint)(None, 0)
        if not handle:
            raise host_error("xenforeignmemory_open", ctypes.get_errno())
        self._handle = handle
        self._mapping_count = 0
        self._closing = False
        self._lock = threading.RLock()  # a mapping may end in any thread, also in one that holds the lock

    def map(
        self, domid: DomId, mfns: frames.U64, at: int | None = None, protection: int = mmap.PROT_READ
    ) -> tuple[int, I64]:
        """Map frames.

        Args:
            domid: The domain that owns the frames.
            mfns: The frames.
            at: Replace what is mapped at this address. None: let the kernel choose.
            protection: PROT_* of the mmap module.

        Returns:
            The address, and 0 or a negative errno for each frame, int64. Pages with an errno must not be touched.
        """
        if self._closing:
            raise HostError("this host has been closed", op="close")
        mfns = np.ascontiguousarray(mfns, dtype=np.uint64)
        errors = np.zeros(len(mfns), np.int32)
        flags = 0 if at is None else MAP_FIXED
        arrays = (mfns.ctypes.data, errors.ctypes.data)
        address = self._map(self._handle, domid, at, protection, flags, len(mfns), *arrays)
        if not address:
            raise host_error("map frames", ctypes.get_errno(), domid)
        return int(address), errors.astype(np.int64)

    def map_read_only(self, domid: DomId, mfns: frames.U64) -> tuple[frames.U8, Mask]:
        """Map frames read-only.

        Returns:
            Their content, uint8 (n, 4096), mapped as long as anything refers to the array; and which could be mapped.
            If some could not, it is a copy with zeroes for those: touching them in the mapping would raise SIGBUS.
        """
        if not len(mfns):
            return np.zeros((0, PAGE_SIZE), np.uint8), np.zeros(0, np.bool_)
        # dom0, where we run, is not foreign to itself: it maps its own frames as DOMID_SELF.
        address, errors = self.map(domid or DOMID_SELF, mfns)
        memory = (ctypes.c_uint8 * (len(mfns) * PAGE_SIZE)).from_address(address)
        with self._lock:
            self._mapping_count += 1
        weakref.finalize(memory, self._unmap_array, address, len(mfns))
        pages = _as_array(memory).reshape(-1, PAGE_SIZE)
        pages.flags.writeable = False
        mapped = errors == 0
        if mapped.all():
            return pages, mapped
        if (errors == -errno.ESRCH).all():
            raise host_error("map frames", errno.ESRCH, domid)
        copy = np.zeros(pages.shape, np.uint8)
        copy[mapped] = pages[mapped]
        return copy, mapped

    @contextlib.contextmanager
    def map_writable(self, domid: DomId, mfns: frames.U64) -> Iterator[tuple[frames.U8, I64]]:
        """Map frames writable until the block ends.

        After that the array shows private memory, no longer the domain's.

        Returns:
            The frames, uint8 (n, 4096), and 0 or a negative errno for each.
        """
        if not len(mfns):
            yield np.zeros((0, PAGE_SIZE), np.uint8), np.zeros(0, np.int64)
            return
        size = len(mfns) * PAGE_SIZE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        pages: frames.U8 = np.frombuffer(mmap.mmap(-1, size, flags), np.uint8).reshape(-1, PAGE_SIZE)
        address, read_write = pages.ctypes.data, mmap.PROT_READ | mmap.PROT_WRITE
        try:
            yield pages, self.map(domid or DOMID_SELF, mfns, address, read_write)[1]
        finally:
            if self._mmap(address, size, read_write, flags | MAP_FIXED, -1, 0) != address:
                raise host_error("unmap frames", ctypes.get_errno(), domid)

    @contextlib.contextmanager
    def map_resource(self, domid: DomId, kind: int, number: int) -> Iterator[frames.U8]:
        """Map the first frame of a domain's resource, writable within the block."""
        address = ctypes.c_void_p()
        read_write = mmap.PROT_READ | mmap.PROT_WRITE
        mapping = self._map_resource(self._handle, domid, kind, number, 0, 1, ctypes.byref(address), read_write, 0)
        if not mapping or not address.value:
            raise host_error("map the grant table", ctypes.get_errno(), domid)
        try:
            yield _as_array((ctypes.c_uint8 * PAGE_SIZE).from_address(address.value))
        finally:
            self._unmap_resource(self._handle, mapping)

    def _unmap_array(self, address: int, pages: int) -> None:
        self._unmap(self._handle, address, pages)
        with self._lock:
            self._mapping_count -= 1
            self._close_when_unused()

    def close(self) -> None:
        """Refuse new mappings. The library's handle is closed when the last mapping ends."""
        with self._lock:
            if not self._closing:
                self._closing = True
                self._close_when_unused()

    def _close_when_unused(self) -> None:
        if self._closing and not self._mapping_count:
            self._close(self._handle)
