/*
 * Page tables, by Xen's rules: a page that is a page table has no writable mapping anywhere, every change goes through
 * a hypercall, the top tables are pinned, and Xen's slots are left alone.
 *
 * The builder's top table stays in use. A second, small tree is loaded as the user page table, so that saved contexts
 * carry both.
 */
#include "hypercall.h"
#include "litmus.h"

#define KERNEL_TABLE (PTE_PRESENT | PTE_RW | PTE_USER | PTE_ACCESSED | PTE_DIRTY)
#define KERNEL_PAGE  (PTE_PRESENT | PTE_RW | PTE_ACCESSED | PTE_DIRTY)
#define INDEX(address, level) (((address) >> (PAGE_SHIFT + 9 * ((level) - 1))) & 511)

static uint64_t user_root;                    /* pfn */

/* Updates are collected, because a hypercall costs more than what it does. */
static struct mmu_update queue[128];
static unsigned queued;

void flush_updates(void)
{
    if (queued && hypercall(HC_MMU_UPDATE, (uint64_t)queue, queued, 0, DOMID_SELF))
        panic("mmu_update refused");
    queued = 0;
}

static void update(uint64_t what, uint64_t value)
{
    queue[queued++] = (struct mmu_update){ what, value };
    if (queued == sizeof(queue) / sizeof(queue[0]))
        flush_updates();
}

static void set_entry(uint64_t *entry, uint64_t value)
{
    uint64_t machine = pfn_to_mfn(address_pfn(entry)) << PAGE_SHIFT | ((uint64_t)entry & (PAGE_SIZE - 1));
    update(machine | MMU_NORMAL_PT_UPDATE, value);
}

/* Tells Xen's m2p. The updates are made by flush_updates(). */
void set_pfn_of(uint64_t mfn, uint64_t pfn)
{
    update(mfn << PAGE_SHIFT | MMU_MACHPHYS_UPDATE, pfn);
}

static uint64_t pte(uint64_t pfn, uint64_t flags)
{
    return pfn_to_mfn(pfn) << PAGE_SHIFT | flags;
}

static uint64_t *table_of(uint64_t entry)
{
    return page_address(mfn_to_pfn(PTE_MFN(entry)));
}

static uint64_t *top_table(void)
{
    return (uint64_t *)start_info->pt_base;
}

uint64_t kernel_cr3(void)
{
    return pfn_to_mfn(address_pfn(top_table())) << PAGE_SHIFT;
}

uint64_t user_cr3(void)
{
    return pfn_to_mfn(user_root) << PAGE_SHIFT;
}

bool is_mapped(uint64_t address)
{
    uint64_t *table = top_table();
    for (unsigned level = 4; level; level--) {
        uint64_t entry = table[INDEX(address, level)];
        if (!(entry & PTE_PRESENT))
            return false;
        if (level > 1)
            table = table_of(entry);
    }
    return true;
}

/* The entry that maps `address`, in tables that are made if they are missing. */
static uint64_t *entry_of(uint64_t address)
{
    uint64_t *table = top_table();
    for (unsigned level = 4; level > 1; level--) {
        uint64_t *entry = &table[INDEX(address, level)];
        if (!(*entry & PTE_PRESENT)) {
            uint64_t pfn = allocate_pages(1);
            make_read_only(pfn);
            set_entry(entry, pte(pfn, KERNEL_TABLE));
            flush_updates();
        }
        table = table_of(*entry);
    }
    return &table[INDEX(address, 1)];
}

void map_pages(uint64_t address, uint64_t pfn, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        set_entry(entry_of(address + (i << PAGE_SHIFT)), pte(pfn + i, KERNEL_PAGE));
    flush_updates();
}

/*
 * A stretch of addresses that is mapped throughout, mostly to one page: what is not mapped by itself shares that page,
 * read-only, and whole tables of nothing else share one table for each level.
 */
static struct { uint64_t first, end, missing[4]; } sparse;       /* missing[level]: pfn; 0 is the page */

static uint64_t missing_entry(unsigned level)
{
    return pte(sparse.missing[level - 1], level == 1 ? PTE_PRESENT | PTE_ACCESSED : KERNEL_TABLE);
}

static uint64_t sparse_table(uint64_t address, unsigned level)
{
    uint64_t pfn = allocate_pages(1);
    uint64_t *table = page_address(pfn);
    uint64_t span = 1ul << (PAGE_SHIFT + 9 * (level - 1));
    uint64_t at = address & ~(span * 512 - 1);
    for (unsigned i = 0; i < 512; i++, at += span)
        if (at < sparse.end && at + span > sparse.first)
            table[i] = missing_entry(level);
    make_read_only(pfn);
    return pfn;
}

void map_sparse_init(uint64_t first, uint64_t end, uint64_t missing)
{
    sparse.first = 0;
    sparse.end = ~0ul;                        /* the shared tables are full: they may lie anywhere */
    sparse.missing[0] = missing;
    for (unsigned level = 1; level < 4; level++)
        sparse.missing[level] = sparse_table(0, level);
    sparse.first = first;
    sparse.end = end;
}

void map_sparse(uint64_t address, uint64_t pfn)
{
    uint64_t *table = top_table();
    for (unsigned level = 4; level > 1; level--) {
        uint64_t *entry = &table[INDEX(address, level)];
        if (!(*entry & PTE_PRESENT) || PTE_MFN(*entry) == pfn_to_mfn(sparse.missing[level - 1])) {
            set_entry(entry, pte(sparse_table(address, level - 1), KERNEL_TABLE));
            flush_updates();
        }
        table = table_of(*entry);
    }
    set_entry(&table[INDEX(address, 1)], pte(pfn, KERNEL_PAGE));
    flush_updates();
}

void remap_page(void *address, uint64_t machine, uint64_t flags)
{
    uint64_t value = machine | PTE_PRESENT | PTE_ACCESSED | PTE_DIRTY | flags;
    if (hypercall(HC_UPDATE_VA_MAPPING, (uint64_t)address, value, UVMF_INVLPG_ALL, 0))
        panic("update_va_mapping refused");
}

void unmap_page(void *address)
{
    if (hypercall(HC_UPDATE_VA_MAPPING, (uint64_t)address, 0, UVMF_INVLPG_ALL, 0))
        panic("update_va_mapping refused");
}

void make_read_only(uint64_t pfn)
{
    remap_page(page_address(pfn), pfn_to_mfn(pfn) << PAGE_SHIFT, 0);
}

/* One page of text at USER_BASE, read-only. Litmus never runs in user mode; the tables are there to be saved. */
static void user_tables_init(void)
{
    static const char text[] = "litmus: a page of user space\n";
    uint64_t pfn = allocate_pages(1);
    memcpy(page_address(pfn), text, sizeof(text));
    uint64_t flags = PTE_PRESENT | PTE_USER | PTE_ACCESSED;
    for (unsigned level = 1; level <= 4; level++) {
        uint64_t table = allocate_pages(1);
        ((uint64_t *)page_address(table))[INDEX(USER_BASE, level)] = pte(pfn, flags);
        make_read_only(table);
        flags = KERNEL_TABLE;
        pfn = table;
    }
    user_root = pfn;
    if (mmuext_op(MMUEXT_PIN_L4_TABLE, pfn_to_mfn(pfn)) || mmuext_op(MMUEXT_NEW_USER_BASEPTR, pfn_to_mfn(pfn)))
        panic("user page tables refused");
}

void paging_init(void)
{
    user_tables_init();
}
