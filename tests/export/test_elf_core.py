"""The ELF core, read by pyelftools and drgn."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import drgn
import numpy as np
import pytest

from tests.support.format_readers import look_up_identity, parse_elf
from tests.support.made_domains import FAR, HOLE, PAGE, Sparse, export_domain, made_domain, open_made
from tests.support.vectors import unpack_vector
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from tests.vectors.make import RECIPES, Recipe
from xenpv.abi.declare import Width
from xenpv.abi.x86 import VGCF_IN_KERNEL
from xenpv.errors import GuestError, HostError
from xenpv.export.export import export
from xenpv.export.formats import elf_core
from xenpv.export.formats.content import populated_runs
from xenpv.export.formats.mapped import find_direct_map
from xenpv.memory import frame_tree
from xenpv.runs import Runs
from xenpv.source.open import open_domain

NT_PRSTATUS, CRASH_INFO = 1, 0x100_0001
NO_PADDR = (1 << 64) - 1


@pytest.fixture(params=[8, 4])
def domain(request: pytest.FixtureRequest) -> Domain:
    return made_domain(request.param)


def loads(core: Path) -> list[tuple[Any, bytes]]:
    with core.open("rb") as file:
        return [(s.header, s.data()) for s in parse_elf(file).iter_segments("PT_LOAD")]


def physical(core: Path) -> dict[int, bytes]:
    """Page content by physical address. Segments ascend and are apart, as Volatility wants them; those that show the
    same bytes at other virtual addresses come last, and have no physical one.
    """
    out: dict[int, bytes] = {}
    behind = 0
    for header, data in loads(core):
        assert header["p_filesz"] == header["p_memsz"] == len(data) > 0
        assert header["p_paddr"] >= behind
        behind = header["p_paddr"] + len(data) if header["p_paddr"] != NO_PADDR else NO_PADDR
        for at in range(0, len(data), PAGE) if behind != NO_PADDR else ():
            out[(header["p_paddr"] + at) // PAGE] = data[at : at + PAGE]
    return out


def notes(core: Path) -> list[tuple[str, int, bytes]]:
    with core.open("rb") as file:
        segment = next(parse_elf(file).iter_segments("PT_NOTE"))
        return list(_notes(segment.data()))


def _notes(data: bytes) -> Iterator[tuple[str, int, bytes]]:
    at = 0
    while at < len(data):
        name, desc, kind = struct.unpack_from("<III", data, at)
        desc_offset = at + 12 + (name + 3 & -4)
        yield data[at + 12 :][: name - 1].decode(), kind, data[desc_offset : desc_offset + desc]
        at = desc_offset + (desc + 3 & -4)


def test_elf_has_each_page_at_its_physical_address(domain: Domain, tmp_path: Path) -> None:
    core, exported = export_domain(domain, tmp_path, "elf")
    pages_in_file = physical(core)
    there = {pfn: bytes(page) for pfn, page in domain.pages.items()}
    assert {pfn: page for pfn, page in pages_in_file.items() if pfn <= FAR + 1} == there
    assert (exported.pages, exported.lost) == (len(there), 0)
    assert exported.zeros == sum(not any(page) for page in there.values()) >= 1
    assert exported.bytes == core.stat().st_size
    assert core.stat().st_mode & 0o777 == 0o600
    with core.open("rb") as file:
        header = parse_elf(file).header
    assert (header["e_type"], header["e_machine"]) == ("ET_CORE", "EM_X86_64" if domain.width == 8 else "EM_386")


def test_elf_has_each_page_at_the_kernels_virtual_address(domain: Domain, tmp_path: Path) -> None:
    core, _ = export_domain(domain, tmp_path, "elf")
    page_at = {}
    for header, data in loads(core):
        for at in range(0, len(data), PAGE):
            page_at[header["p_vaddr"] + at] = data[at : at + PAGE]
    missing = [pfn for pfn, vaddr in domain.vaddrs.items() if page_at.get(vaddr) != bytes(domain.pages[pfn])]
    assert not missing


def test_elf_shows_a_page_mapped_twice_in_the_longest_run(tmp_path: Path) -> None:
    domain = pv_domain()
    first = domain.walk(domain.vaddrs[0])[-1]
    domain.table(first.table)[400] = first.pte  # the first page of the kernel's mapping once more, behind it
    core, _ = export_domain(domain, tmp_path, "elf")
    at = [header["p_vaddr"] for header, _ in loads(core)]
    assert domain.vaddrs[0] in at
    assert domain.vaddrs[0] + 400 * PAGE not in at


def test_elf_has_a_prstatus_note_for_each_vcpu(domain: Domain, tmp_path: Path) -> None:
    for n, context in domain.vcpus.items():
        context["user_regs"]["rip" if domain.width == 8 else "eip"] = 0x1000 + n
        context["user_regs"]["rbx" if domain.width == 8 else "ebx"] = 0x2000 + n
        context["user_regs"]["ss"] = 0x30 + n
        if domain.width == 8:
            context["flags"] = VGCF_IN_KERNEL
            context["fs_base"], context["gs_base_kernel"], context["gs_base_user"] = 0x3000 + n, 0x4000 + n, 0x5000 + n
    core, _ = export_domain(domain, tmp_path, "elf")
    status = [desc for name, kind, desc in notes(core) if (name, kind) == ("CORE", NT_PRSTATUS)]
    assert len(status) == 2
    for n, desc in enumerate(status):
        if domain.width == 8:  # struct elf_prstatus of x86-64: 336 bytes, the registers at 112
            assert len(desc) == 336
            regs = struct.unpack_from("<27Q", desc, 112)
            ip, bx, ss, pid = regs[16], regs[5], regs[20], struct.unpack_from("<i", desc, 32)[0]
            assert regs[21:23] == (0x3000 + n, 0x4000 + n)  # fs and gs as they are in force
        else:
            assert len(desc) == 144
            regs = struct.unpack_from("<17I", desc, 72)
            ip, bx, ss, pid = regs[12], regs[0], regs[16], struct.unpack_from("<i", desc, 24)[0]
        assert (ip, bx, ss, pid) == (0x1000 + n, 0x2000 + n, 0x30 + n, n + 1)


def test_elf_with_an_unknown_vcpu_has_zeros_in_its_note(tmp_path: Path) -> None:
    domain = made_domain()
    domain.vcpus = {0: domain.vcpus[0], 2: domain.vcpus[1]}
    core, _ = export_domain(domain, tmp_path, "elf")
    status = [desc for name, kind, desc in notes(core) if kind == NT_PRSTATUS]  # rip is the 17th register
    assert [any(desc[240:248]) for desc in status] == [True, False, True]


def test_elf_has_vmcoreinfo_as_a_note(domain: Domain, tmp_path: Path) -> None:
    core, exported = export_domain(domain, tmp_path, "elf")
    text = bytes(domain.pages[domain.places.data[0]]).rstrip(b"\0")
    assert [desc for name, _, desc in notes(core) if name == "VMCOREINFO"] == [text]
    assert exported.remarks == []


def test_elf_without_vmcoreinfo_has_a_remark(tmp_path: Path) -> None:
    domain = made_domain()
    domain.pages[domain.places.data[0]][:] = bytes(PAGE)
    core, exported = export_domain(domain, tmp_path, "elf")
    assert not [name for name, _, _ in notes(core) if name == "VMCOREINFO"]
    assert "VMCOREINFO" in exported.remarks[0]


def test_elf_identity_tree_maps_each_pfn_to_itself(tmp_path: Path) -> None:
    """As crash asks it: the root's frame is the last word of Xen's note."""
    domain = made_domain()
    core, _ = export_domain(domain, tmp_path, "elf")
    (root,) = [
        struct.unpack("<10Q", desc)[-1] for name, kind, desc in notes(core) if (name, kind) == ("Xen", CRASH_INFO)
    ]
    assert root == FAR + 2  # behind the domain's last page
    page = physical(core)
    for pfn in domain.pages:
        assert look_up_identity(page, root, pfn) == pfn
    assert look_up_identity(page, root, HOLE * 512) == (1 << 64) - 1
    first = struct.unpack("<512Q", page[root])
    assert 0 in first  # the list of lists ends there
    assert all(entry for lists in first[: first.index(0)] for entry in struct.unpack("<512Q", page[lists])[:1])


def test_elf_with_65535_segments_counts_them_in_section_0(tmp_path: Path) -> None:
    """65535 and more: the number is in section header 0, and each page that is not there is in no segment."""
    frames = Sparse(70_000)
    pages = populated_runs(frames.extents())
    head = elf_core.Headers(pages, 8, 0, direct_map=0xFFFF_8880_0000_0000).pack(b"")
    core = tmp_path / "head"
    core.write_bytes(head)
    with core.open("r+b") as file:
        file.truncate(len(head) + 70_000 * PAGE)
        elf_file = parse_elf(file)
        assert elf_file.header["e_phnum"] == 0xFFFF
        assert elf_file.num_segments() == 70_001
        last = elf_file.get_segment(70_000).header
    assert (last["p_paddr"], last["p_vaddr"]) == (2 * 69_999 * PAGE, 0xFFFF_8880_0000_0000 + 2 * 69_999 * PAGE)
    assert last["p_offset"] == len(head) + 69_999 * PAGE


@pytest.mark.parametrize("number", [65_533, 65_534])
def test_elf_with_segments_at_the_limit_counts_them(number: int, tmp_path: Path) -> None:
    head = elf_core.Headers(populated_runs(Sparse(number).extents()), 8, 0).pack(b"")
    (tmp_path / "head").write_bytes(head)
    with (tmp_path / "head").open("rb") as file:
        assert parse_elf(file).num_segments() == number + 1


def test_find_direct_map_at_another_slot_finds_it(tmp_path: Path) -> None:
    """At an entry of the top table of its own, which is not where Linux has it."""
    domain, slot = pv_domain(), 300
    l4, l3 = (step.table for step in domain.walk(domain.vaddrs[0])[:2])
    domain.table(l4)[slot], domain.table(l3)[0] = domain.table(l4)[511], domain.table(l3)[510]
    with open_made(domain, tmp_path) as opened:
        base = find_direct_map(opened, populated_runs(opened.extents()))
        assert base == 0xFFFF << 48 | slot << 39
        out = tmp_path / "core"
        export(opened, str(out), "elf")
    headers = [header for header, _ in loads(out)]
    assert headers[0]["p_vaddr"] == base + headers[0]["p_paddr"]


def test_elf_without_direct_map_has_no_virtual_addresses(tmp_path: Path) -> None:
    core, _ = export_domain(made_domain(), tmp_path, "elf")
    assert [header["p_vaddr"] for header, _ in loads(core)[:3]] == [0, 0, 0]


def test_elf_with_a_missing_page_table_has_a_remark(tmp_path: Path) -> None:
    domain = made_domain()
    domain.table(domain.places.top)[301] = np.uint64(HOLE << 12 | 0x67)
    _, exported = export_domain(domain, tmp_path, "elf")
    (remark,) = exported.remarks
    assert f"pfn {HOLE:#x}" in remark


def test_elf_with_invalid_page_tables_has_a_remark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise GuestError("too many runs")

    monkeypatch.setattr(frame_tree, "walk_tree", refuse)
    core, exported = export_domain(made_domain(), tmp_path, "elf")
    assert core.exists()
    (remark,) = exported.remarks
    assert "too many runs" in remark


def test_elf_of_a_domain_that_goes_meanwhile_raises_host_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise HostError("no such domain", op="map", errno=errno.ESRCH)

    monkeypatch.setattr(frame_tree, "walk_tree", refuse)
    with pytest.raises(HostError):
        export_domain(made_domain(), tmp_path, "elf")
    assert not (tmp_path / "out.elf").exists()


@pytest.mark.parametrize("width", [8])
def test_elf_opens_in_drgn(width: Width, tmp_path: Path) -> None:
    domain = made_domain(width)
    core, _ = export_domain(domain, tmp_path, "elf")
    prog = drgn.Program()
    prog.set_core_dump(core)
    for pfn, content in domain.pages.items():
        assert prog.read(pfn * PAGE, PAGE, physical=True) == bytes(content)
    for pfn, vaddr in domain.vaddrs.items():  # by its own walk of the page tables
        assert prog.read(vaddr, PAGE) == bytes(domain.pages[pfn])
    with pytest.raises(drgn.FaultError):
        prog.read(HOLE * PAGE, 1, physical=True)


@pytest.mark.parametrize("recipe", RECIPES)
def test_elf_of_a_real_guest_has_all_its_pages(recipe: Recipe, tmp_path: Path) -> None:
    data = tmp_path / "vector.save"
    data.write_bytes(unpack_vector(recipe))
    core = tmp_path / "vector.elf"
    with open_domain(str(data)) as opened:
        export(opened, str(core), "elf")
        pages = populated_runs(opened.extents())
        pages_in_file = physical(core)
        for pfns in pages.batches(256):
            there = opened.frames.pages(pfns)
            for pfn, page in zip(pfns.tolist(), there, strict=True):
                assert pages_in_file[pfn] == page.tobytes()
        assert len([n for n in notes(core) if n[1] == NT_PRSTATUS]) == len(opened.vcpus)


def test_runs_positions_and_batches_equal_a_list_of_pfns() -> None:
    first, count = np.array([3, 10, 4096, 1 << 40], np.uint64), np.array([2, 1, 100, 3], np.int64)
    pages = Runs(first, count)
    listed = [pfn for a, n in zip(first.tolist(), count.tolist(), strict=True) for pfn in range(a, a + n)]
    for size in (1, 2, 7, 64, 1000):
        got = [batch.tolist() for batch in pages.batches(size)]
        assert [pfn for batch in got for pfn in batch] == listed
        assert all(len(batch) == size for batch in got[:-1])
    asked = np.array([0, 2, 3, 4, 5, 10, 11, 4195, 4196, (1 << 40) + 2, (1 << 64) - 1], np.uint64)
    assert pages.positions(asked).tolist() == [listed.index(p) if p in listed else -1 for p in asked.tolist()]
    none = Runs(first[:0], count[:0])
    assert list(none.batches(5)) == []
    assert none.positions(asked).tolist() == [-1] * len(asked)
    selected = np.arange(len(listed)) % 3 != 0
    assert [p for b in pages.where(selected).batches(9) for p in b.tolist()] == [
        p for p, k in zip(listed, selected, strict=True) if k
    ]
