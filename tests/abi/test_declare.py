"""One declaration, two layouts: against numbers that Xen's own tree holds, and the rules of C spelled out."""

from __future__ import annotations

import numpy as np
import pytest

from xenpv.abi.declare import U8, U16, U32, U64, ULONG, Array, Chars, Scalar, Struct, WidthOnly, array
from xenpv.abi.domctl import CPUID_LEAF, EXT_VCPUCONTEXT, EXT_VCPUCONTEXT_MAX, MSR_ENTRY, VCPU_MSR
from xenpv.abi.x86 import TRAP_INFO, USER_REGS, VCPU_GUEST_CONTEXT
from xenpv.abi.xen import ARCH_SHARED_INFO, ARCH_VCPU_INFO, SHARED_INFO, START_INFO, VCPU_INFO, VCPU_TIME_INFO

# xen.git:tools/include/xen-foreign/reference.size: x86_32, x86_64
REFERENCE_SIZE = {
    "start_info": (START_INFO, 1112, 1168),
    "trap_info": (TRAP_INFO, 8, 16),
    "cpu_user_regs": (USER_REGS, 68, 200),
    "vcpu_guest_context": (VCPU_GUEST_CONTEXT, 2800, 5168),
    "arch_vcpu_info": (ARCH_VCPU_INFO, 24, 16),
    "vcpu_time_info": (VCPU_TIME_INFO, 32, 32),
    "vcpu_info": (VCPU_INFO, 64, 64),
    "arch_shared_info": (ARCH_SHARED_INFO, 28, 48),
    "shared_info": (SHARED_INFO, 2344, 3136),
}

# Offsets that xenpv lives by: 32-bit, 64-bit.
OFFSETS = {
    "suspend record": (VCPU_GUEST_CONTEXT, {4: "user_regs.edx", 8: "user_regs.rdx"}, 524, 616),
    "gdt_frames": (VCPU_GUEST_CONTEXT, {4: "gdt_frames", 8: "gdt_frames"}, 2640, 4832),
    "gdt_ents": (VCPU_GUEST_CONTEXT, {4: "gdt_ents", 8: "gdt_ents"}, 2704, 4960),
    "ctrlreg": (VCPU_GUEST_CONTEXT, {4: "ctrlreg", 8: "ctrlreg"}, 2716, 4984),
    "vm_assist": (VCPU_GUEST_CONTEXT, {4: "vm_assist", 8: "vm_assist"}, 2796, 5136),
    "shared_info": (START_INFO, {4: "shared_info", 8: "shared_info"}, 36, 40),
    "store_mfn": (START_INFO, {4: "store_mfn", 8: "store_mfn"}, 44, 56),
    "console mfn": (START_INFO, {4: "console.domU.mfn", 8: "console.domU.mfn"}, 52, 72),
    "cmd_line": (START_INFO, {4: "cmd_line", 8: "cmd_line"}, 80, 128),
    "nr_p2m_frames": (START_INFO, {4: "nr_p2m_frames", 8: "nr_p2m_frames"}, 1108, 1160),
    "evtchn_mask": (SHARED_INFO, {4: "evtchn_mask", 8: "evtchn_mask"}, 2176, 2560),
    "max_pfn": (SHARED_INFO, {4: "arch.max_pfn", 8: "arch.max_pfn"}, 2316, 3088),
    "frame_list_list": (
        SHARED_INFO,
        {4: "arch.pfn_to_mfn_frame_list_list", 8: "arch.pfn_to_mfn_frame_list_list"},
        2320,
        3096,
    ),
    "p2m_cr3": (SHARED_INFO, {4: "arch.p2m_cr3", 8: "arch.p2m_cr3"}, 2328, 3112),
    "p2m_vaddr": (SHARED_INFO, {4: "arch.p2m_vaddr", 8: "arch.p2m_vaddr"}, 2332, 3120),
    "p2m_generation": (SHARED_INFO, {4: "arch.p2m_generation", 8: "arch.p2m_generation"}, 2336, 3128),
    "wc_sec_hi": (SHARED_INFO, {4: "arch.wc_sec_hi", 8: "wc_sec_hi"}, 2340, 3084),
}


@pytest.mark.parametrize("name", REFERENCE_SIZE)
def test_struct_sizes_equal_reference_size(name: str) -> None:
    struct, size4, size8 = REFERENCE_SIZE[name]
    assert (struct.size(4), struct.size(8)) == (size4, size8)
    assert (struct[4].itemsize, struct[8].itemsize) == (size4, size8)
    assert struct.name == name


@pytest.mark.parametrize("name", OFFSETS)
def test_struct_offsets_equal_the_headers(name: str) -> None:
    struct, paths, at4, at8 = OFFSETS[name]
    assert (struct.offset(4, paths[4]), struct.offset(8, paths[8])) == (at4, at8)


def test_record_structs_have_one_layout() -> None:
    for struct, size in ((EXT_VCPUCONTEXT, 64), (VCPU_MSR, 16), (CPUID_LEAF, 24), (MSR_ENTRY, 16)):
        assert struct.size(4) == struct.size(8) == size
    assert EXT_VCPUCONTEXT.size(8) <= EXT_VCPUCONTEXT_MAX


def test_struct_members_are_aligned_per_psabi() -> None:
    struct = Struct("s", "", a=U8, b=U64, c=U8, d=ULONG, e=U16)
    assert [struct.offset(8, name) for name in "abcde"] == [0, 8, 16, 24, 32]
    assert [struct.offset(4, name) for name in "abcde"] == [0, 4, 12, 16, 20]
    assert (struct.size(8), struct.size(4)) == (40, 24)
    assert (struct.align(8), struct.align(4)) == (8, 4)


def test_struct_with_nested_members_has_both_layouts() -> None:
    inner = Struct("inner", "", x=U32, y=ULONG)
    outer = Struct("outer", "", text=Chars(3), only=WidthOnly(4, U16), many=array(inner, 3, count4=2), last=inner)
    assert dict(outer.members(8)).keys() == {"text", "many", "last"}
    assert dict(outer.members(4)).keys() == {"text", "only", "many", "last"}
    assert (outer.offset(8, "many"), outer.offset(4, "many")) == (8, 8)
    assert (outer.offset(8, "last.y"), outer.offset(4, "last.y")) == (8 + 3 * 16 + 8, 8 + 2 * 8 + 4)
    assert outer[8]["many"].shape == (3,)
    assert isinstance(array(U8, 2), Array)


def test_scalar_sizes_differ_by_width() -> None:
    struct = Struct("s", "", a=Scalar(2, 4), b=U8)
    assert (struct.offset(4, "b"), struct.offset(8, "b")) == (2, 4)


def test_dtype_agrees_with_declaration() -> None:
    for struct in (START_INFO, SHARED_INFO, VCPU_GUEST_CONTEXT, EXT_VCPUCONTEXT):
        for width in (4, 8):
            dtype = struct[width]
            assert dtype.names == tuple(name for name, _ in struct.members(width))
            assert dtype.fields is not None
            for name in dtype.names:
                assert dtype.fields[name][1] == struct.offset(width, name)


def test_struct_read_is_a_little_endian_view() -> None:
    data = bytearray(START_INFO.size(8) + 8)
    data[8 + 32 : 8 + 40] = (0x0102030405060708).to_bytes(8, "little")
    info = START_INFO.read(data, 8, offset=8)
    assert int(info["nr_pages"]) == 0x0102030405060708
    data[8 + 32] = 0xFF
    assert int(info["nr_pages"]) == 0x01020304050607FF
    with pytest.raises(ValueError, match="buffer"):
        START_INFO.read(data[:100], 8)


def test_struct_names_are_those_of_c() -> None:
    context = np.zeros(1, VCPU_GUEST_CONTEXT[8])[0]
    context["user_regs"]["rdx"] = 0x1234
    assert context.tobytes()[616:618] == b"\x34\x12"
    for width in (4, 8):
        names = USER_REGS[width].names
        assert names is not None
        assert {"error_code", "entry_vector", "cs", "saved_upcall_mask", "gs"} <= set(names)
