"""``xenpv export``: output files, damaged inputs, and what it refuses."""

from __future__ import annotations

import errno
import os
import resource
import signal
import struct
from pathlib import Path

import pytest

from tests.support.command import xenpv
from tests.support.format_readers import parse_lime
from tests.support.made_domains import made_domain
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from xenpv.io.atomic_output import Output

PAGE = 4096


@pytest.fixture
def domain() -> Domain:
    return made_domain()


@pytest.fixture
def file(domain: Domain, tmp_path: Path) -> Path:
    path = tmp_path / "made.save"
    path.write_bytes(domain.to_bytes(batch=16))
    return path


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_export_elf_writes_a_private_core_and_counts_pages(file: Path, domain: Domain) -> None:
    ran = xenpv("export", file, file.with_name("out.elf"))
    assert ran.code == 0
    assert ran.raw == b""
    assert f"{len(domain.pages)} pages" in ran.err
    assert file.with_name("out.elf").read_bytes()[:4] == b"\x7fELF"
    assert file_names(file.parent) == ["made.save", "out.elf"]
    assert file.with_name("out.elf").stat().st_mode & 0o777 == 0o600


def test_export_json_has_format_pages_and_bytes(file: Path, domain: Domain) -> None:
    ran = xenpv("export", "-f", "raw", "--json", file, file.with_name("out"))
    assert ran.json["pages"] == len(domain.pages)
    assert ran.json["bytes"] == file.with_name("out").stat().st_size
    assert ran.json["format"] == "raw"


def test_export_with_an_index_writes_the_same_bytes(file: Path) -> None:
    """An index that is written, one that is used, and none."""
    out, index = file.with_name("out.elf"), file.with_name("made.save.xpvi")
    written = set()
    for option, exists in (("--no-index", False), ("--index", True), ("--index", True), ("--no-index", True)):
        assert xenpv("export", option, file, out).code == 0
        assert index.exists() == exists
        written.add(out.read_bytes())
    assert len(written) == 1


def test_export_partial_of_a_cut_file_has_every_page_before_the_cut(domain: Domain, tmp_path: Path) -> None:
    """The pages before the cut are in it, no page after it, and no byte in their place."""
    stream = domain.to_stream(batch=16)
    at = stream.offset("PAGE_DATA", 2) + 16 + 8 * 16 + 5 * PAGE + 100
    cut = tmp_path / "cut.save"
    cut.write_bytes(bytes(stream)[:at])
    out = tmp_path / "out.lime"

    assert "--partial" in xenpv("export", "-f", "lime", cut, out).error
    assert file_names(tmp_path) == ["cut.save"]

    ran = xenpv("export", "-f", "lime", "--partial", cut, out)
    assert ran.code == 0
    pfns = sorted(domain.types)[: 2 * 16 + 5]
    expected = {pfn: bytes(domain.pages[pfn]) for pfn in pfns if pfn in domain.pages}
    assert parse_lime(out.read_bytes()) == expected
    assert f"{len(expected)} pages" in ran.err
    assert f"pfn {max(expected):#x}, " in ran.err
    assert "missing: vcpus and shared info" in ran.err


def test_export_partial_of_a_file_cut_after_its_pages_has_all_pages(domain: Domain, tmp_path: Path) -> None:
    stream = domain.to_stream()
    cut = tmp_path / "cut.save"
    cut.write_bytes(bytes(stream)[: stream.offset("SHARED_INFO") + 100])
    ran = xenpv("export", "--partial", cut, tmp_path / "out")
    assert ran.code == 0
    assert f"{len(domain.pages)} pages" in ran.err


def test_export_of_a_cut_file_fails_and_leaves_no_output(domain: Domain, tmp_path: Path) -> None:
    data = domain.to_bytes(batch=16)
    cut, out = tmp_path / "cut.save", tmp_path / "out"
    for at in range(1, len(data), len(data) // 23):
        cut.write_bytes(data[:at])
        assert xenpv("export", cut, out).code == 1, at
        assert not out.exists()
        ran = xenpv("export", "--partial", cut, out)
        assert ran.code in {0, 1}, ran.err
        assert out.exists() is (ran.code == 0)
        out.unlink(missing_ok=True)
    assert file_names(tmp_path) == ["cut.save"]


def test_export_of_junk_fails_and_leaves_no_output(tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    for data in (b"", b"junk" * 5000, struct.pack("<Q", 1 << 63) * 1000):
        junk.write_bytes(data)
        for partial in ([], ["--partial"]):
            assert xenpv("export", *partial, junk, tmp_path / "out").code == 1
    assert file_names(tmp_path) == ["junk"]


def test_export_from_a_pipe_is_refused(file: Path, tmp_path: Path) -> None:
    assert "pipe" in xenpv("export", "-", tmp_path / "out", stdin=file.read_bytes()).error
    assert file_names(tmp_path) == ["made.save"]


def test_export_to_a_pipe_refuses_kdump_and_sparse_raw(file: Path) -> None:
    fifo = file.with_name("fifo")
    os.mkfifo(fifo)
    keep = os.open(fifo, os.O_RDWR)  # has a reader, and takes 64 KiB
    try:
        kdump = xenpv("export", "-f", "kdump", file, fifo)
        raw = xenpv("export", "-f", "raw", file, fifo)
    finally:
        os.close(keep)
    assert "kdump" in kdump.error
    assert "elf or lime" in raw.error  # raw would write 4.5 GiB of zeros for 100 pages


@pytest.mark.parametrize("form", ["elf", "lime", "raw", "dumpcore", "kdump"])
@pytest.mark.parametrize("room", [0, 10_000, 100_000])
def test_export_on_a_full_disk_fails_and_keeps_the_old_output(form: str, room: int, tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk."""
    save = tmp_path / "made.save"
    save.write_bytes(pv_domain(pfns=range(96)).to_bytes())
    (tmp_path / "out").write_bytes(b"as it was")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        ran = xenpv("export", "--force", "-f", form, save, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert ran.code == 1
    assert f"{tmp_path / 'out'}: {os.strerror(errno.EFBIG)}" in ran.err
    assert file_names(tmp_path) == ["made.save", "out"]
    assert (tmp_path / "out").read_bytes() == b"as it was"


@pytest.mark.parametrize(("owner", "call"), [(Output, "write"), (os, "fsync")])
def test_export_interrupted_leaves_no_output(
    owner: object, call: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, call, interrupted)
    assert xenpv("export", file, file.with_name("out")).code == 130
    assert file_names(file.parent) == ["made.save"]


@pytest.mark.parametrize("args", [["--pause"], ["-f", "zip"], ["--compression", "lzo"]])
def test_export_with_an_impossible_option_fails(args: list[str], file: Path) -> None:
    assert xenpv("export", *args, file, file.with_name("out")).code in {1, 64}
    assert file_names(file.parent) == ["made.save"]
