/*
 * Which page is used for what, and where it is mapped.
 *
 * The domain builder lays out, from pfn 0: a hole of 1 MiB, the image, (the p2m list,) start_info, the xenstore and
 * console rings, page tables, the boot stack; and, with an INIT_P2M note, the list and its page tables further up.
 * Litmus takes what it needs from behind the boot stack, upwards, and never gives back; everything else belongs to the
 * pattern.
 *
 * With spread=, the pages from low_end on get other pfns: so many at each of a number of places, each place ending
 * where an equal part of the whole stretch ends. (A page each would need a page of the list each.)
 */
#include "litmus.h"

static uint64_t boot_pages = ~0ul;            /* pfns below it are mapped at VIRT_BASE, the others at DIRECT_BASE */
static uint64_t next_free;
static uint64_t nr_pages;                     /* a restore makes start_info's the size of the p2m */
static uint64_t low_end;                      /* what is below it stays where the builder put it; use= leaves the rest */
static uint64_t allocated;

void *page_address(uint64_t pfn)
{
    return (void *)((pfn < boot_pages ? VIRT_BASE : DIRECT_BASE) + (pfn << PAGE_SHIFT));
}

uint64_t address_pfn(const void *address)
{
    uint64_t base = (uint64_t)address >= VIRT_BASE ? VIRT_BASE : DIRECT_BASE;
    return ((uint64_t)address - base) >> PAGE_SHIFT;
}

static struct range builder_p2m(void)
{
    return (struct range){ start_info->first_p2m_pfn, start_info->first_p2m_pfn + start_info->nr_p2m_frames };
}

/* Consecutive pages, zeroed. They must be mapped already: paging_init() relies on the order in which they come. */
uint64_t allocate_pages(uint64_t count)
{
    struct range p2m = builder_p2m();
    if (next_free < p2m.end && next_free + count > p2m.first)
        next_free = p2m.end;
    uint64_t pfn = next_free;
    if (pfn + count > low_end)
        panic("out of memory");
    next_free += count;
    allocated += count;
    for (uint64_t i = 0; i < count; i++)
        memset(page_address(pfn + i), 0, PAGE_SIZE);
    return pfn;
}

uint64_t allocated_pages(void)
{
    return allocated;
}

static struct range place(uint64_t i)
{
    const uint64_t moved = nr_pages - low_end;
    uint64_t pages = moved / options.places + (i < moved % options.places);
    uint64_t end = options.spread - (options.places - 1 - i) * (options.spread / options.places);
    return (struct range){ end - pages, end };
}

/* More than what is allocated where memory is spread: leaves of the list and what lies above them, page tables. */
static uint64_t needed_to_spread(void)
{
    uint64_t most = nr_pages / options.places + 1;
    return options.places * (2 * (most / 512 + 2) + 8) + 512;
}

static void spread_init(struct range p2m)
{
    low_end = MAX(MAX(p2m.end, boot_pages), next_free + needed_to_spread());
    if (low_end + options.places > nr_pages)
        panic("too little memory to spread");
    if (place(0).end > options.spread || place(0).first < low_end)
        panic("spread too small");
}

static void map_direct(uint64_t first, uint64_t end)
{
    map_pages(DIRECT_BASE + (first << PAGE_SHIFT), first, end - first);
}

void pages_init(uint64_t boot_stack_end)
{
    next_free = (boot_stack_end - VIRT_BASE) >> PAGE_SHIFT;
    nr_pages = low_end = start_info->nr_pages;
    uint64_t pfn = next_free;
    while (pfn < nr_pages && is_mapped(VIRT_BASE + (pfn << PAGE_SHIFT)))
        pfn++;
    boot_pages = pfn;
    /* The builder's own tables for its list must not get a writable mapping, so that whole range gets none. */
    struct range p2m = builder_p2m();
    if (options.spread)
        spread_init(p2m);
    else if (options.use)
        low_end = MIN(nr_pages, MAX(p2m.end, boot_pages) + options.use);
    if (p2m.first > boot_pages)
        map_direct(boot_pages, p2m.first);
    map_direct(MAX(p2m.end, boot_pages), low_end);
}

static unsigned add_places(struct range *ranges)
{
    unsigned n = 0;
    if (options.spread)
        for (; n < options.places; n++)
            ranges[n] = place(n);
    return n;
}

/* Where memory is, in the order in which the builder's list has its frames. */
unsigned populated_ranges(struct range ranges[MAX_RANGES])
{
    ranges[0] = (struct range){ 0, low_end };
    return 1 + add_places(ranges + 1);
}

/* What is nobody's, once everything was allocated. */
unsigned free_ranges(struct range ranges[MAX_RANGES])
{
    struct range p2m = builder_p2m();
    unsigned n = 0;
    ranges[n++] = (struct range){ 0, address_pfn(image_start) };
    if (next_free < p2m.first) {
        ranges[n++] = (struct range){ next_free, p2m.first };
        ranges[n++] = (struct range){ p2m.end, low_end };
    } else
        ranges[n++] = (struct range){ next_free, low_end };
    return n + add_places(ranges + n);
}
