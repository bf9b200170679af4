"""A domain's memory written in a format that other tools read: src/xenpv/export says what goes where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from xenpv.domain.behind import Behind
from xenpv.domain.input import Progress
from xenpv.domain.output import Output
from xenpv.domain.source import SavedDomain
from xenpv.errors import RequestError
from xenpv.export import elf, notes
from xenpv.export.content import Hole, Pages, Piece
from xenpv.export.identity import Identity
from xenpv.export.mapped import direct_map, kernel_maps
from xenpv.frames import PAGE_SIZE, U8, Mask
from xenpv.memory.domain import Domain
from xenpv.memory.p2m import reading
from xenpv.memory.registers import Registers
from xenpv.memory.vmcoreinfo import find_vmcoreinfo

_BATCH = 1024  # pages: 4 MiB


@dataclass
class Exported:
    """What was written: pages, bytes of the file (holes counted), pages of zeros that took no room, pages that could
    not be read and are zeros; and what a reader should know of it, a sentence each.
    """

    pages: int = 0
    bytes: int = 0
    zeros: int = 0
    lost: int = 0
    remarks: list[str] = field(default_factory=list)


def export(domain: Domain, path: str, form: str, *, progress: Progress | None = None) -> Exported:
    """Write a domain's memory to ``path`` ("-" is standard output) in one of FORMATS.

    The file has its name only when it is whole. Raises RequestError for what the format cannot hold, OSError for the
    file.
    """
    exported = Exported()
    pages = _content(domain)
    if not len(pages.first):
        raise RequestError(f"{domain.name}: has no pages that could be exported")
    with Output.open(path) as out:
        for done in _written(out, domain, FORMATS[form](domain, pages, exported), exported):
            if progress is not None:
                progress(done * PAGE_SIZE, pages.total * PAGE_SIZE)
    exported.pages, exported.bytes = pages.total, out.written
    return exported


def _content(domain: Domain) -> Pages:
    """The pages that have content; of a file that was cut off, those before its end."""
    pages = Pages.of(domain.extents())
    if isinstance(domain, SavedDomain) and domain.error is not None:
        kept = [domain.frames.kept(pfns) for pfns in pages.batches(1 << 20)]
        pages = pages.where(np.concatenate([*kept, np.empty(0, np.bool_)]))
    return pages


def _elf(domain: Domain, pages: Pages, exported: Exported) -> Iterable[Piece]:
    text = find_vmcoreinfo(domain)
    if text is None:
        exported.remarks.append("no VMCOREINFO was found in its memory: not Linux, or not one that debuggers know")
    registers = _registers(domain)
    if not any(registers.values()):
        exported.remarks.append("no vcpu's registers are known")
    direct = direct_map(domain, pages)
    described = notes.of_vcpus(registers, domain.width) + notes.vmcoreinfo(text)
    mapped = kernel_maps(domain, pages, direct)
    identity = None if domain.hvm or domain.width == 4 else Identity.of(pages)
    return elf.core(pages, described, domain.width, direct=direct, mapped=mapped, identity=identity)


def _registers(domain: Domain) -> dict[int, Registers | None]:
    return {vcpu: domain.registers(vcpu) for vcpu in domain.vcpus}


def _written(out: Output, domain: Domain, pieces: Iterable[Piece], exported: Exported) -> Iterator[int]:
    """Write all pieces in order; how many pages are done, now and then.

    While one batch of pages goes out to a file, the next is read.
    """
    read = reading(domain.frames)
    done = 0
    with Behind() as behind:
        for piece in pieces:
            if isinstance(piece, Pages):
                for pfns in piece.batches(_BATCH):
                    content, readable = read(pfns)
                    exported.lost += len(pfns) - int(np.count_nonzero(readable))
                    put = partial(_put, out, content, exported)
                    behind.do(put) if out.regular else put()
                    done += len(pfns)
                    yield done
                continue
            behind.wait()
            if isinstance(piece, Hole):
                out.skip(piece.length)
            else:
                out.write([piece])


def _put(out: Output, content: U8, exported: Exported) -> None:
    """Pages, those of zeros as holes."""
    words = content.view(np.uint64)
    full: Mask = np.asarray(words[:, :4].any(axis=1))  # most show at once that they are none of zeros
    full[~full] = words[~full].any(axis=1)
    exported.zeros += len(full) - int(np.count_nonzero(full))
    cuts = np.flatnonzero(np.append(True, full[1:] != full[:-1])).tolist()
    for first, end in zip(cuts, [*cuts[1:], len(full)], strict=True):
        if full[first]:
            out.write([content[first:end].reshape(-1).data])
        else:
            out.skip((end - first) * PAGE_SIZE)


FORMATS: dict[str, Callable[[Domain, Pages, Exported], Iterable[Piece]]] = {"elf": _elf}
