"""Pages that were read last: the same bytes, and no older than was asked for."""

from __future__ import annotations

import math
import time

import pytest

from tests.support.frames import DictFrames
from xenpv.errors import Fault
from xenpv.memory.domain import DomainMemory
from xenpv.plugins.recent import RecentPages

PAGE = 4096


def frames() -> DictFrames:
    return DictFrames({pfn: bytearray([pfn] * PAGE) for pfn in range(4)})


def test_recent_pages_reads_within_and_across_pages() -> None:
    memory = DomainMemory(frames())
    recent = RecentPages(memory)
    for at, length in ((0, 8), (PAGE - 8, 8), (PAGE - 4, 8), (5, 0), (100, 3 * PAGE), (2 * PAGE, PAGE)):
        assert recent.read(at, length) == memory.read(at, length)
    with pytest.raises(Fault):
        recent.read(4 * PAGE, 1)


def test_recent_pages_reads_a_cached_page_once() -> None:
    content = frames()
    recent = RecentPages(DomainMemory(content), seconds=math.inf)
    for at in range(0, PAGE, 8):
        recent.read(PAGE + at, 8)
    assert content.reads == {1: 1}


def test_recent_pages_sees_changes_after_its_time() -> None:
    content = frames()
    recent = RecentPages(DomainMemory(content), seconds=0.05)
    start = time.monotonic()
    recent.read(PAGE, 1)
    content.content[1][:] = b"x" * PAGE  # type: ignore[index]
    while time.monotonic() - start <= 0.06:
        assert recent.read(PAGE, 1) in {b"\1", b"x"}
    assert recent.read(PAGE, 1) == b"x"


def test_recent_pages_with_zero_seconds_caches_nothing() -> None:
    content = frames()
    recent = RecentPages(DomainMemory(content), seconds=-1)
    assert [recent.read(PAGE, 1), recent.read(PAGE, 1)] == [b"\1"] * 2
    assert content.reads == {1: 2}
