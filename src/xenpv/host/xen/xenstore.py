"""Xenstore through ctypes: a binding of libxenstore.

Source: xen.git:tools/libs/store
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Iterable

from xenpv.errors import HostError
from xenpv.frames import DomId
from xenpv.host.errors import host_error
from xenpv.host.xen.shared_libraries import bind, open_library
from xenpv.host.xenstore_nodes import Access, Node

LIBXENSTORE = ("libxenstore.so.4", "libxenstore.so.3.0")
XS_OPEN_SOCKETONLY = 1 << 1
NO_TRANSACTION = 0
XS_PERM_NONE, XS_PERM_READ = 0, 1
_ATTEMPTS = 100  # of a transaction: others conflict with it now and then, but not that often in a row


class _Permission(ctypes.Structure):
    _fields_ = [("id", ctypes.c_uint), ("perms", ctypes.c_uint)]


class XenStore:
    """A connection to xenstore.

    Domains can be listed without one: ``read`` returns None for a node that does not exist, and for every node if
    xenstore cannot be reached. All calls that change xenstore raise HostError then; ``check_reachable`` does, too.
    """

    _library_error: HostError | None = None  # why libxenstore cannot be used

    def __init__(self, *, socket: bool = True) -> None:
        """Connect.

        Args:
            socket: Use the daemon's socket only. Otherwise use the kernel's device, which waits for a xenstore domain
                even if there is none.
        """
        self._handle: int | None = None
        try:
            library = open_library(LIBXENSTORE)
        except HostError as e:
            self._library_error = e
            return
        pointer, text, number, yes = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_bool
        count = ctypes.POINTER(number)
        node = (pointer, ctypes.c_uint32, text)  # handle, transaction, path
        self._close = bind(library, "xs_close", None, pointer)
        self._read = bind(library, "xs_read", pointer, *node, count)
        self._write = bind(library, "xs_write", yes, *node, text, number)
        self._remove = bind(library, "xs_rm", yes, *node)
        self._list = bind(library, "xs_directory", pointer, *node, count)
        self._permit = bind(library, "xs_set_permissions", yes, *node, ctypes.POINTER(_Permission), number)
        self._begin = bind(library, "xs_transaction_start", ctypes.c_uint32, pointer)
        self._end = bind(library, "xs_transaction_end", yes, pointer, ctypes.c_uint32, yes)
        self._introduce = bind(library, "xs_introduce_domain", yes, pointer, number, ctypes.c_ulong, number)
        self._free = bind(ctypes.CDLL(None), "free", None, pointer)
        xs_open = bind(library, "xs_open", pointer, ctypes.c_ulong)
        self._handle = xs_open(XS_OPEN_SOCKETONLY if socket else 0)

    @property
    def reachable(self) -> bool:
        """Whether xenstored can be reached."""
        return bool(self._handle)

    def read(self, path: str, transaction: int = NO_TRANSACTION) -> str | None:
        """Return a node's value; None if there is no such node, or no xenstore."""
        if not self._handle:
            return None
        length = ctypes.c_uint()
        value = self._read(self._handle, transaction, path.encode(), ctypes.byref(length))
        if not value:
            return None
        try:
            return ctypes.string_at(value, length.value).decode("utf-8", "replace")
        finally:
            self._free(value)

    def list(self, path: str) -> list[str]:
        """Return the names of a node's children.

        There are none if there is no such node, or no xenstore.
        """
        if not self._handle:
            return []
        count = ctypes.c_uint()
        names = self._list(self._handle, NO_TRANSACTION, path.encode(), ctypes.byref(count))
        if not names:
            return []
        try:
            texts = ctypes.cast(names, ctypes.POINTER(ctypes.c_char_p))
            return [(texts[i] or b"").decode("utf-8", "replace") for i in range(count.value)]
        finally:
            self._free(names)

    def write(self, domid: DomId, nodes: Iterable[Node]) -> None:
        """Write all of these nodes, or none.

        They belong to dom0, or to the domain if it may write them.
        """
        node_list = list(nodes)

        def write_all(transaction: int) -> bool:
            return all(self._write_node(transaction, domid, node) for node in node_list)

        self._run_transaction("write to xenstore", domid, write_all)

    def _write_node(self, transaction: int, domid: DomId, node: Node) -> bool:
        path, value = node.path.encode(), node.value.encode()
        # The first permission names the owner, which may do everything, and what all others may do.
        owner = domid if node.access is Access.WRITE else 0
        permissions = [_Permission(owner, XS_PERM_NONE)]
        permissions += [_Permission(domid, XS_PERM_READ)] if node.access is Access.READ else []
        array = (_Permission * len(permissions))(*permissions)
        written = self._write(self._handle, transaction, path, value, len(value))
        return bool(written and self._permit(self._handle, transaction, path, array, len(permissions)))

    def write_if(self, domid: DomId, node: Node, condition: Callable[[Callable[[str], str | None]], bool]) -> bool:
        """Write a node if a condition holds, in one transaction.

        Args:
            domid: The domain that the node is about.
            node: What to write.
            condition: Called with a function that reads nodes within the transaction.

        Returns:
            Whether the node was written.
        """
        written = False

        def write(transaction: int) -> bool:
            nonlocal written
            written = condition(lambda path: self.read(path, transaction))
            return not written or self._write_node(transaction, domid, node)

        self._run_transaction("write to xenstore", domid, write)
        return written

    def remove(self, domid: DomId, paths: Iterable[str]) -> bool:
        """Remove nodes, all below them, and parents that are left empty.

        Return whether any of the nodes existed.
        """
        path_list = list(paths)
        any_existed = False

        def remove_all(transaction: int) -> bool:
            nonlocal any_existed
            for path in path_list:
                if self.read(path, transaction) is None:
                    continue
                any_existed = True
                if not self._remove(self._handle, transaction, path.encode()):
                    return False
                parent = path.rpartition("/")[0]
                while parent.count("/") > 3 and not self._child_count(transaction, parent):  # keep /local/domain/0
                    self._remove(self._handle, transaction, parent.encode())
                    parent = parent.rpartition("/")[0]
            return True

        self._run_transaction("remove from xenstore", domid, remove_all)
        return any_existed

    def _child_count(self, transaction: int, path: str) -> int:
        count = ctypes.c_uint()
        names = self._list(self._handle, transaction, path.encode(), ctypes.byref(count))
        if names:
            self._free(names)
        return count.value

    def _run_transaction(self, op: str, domid: DomId, change: Callable[[int], bool]) -> None:
        """Run a transaction, again and again while others change the same nodes.

        ``change`` returns success.
        """
        self.check_reachable(op, domid)
        for _ in range(_ATTEMPTS):
            transaction = self._begin(self._handle)
            if not transaction:
                break
            succeeded = False
            try:
                succeeded = change(transaction)
            finally:
                number = ctypes.get_errno()
                committed = self._end(self._handle, transaction, not succeeded)
            if not succeeded:
                ctypes.set_errno(number)
                break
            if committed:
                return
            if ctypes.get_errno() != errno.EAGAIN:
                break
        raise host_error(op, ctypes.get_errno(), domid)

    def introduce(self, domid: DomId, mfn: int, port: int) -> None:
        """Make xenstored serve a domain's ring, which it maps by the domain's grant."""
        self.check_reachable("introduce", domid)
        if not self._introduce(self._handle, domid, mfn, port):
            raise host_error("introduce", ctypes.get_errno(), domid)

    @property
    def error(self) -> str | None:
        """Why xenstore cannot be reached; None if it can."""
        if self._handle:
            return None
        if self._library_error is not None:
            return f"xenstore cannot be reached: {self._library_error}"
        return "xenstore cannot be reached; is xenstored running?"

    def check_reachable(self, op: str, domid: DomId) -> None:
        """Raise HostError if there is no xenstore."""
        if (error := self.error) is not None:
            raise HostError(f"dom{domid}: {op}: {error}", op=op, domid=domid, errno=errno.ENOTCONN)

    def close(self) -> None:
        """Close the connection; no call may follow."""
        if self._handle:
            self._close(self._handle)
            self._handle = None
