/*
 * The part of Xen's PV interface that litmus uses, 64-bit only, written down from the facts of Xen's public headers.
 *
 * Offsets are checked at compile time by FIELD(): what is said here about a structure is what the compiler lays out.
 */
#ifndef LITMUS_ABI_H
#define LITMUS_ABI_H

#define PAGE_SHIFT 12
#define PAGE_SIZE  4096

/* ELF notes, name "Xen" (elfnote.h). */
#define NOTE_ENTRY          1
#define NOTE_HYPERCALL_PAGE 2
#define NOTE_VIRT_BASE      3
#define NOTE_XEN_VERSION    5
#define NOTE_GUEST_OS       6
#define NOTE_LOADER         8
#define NOTE_SUSPEND_CANCEL 14
#define NOTE_INIT_P2M       15

/* Hypercall numbers; number n is entered at hypercall_page + 32 * n (xen.h). */
#define HC_SET_TRAP_TABLE    0
#define HC_MMU_UPDATE        1
#define HC_SET_GDT           2
#define HC_MEMORY_OP         12
#define HC_UPDATE_VA_MAPPING 14
#define HC_VCPU_OP           24
#define HC_SET_SEGMENT_BASE  25
#define HC_MMUEXT_OP         26
#define HC_SCHED_OP          29
#define HC_EVENT_CHANNEL_OP  32

#ifndef __ASSEMBLER__

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FIELD(type, field, offset) \
    _Static_assert(offsetof(struct type, field) == (offset), #type "." #field " is not at " #offset)
#define SIZE(type, size) _Static_assert(sizeof(struct type) == (size), #type " is not " #size " bytes")

/* Selectors of Xen's own flat segments, ring 3 (arch-x86/xen-x86_64.h). */
#define KERNEL_CS 0xe033
#define KERNEL_SS 0xe02b

/* Xen's machine-to-physical table, readable by every PV guest: mfn -> pfn. */
#define M2P ((const volatile uint64_t *)0xffff800000000000ul)

/* xen.h: start_info. After a resume only the fields up to console_evtchn are valid. */
struct start_info {
    char     magic[32];
    uint64_t nr_pages;
    uint64_t shared_info;                     /* machine address */
    uint32_t flags, pad0;
    uint64_t store_mfn;                       /* holds a pfn while suspended */
    uint32_t store_evtchn, pad1;
    uint64_t console_mfn;                     /* holds a pfn while suspended */
    uint32_t console_evtchn, pad2;
    uint64_t pt_base;                         /* address of the top page table */
    uint64_t nr_pt_frames;
    uint64_t mfn_list;                        /* address of the initial p2m */
    uint64_t mod_start, mod_len;
    char     cmd_line[1024];
    uint64_t first_p2m_pfn, nr_p2m_frames;    /* both 0 when there is no INIT_P2M note */
};
FIELD(start_info, shared_info, 40);
FIELD(start_info, store_mfn, 56);
FIELD(start_info, console_mfn, 72);
FIELD(start_info, pt_base, 88);
FIELD(start_info, cmd_line, 128);
FIELD(start_info, first_p2m_pfn, 1152);
SIZE(start_info, 1168);

/* xen.h: shared_info, with arch_shared_info (arch-x86/xen.h) at its end. */
struct vcpu_info {
    uint8_t  upcall_pending, upcall_mask, pad0[6];
    uint64_t pending_sel;
    uint64_t cr2, pad1;
    struct vcpu_time_info {
        uint32_t version, pad0;               /* odd while Xen updates the rest */
        uint64_t tsc_timestamp;
        uint64_t system_time;                 /* ns at tsc_timestamp */
        uint32_t tsc_to_system_mul;           /* fraction of 2^32 */
        int8_t   tsc_shift;
        uint8_t  flags, pad1[2];
    } time;
};
FIELD(vcpu_info, cr2, 16);
FIELD(vcpu_info, time, 32);
SIZE(vcpu_info, 64);

#define MAX_VCPUS 32                          /* those that have their vcpu_info in shared_info */

struct shared_info {
    struct vcpu_info vcpu_info[MAX_VCPUS];
    uint64_t evtchn_pending[64];
    uint64_t evtchn_mask[64];
    uint32_t wc_version, wc_sec, wc_nsec, wc_sec_hi;
    uint64_t max_pfn;                         /* the NUMBER of entries of the p2m */
    uint64_t frame_list_list;                 /* mfn of the top of a three-level tree; 0 not yet, ~0 look at p2m_cr3 */
    uint64_t nmi_reason;
    uint64_t p2m_cr3;                         /* 0: the next two are not valid */
    uint64_t p2m_vaddr;
    uint64_t p2m_generation;                  /* odd while the mapping of the list changes */
    /* Not in Xen's headers: proposed on xen-devel in 2014, for trees of any depth. Xen's page has room. */
    uint64_t p2m_levels, p2m_root;            /* valid if p2m_levels is not 0 and frame_list_list is ~0 */
};
FIELD(shared_info, evtchn_pending, 2048);
FIELD(shared_info, evtchn_mask, 2560);
FIELD(shared_info, max_pfn, 3088);
FIELD(shared_info, frame_list_list, 3096);
FIELD(shared_info, p2m_cr3, 3112);
FIELD(shared_info, p2m_levels, 3136);
SIZE(shared_info, 3152);

/* arch-x86/xen.h: a vcpu's registers, as VCPUOP_initialise takes them and save files hold them. */
struct trap_info {
    uint8_t  vector, flags;
    uint16_t cs;
    uint64_t address;
};
SIZE(trap_info, 16);

struct cpu_user_regs {
    uint64_t r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi;
    uint32_t error_code, entry_vector;
    uint64_t rip;
    uint16_t cs, pad0;
    uint8_t  saved_upcall_mask, pad1[3];
    uint64_t rflags, rsp;
    uint64_t ss, es, ds, fs, gs;
};
FIELD(cpu_user_regs, rdi, 112);
FIELD(cpu_user_regs, rip, 128);
FIELD(cpu_user_regs, rsp, 152);
SIZE(cpu_user_regs, 200);

#define VGCF_IN_KERNEL (1u << 2)

struct vcpu_guest_context {
    uint8_t  fpu[512];
    uint64_t flags;
    struct cpu_user_regs user_regs;
    struct trap_info trap_ctxt[256];
    uint64_t ldt_base, ldt_ents;
    uint64_t gdt_frames[16], gdt_ents;
    uint64_t kernel_ss, kernel_sp;
    uint64_t ctrlreg[8];                      /* [3]: kernel cr3, [1]: user cr3, both machine addresses */
    uint64_t debugreg[8];
    uint64_t event_callback, failsafe_callback, syscall_callback;
    uint64_t vm_assist;
    uint64_t fs_base, gs_base_kernel, gs_base_user;
};
FIELD(vcpu_guest_context, user_regs, 520);
FIELD(vcpu_guest_context, gdt_frames, 4832);
FIELD(vcpu_guest_context, ctrlreg, 4984);
FIELD(vcpu_guest_context, gs_base_kernel, 5152);
SIZE(vcpu_guest_context, 5168);

/* Page table entries. Xen adds bits of its own to what it is given. */
#define PTE_PRESENT  0x001ul
#define PTE_RW       0x002ul
#define PTE_USER     0x004ul
#define PTE_ACCESSED 0x020ul
#define PTE_DIRTY    0x040ul
#define PTE_MFN(pte) (((pte) & 0x000ffffffffff000ul) >> PAGE_SHIFT)

/* xen.h: mmu_update, mmuext_op, update_va_mapping, set_segment_base. */
struct mmu_update {
    uint64_t ptr;                             /* machine address of the entry, and in its low bits what to do */
    uint64_t val;
};
#define MMU_NORMAL_PT_UPDATE 0
#define MMU_MACHPHYS_UPDATE  1                /* ptr: of the frame; val: its pfn */
struct mmuext_op {
    uint32_t cmd, pad;
    uint64_t mfn;
    uint64_t arg2;
};
SIZE(mmuext_op, 24);
#define MMUEXT_PIN_L4_TABLE     3
#define MMUEXT_NEW_USER_BASEPTR 15
#define UVMF_INVLPG_ALL         6
#define SEGBASE_GS_KERNEL       2

/* xen.h: special domain ids. */
#define DOMID_DOM0 0
#define DOMID_SELF 0x7ff0

/* memory.h */
#define XENMEM_DECREASE_RESERVATION 1
struct memory_reservation {
    const uint64_t *extents;                  /* mfns */
    uint64_t nr_extents;
    uint32_t order, flags;
    uint16_t domid;
};
SIZE(memory_reservation, 32);

/* vcpu.h */
#define VCPUOP_INITIALISE 0
#define VCPUOP_UP         1
#define VCPUOP_IS_UP      3

/* sched.h */
#define SCHEDOP_YIELD    0
#define SCHEDOP_SHUTDOWN 2                    /* for a suspend, a third argument: the mfn of start_info */
#define SCHEDOP_POLL     3
#define SHUTDOWN_POWEROFF 0
#define SHUTDOWN_REBOOT   1
#define SHUTDOWN_SUSPEND  2
#define SHUTDOWN_CRASH    3
struct sched_poll {
    const uint32_t *ports;
    uint32_t nr_ports, pad;
    uint64_t timeout;                         /* system time in ns, absolute; 0: none */
};
SIZE(sched_poll, 24);

/* event_channel.h */
#define EVTCHNOP_SEND          4
#define EVTCHNOP_ALLOC_UNBOUND 6
struct evtchn_send { uint32_t port; };
struct evtchn_alloc_unbound {
    uint16_t dom, remote_dom;
    uint32_t port;                            /* out */
};
SIZE(evtchn_alloc_unbound, 8);

/* io/console.h */
struct console_ring {
    char in[1024], out[2048];
    volatile uint32_t in_cons, in_prod, out_cons, out_prod;
};
FIELD(console_ring, out_cons, 3080);

/* io/xs_wire.h */
struct store_ring {
    char req[1024], rsp[1024];
    volatile uint32_t req_cons, req_prod, rsp_cons, rsp_prod;
};
FIELD(store_ring, req_cons, 2048);
struct store_header { uint32_t type, req_id, tx_id, len; };
#define XS_READ        2
#define XS_WATCH       4
#define XS_WRITE       11
#define XS_WATCH_EVENT 15
#define XS_ERROR       16

#endif
#endif
