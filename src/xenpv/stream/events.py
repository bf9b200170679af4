"""What a Reader says: headers of every layer, records, and page content."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xenpv.abi.x86 import PAGE_SIZE
from xenpv.stream.envelope import Envelope, Section
from xenpv.stream.framing import Record
from xenpv.stream.order import Guest
from xenpv.stream.pagedata import PageData

if TYPE_CHECKING:
    from xenpv.frames import U8


@dataclass(frozen=True, slots=True)
class LibxlHeader:
    """The libxl stream's header; ``options`` as in the specification."""

    offset: int
    version: int
    options: int
    name = "libxl header"


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """The libxc image header."""

    offset: int
    version: int
    big_endian: bool
    name = "image header"


@dataclass(frozen=True, slots=True)
class DomainHeader:
    """The libxc domain header: PV or HVM, and the version of Xen that saved (0.n: converted from the legacy format)."""

    offset: int
    guest: Guest
    xen_major: int
    xen_minor: int
    name = "domain header"


@dataclass(frozen=True, slots=True)
class SectionHeader:
    """The header of a section of a xenopsd suspend image."""

    offset: int
    section: Section
    length: int
    data: bytes = field(default=b"", repr=False)

    @property
    def name(self) -> str:
        return f"{self.section} section"


@dataclass(frozen=True, slots=True)
class Pages:
    """Content of pages ``first`` and following (counted among those with content) of a PAGE_DATA record.

    ``raw`` is their bytes, ``offset`` where the first one is.
    """

    offset: int
    record: PageData
    first: int
    raw: memoryview = field(repr=False)
    name = "pages"

    @property
    def data(self) -> U8:
        """The pages, uint8 of shape (n, 4096), without a copy."""
        import numpy as np  # noqa: PLC0415  as in records.py

        return np.frombuffer(self.raw, np.uint8).reshape(-1, PAGE_SIZE)


@dataclass(frozen=True, slots=True)
class SkippedPageData:
    """PAGE_DATA records one behind the other that a caller knows, and has passed over: ``count`` records that take
    ``size`` bytes of the stream, with bodies of ``length`` bytes and ``pages`` pages in all.
    """

    offset: int
    size: int
    length: int
    count: int
    pages: int
    name = "PAGE_DATA"


@dataclass(frozen=True, slots=True)
class PageDeltas:
    """Pages of a legacy stream, as what changed in them since they were last sent (delta.py).

    Attributes:
        raw: entries as in PAGE_DATA, little-endian.
        ends: for each page with content, where it ends in ``data``; the first begins at byte 0.
        data: the deltas.
    """

    offset: int
    raw: bytes = field(repr=False)
    ends: list[int] = field(repr=False)
    data: bytes = field(repr=False)
    name = "compressed pages"


Event = (
    Envelope | SectionHeader | LibxlHeader | ImageHeader | DomainHeader | Record | Pages | SkippedPageData | PageDeltas
)
