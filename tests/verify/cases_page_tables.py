"""Ways to break page tables."""

from __future__ import annotations

from tests.support.breakage import UNMAPPED, WIDTHS, Where, at_entry, at_page, case, free_entry, make_table
from tests.support.writers.domain import RW, Domain, P
from tests.support.writers.stream import PAGE, PIN
from xenpv.verify import rules

PWT, PCD, PSE, GLOBAL, NX = 1 << 3, 1 << 4, 1 << 7, 1 << 8, 1 << 63
TABLE = 0x67  # flags with which a table is named
LAST_L2 = 0xC000_0000  # addresses from here on go through a 32-bit guest's L3[3]


def leaf(d: Domain, pfn: int) -> tuple[int, int]:
    """The L1 table and entry that map a page in the kernel's mapping of all memory."""
    step = d.walk(d.vaddrs[pfn])[-1]
    return step.table, step.entry


def put(d: Domain, level: int, table: int, entry: int, pte: int) -> Where:
    d.table(table)[entry] = pte
    return at_entry(table, level, entry)


def put_new(d: Domain, level: int, pte: int, *, above: int = 0) -> Where:
    """A new entry in the table of that level that leads to the kernel's mapping."""
    table = next(s.table for s in d.walk(d.vaddrs[d.places.text]) if s.level == level)
    return put(d, level, table, free_entry(d, table, above=above), pte)


def flip(d: Domain, level: int, bits: int) -> Where:
    """Flip bits in the entry of that level through which the kernel's text is mapped."""
    step = next(s for s in d.walk(d.vaddrs[d.places.text]) if s.level == level)
    return put(d, level, step.table, step.entry, step.pte ^ bits)


# --- what an entry names ---------------------------------------------------------------------------------------------


@case(rules.PTE_RANGE, "L1", widths=WIDTHS)
def _(d: Domain) -> Where:
    return put_new(d, 1, d.entries << 12 | P)


@case(rules.PTE_RANGE, "L1, far beyond", widths=WIDTHS)
def _(d: Domain) -> Where:
    return put_new(d, 1, (1 << 40) - 1 << 12 | P)


@case(rules.PTE_RANGE, "L2", widths=WIDTHS)
def _(d: Domain) -> Where:
    return put_new(d, 2, d.entries << 12 | TABLE)


@case(rules.PTE_RANGE, "L4")
def _(d: Domain) -> Where:
    return put_new(d, 4, d.entries + 3 << 12 | TABLE)


@case(rules.PTE_MISSING, "L1, page is XTAB", widths=WIDTHS)
def _(d: Domain) -> Where:
    return put_new(d, 1, d.entries - 1 << 12 | P)


def forget_97(d: Domain) -> None:
    del d.types[97]


@case(rules.PTE_MISSING, "L1, no such page", widths=WIDTHS, prepare=forget_97, ballooned=[96, 97, 98])
def _(d: Domain) -> Where:
    return put_new(d, 1, 97 << 12 | P)


@case(rules.PTE_MISSING, "L2", widths=WIDTHS)
def _(d: Domain) -> Where:
    return put_new(d, 2, d.entries - 1 << 12 | TABLE)


@case(rules.PTE_MISSING, "L4")
def _(d: Domain) -> Where:
    return put_new(d, 4, d.entries - 1 << 12 | TABLE)


@case(rules.PTE_LEVEL, "L2 names an ordinary page", widths=WIDTHS)
def _(d: Domain) -> Where:
    return put_new(d, 2, d.places.data[0] << 12 | TABLE)


@case(rules.PTE_LEVEL, "L2 names the table above", widths=WIDTHS)
def _(d: Domain) -> Where:
    return put_new(d, 2, d.walk(d.vaddrs[0])[-3].table << 12 | P)


@case(rules.PTE_LEVEL, "L3 names an L1")
def _(d: Domain) -> Where:
    return put_new(d, 3, d.tables(1)[0] << 12 | TABLE)


@case(rules.PTE_LEVEL, "32-bit L3 names an L1", widths=(4,))
def _(d: Domain) -> Where:
    return put(d, 3, d.places.top, 1, d.tables(1)[0] << 12 | P)


@case(rules.PTE_LEVEL, "L4 names an L2")
def _(d: Domain) -> Where:
    return put_new(d, 4, d.tables(2)[0] << 12 | TABLE, above=300)


# --- writable mappings -----------------------------------------------------------------------------------------------


@case(rules.PTE_WRITABLE, "of an L1 table", widths=WIDTHS)
def _(d: Domain) -> Where:
    table, entry = leaf(d, d.tables(1)[0])
    return put(d, 1, table, entry, int(d.table(table)[entry]) | RW)


@case(rules.PTE_WRITABLE, "of the pinned top table", widths=WIDTHS)
def _(d: Domain) -> Where:
    table, entry = leaf(d, d.places.top)
    return put(d, 1, table, entry, int(d.table(table)[entry]) | RW)


@case(rules.PTE_WRITABLE, "of a GDT", widths=WIDTHS, vcpus=3, gdt_frames=2)
def _(d: Domain) -> Where:
    table, entry = leaf(d, d.places.gdt[-1])
    return put(d, 1, table, entry, int(d.table(table)[entry]) | RW)


@case(rules.LINEAR_TABLE, "L2", widths=WIDTHS)
def _(d: Domain) -> Where:
    table = d.walk(d.vaddrs[0])[-2].table
    return put_new(d, 2, table << 12 | TABLE)


@case(rules.LINEAR_TABLE, "L4")
def _(d: Domain) -> Where:
    return put_new(d, 4, d.places.top << 12 | TABLE)


# --- flags -----------------------------------------------------------------------------------------------------------


@case(rules.SUPERPAGE, "L2", widths=WIDTHS, may=UNMAPPED)
def _(d: Domain) -> Where:
    return flip(d, 2, PSE)


@case(rules.SUPERPAGE, "L3", widths=WIDTHS, may={*UNMAPPED, "p2m-anchor"})  # it may have mapped the list, too
def _(d: Domain) -> Where:
    return flip(d, 3, PSE)


@case(rules.PTE_FLAGS, "write-through in L1", widths=WIDTHS)
def _(d: Domain) -> Where:
    return flip(d, 1, PWT)


@case(rules.PTE_FLAGS, "PAT in L1", widths=WIDTHS)
def _(d: Domain) -> Where:
    return flip(d, 1, PSE)


@case(rules.PTE_FLAGS, "Xen's own grant bit in L1", widths=WIDTHS)
def _(d: Domain) -> Where:
    return flip(d, 1, 1 << 62)


@case(rules.PTE_FLAGS, "uncached in L2", widths=WIDTHS)
def _(d: Domain) -> Where:
    return flip(d, 2, PCD)


@case(rules.PTE_FLAGS, "global in L2", widths=WIDTHS)
def _(d: Domain) -> Where:
    return flip(d, 2, GLOBAL)


@case(rules.PTE_FLAGS, "uncached in L4")
def _(d: Domain) -> Where:
    return flip(d, 4, PCD)


@case(rules.PTE_FLAGS, "no-execute in a 32-bit L3", widths=(4,))
def _(d: Domain) -> Where:
    return flip(d, 3, NX)


# --- slots and roots -------------------------------------------------------------------------------------------------


@case(rules.XEN_SLOT, "first of L4")
def _(d: Domain) -> Where:
    return put(d, 4, d.places.top, 256, d.tables(3)[0] << 12 | TABLE)


@case(rules.XEN_SLOT, "last of L4, not even present")
def _(d: Domain) -> Where:
    return put(d, 4, d.places.user_top, 271, 1 << 20)


@case(rules.XEN_SLOT, "fifth of a 32-bit L3", widths=(4,))
def _(d: Domain) -> Where:
    return put(d, 3, d.places.top, 4, d.tables(2)[0] << 12 | P)


@case(rules.XEN_SLOT, "in the L2 behind L3[3]", widths=(4,))
def _(d: Domain) -> Where:
    table = d.walk(LAST_L2)[1].table
    return put(d, 2, table, (0xF580_0000 >> 21) & 511, d.tables(1)[0] << 12 | TABLE)


def second_root(d: Domain) -> None:
    """Another L3, pinned, as another process has; its last L2 is empty."""
    first, second = d.places.data[0], d.places.data[1]
    make_table(d, first, 3, PIN)
    d.table(first)[3] = make_table(d, second, 2) << 12 | P


@case(rules.TABLE_LEVEL, "an L4 table that nothing names", widths=(4,), also={rules.TABLE_ORPHAN})
def _(d: Domain) -> Where:
    return Where({"pfn": make_table(d, d.places.data[0], 4), "level": 4})


@case(rules.TABLE_LEVEL, "a pinned L4 table", widths=(4,))
def _(d: Domain) -> Where:
    return Where({"pfn": make_table(d, d.places.data[0], 4, PIN), "level": 4})


@case(rules.PAE_L3, "entry 3 is not present", widths=(4,), prepare=second_root, also={rules.TABLE_ORPHAN})
def _(d: Domain) -> Where:
    return put(d, 3, d.places.data[0], 3, 0)


@case(rules.PAE_L3, "its L2 is another root's, too", widths=(4,), prepare=second_root)
def _(d: Domain) -> Where:
    shared = d.walk(LAST_L2)[1].table
    d.table(d.places.data[0])[0] = shared << 12 | P
    return at_page(shared, level=2)


# --- tables that are there -------------------------------------------------------------------------------------------


@case(rules.TABLE_ORPHAN, "not named, not pinned", widths=WIDTHS)
def _(d: Domain) -> Where:
    return at_page(make_table(d, d.places.data[0], 1), level=1)


@case(rules.TABLE_ORPHAN, "a top table that no vcpu uses", widths=(8,))
def _(d: Domain) -> Where:
    return at_page(make_table(d, d.places.data[0], 4), level=4)


# --- tables that map their own level, as of NetBSD and of old Linux --------------------------------------------------


def two_l4s(d: Domain) -> tuple[int, int]:
    """Two more pinned L4 tables, the first of which has the lower pfn."""
    one, two = sorted(make_table(d, pfn, 4, PIN) for pfn in d.places.data[:2])
    return one, two


@case(rules.LINEAR_TABLE_USED, "itself")
def _(d: Domain) -> Where:
    return put(d, 4, d.places.top, 300, d.places.top << 12 | P)


@case(rules.LINEAR_TABLE_USED, "a table that is promoted before")
def _(d: Domain) -> Where:
    one, two = two_l4s(d)
    put(d, 4, two, 300, one << 12 | P)
    return at_entry(two, 4, 300).without_bytes()


@case(rules.LINEAR_TABLE, "a table that is promoted later", also=[rules.LINEAR_TABLE_USED])
def _(d: Domain) -> Where:
    one, two = two_l4s(d)
    put(d, 4, one, 300, two << 12 | P)
    return at_entry(one, 4, 300).without_bytes()


@case(rules.LINEAR_TABLE, "two L4s map each other", also=[rules.LINEAR_TABLE_USED, rules.LINEAR_TABLE])
def _(d: Domain) -> Where:
    one, two = two_l4s(d)
    put(d, 4, one, 300, two << 12 | P)
    put(d, 4, two, 300, one << 12 | P)
    return at_entry(one, 4, 300).without_bytes()


@case(rules.LINEAR_TABLE, "two L3s map each other", also=[rules.LINEAR_TABLE_USED, rules.LINEAR_TABLE])
def _(d: Domain) -> Where:
    one, two = (make_table(d, pfn, 3, PIN) for pfn in d.places.data[:2])
    put(d, 3, one, 300, two << 12 | P)
    put(d, 3, two, 300, one << 12 | P)
    return at_entry(two, 3, 300).without_bytes()


@case(rules.LINEAR_TABLE, "a chain of three L2s", also=[rules.LINEAR_TABLE_USED])
def _(d: Domain) -> Where:
    one, two, three = (make_table(d, pfn, 2, PIN) for pfn in d.places.data[:3])
    put(d, 2, two, 300, one << 12 | P)
    put(d, 2, three, 300, two << 12 | P)
    return at_entry(two, 2, 300).without_bytes()


# --- entries that are not present ------------------------------------------------------------------------------------

SWAPPED = 0x8010_0000_1360_0066  # in Xen's words: "L1TF-vulnerable L1e"


@case(rules.PTE_L1TF, "L1", widths=WIDTHS)
def _(d: Domain) -> Where:
    return put_new(d, 1, SWAPPED)


@case(rules.PTE_L1TF, "L2", widths=WIDTHS)
def _(d: Domain) -> Where:
    return put_new(d, 2, SWAPPED)


@case(rules.PTE_L1TF, "L2, large", widths=WIDTHS)
def _(d: Domain) -> Where:
    return put_new(d, 2, PSE | 0x66)


@case(rules.PTE_L1TF, "L4")
def _(d: Domain) -> Where:
    return put_new(d, 4, SWAPPED)


@case(rules.PTE_L1TF, "below the top quarter of 46 bits", widths=WIDTHS)
def _(d: Domain) -> Where:
    return put_new(d, 1, (3 << 44) - PAGE)


@case(rules.PTE_L1TF, "high bits that a desktop's cache does not compare")
def _(d: Domain) -> Where:
    return put_new(d, 1, 3 << 44 | PAGE)
