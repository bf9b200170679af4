"""The contract, on ModelHost: domains of both widths, paused and not, of single frames and of extents."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest

from tests.contract.building import BUILDING
from tests.contract.checks import CHECKS, gone
from tests.contract.moving import MOVING
from tests.contract.running import (
    a_guest_suspends_when_asked,
    a_request_that_was_not_seen_is_taken_back,
    a_suspend_is_cancelled,
    all_that_changes_is_in_the_log,
)
from tests.support.kernel_guest import Guest
from tests.support.model_guest import make_guest
from xenpv.abi.declare import Width
from xenpv.frames import DomId
from xenpv.host.model.host import ModelHost
from xenpv.host.protocol import Host, Mover


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("order", [0, 9])
@pytest.mark.parametrize("width", [8, 4])
def test_contract(check: Callable[[Host, DomId], None], width: Width, order: int) -> None:
    host = ModelHost()
    made = make_guest(host, width, order=order, name="litmus")
    check(host, made.domid)


@pytest.mark.parametrize("check", BUILDING + MOVING, ids=lambda check: check.__name__)
@pytest.mark.parametrize("width", [8, 4])
def test_building_and_moving(check: Callable[[Mover, Width], None], width: Width) -> None:
    host = ModelHost()
    before = {path: host.store.list(path) for path in ("/local/domain", "/vm", "/libxl", "/local/domain/0")}
    free = host.free_pages()
    check(host, width)
    assert host.free_pages() == free
    assert [d.domid for d in host.domains()] == [0]
    for path, names in before.items():
        assert host.store.list(path) == names, path


@pytest.mark.parametrize("width", [8, 4])
def test_running(width: Width) -> None:
    """A kernel that writes to a few pages, and does as it is asked, whenever it runs."""
    guest = Guest.boot("both", width)
    free = guest.do("free_pfns")[:20]
    numbers = count(1)

    def go() -> None:
        guest.do("write_pattern", free, next(numbers))
        guest.do("poll")

    guest.host.set_time_slice(guest.domid, lambda: guest.do("poll"))
    written = all_that_changes_is_in_the_log(guest.host, guest.domid, go)
    assert len(free) <= written["changed"] <= written["logged"] < 30
    a_request_that_was_not_seen_is_taken_back(guest.host, guest.domid, go)
    a_guest_suspends_when_asked(guest.host, guest.domid, go)
    a_suspend_is_cancelled(guest.host, guest.domid, lambda: None)
    assert guest.do("resume") is True
    assert guest.assert_consistent() == []


def test_a_domain_that_was_destroyed_is_gone() -> None:
    host = ModelHost()
    made = make_guest(host)
    host.destroy(made.domid)
    gone(host, made.domid)
