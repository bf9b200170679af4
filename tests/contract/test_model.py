"""The contract, on ModelHost: domains of both widths, paused and not, of single frames and of extents."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.contract.building import BUILDING
from tests.contract.checks import CHECKS, gone
from tests.host.model_guest import make
from xenpv.abi.declare import Width
from xenpv.frames import DomId
from xenpv.host import Host, Toolstack
from xenpv.host.model import ModelHost


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("order", [0, 9])
@pytest.mark.parametrize("width", [8, 4])
def test_contract(check: Callable[[Host, DomId], None], width: Width, order: int) -> None:
    host = ModelHost()
    made = make(host, width, order=order, name="litmus")
    check(host, made.domid)


@pytest.mark.parametrize("check", BUILDING, ids=lambda check: check.__name__)
@pytest.mark.parametrize("width", [8, 4])
def test_building(check: Callable[[Toolstack, Width], None], width: Width) -> None:
    host = ModelHost()
    before = {path: host.store.list(path) for path in ("/local/domain", "/vm", "/libxl", "/local/domain/0")}
    free = host.free_pages()
    check(host, width)
    assert host.free_pages() == free
    assert [d.domid for d in host.domains()] == [0]
    for path, names in before.items():
        assert host.store.list(path) == names, path


def test_a_domain_that_was_destroyed_is_gone() -> None:
    host = ModelHost()
    made = make(host)
    host.destroy(made.domid)
    gone(host, made.domid)
