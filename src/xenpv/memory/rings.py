"""Which pages can be the rings of xenstored and xenconsoled."""

from __future__ import annotations

import numpy as np

from xenpv.frames import IS_TABLE, U64


def ring_conflict(pfn: int, page_type: int, *, start_info: int, other_ring: int, gdt: U64, leaves: U64) -> str | None:
    """Return why a page cannot be the ring of a daemon; None if it can.

    A daemon writes to its ring at any time. Xen lets it map no page table and no GDT frame writable; in the other pages
    it would overwrite what the guest, or a restore, keeps there.

    Args:
        pfn: The page.
        page_type: Its page type.
        start_info: The pfn of start info.
        other_ring: The pfn of the other daemon's ring.
        gdt: The pfns of all vcpus' GDT frames.
        leaves: The pfns of the leaves of the p2m.
    """
    if IS_TABLE[page_type]:
        return "is a page table"
    if pfn == start_info:
        return "is start info itself"
    if pfn == other_ring:
        return "is the ring of both daemons"
    if np.any(gdt == np.uint64(pfn)):
        return "is a GDT frame"
    if np.any(leaves == np.uint64(pfn)):
        return "is a leaf of the p2m"
    return None
