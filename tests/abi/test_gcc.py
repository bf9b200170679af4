"""The declared ABI against gcc's view of Xen's public headers: both widths, each version of which there are headers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.gcc import NoCompiler, evaluate, header_folders
from tests.support.requirements import cannot_run
from xenpv.abi import declare, domctl, hvm_save, x86, xen
from xenpv.abi.declare import Array, Struct, Width
from xenpv.abi.domctl import PageType
from xenpv.memory import page_tables

HEADERS = ["xen.h", "domctl.h"]
WIDTHS: tuple[Width, Width] = (8, 4)
HOW = "fetch them with `python -m lab fetch`, or set XENPV_XEN_HEADERS to a folder with xen/xen.h in it (libxen-dev)"

STRUCTS = {
    name: value
    for module in (xen, x86, domctl, hvm_save)
    for name, value in vars(module).items()
    if isinstance(value, Struct) and value.name  # those without a C name are checked as members of others
}


@pytest.fixture(params=["XENPV_XEN_HEADERS"] if os.environ.get("XENPV_XEN_HEADERS") else ["4.14", "4.17", "4.20"])
def include(request: pytest.FixtureRequest) -> Path:
    folder = header_folders().get(request.param)
    if folder is None:
        cannot_run(f"no public headers of Xen {request.param}: {HOW}")
        raise AssertionError
    return folder


def values(include: Path, width: Width, expressions: list[str]) -> list[int]:
    try:
        return evaluate(include, HEADERS, expressions, width)
    except NoCompiler as e:
        cannot_run(str(e))
        raise


def members(struct: Struct, width: Width, prefix: str = "") -> Iterator[tuple[str, int, int, int]]:
    """Path, offset, size and number of elements of each member that C has under that name; padding is ours to name."""
    for name, member in struct.members(width):
        if name.startswith("_"):
            continue
        path = prefix + name
        outer = struct.offset(width, name)
        # A count is asked for where elements are more than bytes: fpu_ctxt is an array within a struct of its own.
        count = member.count(width) if isinstance(member, Array) and member.element is not declare.U8 else 1
        yield path, outer, member.size(width), count
        if isinstance(member, Struct):
            for inner, offset, size, n in members(member, width, path + "."):
                yield inner, outer + offset, size, n


@pytest.mark.parametrize("width", WIDTHS, ids=["64", "32"])
def test_structs_have_size_and_members_of_c(include: Path, width: Width) -> None:
    expected: list[tuple[str, int]] = []
    for struct in STRUCTS.values():
        c = f"struct {struct.name}"
        expected.append((f"sizeof({c})", struct.size(width)))
        for path, offset, size, count in members(struct, width):
            member = f"(({c} *)0)->{path}"
            expected.append((f"__builtin_offsetof({c}, {path})", offset))
            expected.append((f"sizeof({member})", size))
            if count > 1:
                expected.append((f"sizeof({member}) / sizeof({member}[0])", count))
    found = values(include, width, [expression for expression, _ in expected])
    assert list(zip((e for e, _ in expected), found, strict=True)) == expected


@pytest.mark.parametrize("width", WIDTHS, ids=["64", "32"])
def test_structs_have_alignment_of_c(include: Path, width: Width) -> None:
    found = values(include, width, [f"__alignof__(struct {struct.name})" for struct in STRUCTS.values()])
    declared = [struct.align(width) for struct in STRUCTS.values()]
    # The tools' structs align 64-bit members to 8 at both widths (uint64_aligned_t). Their offsets are the same, since
    # each such member is at a multiple of 8 anyway; and how bytes in a record are aligned does not matter.
    for struct, ours, theirs in zip(STRUCTS.values(), declared, found, strict=True):
        assert ours == theirs or (width == 4 and struct.header != "xen.h" and theirs == 8), struct.name


CONSTANTS: dict[str, Any] = {
    "SIF_PRIVILEGED": xen.SIF_PRIVILEGED,
    "SIF_INITDOMAIN": xen.SIF_INITDOMAIN,
    "SIF_MULTIBOOT_MOD": xen.SIF_MULTIBOOT_MOD,
    "SIF_MOD_START_PFN": xen.SIF_MOD_START_PFN,
    "SIF_VIRT_P2M_4TOOLS": xen.SIF_VIRT_P2M_4TOOLS,
    "XEN_LEGACY_MAX_VCPUS": xen.XEN_LEGACY_MAX_VCPUS,
    "VGCF_in_kernel": x86.VGCF_IN_KERNEL,
    "HVM_SAVE_CODE(END)": hvm_save.END,
    "HVM_SAVE_CODE(HEADER)": hvm_save.HEADER,
    "HVM_SAVE_CODE(CPU)": hvm_save.CPU,
    "VGCF_online": x86.VGCF_ONLINE,
    "FIRST_RESERVED_GDT_ENTRY": x86.FIRST_RESERVED_GDT_ENTRY,
    "FIRST_RESERVED_GDT_PAGE": x86.FIRST_RESERVED_GDT_ENTRY // x86.GDT_ENTRIES_PER_FRAME,
    "sizeof(((struct vcpu_guest_context *)0)->gdt_frames) / sizeof(unsigned long)": 16,
    "~0UL": xen.INVALID_MFN,
    "XEN_DOMCTL_PFINFO_LTAB_SHIFT": 28,
    "XEN_DOMCTL_PFINFO_LPINTAB >> 28": domctl.PINNED,
    **{f"XEN_DOMCTL_PFINFO_{t.name} >> 28": t.value for t in PageType if not t.name.endswith("_PIN")},
    **{
        f"(XEN_DOMCTL_PFINFO_{t.name[:5]} | XEN_DOMCTL_PFINFO_LPINTAB) >> 28": t.value
        for t in PageType
        if t.name.endswith("_PIN")
    },
}
ONE_WIDTH: dict[Width, dict[str, int]] = {
    8: {
        "HYPERVISOR_VIRT_START": x86.XEN_VIRT_64.start,
        "HYPERVISOR_VIRT_END": x86.XEN_VIRT_64.stop,
        "(HYPERVISOR_VIRT_START >> 39) & 511": x86.XEN_L4_SLOTS.start,
        "(HYPERVISOR_VIRT_END >> 39) & 511": x86.XEN_L4_SLOTS.stop,
        "sizeof(((struct xen_domctl *)0)->u)": domctl.EXT_VCPUCONTEXT_MAX,
    },
    4: {
        "__HYPERVISOR_VIRT_START_PAE": x86.XEN_VIRT_PAE.start,
        "(__HYPERVISOR_VIRT_START_PAE >> 21) & 511": x86.XEN_PAE_L2_FIRST,
        "sizeof(((struct xen_domctl *)0)->u)": domctl.EXT_VCPUCONTEXT_MAX,
    },
}


@pytest.mark.parametrize("width", WIDTHS, ids=["64", "32"])
def test_constants_equal_the_headers(include: Path, width: Width) -> None:
    expected = {e: v[width] if isinstance(v, dict) else v for e, v in CONSTANTS.items()} | ONE_WIDTH[width]
    assert dict(zip(expected, values(include, width, list(expected)), strict=True)) == expected


@pytest.mark.parametrize("width", WIDTHS, ids=["64", "32"])
def test_cr3_folding_equals_xens_macros(include: Path, width: Width) -> None:
    frames = [0, 1, 0xFFFFF, 0x10_0000, 0x10_0001, 0xABCD_EF01, 0xFFFF_FFFF]
    cr3s = values(include, width, [f"xen_pfn_to_cr3({frame:#x}UL)" for frame in frames])
    assert [page_tables.cr3_to_frame(cr3, width) for cr3 in cr3s] == frames
    back = values(include, width, [f"xen_cr3_to_pfn({cr3:#x}UL)" for cr3 in cr3s])
    assert back == frames


def test_structs_all_are_checked() -> None:
    assert set(STRUCTS) >= {"START_INFO", "SHARED_INFO", "VCPU_GUEST_CONTEXT", "EXT_VCPUCONTEXT", "VCPU_MSR"}
    assert {struct.header for struct in STRUCTS.values()} <= {
        "xen.h",
        "domctl.h",
        "arch-x86/xen.h",
        "arch-x86/hvm/save.h",
        "hvm/save.h",
    }


def test_evaluate_unknown_member_fails() -> None:
    """A struct that is declared wrong would be found: one member left out, one too wide."""
    folders = header_folders()
    if not folders:
        cannot_run(f"no public headers of Xen: {HOW}")
    wrong = Struct("trap_info", "xen.h", vector=declare.U8, flags=declare.U16, cs=declare.U16, address=declare.ULONG)
    include = next(iter(folders.values()))
    found = values(include, 4, ["sizeof(struct trap_info)", "__builtin_offsetof(struct trap_info, cs)"])
    assert found != [wrong.size(4), wrong.offset(4, "cs")]
    with pytest.raises(AssertionError, match="no_such_member"):
        evaluate(include, HEADERS, ["__builtin_offsetof(struct trap_info, no_such_member)"], 8)
