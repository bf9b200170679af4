"""PAGE_DATA: pfns and types of pages, and where their content begins.

PAGE_DATA records are most of a stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Self

from xenpv.abi.domctl import PageType
from xenpv.abi.x86 import PAGE_SIZE
from xenpv.stream import rules
from xenpv.stream.fields import Fields, RecordContext, byteswap_words
from xenpv.stream.framing import RECORD_LENGTH_MAX, Record
from xenpv.stream.record_order import RecordType

if TYPE_CHECKING:
    from xenpv.frames import U8, U64, Mask

PFN_MASK = (1 << 52) - 1
RESERVED_MASK = ((1 << 60) - 1) & ~PFN_MASK
TYPE_SHIFT = 60

# Sets of the topmost byte of a PAGE_DATA entry: its type and four reserved bits. bytes.translate() deletes a set.
_TOP_KNOWN = bytes(top for top in range(256) if top >> 4 in set(PageType))
_TOP_WITH_DATA = bytes(top for top in _TOP_KNOWN if top >> 4 < PageType.BROKEN)
_LANES = 1024  # entries that are checked as one number: a record of libxenguest has as many

ReadInto = Callable[[memoryview], object]
"""read_into(buffer): fill the buffer with the next bytes of a record's page content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageData(Record):
    """PAGE_DATA without its page content.

    Attributes:
        raw: the entries, little-endian: type in bits 63 to 60, pfn in bits 51 to 0.
        pages: how many entries have content.
        pages_offset: offset of the first page; the pages of all entries with content follow each other.
    """

    TYPE = RecordType.PAGE_DATA
    LENGTH = range(16, RECORD_LENGTH_MAX + 1)
    FIELDS = Fields(count=4, _reserved=4)
    raw: bytes = field(repr=False)
    pages: int
    pages_offset: int

    @property
    def size_matches(self) -> bool:
        """Whether its length fits its pages.

        Otherwise it is unknown which content belongs to which pfn.
        """
        return self.length == 8 + len(self.raw) + self.pages * PAGE_SIZE

    @property
    def entries(self) -> U64:
        """The entries, uint64 of shape (n,)."""
        import numpy as np  # noqa: PLC0415

        return np.frombuffer(self.raw, "<u8")

    @property
    def pfns(self) -> U64:
        """The pfn of each entry, uint64."""
        entries = self.entries
        return entries & entries.dtype.type(PFN_MASK)

    @property
    def types(self) -> U8:
        """The page type of each entry, uint8."""
        entries = self.entries
        return (entries >> entries.dtype.type(TYPE_SHIFT)).astype("u1")

    @property
    def has_data(self) -> Mask:
        """Which entries have content."""
        from xenpv.frames import HAS_DATA  # noqa: PLC0415

        return HAS_DATA[self.types]

    @classmethod
    def parse_entries(
        cls, ctx: RecordContext, body: memoryview, *, offset: int, length: int, pages_offset: int
    ) -> Self:
        """Check one or more entries, and make the record of them.

        Checked are types, pfns against the p2m, and the page count against the length.
        """
        raw = byteswap_words(body) if ctx.byte_order == ">" else bytes(body)
        tops = raw[7::8]
        pages = len(tops) - len(tops.translate(None, _TOP_WITH_DATA))
        record = cls(offset=offset, length=length, raw=raw, pages=pages, pages_offset=pages_offset)
        if not record.size_matches:
            sizes = f"8 + {len(raw)} + {pages} pages = {8 + len(raw) + pages * PAGE_SIZE}"
            ctx.report(rules.PAGE_SIZE_MATCH, f"PAGE_DATA record wrong size: length {length}, expected {sizes}")
        if tops.translate(None, _TOP_KNOWN):
            index = next(i for i, top in enumerate(tops) if top not in _TOP_KNOWN)
            message = f"Unknown type {tops[index] >> 4:#x} for pfn {_entry(raw, index) & PFN_MASK:#x} (index {index})"
            ctx.report(rules.PAGE_TYPE, message)
        if len(raw) <= _LANES * 8 or not record._all_valid(ctx.max_pfn):
            for first in range(0, len(raw), _LANES * 8):
                _check_lanes(ctx, raw[first : first + _LANES * 8], first // 8)
        return record

    def _all_valid(self, max_pfn: int | None) -> bool:
        """Return whether all pfns and reserved bits are valid.

        It uses NumPy, because records of memory without content are long.
        """
        entries = self.entries
        return not (entries & entries.dtype.type(RESERVED_MASK)).any() and (
            max_pfn is None or int(self.pfns.max()) <= max_pfn
        )


def _entry(raw: bytes, index: int) -> int:
    return int.from_bytes(raw[index * 8 : index * 8 + 8], "little")


@lru_cache(maxsize=32)
def _lanes(value: int, count: int) -> int:
    """Return ``count`` 64-bit lanes of one value, as one number."""
    return int.from_bytes(value.to_bytes(8, "little") * count, "little")


def _check_lanes(ctx: RecordContext, raw: bytes, first: int) -> None:
    """Report the first reserved bit and the first pfn beyond the domain's end.

    It checks up to 1024 entries.

    A loop in Python over a terabyte's entries takes minutes, so one number holds all lanes. The limit has bit 63 set in
    each lane: no lane borrows from the next, and that bit stays set exactly where the limit is not exceeded.

    Args:
        ctx: takes the reports.
        raw: the entries, little-endian.
        first: index of the first one in its record, for the report.
    """
    count = len(raw) // 8
    number = int.from_bytes(raw, "little")
    within = _lanes(1 << 63, count)
    only_notab = raw[7::8].count(0) == count  # as in most records: the entries are the pfns
    if only_notab and ctx.max_pfn is not None and (_lanes(ctx.max_pfn | 1 << 63, count) - number) & within == within:
        return
    if number & _lanes(RESERVED_MASK, count):
        index = next(i for i in range(count) if _entry(raw, i) & RESERVED_MASK)
        message = f"reserved bits set in pfn[{first + index}]: {_entry(raw, index) & RESERVED_MASK:#x}"
        ctx.report(rules.RESERVED, message)
    if ctx.max_pfn is None:
        return
    if (_lanes(ctx.max_pfn | 1 << 63, count) - (number & _lanes(PFN_MASK, count))) & within != within:
        index = next(i for i in range(count) if _entry(raw, i) & PFN_MASK > ctx.max_pfn)
        message = (
            f"pfn {_entry(raw, index) & PFN_MASK:#x} (index {first + index}) outside domain maximum {ctx.max_pfn:#x}"
        )
        ctx.report(rules.PAGE_RANGE, message)
