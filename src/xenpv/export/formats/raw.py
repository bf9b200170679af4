"""Raw memory: each page at its pseudo-physical address, holes elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

from xenpv.errors import RequestError
from xenpv.export.formats.content import Hole, Pages, Piece
from xenpv.export.formats.job import ExportJob
from xenpv.frames import PAGE_SIZE

# A pipe has no holes. It gets at most so many bytes of zeros, or so many times the content if that is more.
_PIPE_ZEROS_MAX = 1 << 30
_PIPE_ZEROS_PER_CONTENT = 4
_PAGES_MAX = (1 << 63) // PAGE_SIZE  # where off_t ends


def pieces(job: ExportJob) -> Iterator[Piece]:
    """Yield the file, which ends after the last page.

    Raises:
        RequestError: A pipe would get far more zeros than content, or no file reaches that far.
    """
    pages = job.pages
    if pages.stop > _PAGES_MAX:
        raise RequestError(
            f"pfn {pages.stop - 1:#x} lies beyond the end of the largest file: choose elf or lime",
            needed=pages.stop,
            available=_PAGES_MAX,
        )
    absent = pages.stop - pages.total
    zeros_max = max(_PIPE_ZEROS_MAX, pages.total * PAGE_SIZE * _PIPE_ZEROS_PER_CONTENT)
    if not job.seekable and absent * PAGE_SIZE > zeros_max:
        raise RequestError(
            f"{absent} pfns have no page, and a pipe would get zeros for them: write to a file, which gets holes, "
            "or choose elf or lime",
            needed=pages.stop,
            available=pages.total,
        )
    if absent:
        job.remarks.append(f"{absent} pfns up to {pages.stop - 1:#x} have no page; a raw file shows them as zeros")
    end = 0
    for row, (first, count) in enumerate(zip(pages.first.tolist(), pages.pages.tolist(), strict=True)):
        if first > end:
            yield Hole((first - end) * PAGE_SIZE)
        yield Pages(pages[row : row + 1])
        end = first + count
