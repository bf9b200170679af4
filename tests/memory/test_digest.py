"""A domain's digest: the same wherever it lies, another for each word that differs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.kernel_guest import SOME_FORMS, Guest
from tests.support.saving import CONFIG, saved, suspended, table_of
from xenpv.abi.declare import Width
from xenpv.frames import U64
from xenpv.memory.digest import Digest, digest
from xenpv.source.saved import SavedDomain


def _of(guest: Guest) -> Digest:
    """Of a running domain, its p2m's leaves and start info aside, which hold mfns."""
    live = guest.live
    aside = np.append(live.pfns_of(live.p2m.distinct_leaves.frame), np.uint64(guest.layout.start_info))
    return digest(live.frames, live.iter_types(), aside)


@pytest.mark.parametrize(("width", "form"), SOME_FORMS)
def test_digest_of_file_equals_that_of_saved_domain(width: Width, form: str, tmp_path: Path) -> None:
    guest = suspended(form, width)
    saved(guest, tmp_path / "x", config=CONFIG)
    with SavedDomain.open(str(tmp_path / "x")) as file:
        pfns = np.sort(guest.host.m2p(guest.host.frames.owned(guest.domid + 1)))
        pfns = pfns[pfns < np.uint64(1 << 40)]  # shared info has none
        aside = np.append(np.unique(file.contents.p2m_frames), np.uint64(guest.layout.start_info))
        pieces = ((some, file.frames.types(some)) for some in np.array_split(pfns, 7))
        assert digest(file.frames, pieces, aside) == _of(guest)


def _change(guest: Guest, mfn: U64, at: int) -> None:
    page = guest.host.frames.read(mfn)
    page[0, at] ^= 1
    guest.host.frames.write(mfn, page)


def test_digest_any_changed_word_differs() -> None:
    guest = suspended("linear")
    before = _of(guest)
    assert _of(guest) == before
    moved = guest.live.p2m.lookup(np.array([70_599], np.uint64))
    for mfn, at in ((moved, 17), (table_of(guest, 1), 0)):
        _change(guest, mfn, at)
        after = _of(guest)
        assert (after.pages, after.nonzero) == (before.pages, before.nonzero)
        assert after.value != before.value
        _change(guest, mfn, at)
        assert _of(guest) == before
