"""PhysmapCheck on ModelHost: every form of p2m, both widths, and each rule of a physmap broken once."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.model_guest import BASE, array, make_guest
from tests.support.p2m_guest import PAGES, ROOM, P2MGuest
from tests.support.saving import BOTH
from xenpv.abi.declare import Width
from xenpv.abi.x86 import PTE_P
from xenpv.abi.xen import INVALID_MFN, SHARED_INFO
from xenpv.errors import GuestError
from xenpv.findings import Findings, Severity
from xenpv.frames import FOREIGN, IDENTITY, NO_FRAME, U8, U64, DomId
from xenpv.io.progress import Progress
from xenpv.source.live import P2MChangeKind
from xenpv.verify import physmap
from xenpv.verify.physmap import PhysmapCheck

FORMS: list[tuple[Width, str]] = [
    *((8, form) for form in ("tree", "rooted", "marked", "linear")),
    *((4, form) for form in ("tree", "rooted", "linear")),  # the anchor of a 32-bit guest has no bit 61
]


@pytest.mark.parametrize(("width", "form"), FORMS)
def test_check_sound_p2m_of_any_form_finds_nothing(width: Width, form: str) -> None:
    guest = P2MGuest(width, form)
    assert [str(finding) for finding in guest.checked()] == []
    p2m = guest.live.p2m
    pfns = np.array([0, 1, PAGES - 1, PAGES], np.uint64)
    assert p2m.lookup(pfns).tolist() == [*guest.entries[[0, 1, -1]].tolist(), int(NO_FRAME)]
    assert p2m.pfns_of(guest.entries).tolist() == list(range(PAGES))
    assert (p2m.entries, len(p2m.distinct_leaves), len(guest.live.anchors.roots)) == (PAGES, PAGES // guest.per, 1)


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 6])
def test_check_rooted_tree_of_any_depth_finds_nothing(levels: int) -> None:
    guest = P2MGuest(form="rooted", levels=levels)
    assert guest.rules() == set()
    assert guest.live.anchors.roots[0].name == f"rooted tree of {levels} levels (proposed)"


@pytest.mark.parametrize("levels", [1, 9, 1 << 40])
def test_p2m_of_rooted_tree_with_impossible_depth_raises(levels: int) -> None:
    guest = P2MGuest(form="rooted")
    at = SHARED_INFO.offset(8, "arch") + 48
    guest.host.write_shared_info(guest.model.domid, levels.to_bytes(8, "little"), at)
    with pytest.raises(GuestError, match=f"p2m_levels {levels} "):
        assert guest.live.p2m


def test_check_two_pfns_with_one_mfn_names_both() -> None:
    guest = P2MGuest()
    guest.put(3, int(guest.entries[9]))
    twice, lost = guest.checked()
    assert (twice.rule.name, twice.pfn) == ("physmap-twice", 3)
    assert "0x9" in twice.message
    assert (lost.rule.name, lost.pfn) == ("physmap-lost", 3)
    assert f"mfn {int(guest.entries[3]):#x}" in lost.message


def test_check_frame_of_other_domain_is_not_own() -> None:
    guest = P2MGuest()
    stranger = make_guest(guest.host, 8, 64)
    guest.put(3, int(stranger.mfns[5]))
    assert guest.findings() == [("physmap-not-own", 3), ("physmap-lost", 3)]


def test_check_frame_of_other_domain_with_same_pfn_is_found_only_by_owner() -> None:
    guest = P2MGuest()
    stranger = make_guest(guest.host, 8, 64)
    guest.put(3, int(stranger.mfns[3]))
    assert guest.findings() == [("physmap-not-own", 3), ("physmap-lost", 3)]
    assert guest.findings(owner=False) == []


def test_check_frame_beyond_host_is_beyond() -> None:
    guest = P2MGuest()
    guest.put(3, 1 << 45)
    assert guest.findings() == [("physmap-beyond", 3), ("physmap-lost", 3)]


def test_check_swapped_entries_are_stale() -> None:
    """Two entries are swapped without an update of the m2p; then one of them is removed."""
    guest = P2MGuest()
    a, b = int(guest.entries[3]), int(guest.entries[9])
    guest.put(3, b)
    guest.put(9, a)
    lost = [("physmap-lost", 9), ("physmap-lost", 3)] if b < a else [("physmap-lost", 3), ("physmap-lost", 9)]
    assert sorted(guest.findings()) == sorted([("physmap-stale", 3), ("physmap-stale", 9), *lost])
    guest.put(9, INVALID_MFN[8])
    assert sorted(guest.findings()) == sorted([("physmap-stale", 3), *lost])


def test_check_leaf_in_two_places_that_maps_pages_is_shared() -> None:
    guest = P2MGuest()
    guest.arch(max_pfn=PAGES * 2)
    mid = int(guest.model.mfns[guest.next - 2])
    table = np.array([*guest.leaves, guest.leaves[0], guest.leaves[0]], np.uint64)
    page = np.full(512, INVALID_MFN[8], np.uint64)
    page[: len(table)] = table
    guest.host.write_frames(guest.model.domid, np.array([mid], np.uint64), page.view(np.uint8)[None])
    assert guest.rules() == {"physmap-shared"}


def test_check_table_of_other_domain_is_reported() -> None:
    guest = P2MGuest()
    stranger = make_guest(guest.host, 8, 64)
    guest.arch(pfn_to_mfn_frame_list_list=int(stranger.mfns[5]))
    assert guest.rules() == {"physmap-table", "physmap-lost"}


def test_check_leaf_of_other_domain_is_reported_and_noted_as_hole() -> None:
    guest = P2MGuest()
    stranger = make_guest(guest.host, 8, 64)
    mid = int(guest.model.mfns[guest.next - 2])
    page = np.full(512, INVALID_MFN[8], np.uint64)
    page[:2] = guest.leaves[0], int(stranger.mfns[5])
    guest.host.write_frames(guest.model.domid, np.array([mid], np.uint64), page.view(np.uint8)[None])
    assert guest.findings()[0] == ("physmap-leaf", 512)
    assert guest.notes()["physmap-hole"].startswith("512 pfns ")


def test_check_frame_in_no_entry_is_lost() -> None:
    guest = P2MGuest()
    guest.put(3, INVALID_MFN[8])
    assert guest.findings() == [("physmap-lost", 3)]
    guest.host.hypervisor.machphys_update(guest.model.domid, guest.entries[3:4], np.array([INVALID_MFN[8]], np.uint64))
    assert guest.findings() == [("physmap-lost", None)]


@BOTH
def test_check_entries_without_own_frame_are_noted_by_kind(width: Width) -> None:
    guest = P2MGuest(width)
    marks = {8: (int(FOREIGN), int(IDENTITY)), 4: (1 << 31, 1 << 30)}[width]
    guest.put(3, INVALID_MFN[width])
    guest.put(5, marks[0] | 0x777)
    guest.put(6, marks[0] | 0x778)
    guest.put(8, marks[1] | 8)
    assert guest.rules() == {"physmap-lost"}
    notes = {f.rule.name: (f.message.split()[0], f.pfn) for f in guest.checked() if f.severity is Severity.NOTE}
    assert notes == {"physmap-invalid": ("1", 3), "physmap-foreign": ("2", 5), "physmap-identity": ("1", 8)}


def test_check_entry_changed_during_check_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest swaps two frames, in p2m and m2p, after the check read the p2m and before it reads the m2p."""
    guest = P2MGuest()
    a, b = int(guest.entries[3]), int(guest.entries[9])
    original = guest.host.m2p
    swapped: list[bool] = []

    def m2p(mfns: U64) -> U64:
        if not swapped:
            swapped.append(True)
            guest.put(3, b)
            guest.put(9, a)
            guest.host.hypervisor.machphys_update(
                guest.model.domid, np.array([a, b], np.uint64), np.array([9, 3], np.uint64)
            )
        return original(mfns)

    live = guest.live
    monkeypatch.setattr(guest.host, "m2p", m2p)
    findings = Findings()
    check = PhysmapCheck(live, findings)
    for leaves in live.p2m.iter_leaves():  # a copy, from before the change
        check._report_entries(live.p2m, leaves.pfns[leaves.mfns == a])
    assert [f.rule.name for f in findings] == ["physmap-changed"]
    assert findings.errors == 0


def test_changed_p2m_that_moved_is_reported() -> None:
    guest = P2MGuest(form="linear")
    live = guest.live
    assert live.p2m.entries == PAGES
    assert live.p2m_change() is None
    guest.arch(p2m_generation=2)
    change = live.p2m_change()
    assert change is not None
    assert change.kind is P2MChangeKind.GENERATION
    tree = P2MGuest()
    live = tree.live
    assert live.p2m.entries == PAGES
    tree.publish("tree", 3)
    change = live.p2m_change()
    assert change is not None
    assert change.kind is P2MChangeKind.ANCHORS


def test_check_all_entries_wrong_counts_all_and_keeps_few() -> None:
    guest = P2MGuest()
    for leaf in guest.leaves:
        page = np.full((1, 512), 7, np.uint64)  # Xen's own, or nobody's
        guest.host.write_frames(guest.model.domid, np.array([leaf], np.uint64), page.view(np.uint8))
    findings = guest.checked()
    assert {rule.name: n for rule, n in findings.count.items()} == {"physmap-not-own": PAGES, "physmap-lost": PAGES}
    assert len(list(findings)) == 40


def test_check_leaf_replaced_during_check_is_a_generation_error() -> None:
    """The anchors stay the same, and a tree has no generation: its tables are walked again."""
    guest = P2MGuest()
    live = guest.live
    original = guest.leaves.copy()

    def replace_leaf(progress: Progress) -> None:
        if progress.done == 2 and original == guest.leaves:
            guest.leaves[1] = guest.table(guest.entries[512:])
            mid = int(guest.model.mfns[ROOM + 2])
            page = np.full(512, INVALID_MFN[8], np.uint64)
            page[:2] = guest.leaves
            guest.host.write_frames(guest.model.domid, np.array([mid], np.uint64), page.view(np.uint8)[None])

    findings = Findings()
    PhysmapCheck(live, findings, progress=replace_leaf).run()
    assert [f.rule.name for f in findings] == ["physmap-generation"]


@pytest.mark.parametrize(("width", "form"), FORMS)
def test_check_missing_table_names_the_first_pfn_below_it(width: Width, form: str) -> None:
    guest = P2MGuest(width, form)
    stranger = make_guest(guest.host, 8, 64)
    if form == "linear":
        l1, slot = guest.model.entry_of(ROOM)  # the list begins there: its first page is the 500th of this table
        guest.host.frames.entries(guest.model.l2)[0] = int(stranger.mfns[5]) << 12 | PTE_P
        assert (l1, slot) == (int(guest.model.l1[0]), ROOM)
    else:
        depth = {"tree": 1, "rooted": 2, "marked": 2}[form]  # levels between the leaves and what the top table names
        top = np.full(guest.per, INVALID_MFN[width], f"<u{width}")
        top[0], top[1] = int(guest.model.mfns[guest.next - 2]), int(stranger.mfns[5])
        root = guest.model.mfns[guest.next - 1 : guest.next]
        guest.host.write_frames(guest.model.domid, root, top.view(np.uint8)[None])
        guest.arch(max_pfn=PAGES + guest.per ** (depth + 1))
    [finding] = [f for f in guest.checked() if f.rule.name == "physmap-table"]
    assert finding.pfn == (0 if form == "linear" else guest.per ** (depth + 1))
    assert f"mfn {int(stranger.mfns[5]):#x}, {1 if form == 'linear' else depth} above" in finding.message


def test_check_many_stale_entries_looks_up_a_limited_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each lookup may lead anywhere in the p2m, so a hostile guest could make every one expensive."""
    monkeypatch.setattr(physmap, "_LOOKUPS_MAX", 300)
    guest = P2MGuest()
    guest.entries[: guest.per] = guest.entries[512 : 512 + guest.per]
    page = guest.entries[:512].astype("<u8").view(np.uint8)[None]
    guest.host.write_frames(guest.model.domid, np.array(guest.leaves[:1], np.uint64), page)
    count = {rule.name: n for rule, n in guest.checked().count.items()}
    assert count == {"physmap-twice": 300, "physmap-stale": 212, "physmap-lost": 512}


# --- hostile guests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [0, 1, 1 << 27, (1 << 27) + 1, 1 << 45, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize(("width", "form"), FORMS)
def test_check_any_max_pfn_maps_a_limited_number_of_frames(
    width: Width, form: str, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = P2MGuest(width, form, levels=8)
    guest.arch(max_pfn=entries & (1 << 8 * width) - 1)
    mapped, map_frames = [], guest.host.map_frames

    def counting_map_frames(domid: DomId, mfns: U64) -> tuple[U8, U8]:
        mapped.append(len(mfns))
        return map_frames(domid, mfns)

    monkeypatch.setattr(guest.host, "map_frames", counting_map_frames)
    assert len(guest.checked()) > 0
    assert sum(mapped) < 4 * PAGES  # the domain has no more pages, whatever max_pfn says


@pytest.mark.parametrize("levels", [2, 5, 8])
def test_check_table_that_names_itself_to_2_64_entries_is_reported(levels: int) -> None:
    """One page is table, leaf and the frame of every pfn."""
    guest = P2MGuest(form="rooted", levels=levels)
    root = int(guest.model.mfns[guest.next - 1])
    page = np.full((1, 512), root, np.uint64)
    guest.host.write_frames(guest.model.domid, np.array([root], np.uint64), page.view(np.uint8))
    guest.arch(max_pfn=min(512**levels, (1 << 64) - 1))
    assert guest.rules() == {"physmap-twice", "physmap-shared", "physmap-lost"}
    assert guest.live.p2m.leaf_count == min(512**levels, 1 << 64) // 512
    for anchor in ("p2m_cr3", "pfn_to_mfn_frame_list_list"):
        guest.arch(**{anchor: root << 12 if anchor == "p2m_cr3" else root})
        assert guest.rules()


@pytest.mark.parametrize("anchor", [1, 1 << 40, 1 << 60, (1 << 61) | 5, 1 << 62, 1 << 63, (1 << 64) - 2])
@pytest.mark.parametrize("field", ["pfn_to_mfn_frame_list_list", "p2m_cr3", "p2m_vaddr"])
def test_check_anchor_that_points_anywhere_is_reported(field: str, anchor: int) -> None:
    guest = P2MGuest(form="tree" if field.startswith("pfn") else "linear")
    guest.arch(**{field: anchor})
    assert guest.rules() <= {"physmap-table", "physmap-reach", "physmap-leaf", "physmap-lost", "physmap-stale"}
    assert "physmap-lost" in guest.rules() or "physmap-reach" in guest.rules()


def test_check_p2m_that_changes_at_every_read_reports_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = P2MGuest(form="rooted", levels=3)
    rng, original = np.random.default_rng(5), guest.host.map_frames
    choice = np.array([*guest.entries[:600], 0, 1 << 63, 1 << 62, NO_FRAME, 1 << 40], np.uint64)

    def map_frames(domid: DomId, mfns: U64) -> tuple[U8, U8]:
        pages, mapped = original(domid, mfns)
        table = pages.view(np.uint64)
        rewritten = rng.integers(0, table.size, 100)
        table.reshape(-1)[rewritten] = choice[rng.integers(0, len(choice), 100)]
        return pages, mapped & rng.integers(0, 8, len(mapped)).astype(np.bool_)

    monkeypatch.setattr(guest.host, "map_frames", map_frames)
    for _ in range(30):
        assert len(guest.checked())


def test_check_odd_generation_is_reported() -> None:
    guest = P2MGuest(form="linear")
    guest.arch(p2m_generation=7)
    assert guest.rules() == {"physmap-generation"}


@pytest.mark.parametrize("anchor", [0, INVALID_MFN[8]], ids=["not set up", "elsewhere"])
def test_check_guest_without_p2m_is_reported(anchor: int) -> None:
    guest = P2MGuest()
    guest.arch(pfn_to_mfn_frame_list_list=anchor)
    assert guest.rules() == {"physmap-reach"}
    with pytest.raises(GuestError, match=f" {anchor:#x},"):
        assert guest.live.p2m


def test_check_max_pfn_beyond_exposed_levels_is_reported() -> None:
    guest = P2MGuest()
    guest.arch(max_pfn=0x9000000)
    with pytest.raises(GuestError, match=r"\b3 levels .* 0x7ffffff.* 0x9000000\b"):  # what is exposed, what is needed
        assert guest.live.p2m
    assert guest.rules() == {"physmap-reach"}


@pytest.mark.parametrize("vaddr", [0xFFFF_8000_0000_0000, 0x8000_0000_0000, 0xFFFF_FFFF_FFFF_F000, BASE[8] + 1])
def test_p2m_of_list_at_impossible_address_raises(vaddr: int) -> None:
    guest = P2MGuest(form="linear")
    guest.arch(p2m_vaddr=vaddr)
    with pytest.raises(GuestError, match="Bad virtual p2m address range"):  # contract: libxenguest's own text
        assert guest.live.p2m


@pytest.mark.parametrize("same", [True, False], ids=["same leaves", "another leaf"])
def test_check_second_root_checks_only_leaves_of_its_own(same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = P2MGuest(form="linear")
    leaves = list(guest.leaves)
    if not same:
        copy = guest.entries[512:].copy()
        copy[7] = guest.entries[3]
        leaves[1] = guest.table(copy)
    guest.arch(pfn_to_mfn_frame_list_list=guest.table(array(guest.table(array(*leaves)))))
    looked_up: list[int] = []
    original = guest.host.m2p

    def m2p(mfns: U64) -> U64:
        looked_up.append(len(mfns))
        return original(mfns)

    monkeypatch.setattr(guest.host, "m2p", m2p)
    findings = guest.findings()
    assert findings == ([] if same else [("physmap-stale", 519)])
    assert sum(looked_up) == PAGES if same else PAGES < sum(looked_up) < PAGES * 2
