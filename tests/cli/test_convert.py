"""``xenpv convert``, ``xenpv diff`` and ``convert-legacy-stream`` as people and programs run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import lines, xenpv
from tests.support.saved_files import judge, piped
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from tests.support.writers.envelopes import CONFIG_XML, config_json
from tests.support.writers.hvm import hvm_stream
from tests.support.writers.legacy import Legacy, in_xl, pv_stream, remus_stream
from tests.support.writers.legacy import hvm_stream as legacy_hvm
from xenpv.cli.convert_legacy_stream import main as shim


def _domain() -> Domain:
    domain = pv_domain(pfns=range(64), vcpus=2)
    for pfn in domain.places.gdt:
        domain.pages[pfn][:8] = b"segments"
    return domain


DOMAIN = _domain()
OLD = bytes(in_xl(pv_stream(DOMAIN), config_json(vcpus=2) + b"\0"))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old.save"
    path.write_bytes(OLD)
    return path


def test_an_old_file_becomes_a_new_one(old: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.save"
    ran = xenpv("convert", old, new)
    assert ran.code == 0
    assert ran.raw == b""
    assert "xl, version 1 (PV)" in ran.err
    assert f"{new}: xl, version 3, {len(DOMAIN.pages)} pages" in ran.err
    assert xenpv("verify", "--strict", new).code == 0
    assert xenpv("show", new).code == 0


def test_json(old: Path, tmp_path: Path) -> None:
    told = xenpv("convert", "--json", "--drop-zero", "--to", "libxl", old, tmp_path / "new").json
    assert told["from"] == {"file": str(old), "envelope": "xl", "version": 1, "bytes": len(OLD)}
    assert told["to"]["bytes"] == (tmp_path / "new").stat().st_size
    assert told["saved"] == told["dropped"] * 4096
    assert (told["domain_type"], told["findings"], told["checkpoints"]) == ("PV", [], 0)


def test_from_a_pipe(old: Path, tmp_path: Path) -> None:
    assert xenpv("convert", old, tmp_path / "of-file").code == 0
    ran = xenpv("convert", "-", tmp_path / "of-pipe", stdin=OLD)
    assert ran.code == 0
    assert (tmp_path / "of-pipe").read_bytes() == (tmp_path / "of-file").read_bytes()


def test_through_pipes_on_both_sides(old: Path, tmp_path: Path) -> None:
    assert xenpv("convert", old, tmp_path / "of-file").code == 0
    command = [sys.executable, "-m", "xenpv", "convert", "--json", "-", "-"]
    ran = subprocess.run(command, input=OLD, capture_output=True, check=True)
    assert ran.stdout == (tmp_path / "of-file").read_bytes()


def test_a_configuration_of_ones_own(old: Path, tmp_path: Path) -> None:
    xml, text, new = tmp_path / "dom.xml", tmp_path / "dom.cfg", tmp_path / "new"
    xml.write_bytes(CONFIG_XML)
    text.write_text('name = "made"\nmemory = 128\nvcpus = 2\n')
    assert xenpv("convert", "--to", "libvirt", "--config", xml, old, new).code == 0
    assert CONFIG_XML in new.read_bytes()
    assert xenpv("convert", "--to", "xl", "--config", text, old, new).code == 0
    assert json.loads(xenpv("show", "--json", new).out)["config"]["name"] == "made"
    ran = xenpv("convert", "--to", "libxc", old, new)
    ran = xenpv("convert", "--to", "xl", new, tmp_path / "bare")
    assert "it carries no configuration" in ran.err
    text.write_text("\n")
    ran = xenpv("convert", "--config", text, old, new)
    assert (ran.code, "is empty" in ran.err) == (1, True)


def test_what_is_refused_leaves_no_file(old: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    bad = pv_domain(pfns=range(64))
    bad.set_pte(bad.vaddrs[bad.places.data[0]], 0x7F_FFFF << 12 | 3)
    old.write_bytes(bytes(pv_stream(bad)))
    ran = xenpv("convert", old, new)
    assert ran.code == 1
    assert "would not restore" in ran.err
    assert "pte-range" in ran.err
    assert not new.exists()
    ran = xenpv("convert", "--force", old, new)
    assert (ran.code, "pte-range" in ran.err) == (0, True)
    old.write_bytes(OLD[:-5])
    assert xenpv("convert", old, new.with_name("other")).code == 1
    assert xenpv("convert", "--width", "64", old, new).code == 64
    assert not new.with_name("other").exists()


def test_width_and_guest_can_be_told(tmp_path: Path) -> None:
    bare, new = tmp_path / "bare", tmp_path / "new"
    bare.write_bytes(bytes(pv_stream(DOMAIN, Legacy(4))))
    assert xenpv("convert", bare, new).code == 0
    looked = new.read_bytes()
    assert xenpv("convert", "--width", 32, "--guest", "pv", bare, new).code == 0
    assert new.read_bytes() == looked
    assert xenpv("convert", "--width", 64, "--guest", "pv", bare, new).code == 1


def test_checkpoints_and_what_is_left_out_are_told(tmp_path: Path) -> None:
    source, new = tmp_path / "in", tmp_path / "new"
    data = bytes(remus_stream(DOMAIN, []))
    source.write_bytes(data + b"\1\0\0\0")
    ran = xenpv("convert", source, new)
    assert ran.code == 0
    assert "1 checkpoints, of which the last whole one counts" in ran.err
    assert "what follows it was left out" in ran.err
    source.write_bytes(bytes(hvm_stream("xl")))
    assert xenpv("convert", "--to", "libxc", source, new).code == 1
    assert "left out" in xenpv("convert", "--to", "libxc", "--drop-emulator", source, new).err


# --- diff ------------------------------------------------------------------------------------------------------------


def test_nothing_differs(old: Path, tmp_path: Path) -> None:
    assert xenpv("convert", old, tmp_path / "a").code == 0
    ran = xenpv("diff", tmp_path / "a", tmp_path / "a")
    assert (ran.code, ran.out) == (0, f"nothing differs: {len(DOMAIN.pages)} pages are the same\n")
    assert xenpv("diff", "-q", tmp_path / "a", tmp_path / "a").raw == b""


def test_what_differs_is_told(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    other = _domain()
    pfn = other.places.data[0]
    other.pages[pfn][16:20] = bytes(x ^ 0xFF for x in other.pages[pfn][16:20])
    other.vcpus[1]["user_regs"]["rax"] ^= 1
    a.write_bytes(DOMAIN.to_bytes())
    b.write_bytes(other.to_bytes("libvirt"))
    ran = xenpv("diff", a, b)
    assert ran.code == 1
    said = lines(ran)
    assert f"{pfn:#x} NOTAB data 0x10-0x13" in said
    assert "vcpu1 user_regs.rax" in said
    assert f"1 of {len(DOMAIN.pages)} pages differ (1 of data)" in said
    told = xenpv("diff", "--json", a, b).json
    assert told["same"] is False
    assert told["pages"]["first"] == [{"pfn": pfn, "type": "NOTAB", "what": "data", "ranges": [[16, 20]]}]
    assert xenpv("diff", "--json", "--first", 0, a, b).json["pages"]["first"] == []
    assert xenpv("diff", a, tmp_path / "gone.save").code == 1


# --- the shim --------------------------------------------------------------------------------------------------------


def test_the_shim_takes_descriptors_and_leaves_what_follows(tmp_path: Path) -> None:
    """As libxl runs it: an end of a pipe on either side, and the input's goes on behind the stream."""
    data = bytes(pv_stream(DOMAIN))
    with piped(data + b"qemu's") as fd:
        out = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
        args = ["-i", str(fd), "-o", str(out), "-w", "64", "-g", "pv", "-f", "libxl"]
        kept = os.dup(fd)
        assert shim(args) == 0
        assert os.read(kept, 99) == b"qemu's"
        os.close(kept)
        os.dup2(os.open(os.devnull, os.O_RDONLY), fd)  # it has closed the one that it was given
    assert judge(tmp_path / "out").rules == set()


def test_the_shim_says_what_goes_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    source.write_bytes(bytes(legacy_hvm()))
    args = ["-i", str(source), "-o", str(tmp_path / "out"), "-w", "64", "-g", "hvm"]
    assert shim(args) == 0
    assert capsys.readouterr().out == ""
    assert shim([*args, "-v"]) == 0
    said = capsys.readouterr().out
    assert "HVM_CONTEXT" in said
    assert "PAGE_DATA" in said


def _fails(*args: object, **how: object) -> None:
    raise ZeroDivisionError


def test_the_shims_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_bytes(b"junk" * 99)
    args = ["-i", str(source), "-o", str(out), "-w", "64", "-g", "pv"]
    assert shim(args) == 1
    assert "Stream Error:" in capsys.readouterr().err
    assert not out.exists()
    assert shim(args[2:]) == 1
    assert "usage" in capsys.readouterr().err
    assert shim(["-i", str(tmp_path / "gone"), *args[2:]]) == 1
    with pytest.raises(SystemExit) as e:
        shim([*args[:5], "16", *args[6:]])
    assert e.value.code == 2
    source.write_bytes(bytes(pv_stream(DOMAIN)))
    monkeypatch.setattr("xenpv.cli.convert_legacy_stream.convert", _fails)
    assert shim(args) == 2
    assert "Please fix me" in capsys.readouterr().err
