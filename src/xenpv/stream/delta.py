"""Pages as Remus sends them in the legacy format: what has changed since a page was last sent.

xen.git:tools/libxc/xc_compression.c (until Xen 4.5), xg_save_restore.h "Format of compressed data". A page begins with
a byte: 0, nothing has changed; 0x80, all of it follows; else it is runs of words of 4 bytes, each behind a byte with
their number, that are put in place (bit 7 clear) or passed over (bit 7 set), until the page is full.
"""

from __future__ import annotations

from collections.abc import Iterator

from xenpv.abi.x86 import PAGE_SIZE
from xenpv.stream.fields import Buffer

SAME = 0x00
WHOLE = 0x80
_SKIP = 0x80
_WORD = 4


class Damaged(ValueError):
    """No page is made so. ``at`` is how far into the data."""

    def __init__(self, message: str, at: int) -> None:
        super().__init__(message)
        self.at = at


def runs(data: Buffer, at: int) -> Iterator[tuple[int, int, int]]:
    """The page that begins at byte ``at``: for each run of bytes that change, where in the data they are, where in the
    page, and how many. The last one says where the next page begins: it has no bytes.

    Raises Damaged, and EOFError when the data ends first.
    """
    end, head = len(data), data[at : at + 1]
    if not head:
        raise EOFError
    at += 1
    if head[0] == SAME:
        yield at, 0, 0
        return
    if head[0] == WHOLE:
        if at + PAGE_SIZE > end:
            raise EOFError
        yield at, 0, PAGE_SIZE
        yield at + PAGE_SIZE, 0, 0
        return
    at, place = at - 1, 0
    while place < PAGE_SIZE:
        if at >= end:
            raise EOFError
        mark = data[at]
        length = (mark & ~_SKIP) * _WORD
        at += 1
        if not length or place + length > PAGE_SIZE:
            raise Damaged(f"a run of {length} bytes at byte {place} of a page", at - 1)
        if not mark & _SKIP:
            if at + length > end:
                raise EOFError
            yield at, place, length
            at += length
        place += length
    yield at, 0, 0


def ends(data: Buffer, most: int) -> list[int]:
    """Where each page of the data ends, of ``most`` pages at most; a last one that is not whole is left out.

    Raises Damaged.
    """
    out: list[int] = []
    at = 0
    while len(out) < most and at < len(data):
        try:
            for start, _, length in runs(data, at):
                following = start + length
        except EOFError:
            break
        at = following
        out.append(at)
    return out


def whole(data: Buffer, at: int) -> bool:
    """Whether the page that begins there needs nothing of what was sent before."""
    return data[at] == WHOLE


def apply(data: Buffer, at: int, page: memoryview) -> None:
    """Make a page, which holds what was sent before, what the one that begins there says."""
    for start, place, length in runs(data, at):
        page[place : place + length] = data[start : start + length]
