"""xenpv p2m, walk and read, against the domain as it was made; and xenpv demo."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.command import xenpv
from tests.support.frames import words
from tests.support.writers.build import USER_VADDR, pattern, pv_domain
from tests.support.writers.core import core_of
from tests.support.writers.domain import Domain
from tests.support.writers.hvm import cpu, hvm_context, hvm_stream
from xenpv.abi.declare import Width

PAGE = 4096


# --- p2m -------------------------------------------------------------------------------------------------------------


def test_p2m(good: Path, domain: Domain) -> None:
    ran = xenpv("p2m", good)
    assert (ran.code, ran.err) == (0, "")
    for text in (
        f"{good}: linear virtual list and three-level tree",
        f"pfns 0 to {domain.entries - 1:#x}",
        f"{len(set(domain.p2m_pfns.tolist()))} leaves of 512 entries in {len(domain.p2m_pfns)} places",
        f"{len(domain.mfns)} pages (",
        f"; {domain.entries - len(domain.mfns)} INVALID_MFN, 0 foreign, 0 identity, 0 in no leaf",
        f"frame list list at mfn {domain.mfns[domain.places.tree_top]:#x} of the old host",
        f"{domain.p2m_vaddr:#x}, cr3 {domain.cr3(domain.mfns[domain.places.top]):#x} of the old host, generation 4",
    ):
        assert text in ran.out, text
    assert "leaf at" not in ran.out


def test_p2m_map(good: Path, domain: Domain) -> None:
    """A line for each part in which there are pages, the shade says how many."""
    out = xenpv("p2m", good).out
    cell = xenpv("p2m", "--json", good).json["map"]["cell_pfns"]
    rows = {int(line.split()[0], 16): line.split("│")[1] for line in out.splitlines() if "│" in line}
    drawn = {first + i * cell for first, row in rows.items() for i, shade in enumerate(row) if shade != " "}
    assert drawn == {pfn // cell * cell for pfn in domain.mfns}
    full = {at for at in drawn if all(pfn in domain.mfns for pfn in range(at, min(at + cell, domain.entries)))}
    assert full
    assert all(rows[at // cell // 64 * 64 * cell][at // cell % 64] == "█" for at in full)


def test_p2m_frames(good: Path, domain: Domain) -> None:
    lines = [line for line in xenpv("p2m", "--frames", good).out.splitlines() if "leaf at" in line]
    said = [(int(line.split()[3], 16), int(line.split()[5], 16), int(line.split()[7], 16)) for line in lines]
    assert [
        frame for frame, first, last in said for _ in range(first // 512, last // 512 + 1)
    ] == domain.p2m_pfns.tolist()
    assert said[-1][2] == domain.entries - 1


def test_p2m_dump(good: Path, domain: Domain) -> None:
    lines = xenpv("p2m", "--dump", good).out.splitlines()
    assert lines[0] == f"Guest width: 8, p2m size: {domain.entries:#x}"
    assert lines[1:] == [f"  pfn={pfn:#x} ==> mfn={mfn:#x}" for pfn, mfn in sorted(domain.mfns.items())]


def test_p2m_of_an_mfn(good: Path, domain: Domain) -> None:
    lines = xenpv("p2m", "--mfn", hex(domain.mfns[600]), "--mfn", 3, good).out.splitlines()[1:]
    assert lines == [f"mfn={domain.mfns[600]:#x} ==> pfn=0x258", "mfn=0x3 ==> no pfn"]


def test_a_file_cannot_be_paused(good: Path) -> None:
    ran = xenpv("p2m", "--pause", good)
    assert (ran.code, "only a running domain can be paused" in ran.err) == (1, True)


def test_p2m_lookup(good: Path, domain: Domain) -> None:
    wanted = [0, 600, 601, domain.entries - 1, 1 << 33]
    args = [arg for pfn in wanted for arg in ("--lookup", hex(pfn))]
    lines = xenpv("p2m", *args, good).out.splitlines()[1:]
    assert lines == [
        f"pfn=0x0 ==> mfn={domain.mfns[0]:#x} (type NOTAB)",
        f"pfn=0x258 ==> mfn={domain.mfns[600]:#x} (type NOTAB)",
        "pfn=0x259 ==> mfn=INVALID_MFN (type absent)",
        f"pfn={domain.entries - 1:#x} ==> mfn=INVALID_MFN (type XTAB)",
        "pfn=0x200000000 ==> mfn=INVALID_MFN (type absent)",
    ]


def test_p2m_json(good: Path, domain: Domain) -> None:
    d = xenpv("p2m", "--json", "--lookup", 600, "--lookup", 601, good).json
    assert [run["frame"] for run in d["frame_runs"] for _ in range(run["leaves"])] == domain.p2m_pfns.tolist()
    assert (d["entries"], d["max_pfn"], d["entries_per_leaf"]) == (domain.entries, domain.entries, 512)
    assert d["populated"] + d["invalid"] + d["foreign"] + d["identity"] + d["hole"] == d["entries"]
    assert (d["populated"], sum(d["map"]["populated"])) == (len(domain.mfns), len(domain.mfns))
    assert d["p2m_vaddr"] == domain.p2m_vaddr
    assert d["lookup"] == [
        {"pfn": 600, "mfn": domain.mfns[600], "type": "NOTAB"},
        {"pfn": 601, "mfn": None, "type": "absent"},
    ]


def test_p2m_of_a_tree_only(tmp_path: Path) -> None:
    file = tmp_path / "tree"
    file.write_bytes(pv_domain(width=4, tree=True, linear=False).to_bytes())
    out = xenpv("p2m", file).out
    assert "three-level tree" in out
    assert "leaves of 1024 entries" in out
    assert "list   " not in out


# --- walk ------------------------------------------------------------------------------------------------------------


def test_walk(good: Path, domain: Domain) -> None:
    vaddr = domain.vaddrs[600] + 0x123
    ran = xenpv("walk", good, hex(vaddr))
    assert (ran.code, ran.err) == (0, "")
    steps = domain.walk(vaddr)
    for step in steps:
        row = next(line for line in ran.out.splitlines() if line.split()[:1] == [f"L{step.level}"])
        assert row.split()[1] == f"{step.table:#x}"
        assert row.split()[3] == str(step.entry)
        assert row.split()[4] == f"{step.pte:#018x}"
    assert f"{vaddr:#x} is pfn 0x258 (NOTAB), offset 0x123" in ran.out


def test_walk_as_json(good: Path, domain: Domain) -> None:
    vaddr = domain.vaddrs[domain.places.top]
    d = xenpv("walk", "--json", good, vaddr).json
    assert (d["vaddr"], d["pfn"], d["fault"]) == (vaddr, domain.places.top, None)
    assert [(s["level"], s["table_pfn"], s["entry"], s["pte"]) for s in d["steps"]] == [
        tuple(step) for step in domain.walk(vaddr)
    ]
    assert [s["type"] for s in d["steps"]] == ["L4TAB_PIN", "L3TAB", "L2TAB", "L1TAB"]
    assert d["steps"][-1]["flags"] == "P|US|A|D|NX", "a page table is mapped read-only"


@pytest.mark.parametrize(
    ("vaddr", "why"),
    [
        ("0xffff800000000000", "L4[256] is Xen's own slot, which no stream has"),
        ("0x0000900000000000", "not a canonical address"),
        ("0xffffa00000000000", "L4[320] of pfn"),
    ],
)
def test_walk_of_what_is_not_mapped(good: Path, vaddr: str, why: str) -> None:
    ran = xenpv("walk", good, vaddr)
    assert ran.code == 1
    assert f"{int(vaddr, 0):#x} is not mapped" in ran.out
    assert why in ran.out
    as_json = xenpv("walk", "--json", good, vaddr)
    assert as_json.code == 1
    assert as_json.json["pfn"] is None
    assert why in as_json.json["fault"]


def test_walk_through_other_tables(good: Path, domain: Domain) -> None:
    user = xenpv("walk", "--user", "--json", good, hex(USER_VADDR)).json
    assert user["steps"][0]["table_pfn"] == domain.places.user_top
    assert user["pfn"] == domain.places.user
    assert xenpv("walk", "--vcpu", 1, good, domain.vaddrs[0]).code == 0
    top = xenpv("walk", "--top", hex(domain.places.user_top), "--json", good, USER_VADDR).json
    assert top["steps"] == user["steps"]
    assert xenpv("walk", "--top", "0x7777", good, USER_VADDR).code == 1


# --- read ------------------------------------------------------------------------------------------------------------


def content(domain: Domain, at: int, length: int) -> bytes:
    """Bytes of the kernel's mapping of all memory, in virtual order."""
    return b"".join(bytes(domain.pages[pfn]) for pfn in domain.vaddrs)[at : at + length]


@pytest.mark.parametrize(("at", "length"), [(0, 1), (5, 4096), (98 * PAGE + 100, 3 * PAGE), (0, 102 * PAGE)])
def test_read_raw_is_the_content(good: Path, domain: Domain, at: int, length: int) -> None:
    base = min(domain.vaddrs.values())
    ran = xenpv("read", "--raw", good, hex(base + at), length)
    assert (ran.code, ran.err) == (0, "")
    assert ran.raw == content(domain, at, length)


def test_read_more_than_is_read_at_once(tmp_path: Path) -> None:
    domain = pv_domain(pfns=range(700))
    file = tmp_path / "made"
    file.write_bytes(domain.to_bytes())
    length = 650 * PAGE
    assert length > 2 << 20
    whole = b"".join(bytes(domain.pages[pfn]) for pfn in range(700))
    assert xenpv("read", "-p", "--raw", file, 10, length).raw == whole[10 : 10 + length]
    base = min(domain.vaddrs.values())
    assert xenpv("read", "--raw", file, base + 7, length).raw == whole[7 : 7 + length]


def test_read_as_hex(good: Path, domain: Domain) -> None:
    base = min(domain.vaddrs.values())
    data = content(domain, 8, 40)
    lines = xenpv("read", good, hex(base + 8), 40).out.splitlines()
    assert len(lines) == 3
    assert b"".join(bytes.fromhex(line[18:66].replace(" ", "")) for line in lines) == data
    assert [int(line[:16], 16) for line in lines] == [base + 8, base + 24, base + 40]
    text = "".join(chr(b) if 32 <= b < 127 else "." for b in data[:16])
    assert lines[0].endswith(f"|{text}|")


def test_read_pseudo_physical(good: Path, domain: Domain) -> None:
    for pfn in (3, 600):
        assert xenpv("read", "--physical", "--raw", good, pfn * PAGE, "4K").raw == bytes(domain.pages[pfn])


def test_read_through_other_tables(good: Path, domain: Domain) -> None:
    page = bytes(domain.pages[domain.places.user])
    for option in (["--user"], ["--vcpu", "1"], ["--top", str(domain.places.user_top)]):
        assert xenpv("read", "--raw", *option, good, hex(USER_VADDR), 16).raw == page[:16]


def test_read_across_a_hole(good: Path, domain: Domain) -> None:
    end = max(domain.vaddrs.values()) + PAGE
    ran = xenpv("read", good, hex(end - 16), 32)
    assert ran.code == 1
    assert ran.err.count("\n") == 1
    assert f"{end:#x}: L1[" in ran.err
    assert xenpv("read", "-p", good, 101 * PAGE - 16, 32).err == "xenpv: error: pfn 0x64 is not in the stream\n"


def test_read_nothing(good: Path) -> None:
    ran = xenpv("read", good, 0, 0)
    assert (ran.code, ran.raw, ran.err) == (0, b"", "")


def test_a_pipe(good: Path, domain: Domain) -> None:
    """Page tables are kept of a pipe, and so is the p2m; that other memory was let go is said."""
    data = good.read_bytes()
    assert xenpv("p2m", "--json", "-", stdin=data).json == xenpv("p2m", "--json", good).json | {"name": "-"}
    vaddr = domain.vaddrs[600]
    assert xenpv("walk", "--json", "-", vaddr, stdin=data).json == xenpv("walk", "--json", good, vaddr).json
    table = domain.vaddrs[domain.places.top]
    assert xenpv("read", "--raw", "-", table, 4096, stdin=data).raw == bytes(domain.pages[domain.places.top])
    ran = xenpv("read", "--raw", "-", domain.vaddrs[domain.places.text], 4096, stdin=data)
    assert ran.code == 1
    assert "was not kept" in ran.err


# --- the rest --------------------------------------------------------------------------------------------------------


def test_an_hvm_domain_has_no_p2m(hvm: Path) -> None:
    ran = xenpv("p2m", hvm)
    assert (ran.code, ran.raw) == (1, b"")
    assert ran.err.startswith(f"xenpv: error: {hvm}: ")


def test_an_hvm_domain_without_vcpus(hvm: Path) -> None:
    for verb in (["walk", hvm, 0], ["read", hvm, 0, 16]):
        ran = xenpv(*verb)
        assert (ran.code, ran.raw) == (1, b"")
        assert "no vcpu 0, or it never ran (vcpus: none)" in ran.err
    assert xenpv("read", "--physical", "--raw", hvm, 0x1008, 16).raw == bytes(pattern(1))[8:24]


def test_into_an_hvm_domain(tmp_path: Path) -> None:
    """In long mode, through a page of 2 MiB; a second vcpu has not turned paging on."""
    tables = {5: words({0: 6 << 12 | 0x67}), 6: words({0: 7 << 12 | 0x67}), 7: words({1: 0xE7})}
    on = cpu(cr0=0x8000_0011, cr4=0x20, cr3=0x5000, msr_efer=0x500)
    context = hvm_context({0: on, 1: cpu(cr0=0x11)})
    file = tmp_path / "long.save"
    file.write_bytes(bytes(hvm_stream(content=tables, context=context)))
    ran = xenpv("walk", file, 0x20_2010)
    assert (ran.code, ran.err) == (0, "")
    assert "0x202010 is pfn 0x2 (NOTAB), offset 0x10" in ran.out
    assert [line.split()[0] for line in ran.out.splitlines() if line.lstrip().startswith("L")] == ["L4", "L3", "L2"]
    assert xenpv("read", "--raw", file, 0x20_2010, 8).raw == bytes(pattern(2))[0x10:0x18]
    assert xenpv("read", "--raw", "--vcpu", 1, file, 0x2010, 8).raw == bytes(pattern(2))[0x10:0x18]
    ran = xenpv("walk", file, 0x40_0000)
    assert (ran.code, "L2[2] of pfn 0x7 is not present (0x0)" in ran.out) == (1, True)


@pytest.mark.parametrize("width", [8, 4])
def test_a_core_is_a_domain_too(width: Width, tmp_path: Path) -> None:
    domain = pv_domain(width=width, vcpus=2)
    file = tmp_path / "made.core"
    file.write_bytes(bytes(core_of(domain)))
    vaddr = domain.vaddrs[domain.places.text]
    assert xenpv("read", "--raw", file, vaddr, 64).raw == bytes(domain.pages[domain.places.text])[:64]
    way = xenpv("walk", "--json", "--vcpu", 1, file, vaddr).json
    assert way["pfn"] == domain.places.text
    assert [step["table_pfn"] for step in way["steps"]] == [step.table for step in domain.walk(vaddr)]
    looked = xenpv("p2m", "--json", "--lookup", domain.places.text, file).json
    assert (looked["entries"], looked["lookup"][0]["mfn"]) == (domain.entries, domain.mfns[domain.places.text])
    ran = xenpv("check", file)
    assert "a core has no second list of frames" in ran.error
    ran = xenpv("read", "-", 0, 1, stdin=file.read_bytes())
    assert (ran.code, "an ELF file" in ran.err) == (1, True)


@pytest.mark.parametrize(
    ("options", "why"),
    [(["--vcpu", 7], "no vcpu 7, or it never ran (vcpus: 0)"), (["--user"], "vcpu 0 has no page tables of user mode")],
)
def test_tables_that_are_not_there(tmp_path: Path, options: list[object], why: str) -> None:
    file = tmp_path / "made"
    file.write_bytes(pv_domain(user=False).to_bytes())
    for verb in (["walk", *options, file, 0], ["read", *options, file, 0, 1]):
        ran = xenpv(*verb)
        assert ran.code == 1
        assert why in ran.err


@pytest.mark.parametrize("number", ["zero", "0x", "-1", "1P", hex(1 << 64), "", "1.5K", "K"])
def test_what_is_no_number(good: Path, number: str) -> None:
    ran = xenpv("read", "--", good, 0, number)
    assert ran.code == 64
    assert "LENGTH" in ran.err


@pytest.mark.parametrize(("text", "value"), [("0x10", 16), ("16", 16), ("1k", 1024), ("2K", 2048), ("0X1_0", 16)])
def test_numbers(good: Path, text: str, value: int) -> None:
    assert len(xenpv("read", "-p", "--raw", good, 0, text).raw) == value
