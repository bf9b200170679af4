"""What DOM and FILE may be: a pipe, a core, an HVM domain, a running domain."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.support.command import xenpv
from tests.support.frames import words
from tests.support.p2m_guest import P2MGuest
from tests.support.writers.build import pattern, pv_domain
from tests.support.writers.core import core_of
from tests.support.writers.domain import Domain
from tests.support.writers.hvm import cpu, hvm_context, hvm_stream
from xenpv.abi.declare import Width
from xenpv.frames import Pfn
from xenpv.source.live import LiveDomain

PAGE = 4096


def test_pipe_keeps_p2m_and_page_tables_but_no_other_page(good: Path, domain: Domain) -> None:
    """xenpv keeps page tables and the p2m of a pipe; reading another page is an error."""
    data = good.read_bytes()
    assert xenpv("p2m", "--json", "-", stdin=data).json == xenpv("p2m", "--json", good).json | {"name": "-"}
    vaddr = domain.vaddrs[600]
    assert xenpv("walk", "--json", "-", vaddr, stdin=data).json == xenpv("walk", "--json", good, vaddr).json
    table = domain.vaddrs[domain.places.top]
    assert xenpv("read", "--raw", "-", table, 4096, stdin=data).raw == bytes(domain.pages[domain.places.top])
    ran = xenpv("read", "--raw", "-", domain.vaddrs[domain.places.text], 4096, stdin=data)
    assert ran.code == 1
    assert re.search(rf"\bpfn {domain.places.text:#x}\b", ran.err)


def test_pause_of_a_file_is_refused(good: Path) -> None:
    assert xenpv("p2m", "--pause", good).error.startswith(f"{good}: ")


@pytest.mark.parametrize("width", [8, 4])
def test_core_serves_read_walk_and_p2m_but_not_check(width: Width, tmp_path: Path) -> None:
    domain = pv_domain(width=width, vcpus=2)
    file = tmp_path / "made.core"
    file.write_bytes(bytes(core_of(domain)))
    vaddr = domain.vaddrs[domain.places.text]
    assert xenpv("read", "--raw", file, vaddr, 64).raw == bytes(domain.pages[domain.places.text])[:64]
    path = xenpv("walk", "--json", "--vcpu", 1, file, vaddr).json
    assert path["pfn"] == domain.places.text
    assert [step["table_pfn"] for step in path["steps"]] == [step.table for step in domain.walk(vaddr)]
    facts = xenpv("p2m", "--json", "--lookup", domain.places.text, file).json
    assert (facts["entries"], facts["lookup"][0]["mfn"]) == (domain.entries, domain.mfns[domain.places.text])
    ran = xenpv("check", file)
    assert ran.error.startswith(f"{file}: ")
    assert "core" in ran.error.removeprefix(str(file))
    ran = xenpv("read", "-", 0, 1, stdin=file.read_bytes())
    assert (ran.code, "an ELF file" in ran.err) == (1, True)


def test_hvm_domain_has_no_p2m(hvm: Path) -> None:
    ran = xenpv("p2m", hvm)
    assert (ran.code, ran.raw) == (1, b"")
    assert ran.err.startswith(f"xenpv: error: {hvm}: ")


def test_hvm_domain_without_vcpus_has_physical_memory_only(hvm: Path) -> None:
    for verb in (["walk", hvm, 0], ["read", hvm, 0, 16]):
        ran = xenpv(*verb)
        assert (ran.code, ran.raw) == (1, b"")
        assert re.search(r"\bvcpu 0\b.*\bvcpus: none\b", ran.err)
    assert xenpv("read", "--physical", "--raw", hvm, 0x1008, 16).raw == bytes(pattern(1))[8:24]


def test_hvm_domain_is_read_through_its_own_page_tables(tmp_path: Path) -> None:
    """vcpu 0 is in long mode, with a page of 2 MiB; vcpu 1 has paging off."""
    tables = {5: words({0: 6 << 12 | 0x67}), 6: words({0: 7 << 12 | 0x67}), 7: words({1: 0xE7})}
    on = cpu(cr0=0x8000_0011, cr4=0x20, cr3=0x5000, msr_efer=0x500)
    context = hvm_context({0: on, 1: cpu(cr0=0x11)})
    file = tmp_path / "long.save"
    file.write_bytes(bytes(hvm_stream(content=tables, context=context)))
    ran = xenpv("walk", file, 0x20_2010)
    assert (ran.code, ran.err) == (0, "")
    assert re.findall("0x[0-9a-f]+", ran.out.splitlines()[-1]) == ["0x202010", "0x2", "0x10"]
    assert [line.split()[0] for line in ran.out.splitlines() if line.lstrip().startswith("L")] == ["L4", "L3", "L2"]
    assert xenpv("read", "--raw", file, 0x20_2010, 8).raw == bytes(pattern(2))[0x10:0x18]
    assert xenpv("read", "--raw", "--vcpu", 1, file, 0x2010, 8).raw == bytes(pattern(2))[0x10:0x18]
    ran = xenpv("walk", file, 0x40_0000)
    assert (ran.code, "L2[2] of pfn 0x7 " in ran.out) == (1, True)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        pytest.param(["--vcpu", 7], r"\bvcpu 7\b.*\bvcpus: 0\b", id="unknown-vcpu"),
        pytest.param(["--user"], r"\bvcpu 0\b.*\buser\b", id="user-mode"),
    ],
)
def test_vcpu_without_page_tables_is_an_error(tmp_path: Path, options: list[object], parts: str) -> None:
    file = tmp_path / "made"
    file.write_bytes(pv_domain(user=False).to_bytes())
    for verb in (["walk", *options, file, 0], ["read", *options, file, 0, 1]):
        ran = xenpv(*verb)
        assert ran.code == 1
        assert re.search(parts, ran.err)


def test_running_domain_is_paused_only_with_pause(guest: P2MGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(guest.host, "pause", lambda _: calls.append("pause"))
    monkeypatch.setattr(guest.host, "unpause", lambda _: calls.append("unpause"))
    for verb in (["check"], ["p2m"], ["walk"], ["read"]):
        more = {"walk": [guest.model.vaddr(5)], "read": [guest.model.vaddr(5), 16]}.get(verb[0], [])
        assert xenpv(*verb, guest.model.domid, *more).code == 0
        assert calls == []
        assert xenpv(*verb, "--pause", guest.model.domid, *more).code == 0
        assert calls == ["pause", "unpause"]
        calls.clear()


def test_running_domain_serves_read_and_walk(guest: P2MGuest) -> None:
    page = np.arange(4096, dtype=np.uint32).astype(np.uint8)[None]
    guest.host.write_frames(guest.model.domid, guest.entries[5:6], page)
    domid, vaddr = guest.model.domid, guest.model.vaddr(5)
    assert xenpv("read", "--raw", domid, vaddr + 3, 4000).raw == page.tobytes()[3:4003]
    assert xenpv("read", "--raw", "--physical", domid, 5 * 4096, 4096).raw == page.tobytes()
    assert f"{vaddr:#x} is pfn 0x5 (NOTAB), offset 0x0" in xenpv("walk", domid, vaddr).out
    assert xenpv("walk", domid, vaddr + (1 << 30)).code == 1


def test_running_domain_whose_page_tables_are_freed_is_read_again(
    guest: P2MGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answers name a page that is no page table any more; the vcpu has another since."""
    domid, vaddr = guest.model.domid, guest.model.vaddr(5)
    original, stale = LiveDomain.cr3, list[Pfn]()

    def cr3(live: LiveDomain, vcpu: int, *, user: bool = False) -> Pfn | None:
        return stale.pop() if stale else original(live, vcpu, user=user)

    for verb, more in (("walk", []), ("read", [16])):
        stale += [Pfn(7)] * 3  # memory itself asks for two
        with monkeypatch.context() as patch:
            patch.setattr(LiveDomain, "cr3", cr3)
            assert xenpv(verb, domid, vaddr, *more).code == 0
    monkeypatch.setattr(LiveDomain, "cr3", lambda *_, **__: Pfn(7))
    assert "no page table" in xenpv("read", domid, vaddr, 16).err
