"""ELF notes of a core: each vcpu's registers, and VMCOREINFO.

Registers are written as Linux writes those of a task.

Source: struct elf_prstatus in Linux, include/linux/elfcore.h, arch/x86/include/asm/user_64.h and user_32.h.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from xenpv.abi.declare import Width
from xenpv.export.formats.content import padded
from xenpv.memory.registers import Registers

NT_PRSTATUS = 1
_REGISTERS: dict[Width, list[str]] = {
    8: ["r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi",
        "orig", "rip", "cs", "rflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"],
    4: ["ebx", "ecx", "edx", "esi", "edi", "ebp", "eax", "ds", "es", "fs", "gs", "orig", "eip", "cs", "eflags", "esp",
        "ss"],
}  # fmt: skip
# Signals and four ids, of which only the pid is set; times; the registers; whether there are registers of the FPU.
_PRSTATUS: dict[Width, struct.Struct] = {8: struct.Struct("<32xI76x27Qi4x"), 4: struct.Struct("<24xI44x17Ii")}


def note(owner: bytes, note_type: int, desc: bytes) -> bytes:
    """Return one note: owner and content each padded to 4 bytes."""
    name = owner + b"\0"
    return struct.pack("<3I", len(name), len(desc), note_type) + padded(name, 4) + padded(desc, 4)


def prstatus_note(vcpu: int, registers: Registers | None, width: Width) -> bytes:
    """Return a vcpu as a task of pid vcpu + 1, since pid 0 means none.

    All zeros for unknown registers.
    """
    values = dict.fromkeys(_REGISTERS[width], 0)
    if registers is not None:
        values |= {name: value for name, value in (registers.general | registers.segments).items() if name in values}
        if width == 8:
            values |= {"fs_base": registers.fs_base, "gs_base": registers.gs_base}
    values["orig"] = (1 << 8 * width) - 1  # in no system call
    return note(b"CORE", NT_PRSTATUS, _PRSTATUS[width].pack(vcpu + 1, *(values[n] for n in _REGISTERS[width]), 0))


def prstatus_count(registers: Mapping[int, Registers | None]) -> int:
    """Return the number of notes of ``prstatus_notes``.

    They go up to the last vcpu whose registers are known.
    """
    return max((vcpu + 1 for vcpu, known in registers.items() if known is not None), default=0)


def prstatus_notes(registers: Mapping[int, Registers | None], width: Width) -> bytes:
    """Return a note for each vcpu from 0 on, without a gap.

    Readers number them as they come.
    """
    vcpus = range(prstatus_count(registers))
    return b"".join(prstatus_note(vcpu, registers.get(vcpu), width) for vcpu in vcpus)


def vmcoreinfo_note(text: bytes | None) -> bytes:
    """Return the note that debuggers of Linux look for; empty if there is no text."""
    return b"" if text is None else note(b"VMCOREINFO", 0, text)
