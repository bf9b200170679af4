"""A domain's memory written in a format that other tools read: src/xenpv/export says what goes where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain

import numpy as np

from xenpv.errors import RequestError, XenPVError
from xenpv.export.formats import dumpcore, elf, kdump, lime, notes, raw
from xenpv.export.formats.content import Hole, Piece, runs_with_data
from xenpv.export.formats.identity import Identity
from xenpv.export.formats.mapped import direct_map, kernel_maps
from xenpv.export.kdump_writer import write_kdump
from xenpv.export.machine_frames import Machine
from xenpv.frames import PAGE_SIZE, PAGES_PER_BATCH, PFNS_PER_SCAN, U8, U64, filled
from xenpv.io.atomic_output import Output
from xenpv.io.background import BackgroundWorker
from xenpv.io.progress import Progress, ProgressCallback
from xenpv.memory.p2m import frame_reader
from xenpv.memory.registers import Registers
from xenpv.memory.vmcoreinfo import LONGEST, Search, find_vmcoreinfo, value
from xenpv.runs import Runs
from xenpv.source.domain import Domain

_PIPE_HOLES = 1 << 30  # bytes of zeros that a pipe gets at most, and not more than that, or …
_PIPE_TIMES = 4  # … so many times the content


@dataclass
class Exported:
    """What was written: pages, the highest pfn of them, bytes of the file (holes counted), pages of zeros that took no
    room, pages that could not be read and are zeros; and what a reader should know of it, a sentence each.
    """

    pages: int = 0
    last_pfn: int = -1
    bytes: int = 0
    zeros: int = 0
    lost: int = 0
    remarks: list[str] = field(default_factory=list)


def export(
    domain: Domain, path: str, form: str, *, compression: str = "zlib", progress: ProgressCallback | None = None
) -> Exported:
    """Write a domain's memory to ``path`` ("-" is standard output) in one of FORMATS; ``compression``, for kdump, is
    one of kdump.FLAGS.

    The file has its name only when it is whole. Raises RequestError for what the format cannot hold, OSError for the
    file.
    """
    job = _Job(domain, compression)
    total = job.pages.total
    if not total:
        raise RequestError(f"{domain.name}: has no pages that could be exported")
    with Output.open(path) as out:
        for done in FORMATS[form](job, out):
            if progress is not None:
                progress(Progress(min(done, total) * PAGE_SIZE, total * PAGE_SIZE, unit="bytes"))
    exported = job.exported
    exported.pages, exported.last_pfn, exported.bytes = total, job.pages.stop - 1, out.written
    if exported.lost:
        job.remark(f"{exported.lost} pages could not be read, or were given back meanwhile: they are zeros")
    if domain.stale_page_tables:
        what = f"{domain.stale_page_tables} of the pages that are named as page tables are none"
        job.remark(f"{what}: the domain ran while it was dumped; they are as the core has them")
    return exported


def pages_of(domain: Domain) -> Runs:
    """The pages that have content; of a file that was cut off, those before its end."""
    pages = runs_with_data(domain.extents())
    if domain.error is not None:
        kept = [domain.has_content(pfns) for pfns in pages.batches(PFNS_PER_SCAN)]
        pages = pages.where(np.concatenate([*kept, np.empty(0, np.bool_)]))
    return pages


class _Job:
    """One export: the domain, what was found in it, and what becomes of it."""

    def __init__(self, domain: Domain, compression: str) -> None:
        self.domain = domain
        self.compression = compression
        self.exported = Exported()
        self.remark = self.exported.remarks.append

    @cached_property
    def pages(self) -> Runs:
        """The pages that have content."""
        return pages_of(self.domain)

    @cached_property
    def registers(self) -> dict[int, Registers | None]:
        """Each vcpu's, as far as they are known."""
        registers = {vcpu: self.domain.registers(vcpu) for vcpu in self.domain.vcpus}
        if not any(registers.values()):
            self.remark("no vcpu's registers are known")
        return registers

    @cached_property
    def text(self) -> bytes | None:
        """VMCOREINFO."""
        return self.told(find_vmcoreinfo(self.domain))

    def told(self, text: bytes | None) -> bytes | None:
        """The text, and a remark if there is none."""
        if text is None:
            self.remark("no VMCOREINFO was found in its memory: not Linux, or not one that debuggers know")
        return text

    @cached_property
    def identity(self) -> Identity | None:
        """The p2m that crash needs for a PV guest."""
        return None if self.domain.hvm or self.domain.width == 4 else Identity.of(self.pages)

    @cached_property
    def uts(self) -> bytes:
        """The guest's struct new_utsname; where it cannot be read, one that readers take for sane."""
        text, width = self.text or b"", self.domain.width
        try:
            at = int(value(text, "SYMBOL(init_uts_ns)") or "", 16) + int(
                value(text, "OFFSET(uts_namespace.name)") or ""
            )
            return self.domain.memory.read_virtual(at, kdump.UTSNAME)
        except (XenPVError, ValueError):
            release = value(text, "OSRELEASE") or "unknown"
            names = ["Linux" if text else "unknown", "unknown", release, "unknown", "x86_64" if width == 8 else "i686"]
            return b"".join(name.encode()[:64].ljust(65, b"\0") for name in names)

    def contents(self, change: Callable[[U64, U8], U8] | None = None) -> Callable[[Runs], Iterator[U8]]:
        """Read pages in batches. Those that cannot be read are zeros, and counted."""
        read = frame_reader(self.domain.frames)

        def batches(pages: Runs) -> Iterator[U8]:
            for pfns in pages.batches(PAGES_PER_BATCH):
                content, readable = read(pfns)
                self.exported.lost += len(pfns) - int(np.count_nonzero(readable))
                yield content if change is None else change(pfns, content)

        return batches


def _elf(job: _Job, out: Output) -> Iterator[int]:
    domain, pages, identity = job.domain, job.pages, job.identity

    def described(text: bytes | None) -> bytes:
        known = notes.of_vcpus(job.registers, domain.width) + notes.vmcoreinfo(text)
        return known + (identity.note() if identity is not None else b"")

    direct = direct_map(domain, pages)
    mapped = kernel_maps(domain, pages, direct)
    headers = elf.Headers(pages, domain.width, len(described(bytes(LONGEST))), direct, mapped, identity)
    memory: Iterator[Piece] = chain((pages,), identity.content() if identity is not None else ())
    if not out.sparse:
        yield from _written(out, chain([headers.packed(described(job.text))], memory), job)
        return
    search = Search(domain)

    def looked(pfns: U64, content: U8) -> U8:
        search.look(pfns, content)
        return content

    yield from _written(out, chain([Hole(headers.length)], memory), job, looked)
    out.write_at(headers.packed(described(job.told(search.text))), 0)


def _lime(job: _Job, out: Output) -> Iterator[int]:
    return _written(out, lime.dump(job.pages), job)


def _raw(job: _Job, out: Output) -> Iterator[int]:
    absent = job.pages.stop - job.pages.total
    if absent and not out.sparse and absent * PAGE_SIZE > max(_PIPE_HOLES, job.pages.total * PAGE_SIZE * _PIPE_TIMES):
        what = f"{absent} pfns have no page, which a pipe would be given as zeros: give a file's name, which gets holes"
        raise RequestError(f"{what}, or take elf or lime", needed=job.pages.stop, available=job.pages.total)
    if absent:
        job.remark(f"{absent} pfns up to {job.pages.stop - 1:#x} have no page; a raw file shows them as zeros")
    return _written(out, raw.dump(job.pages), job)


def _dumpcore(job: _Job, out: Output) -> Iterator[int]:
    domain = job.domain
    machine = None
    if not domain.hvm:
        machine = Machine(domain)
        job.remark("page tables are as xl's but for entries that name what is no frame of the domain, and Xen's own")
    contexts = [] if machine is None else machine.contexts()
    if not contexts:
        job.remark("no vcpu's context is known")
    header = dumpcore.Header(domain.hvm, domain.width, contexts, domain.shared_info(), domain.saved_by or (0, 0))
    core = dumpcore.core(job.pages, header, None if machine is None else machine.mfns_of)
    yield from _written(out, core, job, None if machine is None else machine.localised)
    if machine is not None and machine.lost:
        job.remark(f"{machine.lost} pages have no mfn in its p2m: the core says so")


def _kdump(job: _Job, out: Output) -> Iterator[int]:
    pages, identity = job.pages, job.identity
    described = notes.of_vcpus(job.registers, job.domain.width) + notes.vmcoreinfo(job.text)
    vcpus = max((vcpu + 1 for vcpu, known in job.registers.items() if known is not None), default=0)
    if identity is not None:
        described += identity.note()
        own = Runs(np.array([identity.first], np.uint64), np.array([identity.pages], np.int64))
        pages = Runs.concatenate([pages, own]).merged()
    try:
        phys_base = int(value(job.text or b"", "NUMBER(phys_base)") or "0")
    except ValueError:
        phys_base = 0
    header = kdump.Header(described, job.text, vcpus, job.uts, job.compression, phys_base % (1 << 64))

    def contents() -> Iterator[U8]:
        yield from job.contents()(job.pages)
        for some in identity.content() if identity is not None else ():
            yield np.frombuffer(some, np.uint8).reshape(-1, PAGE_SIZE)

    return write_kdump(out, header, pages, contents())


def _written(
    out: Output, pieces: Iterable[Piece], job: _Job, change: Callable[[U64, U8], U8] | None = None
) -> Iterator[int]:
    """Write all pieces in order; how many pages are done, now and then.

    While one batch of pages goes out to a file, the next is read.
    """
    contents = job.contents(change)
    done = 0
    with BackgroundWorker() as worker:
        for piece in pieces:
            if isinstance(piece, Runs):
                for content in contents(piece):
                    put = partial(_put, out, content, job.exported)
                    worker.submit(put) if out.is_regular_file else put()
                    done += len(content)
                    yield done
                continue
            worker.wait()
            if isinstance(piece, Hole):
                out.skip(piece.length)
            else:
                out.write([piece])


def _put(out: Output, content: U8, exported: Exported) -> None:
    """Pages, those of zeros as holes."""
    full = filled(content)
    exported.zeros += len(full) - int(np.count_nonzero(full))
    cuts = np.flatnonzero(np.append(True, full[1:] != full[:-1])).tolist()
    for first, end in zip(cuts, [*cuts[1:], len(full)], strict=True):
        if full[first]:
            out.write([content[first:end].reshape(-1).data])
        else:
            out.skip((end - first) * PAGE_SIZE)


FORMATS: dict[str, Callable[[_Job, Output], Iterator[int]]] = {
    "elf": _elf,
    "lime": _lime,
    "raw": _raw,
    "dumpcore": _dumpcore,
    "kdump": _kdump,
}
