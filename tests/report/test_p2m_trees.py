"""P2M trees: of files against the writer's places, of running domains against the kernel."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.support.kernel_guest import SOME_FORMS, Guest
from tests.support.writers.build import pv_domain
from xenpv.abi.declare import Width
from xenpv.abi.x86 import PTE_PSE
from xenpv.memory.p2m_anchors import P2MForm
from xenpv.report.drawing import draw_p2m_tree
from xenpv.report.p2m_trees import P2MTree, describe_p2m_trees, leaf_ranges
from xenpv.source.saved import SavedDomain


def shapes(saved: SavedDomain) -> list[P2MTree]:
    assert saved.anchors is not None
    return describe_p2m_trees(saved, saved.anchors)


def test_p2m_trees_of_a_file_have_all_levels(tmp_path: Path) -> None:
    domain = pv_domain(pfns=[*range(100), 600, 5000, 300_000], tree=True)
    file = tmp_path / "made.save"
    file.write_bytes(domain.to_bytes())
    with SavedDomain.open(str(file)) as saved:
        linear, tree = shapes(saved)
        at = leaf_ranges(saved.p2m, mfns=False)
    assert (linear.error, tree.error) == (None, None)
    assert [level.name for level in linear.levels] == ["L4 table", "L3 table", "L2 table", "L1 table", "leaf"]
    assert [level.name for level in tree.levels] == ["frame list list", "frame list", "leaf"]
    top, mid, leaf = tree.levels
    assert [node.frame for node in top.nodes] == [domain.places.tree_top]
    assert {node.frame for node in mid.nodes} <= set(domain.places.tree_mid)
    frames = set(domain.p2m_pfns.tolist())
    for last in (linear.levels[-1], leaf):
        assert last.frames == len(frames)
        assert last.places == len(domain.p2m_pfns)
        assert {node.frame for node in last.nodes} <= frames
        for node in last.nodes:
            assert domain.p2m_pfns[node.at : node.at + node.times].tolist() == [node.frame] * node.times
            assert node.first == node.at * 512
    assert linear.levels[-1].nodes[-1].last == domain.entries - 1
    assert sum(at.pages) == len(frames)


@pytest.mark.parametrize(("width", "form"), [each for each in SOME_FORMS if each[1] != "tree4hidden"])
def test_p2m_trees_of_a_running_domain_have_its_leaves(width: Width, form: str) -> None:
    guest = Guest.boot(form, width)
    live = guest.live
    p2m = live.p2m
    assert live.p2m_names_mfns
    best = describe_p2m_trees(live, live.anchors)[0]
    assert best.linear == (live.anchors.roots[0].form is P2MForm.LINEAR)
    assert best.error is None
    leaf = best.levels[-1]
    assert (leaf.frames, leaf.places) == (len(p2m.distinct_leaves), p2m.leaf_count)
    for node in leaf.nodes:
        assert p2m.leaves.frame_of(np.array([node.at])).tolist() == [node.frame]
    assert sum(leaf_ranges(p2m, mfns=True).pages) == len(p2m.distinct_leaves)  # its own frames, all of them


def test_p2m_trees_with_false_anchors_have_an_error(tmp_path: Path) -> None:
    domain = pv_domain(pfns=range(100), tree=True)
    file = tmp_path / "made.save"
    file.write_bytes(domain.to_bytes())
    with SavedDomain.open(str(file)) as saved:
        assert saved.anchors is not None
        wrong = replace(saved.anchors, p2m_cr3=0x7777 << 12, frame_list_list=0x8888)
        for shape in describe_p2m_trees(saved, wrong):
            assert shape.levels == []
            assert shape.error is not None
            assert f"{0x7777 if shape.linear else 0x8888:#x}" in shape.error
            draw_p2m_tree(shape)
        high = replace(saved.anchors, max_pfn=1 << 50)
        for shape in describe_p2m_trees(saved, high):
            assert shape.levels == []
            assert shape.error is not None


def test_draw_p2m_tree_keeps_boxes_apart_and_inside(tmp_path: Path) -> None:
    domain = pv_domain(pfns=[*range(100), *range(1 << 28, (1 << 28) + 3000, 100)])
    file = tmp_path / "made.save"
    file.write_bytes(domain.to_bytes())
    with SavedDomain.open(str(file)) as saved:
        shape = shapes(saved)[0]
    picture = draw_p2m_tree(shape)
    assert len(picture.rows) == 1 + len(shape.levels)
    drawn = [box for box in picture.boxes if box.first is not None]
    assert len(drawn) == sum(len(level.nodes) for level in shape.levels)
    for box in picture.boxes:
        assert 0 <= box.x < box.x + box.w <= picture.width
        assert box.y + box.h <= picture.height
    for row in picture.rows[1:]:
        here = sorted((box.x, box.w) for box in picture.boxes if box.y == row.y)
        for (x, w), (after, _) in pairwise(here):
            assert x + w <= after + 0.11


def test_p2m_trees_with_a_superpage_end_there(tmp_path: Path) -> None:
    domain = pv_domain(pfns=range(100))
    step = domain.set_pte(domain.p2m_vaddr, 0, level=3)
    domain.table(step.table)[step.entry] = step.pte | PTE_PSE
    file = tmp_path / "made.save"
    file.write_bytes(domain.to_bytes())
    with SavedDomain.open(str(file)) as saved:
        shape = shapes(saved)[0]
    assert [level.frames for level in shape.levels] == [1, 1, 0, 0, 0]
    draw_p2m_tree(shape)
