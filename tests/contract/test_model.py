"""The checks of Host, Toolstack and Mover on ModelHost: both widths, single frames and extents."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest

from tests.contract.host_checks import HOST_CHECKS, assert_gone
from tests.contract.mover_checks import MOVER_CHECKS
from tests.contract.running_guest_checks import (
    log_dirty_logs_every_page_that_changes,
    request_shutdown_is_withdrawn_before_the_guest_runs,
    request_shutdown_suspends_the_guest,
    resume_cancels_a_suspend,
)
from tests.contract.toolstack_checks import TOOLSTACK_CHECKS
from tests.support.kernel_guest import Guest
from tests.support.model_guest import make_guest
from xenpv.abi.declare import Width
from xenpv.frames import DomId
from xenpv.host.model.host import ModelHost
from xenpv.host.protocol import Host, Mover


@pytest.mark.parametrize("check", HOST_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("order", [0, 9])
@pytest.mark.parametrize("width", [8, 4])
def test_host_check_on_the_model(check: Callable[[Host, DomId], None], width: Width, order: int) -> None:
    host = ModelHost()
    made = make_guest(host, width, order=order, name="litmus")
    check(host, made.domid)


@pytest.mark.parametrize("check", TOOLSTACK_CHECKS + MOVER_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("width", [8, 4])
def test_build_or_move_check_on_the_model_leaves_nothing(check: Callable[[Mover, Width], None], width: Width) -> None:
    host = ModelHost()
    before = {path: host.store.list(path) for path in ("/local/domain", "/vm", "/libxl", "/local/domain/0")}
    free = host.free_pages()
    check(host, width)
    assert host.free_pages() == free
    assert [d.domid for d in host.domains()] == [0]
    for path, names in before.items():
        assert host.store.list(path) == names, path


@pytest.mark.parametrize("width", [8, 4])
def test_running_guest_checks_on_the_model(width: Width) -> None:
    """The guest is a kernel that writes a few pages and obeys requests in each time slice."""
    guest = Guest.boot("both", width)
    free = guest.do("free_pfns")[:20]
    numbers = count(1)

    def run_guest() -> None:
        guest.do("write_pattern", free, next(numbers))
        guest.do("poll")

    guest.host.set_time_slice(guest.domid, lambda: guest.do("poll"))
    written = log_dirty_logs_every_page_that_changes(guest.host, guest.domid, run_guest)
    assert len(free) <= written["changed"] <= written["logged"] < 30
    request_shutdown_is_withdrawn_before_the_guest_runs(guest.host, guest.domid, run_guest)
    request_shutdown_suspends_the_guest(guest.host, guest.domid, run_guest)
    resume_cancels_a_suspend(guest.host, guest.domid, lambda: None)
    assert guest.do("resume") is True
    assert guest.assert_consistent() == []


def test_destroy_makes_all_host_calls_raise_esrch() -> None:
    host = ModelHost()
    made = make_guest(host)
    host.destroy(made.domid)
    assert_gone(host, made.domid)
