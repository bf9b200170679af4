"""xenpv check, of files and of running domains; and p2m, walk and read of one that runs on the model host."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from tests.support.command import xenpv
from tests.support.model_guest import make_guest
from tests.support.p2m_guest import PAGES, P2MGuest
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from xenpv.abi.xen import INVALID_MFN
from xenpv.frames import Pfn
from xenpv.source.live import LiveDomain


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> P2MGuest:
    guest = P2MGuest()
    monkeypatch.setattr("xenpv.host.xen.host.XenHost", lambda: nullcontext(guest.host))
    return guest


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_good_file(good: Path, domain: Domain) -> None:
    ran = xenpv("check", good)
    holes = domain.entries - len(domain.mfns)
    assert (ran.code, ran.err) == (0, "")
    note, verdict = ran.out.splitlines()
    assert note == f"note: {holes} pfns have none (INVALID_MFN), the first is 0x64 (pfn 0x64) [physmap-invalid]"
    assert verdict.startswith(f"{good}: p2m and the stream's pages agree, by linear virtual list and three-level tree")
    assert verdict.endswith(f"up to pfn {domain.entries - 1:#x}")


def test_a_file_whose_p2m_is_wrong(tmp_path: Path) -> None:
    domain = pv_domain(pfns=[*range(100), 600])
    domain.p2m_frame(domain.places.p2m[0])[50:80] = INVALID_MFN[8]
    domain.p2m_frame(domain.places.p2m[0])[200] = 0x777
    file = tmp_path / "wrong"
    file.write_bytes(domain.to_bytes())
    ran = xenpv("check", "--keep", "2", file)
    assert ran.code == 1
    assert "error: the p2m maps pfn 0xc8 (to mfn 0x777 of the old host), which is not in the stream" in ran.out
    assert "… and 28 more of [page-unmapped]" in ran.out
    told = xenpv("check", "--json", file).json
    assert (told["errors"], told["warnings"], told["notes"]) == (1, 30, 1)
    assert told["left_out"] == {"page-unmapped": 10}


def test_by_an_index_it_says_the_same(good: Path, tmp_path: Path) -> None:
    file, index = tmp_path / "dom.save", tmp_path / "dom.save.xpvi"
    file.write_bytes(good.read_bytes())
    plain = xenpv("check", file).out
    assert not index.exists()
    assert [xenpv("check", option, file).out for option in ("--index", "--index", "--no-index")] == [plain] * 3
    assert index.exists()


def test_a_pipe(good: Path) -> None:
    assert xenpv("check", "-", stdin=good.read_bytes()).code == 0


# --- running domains -------------------------------------------------------------------------------------------------


def test_a_running_domain(guest: P2MGuest) -> None:
    domid = guest.made.domid
    ran = xenpv("check", domid)
    assert (ran.code, ran.out) == (0, f"dom{domid}: p2m and m2p agree, by three-level tree, up to pfn {PAGES - 1:#x}\n")
    guest.put(3, int(guest.entries[9]))
    ran = xenpv("check", domid)
    assert ran.code == 1
    assert "error: pfns 0x3 and 0x9 both have mfn" in ran.out
    assert ran.out.splitlines()[-1] == f"dom{domid}: 2 errors, by three-level tree, up to pfn {PAGES - 1:#x}"
    told = xenpv("check", "--json", domid).json
    assert [finding["rule"] for finding in told["findings"]] == ["physmap-twice", "physmap-lost"]


def test_quick_asks_for_no_owner(guest: P2MGuest) -> None:
    other = make_guest(guest.host, 8, 64)
    guest.put(3, int(other.mfns[3]))
    assert xenpv("check", guest.made.domid).code == 1
    assert xenpv("check", "--quick", guest.made.domid).code == 0


def test_a_domain_is_paused_only_when_asked(guest: P2MGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(guest.host, "pause", lambda _: calls.append("pause"))
    monkeypatch.setattr(guest.host, "unpause", lambda _: calls.append("unpause"))
    for verb in (["check"], ["p2m"], ["walk"], ["read"]):
        more = {"walk": [guest.made.vaddr(5)], "read": [guest.made.vaddr(5), 16]}.get(verb[0], [])
        assert xenpv(*verb, guest.made.domid, *more).code == 0
        assert calls == []
        assert xenpv(*verb, "--pause", guest.made.domid, *more).code == 0
        assert calls == ["pause", "unpause"]
        calls.clear()


def test_its_p2m(guest: P2MGuest) -> None:
    guest.put(7, INVALID_MFN[8])
    domid, mfn = guest.made.domid, int(guest.entries[5])
    ran = xenpv("p2m", domid, "--lookup", 5, "--lookup", 7, "--mfn", mfn, "--mfn", int(guest.entries[7]))
    assert ran.out.splitlines()[0] == f"dom{domid}: three-level tree"
    assert ran.out.splitlines()[-4:] == [
        f"pfn=0x5 ==> mfn={mfn:#x} (type NOTAB)",
        "pfn=0x7 ==> mfn=INVALID_MFN (type absent)",
        f"mfn={mfn:#x} ==> pfn=0x5",
        f"mfn={int(guest.entries[7]):#x} ==> pfn=0x7, whose entry is INVALID_MFN",
    ]
    told = xenpv("p2m", "--json", domid).json
    assert (told["running"], told["populated"], told["invalid"], told["changed"]) == (True, PAGES - 1, 1, None)
    lines = xenpv("p2m", "--dump", domid).out.splitlines()[1:]
    assert lines == [f"  pfn={pfn:#x} ==> mfn={int(m):#x}" for pfn, m in enumerate(guest.entries) if pfn != 7]


def test_that_it_changed_meanwhile_is_said(guest: P2MGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "xenpv.source.live.LiveDomain.describe_p2m_change", lambda _: "leaves were replaced: look again"
    )
    assert xenpv("p2m", guest.made.domid).out.splitlines()[-1] == "warning: leaves were replaced: look again"


def test_its_memory(guest: P2MGuest) -> None:
    page = np.arange(4096, dtype=np.uint32).astype(np.uint8)[None]
    guest.host.write_frames(guest.made.domid, guest.entries[5:6], page)
    domid, vaddr = guest.made.domid, guest.made.vaddr(5)
    assert xenpv("read", "--raw", domid, vaddr + 3, 4000).raw == page.tobytes()[3:4003]
    assert xenpv("read", "--raw", "--physical", domid, 5 * 4096, 4096).raw == page.tobytes()
    assert f"{vaddr:#x} is pfn 0x5 (NOTAB), offset 0x0" in xenpv("walk", domid, vaddr).out
    assert xenpv("walk", domid, vaddr + (1 << 30)).code == 1


def test_tables_that_end_meanwhile_are_looked_for_again(guest: P2MGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first top table is one that is none any more; the vcpu has another since."""
    domid, vaddr = guest.made.domid, guest.made.vaddr(5)
    original, stale = LiveDomain.cr3, list[Pfn]()

    def cr3(live: LiveDomain, vcpu: int, *, user: bool = False) -> Pfn | None:
        return stale.pop() if stale else original(live, vcpu, user=user)

    for verb, more in (("walk", []), ("read", [16])):
        stale += [Pfn(7)] * 3  # two are asked for by memory itself
        monkeypatch.setattr(LiveDomain, "cr3", cr3)
        assert xenpv(verb, domid, vaddr, *more).code == 0
        monkeypatch.undo()
        monkeypatch.setattr("xenpv.host.xen.host.XenHost", lambda: nullcontext(guest.host))
    monkeypatch.setattr(LiveDomain, "cr3", lambda *_, **__: Pfn(7))
    assert "no page table" in xenpv("read", domid, vaddr, 16).err


def test_a_domain_that_exposes_nothing(guest: P2MGuest) -> None:
    guest.arch(pfn_to_mfn_frame_list_list=0)
    ran = xenpv("p2m", guest.made.domid)
    assert (ran.code, ran.out.splitlines()[0]) == (0, f"dom{guest.made.domid}: exposes no p2m")
    ran = xenpv("check", guest.made.domid)
    assert (ran.code, "exposes no p2m: its anchor is 0x0, which is not set up yet" in ran.out) == (1, True)
