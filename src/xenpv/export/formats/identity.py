"""A p2m that maps each pfn to itself, in frames of its own.

crash needs it to read the core of a PV guest.

crash sees by the kernel's xen_start_info that it ran on Xen. It takes the frames in page tables for mfns and looks each
up in a p2m. Exported page tables hold pfns, and the guest's own p2m does not map those. crash accepts another p2m from
the note that Xen gives the core of a dom0: the root of a tree of three levels (crash, x86_64.c
x86_64_xen_kdump_p2m_create()). The tree is put into frames after the domain's last page.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from xenpv.export.formats.notes import note
from xenpv.frames import ENTRIES, FOREIGN, NO_FRAME, PAGES_PER_BATCH, U64
from xenpv.runs import Runs

END_MAX = ENTRIES**3  # pfns that a tree of three levels holds
_XEN_ELFNOTE_CRASH_INFO = 0x100_0001  # xen.git:xen/include/public/elfnote.h


@dataclass(frozen=True)
class IdentityTree:
    """The tree: root, middle level, one empty leaf for absent pages, leaves.

    Attributes:
        first: The pfn of the root; the other frames follow it.
        middle_frames: How many frames the middle level takes.
        leaves: Which leaves exist: pfn // 512, ascending.
    """

    first: int
    middle_frames: int
    leaves: U64

    @classmethod
    def for_pages(cls, pages: Runs) -> IdentityTree | None:
        """Return the tree for these pages; None if it cannot hold them."""
        if pages.stop > END_MAX:
            return None
        first_leaf, last_leaf = pages.first // np.uint64(ENTRIES), (pages.end - np.uint64(1)) // np.uint64(ENTRIES)
        leaf_runs = Runs(first_leaf, (last_leaf - first_leaf).astype(np.int64) + 1)
        return cls(pages.stop, -(-pages.stop // ENTRIES**2), np.unique(leaf_runs.pfns))

    @property
    def pages(self) -> int:
        """How many frames the tree takes."""
        return 1 + self.middle_frames + 1 + len(self.leaves)

    @property
    def runs(self) -> Runs:
        """The pfns of its frames."""
        return Runs(np.array([self.first], np.uint64), np.array([self.pages], np.int64))

    def note(self) -> bytes:
        """Return the note that names the root.

        It is Xen's crash_xen_info_t with zeros in all other fields.

        Source: xen.git:xen/include/xen/elfcore.h.
        """
        return note(b"Xen", _XEN_ELFNOTE_CRASH_INFO, struct.pack("<10Q", *[0] * 9, self.first))

    def content(self) -> Iterator[bytes]:
        """Yield the frames in order."""
        root, empty_leaf = np.zeros(ENTRIES, np.uint64), self.first + 1 + self.middle_frames
        root[: self.middle_frames] = np.arange(self.first + 1, empty_leaf)
        yield root.tobytes()
        entries_used = int(self.leaves[-1]) + 1 if len(self.leaves) else 0  # the level ends where its entries are 0
        middle = np.zeros(self.middle_frames * ENTRIES, np.uint64)
        middle[:entries_used] = empty_leaf
        leaf_pfns = np.arange(empty_leaf + 1, empty_leaf + 1 + len(self.leaves), dtype=np.uint64)
        middle[self.leaves.astype(np.int64)] = leaf_pfns
        yield middle.tobytes()
        yield np.full(ENTRIES, NO_FRAME).tobytes()
        for start in range(0, len(self.leaves), PAGES_PER_BATCH):
            first_pfns = self.leaves[start : start + PAGES_PER_BATCH, None] * np.uint64(ENTRIES)
            entries = first_pfns + np.arange(ENTRIES, dtype=np.uint64)
            # libkdumpfile takes an entry of 0 for none. Bit 63 is Linux's mark, which falls off the address.
            yield np.where(entries == 0, FOREIGN, entries).tobytes()
