"""Page deltas of the legacy Remus format.

A delta holds what changed since a page was last sent.

xen.git:tools/libxc/xc_compression.c (until Xen 4.5), xg_save_restore.h "Format of compressed data". A page begins with
a byte: EMPTY_PAGE, nothing changed; FULL_PAGE, all of it follows. Otherwise it is runs of 4-byte words until the page
is full. A byte before each run holds the number of its words, and SKIP_FLAG if the run did not change. Words that
changed follow that byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from xenpv.abi.x86 import PAGE_SIZE
from xenpv.stream.fields import Buffer

EMPTY_PAGE = 0x00
FULL_PAGE = 0x80
SKIP_FLAG = 0x80
LENGTH_MASK = 0x7F
_WORD = 4


class MalformedDelta(ValueError):
    """No sender makes such a page. ``offset``: where in the data."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


class Change(NamedTuple):
    """Bytes of a page that changed.

    Offset of the new bytes in the data, offset in the page, and how many.
    """

    data_offset: int
    page_offset: int
    length: int


def changes(data: Buffer, offset: int) -> Iterator[Change]:
    """Yield the changes of the page that begins at byte ``offset``.

    The last change is empty, where the next page begins.

    Raises:
        MalformedDelta: no sender makes such a page.
        EOFError: the data ends within the page.
    """
    end = len(data)
    if offset >= end:
        raise EOFError
    if data[offset] == EMPTY_PAGE:
        yield Change(offset + 1, 0, 0)
        return
    if data[offset] == FULL_PAGE:
        if offset + 1 + PAGE_SIZE > end:
            raise EOFError
        yield Change(offset + 1, 0, PAGE_SIZE)
        yield Change(offset + 1 + PAGE_SIZE, 0, 0)
        return
    page_offset = 0
    while page_offset < PAGE_SIZE:
        if offset >= end:
            raise EOFError
        run = data[offset]
        length = (run & LENGTH_MASK) * _WORD
        offset += 1
        if not length or page_offset + length > PAGE_SIZE:
            raise MalformedDelta(f"a run of {length} bytes at byte {page_offset:#x} of a page", offset - 1)
        if not run & SKIP_FLAG:
            if offset + length > end:
                raise EOFError
            yield Change(offset, page_offset, length)
            offset += length
        page_offset += length
    yield Change(offset, 0, 0)


def page_ends(data: Buffer, count: int) -> list[int]:
    """Return where each of the first ``count`` pages in the data ends.

    A last page that is not whole is left out.

    Raises:
        MalformedDelta: no sender makes such a page.
    """
    ends: list[int] = []
    offset = 0
    while len(ends) < count and offset < len(data):
        try:
            for change in changes(data, offset):
                following = change.data_offset + change.length
        except EOFError:
            break
        offset = following
        ends.append(offset)
    return ends


def is_full_page(data: Buffer, offset: int) -> bool:
    """Return whether the page that begins there needs no earlier content."""
    return data[offset] == FULL_PAGE


def apply_changes(data: Buffer, offset: int, page: memoryview) -> None:
    """Apply the changes of the page at byte ``offset`` to its earlier content.

    ``page`` holds the earlier content.
    """
    for start, page_offset, length in changes(data, offset):
        page[page_offset : page_offset + length] = data[start : start + length]
