"""Xenstore, through libxenstore (xen.git:tools/libs/store)."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Iterable

from xenpv.errors import HostError
from xenpv.frames import DomId
from xenpv.host.xen.libxen import failed, function, library
from xenpv.host.xenstore_nodes import Access, Node

LIBXENSTORE = ("libxenstore.so.4", "libxenstore.so.3.0")
XS_OPEN_SOCKETONLY = 1 << 1
NO_TRANSACTION = 0
XS_PERM_NONE, XS_PERM_READ = 0, 1
_TRIES = 100  # others change xenstore too; that many in a row do not


class _Permission(ctypes.Structure):
    _fields_ = [("id", ctypes.c_uint), ("perms", ctypes.c_uint)]


class Store:
    """Xenstore. ``read`` gives None for whatever is not there; what changes it raises HostError."""

    def __init__(self, *, socket: bool = True) -> None:
        """Through the daemon's socket; else through the kernel, which waits for a xenstore that need not come."""
        self._handle: int | None = None
        try:
            found = library(LIBXENSTORE)
        except HostError:
            return  # names are a courtesy; who changes something is told that it is not reachable
        pointer, text, number, yes = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_bool
        count = ctypes.POINTER(number)
        at = (pointer, ctypes.c_uint32, text)  # handle, transaction, path
        self._close = function(found, "xs_close", None, pointer)
        self._read = function(found, "xs_read", pointer, *at, count)
        self._write = function(found, "xs_write", yes, *at, text, number)
        self._remove = function(found, "xs_rm", yes, *at)
        self._list = function(found, "xs_directory", pointer, *at, count)
        self._permit = function(found, "xs_set_permissions", yes, *at, ctypes.POINTER(_Permission), number)
        self._begin = function(found, "xs_transaction_start", ctypes.c_uint32, pointer)
        self._end = function(found, "xs_transaction_end", yes, pointer, ctypes.c_uint32, yes)
        self._introduce = function(found, "xs_introduce_domain", yes, pointer, number, ctypes.c_ulong, number)
        self._free = function(ctypes.CDLL(None), "free", None, pointer)
        opened = function(found, "xs_open", pointer, ctypes.c_ulong)
        self._handle = opened(XS_OPEN_SOCKETONLY if socket else 0)

    @property
    def reachable(self) -> bool:
        return bool(self._handle)

    def read(self, path: str, within: int = NO_TRANSACTION) -> str | None:
        if not self._handle:
            return None
        length = ctypes.c_uint()
        value = self._read(self._handle, within, path.encode(), ctypes.byref(length))
        if not value:
            return None
        try:
            return ctypes.string_at(value, length.value).decode("utf-8", "replace")
        finally:
            self._free(value)

    def write(self, domid: DomId, nodes: Iterable[Node]) -> None:
        """All of these nodes, or none; dom0's, or the domain's where it may write."""
        listed = list(nodes)

        def change(within: int) -> bool:
            return all(self._write_one(within, domid, node) for node in listed)

        self._change("write to xenstore", domid, change)

    def _write_one(self, within: int, domid: DomId, node: Node) -> bool:
        path, value = node.path.encode(), node.value.encode()
        # The first permission names the owner, who may do everything, and what all others may.
        owner = domid if node.access is Access.WRITE else 0
        permissions = [_Permission(owner, XS_PERM_NONE)]
        permissions += [_Permission(domid, XS_PERM_READ)] if node.access is Access.READ else []
        array = (_Permission * len(permissions))(*permissions)
        written = self._write(self._handle, within, path, value, len(value))
        return bool(written and self._permit(self._handle, within, path, array, len(permissions)))

    def write_if(self, domid: DomId, node: Node, wanted: Callable[[Callable[[str], str | None]], bool]) -> bool:
        """Write a node where ``wanted`` says so by what it reads, all in one transaction. Whether it was written."""
        written = False

        def change(within: int) -> bool:
            nonlocal written
            written = wanted(lambda path: self.read(path, within))
            return not written or self._write_one(within, domid, node)

        self._change("write to xenstore", domid, change)
        return written

    def remove(self, domid: DomId, paths: Iterable[str]) -> bool:
        """All of these nodes with what is below them, and parents that held nothing else. Whether any was there."""
        listed = list(paths)
        found = False

        def change(within: int) -> bool:
            nonlocal found
            for path in listed:
                gone = self.read(path, within) is not None
                found |= gone
                if gone and not self._remove(self._handle, within, path.encode()):
                    return False
                parent = path.rpartition("/")[0]
                while gone and parent.count("/") > 3 and not self._children(within, parent):  # /local/domain/0 stays
                    self._remove(self._handle, within, parent.encode())
                    parent = parent.rpartition("/")[0]
            return True

        self._change("remove from xenstore", domid, change)
        return found

    def _children(self, within: int, path: str) -> int:
        count = ctypes.c_uint()
        names = self._list(self._handle, within, path.encode(), ctypes.byref(count))
        if names:
            self._free(names)
        return count.value

    def _change(self, op: str, domid: DomId, change: Callable[[int], bool]) -> None:
        """One transaction, again and again until nobody else changed the same nodes meanwhile."""
        self.needed(op, domid)
        for _ in range(_TRIES):
            within = self._begin(self._handle)
            if not within:
                break
            done = False
            try:
                done = change(within)
            finally:
                why = ctypes.get_errno()
                ended = self._end(self._handle, within, not done)
            if not done:
                ctypes.set_errno(why)
                break
            if ended:
                return
            if ctypes.get_errno() != errno.EAGAIN:
                break
        raise failed(op, ctypes.get_errno(), domid)

    def introduce(self, domid: DomId, mfn: int, port: int) -> None:
        """Have xenstored serve a domain's ring, which it maps by the domain's grant."""
        self.needed("introduce", domid)
        if not self._introduce(self._handle, domid, mfn, port):
            raise failed("introduce", ctypes.get_errno(), domid)

    def needed(self, op: str, domid: DomId) -> None:
        """HostError where there is no xenstore."""
        if not self._handle:
            why = f"dom{domid}: {op}: xenstore cannot be reached; is xenstored running?"
            raise HostError(why, op=op, domid=domid, errno=errno.ENOTCONN)

    def close(self) -> None:
        if self._handle:
            self._close(self._handle)
            self._handle = None
