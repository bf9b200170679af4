"""Types of address and of page, and the batch sizes of bulk work.

The names are Xen's own (xen.git:xen/include/xen/mm.h).
"""

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


def _type_table(*types: PageType) -> Mask:
    table = np.zeros(256, dtype=np.bool_)
    table[list(types)] = True
    table.flags.writeable = False
    return table


NO_FRAME = np.uint64((1 << 64) - 1)  # "none" in an array of frame numbers; also INVALID_MFN of a 64-bit guest

# How much bulk work handles in one step. Too small, and NumPy's and Xen's cost per call dominates; too large, and
# memory and caches suffer.
PAGES_PER_BATCH = 1024  # pages read, written or mapped in one call: 4 MiB; as libxenguest's MAX_BATCH_SIZE
PAGES_IN_CACHE = 128  # pages that several NumPy steps compute on: half a MiB stays in a core's L2 cache
PFNS_PER_BATCH = 1 << 16  # frame numbers looked up in one call: half a MiB each for pfns, mfns, and what is computed
PFNS_PER_SCAN = 1 << 20  # frame numbers of a long table read in one call: 8 MiB, since reading is all that is done

# Marks of a p2m entry that names no frame of the domain: a mapped frame of another domain, or an identity-mapped
# machine frame (Linux, arch/x86/include/asm/xen/page.h). A 32-bit guest has them in bits 31 and 30; decoding moves
# them here.
FOREIGN = np.uint64(1 << 63)
IDENTITY = np.uint64(1 << 62)

# Tables indexed by an array of page types. ABSENT stands for a pfn without a page.
ABSENT = 0xFF
IS_KNOWN = _type_table(*PageType)
IS_TABLE = _type_table(*(t for t in PageType if 1 <= t & 7 <= 4 and t < PageType.BROKEN))
HAS_DATA = _type_table(PageType.NOTAB, *(t for t in PageType if IS_TABLE[t]))
IS_POPULATED = _type_table(PageType.XALLOC, *(t for t in PageType if HAS_DATA[t]))


def type_name(page_type: int) -> str:
    """Return the name of a page type: "L1TAB", "L4TAB_PIN", "absent", "0x5".

    The name is for people.
    """
    if page_type == ABSENT:
        return "absent"
    return PageType(page_type).name if IS_KNOWN[page_type] else f"{page_type:#x}"


def nonzero_pages(pages: U8) -> Mask:
    """Return which pages, uint8 of shape (n, 4096), hold anything but zeros."""
    return np.asarray(np.bitwise_or.reduce(pages.view(np.uint64), axis=1) != 0)  # any() takes twice as long


def first_bad(mask: Mask) -> int | None:
    """Return the flat index of the first element that is set, None if none is."""
    index = int(np.argmax(mask)) if mask.size else 0
    return index if mask.size and mask.flat[index] else None


class Frames(Protocol):
    """Reads a domain's pages by pfn."""

    def types(self, pfns: U64) -> U8:
        """Return the page type of each pfn; uint8 of the shape of pfns.

        ABSENT (0xff) stands for a pfn without a page.
        """

    def pages(self, pfns: U64) -> U8:
        """Return the content of pages, uint8 of shape (n, 4096).

        Raises:
            Fault: a pfn has no content; ``address`` is the first such pfn.
        """


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
    "first_bad",
    "nonzero_pages",
    "type_name",
]
