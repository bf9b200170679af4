"""Xen's machine-to-phys table, mapped read-only."""

from __future__ import annotations

import mmap

import numpy as np

from xenpv.abi.x86 import PAGE_SIZE
from xenpv.frames import U8, U64, Mask, first_bad
from xenpv.host.errors import host_error
from xenpv.host.xen import domctl, shared_libraries

_ALL_ONES = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_CHUNK_SHIFT = 18  # Xen hands out its m2p in chunks of 2 MiB: 2^18 entries, for 1 GiB of frames
_CHUNK_BYTES = 8 << _CHUNK_SHIFT
_CHUNK_PAGES = _CHUNK_BYTES // PAGE_SIZE
_UNKNOWN, _MAPPED, _HOLE = 0, 1, 2


class M2P:
    """Xen's machine-to-phys table.

    Each chunk is mapped at the first look-up in it; addresses are reserved for all.
    """

    def __init__(self, calls: shared_libraries.Hypercalls, memory: shared_libraries.ForeignMemory, frames: int) -> None:
        self._memory = memory
        self._frames = frames
        chunks = -(-frames >> _CHUNK_SHIFT)
        with calls.buffer(8 * chunks) as buffer, calls.buffer(domctl.MACHPHYS_MFN_LIST.size(8)) as argument:
            members = argument.array.view(domctl.MACHPHYS_MFN_LIST[8])
            members["max_extents"], members["extent_start"] = chunks, buffer.address
            calls.call(domctl.MEMORY_OP, domctl.XENMEM_MACHPHYS_MFN_LIST, argument.address, "machphys_mfn_list")
            self._extents = buffer.array.view("<u8")[: int(members["nr_extents"][0])].copy()
        self._state: U8 = np.full(chunks, _HOLE, np.uint8)
        self._state[: len(self._extents)] = _UNKNOWN
        # For a chunk without memory Xen gives the previous chunk again, or 0.
        self._state[1 : len(self._extents)][self._extents[1:] == self._extents[:-1]] = _HOLE
        self._state[: len(self._extents)][self._extents == 0] = _HOLE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._table: U64 = np.frombuffer(mmap.mmap(-1, chunks * _CHUNK_BYTES, flags, mmap.PROT_READ), np.uint64)

    def lookup(self, mfns: U64) -> U64:
        """Return the pfn of each mfn.

        All ones beyond the host, and where the host has no memory.
        """
        if len(mfns) and int(mfns.max()) < self._frames:
            first, last = int(mfns.min()) >> _CHUNK_SHIFT, int(mfns.max()) >> _CHUNK_SHIFT
            if (self._state[first : last + 1] == _MAPPED).all():  # the common case, and the fast one
                pfns: U64 = self._table.take(mfns.astype(np.int64))
                return pfns
        inside: Mask = mfns < np.uint64(self._frames)
        all_inside = bool(inside.all())
        index = (mfns if all_inside else np.where(inside, mfns, np.uint64(0))).astype(np.int64)
        chunks = index >> _CHUNK_SHIFT
        states = self._state[chunks]
        unknown = states == _UNKNOWN
        if unknown.any():
            for chunk in np.unique(chunks[unknown]):
                self._map(int(chunk))
            states = self._state[chunks]
        pfns = self._table[index]
        if not all_inside or (states == _HOLE).any():
            pfns[~inside | (states == _HOLE)] = _ALL_ONES
        return pfns

    def _map(self, chunk: int) -> None:
        frames = self._extents[chunk] + np.arange(_CHUNK_PAGES, dtype=np.uint64)
        address = self._table.ctypes.data + chunk * _CHUNK_BYTES
        _, errors = self._memory.map(domctl.DOMID_XEN, frames, address)
        if (first := first_bad(errors != 0)) is not None:
            raise host_error(f"map chunk {chunk:#x} of the m2p", -int(errors[first]))
        self._state[chunk] = _MAPPED
