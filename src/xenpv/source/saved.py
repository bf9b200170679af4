"""SavedDomain: a domain in a stream, from a file or a pipe.

A file is read by seeking: its records, and pages only on demand. A pipe passes by once. The pages that checks need go
to an unlinked temporary file: page tables, the p2m's frames, start info. The rest is dropped, so memory stays bounded.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Self

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import VCPU_GUEST_CONTEXT
from xenpv.abi.xen import START_INFO_MAGIC
from xenpv.errors import Fault, StreamError
from xenpv.frames import ABSENT, I64, IS_TABLE, PAGE_SIZE, PAGES_PER_BATCH, U8, U64, Mask, PageType, Pfn, type_name
from xenpv.io.progress import ProgressCallback
from xenpv.io.stream_input import Input, StreamSource
from xenpv.io.tempfile import unlinked_file
from xenpv.memory.domain import DomainMemory
from xenpv.memory.p2m_anchors import Anchors
from xenpv.memory.p2m_reader import P2M, frame_reader
from xenpv.memory.page_tables import cr3_to_frame
from xenpv.memory.registers import Registers, gdt_frames
from xenpv.runs import Extents
from xenpv.source.config import Config
from xenpv.source.domain import Domain
from xenpv.stream.contents import Contents
from xenpv.stream.envelope import Kind
from xenpv.stream.events import PageContent
from xenpv.stream.hvm_context import DAMAGED, read_vcpus
from xenpv.stream.index import PageIndex
from xenpv.stream.page_data import PFN_MASK, PageData
from xenpv.stream.reader import Reader
from xenpv.stream.record_order import Guest
from xenpv.stream.records import P2MLeaves, X86PVP2MFrames
from xenpv.stream.rules import BreachHandler
from xenpv.stream.seal import SealState
from xenpv.text import size

if TYPE_CHECKING:
    from xenpv.source.index_file import StoredIndex

_GDT_ENTRIES_USUAL = 64  # that a kernel fills: Linux has 32 in all
_UUID_MAX = 256  # characters of a configuration's uuid that are shown
_START_INFO = np.frombuffer(START_INFO_MAGIC[8][:8], np.uint64)[0]  # "xen-3.0-", the same for both widths


class FilePages:
    """Frames whose content lies in a file."""

    def __init__(
        self, fd: int, places: PageIndex, types: PageIndex, start: int = 0, *, source_name: str = "the stream"
    ) -> None:
        """Read pages of a file.

        Args:
            fd: The file.
            places: The offset of each page's content.
            types: The type of each page.
            start: The offset in the file from which ``places`` counts.
            source_name: Where pages are missing from, for messages.
        """
        self._fd = fd
        self._places = places
        self._types = types
        self._start = start
        self._source_name = source_name

    def types(self, pfns: U64) -> U8:
        """Return the page type of each pfn, ABSENT for one that was not sent."""
        return self._types.types(pfns)

    def has_content(self, pfns: U64) -> Mask:
        """Return which pages have their content in the file, before its end.

        XALLOC pages need none: they are zeros.
        """
        offsets = self._places.offsets(pfns)
        end = os.fstat(self._fd).st_size - self._start if self._fd >= 0 else 0
        sent = (offsets >= 0) & (offsets <= end - PAGE_SIZE)
        return np.asarray(sent | (self._types.types(pfns) == PageType.XALLOC))

    def pages(self, pfns: U64) -> U8:
        """Return the pages' content, uint8 of shape (n, 4096).

        XALLOC pages are zeros: the domain has them, and they were sent without content. Raises Fault for the first page
        that has no content.
        """
        offsets = self._places.offsets(pfns)
        missing = offsets < 0
        if not missing.any():
            return self.pages_at(offsets, pfns)
        blank = self._types.types(pfns) == PageType.XALLOC
        if (missing & ~blank).any():
            raise self.missing_content(int(pfns[np.argmax(missing & ~blank)]))
        content = np.zeros((len(pfns), PAGE_SIZE), np.uint8)
        content[~missing] = self.pages_at(offsets[~missing], pfns[~missing])
        return content

    def pages_at(self, offsets: I64, pfns: U64) -> U8:
        """Return the content at some offsets, uint8 of shape (n, 4096).

        Raises Fault, with the pfn, for one that the file does not have in full.
        """
        content = np.empty((len(pfns), PAGE_SIZE), np.uint8)
        order = np.argsort(offsets, kind="stable")
        joined = np.diff(offsets[order]) == PAGE_SIZE
        joined &= np.diff(order) == 1  # neighbours in the file and in the result: one read
        edges = (np.flatnonzero(~joined) + 1).tolist()
        for first, end in zip([0, *edges], [*edges, len(order)], strict=True):
            if first < end:
                row = int(order[first])
                self._read_into(content[row : row + end - first], self._start + int(offsets[row]), int(pfns[row]))
        return content

    def _read_into(self, pages: U8, offset: int, pfn: int) -> None:
        view = pages.reshape(-1).data
        while view:
            count = os.preadv(self._fd, [view], offset)
            if count == 0:
                raise _cut_off(pfn)
            view, offset = view[count:], offset + count

    def missing_content(self, pfn: int) -> Fault:
        """Return the error for a page that ``has_content`` denies."""
        as_array = np.array([pfn], np.uint64)
        if self._places.offsets(as_array)[0] >= 0:
            return _cut_off(pfn)
        page_type = int(self._types.types(as_array)[0])
        reason = (
            f"is not in {self._source_name}"
            if page_type == ABSENT
            else f"of type {type_name(page_type)} has no content, or it was not kept"
        )
        return Fault(f"pfn {pfn:#x} {reason}", space="pfn", address=pfn, page_type=page_type)


def _cut_off(pfn: int) -> Fault:
    return Fault(f"pfn {pfn:#x}: the file ends before its content", space="pfn", address=pfn)


class SavedDomain(Domain):
    """A saved domain.

    Attributes:
        source: The file or pipe.
        contents: The records of the stream.
        seal: The state of the stream's seal; it is checked while the stream is read.
    """

    def __init__(
        self, source: StreamSource, *, on_breach: BreachHandler | None = None, kind: Kind | None = None
    ) -> None:
        self.source = source
        self.contents = Contents()
        self.seal = SealState()
        self._error: StreamError | None = None
        self._on_breach = on_breach
        self._kind = kind
        self._spool: int | None = None  # an unlinked file with pages out of a pipe
        self._places = self.contents.index
        self._p2m_leaf_pfns: tuple[X86PVP2MFrames | P2MLeaves | None, U64] = None, np.empty(0, np.uint64)
        self._p2m: tuple[X86PVP2MFrames | P2MLeaves | None, P2M] | None = None  # and the record that it is from
        self._frames = FilePages(source.fd, self._places, self.contents.index, source.start)

    @classmethod
    def open(
        cls,
        path: str,
        *,
        on_breach: BreachHandler | None = None,
        kind: Kind | None = None,
        deep: bool = True,
        progress: ProgressCallback | None = None,
    ) -> Self:
        """Open and read a stream.

        Args:
            path: The file, or "-" for standard input.
            on_breach: Called for each breach of a rule; reading then goes on as far as possible. Otherwise the first
                breach raises StreamError.
            kind: The kind of envelope; None detects it.
            deep: Whether memory will be read. Of a pipe, the pages that checks need are then kept.
            progress: Called while the stream is read.

        Raises:
            RequestError: The path cannot be opened.
            StreamError: The stream is damaged.
        """
        return cls.from_source(Input.open(path), on_breach=on_breach, kind=kind, deep=deep, progress=progress)

    @classmethod
    def from_source(
        cls,
        source: StreamSource,
        *,
        on_breach: BreachHandler | None = None,
        kind: Kind | None = None,
        deep: bool = True,
        progress: ProgressCallback | None = None,
        stored_index: StoredIndex | None = None,
        check_seal: bool = False,
        seal_key: bytes | None = None,
    ) -> Self:
        """Open a stream as ``open`` does, from a source that is closed with the domain.

        ``stored_index`` saves reading PAGE_DATA records. ``check_seal`` compares a sealed stream with its seal, which
        reads all page content; ``seal_key``: of a keyed seal.
        """
        domain = cls(source, on_breach=on_breach, kind=kind)
        try:
            domain._read(deep, progress, stored_index, check_seal, seal_key)
        except BaseException:
            domain.close()
            raise
        return domain

    def _read(
        self,
        deep: bool,
        progress: ProgressCallback | None,
        stored_index: StoredIndex | None,
        check_seal: bool,
        seal_key: bytes | None,
    ) -> None:
        if stored_index is not None:
            self._places = self.contents.index = stored_index.index
            self._frames = FilePages(self.source.fd, self._places, self._places, self.source.start)
        skip_page_data = None if stored_index is None else stored_index.page_data
        spools = deep and not self.source.seekable
        if not self.source.seekable:
            self._spool = unlinked_file() if spools else None
            self._places = PageIndex()
            self._frames = FilePages(-1 if self._spool is None else self._spool, self._places, self.contents.index)
        reader = Reader(
            on_breach=self._on_breach,
            pages=spools,
            kind=self._kind,
            skip_page_data=skip_page_data,
            check_seal=check_seal,
            seal_key=seal_key,
        )
        self.seal = reader.seal
        try:
            for event in self.source.events(reader, progress):
                if isinstance(event, PageContent):
                    self._spool_pages(event)
                    continue
                self.contents.add(event)
                if spools and isinstance(event, PageData):
                    self._forget_content(event.entries[~event.has_data])
        except StreamError as e:
            if self._on_breach is None:
                raise
            self._error = e
        _ = self._cpus  # the context of an HVM domain is checked now, rather than at its first use

    def _spool_pages(self, pages: PageContent) -> None:
        """Spool those pages that checks need: tables, start info, p2m, GDTs."""
        assert self._spool is not None
        entries = pages.record.entries[pages.record.has_data][pages.first :][: len(pages.raw) // PAGE_SIZE]
        needed: Mask = IS_TABLE[(entries >> np.uint64(60)).astype(np.uint8)]
        needed |= pages.data.view(np.uint64)[:, 0] == _START_INFO
        needed |= self._are_p2m_leaves(entries & np.uint64(PFN_MASK))
        needed |= _may_be_frame_list(pages.data, self.contents.width)
        needed |= _may_be_gdt(pages.data)
        if np.any(needed):
            end = os.lseek(self._spool, 0, os.SEEK_END)
            _write_all(self._spool, pages.data[needed])
            self._places.add_entries(entries[needed], end)
        self._forget_content(entries[~needed])

    def _forget_content(self, entries: U64) -> None:
        """Forget the content of pages that were spooled before and are now sent again."""
        if len(entries):
            self._places.add_entries(entries & np.uint64(PFN_MASK) | np.uint64(PageType.XTAB << 60), 0)

    def _are_p2m_leaves(self, pfns: U64) -> Mask:
        """Return which pages the last P2M_FRAMES record named."""
        record, leaf_pfns = self._p2m_leaf_pfns
        if record is not self.contents.p2m_record:
            leaf_pfns = np.unique(self.contents.p2m_leaf_runs.frame)
            self._p2m_leaf_pfns = self.contents.p2m_record, leaf_pfns
        if not len(leaf_pfns):
            return np.zeros(len(pfns), np.bool_)
        return np.asarray(leaf_pfns[np.minimum(np.searchsorted(leaf_pfns, pfns), len(leaf_pfns) - 1)] == pfns)

    def earlier_tables(self) -> Iterator[tuple[U64, U8, I64, U8]]:
        """Yield batches of the page tables that a later page of the same pfn replaced.

        Yields:
            pfns, page types, offsets in the stream, and content, uint8 of shape (n, 4096).

        Raises:
            Fault: The file ends before the content.
        """
        pfns, types, offsets = self.contents.index.earlier_tables()
        places = self._places.earlier_tables()[2]  # of a pipe: where they were spooled, in the same order
        for i in range(0, len(pfns), PAGES_PER_BATCH):
            batch = slice(i, i + PAGES_PER_BATCH)
            yield pfns[batch], types[batch], offsets[batch], self._frames.pages_at(places[batch], pfns[batch])

    @property
    def pages_complete(self) -> bool:
        """Whether all pages were read: the stream has records that follow them."""
        return self.contents.complete or self.contents.shared_info is not None

    def close(self) -> None:
        """Close the input. Memory cannot be read after that."""
        self.source.close()
        if self._spool is not None:
            os.close(self._spool)
            self._spool = None

    # --- identity ----------------------------------------------------------------------------------------------------

    @property
    def origin(self) -> Literal["saved"]:
        """A stream."""
        return "saved"

    @property
    def saved(self) -> SavedDomain:
        """The domain itself."""
        return self

    @property
    def name(self) -> str:
        """The path of the file, or "-"."""
        return self.source.name

    @property
    def title(self) -> str:
        """The domain's name by its configuration.

        Without one: the name of the file without its folder.
        """
        config = self.config
        return (config and config.name) or self.name.rpartition("/")[2]

    @property
    def config(self) -> Config | None:
        """The configuration in the stream's envelope; None if there is none."""
        return Config.from_contents(self.contents)

    @property
    def saved_by(self) -> tuple[int, int] | None:
        """Major and minor version of the Xen that saved the domain.

        The major version is 0 if a converter wrote the stream; None if the header was not read.
        """
        header = self.contents.domain
        return None if header is None else (header.xen_major, header.xen_minor)

    def facts(self) -> dict[str, str]:
        """Return facts from configuration, headers and records: text by label."""
        contents, config, facts = self.contents, self.config, dict[str, str]()
        if config is not None:
            facts["UUID"] = (config.uuid or "")[:_UUID_MAX]
            facts["Memory"] = " of ".join(size(kib << 10) for kib in (config.target_memkb, config.max_memkb) if kib)
            facts["vCPUs"] = f"{len(self.vcpus)} saved" + (f", {config.max_vcpus} at most" if config.max_vcpus else "")
        if self.saved_by is not None:
            major, minor = self.saved_by
            facts["Saved by"] = f"Xen {major}.{minor}" if major else "a converter from a legacy stream"
        envelope = str(contents.envelope.kind) if contents.envelope else ("libxl" if contents.libxl_header else "libxc")
        version = f", libxc stream version {contents.image.version}" if contents.image else ""
        facts["Envelope"] = envelope + version
        facts["File"] = f"{self.name}, {size(self.source.size)}" if self.source.size else self.name
        facts["Stream"] = "complete" if contents.complete else "cut off"
        if contents.index.repeated:
            facts["Pages sent"] = f"{contents.index.sent:,}, {contents.index.repeated:,} of them again later"
        if contents.checkpoints:
            facts["Checkpoints"] = str(contents.checkpoints)
        if contents.tsc is not None:
            facts["TSC"] = f"{contents.tsc.khz:,} kHz, {contents.tsc.nsec / 1e9:.3f} s"
        policy, msrs = contents.cpuid_policy, contents.msr_policy
        if policy is not None:
            leaves, values = policy.length // policy.ENTRY, msrs.length // msrs.ENTRY if msrs is not None else 0
            facts["CPU policy"] = f"{leaves} CPUID leaves, {values} MSRs"
        return facts

    @property
    def error(self) -> StreamError | None:
        """The error at which reading ended early; None if all was read.

        Only a domain opened with ``on_breach`` has one. Otherwise the error was raised.
        """
        return self._error

    @property
    def files(self) -> tuple[int, ...]:
        """The descriptor of the file or pipe."""
        return (self.source.fd,)

    @property
    def seekable(self) -> bool:
        """Whether the stream comes from a file; a pipe passes by once."""
        return self.source.seekable

    @property
    def frames(self) -> FilePages:
        """Content and types of the pages, by pfn."""
        return self._frames

    def has_content(self, pfns: U64) -> Mask:
        """Return which pages have their content in the file, or were kept from a pipe."""
        return self._frames.has_content(pfns)

    @property
    def hvm(self) -> bool:
        """Whether it is HVM or PVH."""
        return self.contents.domain is not None and self.contents.domain.guest is Guest.HVM

    @property
    def width(self) -> Width:
        """Bytes of the guest's unsigned long.

        For HVM: by the mode of vcpu 0. 8 until the stream's header was read.
        """
        if self.hvm and self._cpus:
            return Registers.from_hvm_cpu(self._cpus[min(self._cpus)]).width
        return self.contents.width

    @cached_property
    def _cpus(self) -> dict[int, np.void]:
        """The vcpus of an HVM domain in HVM_CONTEXT, by number; none if that is damaged.

        Raises StreamError if it is damaged, and breaches are not reported.
        """
        record = self.contents.hvm_context
        if record is None:
            return {}
        try:
            return read_vcpus(record.data, offset=record.offset)
        except StreamError as e:
            if self._on_breach is None:
                raise
            self._on_breach(DAMAGED, e.reason, e.offset, e.record)
            return {}

    def extents(self) -> Iterator[Extents]:
        """Which pages the stream named, by its index: all in one piece."""
        yield self.contents.index.extents

    def shared_info(self) -> bytes | None:
        """Return the 4096 bytes of the shared info page; None if the stream has none."""
        record = self.contents.shared_info
        return None if record is None else bytes(record.data)

    @property
    def vcpus(self) -> list[int]:
        """The numbers of the vcpus that the stream has records of.

        For HVM those that were up.
        """
        return sorted(self._cpus if self.hvm else self.contents.vcpus)

    def vcpu_context(self, vcpu: int) -> np.void | None:
        """Return a vcpu's ``abi.x86.VCPU_GUEST_CONTEXT``; None if the stream has none.

        The frame numbers in it are pfns.
        """
        record = self.contents.vcpus.get(vcpu)
        if record is None or record.basic is None:
            return None
        return VCPU_GUEST_CONTEXT.read(record.basic.context, self.contents.width)

    def registers(self, vcpu: int) -> Registers | None:
        """Return a vcpu's registers; None if the stream has no context of it."""
        if self.hvm:
            return Registers.from_hvm_cpu(self._cpus[vcpu]) if vcpu in self._cpus else None
        context = self.vcpu_context(vcpu)
        return None if context is None else Registers.from_pv_context(context, self.width)

    def cr3(self, vcpu: int, *, user: bool = False) -> Pfn | None:
        """Return the pfn of a vcpu's top page table; None if it is not known.

        Args:
            vcpu: The vcpu's number.
            user: Ask for the user half's table.
        """
        if self.hvm:
            registers = self.registers(vcpu)
            return None if user or registers is None else registers.top
        context = self.vcpu_context(vcpu)
        if context is None:
            return None
        if user:
            cr1 = int(context["ctrlreg"][1])
            return Pfn(cr1 >> 12) if self.contents.width == 8 and cr1 & 1 else None
        return Pfn(cr3_to_frame(int(context["ctrlreg"][3]), self.contents.width))

    def tops(self, vcpu: int) -> list[Pfn]:
        """Return the pfns of a vcpu's top page tables: kernel's, and user half's if any."""
        return [top for top in (self.cr3(vcpu), self.cr3(vcpu, user=True)) if top is not None]

    def memory_of(self, vcpu: int) -> DomainMemory:
        """Return memory by pfn, and by virtual address as the vcpu translates it."""
        if self.hvm:
            return DomainMemory.for_hvm_vcpu(self.frames, self.registers(vcpu))
        return DomainMemory(self.frames, self.contents.width, self.cr3(vcpu), self.cr3(vcpu, user=True))

    def gdt_pfns(self) -> U64:
        """Return the pfns of all vcpus' GDT frames, ascending.

        A GDT with too many entries counts as none.
        """
        contexts = [self.vcpu_context(vcpu) for vcpu in self.contents.vcpus]
        return gdt_frames(context for context in contexts if context is not None)

    @property
    def start_info_pfn(self) -> Pfn | None:
        """The pfn of start info; None if vcpu 0 has no context.

        It is vcpu 0's third argument to SCHEDOP_shutdown, in rdx or edx.
        """
        context = self.vcpu_context(0)
        if context is None:
            return None
        return Pfn(int(context["user_regs"]["rdx" if self.contents.width == 8 else "edx"]))

    @property
    def anchors(self) -> Anchors | None:
        """The fields of shared info that lead to the p2m; None without shared info.

        Frames in them are mfns of the host that saved the domain.
        """
        shared = self.contents.shared_info
        return None if shared is None else Anchors.from_shared_info(shared.data, self.contents.width)

    @property
    def has_p2m(self) -> bool:
        """Whether the stream names the frames of a p2m."""
        return self.contents.p2m_record is not None

    @property
    def p2m_names_mfns(self) -> bool:
        """The stream names the p2m's frames by pfn."""
        return False

    def read_p2m_frames(self, frames: U64) -> tuple[U8, Mask]:
        """Read pages by pfn, and return which could be read."""
        return frame_reader(self._frames)(frames)

    @property
    def p2m(self) -> P2M:
        """The p2m by the frames that the stream names.

        Its entries are mfns of the host that saved.
        """
        contents = self.contents
        if self._p2m is None or self._p2m[0] is not contents.p2m_record:
            p2m = P2M(contents.width, contents.end_pfn + 1, contents.p2m_leaf_runs, self.read_p2m_frames)
            self._p2m = contents.p2m_record, p2m
        return self._p2m[1]


def _may_be_frame_list(pages: U8, width: Width) -> Mask:
    """Return which pages may belong to a p2m tree: they hold frame numbers only.

    Which do is known only after all pages have passed by.
    """
    words = pages.view(f"<u{width}")
    frame_max = (1 << 40) - 1 if width == 8 else (1 << 32) - 1
    return np.asarray((words.min(axis=1) > 0) & (words.max(axis=1) <= frame_max))


def _may_be_gdt(pages: U8) -> Mask:
    """Return which pages may begin a GDT: they begin with nothing, and hold little.

    Which do is known only after all pages have passed by.
    """
    words = pages.view(np.uint64)
    result = words[:, 0] == 0
    used = np.count_nonzero(words[result], axis=1)
    result[result] = (used > 0) & (used <= _GDT_ENTRIES_USUAL)
    return np.asarray(result)


def _write_all(fd: int, data: U8) -> None:
    view = np.ascontiguousarray(data).reshape(-1).data
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError as e:
        raise OSError(e.errno, f"{e.strerror} (another TMPDIR may have room)", tempfile.gettempdir()) from e
