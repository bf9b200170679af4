"""Making a p2m: leaves out of entries, and a tree of any depth or the page tables of a list above them.

The other way round from p2m.py. Sparse by nature: parts in which no pfn has a frame share one leaf, and tables that say
the same all through are made once.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import PTE_A, PTE_D, PTE_P, PTE_RW, PTE_US
from xenpv.abi.xen import INVALID_MFN
from xenpv.errors import RequestError
from xenpv.frames import FOREIGN, IDENTITY, NO_FRAME, PAGE_SHIFT, PAGE_SIZE, PAGES_PER_BATCH, U8, U64
from xenpv.memory.anchors import (
    MARKED_TREE_BIT,
    MARKED_TREE_LEVELS,
    ROOTED_TREE_LEVELS,
    Anchors,
    P2MForm,
    tree_capacity,
)
from xenpv.memory.radix import StorePages, build_tree
from xenpv.runs import FrameRuns

TABLE_FLAGS = PTE_P | PTE_RW | PTE_US | PTE_A | PTE_D  # the flags of an entry that names a table
_MFNS_32 = 1 << 30  # frames that 32-bit entries can name


def encode_entries(mfns: U64, width: Width) -> U8:
    """Entries, uint64 of shape (n, entries a page), as pages of a guest of that width; p2m.entries_in undoes it.

    Raises RequestError for a frame that a 32-bit guest's entry cannot hold: above it are the marks.
    """
    if width == 4:
        plain = mfns[mfns != NO_FRAME] & ~(FOREIGN | IDENTITY)
        if plain.size and plain.max() >= _MFNS_32:
            what = f"mfn {int(plain.max()):#x} does not fit a 32-bit guest's p2m, whose entries have 30 bits for it"
            raise RequestError(what, needed=int(plain.max()) + 1, available=_MFNS_32)
        marks = (mfns & (FOREIGN | IDENTITY)) >> np.uint64(32)
        mfns = np.where(mfns == NO_FRAME, np.uint64(INVALID_MFN[4]), mfns & ~(FOREIGN | IDENTITY) | marks)
    return np.ascontiguousarray(mfns, f"<u{width}").view(np.uint8).reshape(-1, PAGE_SIZE)


def write_leaves(pfns: U64, mfns: U64, entries: int, width: Width, put: StorePages) -> FrameRuns:
    """Write the leaves of a p2m of so many entries in which ``pfns`` (ascending) have ``mfns``, and no other has any.

    A leaf for every part that has a frame; all others share one leaf of INVALID_MFN, which a guest maps read-only.
    """
    per_leaf = PAGE_SIZE // width
    total = -(-entries // per_leaf)
    at = (pfns // np.uint64(per_leaf)).astype(np.int64)
    places, start = np.unique(at, return_index=True)
    bounds = np.append(start, len(pfns))
    held = np.empty(len(places), np.uint64)
    for i in range(0, len(places), PAGES_PER_BATCH):
        some = places[i : i + PAGES_PER_BATCH]
        inside = slice(bounds[i], bounds[i + len(some)])
        rows = np.searchsorted(some, at[inside])
        table = np.full((len(some), per_leaf), NO_FRAME)
        table[rows, pfns[inside] % np.uint64(per_leaf)] = mfns[inside]
        held[i : i + len(some)] = put(encode_entries(table, width))
    leaves = FrameRuns(places, np.ones(len(places), np.int64), held)
    if len(places) == total:
        return leaves
    [missing] = put(encode_entries(np.full((1, per_leaf), NO_FRAME), width)).tolist()
    return leaves.fill_gaps(range(total), missing)


def write_tree(leaves: FrameRuns, levels: int, width: Width, put: StorePages) -> int:
    """Write the tables of a tree of so many levels (leaves counted) above some leaves; the frame of its top.

    Raises RequestError when a leaf lies beyond what such a tree reaches.
    """
    reach = tree_capacity(levels - 1, width)
    needed = int(leaves.first[-1] + leaves.count[-1]) if len(leaves) else 0
    if needed > reach:
        what = f"{needed:#x} leaves do not fit a tree of {levels} levels, which reaches {reach:#x}"
        raise RequestError(what, needed=needed, available=reach)
    encode = partial(encode_entries, width=width)
    top = build_tree(leaves, levels - 1, PAGE_SIZE // width, encode, put)
    frame = top.frame if len(top) else put(encode(np.full((1, PAGE_SIZE // width), NO_FRAME)))
    return int(frame[0])


def write_page_tables(frames: FrameRuns, levels: int, put: StorePages, flags: int = TABLE_FLAGS) -> FrameRuns:
    """Write so many levels of page tables that map ``frames``, whose places are page numbers of the address space.

    ``flags`` are those of the L1 entries. What they name in the level above is returned: which entry (counted from
    address 0) names which table; hooking them in is the guest's to do.
    """
    low = build_tree(frames, 1, PAGE_SIZE // 8, partial(_ptes, flags=flags), put)
    return build_tree(low, levels - 1, PAGE_SIZE // 8, partial(_ptes, flags=TABLE_FLAGS), put)


def write_tree_anchors(
    form: P2MForm, leaves: FrameRuns, entries: int, width: Width, put: StorePages, *, levels: int = 3
) -> Anchors:
    """Write the tables of a tree in one of its forms, and what shared info must say of it.

    ``levels`` is of a rooted tree. Raises RequestError when the form cannot express so many entries.
    """
    depth = {P2MForm.TREE: 3, P2MForm.MARKED: MARKED_TREE_LEVELS, P2MForm.ROOTED: levels}[form]
    if depth not in ROOTED_TREE_LEVELS:
        raise RequestError(
            f"a tree of {depth} levels: {ROOTED_TREE_LEVELS.start} to {ROOTED_TREE_LEVELS.stop - 1} may be",
            needed=depth,
        )
    if entries > (reach := min(tree_capacity(depth, width), (1 << 8 * width) - 1)):  # max_pfn is a word of the guest's
        what = f"a p2m of {entries:#x} entries does not fit a {form} of {depth} levels, which reaches {reach:#x}"
        raise RequestError(what, needed=entries, available=reach)
    if form is P2MForm.MARKED and width == 4:
        raise RequestError("a 32-bit guest's anchor has no bit 61 to mark a tree with")
    root = write_tree(leaves, depth, width, put)
    if form is P2MForm.ROOTED:
        return Anchors(width, entries, INVALID_MFN[width], p2m_levels=depth, p2m_root=root)
    return Anchors(width, entries, root | MARKED_TREE_BIT if form is P2MForm.MARKED else root)


def _ptes(frames: U64, flags: int) -> U8:
    entries = np.where(frames == NO_FRAME, np.uint64(0), frames << np.uint64(PAGE_SHIFT) | np.uint64(flags))
    return entries.astype("<u8", copy=False).view(np.uint8).reshape(-1, PAGE_SIZE)
