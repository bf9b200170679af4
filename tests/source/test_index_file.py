"""The index beside a save file: it gives the same domain, and a false one does no harm."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.frames import columns
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from tests.support.writers.hvm import hvm_stream
from tests.support.writers.stream import Stream, Wire
from xenpv.cli.show import describe
from xenpv.errors import Fault
from xenpv.frames import HAS_DATA
from xenpv.io.stream_input import Input
from xenpv.source import index_file
from xenpv.source.index_file import StoredIndex, store_index
from xenpv.source.open import open_domain
from xenpv.source.saved import SavedDomain


@pytest.fixture(scope="module")
def domain() -> Domain:
    return pv_domain(pfns=[*range(200), 0x1_0000], vcpus=2, tree=True, ballooned=[300])


@pytest.fixture
def file(domain: Domain, tmp_path: Path) -> Path:
    path = tmp_path / "made.save"
    path.write_bytes(domain.to_bytes(batch=16))
    return path


def index_path(file: Path) -> Path:
    return Path(f"{file}.xpvi")


def open_saved(file: Path, index: bool | None = True) -> SavedDomain:
    saved = open_domain(str(file), index=index)
    assert isinstance(saved, SavedDomain)
    return saved


def load_index(file: Path) -> StoredIndex | None:
    source = Input.open(str(file))
    try:
        return StoredIndex.load(str(file), source)
    finally:
        source.close()


def contents_of(file: Path, index: bool = True) -> list[object]:
    """All that is known of a saved domain, its memory included."""
    with open_saved(file, index) as saved:
        pfns = saved.contents.index.pfns(HAS_DATA)
        tables = columns(saved.contents.index.extents)
        duplicates = saved.contents.index.duplicates
        return [
            describe(saved, records=True),
            tables,
            duplicates,
            saved.frames.pages(pfns).tobytes(),
            saved.contents.vcpus,
        ]


def resent(domain: Domain) -> bytes:
    """Pages sent twice, and some of them twice in one record."""
    return bytes(domain.to_checkpointed(rounds=2, dirty=20))


@pytest.mark.parametrize(
    "make", [lambda d: d.to_bytes(batch=16), lambda d: d.to_bytes("xenopsd"), resent, lambda _: bytes(hvm_stream())]
)
def test_stored_index_gives_the_same_domain(make: Callable[[Domain], bytes], domain: Domain, tmp_path: Path) -> None:
    file = tmp_path / "made.save"
    file.write_bytes(make(domain))
    first = contents_of(file, index=False)
    assert not index_path(file).exists()
    assert contents_of(file) == first
    assert load_index(file) is not None
    assert contents_of(file) == first
    assert stat.S_IMODE(index_path(file).stat().st_mode) == 0o600


def test_stored_index_saves_reading_page_data(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_saved(file).close()
    reads: list[int] = []
    original = os.pread

    def pread(fd: int, count: int, offset: int) -> bytes:
        reads.append(offset)
        return original(fd, count, offset)

    for index in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr("xenpv.io.stream_input.os.pread", pread)
            open_saved(file, index).close()
        reads.append(-1)
    without, by_index = reads.index(-1), len(reads) - 2 - reads.index(-1)
    contents = open_saved(file).contents
    records = sum(run.count for run in contents.record_groups if run.name == "PAGE_DATA")
    assert records > 10
    assert by_index > 0
    with_samples = 66
    assert by_index - with_samples <= without - records + 1


def test_stored_index_holds_no_guest_memory(file: Path, domain: Domain) -> None:
    open_saved(file).close()
    data = index_path(file).read_bytes()
    for pfn in (domain.places.text, domain.places.start_info):
        assert bytes(domain.pages[pfn])[:32] not in data
    assert bytes(domain.shared_page)[-64:] not in data or not any(domain.shared_page[-64:])


def test_small_file_has_an_index_only_on_request(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_saved(file, None).close()
    assert not index_path(file).exists()
    monkeypatch.setattr("xenpv.source.open.LARGE", 1000)
    open_saved(file, False).close()
    assert not index_path(file).exists()
    open_saved(file, None).close()
    assert index_path(file).exists()


# --- stale -----------------------------------------------------------------------------------------------------------


def test_stored_index_of_a_changed_file_is_ignored(file: Path, domain: Domain) -> None:
    before = contents_of(file)
    stamp = file.stat()
    data = bytearray(file.read_bytes())
    position = data.index(bytes(domain.pages[domain.places.text])[:64])
    data[position] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert load_index(file) is None, "the same size and the same time, and not the same file"
    assert contents_of(file) != before
    assert load_index(file) is not None
    os.utime(file, ns=(0, 0))
    assert load_index(file) is None
    file.write_bytes(data + b"\0")
    assert load_index(file) is None


def test_file_that_changes_while_read_gets_no_index(file: Path) -> None:
    with open_saved(file, index=False) as saved:
        state = index_file.FileState.from_source(saved.source)
        os.utime(file, ns=(1, 1))
        assert not store_index(str(file), saved.source, saved.contents, state)
    assert not index_path(file).exists()


def test_damaged_file_gets_no_index(file: Path) -> None:
    cut = file.read_bytes()[:-2000]
    file.write_bytes(cut)
    open_domain(str(file), on_breach=lambda *_: None, index=True).close()
    assert not index_path(file).exists()


# --- where it cannot be written, and what it may not replace ---------------------------------------------------------


def test_index_in_a_read_only_folder_is_not_stored(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.open

    def refuse(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT or flags & os.O_TMPFILE == os.O_TMPFILE:
            raise PermissionError(13, "Permission denied")
        return original(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    assert contents_of(file)
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_store_index_replaces_only_an_index(kind: str, file: Path, tmp_path: Path) -> None:
    target = tmp_path / "other"
    target.write_bytes(b"somebody's")
    if kind == "file":
        index_path(file).write_bytes(b"somebody's")
    elif kind == "folder":
        index_path(file).mkdir()
    else:
        index_path(file).symlink_to(target)
    assert contents_of(file) == contents_of(file, index=False)
    assert target.read_bytes() == b"somebody's"
    assert kind != "file" or index_path(file).read_bytes() == b"somebody's"


# --- hostile ---------------------------------------------------------------------------------------------------------


def test_stored_index_that_others_can_write_is_ignored(file: Path) -> None:
    open_saved(file).close()
    index_path(file).chmod(0o620)
    assert load_index(file) is None
    index_path(file).chmod(0o600)
    assert load_index(file) is not None
    if os.geteuid() == 0:
        os.chown(index_path(file), 12345, 12345)
        assert load_index(file) is None


def test_stored_index_with_any_byte_changed_is_ignored(file: Path) -> None:
    open_saved(file).close()
    valid = index_path(file).read_bytes()
    for position in range(0, len(valid), len(valid) // 60):
        damaged = bytearray(valid)
        damaged[position] ^= 0x41
        index_path(file).write_bytes(damaged)
        assert load_index(file) is None
    for end in (0, 7, 40, 100, len(valid) - 1):
        index_path(file).write_bytes(valid[:end])
        assert load_index(file) is None
    index_path(file).write_bytes(valid + b"\0")
    assert load_index(file) is None
    index_path(file).write_bytes(valid)
    assert load_index(file) is not None


def test_stored_index_that_cannot_be_true_is_ignored(file: Path) -> None:
    """With a digest that is right: whatever it says, pages come out of the file, or a Fault; never anything else."""
    first = contents_of(file, index=False)
    open_saved(file).close()
    valid = index_path(file).read_bytes()
    rng, accepted = random.Random(7), 0
    head = index_file._HEADER.size
    for _ in range(40):
        damaged = bytearray(valid[:-16])
        for _ in range(rng.choice([1, 1, 2, 5])):
            position = rng.randrange(head, len(damaged)) if rng.random() < 0.9 else rng.randrange(56, head)
            damaged[position] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        damaged += index_file._digest(bytes(damaged[:head]), bytes(damaged[head:]))
        index_path(file).write_bytes(damaged)
        with open_saved(file) as saved:
            accepted += saved.contents.index.sent != 0
            for start, pages, kind in columns(saved.contents.index.extents):
                pfns = np.arange(start, start + min(pages, 64), dtype=np.uint64)
                try:
                    saved.frames.pages(pfns)
                except Fault:
                    assert kind >= 0
    assert accepted
    index_path(file).unlink()
    assert contents_of(file) == first


@pytest.mark.parametrize(("pfn", "offset"), [(1 << 60, 0), (5, -1), (5, 1 << 40)], ids=["pfn", "before", "beyond"])
def test_stored_index_with_an_impossible_duplicate_is_ignored(pfn: int, offset: int, file: Path) -> None:
    domain, wire = pv_domain(pfns=range(64)), Wire()
    stream = [wire.libxl_header(), wire.libxc_context(), *domain.head(wire), *domain.page_data(wire)]
    stream += [*domain.page_data(wire, pfns=[5, 5]), *domain.tail(wire), wire.end(), wire.libxl_end()]
    file.write_bytes(bytes(Stream(stream)))
    open_saved(file).close()
    valid = index_path(file).read_bytes()
    head, digest = index_file._HEADER.size, 16
    stored = load_index(file)
    assert stored is not None
    assert [pfn for pfn, _ in stored.index.duplicates] == [5]
    damaged = valid[: -digest - 16] + pfn.to_bytes(8, "little") + offset.to_bytes(8, "little", signed=True)
    index_path(file).write_bytes(damaged + index_file._digest(damaged[:head], damaged[head:]))
    assert load_index(file) is None


def test_stored_index_of_tables_without_content_is_ignored(file: Path) -> None:
    """Otherwise one extent of a sparse file names 2^38 tables, and reading them asks for terabytes."""
    open_saved(file).close()
    valid = index_path(file).read_bytes()
    head, digest = index_file._HEADER.size, 16
    extents = np.frombuffer(valid, index_file._EXTENT, 1, head).copy()
    assert HAS_DATA[extents["type"]].all()
    extents["offset"] = -1
    damaged = valid[:head] + extents.tobytes() + valid[head + extents.nbytes : -digest]
    index_path(file).write_bytes(damaged + index_file._digest(damaged[:head], damaged[head:]))
    assert load_index(file) is None
