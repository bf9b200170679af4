"""``xenpv convert``: legacy files, envelopes, configurations, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import xenpv
from tests.support.writers.build import pv_domain, pv_domain_with_gdt
from tests.support.writers.envelopes import CONFIG_XML, config_json
from tests.support.writers.hvm import hvm_stream
from tests.support.writers.legacy import Legacy, in_xl, pv_stream, remus_stream

DOMAIN = pv_domain_with_gdt()
OLD = bytes(in_xl(pv_stream(DOMAIN), config_json(vcpus=2) + b"\0"))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old.save"
    path.write_bytes(OLD)
    return path


def test_convert_of_a_legacy_file_gives_a_version_3_file_that_verifies(old: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.save"
    ran = xenpv("convert", old, new)
    assert ran.code == 0
    assert ran.raw == b""
    source, result = ran.err.splitlines()[:2]
    assert source.startswith(f"{old}: ")
    assert result.startswith(f"{new}: ")
    assert re.search(rf"\b{len(DOMAIN.pages)}\b", result)
    assert xenpv("verify", "--strict", new).code == 0
    assert xenpv("show", new).code == 0


def test_convert_json_has_every_figure(old: Path, tmp_path: Path) -> None:
    converted = xenpv("convert", "--json", "--drop-zero", "--to", "libxl", old, tmp_path / "new").json
    assert converted["from"] == {"file": str(old), "envelope": "xl", "version": 1, "bytes": len(OLD)}
    assert converted["to"]["bytes"] == (tmp_path / "new").stat().st_size
    assert converted["saved"] == converted["dropped"] * 4096
    assert (converted["domain_type"], converted["findings"], converted["checkpoints"]) == ("PV", [], 0)


def test_convert_from_a_pipe_gives_the_same_bytes(old: Path, tmp_path: Path) -> None:
    assert xenpv("convert", old, tmp_path / "from-file").code == 0
    ran = xenpv("convert", "-", tmp_path / "from-pipe", stdin=OLD)
    assert ran.code == 0
    assert (tmp_path / "from-pipe").read_bytes() == (tmp_path / "from-file").read_bytes()


def test_convert_between_pipes_gives_the_same_bytes_and_no_json(old: Path, tmp_path: Path) -> None:
    assert xenpv("convert", old, tmp_path / "from-file").code == 0
    command = [sys.executable, "-m", "xenpv", "convert", "--json", "-", "-"]
    ran = subprocess.run(command, input=OLD, capture_output=True, check=True)
    assert ran.stdout == (tmp_path / "from-file").read_bytes()


def test_convert_config_option_replaces_the_configuration(old: Path, tmp_path: Path) -> None:
    xml, text, new = tmp_path / "dom.xml", tmp_path / "dom.cfg", tmp_path / "new"
    xml.write_bytes(CONFIG_XML)
    text.write_text('name = "made"\nmemory = 128\nvcpus = 2\n')
    assert xenpv("convert", "--to", "libvirt", "--config", xml, old, new).code == 0
    assert CONFIG_XML in new.read_bytes()
    assert xenpv("convert", "--to", "xl", "--config", text, old, new).code == 0
    assert json.loads(xenpv("show", "--json", new).out)["config"]["name"] == "made"
    assert xenpv("convert", "--to", "libxc", old, new).code == 0
    assert "--config" in xenpv("convert", "--to", "xl", new, tmp_path / "bare").err
    text.write_text("\n")
    assert xenpv("convert", "--config", text, old, new).error.startswith(f"{text}: is empty")


def test_convert_that_would_not_restore_leaves_no_file_without_force(old: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    bad = pv_domain(pfns=range(64))
    bad.set_pte(bad.vaddrs[bad.places.data[0]], 0x7F_FFFF << 12 | 3)
    old.write_bytes(bytes(pv_stream(bad)))
    ran = xenpv("convert", old, new)
    assert ran.code == 1
    assert "pte-range" in ran.err
    assert not new.exists()
    ran = xenpv("convert", "--force", old, new)
    assert (ran.code, "pte-range" in ran.err) == (0, True)
    old.write_bytes(OLD[:-5])
    assert xenpv("convert", old, new.with_name("other")).code == 1
    assert xenpv("convert", "--width", "64", old, new).code == 64
    assert not new.with_name("other").exists()


def test_convert_width_and_guest_options_override_detection(tmp_path: Path) -> None:
    bare, new = tmp_path / "bare", tmp_path / "new"
    bare.write_bytes(bytes(pv_stream(DOMAIN, Legacy(4))))
    assert xenpv("convert", bare, new).code == 0
    detected = new.read_bytes()
    assert xenpv("convert", "--width", 32, "--guest", "pv", bare, new).code == 0
    assert new.read_bytes() == detected
    assert xenpv("convert", "--width", 64, "--guest", "pv", bare, new).code == 1


def test_convert_reports_checkpoints_truncation_and_omissions(tmp_path: Path) -> None:
    source, new = tmp_path / "in", tmp_path / "new"
    data = bytes(remus_stream(DOMAIN, []))
    source.write_bytes(data + b"\1\0\0\0")
    converted = xenpv("convert", "--json", source, new).json
    assert converted["checkpoints"] == 1
    assert converted["cut_off"]
    assert "1 checkpoint;" in xenpv("convert", source, new).err
    source.write_bytes(bytes(hvm_stream("xl")))
    assert xenpv("convert", "--to", "libxc", source, new).code == 1
    assert "left out" in xenpv("convert", "--to", "libxc", "--drop-emulator", source, new).err
