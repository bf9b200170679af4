"""The bindings of libxencall and libxenforeignmemory."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from xenpv.frames import PAGE_SIZE, DomId
from xenpv.host.xen import shared_libraries


@pytest.fixture
def memory() -> Iterator[tuple[shared_libraries.ForeignMemory, int]]:
    """Foreign memory whose frame n is page n of a file, and that file."""
    file = os.memfd_create("frames")
    os.truncate(file, 8 * PAGE_SIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_size_t)
    foreign = shared_libraries.ForeignMemory.__new__(shared_libraries.ForeignMemory)
    attributes: Any = foreign
    attributes._mmap, attributes._closing, attributes._handle = libc.mmap, False, 1

    def map2(*arguments: int) -> int:
        _handle, _domid, at, prot, flags, count, mfns, errors = arguments
        wanted = (ctypes.c_uint64 * count).from_address(mfns)
        for i, mfn in enumerate(wanted):
            if mfn < 8:
                here = libc.mmap(at + i * PAGE_SIZE, PAGE_SIZE, prot, flags | mmap.MAP_SHARED, file, mfn * PAGE_SIZE)
                assert here == at + i * PAGE_SIZE
            else:
                (ctypes.c_int32 * count).from_address(errors)[i] = -errno.EBUSY
        return at

    attributes._map = map2
    yield foreign, file
    os.close(file)


def test_map_writable_writes_in_place_until_the_block_ends(memory: tuple[shared_libraries.ForeignMemory, int]) -> None:
    foreign, file = memory
    with foreign.map_writable(DomId(7), np.array([5, 2], np.uint64)) as (pages, errors):
        assert pages.shape == (2, PAGE_SIZE)
        assert not errors.any()
        pages[0] = 5
        pages[1, 10:20] = 2
        row = pages[0]
        assert os.pread(file, 1, 5 * PAGE_SIZE) == b"\5"  # at once
    del pages
    row[:] = 9  # private memory by now, and no fault
    assert os.pread(file, PAGE_SIZE, 5 * PAGE_SIZE) == b"\5" * PAGE_SIZE
    assert os.pread(file, 30, 2 * PAGE_SIZE) == bytes(10) + b"\2" * 10 + bytes(10)
    with foreign.map_writable(DomId(7), np.array([1, 99], np.uint64)) as (pages, errors):
        assert errors.tolist() == [0, -errno.EBUSY]
    with foreign.map_writable(DomId(7), np.empty(0, np.uint64)) as (pages, errors):
        assert pages.shape == (0, PAGE_SIZE)
