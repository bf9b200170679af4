"""Cores of domains that real Xen saved: exactly Xen's page tables are found.

The oracle is the page type in the stream, which a core does not have.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.vectors import unpack_vector
from tests.support.writers.core import Core
from tests.vectors.make import RECIPES, Recipe
from xenpv.frames import HAS_DATA, IS_TABLE, U64
from xenpv.memory.page_tables import as_ptes, localise
from xenpv.source.core import CoreDomain
from xenpv.source.saved import SavedDomain


def core_of_saved(saved: SavedDomain) -> Core:
    """What xl would have dumped: pages as Xen had them, where the p2m in the stream says that they were."""

    def mfn(pfn: int) -> int:
        return int(saved.p2m.lookup(np.array([pfn], np.uint64))[0])

    pfns = saved.contents.index.pfns(HAS_DATA)
    mfns: U64 = saved.p2m.lookup(pfns)
    pages, kinds = saved.frames.pages(pfns), saved.frames.types(pfns)
    for row in np.flatnonzero(IS_TABLE[kinds]).tolist():
        entries, lost = localise(as_ptes(pages[row : row + 1]), saved.p2m.lookup)
        assert not lost.any()
        if kinds[row] & 7 == 4:
            entries[0, 258] = int(mfns[row]) << 12 | 0x63
        pages[row] = entries.view(np.uint8)
    contexts = []
    for vcpu in saved.vcpus:
        saved_context = saved.vcpu_context(vcpu)
        assert saved_context is not None
        context = saved_context.copy()
        top, user = saved.cr3(vcpu), saved.cr3(vcpu, user=True)
        assert top is not None
        context["ctrlreg"][3] = mfn(top) << 12
        context["ctrlreg"][1] = 0 if user is None else mfn(user) << 12
        contexts.append(context.tobytes())
    return Core(8, [page.tobytes() for page in pages], np.stack([pfns, mfns], axis=1), contexts, saved.shared_info())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_page_tables_of_a_real_guest_are_those_that_xen_saved(recipe: Recipe, tmp_path: Path) -> None:
    file, path = tmp_path / "litmus.save", tmp_path / "litmus.core"
    file.write_bytes(unpack_vector(recipe))
    with SavedDomain.open(str(file)) as saved:
        path.write_bytes(bytes(core_of_saved(saved)))
        with CoreDomain.open(str(path)) as core:
            pfns = saved.contents.index.pfns(HAS_DATA)
            assert core.frames.types(pfns).tolist() == (saved.frames.types(pfns) & 7).tolist()
            assert np.array_equal(core.frames.pages(pfns), saved.frames.pages(pfns))
            assert np.array_equal(core.p2m.lookup(pfns), saved.p2m.lookup(pfns))
