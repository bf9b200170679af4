"""CoreDomain: a domain in a file that `xl dump-core` wrote.

Opening reads the headers and the list of pages. Page tables of a PV domain hold mfns, which that list translates. The
first use of page types finds out which pages are page tables, by walking them (core_page_tables.py).
"""

from __future__ import annotations

import contextlib
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
from xenpv.memory.domain import DomainMemory
from xenpv.memory.p2m_anchors import Anchors
from xenpv.memory.p2m_reader import P2M, frame_reader
from xenpv.memory.page_tables import as_ptes, normalise, normalise_pages, top_table_mfn
from xenpv.memory.registers import Registers
from xenpv.runs import Extents
from xenpv.source.core_page_tables import PageTables, PageTableSearch
from xenpv.source.core_pages import CorePages
from xenpv.source.domain import Domain
from xenpv.stream import rules
from xenpv.stream.dumpcore import read_core_layout
from xenpv.stream.records import VCPUS_MAX
from xenpv.stream.rules import BreachHandler
from xenpv.text import size


class CoreDomain(Domain):
    """A domain in a core.

    Attributes:
        source: The file.
        layout: The contents of the file's headers.
        page_list: The pages as they are in the file.
    """

    def __init__(self, source: Input, *, on_breach: BreachHandler | None = None) -> None:
        self.source = source
        self._on_breach = on_breach
        if not source.seekable:
            raise RequestError(f"{source.name}: reading a core needs seeking: give a file, not a pipe")
        self.layout = read_core_layout(self._read, source.size, self._report)
        if self.layout.vcpus > VCPUS_MAX:
            raise rules.breach(rules.VCPU_ID, f"{self.layout.vcpus} vcpus", offset=0, record=None)
        self.page_list = CorePages(source, self.layout, self._report)

    @classmethod
    def open(cls, path: str, *, on_breach: BreachHandler | None = None) -> Self:
        """Open a core.

        Args:
            path: The file.
            on_breach: Called for each breach of a rule; reading then goes on as far as possible. Otherwise the first
                breach raises StreamError.

        Raises:
            RequestError: The path cannot be opened, or is a pipe.
            StreamError: The file is damaged, or no core.
        """
        return cls.from_source(Input.open(path), on_breach=on_breach)

    @classmethod
    def from_source(cls, source: Input, *, on_breach: BreachHandler | None = None) -> Self:
        """Open a core as ``open`` does, from an Input, which is closed with the domain."""
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
        """Close the file. Memory cannot be read after that."""
        self.source.close()

    # --- identity ----------------------------------------------------------------------------------------------------

    @property
    def files(self) -> tuple[int, ...]:
        """The descriptor of the core."""
        return (self.source.fd,)

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
        """Bytes of the guest's unsigned long.

        For HVM: 8 if vcpu 0 looks like long mode (Registers.from_hvm_context).
        """
        registers = self.registers(0) if self.hvm else None
        return self.layout.width if registers is None else registers.width

    @property
    def vcpus(self) -> list[int]:
        """The numbers of the vcpus.

        A core has those that ever ran, in order, without their own numbers.
        """
        return list(range(self.layout.vcpus))

    def shared_info(self) -> bytes | None:
        """Return the 4096 bytes of the shared info page; None if the core has none."""
        part = self.layout.shared_info
        data = self._read(part.offset, min(part.size, PAGE_SIZE))
        return data if len(data) == PAGE_SIZE else None

    def vcpu_context(self, vcpu: int) -> np.void | None:
        """Return a vcpu's ``abi.x86.VCPU_GUEST_CONTEXT``; None if the core has none.

        The frame numbers in it are mfns.
        """
        if vcpu not in range(self.layout.vcpus):
            return None
        width = self.layout.width
        context_size = VCPU_GUEST_CONTEXT.size(width)
        data = self._read(self.layout.prstatus.offset + vcpu * self.layout.context_size, context_size)
        return VCPU_GUEST_CONTEXT.read(data, width) if len(data) == context_size <= self.layout.context_size else None

    def registers(self, vcpu: int) -> Registers | None:
        """Return a vcpu's registers; None if they are not known."""
        context = self.vcpu_context(vcpu)
        if context is None:
            return None
        return Registers.from_hvm_context(context) if self.hvm else Registers.from_pv_context(context, self.width)

    def cr3(self, vcpu: int, *, user: bool = False) -> Pfn | None:
        """Return the pfn of a vcpu's top page table; None if it is not known.

        Raises:
            GuestError: cr3 names no page of the core.
        """
        if self.hvm:
            registers = self.registers(vcpu)
            return None if user or registers is None else registers.top
        context = self.vcpu_context(vcpu)
        mfn = None if context is None else top_table_mfn(context, self.width, user=user)
        if mfn is None:
            return None
        pfn = self.page_list.pfns_of(np.array([mfn], np.uint64))[0]
        if pfn == NO_FRAME:
            message = f"{self.name}: cr3 of vcpu {vcpu} names mfn {mfn:#x}, which is no page of the core"
            raise GuestError(message, mfn=mfn)
        return Pfn(int(pfn))

    # --- memory ------------------------------------------------------------------------------------------------------

    @cached_property
    def frames(self) -> CoreFrames:
        """Content and types of the pages by pfn, page tables normalised."""
        return CoreFrames(self.page_list, self.width, self._find_page_tables)

    def has_content(self, pfns: U64) -> Mask:
        """Return which of the pages lie within the file."""
        return self.page_list.raw.has_content(pfns)

    @cached_property
    def _top_tables(self) -> tuple[list[Pfn], list[GuestError]]:
        """The pfns of all vcpus' top tables, and an error for each invalid cr3.

        A cr3 is invalid if it names no page of the core.
        """
        pfns: list[Pfn] = []
        errors: list[GuestError] = []
        for vcpu in self.vcpus:
            for user in (False, True):
                try:
                    pfn = self.cr3(vcpu, user=user)
                except GuestError as e:
                    errors.append(e)
                else:
                    pfns += [] if pfn is None else [pfn]
        return pfns, errors

    @property
    def invalid_cr3s(self) -> list[GuestError]:
        """An error for each cr3 that names no page of the core.

        The page tables below such a cr3 are not found.
        """
        return [] if self.hvm else self._top_tables[1]

    def _find_page_tables(self) -> PageTables:
        if self.hvm:
            return PageTables.empty()
        top_pfns, _ = self._top_tables
        pages = self.page_list
        search = PageTableSearch(pages.raw, self.width, pages.pfns_of, pages.mfns_of, pages.runs)
        return search.find(np.array(top_pfns, np.uint64))

    def memory_of(self, vcpu: int) -> DomainMemory:
        """Return memory as a vcpu translates it.

        If its cr3 names no page of the core, reading by virtual address raises a Fault that says so.
        """
        if self.hvm:
            return DomainMemory.for_hvm_vcpu(self.frames, self.registers(vcpu))
        tables = _NormalisedPages(self.page_list)
        memory = DomainMemory(self.frames, self.width, tables=tables)
        try:
            memory.top = self.cr3(vcpu)
        except GuestError as e:
            memory.no_top = str(e)
        with contextlib.suppress(GuestError):  # invalid_cr3s has the error
            memory.user_top = self.cr3(vcpu, user=True)
        return memory

    def extents(self) -> Iterator[Extents]:
        """Yield all pages at once, as runs of one page type."""
        runs, tables = self.page_list.runs, self.frames.tables
        # Between two edges all pages are of one type.
        edges = np.unique(np.concatenate([runs.first, runs.end, tables.pfns, tables.pfns + np.uint64(1)]))
        types = tables.level_of(edges)  # L1TAB to L4TAB are 1 to 4, NOTAB is 0
        in_core = self.page_list.raw.has_content(edges)
        continues = np.append(False, in_core[1:] & in_core[:-1] & (types[1:] == types[:-1]))
        starts, ends = np.flatnonzero(in_core & ~continues), np.flatnonzero(~continues)
        stop = edges[ends[np.searchsorted(ends, starts, "right")]] if len(starts) else edges[:0]
        yield Extents(edges[starts], (stop - edges[starts]).astype(np.int64), types[starts])

    # --- its p2m -----------------------------------------------------------------------------------------------------

    @cached_property
    def anchors(self) -> Anchors | None:
        """The fields of shared info that lead to the p2m; None without shared info.

        Frames in them are mfns.
        """
        shared = self.shared_info()
        return None if shared is None else Anchors.from_shared_info(shared, self.width)

    @property
    def has_p2m(self) -> bool:
        """Whether shared info leads to a p2m."""
        return self.anchors is not None and bool(self.anchors.roots)

    def read_p2m_frames(self, frames: U64) -> tuple[U8, Mask]:
        """Read machine frames as they are in the core, and return which are there."""
        return frame_reader(self.page_list.raw)(self.page_list.pfns_of(frames))

    @property
    def knows_pins(self) -> bool:
        """Always False: a core does not record which page tables are pinned."""
        return False

    @property
    def stale_page_tables(self) -> int:
        """How many pages are named as page tables without being any."""
        return self.frames.tables.stale

    @cached_property
    def p2m(self) -> P2M:
        """The p2m by the best root.

        Raises GuestError if the domain exposes none, or if it is damaged.
        """
        anchors = self.anchors
        if anchors is None or not anchors.roots:
            reason = "it has no shared info" if anchors is None else anchors.explain_no_root()
            raise GuestError(f"{self.name} exposes no p2m: {reason}")
        return P2M.from_root(anchors, anchors.roots[0], self.read_p2m_frames)


class CoreFrames:
    """Frames of a core. Page tables of a PV domain hold pfns in the place of mfns."""

    def __init__(self, pages: CorePages, width: Width, find_tables: Callable[[], PageTables]) -> None:
        self._pages = pages
        self._width: Width = width
        self._find_tables = find_tables

    @cached_property
    def tables(self) -> PageTables:
        """The page tables, found at first use."""
        return self._find_tables()

    def types(self, pfns: U64) -> U8:
        """Return the page type of each pfn, ABSENT for one that is not in the core."""
        page_types = self._pages.raw.types(pfns)
        in_core = page_types == PageType.NOTAB
        page_types[in_core] = self.tables.level_of(pfns[in_core])  # L1TAB to L4TAB are 1 to 4
        return page_types

    def pages(self, pfns: U64) -> U8:
        """Return the pages' content, uint8 of shape (n, 4096)."""
        pages = self._pages.raw.pages(pfns)
        levels = self.tables.level_of(pfns)
        if levels.any():
            normalise_pages(pages, levels, self._width, self._pages.pfns_of)
        return pages


class _NormalisedPages:
    """Frames for a walk, which takes every page that it asks for as a page table."""

    def __init__(self, pages: CorePages) -> None:
        self._pages = pages

    def types(self, pfns: U64) -> U8:
        return self._pages.raw.types(pfns)

    def pages(self, pfns: U64) -> U8:
        entries = as_ptes(self._pages.raw.pages(pfns))
        return normalise(entries, self._pages.pfns_of)[0].view(np.uint8)
