"""What source.domain.Domain promises of any domain, held to a suspended one and to its own save file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.frames import columns
from tests.support.saving import saved, suspended
from xenpv.abi.declare import Width
from xenpv.frames import HAS_DATA
from xenpv.source.domain import Domain
from xenpv.source.live import LiveDomain
from xenpv.source.saved import SavedDomain


@pytest.mark.parametrize("width", [8, 4])
def test_domain_saved_answers_as_the_running_one(width: Width, tmp_path: Path) -> None:
    guest = suspended("linear", width)
    live: Domain = LiveDomain(guest.host, guest.host.info(guest.domid))
    saved(guest, tmp_path / "saved")
    with SavedDomain.open(str(tmp_path / "saved")) as kept:
        file: Domain = kept
        assert (file.hvm, file.width, file.vcpus) == (live.hvm, live.width, live.vcpus) == (False, width, [0])
        there, here = pfns_of(file), pfns_of(live)
        assert len(here) == guest.host.info(guest.domid).pages
        assert np.array_equal(there, here)
        assert np.array_equal(file.frames.types(there), live.frames.types(here))
        mine, its = live.registers(0), file.registers(0)
        assert mine is not None
        assert its is not None
        assert (mine.ip, mine.sp, mine.flags, mine.segments) == (its.ip, its.sp, its.flags, its.segments)
        assert file.cr3(0) == live.cr3(0)
        assert file.shared_info() == live.shared_info()
        assert file.registers(7) is None is live.registers(7)


def pfns_of(domain: Domain) -> np.ndarray:
    """All pfns with content, by its extents, which have to ascend."""
    parts = []
    for extents in domain.extents():
        for start, pages, kind in columns(extents):
            if HAS_DATA[kind]:
                parts.append(np.arange(start, start + pages, dtype=np.uint64))
    pfns = np.concatenate(parts)
    assert (np.diff(pfns.astype(np.int64)) > 0).all()
    return pfns
