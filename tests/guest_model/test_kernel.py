"""The kernel of the model: xenpv finds and walks every form of p2m that it publishes, and checks it against the m2p."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.kernel_guest import ALL_FORMS, SOME_FORMS, WIDTHS, Guest, mfn_by_pfn
from tests.support.model_guest import array, pfns
from tests.support.start_of_day import build_domain
from xenpv.abi.declare import Width
from xenpv.errors import Fault, GuestError, RequestError
from xenpv.findings import Severity
from xenpv.frames import NO_FRAME
from xenpv.guest_model.kernel import Kernel
from xenpv.guest_model.p2m_forms import FORMS, parse_form
from xenpv.host.model.guest_view import GuestView
from xenpv.host.model.host import ModelHost

BOTH = pytest.mark.parametrize("width", WIDTHS)
GIB = 1 << 18  # pages


@pytest.mark.parametrize(
    ("width", "form", "outside"),
    [
        *((*one, False) for one in ALL_FORMS),
        *((*one, True) for one in ALL_FORMS if one[0] == 8),
    ],  # INIT_P2M is 64-bit only
)
def test_every_form_is_published_and_agrees(width: Width, form: str, outside: bool) -> None:
    guest = Guest.boot(form, width, 4000, outside=outside, order=0)
    assert guest.assert_consistent() == []
    anchors = guest.live.anchors
    assert len(anchors.roots) == (2 if form == "both" else 1)
    shown = parse_form(form)
    assert anchors.roots[-1].levels == (3 if shown.hidden else shown.levels) or shown.linear
    assert mfn_by_pfn(guest.live.p2m) == dict(enumerate(guest.layout.mfns.tolist()))


@BOTH
@pytest.mark.parametrize(("form", "words"), [("none", "not set up yet"), ("invalid", "looked for elsewhere")])
def test_what_publishes_nothing_says_so(width: Width, form: str, words: str) -> None:
    guest = Guest.boot(form, width)
    with pytest.raises(GuestError, match=words):
        assert guest.live.p2m
    assert guest.entries(array(5, 4096)).tolist() == [int(guest.layout.mfns[5]), int(NO_FRAME)]


@BOTH
def test_the_leaves_are_the_pages_of_the_builders_list(width: Width) -> None:
    guest = Guest.boot("both", width)
    for root in guest.live.anchors.roots:
        frames = guest.live.walk_p2m(root).leaves.frame
        np.testing.assert_array_equal(frames, guest.layout.mfns[guest.layout.list :][: len(frames)])


def test_a_form_that_is_none_lists_those_that_are() -> None:
    with pytest.raises(RequestError, match=r"'tree5' is no form of p2m; these are: linear, both, tree3, .*, invalid"):
        Kernel("tree5")
    assert parse_form("rooted7").levels == 7
    assert {form.name for form in FORMS.values()} == set(FORMS)


def test_what_a_form_or_a_width_cannot_hold_is_refused() -> None:
    with pytest.raises(RequestError, match="no bit 61"):
        Guest.boot("marked", 4)
    small = Guest.boot("rooted2")
    with pytest.raises(RequestError, match="rooted2, which reaches 0x40000") as e:
        small.do("balloon_in", array(GIB))
    assert (e.value.needed, e.value.available) == (GIB + 1, GIB)
    with pytest.raises(RequestError, match="does not fit a 32-bit kernel"):
        Guest.boot("linear", 4).do("spread", 1 << 30)
    host = ModelHost(1 << 30)
    layout = build_domain(host)
    with pytest.raises(RequestError, match="reserve more"):
        host.run(layout.domid, Kernel("both", reserve=5).boot)
    with pytest.raises(RequestError, match="too few"):
        Guest.boot("linear", pages=600)


def test_a_32_bit_kernel_has_addresses_for_a_gib() -> None:
    guest = Guest.boot("linear", 4)
    many = pfns((1 << 18) + 1)
    with pytest.raises(RequestError, match="do not fit into the addresses") as e:
        guest.host.run(guest.domid, lambda view: guest.kernel.pages.map(view, many, many))
    assert e.value.available == 1 << 18
    assert guest.assert_consistent() == []


def test_there_is_no_booting_without_a_start_info() -> None:
    host = ModelHost(1 << 30)
    layout = build_domain(host)
    host.write_frames(layout.domid, layout.mfns[layout.start_info :][:1], np.zeros((1, 4096), np.uint8))
    with pytest.raises(GuestError, match="no start info at 0xffffffff80018000"):
        host.run(layout.domid, Kernel().boot)


def test_three_levels_of_four_are_shown() -> None:
    """600 GiB of pfns: what is shown of the tree reaches 512 GiB, and xenpv says so, in words."""
    guest = Guest.boot("tree4hidden", outside=True)
    guest.do("spread", 600 * GIB, 7)
    with pytest.raises(GuestError, match="exposes 3 levels of its p2m, which reach pfn 0x7ffffff"):
        assert guest.live.p2m
    p2m = guest.live.walk_p2m(guest.live.anchors.roots[0], 512 * GIB)
    assert [mfn for pfn, mfn in mfn_by_pfn(p2m).items()] == guest.entries(array(*mfn_by_pfn(p2m))).tolist()
    assert 3072 - 439 < len(mfn_by_pfn(p2m)) < 4096
    beside = Guest.boot("both")
    beside.do("spread", 600 * GIB, 7)
    assert [f.rule.name for f in beside.findings() if f.severity is not Severity.NOTE] == []
    assert "physmap-partial" in [f.rule.name for f in beside.findings()]
    with pytest.raises(RequestError, match="does not fit tree3"):
        Guest.boot("tree3").do("spread", 600 * GIB)


@pytest.mark.parametrize("form", ["linear", "marked", "rooted4", "rooted5"])
def test_64_mib_reach_16_tib(form: str) -> None:
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
    distinct = guest.live.p2m.distinct
    assert int(distinct.count.max()) > 1 << 22, "what is not populated shares one leaf"
    assert len(distinct) < 200


def test_a_32_bit_guest_is_spread_over_what_its_list_can_name() -> None:
    for form in ("linear", "rooted3", "tree3"):
        guest = Guest.boot(form, 4, pages=16 << 8)
        moved = guest.do("spread", 1 << 28, 16)
        assert int(moved[-1]) == (1 << 28) - 1
        guest.do("write_pattern", moved[::7], 3)
        assert not len(guest.do("check_pattern", moved[::7], 3))
        assert guest.assert_consistent() == ["physmap-invalid"]


@pytest.mark.parametrize(("width", "form"), SOME_FORMS)
def test_ballooning_moving_and_growing(width: Width, form: str) -> None:
    guest = Guest.boot(form, width)
    free = guest.do("free_pfns")
    guest.do("write_pattern", free, 1)
    guest.do("balloon_out", free[10:1500])
    assert guest.host.info(guest.domid).pages == 4096 - 1490
    assert guest.assert_consistent() == ["physmap-invalid"]
    guest.do("move", free[:10], free[::-1][1500:1510] if len(free) > 3100 else free[1490:1500])
    far = pfns(300, 100_000)
    got = guest.do("balloon_in", np.append(free[100:400], far))
    assert len(got) == 600
    guest.do("write_pattern", got, 2)
    assert guest.assert_consistent() == ["physmap-invalid"]
    assert guest.live.anchors.max_pfn == 100_300
    assert not len(guest.do("check_pattern", got, 2))
    assert not len(guest.do("check_pattern", free[1510:], 1))
    assert guest.live.anchors.p2m_generation == (2 if parse_form(form).linear else 0)


def test_what_ballooning_and_moving_refuse() -> None:
    guest = Guest.boot("linear")
    free = guest.do("free_pfns")
    guest.do("balloon_out", free[:4])
    for call, arguments, words in (
        ("balloon_out", (array(3),), "pfn 0x3 is the kernel's own"),
        ("balloon_out", (free[3:6],), f"pfn {int(free[3]):#x} has no page"),
        ("balloon_out", (free[[7, 7]],), "twice"),
        ("balloon_in", (free[3:6],), "is taken"),
        ("balloon_in", (array(9000, 9000),), "twice"),
        ("move", (free[8:9], free[9:10]), "is taken"),
        ("move", (free[8:9], array(2)), "pfn 0x2 is taken"),
        ("move", (free[8:10], array(9000, 9000)), "2 pages cannot go to 1"),
        ("write_pattern", (free[:1], 1), "has no page"),
        ("spread", (2000,), "do not fit 64 places"),
    ):
        with pytest.raises(RequestError, match=words):
            guest.do(call, *arguments)
    assert guest.assert_consistent() == ["physmap-invalid"]
    assert guest.live.anchors.max_pfn == 4096


def test_as_many_pages_come_back_as_there_are() -> None:
    guest = Guest.boot("rooted3")
    free = guest.do("free_pfns")
    guest.do("balloon_out", free[:20])
    guest.host.set_max_mem(guest.domid, 4096 - 15)
    assert guest.do("balloon_in", free[:20]).tolist() == free[:5].tolist()
    assert guest.assert_consistent() == ["physmap-invalid"]


def test_pages_may_swap_their_pfns() -> None:
    guest = Guest.boot("both")
    free = guest.do("free_pfns")[:100]
    before = guest.entries(free)
    guest.do("write_pattern", free[:50], 1)
    guest.do("move", free, free[::-1].copy())
    np.testing.assert_array_equal(guest.entries(free), before[::-1])
    assert guest.assert_consistent() == []
    assert guest.do("check_pattern", free[50:], 1).tolist() == free[50:].tolist(), "the words have the old pfns"


def test_the_generation_is_odd_while_the_list_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest.boot("both")
    seen: list[tuple[int, bool]] = []
    original = GuestView.mmu_update

    def mmu_update(view: GuestView, updates: Any) -> None:
        found = guest.live
        seen.append((found.anchors.p2m_generation, found.anchors.p2m_cr3 != 0))
        if found.anchors.p2m_generation & 1:
            assert "is odd" in str(found.changed())
        original(view, updates)

    monkeypatch.setattr(GuestView, "mmu_update", mmu_update)
    live = guest.live
    assert live.p2m.entries == 4096
    guest.do("balloon_out", guest.do("free_pfns")[:1])
    guest.do("balloon_in", array(5000))
    assert seen == [(1, True)]
    assert live.changed() == "p2m_generation went from 0x0 to 0x2 meanwhile: look again"


def test_no_table_can_be_written_and_shared_leaves_neither() -> None:
    guest = Guest.boot("linear")
    guest.do("spread", 16 << 18, 3)

    def look(view: GuestView) -> None:
        tables = guest.kernel.pages.vaddrs(guest.kernel.p2m._tables)
        for vaddr in tables.tolist():
            view.translate(vaddr)
            with pytest.raises(Fault, match="read-only"):
                view.write(vaddr, b"x")
        with pytest.raises(Fault, match="read-only"):
            guest.kernel.p2m.store(view, array(2 << 18), array(5))

    guest.host.run(guest.domid, look)
    assert guest.assert_consistent() == ["physmap-invalid"]
