"""Log-dirty mode of the real Xen: which pages a domain has written."""

from __future__ import annotations

import errno

import numpy as np

from xenpv.errors import HostError
from xenpv.frames import PAGE_SHIFT, PAGE_SIZE, U64, DomId
from xenpv.host.errors import host_error
from xenpv.host.protocol import DOM0, DomainInfo
from xenpv.host.xen import domctl
from xenpv.host.xen.shared_libraries import Hypercalls

_OP = "shadow_op"
_LEAF_PFNS = 8 * PAGE_SIZE  # pfns of one page of Xen's bitmap
_LEAVES_MAX = 1 << 14  # 64 MiB of bitmap
_WORDS_AT_ONCE = 1 << 16  # half a MiB of bitmap, 4 Mi pfns: they fit into a cache


class LogDirty:
    """Log-dirty mode of domains.

    Xen keeps the log in a domain's shadow memory, which is allocated for it.
    """

    def __init__(self, calls: Hypercalls) -> None:
        self._calls = calls

    def enable(self, info: DomainInfo, max_pfn: int) -> None:
        """Start logging. ``max_pfn`` is the domain's arch.max_pfn.

        HostError: see Mover.log_dirty.
        """
        domid = info.domid
        self._grow_shadow_memory(info, max_pfn)
        try:
            self._shadow_op(domid, domctl.SHADOW_OP_ENABLE_LOGDIRTY)
        except HostError as error:
            in_use = not self._free_shadow_memory(domid)
            if error.errno == errno.EINVAL and in_use:
                raise host_error(_OP, errno.EINVAL, domid, "log-dirty is enabled already") from None
            raise

    def disable(self, domid: DomId) -> None:
        """Stop logging. HostError: see Mover.log_dirty."""
        self._check_enabled(domid)
        self._shadow_op(domid, domctl.SHADOW_OP_OFF)
        self._free_shadow_memory(domid)  # Xen returns the log's own pages to a pool that has no user left

    def _grow_shadow_memory(self, info: DomainInfo, max_pfn: int) -> None:
        """Give a tiny or sparse domain as much shadow memory as its log can take.

        By default Xen gives a domain a page of shadow memory per 256 pages. The log needs a page for each 32768 pfns in
        which a page was written, and one for each table above. That is more for a domain below 4 MiB, and for one
        whose p2m is nearly all holes. Xen reports a page that it could not allocate only when the log is read.

        Source: xen.git:xen/arch/x86/mm/shadow/common.c: sh_min_allocation(), shadow_alloc_p2m_page()
        """
        self._shadow_op(info.domid, domctl.SHADOW_OP_GET_ALLOCATION)  # fails on a Xen without shadow paging
        leaves = max(min(-(-max_pfn // _LEAF_PFNS), info.pages, _LEAVES_MAX), 1)
        nodes = 3 * leaves + 1  # each of the two levels above has at most as many, and there is one root
        if nodes <= info.pages >> 8:
            return
        pages = 128 * (info.max_vcpu + 1) + nodes
        self._shadow_op(info.domid, domctl.SHADOW_OP_SET_ALLOCATION, mb=-(-pages >> (20 - PAGE_SHIFT)))

    def dirty_pfns(self, domid: DomId, pages: int, *, clean: bool) -> U64:
        """See Mover.

        Allocates a bit for each of ``pages`` while it runs: 512 MiB for 2^32.
        """
        self._check_enabled(domid)
        command = domctl.SHADOW_OP_CLEAN if clean else domctl.SHADOW_OP_PEEK
        size = -(-pages // 64) * 8
        with self._calls.buffer(size, zeroed=False) as bitmap:
            bitmap.array[size - 8 : size] = 0  # Xen writes whole bytes only
            try:
                result = self._shadow_op(domid, command, dirty_bitmap=bitmap.address, pages=pages)
            except HostError as error:
                if error.errno != errno.ENOMEM:
                    raise
                reason = "Xen had too little memory for the log, so the log is incomplete; restart log-dirty"
                raise host_error(_OP, errno.ENOMEM, domid, reason) from None
            pfns = set_bits(bitmap.array[:size].view("<u8"))
            return pfns[: int(np.searchsorted(pfns, np.uint64(min(pages, int(result["pages"])))))]

    def _check_enabled(self, domid: DomId) -> None:
        """Raise HostError if log-dirty is disabled: Xen itself would return an empty log.

        Xen does not tell. But it refuses to free shadow memory that is in use, and a PV domain uses some only for a
        log (or, on a host with the L1TF flaw, for shadow page tables).
        """
        allocation = self._shadow_op(domid, domctl.SHADOW_OP_GET_ALLOCATION)
        if not int(allocation["mb"]) or self._free_shadow_memory(domid):
            raise host_error(_OP, errno.EINVAL, domid, "log-dirty is disabled")

    def _free_shadow_memory(self, domid: DomId) -> bool:
        """Free a domain's shadow memory.

        Return whether Xen freed it; it does not while the memory is in use.
        """
        try:
            self._shadow_op(domid, domctl.SHADOW_OP_SET_ALLOCATION, mb=0)
        except HostError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return True

    def _shadow_op(self, domid: DomId, command: int, **arguments: int) -> np.void:
        try:
            return self._calls.domctl(domctl.SHADOW_OP, _OP, domid, domctl.SHADOW, op=command, **arguments)
        except HostError as error:
            unknown = error.errno == errno.EINVAL and command == domctl.SHADOW_OP_GET_ALLOCATION
            if domid == DOM0 or not (unknown or error.errno == errno.EOPNOTSUPP):
                raise
            reason = "this Xen has no log-dirty mode for PV domains (built without CONFIG_SHADOW_PAGING)"
            raise host_error(_OP, errno.EOPNOTSUPP, domid, reason) from None


def set_bits(words: U64) -> U64:
    """Return the numbers of the set bits, ascending; bit 0 of the first word is 0.

    Takes memory for half a MiB of ``words`` beyond what it returns.
    """
    batches = [np.empty(0, np.uint64)]
    for first in range(0, len(words), _WORDS_AT_ONCE):
        batch = words[first : first + _WORDS_AT_ONCE]
        nonzero = np.flatnonzero(batch != 0)
        if len(nonzero):
            bits = np.flatnonzero(np.unpackbits(batch[nonzero].view(np.uint8), bitorder="little"))
            batches.append(((nonzero[bits >> 6] + first << 6) + (bits & 63)).astype(np.uint64))
    return np.concatenate(batches)
