"""VMCOREINFO: the lines by which a Linux kernel says where its own things are, found in a domain's memory.

A debugger of a crashed kernel gets them as an ELF note. A running kernel keeps them in memory all the time, as text and
as that note (Linux: kernel/crash_core.c, vmcoreinfo_data and vmcoreinfo_note), in pages that nothing outside of the
kernel points at. So all pages are looked through for the text, which begins on a multiple of 8 in both of them: in
Linux from 4.12 on the text has a page for itself, before that they were arrays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from xenpv.errors import XenPVError
from xenpv.frames import HAS_DATA, IS_TABLE, PAGE_SIZE, PAGES_PER_BATCH, U8, U64
from xenpv.memory.domain import PagedDomain

LONGEST = PAGE_SIZE  # VMCOREINFO_BYTES
_FIRST = np.frombuffer(b"OSRELEAS", np.uint64)[0]
_TEXT = re.compile(rb"OSRELEASE=[^\n]+\n(?:[\x20-\x7e]+\n)*\Z")
_ALWAYS = (b"\nPAGESIZE=", b"\nSYMBOL(swapper_pg_dir)=")
_MOST = 1024  # places looked at: a guest may fill its memory with what is none
_NEW_UTSNAME = 6 * 65  # bytes of struct new_utsname: a kernel's release is in there


class Search:
    """Looks for the text in pages as they are shown to it, of whatever order: who reads all of a domain's memory anyway
    has it looked through on the way.

    Anybody in the guest can write such lines into memory. So a text is taken for the kernel's own when the kernel's
    uts name, at the virtual address that it tells, has its release; where none does, or virtual memory cannot be read,
    it is the one in the highest page.
    """

    def __init__(self, domain: PagedDomain) -> None:
        self._domain = domain
        self._left = _MOST
        self._highest = -1
        self.text: bytes | None = None  # lines of "KEY=value"; None as long as no page had it
        self.ended = False  # whether more pages would change nothing

    def look(self, pfns: U64, pages: U8) -> None:
        """Look through some pages, uint8 (n, 4096)."""
        if self.ended:
            return
        places = pages.view(np.uint64) == _FIRST
        if not places.any():  # which is told ten times as fast as that there are no places
            return
        rows, words = np.nonzero(places)
        for row, word in zip(rows[: self._left].tolist(), words[: self._left].tolist(), strict=True):
            pfn = int(pfns[row])
            text = _text(self._domain, pages[row], pfn, word * 8)
            if text and _is_own(self._domain, text):
                self.text, self.ended = text, True
                return
            if text and pfn > self._highest:
                self.text, self._highest = text, pfn
        self._left -= len(rows)
        self.ended = self._left <= 0


def find_vmcoreinfo(domain: PagedDomain) -> bytes | None:
    """The text, looked for in all pages; None where no page has it: no Linux, or none that says so."""
    search = Search(domain)
    for pfns in _batches(domain):
        for here, pages in _readable(domain, pfns):
            search.look(here, pages)
            if search.ended:
                return search.text
    return search.text


def value(text: bytes, key: str) -> str | None:
    """What the text says of a key such as "NUMBER(phys_base)"; None where it says nothing."""
    for line in text.split(b"\n"):
        name, equals, what = line.partition(b"=")
        if equals and name == key.encode():
            return what.decode("ascii", "replace")
    return None


def _text(domain: PagedDomain, page: U8, pfn: int, offset: int) -> bytes | None:
    """The text from an offset in a page on, which may go on in the next pfn."""
    text, ends, _ = page.tobytes()[offset:].partition(b"\0")
    if not ends:
        try:
            more = domain.frames.pages(np.array([pfn + 1], np.uint64)).tobytes()
        except XenPVError:
            more = b""
        text = (text + more)[:LONGEST].partition(b"\0")[0]
    is_one = _TEXT.match(text) and all(line in text for line in _ALWAYS)
    return text if is_one else None


def _is_own(domain: PagedDomain, text: bytes) -> bool:
    release = text[len(b"OSRELEASE=") :].partition(b"\n")[0]
    try:
        at = int(value(text, "SYMBOL(init_uts_ns)") or "", 16)
        offset = int(value(text, "OFFSET(uts_namespace.name)") or "0")
        return release in domain.memory.read_virtual(at + offset, _NEW_UTSNAME).split(b"\0")
    except (XenPVError, ValueError):
        return False


def _batches(domain: PagedDomain) -> Iterator[U64]:
    """The pfns of all pages that have content and are no page tables, so many at a time, those of the highest first:
    Linux takes what it asks for as it starts from the end of its memory.
    """
    waiting: list[U64] = []
    count = 0
    for extents in reversed(list(domain.extents())):
        wanted = np.flatnonzero(HAS_DATA[extents.type] & ~IS_TABLE[extents.type])[::-1]
        for start, pages in zip(extents.first[wanted].tolist(), extents.pages[wanted].tolist(), strict=True):
            for end in range(start + pages, start, -PAGES_PER_BATCH):
                waiting.append(np.arange(max(end - PAGES_PER_BATCH, start), end, dtype=np.uint64))
                count += len(waiting[-1])
                if count >= PAGES_PER_BATCH:
                    yield np.concatenate(waiting)
                    waiting, count = [], 0
    if waiting:
        yield np.concatenate(waiting)


def _readable(domain: PagedDomain, pfns: U64) -> Iterator[tuple[U64, U8]]:
    """Those of some pages that can be read, in pieces: a file may end before the rest, a guest give one back."""
    try:
        pages = domain.frames.pages(pfns)
    except XenPVError:
        if len(pfns) > 1:
            half = len(pfns) // 2
            yield from _readable(domain, pfns[:half])
            yield from _readable(domain, pfns[half:])
    else:
        yield pfns, pages
