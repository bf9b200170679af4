"""Page tables whose entries hold pfns: entries, walks, and checks over whole arrays of tables.

PV guests' hold mfns: in a stream they are normalised (mfn to pfn) by the saver, of a running domain and of a core
before a walk. HVM guests' hold gfns, which are their pfns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import (
    LEVELS,
    PAE_L3_ENTRIES,
    PTE_A,
    PTE_D,
    PTE_FLAGS,
    PTE_FRAME_MASK,
    PTE_NX,
    PTE_P,
    PTE_PSE,
    PTE_RW,
    PTE_US,
    XEN_L4_SLOTS,
    XEN_PAE_L2_FIRST,
    XEN_VIRT_64,
    XEN_VIRT_PAE,
)
from xenpv.errors import Fault
from xenpv.frames import ENTRIES, IS_TABLE, NO_FRAME, PAGE_SHIFT, U8, U64, Frames, Mask, Pfn, Vaddr
from xenpv.memory.paging import PV, Paging
from xenpv.memory.radix import ReadFrames

BITS_PER_LEVEL = 9
AVAILABLE = 0x0000_0000_0000_0E00  # software's own bits 9 to 11
AVAILABLE_HIGH = 0x7FF0_0000_0000_0000  # and 52 to 62
NO_PFN = PTE_FRAME_MASK >> PAGE_SHIFT  # in a normalised entry: it names what is no frame of the domain
_GNTTAB = 1 << 62  # Xen's own in an L1 entry: a grant mapping
GLOBAL = 1 << 8
_NO_FRAME_BITS = ~np.uint64(PTE_FRAME_MASK)
_TABLE_FLAGS = PTE_P | PTE_RW | PTE_US | PTE_A | PTE_D | PTE_NX | AVAILABLE | AVAILABLE_HIGH


def allowed_flags(level: int, width: Width) -> int:
    """The bits outside the frame number that Xen accepts in a present entry of that level for a plain domU.

    xen.git:xen/arch/x86/mm.c: base_disallow_mask, L1_DISALLOW_MASK, l3_disallow_mask(). Caching bits in an L1 entry
    are for domains with devices of their own; such a domain cannot be saved.
    """
    if width == 4 and level == 3:
        return PTE_P | PTE_RW | PTE_US | PTE_A | PTE_D | AVAILABLE
    return (_TABLE_FLAGS | GLOBAL) & ~_GNTTAB if level == 1 else _TABLE_FLAGS


def flag_names(pte: int) -> str:
    """The flags of an entry for people: "P|RW|A|D|NX", "not present"."""
    if not pte & PTE_P:
        return "not present"
    return "|".join(name for bit, name in PTE_FLAGS.items() if pte & bit)


def frame(pte: int) -> Pfn:
    """The frame that an entry names."""
    return Pfn((pte & PTE_FRAME_MASK) >> PAGE_SHIFT)


def frames(ptes: U64) -> U64:
    """The frames that entries name."""
    return (ptes & np.uint64(PTE_FRAME_MASK)) >> np.uint64(PAGE_SHIFT)


def as_entries(pages: U8) -> U64:
    """Pages, uint8 (n, 4096), as entries, uint64 (n, 512), without a copy. Both widths have 64-bit entries (PAE)."""
    return pages.view("<u8").reshape(-1, ENTRIES)


def frames_of_tables(pages: U8, level: int) -> U64:
    """The frames that tables of that level, uint8 (n, 4096), name, uint64 (n, 512): NO_FRAME for an entry that is not
    present, or a superpage, which PV has not.
    """
    ptes = as_entries(pages)
    flags = np.uint64(PTE_P if level == 1 else PTE_P | PTE_PSE)
    return np.where(ptes & flags == np.uint64(PTE_P), frames(ptes), NO_FRAME)


def superpages(tables: U64, levels: U8 | int) -> Mask:
    """Which present entries of tables, uint64 (n, 512), claim a superpage, which PV has not; in an L1 that bit says
    something else. ``levels``: of all of them, or of each.
    """
    both = np.uint64(PTE_P | PTE_PSE)
    large: Mask = (tables & both == both) & (np.reshape(levels, (-1, 1)) > 1)
    return large


def bad_entry(domain: str, why: str, pfn: int, level: int, entry: int | None) -> Fault:
    """What is wrong with an entry of a domain's page table, or with all of the table, in libxenguest's words."""
    where = f"L{level}" + ("" if entry is None else f"[{entry}]")
    what = f"{domain}: Bad entry {where} of pfn {pfn:#x}: {why}"
    return Fault(what, space="pfn", address=pfn, level=level, entry=entry)


def cr3_frame(cr3: int, width: Width) -> int:
    """The frame that a cr3 names; a 32-bit one is folded (xen.git:xen/include/public/arch-x86/xen-x86_32.h)."""
    if width == 8:
        return cr3 >> PAGE_SHIFT
    return (cr3 >> 12 | cr3 << 20) & 0xFFFF_FFFF


def top_frame(context: np.void, width: Width, *, user: bool = False) -> int | None:
    """The machine frame of a vcpu's top table, by its vcpu_guest_context as Xen has it; None where there is none.

    ``user``: of its user half, which 64-bit guests may have.
    """
    value = int(context["ctrlreg"][1 if user else 3])
    return None if user and (width == 4 or not value) else cr3_frame(value, width)


def cr3_of(frame: int, width: Width) -> int:
    """The cr3 that names a frame, folded for a 32-bit guest: cr3_frame undoes it."""
    return frame << PAGE_SHIFT if width == 8 else (frame << 12 | frame >> 20) & 0xFFFF_FFFF


def place_of(vaddr: int) -> int:
    """The number of a page in the 48-bit address space, as Runs of page tables count."""
    return vaddr >> PAGE_SHIFT & (1 << 36) - 1


def canonical(vaddr: int) -> bool:
    """Whether a 64-bit address is sign-extended from bit 47."""
    return vaddr >> 47 in {0, 0x1FFFF}


def in_xen(vaddr: int, width: Width) -> bool:
    """Whether an address lies in what Xen keeps for itself."""
    return vaddr in (XEN_VIRT_64 if width == 8 else XEN_VIRT_PAE)


def entry_index(vaddr: int, level: int) -> int:
    """Which entry of a table of that level translates the address."""
    return vaddr >> PAGE_SHIFT + BITS_PER_LEVEL * (level - 1) & ENTRIES - 1


def is_xen_slot(level: int, width: Width, *, last_pae_l2: bool = False) -> Mask:
    """The entries of a table of that level that are Xen's, which a stream has empty: bool of shape (512,)."""
    slots = np.zeros(ENTRIES, np.bool_)
    if width == 8 and level == 4:
        slots[XEN_L4_SLOTS.start : XEN_L4_SLOTS.stop] = True
    elif width == 4 and level == 3:
        slots[PAE_L3_ENTRIES:] = True
    elif width == 4 and level == 2 and last_pae_l2:
        slots[XEN_PAE_L2_FIRST:] = True
    return slots


class Step(NamedTuple):
    """One entry on the way down: entry ``entry`` of the table at ``table``, a table of that level."""

    level: int
    table: Pfn
    entry: int
    pte: int


class Walk(NamedTuple):
    """A virtual address's way through the tables. ``pfn`` is None, and ``fault`` says why, when it ends early."""

    vaddr: Vaddr
    steps: tuple[Step, ...]
    pfn: Pfn | None
    fault: Fault | None = None


def walk(memory: Frames, top: Pfn, vaddr: Vaddr, width: Width = 8, paging: Paging | None = None) -> Walk:
    """Follow an address from the top table down. A walk that ends early is a result, not an error: see Walk.fault.

    ``paging``: how an HVM guest's vcpu does it; without, as a PV guest of that width.
    """
    paging = paging or PV[width]
    steps: list[Step] = []

    def ends(why: str, level: int) -> Walk:
        at = paging.index(vaddr, level)
        fault = Fault(f"{vaddr:#x}: {why}", space="vaddr", address=vaddr, level=level, entry=at)
        return Walk(vaddr, tuple(steps), None, fault)

    if why := paging.refuses(vaddr):
        return ends(why, paging.levels)
    if not paging.levels:
        return Walk(vaddr, (), Pfn(vaddr >> PAGE_SHIFT))
    table = top
    for level in range(paging.levels, 0, -1):
        try:
            page = memory.pages(np.array([table], np.uint64))
        except Fault as e:
            return ends(f"L{level} table at pfn {table:#x} has no content: {e}", level)
        index = paging.index(vaddr, level)
        pte = int(paging.entries(page, level)[0, index])
        steps.append(Step(level, table, index, pte))
        if not pte & PTE_P:
            if paging.pv and is_xen_slot(level, width)[index]:
                return ends(f"L{level}[{index}] is Xen's own slot, which no stream has", level)
            return ends(f"L{level}[{index}] of pfn {table:#x} is not present ({pte:#x})", level)
        if level in paging.superpages and pte & PTE_PSE:
            first = paging.superpage_frame(pte, level)
            return Walk(vaddr, tuple(steps), Pfn(first + paging.within(vaddr, level)))
        if paging.pv and level > 1 and pte & PTE_PSE:
            return ends(f"L{level}[{index}] of pfn {table:#x} is a superpage ({pte:#x}), which PV has not", level)
        table = frame(pte)
        if paging.pv and table == NO_PFN:
            return ends(f"L{level}[{index}] names a frame that is no pfn of the domain: another's, or Xen's", level)
    return Walk(vaddr, tuple(steps), table)


def translate(read: ReadFrames, top: Pfn, vaddrs: U64, paging: Paging) -> U64:
    """The pfns behind many virtual addresses that ``paging`` does not refuse, NO_FRAME for one that is not mapped.

    Each table is read once.
    """
    if not paging.levels:
        return vaddrs >> np.uint64(PAGE_SHIFT)
    out, left, table = np.full(len(vaddrs), NO_FRAME), np.arange(len(vaddrs)), np.full(len(vaddrs), top, np.uint64)
    for level in range(paging.levels, 0, -1):
        distinct, back = np.unique(table, return_inverse=True)
        pages, readable = read(distinct)
        ptes = paging.entries(pages, level)[back, paging.indices(vaddrs[left], level)]
        there = readable[back] & (ptes & np.uint64(PTE_P) != 0)
        big = there & paging.is_superpage(ptes, level)
        if big.any():
            of, back = np.unique(ptes[big], return_inverse=True)
            first = np.array([paging.superpage_frame(pte, level) for pte in of.tolist()], np.uint64)
            inside = np.uint64((1 << paging.bits * (level - 1)) - 1)
            out[left[big]] = first[back] + (vaddrs[left[big]] >> np.uint64(PAGE_SHIFT) & inside)
        if paging.pv:
            there &= frames(ptes) != np.uint64(NO_PFN)
            if level > 1:
                there &= ptes & np.uint64(PTE_PSE) == 0
        going = there & ~big
        left, table = left[going], frames(ptes[going])
    out[left] = table
    return out


Translate = Callable[[U64], U64]
"""translate(frames): what each is called on the other side, NO_FRAME for one that has no name there."""


def normalise(tables: U64, pfn_of: Translate, empty: Mask | None = None) -> tuple[U64, Mask]:
    """Tables with pfns in the place of mfns, and which present entries could not be translated.

    ``tables``: uint64 (n, 512). ``empty``: entries that are Xen's own (is_xen_slot), which come out as 0. Entries that
    are not present stay as they are; those that name what is no frame of the domain, or one of which an entry cannot
    hold the pfn, name NO_PFN, and are True in the mask. xen.git:tools/libs/guest/xg_sr_save_x86_pv.c
    normalise_pagetable().
    """
    kept = tables if empty is None else np.where(empty, np.uint64(0), tables)
    return _translated(kept, pfn_of)


def normalise_pages(pages: U8, kinds: U8, width: Width, pfn_of: Translate) -> None:
    """Normalise those of some pages, uint8 (n, 4096), in place, that are page tables by their types ``kinds``."""
    for level in range(1, LEVELS[width] + 1):
        tables = IS_TABLE[kinds] & (kinds & 7 == level)
        if tables.any():
            normal, no_pfn = normalise(as_entries(pages[tables]), pfn_of, is_xen_slot(level, width))
            if width == 4 and level == 2:
                # One L2 of a 32-bit guest ends with what is Xen's. A guest's own entry names a frame of its own.
                normal[no_pfn & is_xen_slot(level, 4, last_pae_l2=True)] = 0
            pages[tables] = normal.view(np.uint8).reshape(-1, pages.shape[1])


def localise(tables: U64, mfn_of: Translate) -> tuple[U64, Mask]:
    """Tables with mfns in the place of pfns, the inverse of normalise; and which entries could not be translated.

    xen.git:tools/libs/guest/xg_sr_restore_x86_pv.c x86_pv_localise_page().
    """
    return _translated(tables, mfn_of)


def _translated(tables: U64, translate: Translate) -> tuple[U64, Mask]:
    out, bad = tables.copy(), np.zeros(tables.shape, np.bool_)
    at = np.flatnonzero(tables & np.uint64(PTE_P))
    ptes = out.reshape(-1)[at]
    found = translate(frames(ptes))
    none = found >= np.uint64(NO_PFN)
    if none.any():
        bad.reshape(-1)[at[none]] = True
        found = np.where(none, np.uint64(NO_PFN), found)
    out.reshape(-1)[at] = ptes & _NO_FRAME_BITS | found << np.uint64(PAGE_SHIFT)
    return out, bad


def tables_needed(start: Vaddr, pages: int, width: Width = 8) -> dict[int, int]:
    """How many tables of each level map so many pages from an address on, the top table counted: {1: …, 2: …, …}."""
    first, last = start >> PAGE_SHIFT, (start >> PAGE_SHIFT) + pages - 1
    count = {}
    for level in range(1, LEVELS[width]):
        shift = BITS_PER_LEVEL * level
        count[level] = (last >> shift) - (first >> shift) + 1
    return count | {LEVELS[width]: 1}
