"""A vcpu's registers, by their own names, whatever structure they were kept in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.hvm_save import ATTR_DPL_SHIFT
from xenpv.abi.x86 import CR0_PG, CR4_PAE, EFER_LMA, PTE_FRAME_MASK, VGCF_IN_KERNEL
from xenpv.frames import PAGE_SHIFT, Pfn
from xenpv.memory.paging import Paging, paging_of

GENERAL = {
    8: ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"],
    4: ["eax", "ebx", "ecx", "edx", "esi", "edi", "ebp", "esp"],
}
SEGMENTS = ["cs", "ss", "ds", "es", "fs", "gs"]


@dataclass(frozen=True, slots=True)
class Registers:
    """What a vcpu's registers held. ``general``: rax to r15 (eax to edi of a 32-bit guest), and what follows of the
    width too: rip, rflags. ``segments``: selectors, cs to gs. ``fs_base`` and ``gs_base`` are those in force,
    ``other_gs_base`` the one that swapgs brings. ``control``: cr0, cr2, cr3, cr4 as far as they are kept; cr3's frame
    is a pfn where the domain's memory has pfns (a stream), else as the machine had it. An HVM guest's ``width`` is 8 in
    long mode, and its cr3 is its own.
    """

    width: Width
    general: dict[str, int]
    segments: dict[str, int]
    fs_base: int
    gs_base: int
    other_gs_base: int
    control: dict[str, int]
    in_kernel: bool

    @property
    def ip(self) -> int:
        """Where it was: rip or eip."""
        return self.general["rip" if self.width == 8 else "eip"]

    @property
    def sp(self) -> int:
        """Its stack: rsp or esp."""
        return self.general["rsp" if self.width == 8 else "esp"]

    @property
    def flags(self) -> int:
        """Rflags or eflags."""
        return self.general["rflags" if self.width == 8 else "eflags"]

    @classmethod
    def of_context(cls, context: np.void, width: Width) -> Registers:
        """Out of a vcpu_guest_context (abi.x86.VCPU_GUEST_CONTEXT)."""
        user = context["user_regs"]
        names = [*GENERAL[width], *(("rip", "rflags") if width == 8 else ("eip", "eflags"))]
        in_kernel = bool(int(context["flags"]) & VGCF_IN_KERNEL)
        fs_base = gs_base = other = 0
        if width == 8:
            kernel, of_user = int(context["gs_base_kernel"]), int(context["gs_base_user"])
            fs_base, gs_base, other = int(context["fs_base"]), *((kernel, of_user) if in_kernel else (of_user, kernel))
        return cls(
            width,
            {name: int(user[name]) for name in names},
            {name: int(user[name]) for name in SEGMENTS},
            fs_base,
            gs_base,
            other,
            {f"cr{n}": int(context["ctrlreg"][n]) for n in (0, 2, 3, 4)},
            in_kernel,
        )

    @classmethod
    def of_hvm(cls, cpu: np.void) -> Registers:
        """Out of a vcpu's record in HVM_CONTEXT (abi.hvm_save.HVM_HW_CPU)."""
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
    def of_hvm_context(cls, context: np.void) -> Registers:
        """Out of the vcpu_guest_context of an HVM guest, as a core has it: without EFER.

        That it is in long mode is told by an address beyond 4 GiB in one of its registers: rip, rsp, or the bases of fs
        and gs.
        """
        user, control = context["user_regs"], {f"cr{n}": int(context["ctrlreg"][n]) for n in (0, 2, 3, 4)}
        kernel, of_user, fs_base = (int(context[name]) for name in ("gs_base_kernel", "gs_base_user", "fs_base"))
        far = max(int(user["rip"]), int(user["rsp"]), kernel, of_user, fs_base) >> 32
        width: Width = 8 if far and control["cr0"] & CR0_PG and control["cr4"] & CR4_PAE else 4
        segments = {name: int(user[name]) for name in SEGMENTS}
        in_kernel = segments["cs"] & 3 == 0
        gs_base, other = (kernel, of_user) if in_kernel else (of_user, kernel)
        return cls(width, _general(user, width), segments, fs_base, gs_base, other, control, in_kernel)

    @property
    def paging(self) -> Paging:
        """How this vcpu of an HVM guest goes through page tables."""
        control = self.control
        return paging_of(control["cr0"], control["cr3"], control["cr4"], long=self.width == 8)

    @property
    def top(self) -> Pfn:
        """The pfn of the top table of this vcpu of an HVM guest, of no meaning while paging is off."""
        cr3 = self.control["cr3"]
        return Pfn((cr3 & PTE_FRAME_MASK if self.width == 8 else cr3 & 0xFFFF_FFFF) >> PAGE_SHIFT)


def _general(regs: np.void, width: Width) -> dict[str, int]:
    """The general registers, by the names of a width, out of 64-bit ones."""
    wide = [*GENERAL[8], "rip", "rflags"]
    if width == 8:
        return {name: int(regs[name]) for name in wide}
    narrow = [*GENERAL[4], "eip", "eflags"]
    return {name: int(regs[f"r{name[1:]}"]) & 0xFFFF_FFFF for name in narrow}
