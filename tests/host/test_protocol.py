"""Finding a domain by its id, uuid or name."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from tests.support.host_stub import HostStub, domain_info
from xenpv.errors import HostError
from xenpv.host.protocol import find_domain

UUID = "01234567-89ab-cdef-0123-456789abcdef"


@pytest.fixture
def host() -> Any:
    return HostStub(
        domain_info(0), domain_info(3, "web", UUID), domain_info(4, "5"), domain_info(6, "twin"), domain_info(7, "twin")
    )


@pytest.mark.parametrize("text", ["3", "web", UUID, UUID.upper(), UUID.replace("-", "")])
def test_find_domain_by_id_name_or_uuid_returns_it(host: Any, text: str) -> None:
    assert find_domain(host, text).domid == 3


def test_find_domain_by_digits_looks_for_an_id_only(host: Any) -> None:
    """As xl does: dom4 has the name "5"."""
    with pytest.raises(HostError) as caught:
        find_domain(host, "5")
    assert (caught.value.errno, caught.value.domid) == (errno.ESRCH, 5)


def test_find_domain_by_unknown_name_raises_esrch(host: Any) -> None:
    with pytest.raises(HostError, match="'mail'") as caught:
        find_domain(host, "mail")
    assert caught.value.errno == errno.ESRCH


def test_find_domain_by_ambiguous_name_lists_the_candidates(host: Any) -> None:
    with pytest.raises(HostError, match=r"'twin'.* dom6, dom7") as caught:
        find_domain(host, "twin")
    assert caught.value.errno is None
