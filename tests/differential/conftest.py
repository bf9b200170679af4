"""What the peers are run with."""

from __future__ import annotations

import pytest

import lab
from tests.support.requirements import cannot_run


@pytest.fixture(scope="session")
def original() -> lab.PeerTools:
    """Xen's own tools."""
    try:
        return lab.peer_tools("4.17")
    except lab.LabError as e:
        cannot_run(str(e))
