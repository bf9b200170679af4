"""Pseudo-physical memory as debuggers read it: a few bytes at a time, and the same pages again and again."""

from __future__ import annotations

import functools
import math
import time

from xenpv.frames import PAGE_SHIFT, PAGE_SIZE
from xenpv.memory.domain import DomainMemory

_KEPT = 4096  # pages


class RecentPages:
    """Reads memory, and keeps the pages that were read last, for no longer than so many seconds where it may change."""

    def __init__(self, memory: DomainMemory, *, seconds: float = math.inf) -> None:
        self._memory = memory
        self._page = functools.lru_cache(_KEPT)(memory.page)
        self._seconds = seconds
        self._since = time.monotonic()

    def read(self, address: int, length: int) -> bytes:
        """As DomainMemory.read."""
        now = time.monotonic()
        if now - self._since > self._seconds:
            self._page.cache_clear()
            self._since = now
        within = address % PAGE_SIZE
        if within + length <= PAGE_SIZE:
            return self._page(address >> PAGE_SHIFT)[within : within + length]
        return self._memory.read(address, length)
