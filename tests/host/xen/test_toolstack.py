"""XenHost's parts that need no Xen: nodes, mappings that end, and what it says when something is not there."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xenpv.errors import HostError
from xenpv.frames import PAGE_SIZE, DomId
from xenpv.host import xenstore_nodes
from xenpv.host.protocol import Daemons, DomainInfo, Ring
from xenpv.host.xen import libxen, userdata, xenstore
from xenpv.host.xenstore_nodes import Access, Node

UUID = "01234567-89ab-cdef-0123-456789abcdef"
INFO = DomainInfo(DomId(7), "web", UUID, False, 8, 1000, 1456, 5, 1, True, False, None, False)


def all_nodes(daemons: Daemons) -> list[Node]:
    console, xenstore = Ring(0x1234, 2), Ring(0x1235, 1)
    return xenstore_nodes.created(DomId(7), "web", UUID) + xenstore_nodes.introduced(INFO, daemons, console, xenstore)


@pytest.mark.parametrize("daemons", [Daemons(), Daemons(DomId(3), DomId(4))])
def test_all_nodes_go_with_the_domain_and_none_stands_twice(daemons: Daemons) -> None:
    nodes = all_nodes(daemons)
    roots = xenstore_nodes.all_of(DomId(7), daemons, UUID)
    paths = [node.path for node in nodes]
    assert len(set(paths)) == len(paths)
    for path in paths:
        assert any(path == root or path.startswith(f"{root}/") for root in roots), path
    assert xenstore_nodes.all_of(DomId(7), daemons, None) == [root for root in roots if not root.startswith("/vm/")]


def test_a_domain_may_write_where_its_drivers_do_and_nowhere_else() -> None:
    nodes = {node.path.removeprefix("/local/domain/7/"): node for node in all_nodes(Daemons())}
    writable = {path for path, node in nodes.items() if node.access is Access.WRITE}
    assert {"control/shutdown", "device/suspend/event-channel", "data"} <= writable
    for path in ("name", "vm", "console/ring-ref", "memory/target", f"/vm/{UUID}/name"):
        assert nodes[path].access is Access.READ, path
    assert nodes["/libxl/7/type"].access is Access.NOTHING


def test_values_are_in_the_units_that_others_read() -> None:
    values = {node.path: node.value for node in all_nodes(Daemons(DomId(3), DomId(4)))}
    home = "/local/domain/7"
    assert values[f"{home}/memory/target"] == "4000"  # KiB
    assert values[f"{home}/memory/static-max"] == "4800"  # of which libxl has taken its MiB off
    assert values[f"{home}/console/ring-ref"] == str(0x1234)
    assert values[f"{home}/store/port"] == "1"
    assert values[f"{home}/cpu/1/availability"] == "online"
    assert values[f"{home}/console/backend-id"] == "3"
    assert values[f"{home}/console/backend"] == "/local/domain/3/backend/console/7/0"


def test_what_cannot_be_written_to_xenstore_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xenstore, "LIBXENSTORE", ("libxenpv-no-such.so.1",))
    store = xenstore.XenStore()
    for call in (
        lambda: store.write(DomId(7), []),
        lambda: store.remove(DomId(7), []),
        lambda: store.introduce(DomId(7), 1, 1),
    ):
        with pytest.raises(HostError, match=r"^dom7: .*xenstore cannot be reached; is xenstored running\?$") as caught:
            call()
        assert (caught.value.errno, caught.value.domid) == (errno.ENOTCONN, 7)


class Xenstore:
    """libxenstore's calls on a dictionary, in transactions of which the first ``conflicts`` come to nothing."""

    def __init__(self, conflicts: int = 0, refuses: str = "") -> None:
        self.nodes: dict[bytes, bytes] = {b"/local/domain/0": b"", b"/local/domain/0/backend": b""}
        self.permissions: dict[bytes, list[tuple[int, int]]] = {}
        self.conflicts, self.refuses = conflicts, refuses.encode()
        self.staged: dict[bytes, bytes] = {}
        self.begun = self.ended = 0
        self._kept: list[Any] = []

    def begin(self, _handle: int) -> int:
        self.begun += 1
        self.staged = dict(self.nodes)
        return self.begun

    def end(self, _handle: int, _within: int, abort: bool) -> bool:
        self.ended += 1
        if abort:
            return True
        if self.conflicts:
            self.conflicts -= 1
            ctypes.set_errno(errno.EAGAIN)
            return False
        self.nodes = self.staged
        return True

    def read(self, _handle: int, _within: int, path: bytes, length: Any) -> int:
        if path not in self.staged:
            return 0
        self._kept.append(ctypes.create_string_buffer(self.staged[path]))
        length._obj.value = len(self.staged[path])
        return ctypes.addressof(self._kept[-1])

    def write(self, _handle: int, _within: int, path: bytes, value: bytes, _length: int) -> bool:
        if path == self.refuses:
            ctypes.set_errno(errno.ENOSPC)
            return False
        self.staged[path] = value
        return True

    def permit(self, _handle: int, _within: int, path: bytes, array: Any, count: int) -> bool:
        self.permissions[path] = [(array[i].id, array[i].perms) for i in range(count)]
        return True

    def remove(self, _handle: int, _within: int, path: bytes) -> bool:
        self.staged = {p: v for p, v in self.staged.items() if p != path and not p.startswith(path + b"/")}
        return True

    def children(self, _handle: int, _within: int, path: bytes, count: Any) -> int:
        count._obj.value = len({p for p in self.staged if p.startswith(path + b"/")})
        return 0


def opened(calls: Xenstore) -> xenstore.XenStore:
    store = xenstore.XenStore.__new__(xenstore.XenStore)
    own: Any = store
    own._handle, own._begin, own._end, own._read, own._write = 1, calls.begin, calls.end, calls.read, calls.write
    own._permit, own._remove, own._list, own._free = calls.permit, calls.remove, calls.children, lambda _: None
    return store


def test_nodes_are_written_in_one_transaction_and_all_removed() -> None:
    calls = Xenstore(conflicts=2)
    before = dict(calls.nodes)
    store, daemons = opened(calls), Daemons()
    store.write(DomId(7), all_nodes(daemons))
    assert (calls.begun, calls.ended) == (3, 3)
    assert calls.nodes[b"/local/domain/7/name"] == b"web"
    assert calls.permissions[b"/local/domain/7/name"] == [(0, 0), (7, 1)]
    assert calls.permissions[b"/local/domain/7/control/shutdown"] == [(7, 0)]
    assert calls.permissions[b"/libxl/7"] == [(0, 0)]
    paths = xenstore_nodes.all_of(DomId(7), daemons, UUID)
    # What stood in the way of the backend's node, and held nothing else, goes too; dom0's own stays.
    calls.nodes[b"/local/domain/0/backend/console"] = b""
    assert store.remove(DomId(7), paths)
    assert calls.nodes == {path: value for path, value in before.items() if path != b"/local/domain/0/backend"}
    assert not store.remove(DomId(7), paths)


def test_a_transaction_that_is_refused_is_given_up() -> None:
    calls = Xenstore(refuses="/local/domain/7/name")
    before = dict(calls.nodes)
    with pytest.raises(HostError, match="dom7: write to xenstore: No space left on device") as caught:
        opened(calls).write(DomId(7), all_nodes(Daemons()))
    assert caught.value.errno == errno.ENOSPC
    assert (calls.begun, calls.ended, calls.nodes) == (1, 1, before)


@pytest.fixture
def memory() -> Iterator[tuple[libxen.ForeignMemory, int]]:
    """A domain whose frame n is page n of a file."""
    file = os.memfd_create("frames")
    os.truncate(file, 8 * PAGE_SIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_size_t)
    foreign = libxen.ForeignMemory.__new__(libxen.ForeignMemory)
    own: Any = foreign
    own._mmap, own._closing, own._handle = libc.mmap, False, 1

    def map2(*arguments: int) -> int:
        _handle, _domid, at, prot, flags, count, mfns, errors = arguments
        wanted = (ctypes.c_uint64 * count).from_address(mfns)
        for i, mfn in enumerate(wanted):
            if mfn < 8:
                here = libc.mmap(at + i * PAGE_SIZE, PAGE_SIZE, prot, flags | mmap.MAP_SHARED, file, mfn * PAGE_SIZE)
                assert here == at + i * PAGE_SIZE
            else:
                (ctypes.c_int32 * count).from_address(errors)[i] = -errno.EBUSY
        return at

    own._map = map2
    yield foreign, file
    os.close(file)


def test_frames_are_written_in_place_until_the_block_ends(memory: tuple[libxen.ForeignMemory, int]) -> None:
    foreign, file = memory
    with foreign.map_writable(DomId(7), np.array([5, 2], np.uint64)) as (pages, errors):
        assert pages.shape == (2, PAGE_SIZE)
        assert not errors.any()
        pages[0] = 5
        pages[1, 10:20] = 2
        kept = pages[0]
        assert os.pread(file, 1, 5 * PAGE_SIZE) == b"\5"  # there already
    del pages
    kept[:] = 9  # is nobody's any more, and no fault
    assert os.pread(file, PAGE_SIZE, 5 * PAGE_SIZE) == b"\5" * PAGE_SIZE
    assert os.pread(file, 30, 2 * PAGE_SIZE) == bytes(10) + b"\2" * 10 + bytes(10)
    with foreign.map_writable(DomId(7), np.array([1, 99], np.uint64)) as (pages, errors):
        assert errors.tolist() == [0, -errno.EBUSY]
    with foreign.map_writable(DomId(7), np.empty(0, np.uint64)) as (pages, errors):
        assert pages.shape == (0, PAGE_SIZE)


# --- what libxl keeps in files ---------------------------------------------------------------------------------------


def test_a_configuration_is_where_libxl_looks_for_it_and_goes_with_the_domain(tmp_path: Path) -> None:
    kept = tmp_path / f"userdata-d.7.{UUID}.libxl-json"
    for text in (b'{"old": 1}', b"{}"):
        userdata.write(DomId(7), UUID, text, tmp_path)
        assert kept.read_bytes() == text
    assert (kept.stat().st_mode & 0o777, os.listdir(tmp_path)) == (0o600, [kept.name])
    userdata.write(DomId(8), None, b"{}", tmp_path)
    nobody = "00000000-0000-0000-0000-000000000000"
    others = {f"userdata-d.8.{nobody}.libxl-json", f"userdata-d.77.{UUID}.libxl-json", "userdata-d.7.other.libxl-json",
              f"userdata-l.7.{UUID}.domain-userdata-lock"}  # fmt: skip
    for name in (*others, f"userdata-d.7.{UUID}.xl", f"userdata-n.7.{UUID}.libxl-json"):
        (tmp_path / name).touch()
    userdata.remove(DomId(7), UUID, tmp_path)
    userdata.remove(DomId(7), "*", tmp_path)  # a name, not a pattern
    assert set(os.listdir(tmp_path)) == others


def test_a_configuration_is_whole_or_not_there(tmp_path: Path) -> None:
    userdata.write(DomId(7), UUID, b"{}", tmp_path / "no libxl here")
    userdata.remove(DomId(7), UUID, tmp_path / "no libxl here")
    target = tmp_path / "precious"
    target.write_text("kept")
    (tmp_path / f"userdata-n.7.{UUID}.libxl-json").symlink_to(target)
    (tmp_path / f"userdata-d.7.{UUID}.libxl-json").mkdir()
    with pytest.raises(
        HostError, match=rf"^dom7: userdata: .* directory: .*userdata-n\.7\.{UUID}\.libxl-json"
    ) as caught:
        userdata.write(DomId(7), UUID, b"{}", tmp_path)
    assert (caught.value.errno, caught.value.domid) == (errno.EISDIR, 7)
    assert target.read_text() == "kept"
    assert sorted(os.listdir(tmp_path)) == ["precious", f"userdata-d.7.{UUID}.libxl-json"]
