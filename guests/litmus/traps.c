/*
 * Traps and the GDT.
 *
 * No trap is expected: each is told with what is needed to find it, and ends the domain as a crash. The GDT holds
 * nothing that is used (Xen's flat segments serve); it is loaded so that saved contexts carry a GDT frame.
 */
#include "hypercall.h"
#include "litmus.h"

#define NR_TRAPS    32
#define GDT_ENTRIES 16
#define CODE_64     0x00affb000000ffffull     /* present, ring 3, code, long mode */
#define DATA        0x00cff3000000ffffull     /* present, ring 3, data */

static uint64_t gdt_pfn;

static struct trap_info trap(unsigned vector)
{
    return (struct trap_info){ .vector = vector, .cs = KERNEL_CS, .address = (uint64_t)trap_entries + 16 * vector };
}

void traps_init(void)
{
    struct trap_info table[NR_TRAPS + 1];
    for (unsigned v = 0; v < NR_TRAPS; v++)
        table[v] = trap(v);
    table[NR_TRAPS] = (struct trap_info){ .address = 0 };
    if (hypercall(HC_SET_TRAP_TABLE, (uint64_t)table, 0, 0, 0))
        panic("trap table refused");

    gdt_pfn = allocate_pages(1);
    uint64_t *gdt = page_address(gdt_pfn);
    gdt[1] = CODE_64;
    gdt[2] = DATA;
    make_read_only(gdt_pfn);
    uint64_t frame = pfn_to_mfn(gdt_pfn);
    if (hypercall(HC_SET_GDT, (uint64_t)&frame, GDT_ENTRIES, 0, 0))
        panic("GDT refused");
}

/* The same for another vcpu. */
void traps_fill_context(struct vcpu_guest_context *context)
{
    for (unsigned v = 0; v < NR_TRAPS; v++)
        context->trap_ctxt[v] = trap(v);
    context->gdt_frames[0] = pfn_to_mfn(gdt_pfn);
    context->gdt_ents = GDT_ENTRIES;
}

void trap_panic(unsigned vector, const uint64_t *frame)
{
    const uint32_t with_error = 1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 17 | 1 << 21;
    frame += 2;                               /* rcx, r11 */
    uint64_t error = with_error >> vector & 1 ? *frame++ : 0;
    print("panic vector=%lu rip=0x%lx error=0x%lx cr2=0x%lx rsp=0x%lx vcpu=%lu", (uint64_t)vector, frame[0], error,
          shared_info.vcpu_info[this_vcpu()->id].cr2, frame[3], this_vcpu()->id);
    shutdown(SHUTDOWN_CRASH);
}
