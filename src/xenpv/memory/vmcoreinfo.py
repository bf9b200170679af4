"""Finding VMCOREINFO in a domain's memory.

VMCOREINFO is the lines in which a Linux kernel describes itself to debuggers.

A debugger of a crashed kernel gets them as an ELF note. A running kernel always keeps them in memory, as text and as
that note (Linux: kernel/crash_core.c, vmcoreinfo_data and vmcoreinfo_note), in pages that nothing outside of the kernel
points at. So all pages are searched for the text. It begins at a multiple of 8: from Linux 4.12 on it has a page of its
own, before that it was an array.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from xenpv.errors import GuestError
from xenpv.frames import HAS_DATA, IS_TABLE, PAGE_SIZE, PAGES_PER_BATCH, U8, U64
from xenpv.memory.domain import PagedDomain

VMCOREINFO_BYTES = PAGE_SIZE  # the most that the text has (Linux: include/linux/crash_core.h)
_FIRST_WORD = np.frombuffer(b"OSRELEAS", np.uint64)[0]
_TEXT = re.compile(rb"OSRELEASE=[^\n]+\n(?:[\x20-\x7e]+\n)*\Z")
_REQUIRED_LINES = (b"\nPAGESIZE=", b"\nSYMBOL(swapper_pg_dir)=")
_CANDIDATES_MAX = 1024  # places examined: a guest may fill its memory with false ones
_NEW_UTSNAME = 6 * 65  # bytes of struct new_utsname, which has the kernel's release


class VmcoreinfoSearch:
    """Searches pages for the text, in any order of arrival.

    The caller passes the pages that it reads anyway.

    Any program in the guest can write such lines. A text is the kernel's own if the kernel's uts name, at the
    virtual address in the text, has the same release. If none is, or virtual memory cannot be read, the text in the
    highest page counts.

    Attributes:
        text: lines of "KEY=value", None while no page had them.
        finished: whether more pages would change nothing.
    """

    def __init__(self, domain: PagedDomain) -> None:
        self._domain = domain
        self._candidates_left = _CANDIDATES_MAX
        self._highest_pfn = -1
        self.text: bytes | None = None
        self.finished = False

    def add_pages(self, pfns: U64, pages: U8) -> None:
        """Search pages, uint8 of shape (n, 4096)."""
        if self.finished:
            return
        candidates = pages.view(np.uint64) == _FIRST_WORD
        if not candidates.any():  # ten times as fast as nonzero()
            return
        rows, words = np.nonzero(candidates)
        for row, word in zip(
            rows[: self._candidates_left].tolist(), words[: self._candidates_left].tolist(), strict=True
        ):
            pfn = int(pfns[row])
            text = _text_at(self._domain, pages[row], pfn, word * 8)
            if text and _is_kernels_own(self._domain, text):
                self.text, self.finished = text, True
                return
            if text and pfn > self._highest_pfn:
                self.text, self._highest_pfn = text, pfn
        self._candidates_left -= len(rows)
        self.finished = self._candidates_left <= 0


def find_vmcoreinfo(domain: PagedDomain) -> bytes | None:
    """Search all pages and return the text; None if no page has it.

    Then the guest is not Linux, or a Linux without it.
    """
    search = VmcoreinfoSearch(domain)
    for pfns in _batches(domain):
        for readable_pfns, pages in _read_readable(domain, pfns):
            search.add_pages(readable_pfns, pages)
            if search.finished:
                return search.text
    return search.text


def vmcoreinfo_value(text: bytes, key: str) -> str | None:
    """Return the value of a key in the text, None if it has no such key.

    A key is, for example, "NUMBER(phys_base)".
    """
    for line in text.split(b"\n"):
        name, equals, vmcoreinfo_value = line.partition(b"=")
        if equals and name == key.encode():
            return vmcoreinfo_value.decode("ascii", "replace")
    return None


def _text_at(domain: PagedDomain, page: U8, pfn: int, offset: int) -> bytes | None:
    """Return the text at an offset in a page; None if it is not VMCOREINFO.

    The text may continue in the next pfn.
    """
    text, terminator, _ = page.tobytes()[offset:].partition(b"\0")
    if not terminator:
        try:
            next_page = domain.frames.pages(np.array([pfn + 1], np.uint64)).tobytes()
        except GuestError:
            next_page = b""
        text = (text + next_page)[:VMCOREINFO_BYTES].partition(b"\0")[0]
    is_vmcoreinfo = _TEXT.match(text) and all(line in text for line in _REQUIRED_LINES)
    return text if is_vmcoreinfo else None


def _is_kernels_own(domain: PagedDomain, text: bytes) -> bool:
    release = text[len(b"OSRELEASE=") :].partition(b"\n")[0]
    try:
        init_uts_ns = int(vmcoreinfo_value(text, "SYMBOL(init_uts_ns)") or "", 16)
        offset = int(vmcoreinfo_value(text, "OFFSET(uts_namespace.name)") or "0")
        return release in domain.memory.read_virtual(init_uts_ns + offset, _NEW_UTSNAME).split(b"\0")
    except (GuestError, ValueError):
        return False


def _batches(domain: PagedDomain) -> Iterator[U64]:
    """Iterate over the pfns of all pages with content, but not page tables.

    They come in batches, the highest first.

    What Linux allocates as it starts lies at the end of its memory.
    """
    batch: list[U64] = []
    count = 0
    for extents in reversed(list(domain.extents())):
        rows = np.flatnonzero(HAS_DATA[extents.type] & ~IS_TABLE[extents.type])[::-1]
        for start, pages in zip(extents.first[rows].tolist(), extents.pages[rows].tolist(), strict=True):
            for end in range(start + pages, start, -PAGES_PER_BATCH):
                batch.append(np.arange(max(end - PAGES_PER_BATCH, start), end, dtype=np.uint64))
                count += len(batch[-1])
                if count >= PAGES_PER_BATCH:
                    yield np.concatenate(batch)
                    batch, count = [], 0
    if batch:
        yield np.concatenate(batch)


def _read_readable(domain: PagedDomain, pfns: U64) -> Iterator[tuple[U64, U8]]:
    """Read those pages that can be read, in pieces.

    A file may be cut off, and a guest may give a page back.
    """
    try:
        pages = domain.frames.pages(pfns)
    except GuestError:
        if len(pfns) > 1:
            half = len(pfns) // 2
            yield from _read_readable(domain, pfns[:half])
            yield from _read_readable(domain, pfns[half:])
    else:
        yield pfns, pages
