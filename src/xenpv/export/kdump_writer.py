"""Writes a kdump-compressed file.

Several threads compress pages; descriptors are filled in as they finish.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from xenpv.errors import RequestError
from xenpv.export.formats.content import Hole
from xenpv.export.formats.job import ExportJob
from xenpv.export.formats.kdump import DESCRIPTOR, PFNS_MAX, Header, bitmap, compress_pages
from xenpv.frames import PAGE_SIZE, U8, U64
from xenpv.io.atomic_output import Output
from xenpv.runs import Runs

if TYPE_CHECKING:
    from concurrent.futures import Future

    Compressed = Future[tuple[list[bytes | None], U64]]


def write_kdump(
    out: Output, job: ExportJob, batches: Iterable[U8], compression: str, report_pages: Callable[[int], None]
) -> None:
    """Write the whole file.

    Args:
        out: The output.
        job: The export.
        batches: The content of ``job.pages`` in order, each uint8 of shape (n, 4096).
        compression: One of kdump.COMPRESSION_FLAGS.
        report_pages: Called with the number of pages of each batch that was written.

    Raises:
        RequestError: The output cannot seek, or a pfn has no bit in the format.
    """
    identity, pages = job.identity, job.pages
    if not out.sparse:
        raise RequestError("kdump has the offsets of all pages before the first page: write to a file, not a pipe")
    if identity is not None:
        pages = Runs.concatenate([pages, identity.runs]).merged()
    if pages.stop > PFNS_MAX:
        raise RequestError(
            f"kdump holds pfns below {PFNS_MAX:#x}; the last page is pfn {pages.stop - 1:#x}", needed=pages.stop
        )
    out.write([Header.for_job(job, compression).pack(pages)])
    for _ in range(2):
        for piece in bitmap(pages):
            out.skip(piece.length) if isinstance(piece, Hole) else out.write([piece])
    descriptors = out.written
    out.skip(pages.total * DESCRIPTOR.itemsize)
    zero_page = out.written  # all descriptors of pages of zeros name this one
    out.write([bytes(PAGE_SIZE)])
    tree = identity.content() if identity is not None else ()
    tree_batches = (np.frombuffer(part, np.uint8).reshape(-1, PAGE_SIZE) for part in tree)
    for source in (batches, tree_batches):
        for contents, flags in _compress_batches(source, compression):
            not_zero = np.array([content is not None for content in contents])
            sizes = np.array([PAGE_SIZE if content is None else len(content) for content in contents], np.int64)
            ends = out.written + np.cumsum(np.where(not_zero, sizes, 0))
            rows = np.zeros(len(contents), DESCRIPTOR)
            rows["offset"], rows["size"], rows["flags"] = np.where(not_zero, ends - sizes, zero_page), sizes, flags
            out.write([content for content in contents if content is not None])
            out.write_at(rows.tobytes(), descriptors)
            descriptors += rows.nbytes
            report_pages(len(contents))


def _compress_batches(batches: Iterable[U8], compression: str) -> Iterator[tuple[list[bytes | None], U64]]:
    """Yield all batches compressed, in order.

    At most one batch more than there are processors is in work.
    """
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415  no other format needs it, nor what it imports

    batches_in_work = (os.cpu_count() or 1) + 1
    waiting: deque[Compressed] = deque()
    with ThreadPoolExecutor(batches_in_work - 1) as workers:
        for batch in batches:
            waiting.append(workers.submit(compress_pages, batch, compression))
            if len(waiting) >= batches_in_work:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
