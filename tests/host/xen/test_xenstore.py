"""A domain's nodes in xenstore, and the transactions that write and remove them."""

from __future__ import annotations

import errno

import pytest

from tests.support.libxenstore_stub import LibxenstoreStub, connect
from xenpv.errors import HostError
from xenpv.frames import DomId
from xenpv.host import xenstore_nodes
from xenpv.host.protocol import Daemons, DomainInfo, Ring
from xenpv.host.xen import xenstore
from xenpv.host.xenstore_nodes import Access, Node

UUID = "01234567-89ab-cdef-0123-456789abcdef"
INFO = DomainInfo(DomId(7), "web", UUID, False, 8, 1000, 1456, 5, 1, True, False, None, False)


def all_nodes(daemons: Daemons) -> list[Node]:
    console, xenstore = Ring(0x1234, 2), Ring(0x1235, 1)
    return xenstore_nodes.creation_nodes(DomId(7), "web", UUID) + xenstore_nodes.introduction_nodes(
        INFO, daemons, console, xenstore
    )


@pytest.mark.parametrize("daemons", [Daemons(), Daemons(DomId(3), DomId(4))], ids=["dom0", "stubdoms"])
def test_nodes_are_unique_and_below_the_root_paths(daemons: Daemons) -> None:
    nodes = all_nodes(daemons)
    roots = xenstore_nodes.root_paths(DomId(7), daemons, UUID)
    paths = [node.path for node in nodes]
    assert len(set(paths)) == len(paths)
    for path in paths:
        assert any(path == root or path.startswith(f"{root}/") for root in roots), path
    assert xenstore_nodes.root_paths(DomId(7), daemons, None) == [root for root in roots if not root.startswith("/vm/")]


def test_nodes_are_writable_where_drivers_write_and_nowhere_else() -> None:
    nodes = {node.path.removeprefix("/local/domain/7/"): node for node in all_nodes(Daemons())}
    writable = {path for path, node in nodes.items() if node.access is Access.WRITE}
    assert {"control/shutdown", "device/suspend/event-channel", "data"} <= writable
    for path in ("name", "vm", "console/ring-ref", "memory/target", f"/vm/{UUID}/name"):
        assert nodes[path].access is Access.READ, path
    assert nodes["/libxl/7/type"].access is Access.NOTHING


def test_introduction_nodes_have_libxls_units_and_backends() -> None:
    values = {node.path: node.value for node in all_nodes(Daemons(DomId(3), DomId(4)))}
    home = "/local/domain/7"
    assert values[f"{home}/memory/target"] == "4000"  # KiB
    assert values[f"{home}/memory/static-max"] == "4800"  # without the MiB of slack
    assert values[f"{home}/console/ring-ref"] == str(0x1234)
    assert values[f"{home}/store/port"] == "1"
    assert values[f"{home}/cpu/1/availability"] == "online"
    assert values[f"{home}/console/backend-id"] == "3"
    assert values[f"{home}/console/backend"] == "/local/domain/3/backend/console/7/0"


def test_changes_without_libxenstore_raise_enotconn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xenstore, "LIBXENSTORE", ("libxenpv-no-such.so.1",))
    store = xenstore.XenStore()
    for call in (
        lambda: store.write(DomId(7), []),
        lambda: store.remove(DomId(7), []),
        lambda: store.introduce(DomId(7), 1, 1),
    ):
        with pytest.raises(HostError, match="dom7") as caught:
            call()
        assert (caught.value.errno, caught.value.domid) == (errno.ENOTCONN, 7)


def test_read_without_libxenstore_returns_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xenstore, "LIBXENSTORE", ("libxenpv-no-such.so.1",))
    store = xenstore.XenStore()
    assert not store.reachable
    assert store.read("/local/domain/0/name") is None
    store.close()


def test_write_after_conflicts_writes_all_nodes_and_remove_removes_them() -> None:
    stub = LibxenstoreStub(conflicts=2)
    before = dict(stub.nodes)
    store, daemons = connect(stub), Daemons()
    store.write(DomId(7), all_nodes(daemons))
    assert (stub.begun, stub.ended) == (3, 3)
    assert stub.nodes[b"/local/domain/7/name"] == b"web"
    assert stub.permissions[b"/local/domain/7/name"] == [(0, 0), (7, 1)]
    assert stub.permissions[b"/local/domain/7/control/shutdown"] == [(7, 0)]
    assert stub.permissions[b"/libxl/7"] == [(0, 0)]
    paths = xenstore_nodes.root_paths(DomId(7), daemons, UUID)
    # Empty parents of the backend's node go, too; dom0's own node stays.
    stub.nodes[b"/local/domain/0/backend/console"] = b""
    assert store.remove(DomId(7), paths)
    assert stub.nodes == {path: value for path, value in before.items() if path != b"/local/domain/0/backend"}
    assert not store.remove(DomId(7), paths)


def test_write_that_fails_writes_no_node() -> None:
    stub = LibxenstoreStub(refused_path="/local/domain/7/name")
    before = dict(stub.nodes)
    with pytest.raises(HostError, match="dom7") as caught:
        connect(stub).write(DomId(7), all_nodes(Daemons()))
    assert caught.value.errno == errno.ENOSPC
    assert (stub.begun, stub.ended, stub.nodes) == (1, 1, before)


def test_xenstore_without_its_library_names_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xenstore, "LIBXENSTORE", ("libxenpv-no-such.so.1",))
    store = xenstore.XenStore()
    assert "libxenpv-no-such.so.1" in str(store.error)
    with pytest.raises(HostError, match=r"libxenpv-no-such\.so\.1") as caught:
        store.check_reachable("introduce", DomId(7))
    assert caught.value.errno == errno.ENOTCONN


def test_list_returns_the_children_of_a_node() -> None:
    stub = LibxenstoreStub()
    stub.staged = {b"/local/domain/1/device/vif/0/state": b"4", b"/local/domain/1/device/vif/1": b"", b"/x": b""}
    store = connect(stub)
    assert store.list("/local/domain/1/device/vif") == ["0", "1"]
    assert store.list("/local/domain/1/device") == ["vif"]
    assert store.list("/local/domain/2") == []
