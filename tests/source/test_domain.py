"""The Domain protocol: a suspended domain and its save file give the same answers."""

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
    with SavedDomain.open(str(tmp_path / "saved")) as saved_domain:
        file: Domain = saved_domain
        assert (file.hvm, file.width, file.vcpus) == (live.hvm, live.width, live.vcpus) == (False, width, [0])
        saved_pfns, live_pfns = pfns_of(file), pfns_of(live)
        assert len(live_pfns) == guest.host.info(guest.domid).pages
        assert np.array_equal(saved_pfns, live_pfns)
        assert np.array_equal(file.frames.types(saved_pfns), live.frames.types(live_pfns))
        live_registers, saved_registers = live.registers(0), file.registers(0)
        assert live_registers is not None
        assert saved_registers is not None
        assert (live_registers.ip, live_registers.sp, live_registers.flags, live_registers.segments) == (
            saved_registers.ip,
            saved_registers.sp,
            saved_registers.flags,
            saved_registers.segments,
        )
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
