"""The events of a Reader: headers of every layer, records, and page content."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xenpv.abi.x86 import PAGE_SIZE
from xenpv.stream.envelope import Envelope, Section
from xenpv.stream.framing import Record
from xenpv.stream.page_data import PageData
from xenpv.stream.record_order import Guest

if TYPE_CHECKING:
    from xenpv.frames import U8


@dataclass(frozen=True, slots=True)
class LibxlHeader:
    """The libxl stream's header; ``options``: libxl.OPTION_*."""

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
    """The libxc domain header: PV or HVM, and the version of Xen that saved.

    0.n is a converted legacy stream.
    """

    offset: int
    guest: Guest
    xen_major: int
    xen_minor: int
    name = "domain header"


@dataclass(frozen=True, slots=True)
class SectionHeader:
    """The header of a section of a xenopsd suspend image.

    ``data`` is the xenops record, empty for other sections.
    """

    offset: int
    section: Section
    length: int
    data: bytes = field(default=b"", repr=False)

    @property
    def name(self) -> str:
        """The name that findings and listings call it."""
        return f"{self.section} section"


@dataclass(frozen=True, slots=True)
class PageContent:
    """Content of consecutive pages of a PAGE_DATA record.

    Attributes:
        offset: of the first page's content.
        record: the record.
        first: number of the first page, among those of the record that have content.
        raw: the bytes of all pages.
    """

    offset: int
    record: PageData
    first: int
    raw: memoryview = field(repr=False)
    name = "pages"

    @property
    def data(self) -> U8:
        """The pages, uint8 of shape (n, 4096), without copying."""
        import numpy as np  # noqa: PLC0415  as in records.py

        return np.frombuffer(self.raw, np.uint8).reshape(-1, PAGE_SIZE)


@dataclass(frozen=True, slots=True)
class SkippedPageData:
    """PAGE_DATA records in a row that the caller knows, and that the reader skips.

    Attributes:
        offset: of the first record's header.
        size: bytes of all records, with headers and padding.
        length: bytes of all bodies, without padding.
        count: how many records.
        pages: pages with content in them.
    """

    offset: int
    size: int
    length: int
    count: int
    pages: int
    name = "PAGE_DATA"


@dataclass(frozen=True, slots=True)
class PageDeltas:
    """Pages of a legacy stream, as changes since they were last sent.

    delta.py has the format.

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
    Envelope
    | SectionHeader
    | LibxlHeader
    | ImageHeader
    | DomainHeader
    | Record
    | PageContent
    | SkippedPageData
    | PageDeltas
)
