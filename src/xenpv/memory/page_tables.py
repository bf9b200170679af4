"""Page tables whose entries hold pfns: entries, walks and bulk operations.

A PV guest's tables hold mfns. The saver normalises them (mfn to pfn) for a stream; for a running domain and for a core
that is done before a walk. An HVM guest's tables hold gfns, which are its pfns.
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
from xenpv.frames import ENTRIES, IS_TABLE, NO_FRAME, PAGE_SHIFT, PAGE_SIZE, U8, U64, Frames, Mask, Pfn, Vaddr
from xenpv.memory.frame_tree import ReadFrames
from xenpv.memory.paging import PV_PAGING, Paging

BITS_PER_LEVEL = 9
PTE_AVAILABLE = 0x0000_0000_0000_0E00  # bits 9 to 11, for software
PTE_AVAILABLE_HIGH = 0x7FF0_0000_0000_0000  # bits 52 to 62, for software
NO_PFN = PTE_FRAME_MASK >> PAGE_SHIFT  # a normalised entry's frame number if the frame is not the domain's
_GNTTAB = 1 << 62  # Xen's own bit in an L1 entry: a grant mapping
PTE_GLOBAL = 1 << 8
# Bits of an address in the L1 cache, and where safe addresses begin: the largest servers with the flaw, large ones
# before, and desktops, whose caches know more bits than their buses have.
_L1TF_HOSTS = ((46, 3 << 44), (44, 3 << 42), (44, 1 << 39))
_NO_FRAME_BITS = ~np.uint64(PTE_FRAME_MASK)
_TABLE_FLAGS = PTE_P | PTE_RW | PTE_US | PTE_A | PTE_D | PTE_NX | PTE_AVAILABLE | PTE_AVAILABLE_HIGH


def allowed_flags(level: int, width: Width) -> int:
    """Return the bits outside the frame number that Xen accepts.

    They hold for a present entry of a plain domU.

    Caching bits in an L1 entry are for domains with devices of their own; such a domain cannot be saved.

    Source:
        xen.git:xen/arch/x86/mm.c base_disallow_mask, L1_DISALLOW_MASK, l3_disallow_mask()
    """
    if width == 4 and level == 3:
        return PTE_P | PTE_RW | PTE_US | PTE_A | PTE_D | PTE_AVAILABLE
    return (_TABLE_FLAGS | PTE_GLOBAL) & ~_GNTTAB if level == 1 else _TABLE_FLAGS


def flag_names(pte: int) -> str:
    """Return the flags of an entry for people: "P|RW|A|D|NX", "not present"."""
    if not pte & PTE_P:
        return "not present"
    return "|".join(name for bit, name in PTE_FLAGS.items() if pte & bit)


def pte_frame(pte: int) -> Pfn:
    """Return the frame number in an entry."""
    return Pfn((pte & PTE_FRAME_MASK) >> PAGE_SHIFT)


def pte_frames(ptes: U64) -> U64:
    """Return the frame number in each entry, of the same shape."""
    return (ptes & np.uint64(PTE_FRAME_MASK)) >> np.uint64(PAGE_SHIFT)


def as_ptes(pages: U8) -> U64:
    """View pages, uint8 (n, 4096), as entries, uint64 (n, 512).

    Both widths have 64-bit entries (PAE).
    """
    return pages.view("<u8").reshape(-1, ENTRIES)


def decode_page_tables(pages: U8, level: int) -> U64:
    """Return the frames that tables of one level name, for frame_tree.walk_tree().

    Args:
        pages: the tables, uint8 of shape (n, 4096).
        level: their level, 1 for L1.

    Returns:
        uint64 of shape (n, 512), NO_FRAME for an entry that is not present, or a superpage, which is not valid in PV.
    """
    ptes = as_ptes(pages)
    flags = np.uint64(PTE_P if level == 1 else PTE_P | PTE_PSE)
    return np.where(ptes & flags == np.uint64(PTE_P), pte_frames(ptes), NO_FRAME)


def find_superpages(tables: U64, levels: U8 | int) -> Mask:
    """Return which present entries have the superpage bit.

    Superpages are not valid in PV. In an L1 the bit means something else.

    Args:
        tables: uint64 of shape (n, 512).
        levels: the level of all tables, or of each.
    """
    both = np.uint64(PTE_P | PTE_PSE)
    is_superpage: Mask = (tables & both == both) & (np.reshape(levels, (-1, 1)) > 1)
    return is_superpage


def entries_beyond(tables: U64, end_pfn: int) -> Mask:
    """Return which present entries name a pfn beyond the last one of the p2m.

    libxenguest dies of an assertion at each of them.

    Source:
        xen.git:tools/libs/guest/xg_sr_restore_x86_pv.c x86_pv_localise_page(), x86_pv_pfn_to_gfn()
    """
    return np.asarray((tables & np.uint64(PTE_P) != 0) & (pte_frames(tables) > np.uint64(max(end_pfn, 0))))


def leaks_l1tf(tables: U64, level: int) -> Mask:
    """Return which entries Xen takes for vulnerable to L1TF on a host with that flaw.

    A processor with the flaw takes the address of an entry that is not present for valid, and reads from its cache what
    is there. Addresses above all memory are safe; Linux stores the complement of a swap entry for that reason. Where
    they begin is the host's: the widest and the narrowest of the processors concerned are asked.

    Source:
        xen.git:xen/arch/x86/include/asm/shadow.h pv_l1tf_check_pte(), xen/arch/x86/spec_ctrl.c l1tf_calculations()
    """
    absent = tables & np.uint64(PTE_P) == 0
    if not (tables[absent]).any():
        return np.zeros(tables.shape, np.bool_)
    vulnerable = np.zeros(tables.shape, np.bool_)
    for cache_bits, safe in _L1TF_HOSTS:
        address = tables & np.uint64((1 << cache_bits) - PAGE_SIZE)
        vulnerable |= (address != 0) & (address < np.uint64(safe))
    if level > 1:
        vulnerable |= tables & np.uint64(PTE_PSE) != 0
    return np.asarray(absent & vulnerable)


def bad_entry_fault(domain: str, reason: str, pfn: int, level: int, entry: int | None) -> Fault:
    """Return the Fault for a bad page-table entry, in libxenguest's words.

    ``entry`` is None if the whole table is bad.
    """
    place = f"L{level}" + ("" if entry is None else f"[{entry}]")
    message = f"{domain}: Bad entry {place} of pfn {pfn:#x}: {reason}"
    return Fault(message, space="pfn", address=pfn, level=level, entry=entry)


def cr3_to_frame(cr3: int, width: Width) -> int:
    """Return the frame that a cr3 names; a 32-bit guest's cr3 is folded.

    Source:
        xen.git:xen/include/public/arch-x86/xen-x86_32.h
    """
    if width == 8:
        return cr3 >> PAGE_SHIFT
    return (cr3 >> 12 | cr3 << 20) & 0xFFFF_FFFF


def frame_to_cr3(pte_frame: int, width: Width) -> int:
    """Return the cr3 that names a frame; the inverse of cr3_to_frame."""
    return pte_frame << PAGE_SHIFT if width == 8 else (pte_frame << 12 | pte_frame >> 20) & 0xFFFF_FFFF


def top_table_mfn(context: np.void, width: Width, *, user: bool = False) -> int | None:
    """Return the mfn of a vcpu's top table, None if it has none.

    Args:
        context: its vcpu_guest_context as Xen has it.
        width: bytes of the guest's unsigned long.
        user: whether to return that of the user half, which 64-bit guests may have.
    """
    value = int(context["ctrlreg"][1 if user else 3])
    return None if user and (width == 4 or not value) else cr3_to_frame(value, width)


def page_number(vaddr: int) -> int:
    """Return the number of an address's page in the 48-bit address space."""
    return vaddr >> PAGE_SHIFT & (1 << 36) - 1


def is_canonical(vaddr: int) -> bool:
    """Return whether a 64-bit address is sign-extended from bit 47."""
    return vaddr >> 47 in {0, 0x1FFFF}


def is_xen_vaddr(vaddr: int, width: Width) -> bool:
    """Return whether an address lies in the address range that Xen reserves."""
    return vaddr in (XEN_VIRT_64 if width == 8 else XEN_VIRT_PAE)


def pte_index(vaddr: int, level: int) -> int:
    """Return the index of the entry that translates an address at that level."""
    return vaddr >> PAGE_SHIFT + BITS_PER_LEVEL * (level - 1) & ENTRIES - 1


def is_xen_slot(level: int, width: Width, *, last_pae_l2: bool = False) -> Mask:
    """Return which entries of a table are Xen's own; bool of shape (512,).

    A stream has these entries empty.

    Args:
        level: the level of the table.
        width: bytes of the guest's unsigned long.
        last_pae_l2: whether it is the L2 of the last entry of a 32-bit guest's L3.
    """
    slots = np.zeros(ENTRIES, np.bool_)
    if width == 8 and level == 4:
        slots[XEN_L4_SLOTS.start : XEN_L4_SLOTS.stop] = True
    elif width == 4 and level == 3:
        slots[PAE_L3_ENTRIES:] = True
    elif width == 4 and level == 2 and last_pae_l2:
        slots[XEN_PAE_L2_FIRST:] = True
    return slots


class WalkStep(NamedTuple):
    """One entry of a walk.

    It has its table's level and pfn, its index in the table, and its value.
    """

    level: int
    table: Pfn
    entry: int
    pte: int


class Walk(NamedTuple):
    """The translation of a virtual address, entry by entry.

    Attributes:
        vaddr: the address.
        steps: the entries that translate it, from the top table down.
        pfn: the page, None if the walk ended early.
        fault: why it ended early.
    """

    vaddr: Vaddr
    steps: tuple[WalkStep, ...]
    pfn: Pfn | None
    fault: Fault | None = None


def walk_vaddr(memory: Frames, top: Pfn, vaddr: Vaddr, width: Width = 8, paging: Paging | None = None) -> Walk:
    """Translate one address, and return all entries on the path.

    A fault is part of the result; it is not raised.

    Args:
        memory: reads the tables.
        top: the pfn of the top table.
        vaddr: the address.
        width: bytes of the guest's unsigned long.
        paging: the paging mode of an HVM guest's vcpu; None for a PV guest of that width.
    """
    paging = paging or PV_PAGING[width]
    steps: list[WalkStep] = []

    def end_early(problem: str, level: int) -> Walk:
        entry = paging.pte_index(vaddr, level)
        fault = Fault(f"{vaddr:#x}: {problem}", space="vaddr", address=vaddr, level=level, entry=entry)
        return Walk(vaddr, tuple(steps), None, fault)

    if reason := paging.invalid_reason(vaddr):
        return end_early(reason, paging.levels)
    if not paging.levels:
        return Walk(vaddr, (), Pfn(vaddr >> PAGE_SHIFT))
    table = top
    for level in range(paging.levels, 0, -1):
        try:
            page = memory.pages(np.array([table], np.uint64))
        except Fault as e:
            return end_early(f"L{level} table at pfn {table:#x} has no content: {e}", level)
        index = paging.pte_index(vaddr, level)
        pte = int(paging.decode(page, level)[0, index])
        steps.append(WalkStep(level, table, index, pte))
        if not pte & PTE_P:
            if paging.pv and is_xen_slot(level, width)[index]:
                return end_early(f"L{level}[{index}] is Xen's own slot, which no stream has", level)
            return end_early(f"L{level}[{index}] of pfn {table:#x} is not present ({pte:#x})", level)
        if level in paging.superpage_levels and pte & PTE_PSE:
            first = paging.superpage_frame(pte, level)
            return Walk(vaddr, tuple(steps), Pfn(first + paging.superpage_offset(vaddr, level)))
        if paging.pv and level > 1 and pte & PTE_PSE:
            return end_early(f"L{level}[{index}] of pfn {table:#x} is a superpage ({pte:#x}), which PV has not", level)
        table = pte_frame(pte)
        if paging.pv and table == NO_PFN:
            return end_early(
                f"L{level}[{index}] names a frame that is no pfn of the domain: another's, or Xen's", level
            )
    return Walk(vaddr, tuple(steps), table)


def translate(read: ReadFrames, top: Pfn, vaddrs: U64, paging: Paging) -> U64:
    """Return the pfn that each address maps to, NO_FRAME for an unmapped one.

    Each table is read once.

    Args:
        read: reads the tables.
        top: the pfn of the top table.
        vaddrs: addresses that ``paging`` can translate (Paging.invalid_reason).
        paging: the paging mode.
    """
    if not paging.levels:
        return vaddrs >> np.uint64(PAGE_SHIFT)
    out, rows = np.full(len(vaddrs), NO_FRAME), np.arange(len(vaddrs))  # rows: of the addresses not yet translated
    table = np.full(len(vaddrs), top, np.uint64)
    for level in range(paging.levels, 0, -1):
        distinct, table_row = np.unique(table, return_inverse=True)
        pages, readable = read(distinct)
        ptes = paging.decode(pages, level)[table_row, paging.pte_indices(vaddrs[rows], level)]
        present = readable[table_row] & (ptes & np.uint64(PTE_P) != 0)
        is_superpage = present & paging.is_superpage(ptes, level)
        if is_superpage.any():
            find_superpages, superpage_row = np.unique(ptes[is_superpage], return_inverse=True)
            first = np.array([paging.superpage_frame(pte, level) for pte in find_superpages.tolist()], np.uint64)
            offset_mask = np.uint64((1 << paging.index_bits * (level - 1)) - 1)
            offset = vaddrs[rows[is_superpage]] >> np.uint64(PAGE_SHIFT) & offset_mask
            out[rows[is_superpage]] = first[superpage_row] + offset
        if paging.pv:
            present &= pte_frames(ptes) != np.uint64(NO_PFN)
            if level > 1:
                present &= ptes & np.uint64(PTE_PSE) == 0
        descends = present & ~is_superpage
        rows, table = rows[descends], pte_frames(ptes[descends])
    out[rows] = table
    return out


Translate = Callable[[U64], U64]
"""translate(frames): mfns for pfns, or pfns for mfns; NO_FRAME for one that has none."""


def normalise(tables: U64, pfn_of: Translate, xen_slots: Mask | None = None) -> tuple[U64, Mask]:
    """Replace the mfns in page tables by pfns.

    Entries that are not present stay as they are. An entry whose frame is not the domain's, or whose pfn does not fit
    an entry, names NO_PFN.

    Args:
        tables: uint64 of shape (n, 512).
        pfn_of: translates mfns.
        xen_slots: entries that are Xen's own (is_xen_slot), which come out as 0.

    Returns:
        The tables, and which present entries could not be translated.

    Source:
        xen.git:tools/libs/guest/xg_sr_save_x86_pv.c normalise_pagetable()
    """
    without_xen = tables if xen_slots is None else np.where(xen_slots, np.uint64(0), tables)
    return _replace_frames(without_xen, pfn_of)


def normalise_pages(pages: U8, types: U8, width: Width, pfn_of: Translate) -> None:
    """Normalise, in place, those of the pages that are page tables.

    Args:
        pages: uint8 of shape (n, 4096).
        types: the page type of each.
        width: bytes of the guest's unsigned long.
        pfn_of: translates mfns.
    """
    for level in range(1, LEVELS[width] + 1):
        tables = IS_TABLE[types] & (types & 7 == level)
        if tables.any():
            normal, no_pfn = normalise(as_ptes(pages[tables]), pfn_of, is_xen_slot(level, width))
            if width == 4 and level == 2:
                # One L2 of a 32-bit guest ends with Xen's own slots. A guest's own entries name frames of its own.
                normal[no_pfn & is_xen_slot(level, 4, last_pae_l2=True)] = 0
            pages[tables] = normal.view(np.uint8).reshape(-1, pages.shape[1])


def localise(tables: U64, mfn_of: Translate) -> tuple[U64, Mask]:
    """Replace the pfns in page tables by mfns: the inverse of normalise.

    Returns:
        The tables, and which present entries could not be translated.

    Source:
        xen.git:tools/libs/guest/xg_sr_restore_x86_pv.c x86_pv_localise_page()
    """
    return _replace_frames(tables, mfn_of)


def _replace_frames(tables: U64, translate: Translate) -> tuple[U64, Mask]:
    out, bad = tables.copy(), np.zeros(tables.shape, np.bool_)
    present = np.flatnonzero(tables & np.uint64(PTE_P))
    ptes = out.reshape(-1)[present]
    translated = translate(pte_frames(ptes))
    fails = translated >= np.uint64(NO_PFN)
    if fails.any():
        bad.reshape(-1)[present[fails]] = True
        translated = np.where(fails, np.uint64(NO_PFN), translated)
    out.reshape(-1)[present] = ptes & _NO_FRAME_BITS | translated << np.uint64(PAGE_SHIFT)
    return out, bad


def count_tables(start: Vaddr, pages: int, width: Width = 8) -> dict[int, int]:
    """Return how many tables of each level map so many pages from an address on.

    The result is {1: …, 2: …, top level: 1}.
    """
    first, last = start >> PAGE_SHIFT, (start >> PAGE_SHIFT) + pages - 1
    count = {}
    for level in range(1, LEVELS[width]):
        shift = BITS_PER_LEVEL * level
        count[level] = (last >> shift) - (first >> shift) + 1
    return count | {LEVELS[width]: 1}
