"""One booted Xen host per version for all tests of this folder, and never two at once.

A test that takes `host` runs on each supported version; the tests are sorted so that each version is booted once. What
is marked `deep`, or `deep_elsewhere` on another Xen than the default one, is left to `make lab-deep`: all of it takes
more than the half hour that CI has.
Domains that a test leaves are destroyed after it; a host that a test has lost is booted anew for the next one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import lab
from lab import DEFAULT, guests, programs, versions
from tests.support.lab.debian import Debian, save_debian
from tests.support.lab.isf import symbol_file
from tests.support.requirements import cannot_run

HERE = Path(__file__).parent
DESTROY_ALL = "xl list | awk 'NR > 2 { print $2 }' | while read -r domid; do xl destroy \"$domid\"; done"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if item.path.is_relative_to(HERE)]
    for item in ours:
        item.add_marker(pytest.mark.lab)
        if item.get_closest_marker("deep_elsewhere") and _version_rank(item) != versions.names().index(DEFAULT) + 1:
            item.add_marker(pytest.mark.deep)
    # Stable: only the version moves a test, and lab tests come after all others, which fail sooner.
    items.sort(key=lambda item: _version_rank(item) if item in ours else -1)


def _version_rank(item: pytest.Item) -> int:
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    version = parameters.get("host")
    return versions.names().index(version) + 1 if isinstance(version, str) else 0


@pytest.fixture(scope="session", autouse=True)
def _runnable() -> None:
    lacking = programs.missing()
    if lacking:
        cannot_run(str(lab.MissingPrograms(lacking)))


class Hosts:
    """Keeps at most one host running."""

    def __init__(self) -> None:
        self._host: lab.Host | None = None

    def get(self, xen: str) -> lab.Host:
        """The host of that version, booted if it is not the one that runs, or has been lost."""
        if self._host is None or self._host.xen != xen or not self._host.alive():
            self.close()
            self._host = lab.Host(xen).__enter__()
        return self._host

    def close(self) -> None:
        if self._host:
            self._host.close()
            self._host = None


@pytest.fixture(scope="session")
def hosts(_runnable: None) -> Iterator[Hosts]:
    """For tests that boot a host of their own: hosts.close() first, so that it has the machine for itself."""
    hosts = Hosts()
    yield hosts
    hosts.close()


@pytest.fixture(params=versions.names(), ids=lambda xen: f"xen-{xen}")
def host(request: pytest.FixtureRequest, hosts: Hosts) -> Iterator[lab.Host]:
    host = hosts.get(request.param)
    yield host
    if host.alive():
        host.run(DESTROY_ALL).check()


_debian: dict[str, Debian] = {}


@pytest.fixture
def debian(host: lab.Host, tmp_path_factory: pytest.TempPathFactory) -> Debian:
    """One guest for each version of Xen, kept for all tests that look at it."""
    if host.xen not in _debian:
        _debian[host.xen] = save_debian(host, tmp_path_factory.mktemp(f"debian-{host.xen}"))
    return _debian[host.xen]


@pytest.fixture
def symbols(debian: Debian, tmp_path: Path) -> Path:
    """A folder of symbol files for Volatility, with that of the guest's kernel."""
    kernel = (guests.folder() / "vmlinux").read_bytes()
    (tmp_path / "symbols/linux").mkdir(parents=True)
    (tmp_path / "cache").mkdir()
    file = tmp_path / "symbols/linux/guest.json"
    file.write_text(symbol_file(kernel, debian.symbols, debian.version.encode() + b"\n\0"))
    return tmp_path / "symbols"
