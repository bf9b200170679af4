"""``xenpv p2m``: entries, map, leaves and look-ups, of files and of a running domain."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.command import xenpv
from tests.support.p2m_guest import PAGES, P2MGuest
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from xenpv.abi.xen import INVALID_MFN
from xenpv.source.live import P2MChange, P2MChangeKind


def test_p2m_text_has_form_entries_and_anchors(good: Path, domain: Domain) -> None:
    ran = xenpv("p2m", good)
    assert (ran.code, ran.err) == (0, "")
    for part in (
        f"{good}: linear virtual list and three-level tree",
        f"pfns 0 to {domain.entries - 1:#x}",
        f"{len(set(domain.p2m_pfns.tolist()))} leaves of 512 entries in {len(domain.p2m_pfns)} places",
        f"{len(domain.mfns)} pages (",
        f"; {domain.entries - len(domain.mfns)} INVALID_MFN, 0 foreign, 0 identity, 0 in no leaf",
        f"frame list list at mfn {domain.mfns[domain.places.tree_top]:#x} of the old host",
        f"{domain.p2m_vaddr:#x}, cr3 {domain.cr3(domain.mfns[domain.places.top]):#x} of the old host, generation 4",
    ):
        assert part in ran.out, part
    assert "leaf at" not in ran.out


def test_p2m_json_counts_every_entry(good: Path, domain: Domain) -> None:
    facts = xenpv("p2m", "--json", "--lookup", 600, "--lookup", 601, good).json
    assert [run["frame"] for run in facts["frame_runs"] for _ in range(run["leaves"])] == domain.p2m_pfns.tolist()
    assert (facts["entries"], facts["max_pfn"], facts["entries_per_leaf"]) == (domain.entries, domain.entries, 512)
    assert (
        facts["populated"] + facts["invalid"] + facts["foreign"] + facts["identity"] + facts["hole"] == facts["entries"]
    )
    assert (facts["populated"], sum(facts["map"]["populated"])) == (len(domain.mfns), len(domain.mfns))
    assert facts["p2m_vaddr"] == domain.p2m_vaddr
    assert facts["lookup"] == [
        {"pfn": 600, "mfn": domain.mfns[600], "type": "NOTAB"},
        {"pfn": 601, "mfn": None, "type": "absent"},
    ]


def test_p2m_map_shades_the_cells_that_are_populated(good: Path, domain: Domain) -> None:
    """Each line that is drawn has a populated cell; a full cell has the darkest shade."""
    out = xenpv("p2m", good).out
    cell = xenpv("p2m", "--json", good).json["map"]["cell_pfns"]
    rows = {int(line.split()[0], 16): line.split("│")[1] for line in out.splitlines() if "│" in line}
    drawn = {first + i * cell for first, row in rows.items() for i, shade in enumerate(row) if shade != " "}
    assert drawn == {pfn // cell * cell for pfn in domain.mfns}
    full = {at for at in drawn if all(pfn in domain.mfns for pfn in range(at, min(at + cell, domain.entries)))}
    assert full
    assert all(rows[at // cell // 64 * 64 * cell][at // cell % 64] == "█" for at in full)


def test_p2m_frames_lists_every_leaf(good: Path, domain: Domain) -> None:
    lines = [line for line in xenpv("p2m", "--frames", good).out.splitlines() if "leaf at" in line]
    leaves = [(int(line.split()[3], 16), int(line.split()[5], 16), int(line.split()[7], 16)) for line in lines]
    assert [
        frame for frame, first, last in leaves for _ in range(first // 512, last // 512 + 1)
    ] == domain.p2m_pfns.tolist()
    assert leaves[-1][2] == domain.entries - 1


def test_p2m_dump_prints_every_mfn(good: Path, domain: Domain) -> None:
    lines = xenpv("p2m", "--dump", good).out.splitlines()
    assert lines[0] == f"Guest width: 8, p2m size: {domain.entries:#x}"
    assert lines[1:] == [f"  pfn={pfn:#x} ==> mfn={mfn:#x}" for pfn, mfn in sorted(domain.mfns.items())]


def test_p2m_lookup_prints_mfn_and_type_of_each_pfn(good: Path, domain: Domain) -> None:
    pfns = [0, 600, 601, domain.entries - 1, 1 << 33]
    args = [arg for pfn in pfns for arg in ("--lookup", hex(pfn))]
    lines = xenpv("p2m", *args, good).out.splitlines()[1:]
    assert lines == [
        f"pfn=0x0 ==> mfn={domain.mfns[0]:#x} (type NOTAB)",
        f"pfn=0x258 ==> mfn={domain.mfns[600]:#x} (type NOTAB)",
        "pfn=0x259 ==> mfn=INVALID_MFN (type absent)",
        f"pfn={domain.entries - 1:#x} ==> mfn=INVALID_MFN (type XTAB)",
        "pfn=0x200000000 ==> mfn=INVALID_MFN (type absent)",
    ]


def test_p2m_mfn_prints_the_pfn(good: Path, domain: Domain) -> None:
    lines = xenpv("p2m", "--mfn", hex(domain.mfns[600]), "--mfn", 3, good).out.splitlines()[1:]
    assert lines == [f"mfn={domain.mfns[600]:#x} ==> pfn=0x258", "mfn=0x3 ==> no pfn"]


def test_p2m_of_a_32_bit_tree_has_no_list(tmp_path: Path) -> None:
    file = tmp_path / "tree"
    file.write_bytes(pv_domain(width=4, tree=True, linear=False).to_bytes())
    out = xenpv("p2m", file).out
    assert "three-level tree" in out
    assert "leaves of 1024 entries" in out
    assert "list   " not in out


def test_p2m_of_a_running_domain_prints_entries_and_m2p(guest: P2MGuest) -> None:
    guest.put(7, INVALID_MFN[8])
    domid, mfn = guest.model.domid, int(guest.entries[5])
    ran = xenpv("p2m", domid, "--lookup", 5, "--lookup", 7, "--mfn", mfn, "--mfn", int(guest.entries[7]))
    assert ran.out.splitlines()[0] == f"dom{domid}: three-level tree"
    assert ran.out.splitlines()[-4:] == [
        f"pfn=0x5 ==> mfn={mfn:#x} (type NOTAB)",
        "pfn=0x7 ==> mfn=INVALID_MFN (type absent)",
        f"mfn={mfn:#x} ==> pfn=0x5",
        f"mfn={int(guest.entries[7]):#x} ==> pfn=0x7, whose entry is INVALID_MFN",
    ]
    facts = xenpv("p2m", "--json", domid).json
    assert (facts["running"], facts["populated"], facts["invalid"], facts["changed"]) == (True, PAGES - 1, 1, None)
    lines = xenpv("p2m", "--dump", domid).out.splitlines()[1:]
    assert lines == [f"  pfn={pfn:#x} ==> mfn={int(m):#x}" for pfn, m in enumerate(guest.entries) if pfn != 7]


def test_p2m_that_changes_meanwhile_prints_a_warning(guest: P2MGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    change = P2MChange(P2MChangeKind.LEAVES, "leaves were replaced: look again")
    monkeypatch.setattr("xenpv.source.live.LiveDomain.p2m_change", lambda _: change)
    assert xenpv("p2m", guest.model.domid).out.splitlines()[-1] == "warning: leaves were replaced: look again"


def test_p2m_and_check_of_a_domain_without_anchors(guest: P2MGuest) -> None:
    guest.arch(pfn_to_mfn_frame_list_list=0)
    ran = xenpv("p2m", guest.model.domid)
    assert (ran.code, ran.out.splitlines()[0]) == (0, f"dom{guest.model.domid}: exposes no p2m")
    ran = xenpv("check", "--json", guest.model.domid)
    (finding,) = ran.json["findings"]
    assert (ran.code, finding["severity"], "0x0" in finding["message"]) == (1, "error", True)
