/* What each file of litmus offers to the others. */
#ifndef LITMUS_H
#define LITMUS_H

#include "abi.h"

#define DIV_ROUND_UP(n, d) (((n) + (d) - 1) / (d))
#define MIN(a, b)          ((a) < (b) ? (a) : (b))
#define MAX(a, b)          ((a) > (b) ? (a) : (b))
#define NS_PER_MS          1000000ul

/* Where things are in the address space. Slots 256-271 of the top table are Xen's. */
#define VIRT_BASE   0xffffffff80000000ul      /* slot 511: what the domain builder mapped, pfn 0 first */
#define DIRECT_BASE 0xffff880000000000ul      /* slot 272: every other page, at its pfn */
#define P2M_BASE    0xffffc80000000000ul      /* slot 400: the p2m list */
#define USER_BASE   0x0000000000400000ul      /* in the user page tables only */

/* start.S, litmus.lds */
extern char image_start[], image_end[];
extern char trap_entries[];

/* main.c */
extern struct start_info *start_info;

/* cmdline.c: the options (README.md has the table). */
enum suspend_mode { SUSPEND_EVTCHN, SUSPEND_XENSTORE, SUSPEND_REFUSE };
#define FORM_LINEAR 1u
#define FORM_TREE   2u
struct options {
    unsigned p2m_form;                        /* FORM_* ored */
    enum suspend_mode suspend;
    uint64_t heartbeat_ms, check_ms, dirty, vcpus;
};
extern struct options options;
void cmdline_parse(const char *line);
const char *p2m_form_name(void);

/* console.c */
void console_connect(void);
void print(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* events.c: event channels without upcalls, and the time. */
extern struct shared_info shared_info;
void shared_info_map(void);
void shared_info_unmap(void);
uint32_t event_allocate(void);
void event_listen(unsigned slot, uint32_t port);
void event_send(uint32_t port);
bool event_take(uint32_t port);
void wait_until(uint64_t deadline);
uint64_t now(void);
enum { SLOT_CONSOLE, SLOT_STORE, SLOT_SUSPEND, NR_SLOTS };

/* lib.c */
void *memset(void *to, int byte, size_t n);
void *memcpy(void *to, const void *from, size_t n);
size_t strlen(const char *s);
bool streq(const char *a, const char *b);
bool starts_with(const char *s, const char *prefix);
size_t put_number(char *to, uint64_t n, unsigned base);
uint64_t parse_number(const char *s, const char *end);

/* p2m.c */
void p2m_init(void);
void p2m_list_init(void);
void p2m_rebuild(void);
void p2m_publish(void);
uint64_t pfn_to_mfn(uint64_t pfn);
uint64_t mfn_to_pfn(uint64_t mfn);

/* pages.c: which page is used for what. */
struct range { uint64_t first, end; };
void pages_init(uint64_t boot_stack_end);
uint64_t allocate_pages(uint64_t count);
void *page_address(uint64_t pfn);
uint64_t address_pfn(const void *address);
unsigned free_ranges(struct range ranges[3]);

/* paging.c */
void paging_init(void);
void map_pages(uint64_t address, uint64_t pfn, uint64_t count);
void make_read_only(uint64_t pfn);
void remap_page(void *address, uint64_t machine, uint64_t flags);
bool is_mapped(uint64_t address);
uint64_t kernel_cr3(void);
uint64_t user_cr3(void);

/* pattern.c */
void pattern_fill(void);
bool pattern_check(void);
void pattern_dirty(uint64_t pages);
uint64_t pattern_pages(void);

/* smp.c */
struct vcpu {
    struct vcpu *self;                        /* at %gs:0 */
    uint64_t id;
    volatile uint64_t beats;
    volatile bool up, parked;
};
struct vcpu *this_vcpu(void);
void smp_init_boot_vcpu(void);
void smp_start(void);
uint64_t smp_count(void);
uint64_t vcpu_beats(uint64_t id);
void smp_park(void);
void smp_unpark(void);
void secondary_main(struct vcpu *me) __attribute__((noreturn));

/* suspend.c */
void suspend_init(void);
bool suspend_poll(void);

/* traps.c */
void traps_init(void);
void traps_fill_context(struct vcpu_guest_context *context);
void panic(const char *why) __attribute__((noreturn));
void shutdown(unsigned reason) __attribute__((noreturn));
void trap_panic(unsigned vector, const uint64_t *frame) __attribute__((noreturn));

/* xenstore.c */
void xenstore_connect(void);
bool xenstore_read(const char *path, char *value, size_t size);
bool xenstore_write(const char *path, const char *value);
bool xenstore_watch(const char *path);
bool xenstore_take_watch_event(void);

#endif
