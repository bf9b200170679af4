/*
 * What must be assembly: the notes by which Xen's tools know litmus, its first instructions, the hypercall page and the
 * trap entries.
 */
#include "abi.h"

#define VIRT_BASE 0xffffffff80000000

.macro note type, directive, value:vararg
    .pushsection .note.Xen, "a", @note
    .balign 4
    .long 2f - 1f, 4f - 3f, \type
1:  .asciz "Xen"
2:  .balign 4
3:  \directive \value
4:  .balign 4
    .popsection
.endm

note NOTE_GUEST_OS,       .asciz, "litmus"
note NOTE_LOADER,         .asciz, "generic"
note NOTE_XEN_VERSION,    .asciz, "xen-3.0"
note NOTE_VIRT_BASE,      .quad,  VIRT_BASE
note NOTE_ENTRY,          .quad,  start
note NOTE_HYPERCALL_PAGE, .quad,  hypercall_page
note NOTE_SUSPEND_CANCEL, .quad,  1
#ifdef INIT_P2M
note NOTE_INIT_P2M,       .quad,  INIT_P2M
#endif

    .section .text.hypercalls, "ax"
    .balign PAGE_SIZE
    .globl hypercall_page
hypercall_page:
    .skip PAGE_SIZE, 0x90

    .text
    .globl start
start:                                  # rsi: start_info; rsp: end of the builder's boot stack, one page
    mov  %rsi, %rdi
    mov  %rsp, %rsi
    mov  $stack_end, %rsp
    xor  %ebp, %ebp
    cld
    call litmus_main
    ud2

/*
 * Trap entries, 16 bytes apart. Xen leaves on the stack: rcx, r11, the error code where the vector has one, rip, cs,
 * rflags, rsp, ss. No trap is expected, so none returns.
 */
    .balign 16
    .globl trap_entries
trap_entries:
    vector = 0
    .rept 32
    .balign 16
    mov  $vector, %edi
    jmp  trap
    vector = vector + 1
    .endr
trap:
    mov  %rsp, %rsi
    and  $-16, %rsp
    cld
    call trap_panic
    ud2

    .section .bss.pages, "aw", @nobits
    .balign PAGE_SIZE
    .skip 2 * PAGE_SIZE
stack_end:

    .section .note.GNU-stack, "", @progbits
