"""Changes of one record or page of a save file, of a kind that Xen may refuse: what a restorer does with each."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.support.xsave import xsave
from xenpv.abi.domctl import CPUID_LEAF
from xenpv.cpu.policy import xcr0_max
from xenpv.source.saved import SavedDomain
from xenpv.stream.framing import Record

NO_SUBLEAF = 0xFFFF_FFFF
HOLE = 0x0000_9000_0000_0000  # not canonical
_SPEC_CTRL, _TSC_AUX, _MISC_FEATURES = 0x48, 0xC000_0103, 0x140


class SaveFile:
    """The bytes of a save file, and where its records and pages are."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        with SavedDomain.open(str(path)) as saved:
            self.contents = saved.contents
            self._gdt = int(saved.contents.index.offsets(saved.gdt_pfns()[:1])[0])

    def set_body(self, record: Record | None, change: Callable[[bytes], bytes]) -> bytes:
        """Return the file with another body of a record, of any length."""
        assert record is not None
        start = record.offset + 8
        body = change(self.data[start : start + record.length])
        kind = self.data[record.offset : record.offset + 4]
        padding = bytes(-len(body) % 8)
        rest = self.data[start + record.length + -record.length % 8 :]
        return self.data[: record.offset] + kind + struct.pack("<I", len(body)) + body + padding + rest

    def without(self, record: Record | None) -> bytes:
        """Return the file without a record."""
        assert record is not None
        end = record.offset + 8 + record.length + -record.length % 8
        return self.data[: record.offset] + self.data[end:]

    def set_descriptor(self, index: int, descriptor: int) -> bytes:
        """Return the file with another descriptor in the GDT."""
        return _put(self.data, self._gdt + index * 8, struct.pack("<Q", descriptor))


Edit = Callable[[SaveFile], bytes]
EDITS: dict[str, Edit] = {"nothing": lambda file: file.data}


def has_xsave(file: SaveFile) -> bool:
    """Return whether the guest, and so the host, has XSAVE."""
    record = file.contents.cpuid_policy
    assert record is not None
    return xcr0_max(bytes(record.data)) != 0


def _put(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


# --- TSC -------------------------------------------------------------------------------------------------------------
# A frequency of 2^29 kHz is not among them: Xen 4.17.0 and older hang on it.


def _tsc(name: str, at: int, value: int) -> None:
    EDITS[f"TSC: {name}"] = lambda file: file.set_body(
        file.contents.tsc, lambda body: _put(body, at, struct.pack("<I", value))
    )


_tsc("mode 1", 0, 1)
_tsc("mode 2", 0, 2)
_tsc("mode 3", 0, 3)
_tsc("mode 2^32 - 1", 0, 0xFFFF_FFFF)
_tsc("0 kHz", 4, 0)
EDITS["TSC: no record"] = lambda file: file.without(file.contents.tsc)


# --- XSAVE: of a guest that has used x87 and SSE, since that of litmus may have used nothing -------------------------


def _xsave(name: str, data: bytes) -> None:
    EDITS[f"XSAVE: {name}"] = lambda file: file.set_body(file.contents.vcpus[0].xsave, lambda body: body[:8] + data)


_PKRU = 1 << 9
_xsave("x87 and SSE", xsave(3, 3, 576))
_xsave("8 bytes too short", xsave(3, 3, 568))
_xsave("8 bytes too long", xsave(3, 3, 584))
_xsave("an area for AVX", xsave(3, 3, 832))
_xsave("the header alone", xsave(3, 3, 0))
_xsave("the header alone, of 0", bytes(16))
_xsave("the header alone, without xcr0_accum", xsave(3, 0, 0))
_xsave("an area for nothing", xsave(0, 0, 576, 0))
_xsave("xcr0 without x87", xsave(2, 3, 576))
_xsave("xcr0_accum without x87", xsave(2, 2, 576, 2))
_xsave("xcr0 beyond xcr0_accum", xsave(_PKRU | 3, 3, 576))
_xsave("protection keys", xsave(_PKRU | 3, _PKRU | 3, 2696))
_xsave("xstate_bv beyond xcr0_accum", xsave(3, 3, 576, 7))
_xsave("xcomp_bv", xsave(3, 3, 576, xcomp_bv=1 << 63 | 3))
_xsave("a reserved byte", xsave(3, 3, 576, reserved=1))


# --- MSRs, extended state, context -----------------------------------------------------------------------------------


def _msrs(name: str, *entries: tuple[int, int, int]) -> None:
    """Put MSRs into a new record of vcpu 0, in front of its basic state: not every guest has some."""
    body = struct.pack("<II", 0, 0) + b"".join(struct.pack("<IIQ", *entry) for entry in entries)
    record = struct.pack("<II", 0x0C, len(body)) + body + bytes(-len(body) % 8)

    def edit(file: SaveFile) -> bytes:
        basic = file.contents.vcpus[0].basic
        assert basic is not None
        data = file.data if (old := file.contents.vcpus[0].msrs) is None else file.without(old)
        return data[: basic.offset] + record + data[basic.offset :]

    EDITS[f"MSRs: {name}"] = edit


_msrs("of an unknown index", (0xC000_0080, 0, 1))
_msrs("reserved is not 0", (_MISC_FEATURES, 1, 0))
_msrs("too many", *[(_MISC_FEATURES, 0, 0)] * 12)
_msrs("no bit", (_MISC_FEATURES, 0, 0))
_msrs("a bit that no guest sets", (_MISC_FEATURES, 0, 2))
_msrs("TSC_AUX of 33 bits", (_TSC_AUX, 0, 1 << 32))


def _extended(name: str, at: int, value: int) -> None:
    EDITS[f"EXTENDED: {name}"] = lambda file: file.set_body(
        file.contents.vcpus[0].extended, lambda body: _put(body, 8 + at, struct.pack("<Q", value))
    )


_extended("syscall32's handler is not canonical", 8, HOLE)
_extended("sysenter's handler is not canonical", 16, 1 << 63)
_extended("an unknown machine-check capability", 32, 1 << 25 | 2)


def _context(name: str, at: int, value: int) -> None:
    EDITS[f"BASIC: {name}"] = lambda file: file.set_body(
        file.contents.vcpus[0].basic, lambda body: _put(body, 8 + at, struct.pack("<Q", value))
    )


_TRAP_TABLE = 512 + 8 + 200
_context("a handler is not canonical", _TRAP_TABLE + 16 * 200 + 8, HOLE)


# --- descriptors: a present one of 64 bits is type and flags in bits 40 to 47 ----------------------------------------


def _descriptor(name: str, descriptor: int) -> None:
    EDITS[f"GDT: {name}"] = lambda file: file.set_descriptor(20, descriptor)


_PRESENT = 1 << 47
_descriptor("a task state segment", _PRESENT | 9 << 40)
_descriptor("an interrupt gate", _PRESENT | 14 << 40)
_descriptor("a task state segment that is not present", 9 << 40)
_descriptor("the second half of a call gate", _PRESENT)
_descriptor("a call gate", _PRESENT | 3 << 45 | 12 << 40 | 0xE033 << 16)
_descriptor("a call gate into Xen's own segments", _PRESENT | 3 << 45 | 12 << 40 | 0xE008 << 16)
_descriptor("a call gate with a reserved bit", _PRESENT | 12 << 40 | 1 << 32 | 0xE033 << 16)
_descriptor("a code segment of ring 0", 0x00AF_9B00_0000_FFFF)


# --- CPU policy ------------------------------------------------------------------------------------------------------


def _leaf(name: str, leaf: int, subleaf: int, eax: int = 0) -> None:
    EDITS[f"CPUID: {name}"] = lambda file: file.set_body(
        file.contents.cpuid_policy, lambda body: body + struct.pack("<6I", leaf, subleaf, eax, 0, 0, 0)
    )


_leaf("a basic leaf too far", 0xE, NO_SUBLEAF)
_leaf("an extended leaf too far", 0x8000_0022, NO_SUBLEAF)
_leaf("a hypervisor's leaf", 0x4000_0001, NO_SUBLEAF)
_leaf("a subleaf of a leaf without any", 5, 0)
_leaf("a cache too far", 4, 6)
_leaf("a state too far", 0xD, 63)
EDITS["CPUID: too many leaves"] = lambda file: file.set_body(
    file.contents.cpuid_policy, lambda body: body + struct.pack("<6I", 5, NO_SUBLEAF, 0, 0, 0, 0) * 121
)


def _in_leaf(name: str, leaf: int, field: str, change: Callable[[int], int]) -> None:
    def edit(body: bytes) -> bytes:
        leaves = np.frombuffer(bytearray(body), CPUID_LEAF[8])
        row = np.flatnonzero(leaves["leaf"] == leaf)[0]
        leaves[field][row] = change(int(leaves[field][row]))
        return leaves.tobytes()

    EDITS[f"CPUID: {name}"] = lambda file: file.set_body(file.contents.cpuid_policy, edit)


_in_leaf("more basic leaves than Xen has", 0, "a", lambda _: 0xE)
_in_leaf("more extended leaves than Xen has", 0x8000_0000, "a", lambda _: 0x8000_0022)
_in_leaf("no XSAVE", 1, "c", lambda bits: bits & ~(1 << 26))


def _msr(name: str, *entries: tuple[int, int, int]) -> None:
    EDITS[f"MSR policy: {name}"] = lambda file: file.set_body(
        file.contents.msr_policy, lambda _: b"".join(struct.pack("<IIQ", *entry) for entry in entries)
    )


_msr("an unknown MSR", (0x1B, 0, 0))
_msr("flags", (0xCE, 1, 0))
_msr("too many", *[(0xCE, 0, 0)] * 3)
_msr("wider than Xen has it", (0xCE, 0, 1 << 32))
_msr("a bit that Xen does not know", (0xCE, 0, 1 << 30))
_msr("nothing", (0xCE, 0, 0), (0x10A, 0, 0))
