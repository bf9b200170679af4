"""A p2m that names each pfn by itself, in frames of its own: what crash needs to read a PV guest's core.

crash sees by the kernel's xen_start_info that it ran on Xen, takes its page tables to hold mfns, and looks each of
them up in a p2m. In an exported memory mfns are pfns, and no p2m of the guest's says so. crash takes one from a note
that Xen gives the core of a dom0: the root of a tree of three levels (crash, x86_64.c x86_64_xen_kdump_p2m_create()).
It is made here, in frames behind the domain's last.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from xenpv.export.formats import notes
from xenpv.frames import ENTRIES, FOREIGN, NO_FRAME, PAGES_PER_BATCH, U64
from xenpv.runs import Runs

END_MAX = ENTRIES**3  # pfns that such a tree holds
_XEN_ELFNOTE_CRASH_INFO = 0x100_0001  # xen.git:xen/include/public/elfnote.h


@dataclass(frozen=True)
class Identity:
    """The tree for a domain's pages, in ``pages`` frames from ``first`` on: the root, the lists of leaves, a leaf of
    nothing for all that are not there, and the leaves.
    """

    first: int
    lists: int
    leaves: U64  # which: pfn // 512, ascending

    @classmethod
    def of(cls, pages: Runs) -> Identity | None:
        """The tree for these pages; None if it cannot hold them."""
        if pages.stop > END_MAX:
            return None
        begin, end = pages.first // np.uint64(ENTRIES), pages.first + pages.pages.astype(np.uint64) - np.uint64(1)
        runs = Runs(begin, (end // np.uint64(ENTRIES) - begin).astype(np.int64) + 1)
        leaves = np.unique(runs.pfns)
        return cls(pages.stop, -(-pages.stop // ENTRIES**2), leaves)

    @property
    def pages(self) -> int:
        """How many frames it takes."""
        return 1 + self.lists + 1 + len(self.leaves)

    def note(self) -> bytes:
        """The note that names its root, as Xen's own of type crash_xen_info_t (xen.git:xen/include/xen/elfcore.h): of
        which all else is 0.
        """
        return notes.note(b"Xen", _XEN_ELFNOTE_CRASH_INFO, struct.pack("<10Q", *[0] * 9, self.first))

    def content(self) -> Iterator[bytes]:
        """The frames, in order."""
        root, none = np.zeros(ENTRIES, np.uint64), self.first + 1 + self.lists
        root[: self.lists] = np.arange(self.first + 1, none)
        yield root.tobytes()
        slots = int(self.leaves[-1]) + 1 if len(self.leaves) else 0  # a list ends where its entries are 0
        lists = np.zeros(self.lists * ENTRIES, np.uint64)
        lists[:slots] = none
        lists[self.leaves.astype(np.int64)] = np.arange(none + 1, none + 1 + len(self.leaves), dtype=np.uint64)
        yield lists.tobytes()
        yield np.full(ENTRIES, NO_FRAME).tobytes()
        for at in range(0, len(self.leaves), PAGES_PER_BATCH):
            some = self.leaves[at : at + PAGES_PER_BATCH, None] * np.uint64(ENTRIES)
            entries = some + np.arange(ENTRIES, dtype=np.uint64)
            # An entry of 0 is none to libkdumpfile; bit 63 is a mark of Linux's, and falls off the address.
            yield np.where(entries == 0, FOREIGN, entries).tobytes()
