/*
 * What the toolstack asks of the domain: to suspend, by event channel or by xenstore, and to power off or reboot.
 *
 * The suspend protocol: vcpus parked; the two ring pages named by pfn in start_info; no mapping of Xen's shared_info
 * left; then the shutdown hypercall, with the mfn of start_info as its third argument (the toolstack finds it in vcpu
 * 0's rdx). It returns 0 in a new domain, where start_info was rewritten and every mfn and event channel is another,
 * and 1 if the domain goes on as it was.
 */
#include "hypercall.h"
#include "litmus.h"

#define CONTROL     "control/shutdown"
#define SUSPEND_KEY "device/suspend/event-channel"

static uint32_t suspend_port;
static uint64_t resumes;

/* Xenstore and a port of our own: at boot, and again in a new domain, which inherits neither watch nor channel. */
void suspend_init(void)
{
    xenstore_connect();
    if (!xenstore_watch(CONTROL))
        panic("no watch on " CONTROL);
    if (options.suspend != SUSPEND_EVTCHN)
        return;
    suspend_port = event_allocate();
    event_listen(SLOT_SUSPEND, suspend_port);
    char text[21];
    text[put_number(text, suspend_port, 10)] = 0;
    if (!xenstore_write(SUSPEND_KEY, text))
        print("suspend channel not published");
}

static void suspend(void)
{
    print("suspend");
    smp_park();
    start_info->store_mfn = mfn_to_pfn(start_info->store_mfn);
    start_info->console_mfn = mfn_to_pfn(start_info->console_mfn);
    shared_info_unmap();

    uint32_t reason = SHUTDOWN_SUSPEND;
    uint64_t record = pfn_to_mfn(address_pfn(start_info));
    bool cancelled = hypercall(HC_SCHED_OP, SCHEDOP_SHUTDOWN, (uint64_t)&reason, record, 0);

    if (cancelled) {
        start_info->store_mfn = pfn_to_mfn(start_info->store_mfn);
        start_info->console_mfn = pfn_to_mfn(start_info->console_mfn);
    }
    shared_info_map();
    p2m_rebuild();
    p2m_publish();
    if (!cancelled) {
        console_connect();
        suspend_init();
    }
    print("resume (%s) %lu", cancelled ? "cancelled" : "new domain", ++resumes);
    smp_unpark();
    p2m_print();
    pattern_check();
}

static bool control_asks_suspend(void)
{
    char request[32];
    if (!xenstore_take_watch_event() || !xenstore_read(CONTROL, request, sizeof(request)) || !request[0])
        return false;
    if (streq(request, "suspend") && options.suspend == SUSPEND_REFUSE) {
        print("suspend refused");
        return false;
    }
    xenstore_write(CONTROL, "");
    if (streq(request, "suspend"))
        return true;
    print("%s", request);
    if (streq(request, "poweroff") || streq(request, "halt"))
        shutdown(SHUTDOWN_POWEROFF);
    if (streq(request, "reboot"))
        shutdown(SHUTDOWN_REBOOT);
    return false;
}

/* Whether the domain was suspended, and time may have jumped. */
bool suspend_poll(void)
{
    if (!event_take(suspend_port) && !control_asks_suspend())
        return false;
    suspend();
    return true;
}
