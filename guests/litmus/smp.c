/*
 * Secondary vcpus. They do nothing but beat; they are there so that saved domains have several contexts, each in use.
 *
 * For a suspend they are parked: they stay online, in a loop that touches nothing of Xen's, so the save file has their
 * contexts and the restored domain continues them. A toolstack that resumes the slow way resets them instead; those are
 * started again.
 */
#include "hypercall.h"
#include "litmus.h"

#define STACK_PAGES 2
#define LOOK_NS     (100 * NS_PER_MS)         /* how soon a request to park is seen */
#define PATIENCE_NS (5000 * NS_PER_MS)

static struct vcpu vcpus[MAX_VCPUS];
static uint64_t count = 1;
static uint64_t stacks[MAX_VCPUS];            /* first pfn of each */
static volatile bool parking;
static struct vcpu_guest_context context;     /* too large for a stack */

struct vcpu *this_vcpu(void)
{
    struct vcpu *me;
    asm("mov %%gs:0, %0" : "=r"(me));
    return me;
}

uint64_t smp_count(void)
{
    return count;
}

uint64_t vcpu_beats(uint64_t id)
{
    return vcpus[id].beats;
}

void smp_init_boot_vcpu(void)
{
    vcpus[0].self = &vcpus[0];
    vcpus[0].up = true;
    hypercall(HC_SET_SEGMENT_BASE, SEGBASE_GS_KERNEL, (uint64_t)&vcpus[0], 0, 0);
}

void secondary_main(struct vcpu *me)
{
    const uint64_t period = options.heartbeat_ms * NS_PER_MS;
    for (;;) {
        uint64_t next = now() + period;
        me->up = true;
        while (!parking) {
            if (now() >= next) {
                me->beats++;
                next += period;
            }
            wait_until(MIN(next, now() + LOOK_NS));
        }
        me->parked = true;
        while (parking)
            yield();
        me->parked = false;
    }
}

static void start(uint64_t id)
{
    struct vcpu *vcpu = &vcpus[id];
    vcpu->self = vcpu;
    vcpu->id = id;
    vcpu->up = vcpu->parked = false;
    uint64_t stack_end = (uint64_t)page_address(stacks[id]) + STACK_PAGES * PAGE_SIZE;

    memset(&context, 0, sizeof(context));
    context.flags = VGCF_IN_KERNEL;
    context.user_regs.rip = (uint64_t)secondary_main;
    context.user_regs.rdi = (uint64_t)vcpu;
    context.user_regs.rsp = stack_end - 8;    /* as if called */
    context.user_regs.rflags = 0x200;
    context.user_regs.cs = KERNEL_CS;
    context.user_regs.ss = context.kernel_ss = KERNEL_SS;
    context.kernel_sp = stack_end;
    context.gs_base_kernel = (uint64_t)vcpu;
    context.ctrlreg[3] = kernel_cr3();
    context.ctrlreg[1] = user_cr3();
    traps_fill_context(&context);
    if (vcpu_op(VCPUOP_INITIALISE, id, &context) || vcpu_op(VCPUOP_UP, id, NULL))
        panic("vcpu refused");
}

/* Waits for a flag that another vcpu sets. */
static bool becomes(const volatile bool *flag, bool value)
{
    uint64_t deadline = now() + PATIENCE_NS;
    while (*flag != value && now() < deadline)
        yield();
    return *flag == value;
}

void smp_start(void)
{
    while (count < options.vcpus && vcpu_op(VCPUOP_IS_UP, count, NULL) == 0) {
        uint64_t id = count;
        stacks[id] = allocate_pages(STACK_PAGES);
        start(id);
        print("vcpu %lu %s", id, becomes(&vcpus[id].up, true) ? "up" : "lost");
        count++;
    }
}

void smp_park(void)
{
    parking = true;
    for (uint64_t id = 1; id < count; id++)
        if (!becomes(&vcpus[id].parked, true))
            panic("a vcpu does not park");
}

void smp_unpark(void)
{
    parking = false;
    __sync_synchronize();
    for (uint64_t id = 1; id < count; id++) {
        bool kept = vcpu_op(VCPUOP_IS_UP, id, NULL) == 1;
        if (!kept)
            start(id);
        bool back = kept ? becomes(&vcpus[id].parked, false) : becomes(&vcpus[id].up, true);
        print("vcpu %lu %s", id, !back ? "lost" : kept ? "back" : "up");
    }
}
