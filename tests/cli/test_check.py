"""``xenpv check``: of files, and of a running domain on the model host."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.command import xenpv
from tests.support.model_guest import make_guest
from tests.support.p2m_guest import PAGES, P2MGuest
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from xenpv.abi.xen import INVALID_MFN

# --- files -----------------------------------------------------------------------------------------------------------


def test_check_of_a_good_file_counts_pfns_without_a_frame(good: Path, domain: Domain) -> None:
    ran = xenpv("check", good)
    holes = domain.entries - len(domain.mfns)
    assert (ran.code, ran.err) == (0, "")
    note, verdict = ran.out.splitlines()
    assert note == f"note: {holes} pfns have none (INVALID_MFN), the first is 0x64 (pfn 0x64) [physmap-invalid]"
    assert verdict.startswith(f"{good}: p2m and the stream's pages agree, by linear virtual list and three-level tree")
    assert verdict.endswith(f"up to pfn {domain.entries - 1:#x}")


def test_check_of_a_file_names_each_wrong_entry_and_exits_1(tmp_path: Path) -> None:
    domain = pv_domain(pfns=[*range(100), 600])
    domain.p2m_frame(domain.places.p2m[0])[50:80] = INVALID_MFN[8]
    domain.p2m_frame(domain.places.p2m[0])[200] = 0x777
    file = tmp_path / "wrong"
    file.write_bytes(domain.to_bytes())
    ran = xenpv("check", "--keep", "2", file)
    assert ran.code == 1
    facts = xenpv("check", "--json", "--keep", "2", file).json
    (finding,) = (finding for finding in facts["findings"] if finding["severity"] == "error")
    assert finding["pfn"] == 0xC8
    assert "0x777" in finding["message"]
    assert facts["left_out"] == {"page-unmapped": 28}
    error = next(line for line in ran.out.splitlines() if f"[{finding['rule']}]" in line)
    assert {"0xc8", "0x777"} <= set(re.findall("0x[0-9a-f]+", error))
    assert re.search(r"\b28\b.*\[page-unmapped\]", ran.out)
    facts = xenpv("check", "--json", file).json
    assert (facts["errors"], facts["warnings"], facts["notes"]) == (1, 30, 1)
    assert facts["left_out"] == {"page-unmapped": 10}


def test_check_with_an_index_prints_the_same(good: Path, tmp_path: Path) -> None:
    file, index = tmp_path / "dom.save", tmp_path / "dom.save.xpvi"
    file.write_bytes(good.read_bytes())
    plain = xenpv("check", file).out
    assert not index.exists()
    assert [xenpv("check", option, file).out for option in ("--index", "--index", "--no-index")] == [plain] * 3
    assert index.exists()


def test_check_of_a_pipe(good: Path) -> None:
    assert xenpv("check", "-", stdin=good.read_bytes()).code == 0


# --- running domains -------------------------------------------------------------------------------------------------


def test_check_of_a_running_domain_finds_two_pfns_with_one_mfn(guest: P2MGuest) -> None:
    domid = guest.model.domid
    ran = xenpv("check", domid)
    assert (ran.code, ran.out) == (0, f"dom{domid}: p2m and m2p agree, by three-level tree, up to pfn {PAGES - 1:#x}\n")
    guest.put(3, int(guest.entries[9]))
    ran = xenpv("check", domid)
    assert ran.code == 1
    assert re.search(r"\b0x3\b.*\b0x9\b.*\[physmap-twice\]", ran.out)
    assert ran.out.splitlines()[-1] == f"dom{domid}: 2 errors, by three-level tree, up to pfn {PAGES - 1:#x}"
    facts = xenpv("check", "--json", domid).json
    assert [finding["rule"] for finding in facts["findings"]] == ["physmap-twice", "physmap-lost"]


def test_check_quick_does_not_ask_for_owners(guest: P2MGuest) -> None:
    other = make_guest(guest.host, 8, 64)
    guest.put(3, int(other.mfns[3]))
    assert xenpv("check", guest.model.domid).code == 1
    assert xenpv("check", "--quick", guest.model.domid).code == 0
