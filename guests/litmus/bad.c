/*
 * What bad= makes wrong on purpose, for checkers to find. It is done once, before the p2m is published, with pages that
 * are used for nothing else: litmus itself stays sound.
 */
#include "hypercall.h"
#include "litmus.h"

/* A frame that has a pfn, but not with us: the first such above 1 MiB; on most hosts it is dom0's. */
static uint64_t foreign_frame(void)
{
    const uint64_t own = pfn_to_mfn(address_pfn(image_start));
    for (uint64_t mfn = 0x100; mfn < own; mfn++) {
        uint64_t pfn = mfn_to_pfn(mfn);
        if (pfn < 1ul << 40 && !(pfn < start_info->nr_pages && pfn_to_mfn(pfn) == mfn))
            return mfn;
    }
    return 0;
}

static void give_back(uint64_t pfn)
{
    const uint64_t mfn = pfn_to_mfn(pfn);
    struct memory_reservation op = { .extents = &mfn, .nr_extents = 1, .domid = DOMID_SELF };
    if (hypercall(HC_MEMORY_OP, XENMEM_DECREASE_RESERVATION, (uint64_t)&op, 0, 0) != 1)
        panic("decrease_reservation refused");
}

void bad_init(void)
{
    if (options.bad == BAD_NOTHING)
        return;
    if (options.bad == BAD_ODDGEN) {
        print("bad oddgen");
        return;
    }
    uint64_t pfn = allocate_pages(2);
    /* A mapping of a frame that the p2m has lost would cost litmus the page table it is in, at the next save. */
    unmap_page(page_address(pfn));
    if (options.bad == BAD_STALE) {
        give_back(pfn);
        print("bad stale pfn=0x%lx mfn=0x%lx", pfn, pfn_to_mfn(pfn));
    } else if (options.bad == BAD_TWICE) {
        p2m_set(pfn, pfn_to_mfn(pfn + 1));
        print("bad twice pfn=0x%lx mfn=0x%lx also=0x%lx", pfn, pfn_to_mfn(pfn), pfn + 1);
    } else {
        uint64_t mfn = foreign_frame();
        p2m_set(pfn, mfn);
        print("bad foreign pfn=0x%lx mfn=0x%lx theirs=0x%lx", pfn, mfn, mfn_to_pfn(mfn));
    }
}
