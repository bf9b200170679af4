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
#define P2M_BASE    0xffffc80000000000ul      /* slot 400: the p2m list, unless vaddr= says another */
#define P2M_LIMIT   0xffffe00000000000ul      /* where a list must end */
#define USER_BASE   0x0000000000400000ul      /* in the user page tables only */

/* start.S, litmus.lds */
extern char image_start[], image_end[];
extern char trap_entries[];

/* main.c */
extern struct start_info *start_info;

/* cmdline.c: the options (README.md has the table). */
enum suspend_mode { SUSPEND_EVTCHN, SUSPEND_XENSTORE, SUSPEND_REFUSE };
enum bad { BAD_NOTHING, BAD_TWICE, BAD_FOREIGN, BAD_STALE, BAD_ODDGEN };
#define FORM_LINEAR  0x01u
#define FORM_TREE    0x02u                    /* three levels */
#define FORM_HIDDEN  0x04u                    /* four, of which three are exposed */
#define FORM_MARKED  0x08u                    /* four, told by bit 61 of the anchor */
#define FORM_ROOTED  0x10u                    /* any number, told by p2m_levels */
#define FORM_NONE    0x20u                    /* anchor 0 */
#define FORM_INVALID 0x40u                    /* anchor ~0, and nothing else */
#define FORM_TREES   (FORM_TREE | FORM_HIDDEN | FORM_MARKED | FORM_ROOTED)
struct options {
    unsigned p2m_form;                        /* FORM_* ored */
    enum suspend_mode suspend;
    enum bad bad;
    bool print_p2m;
    uint64_t heartbeat_ms, check_ms, dirty, vcpus, levels, places;
    uint64_t spread;                          /* pages; 0: memory stays where the builder put it */
    uint64_t use;                             /* pages behind the builder's list; 0: all */
    uint64_t vaddr;                           /* of the linear list */
};
extern struct options options;
void cmdline_parse(const char *line);
const char *p2m_form_name(void);

/* print.c: the bottom, which calls no other file. */
typedef bool print_sink(const char *text, size_t n);
void print_to(print_sink *to);
void print(const char *format, ...) __attribute__((format(printf, 1, 2)));
void panic(const char *why) __attribute__((noreturn));
void shutdown(unsigned reason) __attribute__((noreturn));

/* console.c */
void console_connect(void);

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
bool parse_size(const char *s, uint64_t *size);

/* bad.c */
void bad_init(void);

/* p2m.c */
void p2m_init(void);
void p2m_list_init(void);
void p2m_rebuild(void);
void p2m_publish(void);
void p2m_print(void);
void p2m_set(uint64_t pfn, uint64_t mfn);
uint64_t pfn_to_mfn(uint64_t pfn);
uint64_t mfn_to_pfn(uint64_t mfn);

/* pages.c: which page is used for what. */
struct range { uint64_t first, end; };
#define MAX_PLACES 256                        /* that spread= spreads to */
#define MAX_RANGES (MAX_PLACES + 3)
void pages_init(uint64_t boot_stack_end);
uint64_t allocate_pages(uint64_t count);
void *page_address(uint64_t pfn);
uint64_t address_pfn(const void *address);
uint64_t allocated_pages(void);
unsigned free_ranges(struct range ranges[MAX_RANGES]);
unsigned populated_ranges(struct range ranges[MAX_RANGES]);

/* paging.c */
void paging_init(void);
void map_pages(uint64_t address, uint64_t pfn, uint64_t count);
void map_sparse_init(uint64_t first, uint64_t end, uint64_t missing);
void map_sparse(uint64_t address, uint64_t pfn);
void set_pfn_of(uint64_t mfn, uint64_t pfn);
void flush_updates(void);
void make_read_only(uint64_t pfn);
void unmap_page(void *address);
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
void trap_panic(unsigned vector, const uint64_t *frame) __attribute__((noreturn));

/* xenstore.c */
void xenstore_connect(void);
bool xenstore_read(const char *path, char *value, size_t size);
bool xenstore_write(const char *path, const char *value);
bool xenstore_watch(const char *path);
bool xenstore_take_watch_event(void);

#endif
