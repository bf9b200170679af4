"""What is published is what a walk finds: every form, both widths, pfns far apart, mfns anywhere."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.support.frames import Machine, array
from xenpv.abi.declare import Width
from xenpv.abi.x86 import PTE_P
from xenpv.abi.xen import INVALID_MFN
from xenpv.errors import GuestError, RequestError
from xenpv.frames import FOREIGN, IDENTITY, NO_FRAME, PAGE_SIZE, U64
from xenpv.memory.p2m_anchors import Anchors, P2MForm, tree_capacity
from xenpv.memory.p2m_reader import P2M, decode_entries
from xenpv.memory.p2m_writer import (
    TABLE_FLAGS,
    encode_entries,
    write_leaves,
    write_page_tables,
    write_tree,
    write_tree_anchors,
)
from xenpv.runs import FrameRuns

NONE = int(NO_FRAME)
SHAPES: list[tuple[Width, P2MForm, int]] = [
    *((width, P2MForm.ROOTED, levels) for width in (8, 4) for levels in (2, 3, 4, 5, 6, 7, 8)),
    *((width, form, 3) for width in (8, 4) for form in (P2MForm.TREE, P2MForm.LINEAR)),
    (8, P2MForm.MARKED, 4),
]
LIST_AT: dict[Width, int] = {8: 0xFFFF_C900_0000_0000, 4: 0x4000_0000}
MFNS: dict[Width, int] = {8: 1 << 40, 4: 1 << 30}
NOTHING = FrameRuns.from_frames(np.empty(0, np.uint64))


def reach(width: Width, form: P2MForm, levels: int) -> int:
    """The first pfn that does not fit."""
    if form is P2MForm.LINEAR:
        return 1 << (42 if width == 8 else 29)
    return min(tree_capacity(levels, width), 1 << 45, (1 << 8 * width) - 1)


@dataclass
class Published:
    """A p2m as a guest would write it, and what shared info says of it."""

    machine: Machine
    leaves: FrameRuns
    anchors: Anchors


def publish(shape: tuple[Width, P2MForm, int], pfns: U64, mfns: U64, entries: int, *, vaddr: int = 0) -> Published:
    width, form, levels = shape
    machine = Machine(MFNS[width])
    leaves = write_leaves(pfns, mfns, entries, width, machine.put)
    if form is not P2MForm.LINEAR:
        return Published(machine, leaves, write_tree_anchors(form, leaves, entries, width, machine.put, levels=levels))
    first = vaddr >> 12 & (1 << 36) - 1
    below = write_page_tables(
        FrameRuns(leaves.first + first, leaves.count, leaves.frame), 3 if width == 8 else 2, machine.put
    )
    top = np.zeros(512, np.uint64)
    for slot, count, frame in zip(below.first, below.count, below.frame, strict=True):
        top[slot : slot + count] = frame << np.uint64(12) | np.uint64(TABLE_FLAGS if width == 8 else PTE_P)
    [root] = machine.put(top.view(np.uint8)[None]).tolist()
    cr3 = root << 12 if width == 8 else (root << 12 | root >> 20) & 0xFFFF_FFFF
    return Published(machine, leaves, Anchors(width, entries, INVALID_MFN[width], p2m_cr3=cr3, p2m_vaddr=vaddr))


@st.composite
def tables(draw: st.DrawFn, shape: tuple[Width, P2MForm, int]) -> tuple[U64, U64, int]:
    """(pfns ascending, their entries, how many entries the table has), a few of them side by side."""
    limit = reach(*shape)
    some = draw(st.lists(st.integers(0, limit - 1), max_size=8))
    runs = draw(st.lists(st.tuples(st.integers(0, limit - 1), st.integers(1, 40)), max_size=2))
    pfns = sorted({*some, *(pfn for first, n in runs for pfn in range(first, min(first + n, limit)))})
    frame = st.integers(0, MFNS[shape[0]] - 1)
    entry = st.one_of(
        frame,
        frame,
        frame.map(lambda mfn: mfn | int(FOREIGN)),
        frame.map(lambda mfn: mfn | int(IDENTITY)),
        st.just(NONE),
    )
    mfns = draw(st.lists(entry, min_size=len(pfns), max_size=len(pfns)))
    beyond = draw(st.sampled_from([1, 1, 2, 512, 1024, 70_000]))
    entries = min((pfns[-1] if pfns else -1) + beyond, limit)
    return array(*pfns), array(*mfns), entries


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[1].name}-{shape[2]}-of-{shape[0]}")
@settings(max_examples=max(8, settings().max_examples // 4))
@given(data=st.data())
def test_from_root_finds_what_was_written(shape: tuple[Width, P2MForm, int], data: st.DataObject) -> None:
    """abi-p2m-root.md: "an entry of a page above the leaves is the mfn of a page one level down, or INVALID_MFN";
    "a leaf's entry is the mfn of the pfn, INVALID_MFN, or marked FOREIGN or IDENTITY"."""
    width, form, _ = shape
    pfns, mfns, entries = data.draw(tables(shape))
    places = -(-entries * width // PAGE_SIZE)
    room = (1 << 64) - LIST_AT[8] if width == 8 else 0xF580_0000 - LIST_AT[4]
    slack = data.draw(st.integers(0, (room >> 12) - places)) if form is P2MForm.LINEAR else 0
    published = publish(shape, pfns, mfns, entries, vaddr=LIST_AT[width] + slack * PAGE_SIZE)
    page = bytearray(PAGE_SIZE)
    for at, store in published.anchors.shared_info_writes():
        page[at : at + width] = store
    anchors = Anchors.from_shared_info(bytes(page), width)
    assert anchors == published.anchors
    [root] = anchors.roots
    assert root.form is form
    p2m = P2M.from_root(anchors, root, published.machine.read)
    assert (p2m.unreadable, p2m.entries, p2m.leaf_count, len(p2m.holes)) == ([], entries, places, 0)
    assert p2m.lookup(pfns).tolist() == mfns.tolist()
    there = set(pfns.tolist())
    between = [
        pfn + step for pfn in there for step in (-1, 1, 512, -1024) if pfn + step >= 0 and pfn + step not in there
    ]
    beside = array(*between, entries, entries + 1, (1 << 64) - 1, 1 << 63)
    assert p2m.lookup(beside).tolist() == [NONE] * len(beside)
    of_parts = np.unique((pfns // np.uint64(p2m.entries_per_leaf)).astype(np.int64))
    found = {
        pfn: mfn
        for leaves in p2m.iter_leaves(of_parts)
        for pfn, mfn in zip(leaves.pfns.reshape(-1).tolist(), leaves.mfns.reshape(-1).tolist(), strict=True)
        if mfn != NONE
    }
    assert found == {pfn: mfn for pfn, mfn in zip(pfns.tolist(), mfns.tolist(), strict=True) if mfn != NONE}
    around = np.unique(np.clip(np.concatenate([of_parts - 1, of_parts, of_parts + 1]), 0, max(places - 1, 0)))
    assert p2m.leaves.frame_of(around).tolist() == published.leaves.frame_of(around).tolist()
    last = {mfn: pfn for pfn, mfn in found.items()}
    assert p2m.pfns_of(array(*last)).tolist() == list(last.values())


@pytest.mark.parametrize("width", [8, 4])
@given(data=st.data())
def test_write_leaves_share_one_missing_leaf(width: Width, data: st.DataObject) -> None:
    """abi-p2m-root.md: "pages may be shared among parts in which no pfn has a frame"."""
    pfns, mfns, entries = data.draw(tables((width, P2MForm.ROOTED, 6)))
    machine = Machine(MFNS[width])
    leaves = write_leaves(pfns, mfns, entries, width, machine.put)
    per_leaf = PAGE_SIZE // width
    parts = {pfn // per_leaf for pfn in pfns.tolist()}
    assert len(machine.content) == len(parts) + (len(parts) * per_leaf < entries)
    assert int(leaves.count.sum()) == -(-entries // per_leaf)
    first = leaves.first.tolist()
    once = {at for at, count in zip(first, leaves.count.tolist(), strict=True) if count == 1}
    assert parts <= once
    missing = {frame for at, frame in zip(first, leaves.frame.tolist(), strict=True) if at not in parts}
    assert len(missing) <= 1
    for frame in missing:
        assert decode_entries(machine.content[frame][None], width).tolist() == [[NONE] * per_leaf]


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] is not P2MForm.LINEAR], ids=str)
def test_write_tree_anchors_beyond_reach_raises_request_error(shape: tuple[Width, P2MForm, int]) -> None:
    """abi-p2m-root.md: "capacity is fpp^p2m_levels pages; a reader must refuse max_pfn beyond it, naming both"."""
    width, form, levels = shape
    word = (1 << 8 * width) - 1
    most = min((PAGE_SIZE // width) ** levels, word)
    machine = Machine(MFNS[width])
    leaves = write_leaves(array(most - 1), array(77), most, width, machine.put)
    anchors = write_tree_anchors(form, leaves, most, width, machine.put, levels=levels)
    p2m = P2M.from_root(anchors, anchors.roots[0], machine.read)
    assert p2m.lookup(array(most - 1, most - 2, 0)).tolist() == [77, NONE, NONE]
    assert p2m.distinct_leaves.count.sum() == p2m.leaf_count == -(-most * width // PAGE_SIZE)
    with pytest.raises(RequestError) as e:
        write_tree_anchors(form, leaves, most + 1, width, machine.put, levels=levels)
    assert (e.value.needed, e.value.available) == (most + 1, most)
    if most < word:
        more = Anchors(
            width, most + 1, anchors.frame_list_list, p2m_levels=anchors.p2m_levels, p2m_root=anchors.p2m_root
        )
        with pytest.raises(GuestError, match=rf"{most - 1:#x}\b.*{most + 1:#x}\b"):
            P2M.from_root(more, more.roots[0], machine.read)


def test_tree_capacity_of_three_levels_is_512_gib() -> None:
    """abi-p2m-root.md: "three levels, which reach 512 GiB for a 64-bit guest"."""
    assert tree_capacity(3, 8) == 1 << 27 == (512 << 30) // PAGE_SIZE
    assert tree_capacity(3, 4) == 1 << 30


@pytest.mark.parametrize("levels", [0, 1, 9, 64])
def test_write_tree_anchors_invalid_levels_raises_request_error(levels: int) -> None:
    """abi-p2m-root.md: "p2m_levels must be from 2 to 8"."""
    with pytest.raises(RequestError) as e:
        write_tree_anchors(P2MForm.ROOTED, NOTHING, 0, 8, Machine().put, levels=levels)
    assert e.value.needed == levels


def test_write_tree_anchors_marked_32_bit_raises_request_error() -> None:
    with pytest.raises(RequestError, match=r"\b61\b"):
        write_tree_anchors(P2MForm.MARKED, NOTHING, 0, 4, Machine().put)


def test_write_tree_leaf_beyond_reach_raises_request_error() -> None:
    with pytest.raises(RequestError) as e:
        write_tree(FrameRuns(np.array([512]), np.array([1]), array(7)), 2, 8, Machine().put)
    assert (e.value.needed, e.value.available) == (513, 512)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_write_tree_without_leaves_writes_empty_root(shape: tuple[Width, P2MForm, int]) -> None:
    published = publish(shape, array(), array(), 0, vaddr=LIST_AT[shape[0]])
    p2m = P2M.from_root(published.anchors, published.anchors.roots[0], published.machine.read)
    assert (p2m.leaf_count, p2m.used_entries, len(p2m.leaves), p2m.unreadable) == (0, 0, 0, [])
    assert p2m.lookup(array(0, 1)).tolist() == [NONE, NONE]


@given(st.integers(0, (1 << 64) - 1))
@example((1 << 30) - 1)
@example(1 << 30)
@example(1 << 31)
@example(1 << 62 | 1 << 30)
def test_encode_entries_mfn_above_30_bits_raises_request_error(mfn: int) -> None:
    """A 32-bit entry has 30 bits for the frame; FOREIGN and IDENTITY are above them, and all ones is INVALID_MFN."""
    plain = mfn & ~int(FOREIGN | IDENTITY)
    page = np.full((1, 1024), NO_FRAME)
    page[0, 5] = mfn
    if plain >> 30 and mfn != NONE:
        with pytest.raises(RequestError):
            encode_entries(page, 4)
    else:
        assume(mfn & 0xFFFF_FFFF != 0x3FFF_FFFF or mfn >> 62 != 3)  # would read as INVALID_MFN
        assert decode_entries(encode_entries(page, 4), 4).tolist() == page.tolist()


@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=4, max_size=4))
def test_encode_entries_64_bit_round_trip_is_exact(mfns: list[int]) -> None:
    assert decode_entries(encode_entries(array(*mfns * 128)[None], 8), 8).tolist() == [mfns * 128]


# --- in which order, and which first ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [8, 4])
def test_shared_info_writes_validity_fields_come_last(width: Width) -> None:
    """abi-p2m-root.md: "a reader that sees p2m_levels sees the rest"; and so of p2m_cr3 (arch-x86/xen.h)."""
    whole = Anchors(width, 5, INVALID_MFN[width], 7 << 12, 0x4000_0000, 2, 3, 9)
    page, seen = bytearray(PAGE_SIZE), []
    for at, store in whole.shared_info_writes():
        page[at : at + width] = store
        seen.append(Anchors.from_shared_info(bytes(page), width))
    assert seen[-1] == whole
    assert [[root.form for root in anchors.roots] for anchors in seen[-3:]] == [
        [],
        [P2MForm.ROOTED],
        [P2MForm.LINEAR, P2MForm.ROOTED],
    ]
    assert not any(anchors.roots for anchors in seen[:-2])
    assert seen[-2] == replace(whole, p2m_cr3=0)


@pytest.mark.parametrize(
    ("frame_list_list", "forms"),
    [
        (INVALID_MFN[8], [P2MForm.LINEAR, P2MForm.ROOTED]),
        (5 | 1 << 61, [P2MForm.LINEAR, P2MForm.MARKED]),
        (5, [P2MForm.LINEAR, P2MForm.TREE]),
        (0, [P2MForm.LINEAR]),
    ],
)
def test_roots_list_first_then_one_tree(frame_list_list: int, forms: list[P2MForm]) -> None:
    """abi-p2m-root.md: "the linear list, then the rooted tree, then the marked tree, then the three-level"."""
    anchors = Anchors(8, 5, frame_list_list, 7 << 12, 0, 0, 3, 9)
    assert [root.form for root in anchors.roots] == forms
    assert [root.form for root in replace(anchors, p2m_cr3=0).roots] == forms[1:]
    without = [form for form in forms if form is not P2MForm.ROOTED]
    assert [root.form for root in replace(anchors, p2m_levels=0).roots] == without
