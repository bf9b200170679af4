"""The log of written pages in log-dirty mode: a sparse bitmap by pfn."""

from __future__ import annotations

import numpy as np

from xenpv.frames import U64, Mask

_NODE_PFNS = 1 << 15  # pfns of one page of bitmap


class DirtyLog:
    """A bitmap of pfns. Ignores pfns from LIMIT on, such as INVALID_M2P_ENTRY."""

    LIMIT = 1 << 52

    def __init__(self) -> None:
        self._nodes: dict[int, Mask] = {}

    def mark(self, pfns: U64) -> None:
        """Log that these pages were written."""
        pfns = np.unique(pfns[pfns < np.uint64(self.LIMIT)])
        nodes = (pfns >> np.uint64(15)).astype(np.int64)
        for node in np.unique(nodes).tolist():
            bits = self._nodes.get(node)
            if bits is None:
                bits = self._nodes[node] = np.zeros(_NODE_PFNS, np.bool_)
            offsets = (pfns[nodes == node] & np.uint64(_NODE_PFNS - 1)).astype(np.int64)
            bits[offsets] = True

    def peek(self, pages: int) -> U64:
        """Return the dirty pfns below ``pages``, ascending."""
        by_node = [
            (np.flatnonzero(self._nodes[node]) + node * _NODE_PFNS).astype(np.uint64) for node in sorted(self._nodes)
        ]
        pfns = np.concatenate(by_node) if by_node else np.empty(0, np.uint64)
        return pfns[pfns < np.uint64(pages)]

    def clean(self, pages: int) -> U64:
        """Return the bitmap that peek returns, and clear it.

        As in Xen, this clears up to the end of a page of bitmap.
        """
        pfns = self.peek(pages)
        for node in [node for node in self._nodes if node * _NODE_PFNS < pages]:
            del self._nodes[node]
        return pfns
