"""The p2m: anchors, look-ups both ways, and the guest's own two ways to its frames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.frames import DictFrames, array
from tests.support.writers.build import P2M_VADDR, pv_domain
from tests.support.writers.domain import Domain
from xenpv.abi.declare import Width
from xenpv.abi.xen import INVALID_MFN, SHARED_INFO
from xenpv.errors import GuestError
from xenpv.frames import I64, NO_FRAME, U64
from xenpv.memory.p2m_anchors import Anchors, P2MForm
from xenpv.memory.p2m_reader import P2M, frame_reader
from xenpv.runs import FrameRuns

NONE = int(NO_FRAME)
SPREAD = [*range(200), 1030, 1031, 5000, 0x1_2345]
UNALIGNED = {8: 0xFFFF_C900_3FF0_0000, 4: 0xD0FF_F000}


def p2m_of(domain: Domain) -> P2M:
    return over(DictFrames.of(domain), domain.p2m_pfns, domain.entries, domain.width)


def over(frames: DictFrames, pfns: U64, entries: int, width: Width = 8) -> P2M:
    return P2M(width, entries, FrameRuns.from_frames(pfns), frame_reader(frames))


def lookup(p2m: P2M, pfns: list[int]) -> list[int | None]:
    return [None if mfn == NONE else mfn for mfn in p2m.lookup(array(*pfns)).tolist()]


def pieces(p2m: P2M, places: I64 | None = None) -> dict[int, list[int]]:
    """First pfn of each leaf to its entries."""
    return {
        first * p2m.entries_per_leaf: row.tolist()
        for leaves in p2m.iter_leaves(places)
        for first, row in zip(leaves.first_place.tolist(), leaves.mfns, strict=True)
    }


def walked(domain: Domain, form: P2MForm, anchors: Anchors | None = None) -> list[int]:
    """The frames of the p2m, by place, as the guest's anchors lead there."""
    p2m, anchors = p2m_of(domain), anchors or anchors_of(domain)
    [root] = [root for root in anchors.roots if root.form is form]
    found = P2M.from_root(anchors, root, p2m.read, p2m.pfns_of)
    frames: list[int] = found.leaves.frame_of(np.arange(p2m.leaf_count)).tolist()
    return frames


def anchors_of(domain: Domain) -> Anchors:
    return Anchors.from_shared_info(bytes(domain.shared_page), domain.width)


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [8, 4])
def test_lookup_returns_each_entry(width: Width) -> None:
    domain = pv_domain(width=width, pfns=SPREAD)
    p2m = p2m_of(domain)
    pfns = [*SPREAD, 201, 4999, 0x1_2344, domain.entries - 1, domain.entries, 1 << 40]
    assert lookup(p2m, pfns) == [domain.mfns.get(pfn) for pfn in pfns]


def test_lookup_beyond_last_entry_returns_no_frame() -> None:
    domain = pv_domain(pfns=range(100))
    domain.p2m_frame(int(domain.p2m_pfns[0]))[domain.entries :] = 0x777
    p2m = p2m_of(domain)
    assert lookup(p2m, [domain.entries - 1, domain.entries, 511, 512]) == [None] * 4
    assert p2m.pfns_of(array(0x777)).tolist() == [NONE]


@pytest.mark.parametrize("width", [8, 4])
def test_pfns_of_inverts_lookup(width: Width) -> None:
    domain = pv_domain(width=width, pfns=SPREAD)
    p2m = p2m_of(domain)
    pfns = list(reversed(SPREAD))
    mfns = [domain.mfns[pfn] for pfn in pfns]
    assert p2m.pfns_of(array(*mfns, mfns[0], 0x77, NONE)).tolist() == [*pfns, pfns[0], NONE, NONE]
    assert len(p2m.pfns_of(array())) == 0


@pytest.mark.parametrize("width", [8, 4])
def test_pfns_of_invalid_mfn_returns_no_frame(width: Width) -> None:
    """INVALID_MFN fills the table's holes; whoever looks for it gets nothing, at either width."""
    domain = pv_domain(width=width)
    assert p2m_of(domain).pfns_of(array(INVALID_MFN[width], NONE)).tolist() == [NONE, NONE]


def test_iter_leaves_ends_with_the_table() -> None:
    domain = pv_domain(pfns=range(600), ballooned=[601, 602])
    domain.p2m_frame(int(domain.p2m_pfns[1]))[100:] = 0x777
    found = pieces(p2m_of(domain))
    assert found.keys() == {0, 512}
    assert found[512][:88] == [domain.mfns[pfn] for pfn in range(512, 600)]
    assert found[512][88:] == [NONE] * (512 - 88)


def test_iter_leaves_unreadable_leaves_are_omitted() -> None:
    domain = pv_domain(pfns=[*range(100), 600, 1100])
    frames = DictFrames({pfn: page for pfn, page in domain.pages.items() if pfn != domain.places.p2m[1]})
    p2m = over(frames, domain.p2m_pfns, domain.entries)
    assert list(pieces(p2m)) == [0, 1024]
    assert lookup(p2m, [0, 600, 1100]) == [domain.mfns[0], None, domain.mfns[1100]]
    assert p2m.pfns_of(array(domain.mfns[600], domain.mfns[1100])).tolist() == [NONE, 1100]


def test_iter_leaves_holes_are_omitted() -> None:
    domain = pv_domain(pfns=[*range(100), 600, 1100])
    domain.p2m_pfns[1] = NO_FRAME
    p2m = p2m_of(domain)
    assert list(pieces(p2m)) == [0, 1024]
    assert lookup(p2m, [600]) == [None]


def test_iter_leaves_shared_leaf_is_yielded_once_without_places() -> None:
    domain = pv_domain(pfns=[*range(100), 5000])
    p2m = p2m_of(domain)
    assert p2m.leaf_count == 10
    assert p2m.distinct_leaves.first.tolist() == [0, 1, 9]
    assert p2m.distinct_leaves.count.tolist() == [1, 8, 1]
    assert list(pieces(p2m)) == [0, 512, 9 * 512]
    assert list(pieces(p2m, np.array([3, 4, 9]))) == [3 * 512, 4 * 512, 9 * 512]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([5, 6, 7, NONE]), max_size=30))
def test_distinct_leaves_have_first_place_of_each_frame(frames: list[int]) -> None:
    p2m = over(DictFrames({}), array(*frames), len(frames) * 512)
    expected = sorted({frames.index(frame) for frame in frames if frame != NONE})
    assert p2m.distinct_leaves.first.tolist() == expected
    assert p2m.distinct_leaves.count.tolist() == [frames.count(frames[at]) for at in expected]
    holes = [
        at for first, count in zip(p2m.holes.first, p2m.holes.count, strict=True) for at in range(first, first + count)
    ]
    assert holes == [at for at, frame in enumerate(frames) if frame == NONE]


def test_p2m_huge_table_of_shared_leaves_reads_few_pages() -> None:
    domain = pv_domain(pfns=[*range(100), 0x4000_0000])
    frames = DictFrames.of(domain)
    p2m = over(frames, domain.p2m_pfns, domain.entries)
    assert p2m.leaf_count == (1 << 21) + 1
    assert p2m.pfns_of(array(domain.mfns[0x4000_0000], domain.mfns[7])).tolist() == [0x4000_0000, 7]
    assert sum(frames.reads.values()) == 3


# --- anchors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("linear", "tree", "names"),
    [
        (True, False, "linear virtual list"),
        (False, True, "three-level tree"),
        (True, True, "linear virtual list and three-level tree"),
        (False, False, "none"),
    ],
)
@pytest.mark.parametrize("width", [8, 4])
def test_anchors_roots_have_form_and_frame(width: Width, linear: bool, tree: bool, names: str) -> None:
    domain = pv_domain(width=width, linear=linear, tree=tree)
    anchors = anchors_of(domain)
    assert anchors.form_names == names
    assert anchors.width == width
    assert anchors.max_pfn == domain.entries
    if linear:
        assert anchors.p2m_vaddr == P2M_VADDR[width]
        assert anchors.p2m_generation == 4
    if linear and not tree:
        assert anchors.frame_list_list == INVALID_MFN[width], "look elsewhere"


@pytest.mark.parametrize("width", [8, 4])
def test_anchors_fields_are_at_the_headers_offsets(width: Width) -> None:
    page = bytearray(4096)
    at = {8: (3088, 3096, 3112, 3120, 3128, 3136, 3144), 4: (2316, 2320, 2328, 2332, 2336, 2344, 2348)}[width]
    for i, offset in enumerate(at):
        page[offset] = i + 1
    assert Anchors.from_shared_info(bytes(page), width) == Anchors(width, 1, 2, 3, 4, 5, 6, 7)
    again = bytearray(4096)
    for offset, store in Anchors.from_shared_info(bytes(page), width).shared_info_writes():
        again[offset : offset + width] = store
    assert again == page
    assert SHARED_INFO.offset(width, "arch.max_pfn") == at[0]


# --- the guest's own ways --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pfns", [range(100), SPREAD, [*range(200), 0x8_0000, 0x8_0001]], ids=["few", "spread", "far"])
@pytest.mark.parametrize("width", [8, 4])
def test_from_root_list_and_tree_find_all_leaves(width: Width, pfns: list[int]) -> None:
    domain = pv_domain(width=width, pfns=pfns, linear=True, tree=True)
    for form in (P2MForm.LINEAR, P2MForm.TREE):
        assert walked(domain, form) == domain.p2m_pfns.tolist()


@pytest.mark.parametrize("width", [8, 4])
def test_from_root_list_across_tables_finds_all_leaves(width: Width) -> None:
    """p2m_vaddr need not be aligned to what a table maps; libxc's own walk goes wrong where its L2 index is not 0."""
    vaddr = UNALIGNED[width]
    far = 0x100_0000 if width == 8 else 0x20_0000
    domain = pv_domain(width=width, pfns=[*range(200), far], p2m_vaddr=vaddr)
    p2m = p2m_of(domain)
    if width == 8:
        assert vaddr >> 30 != vaddr + p2m.leaf_count * 4096 - 1 >> 30, "in two L2 tables"
    assert walked(domain, P2MForm.LINEAR) == domain.p2m_pfns.tolist()


def changed(domain: Domain, changes: Mapping[str, int]) -> Anchors:
    for name, value in changes.items():
        domain.shared_info["arch"][name] = value
    return anchors_of(domain)


@pytest.mark.parametrize(
    ("vaddr", "width"),
    [
        (0xFFFF_8000_0000_0000, 8),  # the first of Xen's
        (0xFFFF_87FF_FFFF_F000, 8),  # the last of Xen's
        (0xFFFF_7FFF_FFFF_F000, 8),  # not canonical
        (0x0000_8000_0000_0000, 8),
        (0x0000_7FFF_FFFF_F000, 8),  # its end is not canonical
        (0xFFFF_FFFF_FFFF_F000, 8),  # wraps
        (0xFFFF_C900_0000_0008, 8),  # in the midst of a page
        (0xF580_0000, 4),
        (0xF57F_F000, 4),  # its end is Xen's
        (0xFFFF_F000, 4),  # wraps
        (0xD000_0800, 4),
    ],
)
def test_from_root_list_at_invalid_vaddr_raises_guest_error(vaddr: int, width: Width) -> None:
    domain = pv_domain(width=width, pfns=SPREAD)
    anchors = changed(domain, {"p2m_vaddr": vaddr})
    with pytest.raises(
        GuestError, match=f"Bad virtual p2m address range {vaddr:#x}-"
    ):  # contract: libxenguest\'s own text
        walked(domain, P2MForm.LINEAR, anchors)


@pytest.mark.parametrize("width", [8, 4])
def test_linear_p2m_vaddr_last_valid_address_is_accepted(width: Width) -> None:
    vaddr = 0xFFFF_FFFF_FFFF_F000 if width == 8 else 0xF57F_F000
    domain = pv_domain(width=width)
    anchors = changed(domain, {"p2m_vaddr": vaddr})
    assert p2m_of(domain).leaf_count == 1
    assert walked(domain, P2MForm.LINEAR, anchors) == [NONE]


@pytest.mark.parametrize("width", [8, 4])
def test_from_root_unknown_cr3_raises_guest_error(width: Width) -> None:
    domain = pv_domain(width=width)
    anchors = changed(domain, {"p2m_cr3": domain.cr3(0x1_2345)})
    with pytest.raises(
        GuestError, match=r"Bad p2m_cr3 value 0x[0-9a-f]+: no pfn has mfn 0x12345"
    ):  # contract: libxenguest\'s own text
        walked(domain, P2MForm.LINEAR, anchors)


def test_from_root_list_with_holes_has_holes() -> None:
    domain = pv_domain(pfns=SPREAD)
    domain.set_pte(domain.p2m_vaddr + 2 * 4096, 0)
    found = np.array(walked(domain, P2MForm.LINEAR), np.uint64)
    assert found[2] == NO_FRAME
    assert np.flatnonzero(found != domain.p2m_pfns).tolist() == [2]


@pytest.mark.parametrize("width", [8, 4])
def test_from_root_tree_with_unknown_root_raises_guest_error(width: Width) -> None:
    domain = pv_domain(width=width, tree=True)
    anchors = changed(domain, {"pfn_to_mfn_frame_list_list": 0x1_2345})
    with pytest.raises(
        GuestError, match="Bad mfn 0x12345 for p2m frame list list: no pfn has it"
    ):  # contract: libxenguest\'s own text
        walked(domain, P2MForm.TREE, anchors)


def test_anchors_marked_tree_is_not_three_levels() -> None:
    """Bit 61, the proposal of 2014."""
    domain = pv_domain(tree=True, linear=False)
    anchors = changed(domain, {"pfn_to_mfn_frame_list_list": domain.mfns[domain.places.tree_top] | 1 << 61})
    [root] = anchors.roots
    assert (root.form, root.levels, root.frame) == (P2MForm.MARKED, 4, domain.mfns[domain.places.tree_top])


def test_from_root_bad_frame_list_is_a_hole() -> None:
    domain = pv_domain(tree=True, pfns=[*range(100), 0x10_0000])
    domain.p2m_frame(domain.places.tree_top)[1] = 0x1_2345
    found = np.array(walked(domain, P2MForm.TREE), np.uint64)
    assert np.flatnonzero(found == NO_FRAME).tolist() == list(range(512, min(1024, len(found))))


def test_from_root_bad_leaf_is_a_hole() -> None:
    domain = pv_domain(tree=True, pfns=SPREAD)
    domain.p2m_frame(domain.places.tree_mid[0])[2] = 0x1_2345
    found = np.array(walked(domain, P2MForm.TREE), np.uint64)
    assert np.flatnonzero(found != domain.p2m_pfns).tolist() == [2]
    assert found[2] == NO_FRAME


@pytest.mark.parametrize(("width", "per"), [(8, 512), (4, 1024)])
def test_from_root_max_pfn_beyond_tree_raises_guest_error(width: Width, per: int) -> None:
    """512 GiB for a 64-bit guest, 4 TiB for a 32-bit one: refused beyond, never truncated."""
    domain = pv_domain(width=width, tree=True)
    most = anchors_of(domain).roots[-1], replace(anchors_of(domain), max_pfn=per**3)
    assert most[1].leaf_places(most[0]) == range(per * per)
    with pytest.raises(
        GuestError, match=f"max_pfn {per**3:#x} too large for p2m tree: the guest exposes 3 levels"
    ):  # contract: libxenguest\'s own text
        replace(anchors_of(domain), max_pfn=per**3 + 1).leaf_places(most[0])
