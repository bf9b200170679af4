"""Kinds of address and kinds of page, in Xen's own words (xen.git:xen/include/xen/mm.h)."""

from __future__ import annotations

from typing import NewType, Protocol

import numpy as np
import numpy.typing as npt

from xenpv.abi.domctl import PINNED, PageType
from xenpv.abi.x86 import ENTRIES, PAGE_SHIFT, PAGE_SIZE

Pfn = NewType("Pfn", int)  # pseudo-physical frame number: the domain's own, contiguous view
Mfn = NewType("Mfn", int)  # machine frame number: the host's view
Vaddr = NewType("Vaddr", int)  # guest virtual address, in bytes
DomId = NewType("DomId", int)

U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def _which(*types: PageType) -> Mask:
    table = np.zeros(256, dtype=np.bool_)
    table[list(types)] = True
    table.flags.writeable = False
    return table


NO_FRAME = np.uint64((1 << 64) - 1)  # in an array of frame numbers: none; INVALID_MFN of a 64-bit guest, too

# How much bulk work handles in one step. Too small, and NumPy's and Xen's cost per call dominates; too large, and
# memory and caches suffer.
PAGES_PER_BATCH = 1024  # pages read, written or mapped in one call: 4 MiB; as libxenguest's MAX_BATCH_SIZE
PAGES_IN_CACHE = 128  # pages that several NumPy steps compute on: half a MiB stays in a core's L2 cache
PFNS_PER_BATCH = 1 << 16  # frame numbers looked up in one call: half a MiB each for pfns, mfns, and what is computed
PFNS_PER_SCAN = 1 << 20  # frame numbers of a long table read in one call: 8 MiB, since reading is all that is done

# Marks of a p2m entry that is none of the domain's frames (Linux's, kept by all): another domain's that it has mapped,
# or a machine frame that stands for itself. In a 32-bit guest they are bits 31 and 30, and are moved here when read.
FOREIGN = np.uint64(1 << 63)
IDENTITY = np.uint64(1 << 62)

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


def filled(pages: U8) -> Mask:
    """Which of some pages, shape (n, 4096), hold anything but zeros."""
    return np.asarray(np.bitwise_or.reduce(pages.view(np.uint64), axis=1) != 0)  # any() takes twice as long


def first_bad(mask: Mask) -> int | None:
    """The flat index of the first element that is set, None if none is: where the first of many checks failed."""
    at = int(np.argmax(mask)) if mask.size else 0
    return at if mask.size and mask.flat[at] else None


class Frames(Protocol):
    """Guest frames by pfn, wherever they live. What every reader of a domain's memory consumes."""

    def types(self, pfns: U64) -> U8:
        """The page type of each pfn; ABSENT (0xff) where there is no such page. Same shape as pfns."""

    def pages(self, pfns: U64) -> U8:
        """Content of the pages, shape (len(pfns), 4096). Raises Fault for the first pfn that has no content."""


__all__ = [
    "ABSENT",
    "ENTRIES",
    "FOREIGN",
    "HAS_DATA",
    "I64",
    "IDENTITY",
    "IS_KNOWN",
    "IS_POPULATED",
    "IS_TABLE",
    "NO_FRAME",
    "PAGES_IN_CACHE",
    "PAGES_PER_BATCH",
    "PAGE_SHIFT",
    "PAGE_SIZE",
    "PFNS_PER_BATCH",
    "PFNS_PER_SCAN",
    "PINNED",
    "U8",
    "U64",
    "DomId",
    "Frames",
    "Mask",
    "Mfn",
    "PageType",
    "Pfn",
    "Vaddr",
    "filled",
    "first_bad",
    "type_name",
]
