"""A domain out of a file that `xl dump-core` wrote.

Opening reads the headers and the list of pages. Of a PV domain the rest comes when it is asked for: page tables hold
mfns, which the core's own list translates, and which pages they are is found out by walking (core_tables.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Literal, Self

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import VCPU_GUEST_CONTEXT
from xenpv.errors import GuestError, RequestError
from xenpv.findings import Rule, Severity
from xenpv.frames import NO_FRAME, PAGE_SIZE, U8, U64, Mask, PageType, Pfn
from xenpv.io.stream_input import Input
from xenpv.memory.anchors import Anchors
from xenpv.memory.domain import DomainMemory
from xenpv.memory.p2m import P2M, frame_reader
from xenpv.memory.pagetables import as_entries, normalise, normalise_pages, top_frame
from xenpv.memory.registers import Registers
from xenpv.runs import Extents
from xenpv.source.core_page_tables import Search, Tables
from xenpv.source.core_pages import CorePages
from xenpv.source.domain import Domain
from xenpv.stream import rules
from xenpv.stream.dumpcore import read_layout
from xenpv.stream.records import VCPUS_MAX
from xenpv.stream.rules import BreachHandler
from xenpv.text import size


class CoreDomain(Domain):
    """A domain in a core. ``layout`` is what the file's headers say, ``page_list`` its list of pages."""

    def __init__(self, source: Input, *, on_breach: BreachHandler | None = None) -> None:
        self.source = source
        self._on_breach = on_breach
        if not source.seekable:
            raise RequestError(
                f"{source.name}: a core is read here and there, which a pipe does not allow: give the file"
            )
        self.layout = read_layout(self._read, source.size, self._report)
        if self.layout.vcpus > VCPUS_MAX:
            raise rules.breach(rules.VCPU_ID, f"{self.layout.vcpus} vcpus", offset=0, record=None)
        self.page_list = CorePages(source, self.layout, self._report)

    @classmethod
    def open(cls, path: str, *, on_breach: BreachHandler | None = None) -> Self:
        """Open the core at ``path``.

        With ``on_breach``, breaches of rules go there and what can be read is; without, the first error is raised as
        StreamError. Raises RequestError when the path cannot be opened.
        """
        return cls.of(Input.open(path), on_breach=on_breach)

    @classmethod
    def of(cls, source: Input, *, on_breach: BreachHandler | None = None) -> Self:
        """As ``open``, from an Input, which is closed with the domain."""
        try:
            return cls(source, on_breach=on_breach)
        except BaseException:
            source.close()
            raise

    def _read(self, offset: int, size: int) -> bytes:
        if offset >= self.source.size:
            return b""
        return os.pread(self.source.fd, min(size, self.source.size - offset), self.source.start + offset)

    def _report(self, rule: Rule, message: str, offset: int) -> None:
        if self._on_breach is not None:
            self._on_breach(rule, message, offset, None)
        elif rule.severity is Severity.ERROR:
            raise rules.breach(rule, message, offset=offset, record=None)

    def close(self) -> None:
        """Close the file; guest memory cannot be read any more."""
        self.source.close()

    # --- identity ----------------------------------------------------------------------------------------------------

    @property
    def origin(self) -> Literal["dumped"]:
        """A core."""
        return "dumped"

    @property
    def name(self) -> str:
        """The path of the file."""
        return self.source.name

    @property
    def title(self) -> str:
        """The name of the file without its folder."""
        return self.name.rpartition("/")[2]

    def facts(self) -> dict[str, str]:
        """Return how many vcpus the core has, and its size."""
        return {"vCPUs": str(len(self.vcpus)), "File": f"{self.name}, {size(self.source.size)}"}

    @property
    def hvm(self) -> bool:
        """Whether it is HVM or PVH."""
        return self.layout.hvm

    @property
    def width(self) -> Width:
        """Bytes of the guest's unsigned long. Of HVM: 8 if vcpu 0 looks like long mode (Registers.of_hvm_context)."""
        registers = self.registers(0) if self.hvm else None
        return self.layout.width if registers is None else registers.width

    @property
    def vcpus(self) -> list[int]:
        """Numbers of the vcpus: a core has those that ever ran, one behind the other, without their own numbers."""
        return list(range(self.layout.vcpus))

    def shared_info(self) -> bytes | None:
        """The 4096 bytes of its shared info page; None where the core has none."""
        part = self.layout.shared_info
        data = self._read(part.offset, min(part.size, PAGE_SIZE))
        return data if len(data) == PAGE_SIZE else None

    def vcpu_context(self, vcpu: int) -> np.void | None:
        """The vcpu_guest_context of a vcpu (abi.x86.VCPU_GUEST_CONTEXT); its frames are mfns. None if there is none."""
        if vcpu not in range(self.layout.vcpus):
            return None
        width = self.layout.width
        size = VCPU_GUEST_CONTEXT.size(width)
        data = self._read(self.layout.prstatus.offset + vcpu * self.layout.context, size)
        return VCPU_GUEST_CONTEXT.read(data, width) if len(data) == size <= self.layout.context else None

    def registers(self, vcpu: int) -> Registers | None:
        """What a vcpu's registers held, None where that is not known."""
        context = self.vcpu_context(vcpu)
        if context is None:
            return None
        return Registers.of_hvm_context(context) if self.hvm else Registers.of_context(context, self.width)

    def cr3(self, vcpu: int, *, user: bool = False) -> Pfn | None:
        """The pfn of a vcpu's top table; ``user``: of its user half, which 64-bit PV guests may have.

        Raises GuestError for a cr3 that names no page of the core.
        """
        if self.hvm:
            registers = self.registers(vcpu)
            return None if user or registers is None else registers.top
        context = self.vcpu_context(vcpu)
        mfn = None if context is None else top_frame(context, self.width, user=user)
        if mfn is None:
            return None
        pfn = self.page_list.pfns_of(np.array([mfn], np.uint64))[0]
        if pfn == NO_FRAME:
            raise GuestError(f"{self.name}: cr3 of vcpu {vcpu} names mfn {mfn:#x}, which is no page of the core")
        return Pfn(int(pfn))

    # --- memory ------------------------------------------------------------------------------------------------------

    @cached_property
    def frames(self) -> CoreFrames:
        """Its pages by pfn, page tables normalised."""
        return CoreFrames(self.page_list, self.width, self._tables)

    def has_content(self, pfns: U64) -> Mask:
        """Return which of the pages lie within the file."""
        return self.page_list.raw.kept(pfns)

    def _tables(self) -> Tables:
        if self.hvm:
            return Tables(np.empty(0, np.uint64), np.empty(0, np.uint8))
        tops = []
        for vcpu in self.vcpus:
            for user in (False, True):
                try:
                    top = self.cr3(vcpu, user=user)
                except GuestError:
                    continue
                tops += [] if top is None else [top]
        pages = self.page_list
        search = Search(pages.raw, self.width, pages.pfns_of, pages.mfns_of, pages.runs)
        return search.tables(np.array(tops, np.uint64))

    def memory_of(self, vcpu: int) -> DomainMemory:
        """Memory as a vcpu sees it; without tables where its cr3 names no page of the core."""
        if self.hvm:
            return DomainMemory.of_hvm(self.frames, self.registers(vcpu))
        tables = _AnyTable(self.page_list)
        try:
            return DomainMemory(self.frames, self.width, self.cr3(vcpu), self.cr3(vcpu, user=True), tables)
        except GuestError:
            return DomainMemory(self.frames, self.width, tables=tables)

    def extents(self) -> Iterator[Extents]:
        """Which pages there are: all in one piece."""
        runs, tables = self.page_list.runs, self.frames.tables
        # Cut where a run of tables of one level begins or ends.
        whole = np.concatenate([runs.first, runs.end, tables.pfns, tables.pfns + np.uint64(1)])
        cuts = np.unique(whole)
        kinds = tables.level_of(cuts)
        there = self.page_list.raw.kept(cuts)
        goes_on = np.append(False, there[1:] & there[:-1] & (kinds[1:] == kinds[:-1]))
        at = np.flatnonzero(there & ~goes_on)
        ends = np.flatnonzero(~goes_on)
        stop = cuts[ends[np.searchsorted(ends, at, "right")]] if len(at) else cuts[:0]
        yield Extents(cuts[at], (stop - cuts[at]).astype(np.int64), kinds[at])

    # --- its p2m -----------------------------------------------------------------------------------------------------

    @cached_property
    def anchors(self) -> Anchors | None:
        """What shared info says of the p2m; frames in it are mfns."""
        shared = self.shared_info()
        return None if shared is None else Anchors.from_shared_info(shared, self.width)

    @property
    def has_p2m(self) -> bool:
        """Whether shared info leads to a p2m."""
        return self.anchors is not None and bool(self.anchors.roots)

    def read_p2m_frames(self, frames: U64) -> tuple[U8, Mask]:
        """Read machine frames as they are in the core, and tell which of them are there."""
        return frame_reader(self.page_list.raw)(self.page_list.pfns_of(frames))

    @property
    def knows_pins(self) -> bool:
        """A core does not tell which page tables are pinned."""
        return False

    @property
    def stale_page_tables(self) -> int:
        """How many pages are named as page tables without being any."""
        return self.frames.tables.ended

    @cached_property
    def p2m(self) -> P2M:
        """The guest's own p2m, by the best way. Raises GuestError when it shows none, or it cannot be right."""
        anchors = self.anchors
        if anchors is None or not anchors.roots:
            why = "it has no shared info" if anchors is None else anchors.explain_no_root()
            raise GuestError(f"{self.name} shows no p2m: {why}")
        return P2M.from_root(anchors, anchors.roots[0], self.read_p2m_frames)


class CoreFrames:
    """A core's pages by pfn; of a PV domain page tables have pfns in the place of mfns. ``tables``: which those are."""

    def __init__(self, pages: CorePages, width: Width, find: Callable[[], Tables]) -> None:
        self._pages = pages
        self._width: Width = width
        self._find = find

    @cached_property
    def tables(self) -> Tables:
        """The page tables; found when first asked for."""
        return self._find()

    def types(self, pfns: U64) -> U8:
        kinds = self._pages.raw.types(pfns)
        there = kinds == PageType.NOTAB
        kinds[there] = self.tables.level_of(pfns[there])  # L1TAB to L4TAB are 1 to 4
        return kinds

    def pages(self, pfns: U64) -> U8:
        pages = self._pages.raw.pages(pfns)
        levels = self.tables.level_of(pfns)
        if levels.any():
            normalise_pages(pages, levels, self._width, self._pages.pfns_of)
        return pages


class _AnyTable:
    """Pages that are asked for because a walk takes them for tables, with pfns in the place of mfns."""

    def __init__(self, pages: CorePages) -> None:
        self._pages = pages

    def types(self, pfns: U64) -> U8:
        return self._pages.raw.types(pfns)

    def pages(self, pfns: U64) -> U8:
        entries = as_entries(self._pages.raw.pages(pfns))
        return normalise(entries, self._pages.pfns_of)[0].view(np.uint8)
