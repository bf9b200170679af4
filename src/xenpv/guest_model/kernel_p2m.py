"""The p2m of the model's kernel, and how it is published.

It is a linear list, whose pages are the leaves of every form.

The kernel maps the list in P2M_LIST_RANGE, whatever it publishes. Parts of the list without a frame share one leaf,
which is mapped read-only. When the list grows, the kernel makes new tables above the leaves: as many as what is
populated needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import PAGE_SHIFT, PAGE_SIZE, PTE_RW
from xenpv.abi.xen import INVALID_MFN, P2M_LEVELS_AT, SHARED_INFO
from xenpv.errors import RequestError
from xenpv.frames import I64, NO_FRAME, PAGES_PER_BATCH, U8, U64
from xenpv.guest_model.kernel_pages import P2M_LIST_RANGE, PAGE, KernelPages, StartInfo
from xenpv.guest_model.p2m_forms import PublishedForm
from xenpv.host.model.guest_view import GuestView
from xenpv.memory.frame_tree import build_tree
from xenpv.memory.p2m_anchors import Anchors, tree_capacity
from xenpv.memory.p2m_reader import decode_entries
from xenpv.memory.p2m_writer import encode_entries, write_page_tables, write_tree_anchors
from xenpv.memory.page_tables import as_ptes, frame_to_cr3, page_number
from xenpv.runs import FrameRuns


class KernelP2M:
    """A p2m of ``entries`` entries, with own leaves at ``places``.

    All other places share one leaf.

    The constructor takes the builder's list over. ``publish`` makes the p2m known to the toolstack.

    Args:
        view: The running guest.
        start: Its start info.
        pages: The kernel's pages, for tables.
        form: The form to publish.
    """

    def __init__(self, view: GuestView, start: StartInfo, pages: KernelPages, form: PublishedForm) -> None:
        self.form, self.pages = form, pages
        self.width: Width = view.width
        self.per_leaf = PAGE_SIZE // view.width
        self.entries = start.nr_pages
        self.generation = 0
        self.places: I64 = np.arange(-(-self.entries // self.per_leaf))
        self._shared_leaf: U64 = np.empty(0, np.uint64)  # the pfn of the shared leaf; empty until it is needed
        self._list_tables: U64 = np.empty(0, np.uint64)  # pfns of the page tables of the list, except the top-level one
        self._tree_pages: U64 = np.empty(0, np.uint64)  # pfns of the tree
        rest = len(self.places) * self.per_leaf - self.entries
        view.write(start.mfn_list + self.entries * self.width, b"\xff" * (rest * self.width))
        self._map_list(view, view.translate(start.mfn_list, len(self.places)))

    @property
    def vaddr(self) -> int:
        """The address of the list."""
        return P2M_LIST_RANGE[self.width].start

    # -- entries

    def lookup(self, view: GuestView, pfns: U64) -> U64:
        """Return the entry of each pfn, uint64.

        NO_FRAME for INVALID_MFN and beyond the list.
        """
        out = np.full(len(pfns), NO_FRAME)
        rows = np.flatnonzero(pfns < np.uint64(self.entries))
        for vaddrs, members, leaf, slots in self._by_leaf(pfns[rows]):
            out[rows[members]] = decode_entries(view.read_pages(vaddrs), self.width)[leaf, slots]
        return out

    def store(self, view: GuestView, pfns: U64, mfns: U64) -> None:
        """Set entries that have leaves of their own (see extend_to).

        Fault for one in the shared leaf.
        """
        for vaddrs, members, leaf, slots in self._by_leaf(pfns):
            table = decode_entries(view.read_pages(vaddrs), self.width).copy()
            table[leaf, slots] = mfns[members]
            view.write_pages(vaddrs, encode_entries(table, self.width))

    def populated(self, view: GuestView, first: int = 0) -> U64:
        """Return the pfns from ``first`` on whose entry is not INVALID_MFN, ascending."""
        populated = [np.empty(0, np.uint64)]
        places = self.places[self.places >= first // self.per_leaf]
        for i in range(0, len(places), PAGES_PER_BATCH):
            batch = places[i : i + PAGES_PER_BATCH].astype(np.uint64)
            mfns = decode_entries(view.read_pages(self._leaf_vaddrs(batch)), self.width)
            pfns = (batch * np.uint64(self.per_leaf))[:, None] + np.arange(self.per_leaf, dtype=np.uint64)
            populated.append(pfns[(mfns != NO_FRAME) & (pfns >= np.uint64(first))])
        return np.concatenate(populated)

    def _leaf_vaddrs(self, places: U64) -> U64:
        return np.uint64(self.vaddr) + (places << np.uint64(PAGE_SHIFT))

    def _by_leaf(self, pfns: U64) -> Iterator[tuple[U64, I64, I64, I64]]:
        """Yield pfns in batches of leaves.

        Each batch has the addresses of its leaves, and for its pfns their rows, leaves and slots.
        """
        order = np.argsort(pfns, kind="stable")
        places, leaf = np.unique(pfns[order] // np.uint64(self.per_leaf), return_inverse=True)
        slots = (pfns[order] % np.uint64(self.per_leaf)).astype(np.int64)
        bounds = np.searchsorted(leaf, np.arange(0, len(places) + PAGES_PER_BATCH, PAGES_PER_BATCH))
        for i, (start, stop) in enumerate(pairwise(bounds)):
            batch = places[i * PAGES_PER_BATCH : (i + 1) * PAGES_PER_BATCH]
            yield self._leaf_vaddrs(batch), order[start:stop], leaf[start:stop] - i * PAGES_PER_BATCH, slots[start:stop]

    # -- growing

    def extend_to(self, view: GuestView, pfns: U64) -> None:
        """Give pfns entries in leaves of their own, and publish the result.

        The generation is odd meanwhile.

        RequestError if the addresses of the list, or the levels of the published tree, do not reach them, or the kernel
        has no page left for tables.
        """
        if not len(pfns):
            return
        new = np.setdiff1d(pfns // np.uint64(self.per_leaf), self.places.astype(np.uint64))
        entries = max(self.entries, int(pfns.max()) + 1)
        if not len(new) and entries == self.entries:
            return
        self._check_capacity(entries)
        new_leaves = self.pages.alloc_pages(view, self._empty_leaves(len(new)))
        frames = np.append(self._leaf_mfns(view), self._translate(view, new_leaves))
        places = np.append(self.places, new.astype(np.int64))
        order = np.argsort(places)
        self.entries, self.places = entries, places[order]
        self.generation += 1
        if self.form.linear:
            self._write_arch_field(view, "p2m_generation", self.generation)
        self._map_list(view, frames[order])
        self._publish(view)
        self.generation += 1
        if self.form.linear:
            self._write_arch_field(view, "p2m_generation", self.generation)

    def _check_capacity(self, entries: int) -> None:
        limit = min(
            len(P2M_LIST_RANGE[self.width]) // self.width, (1 << 8 * self.width) - 1
        )  # arch.max_pfn counts them
        if entries > limit:
            message = f"a p2m list of {entries:#x} entries does not fit a {8 * self.width}-bit kernel: {limit:#x} do"
            raise RequestError(message, needed=entries, available=limit)
        if self.form.tree and not self.form.linear:
            capacity = tree_capacity(self.form.levels, self.width)
            if entries > capacity:
                message = f"a p2m of {entries:#x} entries does not fit {self.form.name}: {capacity:#x} do"
                raise RequestError(message, needed=entries, available=capacity)

    def _map_list(self, view: GuestView, frames: U64) -> None:
        """Make new page tables for the list, whose leaves at ``places`` are ``frames``."""
        runs = self._fill_gaps(view, FrameRuns(self.places, np.ones_like(self.places), frames))
        shared = self._translate(view, self._shared_leaf) << np.uint64(PAGE_SHIFT) | np.uint64(PAGE)
        allocated = [np.empty(0, np.uint64)]

        def store_tables(tables: U8) -> U64:
            ptes = as_ptes(tables)
            ptes[np.isin(ptes, shared)] ^= np.uint64(PTE_RW)
            allocated.append(self.pages.alloc_tables(view, tables))
            return self._translate(view, allocated[-1])

        list_runs = FrameRuns(runs.first + page_number(self.vaddr), runs.count, runs.frame)
        allocated.append(self.pages.link_tables(view, write_page_tables(list_runs, 1, store_tables, PAGE)))
        self.pages.free(view, self._list_tables)
        self._list_tables = np.concatenate(allocated)

    def _fill_gaps(self, view: GuestView, leaves: FrameRuns) -> FrameRuns:
        """Return the leaves of the whole list; the shared leaf fills the gaps."""
        total = -(-self.entries // self.per_leaf)
        if len(self.places) == total:
            return leaves
        if not len(self._shared_leaf):
            self._shared_leaf = self.pages.alloc_pages(view, self._empty_leaves(1))
        return leaves.fill_gaps(range(total), int(self._translate(view, self._shared_leaf)[0]))

    def _empty_leaves(self, count: int) -> U8:
        return encode_entries(np.full((count, self.per_leaf), NO_FRAME), self.width)

    def _leaf_mfns(self, view: GuestView) -> U64:
        """Return the frames of the leaves at ``places``."""
        return view.translate_pages(self._leaf_vaddrs(self.places.astype(np.uint64)))

    def _translate(self, view: GuestView, pfns: U64) -> U64:
        return view.translate_pages(self.pages.vaddrs(pfns))

    # -- publishing

    def publish(self, view: GuestView) -> None:
        """Make the tables above the leaves, and write the anchors to shared info."""
        self._check_capacity(self.entries)
        self._write_arch_field(view, "p2m_cr3", 0)
        self._publish(view)

    def _publish(self, view: GuestView) -> None:
        old, self._tree_pages = self._tree_pages, np.empty(0, np.uint64)
        anchors = self._anchors(view)
        if self.form.linear:
            anchors = replace(
                anchors,
                p2m_cr3=frame_to_cr3(view.guest_table, self.width),
                p2m_vaddr=self.vaddr,
                p2m_generation=self.generation,
            )
        levels_offset = SHARED_INFO.offset(self.width, "arch") + P2M_LEVELS_AT[self.width]
        self._write_shared_info(view, levels_offset, bytes(self.width))
        for offset, data in anchors.shared_info_writes():
            self._write_shared_info(view, offset, data)
        self.pages.free(view, old)

    def _anchors(self, view: GuestView) -> Anchors:
        """Make the tree. Return the anchors, without those of the linear list."""
        form, all_ones = self.form, INVALID_MFN[self.width]
        if form.tree is None:
            return Anchors(self.width, self.entries, all_ones if form.set_up else 0)

        def store_tables(tables: U8) -> U64:
            pfns = self.pages.alloc_pages(view, tables)
            self._tree_pages = np.append(self._tree_pages, pfns)
            return self._translate(view, pfns)

        leaves = self._fill_gaps(view, FrameRuns(self.places, np.ones_like(self.places), self._leaf_mfns(view)))
        if form.hidden:
            encode = partial(encode_entries, width=self.width)
            third = build_tree(leaves, 2, self.per_leaf, encode, store_tables)
            build_tree(third, form.levels - 3, self.per_leaf, encode, store_tables)  # used by the kernel only
            return Anchors(self.width, self.entries, int(third.frame_of(np.zeros(1, np.int64))[0]))
        exposed = self.entries
        if form.linear:  # beside a list, the tree exposes as much as it reaches, as in Linux
            exposed = min(exposed, tree_capacity(form.levels, self.width))
            leaves = leaves.below(-(-exposed // self.per_leaf))
        anchors = write_tree_anchors(form.tree, leaves, exposed, self.width, store_tables, levels=form.levels)
        return replace(anchors, max_pfn=self.entries)

    def _write_arch_field(self, view: GuestView, name: str, value: int) -> None:
        offset = SHARED_INFO.offset(self.width, f"arch.{name}")
        self._write_shared_info(view, offset, value.to_bytes(self.width, "little"))

    def _write_shared_info(self, view: GuestView, offset: int, data: bytes) -> None:
        view.write(self.pages.shared_info + offset, data)
