"""Which pages of a domain were written, as Xen's log-dirty mode keeps it: a sparse bitmap by pfn."""

from __future__ import annotations

import numpy as np

from xenpv.frames import U64, Mask

_PER_NODE = 1 << 15  # pfns in a page of bitmap


class DirtyLog:
    """A bitmap of pfns; what is beyond reason (INVALID_M2P_ENTRY) is not kept."""

    LIMIT = 1 << 52

    def __init__(self) -> None:
        self._nodes: dict[int, Mask] = {}
        self.count = 0  # of bits set since the log was last cleaned

    def mark(self, pfns: U64) -> None:
        pfns = np.unique(pfns[pfns < np.uint64(self.LIMIT)])
        nodes = (pfns >> np.uint64(15)).astype(np.int64)
        for node in np.unique(nodes).tolist():
            bits = self._nodes.get(node)
            if bits is None:
                bits = self._nodes[node] = np.zeros(_PER_NODE, np.bool_)
            at = (pfns[nodes == node] & np.uint64(_PER_NODE - 1)).astype(np.int64)
            self.count += int(np.count_nonzero(~bits[at]))
            bits[at] = True

    def peek(self, pages: int) -> U64:
        """The dirty pfns below ``pages``, ascending."""
        found = [
            (np.flatnonzero(self._nodes[node]) + node * _PER_NODE).astype(np.uint64) for node in sorted(self._nodes)
        ]
        pfns = np.concatenate(found) if found else np.empty(0, np.uint64)
        return pfns[pfns < np.uint64(pages)]

    def clean(self, pages: int) -> U64:
        """What peek gives, and forget it. As in Xen, a page of bitmap that ``pages`` ends in is forgotten whole."""
        pfns = self.peek(pages)
        for node in [node for node in self._nodes if node * _PER_NODE < pages]:
            del self._nodes[node]
        self.count = 0
        return pfns
