/*
 * The PV console: where print's lines go.
 *
 * A console nobody reads must not stop the guest: a line that finds no room for a second is given up.
 */
#include "hypercall.h"
#include "litmus.h"

#define WAIT_NS (1000 * NS_PER_MS)

static struct console_ring *ring;

static bool console_write(const char *text, size_t n)
{
    uint64_t deadline = now() + WAIT_NS;
    while (sizeof(ring->out) - (ring->out_prod - ring->out_cons) < n) {
        event_send(start_info->console_evtchn);
        if (now() > deadline)
            return false;
        yield();
    }
    uint32_t prod = ring->out_prod;
    for (size_t i = 0; i < n; i++)
        ring->out[prod++ % sizeof(ring->out)] = text[i];
    __sync_synchronize();
    ring->out_prod = prod;
    event_send(start_info->console_evtchn);
    return true;
}

void console_connect(void)
{
    ring = page_address(mfn_to_pfn(start_info->console_mfn));
    event_listen(SLOT_CONSOLE, start_info->console_evtchn);
    print_to(console_write);
}
