"""A kdump-compressed file: pages packed by several threads, their places written in front of them as they are known."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from xenpv.errors import RequestError
from xenpv.export.formats.content import Hole
from xenpv.export.formats.kdump import DESCRIPTOR, PFNS_MAX, Header, bitmap, pack
from xenpv.frames import PAGE_SIZE, U8, U64
from xenpv.io.atomic_output import Output
from xenpv.runs import Runs

if TYPE_CHECKING:
    from concurrent.futures import Future

    Packed = Future[tuple[list[bytes | None], U64]]


def write_kdump(out: Output, header: Header, pages: Runs, contents: Iterable[U8]) -> Iterator[int]:
    """Write it; how many pages are done, now and then.

    ``contents`` are those of ``pages``, in order, uint8 (n, 4096) each time. Raises RequestError for an output that
    cannot be written at any place, and for more pfns than the format has bits for.
    """
    if not out.sparse:
        raise RequestError("kdump says where each page is before the first of them: it needs a file, not a pipe")
    if pages.stop > PFNS_MAX:
        raise RequestError(f"kdump ends at pfn {PFNS_MAX:#x}, and the last is {pages.stop - 1:#x}", needed=pages.stop)
    out.write([header.before(pages)])
    for _ in range(2):
        for piece in bitmap(pages):
            out.skip(piece.length) if isinstance(piece, Hole) else out.write([piece])
    table = out.written
    out.skip(pages.total * DESCRIPTOR.itemsize)
    zeros = out.written  # all pages of zeros are this one
    out.write([bytes(PAGE_SIZE)])
    done = 0
    for packed, flags in _packed(contents, header.compression):
        full = np.array([data is not None for data in packed])
        sizes = np.array([PAGE_SIZE if data is None else len(data) for data in packed], np.int64)
        ends = out.written + np.cumsum(np.where(full, sizes, 0))
        rows = np.zeros(len(packed), DESCRIPTOR)
        rows["offset"], rows["size"], rows["flags"] = np.where(full, ends - sizes, zeros), sizes, flags
        out.write([data for data in packed if data is not None])
        out.write_at(rows.tobytes(), table + done * DESCRIPTOR.itemsize)
        done += len(packed)
        yield done


def _packed(contents: Iterable[U8], compression: str) -> Iterator[tuple[list[bytes | None], U64]]:
    """All pages packed, in order: some batches are at work at a time, one more than there are processors."""
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415  no other format needs it, nor what it imports

    at_once = (os.cpu_count() or 1) + 1
    waiting: deque[Packed] = deque()
    with ThreadPoolExecutor(at_once - 1) as workers:
        for content in contents:
            waiting.append(workers.submit(pack, content, compression))
            if len(waiting) >= at_once:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
