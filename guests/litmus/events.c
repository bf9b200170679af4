/*
 * Event channels and time, without upcalls.
 *
 * Litmus never takes an interrupt: every port is masked, and a vcpu that waits asks Xen to wake it for a port or at a
 * time (SCHEDOP_poll). What a vcpu does is then a plain sequence, and a saved context is always one of a few places.
 */
#include "hypercall.h"
#include "litmus.h"

/*
 * Xen's page is mapped over this one of ours, which is mapped here again while the domain is suspended: a save file may
 * hold no page table entry that points at a page that is not the domain's.
 */
struct shared_info shared_info __attribute__((aligned(PAGE_SIZE), section(".bss.pages")));

static uint32_t ports[NR_SLOTS];              /* 0: nothing */

void shared_info_map(void)
{
    remap_page(&shared_info, start_info->shared_info, PTE_RW);
    memset(shared_info.evtchn_mask, 0xff, sizeof(shared_info.evtchn_mask));
}

void shared_info_unmap(void)
{
    remap_page(&shared_info, pfn_to_mfn(address_pfn(&shared_info)) << PAGE_SHIFT, PTE_RW);
}

uint32_t event_allocate(void)
{
    struct evtchn_alloc_unbound op = { .dom = DOMID_SELF, .remote_dom = DOMID_DOM0 };
    if (event_channel_op(EVTCHNOP_ALLOC_UNBOUND, &op))
        panic("no event channel");
    return op.port;
}

void event_listen(unsigned slot, uint32_t port)
{
    ports[slot] = port;
}

void event_send(uint32_t port)
{
    struct evtchn_send op = { .port = port };
    event_channel_op(EVTCHNOP_SEND, &op);
}

bool event_take(uint32_t port)
{
    uint64_t bit = 1ul << (port % 64);
    return port && (__sync_fetch_and_and(&shared_info.evtchn_pending[port / 64], ~bit) & bit);
}

/* Until a port that vcpu 0 listens to is pending, or the system time `deadline`. May return early. */
void wait_until(uint64_t deadline)
{
    uint32_t wanted[NR_SLOTS];
    unsigned n = 0;
    if (this_vcpu()->id == 0)
        for (unsigned i = 0; i < NR_SLOTS; i++)
            if (ports[i])
                wanted[n++] = ports[i];
    struct sched_poll op = { .ports = wanted, .nr_ports = n, .timeout = deadline };
    sched_op(SCHEDOP_POLL, &op);
}

/* Xen's system time in ns. It may jump either way across a restore. */
uint64_t now(void)
{
    const volatile struct vcpu_time_info *time = &shared_info.vcpu_info[this_vcpu()->id].time;
    uint32_t version, low, high;
    uint64_t result;
    do {
        version = time->version;
        asm volatile("lfence; rdtsc" : "=a"(low), "=d"(high) : : "memory");
        uint64_t ticks = ((uint64_t)high << 32 | low) - time->tsc_timestamp;
        ticks = time->tsc_shift < 0 ? ticks >> -time->tsc_shift : ticks << time->tsc_shift;
        result = time->system_time + (uint64_t)((unsigned __int128)ticks * time->tsc_to_system_mul >> 32);
        asm volatile("" : : : "memory");
    } while (version & 1 || version != time->version);
    return result;
}
