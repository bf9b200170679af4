"""The p2m of a kernel on ModelHost: its list, whose pages are the leaves of every form, and what it publishes.

The list is mapped in LIST for the kernel itself, whatever is published; parts of it without a frame share one leaf,
mapped read-only. Where it changes, the tables above the leaves are made anew: their number follows what is populated.
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
from xenpv.guest_model.kernel_pages import LIST, PAGE, KernelPages, StartInfo
from xenpv.guest_model.p2m_forms import Published
from xenpv.host.model.guest_view import GuestView
from xenpv.memory.anchors import Anchors, tree_capacity
from xenpv.memory.p2m import decode_entries
from xenpv.memory.pagetables import as_entries, cr3_of, place_of
from xenpv.memory.publish import encode_entries, write_page_tables, write_tree_anchors
from xenpv.memory.radix import build_tree
from xenpv.runs import FrameRuns


class KernelP2M:
    """``entries`` pfns in leaves at ``places``; all others share one. It is not published before ``publish``."""

    def __init__(self, view: GuestView, start: StartInfo, pages: KernelPages, form: Published) -> None:
        self.form, self.pages = form, pages
        self.width: Width = view.width
        self.per_leaf = PAGE_SIZE // view.width
        self.entries = start.nr_pages
        self.generation = 0
        self.places: I64 = np.arange(-(-self.entries // self.per_leaf))
        self._missing: U64 = np.empty(0, np.uint64)  # the pfn of the shared leaf, once there is one
        self._tables: U64 = np.empty(0, np.uint64)  # page tables of the list, all but the top
        self._tree: U64 = np.empty(0, np.uint64)  # pages of the tree
        beyond = len(self.places) * self.per_leaf - self.entries
        view.write(start.mfn_list + self.entries * self.width, b"\xff" * (beyond * self.width))
        self._map(view, view.translate(start.mfn_list, len(self.places)))

    @property
    def vaddr(self) -> int:
        """The address of the list."""
        return LIST[self.width].start

    # entries

    def lookup(self, view: GuestView, pfns: U64) -> U64:
        """The entry of each pfn, as P2M.lookup has it: NO_FRAME for INVALID_MFN and beyond the list."""
        out = np.full(len(pfns), NO_FRAME)
        rows = np.flatnonzero(pfns < np.uint64(self.entries))
        for vaddrs, which, leaf, at in self._by_leaf(pfns[rows]):
            out[rows[which]] = decode_entries(view.read_pages(vaddrs), self.width)[leaf, at]
        return out

    def store(self, view: GuestView, pfns: U64, mfns: U64) -> None:
        """Set entries, of pfns that ``reach`` was asked for. Fault for one in the shared leaf."""
        for vaddrs, which, leaf, at in self._by_leaf(pfns):
            table = decode_entries(view.read_pages(vaddrs), self.width).copy()
            table[leaf, at] = mfns[which]
            view.write_pages(vaddrs, encode_entries(table, self.width))

    def populated(self, view: GuestView, first: int = 0) -> U64:
        """The pfns from ``first`` on whose entry is not INVALID_MFN, ascending."""
        found = [np.empty(0, np.uint64)]
        places = self.places[self.places >= first // self.per_leaf]
        for i in range(0, len(places), PAGES_PER_BATCH):
            some = places[i : i + PAGES_PER_BATCH].astype(np.uint64)
            mfns = decode_entries(view.read_pages(self._at(some)), self.width)
            pfns = (some * np.uint64(self.per_leaf))[:, None] + np.arange(self.per_leaf, dtype=np.uint64)
            found.append(pfns[(mfns != NO_FRAME) & (pfns >= np.uint64(first))])
        return np.concatenate(found)

    def _at(self, places: U64) -> U64:
        return np.uint64(self.vaddr) + (places << np.uint64(PAGE_SHIFT))

    def _by_leaf(self, pfns: U64) -> Iterator[tuple[U64, I64, I64, I64]]:
        """Some leaves' addresses, which of the pfns they hold, in which of the leaves, and where in it."""
        order = np.argsort(pfns, kind="stable")
        places, leaf = np.unique(pfns[order] // np.uint64(self.per_leaf), return_inverse=True)
        at = (pfns[order] % np.uint64(self.per_leaf)).astype(np.int64)
        bounds = np.searchsorted(leaf, np.arange(0, len(places) + PAGES_PER_BATCH, PAGES_PER_BATCH))
        for i, (start, stop) in enumerate(pairwise(bounds)):
            some = places[i * PAGES_PER_BATCH : (i + 1) * PAGES_PER_BATCH]
            yield self._at(some), order[start:stop], leaf[start:stop] - i * PAGES_PER_BATCH, at[start:stop]

    # growing

    def reach(self, view: GuestView, pfns: U64) -> None:
        """Make it reach some pfns, each in a leaf of its own; what is published follows, its generation odd meanwhile.

        RequestError when it cannot: the list has addresses, and a published tree levels, for so many entries only.
        """
        if not len(pfns):
            return
        new = np.setdiff1d(pfns // np.uint64(self.per_leaf), self.places.astype(np.uint64))
        entries = max(self.entries, int(pfns.max()) + 1)
        if not len(new) and entries == self.entries:
            return
        self._fits(entries)
        blank = self.pages.put(view, encode_entries(np.full((len(new), self.per_leaf), NO_FRAME), self.width))
        frames = np.append(view.translate_pages(self._at(self.places.astype(np.uint64))), self._frames(view, blank))
        places = np.append(self.places, new.astype(np.int64))
        order = np.argsort(places)
        self.entries, self.places = entries, places[order]
        self.generation += 1
        if self.form.linear:
            self._say(view, "p2m_generation", self.generation)
        self._map(view, frames[order])
        self._publish(view)
        self.generation += 1
        if self.form.linear:
            self._say(view, "p2m_generation", self.generation)

    def _fits(self, entries: int) -> None:
        room = min(len(LIST[self.width]) // self.width, (1 << 8 * self.width) - 1)  # arch.max_pfn counts them
        if entries > room:
            what = f"a p2m list of {entries:#x} entries does not fit a {8 * self.width}-bit kernel, with {room:#x}"
            raise RequestError(what, needed=entries, available=room)
        if self.form.tree and not self.form.linear:
            reach = tree_capacity(self.form.levels, self.width)
            if entries > reach:
                what = f"a p2m of {entries:#x} entries does not fit {self.form.name}, which reaches {reach:#x}"
                raise RequestError(what, needed=entries, available=reach)

    def _map(self, view: GuestView, frames: U64) -> None:
        """Map the list anew, leaves at ``places`` being ``frames``."""
        runs = self._filled(view, FrameRuns(self.places, np.ones_like(self.places), frames))
        shared = self._frames(view, self._missing) << np.uint64(PAGE_SHIFT) | np.uint64(PAGE)
        taken = [np.empty(0, np.uint64)]

        def put(tables: U8) -> U64:
            ptes = as_entries(tables)
            ptes[np.isin(ptes, shared)] ^= np.uint64(PTE_RW)
            taken.append(self.pages.put_tables(view, tables))
            return self._frames(view, taken[-1])

        at = FrameRuns(runs.first + place_of(self.vaddr), runs.count, runs.frame)
        taken.append(self.pages.hook(view, write_page_tables(at, 1, put, PAGE)))
        self.pages.give(view, self._tables)
        self._tables = np.concatenate(taken)

    def _filled(self, view: GuestView, leaves: FrameRuns) -> FrameRuns:
        """With the shared leaf wherever there is none; it comes into being when it is first wanted."""
        total = -(-self.entries // self.per_leaf)
        if len(self.places) == total:
            return leaves
        if not len(self._missing):
            self._missing = self.pages.put(view, encode_entries(np.full((1, self.per_leaf), NO_FRAME), self.width))
        return leaves.fill_gaps(range(total), int(self._frames(view, self._missing)[0]))

    def _frames(self, view: GuestView, pfns: U64) -> U64:
        return view.translate_pages(self.pages.vaddrs(pfns))

    # publishing

    def publish(self, view: GuestView) -> None:
        """Make what is above the leaves, and say in shared info where it is: at boot, and in a new domain."""
        self._fits(self.entries)
        self._say(view, "p2m_cr3", 0)
        self._publish(view)

    def _publish(self, view: GuestView) -> None:
        old, self._tree = self._tree, np.empty(0, np.uint64)
        anchors = self._anchors(view)
        if self.form.linear:
            anchors = replace(
                anchors,
                p2m_cr3=cr3_of(view.guest_table, self.width),
                p2m_vaddr=self.vaddr,
                p2m_generation=self.generation,
            )
        levels = SHARED_INFO.offset(self.width, "arch") + P2M_LEVELS_AT[self.width]
        self._write(view, levels, bytes(self.width))
        for at, data in anchors.shared_info_writes():
            self._write(view, at, data)
        self.pages.give(view, old)

    def _anchors(self, view: GuestView) -> Anchors:
        """Without the list's. Makes the tree."""
        form, all_ones = self.form, INVALID_MFN[self.width]
        if form.tree is None:
            return Anchors(self.width, self.entries, all_ones if form.set_up else 0)

        def put(tables: U8) -> U64:
            pfns = self.pages.put(view, tables)
            self._tree = np.append(self._tree, pfns)
            return self._frames(view, pfns)

        frames = view.translate_pages(self._at(self.places.astype(np.uint64)))
        leaves = self._filled(view, FrameRuns(self.places, np.ones_like(self.places), frames))
        if form.hidden:
            encode = partial(encode_entries, width=self.width)
            third = build_tree(leaves, 2, self.per_leaf, encode, put)
            build_tree(third, form.levels - 3, self.per_leaf, encode, put)  # known to the kernel alone
            return Anchors(self.width, self.entries, int(third.frame_of(np.zeros(1, np.int64))[0]))
        shown = self.entries
        if form.linear:  # beside the list, a tree shows what it can, as Linux's does
            shown = min(shown, tree_capacity(form.levels, self.width))
            leaves = leaves.below(-(-shown // self.per_leaf))
        anchors = write_tree_anchors(form.tree, leaves, shown, self.width, put, levels=form.levels)
        return replace(anchors, max_pfn=self.entries)

    def _say(self, view: GuestView, name: str, value: int) -> None:
        self._write(view, SHARED_INFO.offset(self.width, f"arch.{name}"), value.to_bytes(self.width, "little"))

    def _write(self, view: GuestView, offset: int, data: bytes) -> None:
        view.write(self.pages.shared_info + offset, data)
