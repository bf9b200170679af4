"""The kernel of the model: xenpv finds and walks every form of p2m that it publishes, and checks it against the m2p."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.kernel_guest import ALL_FORMS, SOME_FORMS, WIDTHS, Guest, mfn_by_pfn
from tests.support.model_guest import array, pfns
from tests.support.start_of_day import build_domain
from xenpv.abi.declare import Width
from xenpv.abi.xen import INVALID_MFN
from xenpv.errors import Fault, GuestError, RequestError
from xenpv.findings import Severity
from xenpv.frames import NO_FRAME
from xenpv.guest_model.kernel import Kernel
from xenpv.guest_model.p2m_forms import FORMS, parse_form
from xenpv.host.model.guest_view import GuestView
from xenpv.host.model.host import ModelHost
from xenpv.source.live import P2MChangeKind

BOTH = pytest.mark.parametrize("width", WIDTHS)
GIB = 1 << 18  # pages


@pytest.mark.parametrize(
    ("width", "form", "outside"),
    [
        *((*one, False) for one in ALL_FORMS),
        *((*one, True) for one in ALL_FORMS if one[0] == 8),
    ],  # INIT_P2M is 64-bit only
)
def test_boot_publishes_every_form_so_that_xenpv_finds_the_same_p2m(width: Width, form: str, outside: bool) -> None:
    guest = Guest.boot(form, width, 4000, outside=outside, order=0)
    assert guest.assert_consistent() == []
    anchors = guest.live.anchors
    assert len(anchors.roots) == (2 if form == "both" else 1)
    published = parse_form(form)
    assert anchors.roots[-1].levels == (3 if published.hidden else published.levels) or published.linear
    assert mfn_by_pfn(guest.live.p2m) == dict(enumerate(guest.layout.mfns.tolist()))


@BOTH
@pytest.mark.parametrize("form", ["none", "invalid"])
def test_boot_without_a_published_p2m_is_a_guest_error(width: Width, form: str) -> None:
    guest = Guest.boot(form, width)
    assert guest.live.anchors.frame_list_list == (0 if form == "none" else INVALID_MFN[width])
    with pytest.raises(GuestError):
        assert guest.live.p2m
    assert guest.entries(array(5, 4096)).tolist() == [int(guest.layout.mfns[5]), int(NO_FRAME)]


@BOTH
def test_published_leaves_are_the_pages_of_the_builders_list(width: Width) -> None:
    guest = Guest.boot("both", width)
    for root in guest.live.anchors.roots:
        frames = guest.live.walk_p2m(root).leaves.frame
        np.testing.assert_array_equal(frames, guest.layout.mfns[guest.layout.list :][: len(frames)])


def test_parse_form_of_an_unknown_name_lists_all_forms() -> None:
    with pytest.raises(RequestError, match=r"'tree5'.* linear, both, tree3, .*, invalid"):
        Kernel("tree5")
    assert parse_form("rooted7").levels == 7
    assert {form.name for form in FORMS.values()} == set(FORMS)


def test_more_entries_than_form_width_or_reserve_allow_are_a_request_error() -> None:
    with pytest.raises(RequestError, match="61"):
        Guest.boot("marked", 4)
    small = Guest.boot("rooted2")
    with pytest.raises(RequestError) as e:
        small.do("balloon_in", array(GIB))
    assert (e.value.needed, e.value.available) == (GIB + 1, GIB)
    with pytest.raises(RequestError) as e:
        Guest.boot("linear", 4).do("spread", 1 << 30)
    assert (e.value.needed, e.value.available) == (1 << 30, 1 << 28)
    host = ModelHost(1 << 30)
    layout = build_domain(host)
    with pytest.raises(RequestError) as e:
        host.run(layout.domid, Kernel("both", reserve=5).boot)
    assert e.value.available is not None
    assert e.value.available < 5
    with pytest.raises(RequestError) as e:
        Guest.boot("linear", pages=600)
    assert e.value.available == 600


def test_map_beyond_a_gib_in_a_32_bit_kernel_is_a_request_error() -> None:
    guest = Guest.boot("linear", 4)
    too_many = pfns((1 << 18) + 1)
    with pytest.raises(RequestError) as e:
        guest.host.run(guest.domid, lambda view: guest.kernel.pages.map(view, too_many, too_many))
    assert e.value.available == 1 << 18
    assert guest.assert_consistent() == []


def test_boot_without_start_info_is_a_guest_error_with_its_address() -> None:
    host = ModelHost(1 << 30)
    layout = build_domain(host)
    host.write_frames(layout.domid, layout.mfns[layout.start_info :][:1], np.zeros((1, 4096), np.uint8))
    with pytest.raises(GuestError, match="0xffffffff80018000"):
        host.run(layout.domid, Kernel().boot)


def test_p2m_beyond_the_published_levels_is_refused_or_partial() -> None:
    """600 GiB of pfns, of which the published levels reach 512 GiB."""
    guest = Guest.boot("tree4hidden", outside=True)
    guest.do("spread", 600 * GIB, 7)
    with pytest.raises(GuestError, match=r"3 levels .*0x7ffffff"):
        assert guest.live.p2m
    p2m = guest.live.walk_p2m(guest.live.anchors.roots[0], 512 * GIB)
    assert [mfn for pfn, mfn in mfn_by_pfn(p2m).items()] == guest.entries(array(*mfn_by_pfn(p2m))).tolist()
    assert 3072 - 439 < len(mfn_by_pfn(p2m)) < 4096
    both = Guest.boot("both")
    both.do("spread", 600 * GIB, 7)
    assert [f.rule.name for f in both.findings() if f.severity is not Severity.NOTE] == []
    assert "physmap-partial" in [f.rule.name for f in both.findings()]
    with pytest.raises(RequestError) as e:
        Guest.boot("tree3").do("spread", 600 * GIB)
    assert (e.value.needed, e.value.available) == (600 * GIB, 512 * GIB)


@pytest.mark.parametrize("form", ["linear", "marked", "rooted4", "rooted5"])
def test_spread_of_64_mib_over_16_tib_shares_leaves(form: str) -> None:
    guest = Guest.boot(form, pages=64 << 8)
    free = guest.do("free_pfns")
    guest.do("write_pattern", free, 1)
    moved = guest.do("spread", 16 << 10 << 18)
    assert int(moved[-1]) == (1 << 32) - 1
    assert guest.do("free_pfns").tolist() == moved.tolist()
    guest.do("write_pattern", moved, 2)
    assert not len(guest.do("check_pattern", moved, 2))
    assert guest.assert_consistent() == ["physmap-invalid"]
    assert mfn_by_pfn(guest.live.p2m) == dict(enumerate(guest.layout.mfns[: int(free[0])].tolist())) | dict(
        zip(moved.tolist(), guest.layout.mfns[free.astype(np.int64)].tolist(), strict=True)
    )
    distinct = guest.live.p2m.distinct_leaves
    assert int(distinct.count.max()) > 1 << 22, "places without pages share one leaf"
    assert len(distinct) < 200


def test_spread_of_a_32_bit_guest_reaches_the_end_of_its_list() -> None:
    for form in ("linear", "rooted3", "tree3"):
        guest = Guest.boot(form, 4, pages=16 << 8)
        moved = guest.do("spread", 1 << 28, 16)
        assert int(moved[-1]) == (1 << 28) - 1
        guest.do("write_pattern", moved[::7], 3)
        assert not len(guest.do("check_pattern", moved[::7], 3))
        assert guest.assert_consistent() == ["physmap-invalid"]


@pytest.mark.parametrize(("width", "form"), SOME_FORMS)
def test_balloon_and_move_keep_contents_and_grow_the_p2m(width: Width, form: str) -> None:
    guest = Guest.boot(form, width)
    free = guest.do("free_pfns")
    guest.do("write_pattern", free, 1)
    guest.do("balloon_out", free[10:1500])
    assert guest.host.info(guest.domid).pages == 4096 - 1490
    assert guest.assert_consistent() == ["physmap-invalid"]
    guest.do("move", free[:10], free[::-1][1500:1510] if len(free) > 3100 else free[1490:1500])
    far = pfns(300, 100_000)
    populated = guest.do("balloon_in", np.append(free[100:400], far))
    assert len(populated) == 600
    guest.do("write_pattern", populated, 2)
    assert guest.assert_consistent() == ["physmap-invalid"]
    assert guest.live.anchors.max_pfn == 100_300
    assert not len(guest.do("check_pattern", populated, 2))
    assert not len(guest.do("check_pattern", free[1510:], 1))
    assert guest.live.anchors.p2m_generation == (2 if parse_form(form).linear else 0)


def test_balloon_and_move_of_unsuitable_pfns_change_nothing() -> None:
    guest = Guest.boot("linear")
    free = guest.do("free_pfns")
    guest.do("balloon_out", free[:4])
    for call, arguments, culprit in (
        ("balloon_out", (array(3),), "pfn 0x3 "),
        ("balloon_out", (free[3:6],), f"pfn {int(free[3]):#x} "),
        ("balloon_out", (free[[7, 7]],), "twice"),
        ("balloon_in", (free[3:6],), f"pfn {int(free[4]):#x} "),
        ("balloon_in", (array(9000, 9000),), "twice"),
        ("move", (free[8:9], free[9:10]), f"pfn {int(free[9]):#x} "),
        ("move", (free[8:9], array(2)), "pfn 0x2 "),
        ("move", (free[8:10], array(9000, 9000)), "2 pages"),
        ("move", (free[[8, 8]], array(9000, 9001)), "twice"),
        ("write_pattern", (free[:1], 1), f"pfn {int(free[0]):#x} "),
        ("spread", (2000,), "64 groups"),
    ):
        with pytest.raises(RequestError, match=culprit):
            guest.do(call, *arguments)
    assert guest.assert_consistent() == ["physmap-invalid"]
    assert guest.live.anchors.max_pfn == 4096


def test_balloon_in_beyond_max_mem_returns_what_was_populated() -> None:
    guest = Guest.boot("rooted3")
    free = guest.do("free_pfns")
    guest.do("balloon_out", free[:20])
    guest.host.set_max_mem(guest.domid, 4096 - 15)
    assert guest.do("balloon_in", free[:20]).tolist() == free[:5].tolist()
    assert guest.assert_consistent() == ["physmap-invalid"]


def test_move_swaps_pfns() -> None:
    guest = Guest.boot("both")
    free = guest.do("free_pfns")[:100]
    before = guest.entries(free)
    guest.do("write_pattern", free[:50], 1)
    guest.do("move", free, free[::-1].copy())
    np.testing.assert_array_equal(guest.entries(free), before[::-1])
    assert guest.assert_consistent() == []
    assert guest.do("check_pattern", free[50:], 1).tolist() == free[50:].tolist(), "the pattern has the old pfns"


def test_generation_is_odd_while_the_list_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest.boot("both")
    seen: list[tuple[int, bool]] = []
    original = GuestView.mmu_update

    def mmu_update(view: GuestView, updates: Any) -> None:
        live = guest.live
        seen.append((live.anchors.p2m_generation, live.anchors.p2m_cr3 != 0))
        if live.anchors.p2m_generation & 1:
            change = live.p2m_change()
            assert change is not None
            assert change.kind is P2MChangeKind.IN_PROGRESS
        original(view, updates)

    monkeypatch.setattr(GuestView, "mmu_update", mmu_update)
    live = guest.live
    assert live.p2m.entries == 4096
    guest.do("balloon_out", guest.do("free_pfns")[:1])
    guest.do("balloon_in", array(5000))
    assert seen == [(1, True)]
    change = live.p2m_change()
    assert change is not None
    assert change.kind is P2MChangeKind.GENERATION
    assert "from 0x0 to 0x2" in change.message


def test_page_tables_and_the_shared_leaf_are_read_only() -> None:
    guest = Guest.boot("linear")
    guest.do("spread", 16 << 18, 3)

    def write_to_each(view: GuestView) -> None:
        tables = guest.kernel.pages.vaddrs(guest.kernel.p2m._list_tables)
        for vaddr in tables.tolist():
            view.translate(vaddr)
            with pytest.raises(Fault) as e:
                view.write(vaddr, b"x")
            assert e.value.level is not None, "it is mapped, but read-only"
        with pytest.raises(Fault):
            guest.kernel.p2m.store(view, array(2 << 18), array(5))

    guest.host.run(guest.domid, write_to_each)
    assert guest.assert_consistent() == ["physmap-invalid"]
