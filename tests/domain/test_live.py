"""The p2m of running domains on the model host: every form, both widths, and each rule of a physmap broken once."""

from __future__ import annotations

import numpy as np
import pytest

from tests.host.model_guest import BASE, Made, make
from xenpv.abi.declare import Width
from xenpv.abi.x86 import PAGE_SIZE
from xenpv.abi.xen import INVALID_MFN, SHARED_INFO
from xenpv.cli.running import describe
from xenpv.domain.live import LiveDomain, check_physmap
from xenpv.errors import GuestError
from xenpv.findings import Findings
from xenpv.frames import U64
from xenpv.host.model import ModelHost

PAGES = 1024
ROOM = 500  # pfns from here on hold the p2m: they are ordinary pages
FORMS: list[tuple[Width, str]] = [
    *((8, form) for form in ("tree", "rooted", "marked", "linear")),
    *((4, form) for form in ("tree", "rooted", "linear")),  # the anchor of a 32-bit guest has no bit 61
]


class Guest:
    """A domain on a model host that publishes its p2m."""

    def __init__(self, width: Width = 8, form: str = "tree", *, levels: int = 4) -> None:
        self.host = ModelHost(1 << 30)
        self.made: Made = make(self.host, width, PAGES)
        self.width, self.per = width, PAGE_SIZE // width
        self.entries = self.made.mfns.copy()
        self.next = ROOM
        self.leaves: list[int] = []
        self.publish(form, levels)

    def table(self, mfns: U64, fill: int | None = None) -> int:
        """Put mfns into a page of the guest's; the page's mfn."""
        page = np.full(self.per, INVALID_MFN[self.width] if fill is None else fill, f"<u{self.width}")
        page[: len(mfns)] = mfns
        mfn = int(self.made.mfns[self.next])
        self.next += 1
        self.host.write_frames(self.made.domid, np.array([mfn], np.uint64), page.view(np.uint8)[None])
        return mfn

    def publish(self, form: str, levels: int) -> None:
        first = self.next
        self.leaves = [self.table(self.entries[i : i + self.per]) for i in range(0, PAGES, self.per)]
        root, depth = np.array(self.leaves, np.uint64), {"tree": 3, "marked": 4, "rooted": levels}.get(form, 3)
        for _ in range(depth - 1):
            root = np.array([self.table(root)], np.uint64)
        arch = {"max_pfn": PAGES}
        if form == "linear":
            top = self.made.top << 12 if self.width == 8 else (self.made.top << 12 | self.made.top >> 20) & 0xFFFF_FFFF
            vaddr = BASE[self.width] + first * PAGE_SIZE
            arch |= {"p2m_cr3": top, "p2m_vaddr": vaddr, "pfn_to_mfn_frame_list_list": INVALID_MFN[self.width]}
        elif form == "rooted":
            arch |= {"pfn_to_mfn_frame_list_list": INVALID_MFN[self.width]}
            at = SHARED_INFO.offset(self.width, "arch") + (48 if self.width == 8 else 28)
            words = np.array([levels, int(root[0])], f"<u{self.width}").tobytes()
            self.host.write_shared_info(self.made.domid, words, at)
        else:
            arch |= {"pfn_to_mfn_frame_list_list": int(root[0]) | (1 << 61 if form == "marked" else 0)}
        self.arch(**arch)

    def arch(self, **fields: int) -> None:
        for name, value in fields.items():
            at = SHARED_INFO.offset(self.width, f"arch.{name}")
            self.host.write_shared_info(self.made.domid, value.to_bytes(self.width, "little"), at)

    def put(self, pfn: int, mfn: int) -> None:
        """Change one entry of the p2m."""
        leaf = np.array([self.leaves[pfn // self.per]], np.uint64)
        page = self.host.map_frames(self.made.domid, leaf)[0].copy()
        page.view(f"<u{self.width}")[0, pfn % self.per] = mfn
        self.host.write_frames(self.made.domid, leaf, page)

    @property
    def live(self) -> LiveDomain:
        return LiveDomain(self.host, self.host.info(self.made.domid))

    def findings(self) -> Findings:
        findings = Findings()
        check_physmap(self.live, findings)
        return findings

    def rules(self) -> set[str]:
        return {rule.name for rule in self.findings().count}


@pytest.mark.parametrize(("width", "form"), FORMS)
def test_every_form_is_found_and_agrees_with_the_m2p(width: Width, form: str) -> None:
    guest = Guest(width, form)
    assert [str(finding) for finding in guest.findings()] == []
    physmap = guest.live.physmap()
    assert physmap.lookup([0, 1, PAGES - 1, PAGES]) == [int(m) for m in guest.entries[[0, 1, -1]]] + [None]
    said = describe(guest.live, (7,))
    assert (said["max_pfn"], said["populated"], said["shared"]) == (PAGES, PAGES, 0)
    assert said["lookup"] == [{"pfn": 7, "mfn": int(guest.entries[7])}]
    assert len(said["forms"]) == 1


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 6])
def test_a_rooted_tree_of_any_depth(levels: int) -> None:
    guest = Guest(form="rooted", levels=levels)
    assert guest.rules() == set()
    assert guest.live.ways[0].name == f"rooted tree of {levels} levels (proposed)"


@pytest.mark.parametrize("levels", [1, 9, 1 << 40])
def test_a_rooted_tree_of_no_depth_is_refused(levels: int) -> None:
    guest = Guest(form="rooted")
    at = SHARED_INFO.offset(8, "arch") + 48
    guest.host.write_shared_info(guest.made.domid, levels.to_bytes(8, "little"), at)
    with pytest.raises(GuestError, match=f"p2m_levels {levels} is not a depth"):
        guest.live.physmap()


def test_two_pfns_with_one_mfn_are_named_both() -> None:
    guest = Guest()
    guest.put(3, int(guest.entries[9]))
    [finding] = guest.findings()
    assert (finding.rule.name, finding.pfn) == ("physmap-twice", 3)
    assert "pfns 0x3 and 0x9 both have mfn" in finding.message


def test_another_domains_frame_is_named() -> None:
    guest = Guest()
    other = make(guest.host, 8, 64)
    guest.put(3, int(other.mfns[5]))
    assert [(f.rule.name, f.pfn) for f in guest.findings()] == [("physmap-not-own", 3)]


def test_a_frame_beyond_the_host_is_named() -> None:
    guest = Guest()
    guest.put(3, 1 << 45)
    assert [(f.rule.name, f.pfn) for f in guest.findings()] == [("physmap-beyond", 3)]


def test_a_stale_entry_is_named() -> None:
    """Two entries swapped, of which m2p was not told; then one of them gone."""
    guest = Guest()
    a, b = int(guest.entries[3]), int(guest.entries[9])
    guest.put(3, b)
    guest.put(9, a)
    assert [(f.rule.name, f.pfn) for f in guest.findings()] == [("physmap-stale", 3), ("physmap-stale", 9)]
    guest.put(9, INVALID_MFN[8])
    assert [(f.rule.name, f.pfn) for f in guest.findings()] == [("physmap-stale", 3)]


def test_a_leaf_in_two_places_may_not_map_pages() -> None:
    guest = Guest()
    guest.arch(max_pfn=PAGES * 2)
    mid = int(guest.made.mfns[guest.next - 2])
    table = np.array([*guest.leaves, guest.leaves[0], guest.leaves[0]], np.uint64)
    page = np.full(512, INVALID_MFN[8], np.uint64)
    page[: len(table)] = table
    guest.host.write_frames(guest.made.domid, np.array([mid], np.uint64), page.view(np.uint8)[None])
    assert "physmap-shared" in guest.rules()


def test_a_table_that_is_not_the_domains_is_named() -> None:
    guest = Guest()
    other = make(guest.host, 8, 64)
    guest.arch(pfn_to_mfn_frame_list_list=int(other.mfns[5]))
    assert guest.rules() == {"physmap-table"}


def test_an_odd_generation_is_named() -> None:
    guest = Guest(form="linear")
    guest.arch(p2m_generation=7)
    assert guest.rules() == {"physmap-generation"}


@pytest.mark.parametrize(("anchor", "words"), [(0, "not set up yet"), (INVALID_MFN[8], "looked for elsewhere")])
def test_a_guest_that_exposes_nothing_is_told_so(anchor: int, words: str) -> None:
    guest = Guest()
    guest.arch(pfn_to_mfn_frame_list_list=anchor)
    assert guest.rules() == {"physmap-reach"}
    with pytest.raises(GuestError, match=words):
        guest.live.physmap()


def test_a_guest_larger_than_what_it_exposes_is_refused_with_its_levels() -> None:
    guest = Guest()
    guest.arch(max_pfn=0x9000000)
    with pytest.raises(
        GuestError, match=r"exposes 3 levels of its p2m, which reach pfn 0x7ffffff; its max_pfn is 0x9000000"
    ):
        guest.live.physmap()
    assert guest.rules() == {"physmap-reach"}


@pytest.mark.parametrize("vaddr", [0xFFFF_8000_0000_0000, 0x8000_0000_0000, 0xFFFF_FFFF_FFFF_F000, BASE[8] + 1])
def test_a_list_at_an_impossible_address_is_refused(vaddr: int) -> None:
    guest = Guest(form="linear")
    guest.arch(p2m_vaddr=vaddr)
    with pytest.raises(GuestError, match="Bad virtual p2m address range"):
        guest.live.physmap()
