"""Reading all of a domain's memory: page by page, and in search of bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from xenpv.frames import HAS_DATA, PAGE_SHIFT, PAGES_PER_BATCH, U8, U64
from xenpv.memory.domain import PagedDomain
from xenpv.memory.p2m_reader import frame_reader


def iter_pages(domain: PagedDomain) -> Iterator[tuple[int, int, bytes]]:
    """Yield pfn, page type and content of each page that has content and can be read."""
    for pfns, types, pages in _batches(domain):
        for pfn, page_type, page in zip(pfns.tolist(), types.tolist(), pages, strict=True):
            yield pfn, page_type, page.tobytes()


def search(domain: PagedDomain, data: bytes) -> Iterator[int]:
    """Yield the address in bytes of each match of ``data``.

    A match may cross into the page of the next pfn. Raises ValueError if ``data`` is empty.
    """
    if not data:
        raise ValueError("search: no bytes to look for")
    return _search(domain, data)


def _search(domain: PagedDomain, data: bytes) -> Iterator[int]:
    tail, tail_end = b"", -1  # the last bytes before address ``tail_end``, shorter than a match
    for pfns, _, pages in _batches(domain):
        cuts = np.flatnonzero(np.diff(pfns) != 1) + 1
        for first, run in zip(pfns[np.append(0, cuts)].tolist(), np.split(pages, cuts), strict=True):
            start = first << PAGE_SHIFT
            if start != tail_end:
                tail = b""
            text = tail + run.tobytes()
            base = start - len(tail)
            index = text.find(data)
            while index >= 0:
                yield base + index
                index = text.find(data, index + 1)
            tail, tail_end = text[max(len(text) - len(data) + 1, 0) :], base + len(text)


def _batches(domain: PagedDomain) -> Iterator[tuple[U64, U8, U8]]:
    """Yield the pages that have content and can be read, in batches.

    Yields:
        pfns; page types, uint8 of shape (n,); content, uint8 of shape (n, 4096).
    """
    read = frame_reader(domain.frames)
    for extents in domain.extents():
        for pfns, types in extents[HAS_DATA[extents.type]].typed_batches(PAGES_PER_BATCH):
            pages, readable = read(pfns)
            if readable.any():
                yield pfns[readable], types[readable], pages[readable]
