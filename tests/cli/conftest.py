"""Files and a running domain that the verbs are tried on."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.support.p2m_guest import P2MGuest
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from tests.support.writers.hvm import hvm_stream


@pytest.fixture(scope="session")
def domain() -> Domain:
    """A small 64-bit domain with two vcpus and both forms of p2m; nobody changes it."""
    return pv_domain(pfns=[*range(100), 600, 5000], vcpus=2, tree=True)


@pytest.fixture(scope="session")
def good(domain: Domain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("good") / "good.save"
    file.write_bytes(domain.to_bytes())
    return file


@pytest.fixture(scope="session")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three findings of one rule, one of another, and a warning."""
    domain = pv_domain()
    table = domain.table(domain.tables(1)[0])
    table[500:503] = domain.entries << 12 | 1
    domain.start_info["store_mfn"] = domain.entries
    file = tmp_path_factory.mktemp("bad") / "bad.save"
    file.write_bytes(domain.to_bytes() + b"junk")
    return file


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing but a warning."""
    file = tmp_path_factory.mktemp("odd") / "odd.save"
    file.write_bytes(pv_domain().to_bytes() + b"junk")
    return file


@pytest.fixture(scope="session")
def hvm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("hvm") / "hvm.save"
    file.write_bytes(bytes(hvm_stream()))
    return file


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> P2MGuest:
    """A domain that runs on a model host, in place of Xen."""
    guest = P2MGuest()
    monkeypatch.setattr("xenpv.host.xen.host.XenHost", lambda: nullcontext(guest.host))
    return guest
