"""Domain: the interface of any domain, be it running, saved or dumped."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self, TypeAlias

import numpy as np

from xenpv.abi.declare import Width
from xenpv.frames import U8, U64, Frames, Mask, Pfn
from xenpv.memory.domain import DomainMemory
from xenpv.memory.p2m_anchors import Anchors
from xenpv.memory.p2m_reader import P2M
from xenpv.memory.registers import Registers
from xenpv.runs import Extents

if TYPE_CHECKING:
    from xenpv.errors import GuestError, StreamError
    from xenpv.source.config import Config
    from xenpv.source.kernel import Kernel
    from xenpv.source.live import LiveDomain
    from xenpv.source.saved import SavedDomain

Origin: TypeAlias = Literal["running", "saved", "dumped"]


class Domain(Protocol):
    """A domain: running on a host, in a save file, or in a core.

    pfns are the domain's own frame numbers. Page tables hold pfns, too. In an HVM or PVH domain pfns are gfns.

    Each kind derives from this class. A member with a body here is the default, for kinds that know no better.
    Callers never test the class of a domain: ``live`` and ``saved`` lead to what only one kind has.
    """

    # --- identity ----------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def origin(self) -> Origin:
        """Where the domain comes from: a host, a save file or a core."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name for messages: "dom5 (web)", "web.save"."""

    @property
    @abstractmethod
    def title(self) -> str:
        """The domain's own name.

        If that is not known: the name of its file without the folder.
        """

    @property
    @abstractmethod
    def hvm(self) -> bool:
        """Whether it is HVM or PVH.

        Such a domain has no page types, and page tables of any paging mode.
        """

    @property
    @abstractmethod
    def width(self) -> Width:
        """Bytes of the guest's unsigned long: 8 or 4."""

    @property
    def config(self) -> Config | None:
        """The configuration that the toolstack stored with the domain, or None."""
        return None

    @abstractmethod
    def facts(self) -> dict[str, str]:
        """Return facts about the domain: text by label, for a report."""

    @property
    def saved_by(self) -> tuple[int, int] | None:
        """Major and minor version of the Xen that saved the domain; None if not known."""
        return None

    @property
    def live(self) -> LiveDomain | None:
        """The domain itself if it runs on a host, with the host's calls; otherwise None."""
        return None

    @property
    def saved(self) -> SavedDomain | None:
        """The domain itself if it comes from a stream, with the stream's records.

        Otherwise None.
        """
        return None

    # --- memory ------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def frames(self) -> Frames:
        """Content and types of the pages, by pfn."""

    @property
    def memory(self) -> DomainMemory:
        """Memory by pfn, and by virtual address as vcpu 0 translates it."""
        return self.memory_of(0)

    @abstractmethod
    def memory_of(self, vcpu: int) -> DomainMemory:
        """Return memory by pfn, and by virtual address as the vcpu translates it."""

    @abstractmethod
    def extents(self) -> Iterator[Extents]:
        """Yield the domain's pages as runs of one page type, in ascending order.

        Pages whose type is in ``frames.HAS_DATA`` have content.
        """

    def pages(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield each page that has content: its pfn, its page type, its 4096 bytes.

        Pages that cannot be read are left out: a file may be cut off, a running guest may give a page back.
        A domain from a pipe has only the pages that xenpv keeps, such as page tables; see ``seekable``.

        Returns:
            An iterator in ascending order of pfn. Types are ``abi.domctl.PageType`` numbers: 0 is data, 1 to 4 are page
            tables of that level.
        """
        from xenpv.source.scan import iter_pages  # noqa: PLC0415  the save helper does without

        return iter_pages(self)

    def search(self, data: bytes) -> Iterator[int]:
        """Yield each address at which some bytes begin.

        A match may cross from one page into the page of the next pfn. Pages that cannot be read match nothing; of a
        pipe, most cannot (see ``pages``).

        Args:
            data: The bytes to look for, at least one.

        Returns:
            An iterator over pseudo-physical addresses in bytes (``pfn << 12 | offset``), ascending.

        Raises:
            ValueError: ``data`` is empty.
        """
        from xenpv.source.scan import search  # noqa: PLC0415  the save helper does without

        return search(self, data)

    @property
    def files(self) -> tuple[int, ...]:
        """Descriptors of the files that the domain is read from."""
        return ()

    @property
    def seekable(self) -> bool:
        """Whether any page can be read at any time.

        Only a domain from a pipe answers False.
        """
        return True

    @property
    def error(self) -> StreamError | None:
        """The error at which reading the file ended early; None if all was read."""
        return None

    def has_content(self, pfns: U64) -> Mask:
        """Return which pages have their content in the source, one bool for each pfn."""
        return np.ones(pfns.shape, np.bool_)

    # --- the kernel and its vcpus ------------------------------------------------------------------------------------

    @cached_property
    def kernel(self) -> Kernel | None:
        """The Linux kernel in the domain's memory; None if no Linux kernel is found there.

        The first use looks through all of the memory.
        """
        from xenpv.source.kernel import find_kernel  # noqa: PLC0415  the save helper does without

        return find_kernel(self)

    @property
    @abstractmethod
    def vcpus(self) -> list[int]:
        """The numbers of the vcpus that the source knows."""

    @abstractmethod
    def vcpu_context(self, vcpu: int) -> np.void | None:
        """Return a vcpu's ``abi.x86.VCPU_GUEST_CONTEXT``; None if it is not known.

        The frame numbers in it are mfns, but those of a saved domain are pfns.
        """

    @abstractmethod
    def registers(self, vcpu: int) -> Registers | None:
        """Return a vcpu's registers; None if they are not known."""

    @abstractmethod
    def cr3(self, vcpu: int, *, user: bool = False) -> Pfn | None:
        """Return the pfn of a vcpu's top page table; None if it is not known.

        Args:
            vcpu: The vcpu's number.
            user: Return the user half's top table. 64-bit PV guests have a second one for user mode.

        Raises:
            GuestError: cr3 names a frame that is none of the domain's.
        """

    def gdt_pfns(self) -> U64:
        """Return the pfns of all vcpus' GDT frames, ascending; none if they are not known."""
        return np.empty(0, np.uint64)

    @property
    def start_info_pfn(self) -> Pfn | None:
        """The pfn of start info; None if it is not known."""
        return None

    @abstractmethod
    def shared_info(self) -> bytes | None:
        """Return the 4096 bytes of the shared info page; None if there is none."""

    # --- its p2m -----------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def anchors(self) -> Anchors | None:
        """The fields of shared info that lead to the p2m; None without shared info.

        Frames in them are mfns.
        """

    @property
    @abstractmethod
    def has_p2m(self) -> bool:
        """Whether the domain exposes a p2m."""

    @property
    @abstractmethod
    def p2m(self) -> P2M:
        """The p2m by the best root.

        Raises GuestError if the domain exposes none, or if it is damaged.
        """

    @property
    def p2m_names_mfns(self) -> bool:
        """Whether the p2m's own tables and leaves are named by mfn.

        A save file names them by pfn.
        """
        return True

    @abstractmethod
    def read_p2m_frames(self, frames: U64) -> tuple[U8, Mask]:
        """Read frames that hold the p2m, by mfn or pfn as ``p2m_names_mfns`` says.

        Returns:
            Their content, uint8 of shape (n, 4096), and which of them could be read, bool of shape (n,).
        """

    @property
    def knows_pins(self) -> bool:
        """Whether page types tell which page tables are pinned."""
        return True

    @property
    def stale_page_tables(self) -> int:
        """How many pages are named as page tables without being any.

        A domain that ran while it was dumped has some.
        """
        return 0

    @property
    def invalid_cr3s(self) -> list[GuestError]:
        """Why cr3s of vcpus lead to no page tables, so that those are not known.

        Empty if all do.
        """
        return []

    # --- its life ----------------------------------------------------------------------------------------------------

    def paused(self) -> AbstractContextManager[None]:
        """Return a context in which no vcpu runs."""
        return nullcontext()

    @abstractmethod
    def close(self) -> None:
        """Close the source. Memory cannot be read after that."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
