"""SavedDomain from files, pipes and descriptors: its memory and its facts."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.saved_files import piped
from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from tests.support.writers.hvm import hvm_context, hvm_stream
from tests.support.writers.stream import BROKEN, PAGE, XTAB, Stream, Wire
from xenpv.abi.declare import Width
from xenpv.errors import Fault, Malformed, OutOfOrder, RequestError, StreamError, Truncated, Unsupported
from xenpv.findings import Rule
from xenpv.frames import ABSENT, U64, PageType
from xenpv.io.stream_input import Input
from xenpv.source.saved import FilePages, SavedDomain
from xenpv.stream.index import PageIndex

SPREAD = [*range(100), 0x1_0000, 0x1_0001]


def array(*pfns: int) -> U64:
    return np.array(pfns, np.uint64)


@contextmanager
def from_pipe(data: bytes, *, deep: bool = True) -> Iterator[SavedDomain]:
    with piped(data) as fd, SavedDomain.from_source(Input(os.dup(fd), "pipe"), deep=deep) as saved:
        yield saved


@pytest.fixture(scope="module")
def domain() -> Domain:
    return pv_domain(pfns=SPREAD, vcpus=2, tree=True, ballooned=[200, 201])


@pytest.fixture(scope="module")
def file(domain: Domain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "made.save"
    path.write_bytes(domain.to_bytes(batch=16))
    return path


# --- memory ----------------------------------------------------------------------------------------------------------


def test_frames_of_a_saved_domain_are_those_written(domain: Domain, file: Path) -> None:
    pfns = array(*sorted(domain.types), 150, 0xFFFF, 0x1_0002, 1 << 40)
    with SavedDomain.open(str(file)) as saved:
        expected = [domain.types.get(int(pfn), ABSENT) for pfn in pfns]
        assert saved.frames.types(pfns).tolist() == expected
        assert saved.frames.types(pfns.reshape(2, -1)).tolist() == np.array(expected).reshape(2, -1).tolist()
        for pfn, content in domain.pages.items():
            assert saved.memory.page(pfn) == bytes(content)
            assert saved.memory.type(pfn) == domain.types[pfn]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(SPREAD), max_size=300))
def test_pages_in_any_order_with_repeats_are_read(pfns: list[int]) -> None:
    domain, frames = _open()
    pages = frames.pages(array(*pfns))
    assert pages.shape == (len(pfns), PAGE)
    assert pages.tobytes() == b"".join(bytes(domain.pages[pfn]) for pfn in pfns)


_CACHE: list[tuple[Domain, SavedDomain]] = []


def _open() -> tuple[Domain, FilePages]:
    """Made and opened once: each example only reads."""
    if not _CACHE:
        domain = pv_domain(pfns=SPREAD)
        stream = domain.to_stream(batch=7)
        # Later records in reverse, and some again: offsets then do not grow with the pfn.
        first = stream.find("PAGE_DATA")
        stream[first : first + 10] = reversed(stream[first : first + 10])
        with tempfile.NamedTemporaryFile() as file:
            file.write(bytes(stream))
            file.flush()
            _CACHE.append((domain, SavedDomain.open(file.name)))
    domain, saved = _CACHE[0]
    return domain, saved.frames


def test_pages_adjacent_in_the_file_take_one_read(domain: Domain, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    original = os.preadv

    def count(fd: int, into: list[memoryview], offset: int) -> int:
        reads.append(len(into[0]))
        return original(fd, into, offset)

    with SavedDomain.open(str(file)) as saved:
        monkeypatch.setattr(os, "preadv", count)
        saved.frames.pages(array(*range(16, 32)))
        assert reads == [16 * PAGE]
        reads.clear()
        saved.frames.pages(array(20, 19, 18))
        assert reads == [PAGE] * 3


def test_pages_of_no_pfns_are_empty(file: Path) -> None:
    with SavedDomain.open(str(file)) as saved:
        assert saved.frames.pages(array()).shape == (0, PAGE)
        assert saved.frames.types(array()).shape == (0,)


@pytest.mark.parametrize(
    ("pfn", "page_type"),
    [(150, ABSENT), (200, XTAB), (1 << 50, ABSENT)],
    ids=["absent", "XTAB", "beyond"],
)
def test_pages_without_content_raise_fault(file: Path, pfn: int, page_type: int) -> None:
    with SavedDomain.open(str(file)) as saved:
        with pytest.raises(Fault) as e:
            saved.frames.pages(array(3, pfn, 4))
        assert (e.value.space, e.value.address, e.value.page_type) == ("pfn", pfn, page_type)


def test_pages_of_a_file_cut_while_open_raise_fault(domain: Domain, tmp_path: Path) -> None:
    path = tmp_path / "shrinks"
    path.write_bytes(domain.to_bytes())
    with SavedDomain.open(str(path)) as saved:
        os.truncate(path, 8 * PAGE)
        with pytest.raises(Fault) as e:
            saved.memory.page(99)
        assert (e.value.space, e.value.address) == ("pfn", 99)
        with pytest.raises(Fault) as e:
            saved.frames.pages(array(*range(100)))
        assert e.value.space == "pfn"


def test_pages_read_in_pieces_are_whole(domain: Domain, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems may give less than was asked for."""
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, offset: original(fd, [into[0][:1000]], offset))
    with SavedDomain.open(str(file)) as saved:
        assert saved.frames.pages(array(17, 18)).tobytes() == bytes(domain.pages[17]) + bytes(domain.pages[18])


# --- what is known of the domain -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [8, 4])
def test_saved_domain_tells_vcpus_anchors_and_start_info(tmp_path: Path, width: Width) -> None:
    domain = pv_domain(width=width, vcpus=3)
    path = tmp_path / "made"
    path.write_bytes(domain.to_bytes())
    at = domain.places
    with SavedDomain.open(str(path)) as saved:
        assert saved.contents.width == width
        assert saved.contents.complete
        assert saved.pages_complete
        for vcpu, context in domain.vcpus.items():
            read_context = saved.vcpu_context(vcpu)
            assert read_context is not None
            assert read_context.tobytes() == context.tobytes()
            assert saved.cr3(vcpu) == at.top
            assert saved.cr3(vcpu, user=True) == (at.user_top if width == 8 else None)
            assert saved.tops(vcpu) == [at.top] + ([at.user_top] if width == 8 else [])
        assert saved.vcpu_context(3) is None
        assert saved.cr3(3) is None
        assert saved.tops(3) == []
        assert saved.start_info_pfn == at.start_info
        assert saved.anchors is not None
        assert saved.anchors.p2m_vaddr == domain.p2m_vaddr
        assert saved.p2m.leaves.frame_of(np.arange(saved.p2m.leaf_count)).tolist() == domain.p2m_pfns.tolist()
        assert saved.p2m.entries == domain.entries
        assert saved.p2m.lookup(array(5)).tolist() == [domain.mfns[5]]
        vaddr = domain.vaddrs[7]
        assert saved.memory.read_virtual(vaddr, 64) == bytes(domain.pages[7][:64])


def test_saved_domain_without_records_tells_none(tmp_path: Path) -> None:
    path = tmp_path / "hvm"
    path.write_bytes(bytes(hvm_stream()))
    with SavedDomain.open(str(path)) as saved:
        assert saved.start_info_pfn is None
        assert saved.anchors is None
        assert saved.cr3(0) is None
        with pytest.raises(Fault) as e:
            saved.memory.read_virtual(0, 1)
        assert (e.value.space, e.value.address, e.value.level) == ("vaddr", 0, None)


def test_saved_hvm_domain_with_a_damaged_context_is_a_breach(tmp_path: Path) -> None:
    path, breaches = tmp_path / "hvm", list[tuple[str, int, str | None]]()
    stream = bytes(hvm_stream())
    path.write_bytes(stream.replace(hvm_context(), hvm_context()[:-8] + b"\7" * 8))

    def add_breach(rule: Rule, _message: str, offset: int, record: str | None) -> None:
        breaches.append((rule.name, offset, record))

    with SavedDomain.open(str(path), on_breach=add_breach) as saved:
        assert saved.vcpus == []
        assert saved.registers(0) is None
        assert saved.width == 8
    assert [(rule, record) for rule, _, record in breaches] == [("hvm-context", "HVM_CONTEXT")]
    with pytest.raises(Malformed) as e:
        SavedDomain.open(str(path)).close()
    assert e.value.rule == "hvm-context"


def test_saved_domain_from_a_pipe_without_room_names_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_fd: int, _data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with piped(pv_domain(pfns=range(64)).to_bytes()) as fd:
        source = Input(os.dup(fd), "-")
        monkeypatch.setattr(os, "write", refuse)
        with pytest.raises(OSError, match="TMPDIR") as e:  # contract: the variable to set
            SavedDomain.from_source(source)
        monkeypatch.undo()
    assert (e.value.errno, e.value.filename) == (errno.ENOSPC, tempfile.gettempdir())


# --- where it comes from ---------------------------------------------------------------------------------------------


def test_pipe_keeps_page_tables_p2m_and_start_info(domain: Domain) -> None:
    places = domain.places
    pfns = [*places.p2m, places.p2m_missing, places.start_info, places.tree_top, *places.tree_mid]
    pfns += [pfn for pfn in domain.pages if domain.is_table(pfn)]
    with from_pipe(domain.to_bytes(batch=16)) as saved:
        for pfn in pfns:
            assert saved.memory.page(pfn) == bytes(domain.pages[pfn])
        assert saved.frames.types(array(*SPREAD)).tolist() == [domain.types[pfn] for pfn in SPREAD]
        with pytest.raises(Fault) as e:
            saved.memory.page(places.text)
        assert (e.value.space, e.value.address, e.value.page_type) == ("pfn", places.text, PageType.NOTAB)
        assert saved.memory.walk(domain.vaddrs[0x1_0001]).pfn == 0x1_0001


def test_pipe_not_deep_keeps_nothing(domain: Domain) -> None:
    with from_pipe(domain.to_bytes(), deep=False) as saved:
        assert saved.contents.complete
        with pytest.raises(Fault):
            saved.memory.page(domain.places.top)


def test_spool_file_has_no_name(domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of a pipe lies in a file without a name, which nobody else may read."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = set(os.listdir("/proc/self/fd"))
    with from_pipe(domain.to_bytes()) as saved:
        assert list(tmp_path.iterdir()) == []
        spools = []
        for fd in set(os.listdir("/proc/self/fd")) - before:
            try:
                target = os.readlink(f"/proc/self/fd/{fd}")
            except OSError:
                continue
            if target.startswith(str(tmp_path)):
                spools.append(os.fstat(int(fd)))
        (spool,) = spools
        assert stat.S_IMODE(spool.st_mode) == 0o600
        assert spool.st_nlink == 0
        assert spool.st_size < 40 * PAGE
        assert saved.memory.page(domain.places.top)
    assert set(os.listdir("/proc/self/fd")) <= before


def test_saved_domain_from_a_fifo_opens(domain: Domain, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(domain.to_bytes()), daemon=True)
    writer.start()
    with SavedDomain.open(str(fifo)) as saved:
        assert not saved.source.seekable
        assert saved.contents.complete
    writer.join(10)


def test_saved_domain_from_a_descriptor_at_an_offset_opens(domain: Domain, tmp_path: Path) -> None:
    path = tmp_path / "behind"
    path.write_bytes(b"x" * 5000 + domain.to_bytes())
    fd = os.open(path, os.O_RDONLY)
    os.lseek(fd, 5000, os.SEEK_SET)
    with SavedDomain.from_source(Input(fd, "fd")) as saved:
        assert saved.source.size == len(domain.to_bytes())
        assert saved.memory.page(42) == bytes(domain.pages[42])


@pytest.mark.parametrize("name", ["", "no"], ids=["directory", "missing"])
def test_open_of_a_directory_or_missing_file_raises_request_error(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / name)
    with pytest.raises(RequestError) as e:
        SavedDomain.open(path)
    assert path in str(e.value)


def test_open_of_a_device_is_unsupported() -> None:
    with pytest.raises(Unsupported):
        SavedDomain.open("/dev/zero")
    with pytest.raises(Unsupported):
        SavedDomain.open("/dev/null")


def test_open_without_handler_raises_the_first_breach(tmp_path: Path) -> None:
    path = tmp_path / "broken"
    stream = pv_domain().to_stream()
    path.write_bytes(bytes(Stream(stream).drop("X86_PV_P2M_FRAMES")))
    with pytest.raises(OutOfOrder) as e:
        SavedDomain.open(str(path))
    assert e.value.record == "PAGE_DATA"
    path.write_bytes(bytes(stream)[:-1])
    with pytest.raises(Truncated):
        SavedDomain.open(str(path))


def test_open_with_handler_reads_on_after_breaches(tmp_path: Path) -> None:
    path = tmp_path / "broken"
    stream = pv_domain().to_stream().before("END", Wire().record(0x55))
    path.write_bytes(bytes(stream)[:-1])
    faults: list[str] = []
    with SavedDomain.open(str(path), on_breach=lambda rule, *_: faults.append(rule.name)) as saved:
        assert isinstance(saved.error, Truncated)
        assert saved.contents.shared_info is not None
    assert faults == ["record-unknown", "truncated"]


def test_open_that_fails_closes_the_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "none"
    path.write_bytes(b"none")
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(StreamError):
            SavedDomain.open(str(path))
    assert os.listdir("/proc/self/fd") == before


def test_close_twice_does_no_harm(file: Path) -> None:
    saved = SavedDomain.open(str(file))
    saved.close()
    saved.close()


def test_file_pages_takes_types_and_places_from_two_indices(tmp_path: Path) -> None:
    """Of a pipe, types are known of all pages and contents of some."""
    type_index, content_index = PageIndex(), PageIndex()
    type_index.add_entries(array(1, 2, XTAB << 60 | 3, BROKEN << 60 | 4), 0)
    content_index.add_entries(array(2), PAGE)
    path = tmp_path / "spool"
    path.write_bytes(b"1" * PAGE + b"2" * PAGE)
    fd = os.open(path, os.O_RDONLY)
    try:
        frames = FilePages(fd, content_index, type_index)
        assert frames.types(array(1, 2, 3, 4, 5)).tolist() == [0, 0, XTAB, BROKEN, ABSENT]
        assert frames.pages(array(2)).tobytes() == b"2" * PAGE
        for pfn, page_type in ((1, PageType.NOTAB), (3, XTAB), (4, BROKEN), (5, ABSENT)):
            with pytest.raises(Fault) as e:
                frames.pages(array(2, pfn))
            assert (e.value.space, e.value.address, e.value.page_type) == ("pfn", pfn, page_type)
    finally:
        os.close(fd)
