"""The mapping of the m2p."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

from tests.support.hypercalls_stub import HypercallsStub
from xenpv.frames import I64, U64, DomId
from xenpv.host.xen import domctl, shared_libraries
from xenpv.host.xen.m2p import M2P

ALL_ONES = (1 << 64) - 1


class ForeignMemoryStub:
    """Maps chunks of an m2p in which the pfn of each frame is twice its mfn; counts the calls."""

    def __init__(self, chunk_of: dict[int, int]) -> None:
        self.chunk_of, self.map_calls = chunk_of, 0

    def map(self, domid: DomId, mfns: U64, at: int | None = None) -> tuple[int, I64]:
        assert domid == domctl.DOMID_XEN
        assert at is not None
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | shared_libraries.MAP_FIXED
        assert libc.mmap(at, 4096 * len(mfns), mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == at
        first = self.chunk_of[int(mfns[0])] << 18
        content = 2 * np.arange(first, first + (1 << 18), dtype=np.uint64)
        ctypes.memmove(at, content.ctypes.data, content.nbytes)
        self.map_calls += 1
        return at, np.zeros(len(mfns), np.int64)


def test_m2p_lookup_maps_only_the_chunks_it_needs_and_once() -> None:
    """A host of 700 GiB. Chunks 2 and 5 are holes: for one Xen repeats the previous chunk, for the other it gives 0."""
    extents = [0x1000 + 512 * n for n in range(700)]
    extents[2], extents[5] = extents[1], 0
    memory = ForeignMemoryStub({extent: n for n, extent in enumerate(extents) if n not in {2, 5}})
    frames = (700 << 18) - 100
    m2p = M2P(HypercallsStub(extents=tuple(extents)), memory, frames)  # type: ignore[arg-type]
    assert memory.map_calls == 0
    mfns = np.array([1, 699 << 18, 3, frames - 1, frames, ALL_ONES, 2 << 18, 5 << 18, (2 << 18) - 1], np.uint64)
    expected = [2, 699 << 19, 6, 2 * (frames - 1), *[ALL_ONES] * 4, (4 << 18) - 2]
    assert m2p.lookup(mfns).tolist() == expected
    assert memory.map_calls == 3
    assert m2p.lookup(mfns).tolist() == expected
    assert memory.map_calls == 3
