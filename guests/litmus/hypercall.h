/* How a hypercall is made. Xen writes the hypercall page when it builds the domain; the save file carries it along. */
#ifndef LITMUS_HYPERCALL_H
#define LITMUS_HYPERCALL_H

#include "abi.h"

extern char hypercall_page[];

static inline long hypercall(unsigned nr, uint64_t a1, uint64_t a2, uint64_t a3, uint64_t a4)
{
    register uint64_t r10 asm("r10") = a4;
    long result;
    asm volatile("call *%[entry]"
                 : "=a"(result), "+D"(a1), "+S"(a2), "+d"(a3), "+r"(r10)
                 : [entry] "0"((long)hypercall_page + nr * 32)
                 : "rcx", "r8", "r9", "r11", "memory");
    return result;
}

static inline long sched_op(unsigned op, const void *arg)
{
    return hypercall(HC_SCHED_OP, op, (uint64_t)arg, 0, 0);
}

static inline long event_channel_op(unsigned op, void *arg)
{
    return hypercall(HC_EVENT_CHANNEL_OP, op, (uint64_t)arg, 0, 0);
}

static inline long vcpu_op(unsigned op, unsigned vcpu, const void *arg)
{
    return hypercall(HC_VCPU_OP, op, vcpu, (uint64_t)arg, 0);
}

static inline long mmuext_op(unsigned cmd, uint64_t mfn)
{
    struct mmuext_op op = { .cmd = cmd, .mfn = mfn };
    return hypercall(HC_MMUEXT_OP, (uint64_t)&op, 1, 0, DOMID_SELF);
}

static inline void yield(void)
{
    sched_op(SCHEDOP_YIELD, NULL);
}

#endif
