"""Limits on the memory that code may hold."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def peak_memory_below(limit: int) -> Iterator[None]:
    """Fail if more than ``limit`` bytes are allocated at any moment within."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < limit, f"{(peak - before) / (1 << 20):.1f} MiB were held"
