"""RecentPages: a cache of pages for debuggers.

They read a few bytes at a time, and the same pages again and again.
"""

from __future__ import annotations

import functools
import math
import time

from xenpv.frames import PAGE_SHIFT, PAGE_SIZE
from xenpv.memory.domain import DomainMemory

_CACHED_PAGES = 4096  # 16 MiB


class RecentPages:
    """Reads memory and caches pages, for at most ``seconds`` if memory may change."""

    def __init__(self, memory: DomainMemory, *, seconds: float = math.inf) -> None:
        self._memory = memory
        self._page = functools.lru_cache(_CACHED_PAGES)(memory.page)
        self._seconds = seconds
        self._since = time.monotonic()

    def read(self, address: int, length: int) -> bytes:
        """Return bytes from a pseudo-physical address on, as DomainMemory.read() does."""
        now = time.monotonic()
        if now - self._since > self._seconds:
            self._page.cache_clear()
            self._since = now
        within = address % PAGE_SIZE
        if within + length <= PAGE_SIZE:
            return self._page(address >> PAGE_SHIFT)[within : within + length]
        return self._memory.read(address, length)
