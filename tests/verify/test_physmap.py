"""The p2m of running domains on the model host: every form, both widths, and each rule of a physmap broken once."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tests.support.model_guest import BASE, array, make
from tests.support.p2m_guest import PAGES, ROOM, Guest
from xenpv.abi.declare import Width
from xenpv.abi.x86 import PTE_P
from xenpv.abi.xen import INVALID_MFN, SHARED_INFO
from xenpv.errors import GuestError
from xenpv.findings import Findings
from xenpv.frames import FOREIGN, IDENTITY, NO_FRAME, U8, U64, DomId
from xenpv.io.progress import Progress
from xenpv.verify import physmap
from xenpv.verify.physmap import PhysmapCheck

FORMS: list[tuple[Width, str]] = [
    *((8, form) for form in ("tree", "rooted", "marked", "linear")),
    *((4, form) for form in ("tree", "rooted", "linear")),  # the anchor of a 32-bit guest has no bit 61
]


@pytest.mark.parametrize(("width", "form"), FORMS)
def test_every_form_is_found_and_agrees_with_the_m2p(width: Width, form: str) -> None:
    guest = Guest(width, form)
    assert [str(finding) for finding in guest.checked()] == []
    p2m = guest.live.p2m
    wanted = np.array([0, 1, PAGES - 1, PAGES], np.uint64)
    assert p2m.lookup(wanted).tolist() == [*guest.entries[[0, 1, -1]].tolist(), int(NO_FRAME)]
    assert p2m.pfns_of(guest.entries).tolist() == list(range(PAGES))
    assert (p2m.entries, len(p2m.distinct), len(guest.live.anchors.roots)) == (PAGES, PAGES // guest.per, 1)


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 6])
def test_a_rooted_tree_of_any_depth(levels: int) -> None:
    guest = Guest(form="rooted", levels=levels)
    assert guest.rules() == set()
    assert guest.live.anchors.roots[0].name == f"rooted tree of {levels} levels (proposed)"


@pytest.mark.parametrize("levels", [1, 9, 1 << 40])
def test_a_rooted_tree_of_no_depth_is_refused(levels: int) -> None:
    guest = Guest(form="rooted")
    at = SHARED_INFO.offset(8, "arch") + 48
    guest.host.write_shared_info(guest.made.domid, levels.to_bytes(8, "little"), at)
    with pytest.raises(GuestError, match=f"p2m_levels {levels} is not a depth"):
        assert guest.live.p2m


def test_two_pfns_with_one_mfn_are_named_both() -> None:
    guest = Guest()
    guest.put(3, int(guest.entries[9]))
    twice, lost = guest.checked()
    assert (twice.rule.name, twice.pfn) == ("physmap-twice", 3)
    assert "pfns 0x3 and 0x9 both have mfn" in twice.message
    assert (lost.rule.name, lost.pfn) == ("physmap-lost", 3)
    assert f"mfn {int(guest.entries[3]):#x} is the domain's, m2p says as pfn 0x3, which has" in lost.message


def test_another_domains_frame_is_named() -> None:
    guest = Guest()
    other = make(guest.host, 8, 64)
    guest.put(3, int(other.mfns[5]))
    assert guest.findings() == [("physmap-not-own", 3), ("physmap-lost", 3)]


def test_another_domains_frame_of_the_same_pfn_is_only_found_by_asking_for_its_owner() -> None:
    guest = Guest()
    other = make(guest.host, 8, 64)
    guest.put(3, int(other.mfns[3]))
    assert guest.findings() == [("physmap-not-own", 3), ("physmap-lost", 3)]
    assert guest.findings(owner=False) == []


def test_a_frame_beyond_the_host_is_named() -> None:
    guest = Guest()
    guest.put(3, 1 << 45)
    assert guest.findings() == [("physmap-beyond", 3), ("physmap-lost", 3)]


def test_a_stale_entry_is_named() -> None:
    """Two entries swapped, of which m2p was not told; then one of them gone."""
    guest = Guest()
    a, b = int(guest.entries[3]), int(guest.entries[9])
    guest.put(3, b)
    guest.put(9, a)
    lost = [("physmap-lost", 9), ("physmap-lost", 3)] if b < a else [("physmap-lost", 3), ("physmap-lost", 9)]
    assert sorted(guest.findings()) == sorted([("physmap-stale", 3), ("physmap-stale", 9), *lost])
    guest.put(9, INVALID_MFN[8])
    assert sorted(guest.findings()) == sorted([("physmap-stale", 3), *lost])


def test_a_leaf_in_two_places_may_not_map_pages() -> None:
    guest = Guest()
    guest.arch(max_pfn=PAGES * 2)
    mid = int(guest.made.mfns[guest.next - 2])
    table = np.array([*guest.leaves, guest.leaves[0], guest.leaves[0]], np.uint64)
    page = np.full(512, INVALID_MFN[8], np.uint64)
    page[: len(table)] = table
    guest.host.write_frames(guest.made.domid, np.array([mid], np.uint64), page.view(np.uint8)[None])
    assert "physmap-shared" in guest.rules()
    assert guest.rules() == {"physmap-shared"}


def test_a_table_that_is_not_the_domains_is_named() -> None:
    guest = Guest()
    other = make(guest.host, 8, 64)
    guest.arch(pfn_to_mfn_frame_list_list=int(other.mfns[5]))
    assert guest.rules() == {"physmap-table", "physmap-lost"}


def test_a_leaf_that_is_not_the_domains_is_named() -> None:
    guest = Guest()
    other = make(guest.host, 8, 64)
    mid = int(guest.made.mfns[guest.next - 2])
    page = np.full(512, INVALID_MFN[8], np.uint64)
    page[:2] = guest.leaves[0], int(other.mfns[5])
    guest.host.write_frames(guest.made.domid, np.array([mid], np.uint64), page.view(np.uint8)[None])
    assert guest.findings()[0] == ("physmap-leaf", 512)
    assert guest.notes()["physmap-hole"] == "512 pfns are in no leaf, the first is 0x200"


def test_a_frame_that_m2p_knows_and_no_entry_has_is_named() -> None:
    guest = Guest()
    guest.put(3, INVALID_MFN[8])
    assert guest.findings() == [("physmap-lost", 3)]
    guest.host.hypervisor.machphys_update(guest.made.domid, guest.entries[3:4], np.array([INVALID_MFN[8]], np.uint64))
    assert guest.findings() == [("physmap-lost", None)]


@pytest.mark.parametrize("width", [8, 4])
def test_what_is_no_frame_of_the_domains_is_noted_by_its_kind(width: Width) -> None:
    guest = Guest(width)
    marks = {8: (int(FOREIGN), int(IDENTITY)), 4: (1 << 31, 1 << 30)}[width]
    guest.put(3, INVALID_MFN[width])
    guest.put(5, marks[0] | 0x777)
    guest.put(6, marks[0] | 0x778)
    guest.put(8, marks[1] | 8)
    assert guest.rules() == {"physmap-lost"}
    assert guest.notes() == {
        "physmap-invalid": "1 pfns have none (INVALID_MFN), the first is 0x3",
        "physmap-foreign": "2 pfns are mapped from another domain (FOREIGN), the first is 0x5",
        "physmap-identity": "1 pfns stand for machine frames of their own number (IDENTITY), the first is 0x8",
    }


def test_a_change_meanwhile_is_a_warning_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest swaps two frames between our reading the p2m and our asking the m2p; it tells both of it."""
    guest = Guest()
    a, b = int(guest.entries[3]), int(guest.entries[9])
    original = guest.host.m2p
    done: list[bool] = []

    def m2p(mfns: U64) -> U64:
        if not done:
            done.append(True)
            guest.put(3, b)
            guest.put(9, a)
            guest.host.hypervisor.machphys_update(
                guest.made.domid, np.array([a, b], np.uint64), np.array([9, 3], np.uint64)
            )
        return original(mfns)

    live = guest.live
    monkeypatch.setattr(guest.host, "m2p", m2p)
    findings = Findings()
    check = PhysmapCheck(live, findings)
    for leaves in live.p2m.content():  # read before the change, as a mapping that is copied is
        check._wrong(live.p2m, leaves.pfns[leaves.mfns == a])
    assert [f.rule.name for f in findings] == ["physmap-changed"]
    assert findings.errors == 0


def test_a_p2m_that_moves_meanwhile_is_named() -> None:
    guest = Guest(form="linear")
    live = guest.live
    assert live.p2m.entries == PAGES
    assert live.changed() is None
    guest.arch(p2m_generation=2)
    assert live.changed() == "p2m_generation went from 0x0 to 0x2 meanwhile: look again"
    tree = Guest()
    live = tree.live
    assert live.p2m.entries == PAGES
    tree.publish("tree", 3)
    assert live.changed() == "the anchors in shared info are not what they were: the p2m has moved, look again"


def test_a_hostile_p2m_costs_no_more_than_a_good_one() -> None:
    """Every entry wrong: all are counted, a few are described."""
    guest = Guest()
    for leaf in guest.leaves:
        page = np.full((1, 512), 7, np.uint64)  # Xen's own, or nobody's
        guest.host.write_frames(guest.made.domid, np.array([leaf], np.uint64), page.view(np.uint8))
    found = guest.checked()
    assert {rule.name: n for rule, n in found.count.items()} == {"physmap-not-own": PAGES, "physmap-lost": PAGES}
    assert len(list(found)) == 40


def test_a_leaf_that_is_replaced_meanwhile_is_named() -> None:
    """By the same anchors: a tree has no generation, so its tables are walked again."""
    guest = Guest()
    live = guest.live
    changed = guest.leaves.copy()

    def replaces(progress: Progress) -> None:
        if progress.done == 2 and changed == guest.leaves:
            guest.leaves[1] = guest.table(guest.entries[512:])
            mid = int(guest.made.mfns[ROOM + 2])
            page = np.full(512, INVALID_MFN[8], np.uint64)
            page[:2] = guest.leaves
            guest.host.write_frames(guest.made.domid, np.array([mid], np.uint64), page.view(np.uint8)[None])

    findings = Findings()
    PhysmapCheck(live, findings, progress=replaces).run()
    assert [(f.rule.name, f.message) for f in findings] == [
        ("physmap-generation", "leaves of the p2m were replaced meanwhile: look again")
    ]


@pytest.mark.parametrize(("width", "form"), FORMS)
def test_a_table_that_is_gone_is_named_with_the_first_pfn_below_it(width: Width, form: str) -> None:
    guest = Guest(width, form)
    other = make(guest.host, 8, 64)
    if form == "linear":
        l1, slot = guest.made.entry_of(ROOM)  # the list stands there, and its first page is the 500th of this table
        guest.host.frames.entries(guest.made.l2)[0] = int(other.mfns[5]) << 12 | PTE_P
        assert (l1, slot) == (int(guest.made.l1[0]), ROOM)
    else:
        depth = {"tree": 1, "rooted": 2, "marked": 2}[form]  # what the top names, this many above the leaves
        top = np.full(guest.per, INVALID_MFN[width], f"<u{width}")
        top[0], top[1] = int(guest.made.mfns[guest.next - 2]), int(other.mfns[5])
        root = guest.made.mfns[guest.next - 1 : guest.next]
        guest.host.write_frames(guest.made.domid, root, top.view(np.uint8)[None])
        guest.arch(max_pfn=PAGES + guest.per ** (depth + 1))
    [lost] = [f for f in guest.checked() if f.rule.name == "physmap-table"]
    assert lost.pfn == (0 if form == "linear" else guest.per ** (depth + 1))
    assert f"the table at mfn {int(other.mfns[5]):#x}, {1 if form == 'linear' else depth} above" in lost.message


def test_of_many_stale_entries_few_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other pfn of an mfn may be anywhere in the p2m, and a guest can have us look everywhere for each entry."""
    monkeypatch.setattr(physmap, "_ASKED", 300)
    guest = Guest()
    for at in range(guest.per):
        guest.entries[at] = guest.entries[512 + at]
    page = guest.entries[:512].astype("<u8").view(np.uint8)[None]
    guest.host.write_frames(guest.made.domid, np.array(guest.leaves[:1], np.uint64), page)
    found = {rule.name: n for rule, n in guest.checked().count.items()}
    assert found == {"physmap-twice": 300, "physmap-stale": 212, "physmap-lost": 512}


# --- whatever the guest says ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [0, 1, 1 << 27, (1 << 27) + 1, 1 << 45, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize(("width", "form"), FORMS)
def test_any_max_pfn_gives_findings_in_bounded_time(width: Width, form: str, entries: int) -> None:
    guest = Guest(width, form, levels=8)
    guest.arch(max_pfn=entries & (1 << 8 * width) - 1)
    began = time.monotonic()
    assert len(guest.checked()) > 0
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("levels", [2, 5, 8])
def test_a_top_that_names_itself_to_2_to_the_64(levels: int) -> None:
    """Table, leaf and entry are one page: its mfn is the entry of every pfn."""
    guest = Guest(form="rooted", levels=levels)
    root = int(guest.made.mfns[guest.next - 1])
    page = np.full((1, 512), root, np.uint64)
    guest.host.write_frames(guest.made.domid, np.array([root], np.uint64), page.view(np.uint8))
    guest.arch(max_pfn=min(512**levels, (1 << 64) - 1))
    assert guest.rules() == {"physmap-twice", "physmap-shared", "physmap-lost"}
    assert guest.live.p2m.places == min(512**levels, 1 << 64) // 512
    for vaddr_form in ("p2m_cr3", "pfn_to_mfn_frame_list_list"):
        guest.arch(**{vaddr_form: root << 12 if vaddr_form == "p2m_cr3" else root})
        assert guest.rules()


@pytest.mark.parametrize("anchor", [1, 1 << 40, 1 << 60, (1 << 61) | 5, 1 << 62, 1 << 63, (1 << 64) - 2])
@pytest.mark.parametrize("field", ["pfn_to_mfn_frame_list_list", "p2m_cr3", "p2m_vaddr"])
def test_an_anchor_may_point_anywhere(field: str, anchor: int) -> None:
    guest = Guest(form="tree" if field.startswith("pfn") else "linear")
    guest.arch(**{field: anchor})
    assert guest.rules() <= {"physmap-table", "physmap-reach", "physmap-leaf", "physmap-lost", "physmap-stale"}
    assert "physmap-lost" in guest.rules() or "physmap-reach" in guest.rules()


def test_a_guest_that_writes_its_p2m_all_the_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look gives something else: findings, in bounded time, and no exception."""
    guest = Guest(form="rooted", levels=3)
    numbers, original = np.random.default_rng(5), guest.host.map_frames
    choice = np.array([*guest.entries[:600], 0, 1 << 63, 1 << 62, NO_FRAME, 1 << 40], np.uint64)

    def map_frames(domid: DomId, mfns: U64) -> tuple[U8, U8]:
        pages, mapped = original(domid, mfns)
        table = pages.view(np.uint64)
        some = numbers.integers(0, table.size, 100)
        table.reshape(-1)[some] = choice[numbers.integers(0, len(choice), 100)]
        return pages, mapped & numbers.integers(0, 8, len(mapped)).astype(np.bool_)

    monkeypatch.setattr(guest.host, "map_frames", map_frames)
    for _ in range(30):
        assert len(guest.checked())


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
        assert guest.live.p2m


def test_a_guest_larger_than_what_it_exposes_is_refused_with_its_levels() -> None:
    guest = Guest()
    guest.arch(max_pfn=0x9000000)
    with pytest.raises(
        GuestError, match=r"exposes 3 levels of its p2m, which reach pfn 0x7ffffff; its max_pfn is 0x9000000"
    ):
        assert guest.live.p2m
    assert guest.rules() == {"physmap-reach"}


@pytest.mark.parametrize("vaddr", [0xFFFF_8000_0000_0000, 0x8000_0000_0000, 0xFFFF_FFFF_FFFF_F000, BASE[8] + 1])
def test_a_list_at_an_impossible_address_is_refused(vaddr: int) -> None:
    guest = Guest(form="linear")
    guest.arch(p2m_vaddr=vaddr)
    with pytest.raises(GuestError, match="Bad virtual p2m address range"):
        assert guest.live.p2m


@pytest.mark.parametrize("same", [True, False])
def test_what_a_second_way_leads_to_is_checked_if_it_is_something_else(
    same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = Guest(form="linear")
    leaves = list(guest.leaves)
    if not same:
        copy = guest.entries[512:].copy()
        copy[7] = guest.entries[3]
        leaves[1] = guest.table(copy)
    guest.arch(pfn_to_mfn_frame_list_list=guest.table(array(guest.table(array(*leaves)))))
    asked: list[int] = []
    original = guest.host.m2p

    def m2p(mfns: U64) -> U64:
        asked.append(len(mfns))
        return original(mfns)

    monkeypatch.setattr(guest.host, "m2p", m2p)
    found = guest.findings()
    assert found == ([] if same else [("physmap-stale", 519)])
    assert sum(asked) == PAGES if same else PAGES < sum(asked) < PAGES * 2
