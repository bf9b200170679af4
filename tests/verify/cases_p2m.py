"""Ways to break the p2m, its anchors, and the pages that it maps."""

from __future__ import annotations

from tests.support.breakage import WIDTHS, Where, at_p2m_entry, at_record, case, lose, nowhere
from tests.support.writers.domain import Domain
from tests.support.writers.stream import BROKEN, XTAB
from xenpv.verify import rules

FRAMES = "X86_PV_P2M_FRAMES"
MANY = [*range(128), 1030, 2050, 3100]  # four p2m frames in use at 8 bytes an entry, and holes between them


def name_frame(d: Domain, i: int, pfn: int) -> Where:
    d.p2m_pfns[i] = pfn
    return at_record(FRAMES, at=16 + 8 * i, extent=8, pfn=pfn, entry=i)


@case(rules.P2M_FRAME, "beyond the end", widths=WIDTHS, pfns=MANY, also={rules.P2M_ANCHOR})
def _(d: Domain) -> Where:
    return name_frame(d, 2, d.entries + 1)


@case(rules.P2M_FRAME, "a page table", widths=WIDTHS, pfns=MANY, also={rules.P2M_ANCHOR})
def _(d: Domain) -> Where:
    pfn = d.tables(d.levels)[-1]
    return name_frame(d, 2, pfn)


@case(rules.P2M_FRAME, "no such page", widths=WIDTHS, pfns=MANY, also={rules.P2M_ANCHOR})
def _(d: Domain) -> Where:
    return name_frame(d, 3 if d.width == 8 else 2, d.entries - 1)


@case(rules.P2M_REPEATED, "two parts with pages", widths=WIDTHS, pfns=MANY, also={rules.P2M_ANCHOR})
def _(d: Domain) -> Where:
    return name_frame(d, 4 if d.width == 8 else 3, int(d.p2m_pfns[2]))


@case(rules.P2M_REPEATED, "a part with pages shares the missing frame", pfns=MANY,
      also={rules.P2M_ANCHOR})  # fmt: skip
def _(d: Domain) -> Where:
    return name_frame(d, 4, d.places.p2m_missing)


@case(rules.P2M_EXTENT, "shared info says less", widths=WIDTHS)
def _(d: Domain) -> Where:
    d.shared_info["arch"]["max_pfn"] -= 1
    return at_record("SHARED_INFO")


@case(rules.P2M_EXTENT, "shared info says nothing", widths=WIDTHS)
def _(d: Domain) -> Where:
    d.shared_info["arch"]["max_pfn"] = 0
    return at_record("SHARED_INFO")


@case(rules.P2M_EXTENT, "shared info says more, and the p2m does not end with a frame", widths=WIDTHS)
def _(d: Domain) -> Where:
    d.shared_info["arch"]["max_pfn"] += 300
    return at_record("SHARED_INFO")


@case(rules.P2M_START, "not from pfn 0 on", widths=WIDTHS, rewrite=lambda s: s.patch(FRAMES, 8, b"\3"))
def _(d: Domain) -> Where:
    return at_record(FRAMES)


@case(rules.P2M_GENERATION, "odd", widths=WIDTHS)
def _(d: Domain) -> Where:
    d.shared_info["arch"]["p2m_generation"] |= 1
    return at_record("SHARED_INFO")


# --- anchors ---------------------------------------------------------------------------------------------------------


@case(rules.P2M_ANCHOR, "none", widths=WIDTHS, linear=True)
def _(d: Domain) -> Where:
    d.shared_info["arch"]["p2m_cr3"] = 0
    return at_record("SHARED_INFO", entry=None)


@case(rules.P2M_ANCHOR, "cr3 that was no page of the domain", widths=WIDTHS)
def _(d: Domain) -> Where:
    d.shared_info["arch"]["p2m_cr3"] = d.cr3(0x12345)
    return at_record("SHARED_INFO", entry=None)


@case(rules.P2M_ANCHOR, "list in Xen", widths=WIDTHS)
def _(d: Domain) -> Where:
    d.shared_info["arch"]["p2m_vaddr"] = 0xFFFF_8000_0000_0000 if d.width == 8 else 0xF580_0000
    return at_record("SHARED_INFO", entry=None)


@case(rules.P2M_ANCHOR, "list where nothing is mapped", widths=WIDTHS)
def _(d: Domain) -> Where:
    d.shared_info["arch"]["p2m_vaddr"] += 1 << 21
    return at_record("SHARED_INFO", entry=0)


@case(rules.P2M_ANCHOR, "list is not mapped as the stream says", widths=WIDTHS, pfns=MANY)
def _(d: Domain) -> Where:
    d.set_pte(d.p2m_vaddr + 2 * 4096, d.places.data[0] << 12 | 0x67)
    return at_record("SHARED_INFO", extent=0, entry=2)


@case(rules.P2M_ANCHOR, "frame list list that was no page of the domain", widths=WIDTHS, tree=True, linear=False)
def _(d: Domain) -> Where:
    d.shared_info["arch"]["pfn_to_mfn_frame_list_list"] = 0x12345
    return at_record("SHARED_INFO", entry=None)


@case(rules.P2M_ANCHOR, "frame list that was no page of the domain", widths=WIDTHS, tree=True)
def _(d: Domain) -> Where:
    d.p2m_frame(d.places.tree_top)[0] = 0x12345
    return at_record("SHARED_INFO", extent=0, entry=0)


@case(rules.P2M_ANCHOR, "tree leads elsewhere", widths=WIDTHS, tree=True, pfns=MANY)
def _(d: Domain) -> Where:
    d.p2m_frame(d.places.tree_mid[0])[2] = d.mfns[d.places.data[0]]
    return at_record("SHARED_INFO", extent=0, entry=2)


# --- which pages there are -------------------------------------------------------------------------------------------


@case(rules.PAGE_MISSING, "never sent", widths=WIDTHS)
def _(d: Domain) -> Where:
    lose(d, d.places.data[0])
    return at_p2m_entry(d, d.places.data[0]).without_bytes()


@case(rules.PAGE_MISSING, "sent as XTAB", widths=WIDTHS)
def _(d: Domain) -> Where:
    lose(d, d.places.data[0], XTAB)
    return at_p2m_entry(d, d.places.data[0]).without_bytes()


@case(rules.PAGE_UNMAPPED, "its p2m entry is invalid", widths=WIDTHS)
def _(d: Domain) -> Where:
    pfn = d.places.data[0]
    d.p2m_frame(int(d.p2m_pfns[0]))[pfn] = (1 << 8 * d.width) - 1
    return at_p2m_entry(d, pfn)


@case(rules.PAGE_UNMAPPED, "its p2m entry is foreign")
def _(d: Domain) -> Where:
    pfn = d.places.data[0]
    d.p2m_frame(int(d.p2m_pfns[0]))[pfn] |= 1 << 63
    return at_p2m_entry(d, pfn)


@case(rules.PAGE_BROKEN, "one page", widths=WIDTHS)
def _(d: Domain) -> Where:
    lose(d, d.places.data[0], BROKEN)
    return nowhere(pfn=d.places.data[0])


@case(rules.MEMORY_LIMIT, "a page beyond maxmem", widths=WIDTHS, pfns=range(400), config={"memory_kib": 143 * 4})
def _(d: Domain) -> Where:
    assert len(d.pages) == 143 + 256 + 1
    return nowhere(pfn=None)
