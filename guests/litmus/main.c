/* From the builder's hands to the loop: the order in which litmus comes up, and what it does once it is. */
#include "litmus.h"

#define TICK_NS (10 * NS_PER_MS)              /* how finely the dirty rate is spread */

struct start_info *start_info;

void litmus_main(struct start_info *info, uint64_t boot_stack_end) __attribute__((noreturn));

static void bring_up(uint64_t boot_stack_end)
{
    smp_init_boot_vcpu();
    p2m_init();
    shared_info_map();
    console_connect();
    cmdline_parse(start_info->cmd_line);
    pages_init(boot_stack_end);
    p2m_list_init();
    paging_init();
    traps_init();
    bad_init();
    p2m_publish();
    suspend_init();
    smp_start();
    pattern_fill();
    p2m_print();
    print("up pages=%lu vcpus=%lu form=%s pattern=%lu", start_info->nr_pages, smp_count(), p2m_form_name(),
          pattern_pages());
}

/* A thing to do every so often. */
struct timer { uint64_t period, next; };

static void restart(struct timer *timer, uint64_t period)
{
    timer->period = period;
    timer->next = period ? now() + period : ~0ul;
}

static bool due(struct timer *timer)
{
    if (now() < timer->next)
        return false;
    /* What was missed, while the domain was paused say, is not made up for. */
    timer->next += timer->period;
    if (timer->next <= now())
        timer->next = now() + timer->period;
    return true;
}

static void heartbeat(uint64_t beat)
{
    if (smp_count() == 1) {
        print("heartbeat %lu", beat);
        return;
    }
    char text[200];
    size_t n = 0;
    for (uint64_t id = 1; id < smp_count() && n < sizeof(text) - 22; id++) {
        if (id > 1)
            text[n++] = ',';
        n += put_number(text + n, vcpu_beats(id), 10);
    }
    text[n] = 0;
    print("heartbeat %lu others=%s", beat, text);
}

/* What the pages a second come to in this tick; what is left over counts for the next. */
static uint64_t dirty_quota(void)
{
    static uint64_t owed;
    owed += options.dirty * TICK_NS;
    uint64_t pages = owed / (1000 * NS_PER_MS);
    owed %= 1000 * NS_PER_MS;
    return pages;
}

static void __attribute__((noreturn)) loop(void)
{
    struct timer beats, checks, ticks;
    uint64_t beat = 0;
    for (;;) {
        restart(&beats, options.heartbeat_ms * NS_PER_MS);
        restart(&checks, options.check_ms * NS_PER_MS);
        restart(&ticks, options.dirty ? TICK_NS : 0);
        while (!suspend_poll()) {
            if (due(&beats))
                heartbeat(++beat);
            if (due(&checks))
                pattern_check();
            if (due(&ticks))
                pattern_dirty(dirty_quota());
            event_take(start_info->console_evtchn);
            wait_until(MIN(beats.next, MIN(checks.next, ticks.next)));
        }
    }
}

void litmus_main(struct start_info *info, uint64_t boot_stack_end)
{
    start_info = info;
    bring_up(boot_stack_end);
    loop();
}
