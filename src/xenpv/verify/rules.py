"""The rules for a saved PV domain.

They are what libxenguest and Xen demand at restore, and what no other tool checks.

Functions without a path are in xen.git:tools/libs/guest/xg_sr_restore_x86_pv.c, xen.git:xen/arch/x86/domain.c or
xen.git:xen/arch/x86/mm.c.
"""

from __future__ import annotations

from xenpv.cpu.rules import (
    CPUID_POLICY,
    GDT_DESCRIPTOR,
    LDT_DESCRIPTOR,
    MSR_POLICY,
    TSC_CLOCK,
    TSC_INFO,
    VCPU_EXTENDED,
    VCPU_MSRS,
    VCPU_STATE,
    VCPU_XSAVE,
)
from xenpv.findings import Rule, Severity

__all__ = [
    "CPUID_POLICY",
    "GDT_DESCRIPTOR",
    "LDT_DESCRIPTOR",
    "MSR_POLICY",
    "TSC_CLOCK",
    "TSC_INFO",
    "VCPU_EXTENDED",
    "VCPU_MSRS",
    "VCPU_STATE",
    "VCPU_XSAVE",
]

WARNING = Severity.WARNING
XEND = Rule("xend-file", "a toolstack since Xen 4.5, which has no xend, reads the file", "tools/xl/xl.h XL_SAVE_MAGIC")
_SOUND = "below the domain's end, of the right type, and with content"

# --- checked by the restore path -------------------------------------------------------------------------------------
VCPU0 = Rule("vcpu0-missing", "vcpu 0's basic state is in the stream", "update_vcpu_context()")
VCPU_BASIC = Rule("vcpu-basic-missing", "a vcpu with other state has its basic state", "update_vcpu_context()")
VCPU_COUNT = Rule("vcpu-count", "no vcpu number exceeds the configuration's maximum", "handle_x86_pv_vcpu_blob()")
START_INFO = Rule("start-info", f"vcpu 0's suspend record is a pfn {_SOUND}", "process_start_info()")
START_INFO_FRAMES = Rule(
    "start-info-frames",
    "start info's xenstore and console frames are two pages of the domain that nothing else needs",
    "process_start_info(); get_page_type(): no daemon can map a page table or a GDT frame writable",
)
GDT_COUNT = Rule("gdt-count", "a GDT has at most 7168 entries", "process_vcpu_basic()")
GDT_FRAME = Rule("gdt-frame", f"each GDT frame is a pfn {_SOUND}", "process_vcpu_basic()")
CR3 = Rule("cr3", f"cr3 is a top table's pfn, {_SOUND}", "process_vcpu_basic()")
USER_CR3 = Rule("user-cr3", f"the user half's cr3, if any, is a top table's pfn, {_SOUND}", "process_vcpu_basic()")
P2M_FRAME = Rule("p2m-frame", f"each p2m frame is a pfn {_SOUND}", "update_guest_p2m()")
PTE_RANGE = Rule("pte-range", "no present entry names a pfn beyond the domain's end", "x86_pv_localise_page()")
SUPERPAGE = Rule("superpage", "no present entry above L1 is a superpage", "normalise_pagetable(); base_disallow_mask")
MEMORY_LIMIT = Rule(
    "memory-limit",
    "no more pages are populated than the configuration's memory target allows",
    "tools/libs/light/libxl_dom.c libxl__build_pre(); populate_pfns()",
)

# --- checked by Xen at the end of a restore --------------------------------------------------------------------------
PTE_LEVEL = Rule("pte-level", "an entry of an Ln table names an L(n-1) table", "get_page_from_l2e() and its variants")
TABLE_LEVEL = Rule(
    "table-level",
    "no page of a 32-bit guest is an L4 table; stock restorers make an ordinary page of it",
    "xen/arch/x86/mm.c do_mmuext_op(), MMUEXT_PIN_L4_TABLE",
)
PTE_WRITABLE = Rule("pte-writable", "no entry maps a page table or a GDT frame writable", "get_page_from_l1e()")
PTE_FLAGS = Rule("pte-flags", "a present entry has no flag that Xen refuses", "L1_DISALLOW_MASK and its variants")
XEN_SLOT = Rule("xen-slot", "Xen's own slots of a table are empty", "normalise_pagetable(); is_guest_l4_slot()")
PAE_L3 = Rule("pae-l3", "entry 3 of a 32-bit guest's L3 is present, its L2 not shared", "promote_l3_table()")
LINEAR_TABLE = Rule(
    "linear-table",
    "a table maps one of its own level read-only, one that is promoted before it, and is not mapped so itself",
    "define_get_linear_pagetable(), inc_linear_entries(), inc_linear_uses()",
)
LINEAR_TABLE_USED = Rule(
    "linear-table-used",
    "no table maps one of its own level, itself included",
    "define_get_linear_pagetable(): Xen with pv-linear-pt=false refuses it",
    Severity.NOTE,
)
PTE_L1TF = Rule(
    "pte-l1tf",
    "an entry that is not present holds no address that the L1TF flaw of processors could reveal",
    "xen/arch/x86/include/asm/shadow.h pv_l1tf_check_pte(): Xen shadows such a domain, and crashes it where it cannot",
    WARNING,
)

# --- not checked by other tools --------------------------------------------------------------------------------------
PTE_MISSING = Rule(
    "pte-missing", "every present entry names a page that is in the stream", "otherwise the page would be empty"
)
TABLE_CONTENT = Rule(
    "table-content", "every page table's content is in the stream", "otherwise there is nothing to pin"
)
TABLE_ORPHAN = Rule("table-orphan", "every page table is pinned or named by another", "mm.c type counts", WARNING)
PTE_OUTLIER = Rule(
    "pte-outlier",
    "an entry fits in with its neighbours",
    "heuristic: the mark of a flipped bit",
    WARNING,
)
VCPU_RESUME = Rule(
    "vcpu-resume", "rip and stack of a vcpu in kernel mode are mapped", "otherwise it faults when it resumes"
)
VCPU_HANDLER = Rule(
    "vcpu-handler", "a vcpu's trap table and callbacks are valid and mapped", "do_set_trap_table()", WARNING
)
START_INFO_MAGIC = Rule("start-info-magic", "the suspend record is a start info page", "xen/include/public/xen.h")
P2M_REPEATED = Rule(
    "p2m-frame-repeated", "no two populated parts of the p2m share a frame", "otherwise one overwrites the other"
)
P2M_EXTENT = Rule("p2m-extent", "the p2m ends where shared info says", "arch-x86/xen.h arch_shared_info.max_pfn")
P2M_START = Rule(
    "p2m-start", "the p2m is sent from the first entry of a frame on", "write_x86_pv_p2m_frames()", WARNING
)
P2M_ANCHOR = Rule("p2m-anchor", "the guest's anchors lead to the frames that the stream names", "x86_pv_map_p2m()")
P2M_GENERATION = Rule("p2m-generation", "p2m_generation is even: no change was under way", "arch-x86/xen.h")
PAGE_MISSING = Rule("page-missing", "every pfn that the p2m maps is in the stream", "otherwise the page would be empty")
PAGE_UNMAPPED = Rule("page-unmapped", "every page in the stream is mapped by the p2m", "x86_pv_p2m", WARNING)
PAGE_REPEATED = Rule("page-repeated", "a PAGE_DATA record names each pfn once", "legacy.py, of a batch", WARNING)
PAGE_BROKEN = Rule("page-broken", "no page was lost to a memory error before the save", "PFINFO_BROKEN", WARNING)
NOT_CHECKED = Rule("not-checked", "everything could be checked", "a pipe can be read only once", WARNING)
