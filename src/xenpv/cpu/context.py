"""A vcpu's context: what Xen refuses whatever the memory of the domain holds."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import PAGE_SIZE, VGCF_IN_KERNEL
from xenpv.cpu.state import Refusal
from xenpv.memory.page_tables import is_canonical, is_xen_vaddr

# The vm_assist bits that Xen knows: xen.git:xen/arch/x86/include/asm/domain.h PV64_VM_ASSIST_MASK, PV32_VM_ASSIST_MASK
_VM_ASSIST = {8: 0x1_0000_003F, 4: 0x3F}
_CANONICAL = (
    "kernel_sp",
    "fs_base",
    "gs_base_kernel",
    "gs_base_user",
    "event_callback_eip",
    "syscall_callback_eip",
    "failsafe_callback_eip",
)
LDT_ENTRIES_MAX = 8192


def iter_context_refusals(context: np.void, width: Width, *, vcpu: int) -> Iterator[Refusal]:
    """Yield why Xen refuses a vcpu_guest_context, apart from the frames that it names.

    Source: xen.git:xen/arch/x86/domain.c arch_set_info_guest()
    """
    for reason in _iter_reasons(context, width, vcpu):
        yield Refusal(errno.EINVAL, reason)


def _iter_reasons(context: np.void, width: Width, vcpu: int) -> Iterator[str]:
    if width == 8:
        registers = context["user_regs"]
        addresses = {name: int(registers[name]) for name in ("rip", "rsp")}
        addresses |= {name: int(context[name]) for name in _CANONICAL}
        for name, address in addresses.items():
            if not is_canonical(address):
                yield f"{name} {address:#x} is not canonical"
        handlers = context["trap_ctxt"]["address"]
        sign = handlers >> np.uint64(47)
        for vector in np.flatnonzero((sign != 0) & (sign != 0x1FFFF)).tolist():
            yield f"trap {vector}'s handler {int(handlers[vector]):#x} is not canonical"
        if not int(context["flags"]) & VGCF_IN_KERNEL and not int(context["ctrlreg"][1]):
            yield "the vcpu is in user mode, and has no user page tables"
    base, entries = int(context["ldt_base"]), int(context["ldt_ents"])
    if base % PAGE_SIZE or entries > LDT_ENTRIES_MAX:
        problem = f"not page-aligned, or more than {LDT_ENTRIES_MAX} entries"
        yield f"LDT at {base:#x} with {entries} entries: {problem}"
    elif width == 8 and (is_xen_vaddr(base, 8) or not is_canonical(base)):
        yield f"LDT at {base:#x} is in Xen's address range, or not canonical"
    unknown = int(context["vm_assist"]) & ~_VM_ASSIST[width]
    if vcpu == 0 and unknown:
        yield f"vm_assist has bits {unknown:#x}, which no Xen knows"
