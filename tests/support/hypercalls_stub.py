"""A stand-in for libxencall: the few hypercalls with which XenHost opens and maps the m2p."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

import numpy as np

from xenpv.host.xen import domctl, shared_libraries


class HypercallsStub:
    """Hypercalls that return a version of Xen and the extents of an m2p."""

    def __init__(self, version: tuple[int, int] = (4, 17), extents: tuple[int, ...] = ()) -> None:
        self.version, self.extents = version, extents
        self.interface: domctl.Interface | None = None
        self.closed = False

    def close(self) -> None:
        self.closed = True

    @contextlib.contextmanager
    def buffer(self, size: int) -> Iterator[shared_libraries.Buffer]:
        memory = (ctypes.c_uint8 * size)()
        yield shared_libraries.Buffer(ctypes.addressof(memory), size)

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
