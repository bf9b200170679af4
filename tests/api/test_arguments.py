"""Arguments of the public API: paths of either kind, and names that do not exist."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

import xenpv
from tests.support.writers.build import pv_domain
from xenpv import cli
from xenpv.host.model.host import ModelHost


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "web.save"
    path.write_bytes(pv_domain().to_bytes())
    return path


def test_verify_takes_a_path_object(saved: Path) -> None:
    assert xenpv.verify(saved).ok
    assert xenpv.verify(saved, deep=False).ok
    assert xenpv.verify(str(saved)).ok


def test_export_unknown_format_is_refused_before_the_file_is_opened(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "web.core"
    with xenpv.open_domain(saved) as domain, pytest.raises(xenpv.RequestError):
        xenpv.export(domain, str(out), "foo")
    assert not out.exists()


def test_build_on_a_host_stores_what_xl_needs_to_boot_it_again(tmp_path: Path) -> None:
    host = ModelHost(256 << 20)
    kernel, ramdisk = tmp_path / "litmus.elf", tmp_path / "initrd"
    kernel.write_bytes(lzma.decompress((Path(cli.__file__).parent / "demo.elf.xz").read_bytes()))
    ramdisk.write_bytes(b"initrd")
    built = xenpv.build(str(kernel), memory=16 << 20, cmdline="ro", ramdisk=str(ramdisk), name="web", host=host)
    stored = json.loads(host.configuration(built.domid) or b"")
    assert stored["b_info"]["kernel"] == str(kernel)
    assert stored["b_info"]["ramdisk"] == str(ramdisk)
    assert stored["b_info"]["cmdline"] == "ro"
    with pytest.raises(xenpv.RequestError):
        xenpv.build(str(kernel), memory=16 << 20, name="web", host=host)
