"""Pseudo-physical memory as debuggers read it: a few bytes at a time, and the same pages again and again."""

from __future__ import annotations

import functools

from xenpv.frames import PAGE_SHIFT, PAGE_SIZE
from xenpv.memory.domain import DomainMemory

KEPT = 4096  # pages


class RecentPages:
    """Reads memory, and keeps the pages that were read last: none of them if ``kept`` is 0, for what runs on."""

    def __init__(self, memory: DomainMemory, *, kept: int = KEPT) -> None:
        self._memory = memory
        self._page = functools.lru_cache(kept)(memory.page)

    def read(self, address: int, length: int) -> bytes:
        """As DomainMemory.read."""
        within = address % PAGE_SIZE
        if within + length <= PAGE_SIZE:
            return self._page(address >> PAGE_SHIFT)[within : within + length]
        return self._memory.read(address, length)
