"""libxl's userdata files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from xenpv.errors import HostError
from xenpv.frames import DomId
from xenpv.host.xen import userdata

UUID = "01234567-89ab-cdef-0123-456789abcdef"


def test_write_stores_where_libxl_looks_and_remove_removes_only_this_domains_files(tmp_path: Path) -> None:
    path = tmp_path / f"userdata-d.7.{UUID}.libxl-json"
    for text in (b'{"old": 1}', b"{}"):
        userdata.write(DomId(7), UUID, text, tmp_path)
        assert path.read_bytes() == text
    assert (path.stat().st_mode & 0o777, os.listdir(tmp_path)) == (0o600, [path.name])
    userdata.write(DomId(8), None, b"{}", tmp_path)
    nobody = "00000000-0000-0000-0000-000000000000"
    others = {f"userdata-d.8.{nobody}.libxl-json", f"userdata-d.77.{UUID}.libxl-json", "userdata-d.7.other.libxl-json",
              f"userdata-l.7.{UUID}.domain-userdata-lock"}  # fmt: skip
    for name in (*others, f"userdata-d.7.{UUID}.xl", f"userdata-n.7.{UUID}.libxl-json"):
        (tmp_path / name).touch()
    userdata.remove(DomId(7), UUID, tmp_path)
    userdata.remove(DomId(7), "*", tmp_path)  # a name, not a pattern
    assert set(os.listdir(tmp_path)) == others


def test_write_that_fails_leaves_no_file_and_follows_no_link(tmp_path: Path) -> None:
    userdata.write(DomId(7), UUID, b"{}", tmp_path / "no libxl here")
    userdata.remove(DomId(7), UUID, tmp_path / "no libxl here")
    target = tmp_path / "precious"
    target.write_text("kept")
    (tmp_path / f"userdata-n.7.{UUID}.libxl-json").symlink_to(target)
    (tmp_path / f"userdata-d.7.{UUID}.libxl-json").mkdir()
    with pytest.raises(HostError, match=rf"userdata-n\.7\.{UUID}\.libxl-json") as caught:
        userdata.write(DomId(7), UUID, b"{}", tmp_path)
    assert (caught.value.errno, caught.value.domid) == (errno.EISDIR, 7)
    assert target.read_text() == "kept"
    assert sorted(os.listdir(tmp_path)) == ["precious", f"userdata-d.7.{UUID}.libxl-json"]
