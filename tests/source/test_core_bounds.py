"""Large cores, and cores with false sizes: memory follows the file's content, not its claims."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.support.frames import array
from tests.support.made_cores import BreachRecorder, made_core, open_core
from tests.support.writers.core import Core
from xenpv.errors import GuestError, Malformed, Unsupported
from xenpv.source.core import CoreDomain

PAGE = 4096
MEMORY = 200 << 20  # bytes that opening a core may take


@contextmanager
def bounded() -> Iterator[None]:
    """No more than MEMORY is taken meanwhile."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


def sparse(core: Core, number: int, more_entries: bytes, path: Path) -> Path:
    """Write a core that announces ``number`` pages.

    After its own pages, the content is a hole. After its own entries, the list has ``more_entries``, and then a hole.
    """
    data, pages = bytes(core), len(core.pages)
    core.nr_pages, core.sizes = number, {".xen_pages": number * PAGE, ".xen_p2m": number * 16}
    content = bytes(core).index(core.pages[0])
    table = content + number * PAGE
    core.offsets = {".xen_p2m": table}
    with path.open("wb") as file:
        file.write(bytes(core)[: content + pages * PAGE])
        file.seek(table)
        file.write(core.p2m.astype("<u8").tobytes() + more_entries)
        file.seek(table + number * 16)
        file.write(data[data.rindex(b"\0.shstrtab") :])
        file.seek(64 + 64 + 24)  # where the names of the sections are
        file.write((table + number * 16).to_bytes(8, "little"))
    return path


def test_large_core_opens_in_bounded_memory(tmp_path: Path) -> None:
    """Pages are holes; reading the list of a million pages is all that it takes."""
    domain, core = made_core()
    extra = np.arange(0x10_0000, 0x10_0000 + (1 << 20), dtype=np.uint64)
    entries = np.stack([extra, extra + np.uint64(0x4000_0000)], axis=1).tobytes()
    path = sparse(core, len(core.pages) + len(extra), entries, tmp_path / "large.core")
    with bounded(), CoreDomain.open(str(path)) as opened:
        assert len(opened.page_list.runs) <= 8
        assert opened.page_list.pfns_of(array(0x4010_0007)).tolist() == [0x10_0007]
        assert not opened.frames.pages(array(0x18_0000)).any()
        assert opened.memory.read_virtual(domain.vaddrs[3], 100) == bytes(domain.pages[3])[:100]


@pytest.mark.parametrize("has_handler", [True, False], ids=["handler", "no-handler"])
def test_core_list_in_a_hole_is_unsupported_at_once(has_handler: bool, tmp_path: Path) -> None:
    """A file of 8 TiB that takes no room, with 2^31 pages in it."""
    _, core = made_core()
    first = len(core.pages) + 1
    path = sparse(core, 1 << 31, b"", tmp_path / "sparse.core")
    with bounded(), pytest.raises(Unsupported) as e:
        CoreDomain.open(str(path), on_breach=BreachRecorder() if has_handler else None)
    assert e.value.offset == core.offsets[".xen_p2m"] + first * 16


def test_core_list_with_too_many_runs_is_unsupported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is an end to what is taken in, whatever is in the list."""
    monkeypatch.setattr("xenpv.runs.ROWS_MAX", 50)
    _, core = made_core()
    core.p2m[:] = 0
    with pytest.raises(Unsupported) as e:
        open_core(core, tmp_path)
    assert isinstance(e.value.__cause__, GuestError)
    assert "0x32 runs" in str(e.value.__cause__)


def test_core_with_huge_headers_is_malformed(tmp_path: Path) -> None:
    """65535 section headers of 65535 bytes each, in a file that has holes for them."""
    path = tmp_path / "headers.core"
    data = bytearray(bytes(made_core()[1]))
    data[58:62] = b"\xff" * 4
    path.write_bytes(data)
    with path.open("r+b") as file:
        file.truncate(5 << 30)
    with bounded(), pytest.raises(Malformed) as e:
        CoreDomain.open(str(path))
    assert e.value.rule == "core-section"
