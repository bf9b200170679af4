"""Kinds of address and kinds of page, in Xen's own words (xen.git:xen/include/xen/mm.h)."""

from __future__ import annotations

from enum import IntEnum
from typing import NewType, Protocol

import numpy as np
import numpy.typing as npt

Pfn = NewType("Pfn", int)  # pseudo-physical frame number: the domain's own, contiguous view
Mfn = NewType("Mfn", int)  # machine frame number: the host's view
Vaddr = NewType("Vaddr", int)  # guest virtual address, in bytes
DomId = NewType("DomId", int)

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
ENTRIES = PAGE_SIZE // 8  # page-table entries in a page, for both guest widths (32-bit PV is PAE only)

U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class PageType(IntEnum):
    """XEN_DOMCTL_PFINFO_* without its shift of 28 (xen.git:xen/include/public/domctl.h)."""

    NOTAB = 0x0
    L1TAB = 0x1
    L2TAB = 0x2
    L3TAB = 0x3
    L4TAB = 0x4
    L1TAB_PIN = 0x9
    L2TAB_PIN = 0xA
    L3TAB_PIN = 0xB
    L4TAB_PIN = 0xC
    BROKEN = 0xD
    XALLOC = 0xE
    XTAB = 0xF


PINNED = 0x8  # the bit that tells L1TAB_PIN from L1TAB


def _which(*types: PageType) -> Mask:
    table = np.zeros(256, dtype=np.bool_)
    table[list(types)] = True
    table.flags.writeable = False
    return table


# Tables indexed by an array of page types. ABSENT marks a pfn of which nothing is known; it is none of these.
ABSENT = 0xFF
IS_KNOWN = _which(*PageType)
IS_TABLE = _which(*(t for t in PageType if 1 <= t & 7 <= 4 and t < PageType.BROKEN))
HAS_DATA = _which(PageType.NOTAB, *(t for t in PageType if IS_TABLE[t]))
IS_POPULATED = _which(PageType.XALLOC, *(t for t in PageType if HAS_DATA[t]))


def type_name(page_type: int) -> str:
    """The name of a page type, for people: "L1TAB", "L4TAB_PIN", "absent", "0x5"."""
    if page_type == ABSENT:
        return "absent"
    return PageType(page_type).name if IS_KNOWN[page_type] else f"{page_type:#x}"


class Frames(Protocol):
    """Guest frames by pfn, wherever they live. What every reader of a domain's memory consumes."""

    def types(self, pfns: U64) -> U8:
        """The page type of each pfn; ABSENT (0xff) where there is no such page. Same shape as pfns."""

    def pages(self, pfns: U64) -> U8:
        """Content of the pages, shape (len(pfns), 4096). Raises Fault for the first pfn that has no content."""
