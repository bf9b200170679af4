"""A stand-in for libxenstore: nodes in a dictionary, with transactions that can fail."""

from __future__ import annotations

import ctypes
import errno
from typing import Any

from xenpv.host.xen import xenstore


class LibxenstoreStub:
    """libxenstore's functions on a dictionary.

    Args:
        conflicts: How many of the first commits conflict with somebody else's.
        refused_path: Writing this node fails with ENOSPC.
    """

    def __init__(self, conflicts: int = 0, refused_path: str = "") -> None:
        self.nodes: dict[bytes, bytes] = {b"/local/domain/0": b"", b"/local/domain/0/backend": b""}
        self.permissions: dict[bytes, list[tuple[int, int]]] = {}
        self.conflicts, self.refused_path = conflicts, refused_path.encode()
        self.staged: dict[bytes, bytes] = {}
        self.begun = self.ended = 0
        self._buffers: list[Any] = []

    def begin(self, _handle: int) -> int:
        self.begun += 1
        self.staged = dict(self.nodes)
        return self.begun

    def end(self, _handle: int, _transaction: int, abort: bool) -> bool:
        self.ended += 1
        if abort:
            return True
        if self.conflicts:
            self.conflicts -= 1
            ctypes.set_errno(errno.EAGAIN)
            return False
        self.nodes = self.staged
        return True

    def read(self, _handle: int, _transaction: int, path: bytes, length: Any) -> int:
        if path not in self.staged:
            return 0
        self._buffers.append(ctypes.create_string_buffer(self.staged[path]))
        length._obj.value = len(self.staged[path])
        return ctypes.addressof(self._buffers[-1])

    def write(self, _handle: int, _transaction: int, path: bytes, value: bytes, _length: int) -> bool:
        if path == self.refused_path:
            ctypes.set_errno(errno.ENOSPC)
            return False
        self.staged[path] = value
        return True

    def permit(self, _handle: int, _transaction: int, path: bytes, array: Any, count: int) -> bool:
        self.permissions[path] = [(array[i].id, array[i].perms) for i in range(count)]
        return True

    def remove(self, _handle: int, _transaction: int, path: bytes) -> bool:
        self.staged = {p: v for p, v in self.staged.items() if p != path and not p.startswith(path + b"/")}
        return True

    def children(self, _handle: int, _transaction: int, path: bytes, count: Any) -> int:
        prefix = path + b"/"
        names = sorted({p.removeprefix(prefix).split(b"/")[0] for p in self.staged if p.startswith(prefix)})
        count._obj.value = len(names)
        if not names:
            return 0
        self._buffers.append((ctypes.c_char_p * len(names))(*names))
        return ctypes.addressof(self._buffers[-1])


def connect(stub: LibxenstoreStub) -> xenstore.XenStore:
    """Return a connection to the stub."""
    store = xenstore.XenStore.__new__(xenstore.XenStore)
    functions = {"begin": stub.begin, "end": stub.end, "read": stub.read, "write": stub.write, "permit": stub.permit}
    functions |= {"remove": stub.remove, "list": stub.children, "free": lambda _: None}
    for name, function in functions.items():
        setattr(store, f"_{name}", function)
    store._handle = 1
    return store
