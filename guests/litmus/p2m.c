/*
 * The p2m, and the forms in which it is published to the toolstack.
 *
 * There is one list, pfn -> mfn, in the frames the domain builder made for it; it is the leaves of every form:
 *   linear   the list is mapped at P2M_BASE and shared_info says where (p2m_cr3, p2m_vaddr, p2m_generation);
 *   tree     tables of mfns above the list, of any depth; the three-level one hangs off shared_info's frame_list_list.
 * A restore writes the list anew. The tables of a tree hold mfns that only litmus knows of: it fills them again after
 * each resume.
 */
#include "litmus.h"

#define INVALID_MFN (~0ul)
#define PER_PAGE    512u
#define MAX_LEVELS  3u

struct level {
    uint64_t first, count;                    /* its pages, consecutive pfns; level 0 is the list */
    uint64_t missing;                         /* a page of this level below which nothing is mapped */
};

static const volatile uint64_t *list;
static uint64_t entries;
static struct level tree[MAX_LEVELS];
static unsigned levels = 3;

uint64_t pfn_to_mfn(uint64_t pfn)
{
    return list[pfn];
}

uint64_t mfn_to_pfn(uint64_t mfn)
{
    return M2P[mfn];
}

/* The builder's list, where it put it: enough to make page tables with. */
void p2m_init(void)
{
    list = (const uint64_t *)start_info->mfn_list;
    entries = start_info->nr_pages;
    tree[0].count = DIV_ROUND_UP(entries, PER_PAGE);
    tree[0].first = start_info->nr_p2m_frames ? start_info->first_p2m_pfn : address_pfn((void *)list);
}

static uint64_t *entry(uint64_t first, uint64_t index)
{
    return (uint64_t *)page_address(first + index / PER_PAGE) + index % PER_PAGE;
}

static void tree_allocate(void)
{
    for (unsigned l = 0; l + 1 < levels; l++)
        tree[l].missing = allocate_pages(1);
    for (unsigned l = 1; l < levels; l++) {
        tree[l].count = DIV_ROUND_UP(tree[l - 1].count, PER_PAGE);
        tree[l].first = allocate_pages(tree[l].count);
    }
    if (tree[levels - 1].count != 1)
        panic("p2m too large for the tree");
}

static void tree_fill(void)
{
    for (unsigned l = 0; l + 1 < levels; l++)
        for (unsigned i = 0; i < PER_PAGE; i++)
            *entry(tree[l].missing, i) = l ? pfn_to_mfn(tree[l - 1].missing) : INVALID_MFN;
    for (unsigned l = 1; l < levels; l++) {
        const struct level *below = &tree[l - 1];
        for (uint64_t i = 0; i < tree[l].count * PER_PAGE; i++)
            *entry(tree[l].first, i) = pfn_to_mfn(i < below->count ? below->first + i : below->missing);
    }
}

/* The list gets an address of its own, whatever the builder's placement was, and its last page an end. */
void p2m_list_init(void)
{
    map_pages(P2M_BASE, tree[0].first, tree[0].count);
    uint64_t *mapped = (uint64_t *)P2M_BASE;
    for (uint64_t i = entries; i < tree[0].count * PER_PAGE; i++)
        mapped[i] = INVALID_MFN;
    list = mapped;
    if (options.p2m_form & FORM_TREE)
        tree_allocate();
    p2m_rebuild();
}

void p2m_rebuild(void)
{
    if (options.p2m_form & FORM_TREE)
        tree_fill();
}

/* The anchors. Whoever reads takes the linear list if p2m_cr3 is not 0, so that is written last. */
void p2m_publish(void)
{
    bool linear = options.p2m_form & FORM_LINEAR;
    shared_info.p2m_cr3 = 0;
    __sync_synchronize();
    shared_info.frame_list_list = options.p2m_form & FORM_TREE ? pfn_to_mfn(tree[levels - 1].first) : INVALID_MFN;
    shared_info.max_pfn = entries;
    shared_info.p2m_generation = 0;
    shared_info.p2m_vaddr = linear ? P2M_BASE : 0;
    __sync_synchronize();
    shared_info.p2m_cr3 = linear ? kernel_cr3() : 0;
}
