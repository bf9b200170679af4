"""Domains to export, and where the files go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tests.support.writers.build import pv_domain
from tests.support.writers.domain import Domain
from tests.support.writers.vmcoreinfo import text
from xenpv.abi.declare import Width
from xenpv.export.export import Exported, export
from xenpv.frames import ABSENT, I64, U8, U64, PageType
from xenpv.runs import Extents
from xenpv.source.open import FileDomain, open_path

PAGE = 4096
HOLE = 80
FAR = 0x12_3456  # beyond 4 GiB
PFNS = [*range(HOLE), *range(HOLE + 1, 99), FAR, FAR + 1]


def made_domain(width: Width = 8) -> Domain:
    """A PV domain with holes, a page of zeros and VMCOREINFO."""
    domain = pv_domain(width=width, pfns=PFNS, vcpus=2)
    at = domain.places
    domain.pages[at.data[0]][:] = text(0, top=domain.vaddrs[at.top]).ljust(PAGE, b"\0")
    domain.pages[at.data[1]][:] = bytes(PAGE)
    return domain


@contextmanager
def open_made(domain: Domain, folder: Path) -> Iterator[FileDomain]:
    path = folder / "made.save"
    path.write_bytes(domain.to_bytes())
    with open_path(str(path)) as kept:
        yield kept


def export_domain(domain: Domain, folder: Path, form: str, compression: str = "zlib") -> tuple[Path, Exported]:
    """The domain, saved and exported."""
    out = folder / f"out.{form}"
    with open_made(domain, folder) as kept:
        return out, export(kept, str(out), form, compression=compression)


class Sparse:
    """Frames of zeros at so many places: one in two pfns, of which a page says its number."""

    def __init__(self, pages: int) -> None:
        self.pages_there = pages

    def types(self, pfns: U64) -> U8:
        there = (pfns % 2 == 0) & (pfns < np.uint64(2 * self.pages_there))
        return np.where(there, np.uint8(PageType.NOTAB), np.uint8(ABSENT))

    def pages(self, pfns: U64) -> U8:
        out = np.zeros((len(pfns), PAGE), np.uint8)
        out.view(np.uint64)[:, 0] = pfns
        return out

    def extents(self) -> Iterator[Extents]:
        first = np.arange(self.pages_there, dtype=np.uint64) * np.uint64(2)
        one: I64 = np.ones(self.pages_there, np.int64)
        yield Extents(first, one, np.zeros(self.pages_there, np.uint8))
