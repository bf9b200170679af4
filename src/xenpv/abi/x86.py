"""A vcpu's context, page-table entries and the address space that Xen reserves.

xen.git:xen/include/public/arch-x86/xen.h, xen-x86_64.h, xen-x86_32.h; xen.h; xen/arch/x86/include/asm/config.h
"""

from __future__ import annotations

from xenpv.abi.declare import U8, U16, U32, U64, ULONG, Scalar, Struct, WidthOnly, array

_R64 = WidthOnly(8, U64)
_R32 = WidthOnly(4, U32)
_R16_OR_32 = Scalar(2, 4)

USER_REGS = Struct(
    "cpu_user_regs",
    "xen.h",
    r15=_R64,
    r14=_R64,
    r13=_R64,
    r12=_R64,
    rbp=_R64,
    rbx=_R64,
    r11=_R64,
    r10=_R64,
    r9=_R64,
    r8=_R64,
    rax=_R64,
    rcx=_R64,
    rdx=_R64,
    rsi=_R64,
    rdi=_R64,
    ebx=_R32,
    ecx=_R32,
    edx=_R32,
    esi=_R32,
    edi=_R32,
    ebp=_R32,
    eax=_R32,
    error_code=_R16_OR_32,
    entry_vector=_R16_OR_32,
    rip=_R64,
    eip=_R32,
    cs=U16,
    _pad0=WidthOnly(8, U16),
    saved_upcall_mask=U8,
    _pad1=array(U8, 3, count4=1),
    rflags=_R64,
    eflags=_R32,
    rsp=_R64,
    esp=_R32,
    ss=U16,
    _pad2=array(U16, 3, count4=1),
    es=U16,
    _pad3=array(U16, 3, count4=1),
    ds=U16,
    _pad4=array(U16, 3, count4=1),
    fs=U16,
    _pad5=array(U16, 3, count4=1),
    gs=U16,
    _pad6=array(U16, 3, count4=1),
)
TRAP_INFO = Struct("trap_info", "xen.h", vector=U8, flags=U8, cs=U16, address=ULONG)

VCPU_GUEST_CONTEXT = Struct(
    "vcpu_guest_context",
    "xen.h",
    fpu_ctxt=array(U8, 512),
    flags=ULONG,
    user_regs=USER_REGS,
    trap_ctxt=array(TRAP_INFO, 256),
    ldt_base=ULONG,
    ldt_ents=ULONG,
    gdt_frames=array(ULONG, 16),
    gdt_ents=ULONG,
    kernel_ss=ULONG,
    kernel_sp=ULONG,
    ctrlreg=array(ULONG, 8),  # [3] is cr3; [1] the user half's cr3 of a 64-bit guest, in a stream with bit 0 set
    debugreg=array(ULONG, 8),
    event_callback_cs=WidthOnly(4, ULONG),
    event_callback_eip=ULONG,
    failsafe_callback_cs=WidthOnly(4, ULONG),
    failsafe_callback_eip=ULONG,
    syscall_callback_eip=WidthOnly(8, ULONG),
    vm_assist=ULONG,
    fs_base=WidthOnly(8, U64),
    gs_base_kernel=WidthOnly(8, U64),
    gs_base_user=WidthOnly(8, U64),
)
VGCF_IN_KERNEL = 1 << 2
VGCF_ONLINE = 1 << 5
GDT_ENTRIES_PER_FRAME = 512
FIRST_RESERVED_GDT_ENTRY = 14 * GDT_ENTRIES_PER_FRAME

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
ENTRIES = PAGE_SIZE // 8  # page-table entries in a page, for both guest widths (32-bit PV is PAE only)

LEVELS = {8: 4, 4: 3}  # page-table levels of a guest of that width

# Control register bits that select the paging mode (Intel SDM volume 3 section 2.5).
CR0_PG = 1 << 31
CR4_PSE = 1 << 4
CR4_PAE = 1 << 5
CR4_LA57 = 1 << 12
EFER_LMA = 1 << 10

# Page-table entries: the same 64 bits for both widths.
PTE_P = 1 << 0
PTE_RW = 1 << 1
PTE_US = 1 << 2
PTE_A = 1 << 5
PTE_D = 1 << 6
PTE_PSE = 1 << 7
PTE_NX = 1 << 63
PTE_FRAME_MASK = 0x000F_FFFF_FFFF_F000
PTE_FLAGS = {PTE_P: "P", PTE_RW: "RW", PTE_US: "US", PTE_A: "A", PTE_D: "D", PTE_PSE: "PSE", PTE_NX: "NX"}

# The address space that Xen reserves. 64-bit: L4 slots 256 to 271. 32-bit: from HYPERVISOR_VIRT_START_PAE on, in the
# L2 of L3[3].
XEN_L4_SLOTS = range(256, 272)
XEN_VIRT_64 = range(0xFFFF_8000_0000_0000, 0xFFFF_8800_0000_0000)
XEN_VIRT_PAE = range(0xF580_0000, 0x1_0000_0000)
XEN_PAE_L2_FIRST = (XEN_VIRT_PAE.start >> 21) & 511
PAE_L3_ENTRIES = 4
