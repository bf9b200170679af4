"""Writing a p2m: the inverse of p2m_reader.py.

It makes leaves out of entries, and above them a tree of any depth or page tables.

Sparse by nature: places without a frame share one leaf, and tables with equal content are written once.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import PTE_A, PTE_D, PTE_P, PTE_RW, PTE_US
from xenpv.abi.xen import INVALID_MFN
from xenpv.errors import RequestError
from xenpv.frames import FOREIGN, IDENTITY, NO_FRAME, PAGE_SHIFT, PAGE_SIZE, PAGES_PER_BATCH, U8, U64
from xenpv.memory.frame_tree import StorePages, build_tree
from xenpv.memory.p2m_anchors import (
    MARKED_TREE_BIT,
    MARKED_TREE_LEVELS,
    ROOTED_TREE_LEVELS,
    Anchors,
    P2MForm,
    tree_capacity,
)
from xenpv.runs import FrameRuns

TABLE_FLAGS = PTE_P | PTE_RW | PTE_US | PTE_A | PTE_D  # the flags of an entry that names a table
_MFNS_32 = 1 << 30  # frames that 32-bit entries can name


def encode_entries(mfns: U64, width: Width) -> U8:
    """Return p2m entries as pages; p2m.decode_entries is the inverse.

    Args:
        mfns: uint64 of shape (n, entries in a page), NO_FRAME for INVALID_MFN.
        width: bytes of the guest's unsigned long.

    Returns:
        uint8 of shape (n, 4096).

    Raises:
        RequestError: an mfn does not fit the 30 bits that a 32-bit guest's entry has for it.
    """
    if width == 4:
        unmarked = mfns[mfns != NO_FRAME] & ~(FOREIGN | IDENTITY)
        if unmarked.size and unmarked.max() >= _MFNS_32:
            problem = f"mfn {int(unmarked.max()):#x} does not fit a 32-bit guest's p2m, whose entries have 30 bits"
            raise RequestError(f"{problem} for it", needed=int(unmarked.max()) + 1, available=_MFNS_32)
        marks = (mfns & (FOREIGN | IDENTITY)) >> np.uint64(32)
        mfns = np.where(mfns == NO_FRAME, np.uint64(INVALID_MFN[4]), mfns & ~(FOREIGN | IDENTITY) | marks)
    return np.ascontiguousarray(mfns, f"<u{width}").view(np.uint8).reshape(-1, PAGE_SIZE)


def write_leaves(pfns: U64, mfns: U64, entries: int, width: Width, store: StorePages) -> FrameRuns:
    """Write the leaves of a p2m in which ``pfns`` have ``mfns``.

    No other pfn has a frame.

    Each leaf with a frame is written. All other places share one leaf of INVALID_MFN.

    Args:
        pfns: uint64, ascending.
        mfns: uint64, the frame of each.
        entries: entries of the whole p2m.
        width: bytes of an entry.
        store: writes the pages.
    """
    entries_per_leaf = PAGE_SIZE // width
    leaf_count = -(-entries // entries_per_leaf)
    place_of_pfn = (pfns // np.uint64(entries_per_leaf)).astype(np.int64)
    places, start = np.unique(place_of_pfn, return_index=True)
    bounds = np.append(start, len(pfns))
    frames = np.empty(len(places), np.uint64)
    for i in range(0, len(places), PAGES_PER_BATCH):
        batch = places[i : i + PAGES_PER_BATCH]
        pfn_rows = slice(bounds[i], bounds[i + len(batch)])
        leaf = np.searchsorted(batch, place_of_pfn[pfn_rows])
        content = np.full((len(batch), entries_per_leaf), NO_FRAME)
        content[leaf, pfns[pfn_rows] % np.uint64(entries_per_leaf)] = mfns[pfn_rows]
        frames[i : i + len(batch)] = store(encode_entries(content, width))
    leaves = FrameRuns(places, np.ones(len(places), np.int64), frames)
    if len(places) == leaf_count:
        return leaves
    [missing] = store(encode_entries(np.full((1, entries_per_leaf), NO_FRAME), width)).tolist()
    return leaves.fill_gaps(range(leaf_count), missing)


def write_tree(leaves: FrameRuns, levels: int, width: Width, store: StorePages) -> int:
    """Write the tables above the leaves, and return the frame of the top table.

    Args:
        leaves: the leaves, which are one of the levels.
        levels: levels of the tree.
        width: bytes of an entry.
        store: writes the pages.

    Raises:
        RequestError: a leaf lies beyond what so many levels reach.
    """
    reach = tree_capacity(levels - 1, width)
    needed = int(leaves.end[-1]) if len(leaves) else 0
    if needed > reach:
        problem = f"{needed:#x} leaves do not fit a tree of {levels} levels, which reaches {reach:#x}"
        raise RequestError(problem, needed=needed, available=reach)
    encode = partial(encode_entries, width=width)
    top = build_tree(leaves, levels - 1, PAGE_SIZE // width, encode, store)
    frame = top.frame if len(top) else store(encode(np.full((1, PAGE_SIZE // width), NO_FRAME)))
    return int(frame[0])


def write_page_tables(frames: FrameRuns, levels: int, store: StorePages, flags: int = TABLE_FLAGS) -> FrameRuns:
    """Write page tables that map frames.

    Args:
        frames: what to map; places are page numbers of the address space.
        levels: levels of tables to write, from L1 up.
        store: writes the pages.
        flags: the flags of L1 entries.

    Returns:
        The tables of the highest level written. The entries that name them are for the caller to write.
    """
    low = build_tree(frames, 1, PAGE_SIZE // 8, partial(_encode_ptes, flags=flags), store)
    return build_tree(low, levels - 1, PAGE_SIZE // 8, partial(_encode_ptes, flags=TABLE_FLAGS), store)


def write_tree_anchors(
    form: P2MForm, leaves: FrameRuns, entries: int, width: Width, store: StorePages, *, levels: int = 3
) -> Anchors:
    """Write the tables of a tree, and return the anchors that expose it.

    Args:
        form: TREE, MARKED or ROOTED.
        leaves: its leaves.
        entries: entries of the whole p2m, which becomes max_pfn.
        width: bytes of an entry.
        store: writes the pages.
        levels: levels of a rooted tree; other forms have their own number.

    Raises:
        RequestError: the form cannot express so many entries.
    """
    depth = {P2MForm.TREE: 3, P2MForm.MARKED: MARKED_TREE_LEVELS, P2MForm.ROOTED: levels}[form]
    if depth not in ROOTED_TREE_LEVELS:
        allowed = f"{ROOTED_TREE_LEVELS.start} to {ROOTED_TREE_LEVELS.stop - 1}"
        raise RequestError(f"a tree of {depth} levels: {allowed} may be", needed=depth)
    if entries > (reach := min(tree_capacity(depth, width), (1 << 8 * width) - 1)):  # max_pfn is an unsigned long
        problem = f"a p2m of {entries:#x} entries does not fit a {form} of {depth} levels, which reaches {reach:#x}"
        raise RequestError(problem, needed=entries, available=reach)
    if form is P2MForm.MARKED and width == 4:
        raise RequestError("a 32-bit guest's anchor has no bit 61 to mark a tree with")
    root = write_tree(leaves, depth, width, store)
    if form is P2MForm.ROOTED:
        return Anchors(width, entries, INVALID_MFN[width], p2m_levels=depth, p2m_root=root)
    return Anchors(width, entries, root | MARKED_TREE_BIT if form is P2MForm.MARKED else root)


def _encode_ptes(frames: U64, flags: int) -> U8:
    """Return page tables whose entries name frames; uint64 of shape (n, 512).

    NO_FRAME stands for an entry that is not present.
    """
    entries = np.where(frames == NO_FRAME, np.uint64(0), frames << np.uint64(PAGE_SHIFT) | np.uint64(flags))
    return entries.astype("<u8", copy=False).view(np.uint8).reshape(-1, PAGE_SIZE)
