"""A vcpu's registers, by their own names, whatever structure they were kept in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import VGCF_IN_KERNEL

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
    is a pfn where the domain's memory has pfns (a stream), else as the machine had it.
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
