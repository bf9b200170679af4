"""A vcpu's registers by their own names.

They are read from any of the structures that hold them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.hvm_save import ATTR_DPL_SHIFT
from xenpv.abi.x86 import (
    CR0_PG,
    CR4_PAE,
    EFER_LMA,
    FIRST_RESERVED_GDT_ENTRY,
    GDT_ENTRIES_PER_FRAME,
    PTE_FRAME_MASK,
    VGCF_IN_KERNEL,
)
from xenpv.frames import PAGE_SHIFT, U64, Pfn
from xenpv.memory.paging import Paging, paging_mode

GENERAL = {
    8: ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"],
    4: ["eax", "ebx", "ecx", "edx", "esi", "edi", "ebp", "esp"],
}
SEGMENTS = ["cs", "ss", "ds", "es", "fs", "gs"]


@dataclass(frozen=True, slots=True)
class Registers:
    """The registers of a vcpu.

    Attributes:
        width: 8 in long mode, else 4.
        general: rax to r15, rip, rflags by name; eax to edi, eip, eflags of width 4.
        segments: selectors, cs to gs.
        fs_base: the base in force.
        gs_base: the base in force.
        inactive_gs_base: the base that swapgs would load.
        control: cr0, cr2, cr3, cr4 as far as they are kept. The frame in a PV guest's cr3 is a pfn in a stream, and an
            mfn elsewhere.
        in_kernel: whether the vcpu was in kernel mode.
    """

    width: Width
    general: dict[str, int]
    segments: dict[str, int]
    fs_base: int
    gs_base: int
    inactive_gs_base: int
    control: dict[str, int]
    in_kernel: bool

    @property
    def ip(self) -> int:
        """The instruction pointer: rip or eip."""
        return self.general["rip" if self.width == 8 else "eip"]

    @property
    def sp(self) -> int:
        """The stack pointer: rsp or esp."""
        return self.general["rsp" if self.width == 8 else "esp"]

    @property
    def flags(self) -> int:
        """The flags register: rflags or eflags."""
        return self.general["rflags" if self.width == 8 else "eflags"]

    @classmethod
    def from_pv_context(cls, context: np.void, width: Width) -> Registers:
        """Read a PV vcpu's vcpu_guest_context (abi.x86.VCPU_GUEST_CONTEXT)."""
        user = context["user_regs"]
        names = [*GENERAL[width], *(("rip", "rflags") if width == 8 else ("eip", "eflags"))]
        in_kernel = bool(int(context["flags"]) & VGCF_IN_KERNEL)
        fs_base = gs_base = inactive = 0
        if width == 8:
            kernel_gs, user_gs = int(context["gs_base_kernel"]), int(context["gs_base_user"])
            fs_base = int(context["fs_base"])
            gs_base, inactive = (kernel_gs, user_gs) if in_kernel else (user_gs, kernel_gs)
        return cls(
            width,
            {name: int(user[name]) for name in names},
            {name: int(user[name]) for name in SEGMENTS},
            fs_base,
            gs_base,
            inactive,
            {f"cr{n}": int(context["ctrlreg"][n]) for n in (0, 2, 3, 4)},
            in_kernel,
        )

    @classmethod
    def from_hvm_cpu(cls, cpu: np.void) -> Registers:
        """Read a vcpu's record in HVM_CONTEXT (abi.hvm_save.HVM_HW_CPU)."""
        width: Width = 8 if int(cpu["msr_efer"]) & EFER_LMA else 4
        return cls(
            width,
            _general(cpu, width),
            {name: int(cpu[f"{name}_sel"]) for name in SEGMENTS},
            int(cpu["fs_base"]),
            int(cpu["gs_base"]),
            int(cpu["shadow_gs"]),
            {name: int(cpu[name]) for name in ("cr0", "cr2", "cr3", "cr4")},
            int(cpu["ss_arbytes"]) >> ATTR_DPL_SHIFT & 3 == 0,
        )

    @classmethod
    def from_hvm_context(cls, context: np.void) -> Registers:
        """Read an HVM vcpu's vcpu_guest_context as a core has it, without EFER.

        An address beyond 4 GiB in rip, rsp, or the base of fs or gs shows that the vcpu is in long mode.
        """
        user, control = context["user_regs"], {f"cr{n}": int(context["ctrlreg"][n]) for n in (0, 2, 3, 4)}
        kernel_gs, user_gs, fs_base = (int(context[name]) for name in ("gs_base_kernel", "gs_base_user", "fs_base"))
        high = max(int(user["rip"]), int(user["rsp"]), kernel_gs, user_gs, fs_base) >> 32
        width: Width = 8 if high and control["cr0"] & CR0_PG and control["cr4"] & CR4_PAE else 4
        segments = {name: int(user[name]) for name in SEGMENTS}
        in_kernel = segments["cs"] & 3 == 0
        gs_base, inactive = (kernel_gs, user_gs) if in_kernel else (user_gs, kernel_gs)
        return cls(width, _general(user, width), segments, fs_base, gs_base, inactive, control, in_kernel)

    @property
    def paging(self) -> Paging:
        """The paging mode of an HVM guest's vcpu."""
        control = self.control
        return paging_mode(control["cr0"], control["cr3"], control["cr4"], long=self.width == 8)

    @property
    def top(self) -> Pfn:
        """The pfn of an HVM guest's top table; it has no meaning while paging is off."""
        cr3 = self.control["cr3"]
        return Pfn((cr3 & PTE_FRAME_MASK if self.width == 8 else cr3 & 0xFFFF_FFFF) >> PAGE_SHIFT)


def _general(regs: np.void, width: Width) -> dict[str, int]:
    """Return the general registers by the names of a width, out of 64-bit ones."""
    names64 = [*GENERAL[8], "rip", "rflags"]
    if width == 8:
        return {name: int(regs[name]) for name in names64}
    names32 = [*GENERAL[4], "eip", "eflags"]
    return {name: int(regs[f"r{name[1:]}"]) & 0xFFFF_FFFF for name in names32}


def gdt_frames(contexts: Iterable[np.void]) -> U64:
    """Return the frames of the GDTs of some vcpus, ascending.

    A GDT with too many entries counts as none.

    Args:
        contexts: The vcpu_guest_context of each vcpu.
    """
    frames: set[int] = set()
    for context in contexts:
        entries = int(context["gdt_ents"])
        if entries <= FIRST_RESERVED_GDT_ENTRY:
            frames.update(context["gdt_frames"][: -(-entries // GDT_ENTRIES_PER_FRAME)].tolist())
    return np.array(sorted(frames), np.uint64)
