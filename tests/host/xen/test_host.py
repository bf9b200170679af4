"""XenHost without a Xen: what opening it reports, and the parts that make no hypercall."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from struct import pack
from typing import Any

import pytest

from tests.support.hypercalls_stub import HypercallsStub
from tests.support.libxenstore_stub import LibxenstoreStub, connect
from xenpv.errors import HostError, iter_notes
from xenpv.frames import DomId
from xenpv.host.xen import shared_libraries
from xenpv.host.xen.host import XenHost, ram_bounds

RAM, RESERVED = 1, 2
DOMID = DomId(7)
NODE = b"/local/domain/7/control/shutdown"


@pytest.fixture
def privcmd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file that opens as the privileged command device does."""
    path = tmp_path / "privcmd"
    path.touch()
    monkeypatch.setattr(shared_libraries, "PRIVCMD", (str(tmp_path / "absent"), str(path)))
    return path


def test_open_without_xen_raises_enodev(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shared_libraries, "PRIVCMD", (str(tmp_path / "one"), str(tmp_path / "two")))
    with pytest.raises(HostError, match=r"/one .*/two ") as caught:
        XenHost()
    assert caught.value.errno == errno.ENODEV


def test_open_without_root_raises_eacces(privcmd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:
        if path != str(privcmd):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(HostError, match="root in dom0") as caught:
        XenHost()
    assert caught.value.errno == errno.EACCES


def test_open_without_libxencall_names_the_library(privcmd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_libraries, "LIBXENCALL", ("libxenpv-no-such.so.1", "libxenpv-no-such.so.2"))
    with pytest.raises(HostError, match=r"libxenpv-no-such\.so\.1 or libxenpv-no-such\.so\.2"):
        XenHost()


def test_open_on_an_unknown_version_names_it_and_the_known_ones(privcmd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = HypercallsStub(version=(4, 99))
    monkeypatch.setattr(shared_libraries, "Hypercalls", lambda: calls)
    with pytest.raises(HostError, match=r"4\.99\.9-rc1: .* 4\.14, 4\.17, 4\.20$"):
        XenHost()
    assert calls.closed


def bounds(*entries: tuple[int, int, int]) -> list[int]:
    mfns: list[int] = ram_bounds(b"".join(pack("<QQI", *entry) for entry in entries)).tolist()
    return mfns


def test_ram_bounds_are_whole_pages_above_the_first_mib() -> None:
    assert bounds() == []
    low, high = (0, 0x9FC00, RAM), (1 << 32, 1 << 32, RAM)
    usual = [low, (0x9FC00, 0x400, RESERVED), (1 << 20, 3 << 30, RAM), (0xFEFF_C000, 0x4000, RESERVED), high]
    assert bounds(*usual) == [0x100, (3 << 18) + 0x100, 1 << 20, 1 << 21]
    assert bounds(*usual[::-1]) == bounds(*usual)
    assert bounds((0x0010_0001, 0x2FFF, RAM)) == [0x101, 0x103], "whole pages only"
    assert bounds((1 << 20, 0xFFF, RAM)) == []
    assert bounds((1 << 30, 1 << 30, RAM), (5 << 28, 1 << 28, RAM), (6 << 28, 1 << 31, RAM)) == [
        1 << 18,
        1 << 19,
        1 << 19,
        (6 << 16) + (1 << 19),
    ]
    assert bounds((0, (1 << 64) - 1, RAM)) == [0x100, (1 << 52) - 1]


def host_with_xenstore(stub: LibxenstoreStub) -> XenHost:
    """A XenHost of which only xenstore works."""
    host: Any = XenHost.__new__(XenHost)
    host._store, host._getdomaininfo = connect(stub), lambda _: None
    assert isinstance(host, XenHost)
    return host


def xenstore_of_a_domain() -> LibxenstoreStub:
    stub = LibxenstoreStub()
    stub.nodes |= {b"/local/domain/7": b"", NODE: b""}
    return stub


def test_request_shutdown_withdraws_only_a_pending_request() -> None:
    stub = xenstore_of_a_domain()
    host = host_with_xenstore(stub)
    host.request_shutdown(DOMID, "suspend")
    assert stub.nodes[NODE] == b"suspend"
    assert stub.permissions.pop(NODE) == [(7, 0)], "the guest must be able to empty it"
    host.request_shutdown(DOMID, "")
    assert stub.nodes[NODE] == b""
    del stub.permissions[NODE]
    host.request_shutdown(DOMID, "")
    assert not stub.permissions, "nothing was written"


def test_request_shutdown_withdrawn_while_the_guest_sees_it_writes_nothing() -> None:
    """The guest's write makes ours conflict. The second attempt finds nothing to withdraw."""
    stub = xenstore_of_a_domain()
    stub.nodes[NODE] = b"suspend"
    commit = stub.end

    def end(handle: int, transaction: int, abort: bool) -> bool:
        if stub.conflicts:
            stub.nodes[NODE] = b""
        return commit(handle, transaction, abort)

    stub.conflicts, stub.end = 1, end  # type: ignore[assignment,method-assign]
    writes: list[bytes] = []
    original_write = stub.write
    stub.write = lambda *a: writes.append(a[2]) or original_write(*a)  # type: ignore[method-assign,func-returns-value]
    host_with_xenstore(stub).request_shutdown(DOMID, "")
    assert (stub.begun, stub.ended) == (2, 2)
    assert len(writes) == 1


def test_request_shutdown_without_the_domains_nodes_raises_esrch() -> None:
    stub = LibxenstoreStub()
    before = dict(stub.nodes)
    with pytest.raises(HostError) as caught:
        host_with_xenstore(stub).request_shutdown(DOMID, "suspend")
    assert caught.value.errno == errno.ESRCH
    assert stub.nodes == before
    assert stub.begun == stub.ended


def test_create_failing_with_a_failing_destroy_names_the_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    host = XenHost.__new__(XenHost)

    def refuse(op: str) -> Callable[..., None]:
        def call(*_: object) -> None:
            raise HostError(f"{op} failed", op=op, errno=errno.EIO)

        return call

    monkeypatch.setattr(XenHost, "_createdomain", lambda *_: DOMID)
    monkeypatch.setattr(XenHost, "set_width", refuse("set_address_size"))
    monkeypatch.setattr(XenHost, "destroy", refuse("destroydomain"))
    with pytest.raises(HostError) as caught:
        host.create()
    assert caught.value.op == "set_address_size"
    (note,) = iter_notes(caught.value)
    assert "dom7" in note
    assert "destroydomain failed" in note
