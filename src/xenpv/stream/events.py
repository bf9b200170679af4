"""What a Reader says: headers of every layer, records, and page content."""

from __future__ import annotations

from dataclasses import dataclass, field

from xenpv.frames import U8
from xenpv.stream.envelope import Envelope, Section
from xenpv.stream.order import Guest
from xenpv.stream.records import PageData, Record


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

    ``data`` is uint8 of shape (n, 4096), valid until the next call of the reader; ``offset`` the first byte's.
    """

    offset: int
    record: PageData
    first: int
    data: U8 = field(repr=False)
    name = "pages"


Event = Envelope | SectionHeader | LibxlHeader | ImageHeader | DomainHeader | Record | Pages
