"""ELF notes of a core: each vcpu's registers as Linux writes those of a task, and VMCOREINFO.

struct elf_prstatus: Linux, include/linux/elfcore.h and arch/x86/include/asm/user_64.h, user_32.h.
"""

from __future__ import annotations

import struct

from xenpv.abi.declare import Width
from xenpv.export.formats.content import padded
from xenpv.memory.registers import Registers

NT_PRSTATUS = 1
_ORDER: dict[Width, list[str]] = {
    8: ["r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi",
        "orig", "rip", "cs", "rflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"],
    4: ["ebx", "ecx", "edx", "esi", "edi", "ebp", "eax", "ds", "es", "fs", "gs", "orig", "eip", "cs", "eflags", "esp",
        "ss"],
}  # fmt: skip
# Signals, the task's numbers (only the pid is ours), four times; the registers; whether there are those of the FPU.
_PRSTATUS: dict[Width, struct.Struct] = {8: struct.Struct("<32xI76x27Qi4x"), 4: struct.Struct("<24xI44x17Ii")}


def note(name: bytes, kind: int, desc: bytes) -> bytes:
    """One note: name and content each padded to 4 bytes."""
    owner = name + b"\0"
    return struct.pack("<3I", len(owner), len(desc), kind) + padded(owner, 4) + padded(desc, 4)


def prstatus(vcpu: int, registers: Registers | None, width: Width) -> bytes:
    """A vcpu as a task of pid vcpu + 1, since 0 is none; all zeros where its registers are not known."""
    values = dict.fromkeys(_ORDER[width], 0)
    if registers is not None:
        values |= {name: value for name, value in (registers.general | registers.segments).items() if name in values}
        if width == 8:
            values |= {"fs_base": registers.fs_base, "gs_base": registers.gs_base}
    values["orig"] = (1 << 8 * width) - 1  # in no system call
    return note(b"CORE", NT_PRSTATUS, _PRSTATUS[width].pack(vcpu + 1, *(values[name] for name in _ORDER[width]), 0))


def of_vcpus(registers: dict[int, Registers | None], width: Width) -> bytes:
    """A note for each vcpu up to the last whose registers are known: readers number them as they come."""
    last = max((vcpu for vcpu, known in registers.items() if known is not None), default=-1)
    return b"".join(prstatus(vcpu, registers.get(vcpu), width) for vcpu in range(last + 1))


def vmcoreinfo(text: bytes | None) -> bytes:
    """The note that debuggers of Linux look for, none where there is no text."""
    return b"" if text is None else note(b"VMCOREINFO", 0, text)
