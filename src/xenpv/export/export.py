"""export(): write a domain's memory in a format that other tools read.

export/formats/ says what goes where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from xenpv.errors import RequestError
from xenpv.export.formats import dumpcore, elf_core, lime, raw
from xenpv.export.formats.content import Hole, PageFilter, Pages, Patch, Piece
from xenpv.export.formats.job import ExportJob
from xenpv.export.kdump_writer import write_kdump
from xenpv.frames import PAGE_SIZE, PAGES_PER_BATCH, U8, U64, nonzero_pages
from xenpv.io.atomic_output import Output
from xenpv.io.background import BackgroundWorker
from xenpv.io.file_kind import FileKind
from xenpv.io.progress import Progress, ProgressCallback
from xenpv.memory.p2m_reader import frame_reader
from xenpv.runs import Runs, group_rows
from xenpv.source.domain import Domain

_PIECES: dict[str, Callable[[ExportJob], Iterator[Piece]]] = {
    "elf": elf_core.pieces,
    "lime": lime.pieces,
    "raw": raw.pieces,
    "dumpcore": dumpcore.pieces,
}
FORMATS = {
    "elf": FileKind.CORE,
    "lime": FileKind.LIME,
    "raw": FileKind.OTHER,
    "dumpcore": FileKind.CORE,
    "kdump": FileKind.KDUMP,
}


@dataclass
class Exported:
    """Figures of a file that was written.

    Attributes:
        pages: Pages in the file.
        last_pfn: The highest pfn of them.
        bytes: Size of the file with its holes, in bytes.
        zeros: Pages of zeros, which are holes in the file.
        lost: Pages that could not be read; they are zeros.
        remarks: Sentences that a reader of the file should know.
    """

    pages: int = 0
    last_pfn: int = -1
    bytes: int = 0
    zeros: int = 0
    lost: int = 0
    remarks: list[str] = field(default_factory=list)


def export(
    domain: Domain,
    path: str,
    file_format: str = "elf",
    *,
    compression: str = "zlib",
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> Exported:
    """Write a domain's memory in a format that other tools read.

    The file appears only when it is complete.

    Args:
        domain: The domain.
        path: The file, or "-" for standard output.
        file_format: "elf", "lime", "raw", "dumpcore" or "kdump".
        compression: How kdump compresses pages: "zlib" or "zstd".
        force: Replace an existing file even if it is of another kind, such as a saved domain.
        progress: Called after each batch of pages.

    Raises:
        RequestError: There is no such format, the domain has no pages, or the format cannot hold it. Or the file is
            the one that the domain is read from, or one of another kind.
        GuestError: The format needs the domain's p2m, which is damaged.
        OSError: The file cannot be written.
    """
    if file_format not in FORMATS:
        raise RequestError(f"{file_format!r} is no export format; the formats are {', '.join(FORMATS)}")
    with Output.open(path, replaces={FORMATS[file_format]}, inputs=domain.files, force=force) as out:
        job = ExportJob(domain, seekable=out.sparse)
        pages = job.pages
        if not pages.total:
            raise RequestError(f"{domain.name}: it has no pages that could be exported", needed=1, available=0)
        exporter = _Exporter(job, out, progress)
        if file_format == "kdump":
            batches = exporter.read_pages(pages)
            write_kdump(out, job, batches, compression, exporter.report_pages)
        else:
            exporter.write_pieces(_PIECES[file_format](job))
    exported = exporter.exported
    exported.pages, exported.last_pfn, exported.bytes = pages.total, pages.stop - 1, out.written
    if exported.lost:
        exported.remarks.append(f"{exported.lost} pages could not be read; they are zeros in the file")
    exported.remarks += [f"{e}: page tables below it are not known as such" for e in domain.invalid_cr3s]
    if domain.stale_page_tables:
        exported.remarks.append(
            f"{domain.stale_page_tables} pages that the core lists as page tables are none: the domain ran during "
            "the dump; they are exported unchanged"
        )
    return exported


class _Exporter:
    """Reads the pages of one export, writes the pieces, and counts."""

    def __init__(self, job: ExportJob, out: Output, progress: ProgressCallback | None) -> None:
        self.exported = Exported(remarks=job.remarks)
        self._read = frame_reader(job.domain.frames)
        self._out = out
        self._progress = progress
        self._blank = job.blank_pages
        self._total = job.pages.total
        self._written = 0

    def report_pages(self, count: int) -> None:
        """Count pages as written."""
        self._written += count
        if self._progress is not None:
            written = min(self._written, self._total)  # kdump writes pages of its own after the domain's
            self._progress(Progress(written * PAGE_SIZE, self._total * PAGE_SIZE, unit="bytes"))

    def read_pages(self, runs: Runs) -> Iterator[U8]:
        """Yield the pages' content in batches.

        Pages that cannot be read are zeros, and counted.
        """
        for pfns in runs.batches(PAGES_PER_BATCH):
            yield self._read_pages(pfns)

    def _read_pages(self, pfns: U64) -> U8:
        content, readable = self._read(pfns)
        self.exported.lost += len(pfns) - int(np.count_nonzero(readable))
        return content

    def _read_batch(self, pfns: U64, page_filter: PageFilter | None) -> Callable[[], None]:
        """Read pages, and return the function that writes them.

        Blank pages are not read: a domain may have millions.
        """
        if (self._blank.rows_of(pfns) >= 0).all():
            return partial(self._skip_pages, len(pfns))
        content = self._read_pages(pfns)
        return partial(self._write_pages, content if page_filter is None else page_filter(pfns, content))

    def _skip_pages(self, count: int) -> None:
        self.exported.zeros += count
        self._out.skip(count * PAGE_SIZE)

    def write_pieces(self, pieces: Iterable[Piece]) -> None:
        """Write all pieces in order.

        While one batch of pages goes out to a file, the next is read.
        """
        out = self._out
        with BackgroundWorker() as worker:
            for piece in pieces:
                if isinstance(piece, Pages):
                    for pfns in piece.runs.batches(PAGES_PER_BATCH):
                        write = self._read_batch(pfns, piece.page_filter)
                        worker.submit(write) if out.is_regular_file else write()
                        self.report_pages(len(pfns))
                    continue
                worker.wait()
                if isinstance(piece, Hole):
                    out.skip(piece.length)
                elif isinstance(piece, Patch):
                    out.write_at(piece.data, piece.offset)
                else:
                    out.write([piece])

    def _write_pages(self, content: U8) -> None:
        """Write pages, uint8 of shape (n, 4096); those of zeros become holes."""
        not_zero = nonzero_pages(content)
        self.exported.zeros += len(not_zero) - int(np.count_nonzero(not_zero))
        cuts = group_rows(not_zero[1:] != not_zero[:-1], len(not_zero))[0].tolist()
        for first, end in zip(cuts, [*cuts[1:], len(not_zero)], strict=True):
            if not_zero[first]:
                self._out.write([content[first:end].reshape(-1).data])
            else:
                self._out.skip((end - first) * PAGE_SIZE)
