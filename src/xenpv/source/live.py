"""LiveDomain: a domain that runs on a host.

The domain is only read. It is paused only on request.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import Literal

import numpy as np

from xenpv.abi.declare import Width
from xenpv.abi.x86 import VCPU_GUEST_CONTEXT
from xenpv.errors import Fault, GuestError, HostError
from xenpv.frames import ABSENT, IS_TABLE, NO_FRAME, PAGE_SIZE, U8, U64, Mask, PageType, Pfn, first_bad
from xenpv.host.protocol import DomainInfo, Host
from xenpv.memory.domain import DomainMemory
from xenpv.memory.p2m_anchors import Anchors, P2MRoot
from xenpv.memory.p2m_reader import P2M, names_local_frame
from xenpv.memory.page_tables import normalise_pages, top_table_mfn
from xenpv.memory.registers import Registers
from xenpv.runs import Extents
from xenpv.source.domain import Domain
from xenpv.text import size

NO_SUCH_VCPU = frozenset({errno.ENODATA, errno.ESRCH, errno.EINVAL})  # never started, or not there


class P2MChangeKind(Enum):
    """What changed in a p2m."""

    IN_PROGRESS = "in progress"  # the guest was changing it when it was first walked
    GENERATION = "generation"
    ANCHORS = "anchors"
    DAMAGED = "damaged"  # it can no longer be walked
    LEAVES = "leaves"  # leaves were replaced


@dataclass(frozen=True, slots=True)
class P2MChange:
    """A change of a domain's p2m since it was first walked.

    Attributes:
        kind: What changed.
        message: The same for people, in a sentence.
    """

    kind: P2MChangeKind
    message: str


@dataclass
class LiveDomain(Domain):
    """A domain on a host. The p2m's tables are read at first use, and kept.

    ``resources`` are closed with the domain; a caller that keeps its host open leaves them empty.
    """

    host: Host
    info: DomainInfo
    resources: ExitStack = field(default_factory=ExitStack, repr=False, compare=False)

    def close(self) -> None:
        """Close the host if it was opened with the domain."""
        self.resources.close()

    # --- identity ----------------------------------------------------------------------------------------------------

    @property
    def origin(self) -> Literal["running"]:
        """A host."""
        return "running"

    @property
    def live(self) -> LiveDomain:
        """The domain itself."""
        return self

    @property
    def title(self) -> str:
        """The domain's name; its number if it has none."""
        return self.info.name or self.name

    def facts(self) -> dict[str, str]:
        """Return facts from the host: text by label."""
        info, version = self.info, self.host.version()
        state = "shut down" if info.shutdown else "paused" if info.paused else "running"
        return {
            "UUID": info.uuid or "",
            "Memory": f"{size(info.pages * PAGE_SIZE)} of {size(info.max_pages * PAGE_SIZE)}",
            "vCPUs": str(info.max_vcpu + 1),
            "Domain": f"dom{info.domid}, {state}",
            "Xen": f"{version.major}.{version.minor}",
        }

    @property
    def name(self) -> str:
        """For people: "dom5 (web)"."""
        return self.info.label

    @property
    def hvm(self) -> bool:
        """Whether it is HVM or PVH."""
        return self.info.hvm

    @property
    def width(self) -> Width:
        """Bytes of the guest's unsigned long."""
        return self.info.width

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context in which no vcpu runs."""
        self.host.pause(self.info.domid)
        try:
            yield
        except BaseException as e:
            try:
                self.host.unpause(self.info.domid)
            except HostError as failure:
                e.add_note(f"{self.name} may stay paused: {failure}")
            raise
        self.host.unpause(self.info.domid)

    # --- its p2m -----------------------------------------------------------------------------------------------------

    def read_anchors(self) -> Anchors:
        """Read the anchors in shared info, as they are now."""
        return Anchors.from_shared_info(self.host.shared_info(self.info.domid), self.info.width)

    @cached_property
    def anchors(self) -> Anchors:
        """The anchors in shared info, read at first use."""
        return self.read_anchors()

    @property
    def has_p2m(self) -> bool:
        """Whether shared info leads to a p2m."""
        return bool(self.anchors.roots)

    def read_p2m_frames(self, frames: U64) -> tuple[U8, Mask]:
        """Map machine frames of the domain, and return which could be mapped."""
        pages, mapped = self.host.map_frames(self.info.domid, frames)
        return pages, mapped.astype(np.bool_)

    def walk_p2m(self, root: P2MRoot, entries: int | None = None) -> P2M:
        """Walk the p2m from one root.

        Args:
            root: One of ``anchors.roots``.
            entries: Walk only so many entries from pfn 0 on.

        Raises:
            GuestError: The p2m is damaged.
        """
        anchors = self.anchors if entries is None else replace(self.anchors, max_pfn=entries)
        return P2M.from_root(anchors, root, self.read_p2m_frames)

    @cached_property
    def p2m(self) -> P2M:
        """The p2m by the best root, walked at first use.

        Raises GuestError if there is none, or it is damaged.
        """
        if not self.anchors.roots:
            raise GuestError(f"dom{self.info.domid} exposes no p2m: {self.anchors.explain_no_root()}")
        return self.walk_p2m(self.anchors.roots[0])

    def p2m_change(self) -> P2MChange | None:
        """Return how the p2m has changed since it was first walked; None if it has not.

        Compares the anchors, and walks the tables once more: only the linear list has a generation. Entries of leaves
        change at any time and do not count.
        """
        current, first = self.read_anchors(), self.anchors
        if first.p2m_cr3 and first.p2m_generation & 1:
            problem = f"p2m_generation {first.p2m_generation:#x} is odd: the guest is changing its p2m; try again"
            return P2MChange(P2MChangeKind.IN_PROGRESS, problem)
        if current.p2m_generation != first.p2m_generation:
            generations = f"{first.p2m_generation:#x} to {current.p2m_generation:#x}"
            problem = f"p2m_generation went from {generations}: the guest changed its p2m; try again"
            return P2MChange(P2MChangeKind.GENERATION, problem)
        if current != first:
            problem = "the anchors in shared info have changed: the guest moved its p2m; try again"
            return P2MChange(P2MChangeKind.ANCHORS, problem)
        if not first.roots:
            return None
        try:
            leaves = self.p2m.leaves
        except GuestError:
            return None  # it was damaged before, too
        try:
            leaves_now = self.walk_p2m(first.roots[0]).leaves
        except GuestError as e:
            return P2MChange(P2MChangeKind.DAMAGED, f"the p2m can no longer be walked: {e}")
        if leaves_now.equals(leaves):
            return None
        return P2MChange(P2MChangeKind.LEAVES, "the guest replaced leaves of its p2m; try again")

    # --- its memory --------------------------------------------------------------------------------------------------

    @property
    def vcpus(self) -> list[int]:
        """The numbers of its vcpus; some may never have been started."""
        return list(range(self.info.max_vcpu + 1))

    def vcpu_context(self, vcpu: int) -> np.void | None:
        """Return a vcpu's ``abi.x86.VCPU_GUEST_CONTEXT``; None if it was never started.

        The frame numbers in it are mfns.

        Raises:
            HostError: The domain has gone, or Xen refuses.
        """
        try:
            return VCPU_GUEST_CONTEXT.read(self.host.vcpu_context(self.info.domid, vcpu), self.info.width)
        except HostError as e:
            self.host.info(self.info.domid)  # raises if the domain has gone: ESRCH may mean either
            if e.errno not in NO_SUCH_VCPU:
                raise
            return None

    def registers(self, vcpu: int) -> Registers | None:
        """Return a vcpu's registers; None, or HostError, as ``vcpu_context``."""
        context = self.vcpu_context(vcpu)
        return None if context is None else Registers.from_pv_context(context, self.info.width)

    def shared_info(self) -> bytes:
        """Return the 4096 bytes of the shared info page, as they are now."""
        return self.host.shared_info(self.info.domid)

    def cr3(self, vcpu: int, *, user: bool = False) -> Pfn | None:
        """Return the pfn of a vcpu's top page table; None if the vcpu never ran.

        Raises:
            GuestError: cr3 names a frame that the p2m does not have.
            HostError: The domain has gone.
        """
        context = self.vcpu_context(vcpu)
        mfn = None if context is None else top_table_mfn(context, self.info.width, user=user)
        if mfn is None:
            return None
        pfn = self.pfns_of(np.array([mfn], np.uint64))[0]
        if pfn == NO_FRAME:
            raise GuestError(f"cr3 of vcpu {vcpu} names mfn {mfn:#x}, which is not in the p2m of {self.name}", mfn=mfn)
        return Pfn(int(pfn))

    def pfns_of(self, mfns: U64) -> U64:
        """Return the pfn of each mfn by M2P, NO_FRAME where the p2m does not agree."""
        pfns = self.host.m2p(mfns)
        return np.where(self.p2m.lookup(pfns) == mfns, pfns, NO_FRAME)

    def iter_types(self, first: int = 0) -> Iterator[tuple[U64, U8]]:
        """Yield the pfns that have a frame of the domain, and their page types.

        Args:
            first: The pfn to begin at.

        Yields:
            pfns, ascending, and the page type of each, uint8 of the same shape.
        """
        for leaves in self.p2m.iter_leaves():
            local = names_local_frame(leaves.mfns) & (leaves.pfns >= np.uint64(first))
            page_types = self.host.page_types(self.info.domid, leaves.mfns[local])
            present = page_types != PageType.XTAB
            yield leaves.pfns[local][present], page_types[present]

    def extents(self) -> Iterator[Extents]:
        """Yield the domain's pages as runs of one page type, in ascending order."""
        for pfns, page_types in self.iter_types():
            yield Extents.from_types(pfns, page_types)

    @cached_property
    def frames(self) -> LiveFrames:
        """Content and types of the pages, by pfn."""
        return LiveFrames(self)

    def memory_of(self, vcpu: int) -> DomainMemory:
        """Return memory by pfn, and by virtual address as the vcpu translates it."""
        tables = _LivePageTables(self.frames)
        memory = DomainMemory(self.frames, self.info.width, tables=tables)
        try:
            memory.top, memory.user_top = self.cr3(vcpu), self.cr3(vcpu, user=True)
        except GuestError as e:
            memory.no_top = str(e)
        return memory


@dataclass(frozen=True)
class LiveFrames:
    """Frames of a running domain.

    Page tables are normalised: they hold pfns in the place of mfns.
    """

    _domain: LiveDomain

    def types(self, pfns: U64) -> U8:
        """Return the page type of each pfn, ABSENT for one without a frame of the domain."""
        return self._types(self._domain.p2m.lookup(pfns.reshape(-1))).reshape(pfns.shape)

    def _types(self, mfns: U64) -> U8:
        """Return the page type of each mfn, ABSENT for one that is not the domain's."""
        page_types = np.full(mfns.shape, ABSENT, np.uint8)
        local = names_local_frame(mfns)
        page_types[local] = self._domain.host.page_types(self._domain.info.domid, mfns[local])
        page_types[page_types == PageType.XTAB] = ABSENT
        return page_types

    def pages(self, pfns: U64) -> U8:
        """Return the pages' content, uint8 of shape (n, 4096)."""
        return self.pages_and_types(pfns)[0]

    def pages_and_types(self, pfns: U64) -> tuple[U8, U8]:
        """Return the pages' content, and the page types by which it was read.

        Returns:
            uint8 of shape (n, 4096), page tables normalised; and uint8 of shape (n,).

        Raises:
            Fault: For the first pfn that has no frame of the domain, or whose frame cannot be mapped.
        """
        mfns = self._domain.p2m.lookup(pfns)
        page_types = self._types(mfns)
        if (row := first_bad(page_types == ABSENT)) is not None:
            pfn, mfn = int(pfns[row]), int(mfns[row])
            reason = "has no frame" if mfn == int(NO_FRAME) else f"has mfn {mfn:#x}, which is not the domain's"
            raise Fault(f"pfn {pfn:#x} {reason}", space="pfn", address=pfn, mfn=None if mfn == int(NO_FRAME) else mfn)
        content, mapped = self._domain.read_p2m_frames(mfns)
        if (row := first_bad(~mapped)) is not None:
            pfn, mfn = int(pfns[row]), int(mfns[row])
            raise Fault(f"pfn {pfn:#x}: mfn {mfn:#x} cannot be mapped", space="pfn", address=pfn, mfn=mfn)
        pages = content.copy()  # mapped memory may change
        is_table = IS_TABLE[page_types]
        if is_table.any():  # ask again: a table that was freed meanwhile may hold data already, and must stay as it is
            page_types[is_table] = self._types(mfns[is_table])
        normalise_pages(pages, page_types, self._domain.info.width, self._domain.pfns_of)
        return pages, page_types


@dataclass(frozen=True)
class _LivePageTables:
    """Page tables of a running domain: Frames without other pages.

    A process that ends gives its page tables back. Their frames then hold other things than pfns and must not be
    walked.
    """

    _frames: LiveFrames

    def types(self, pfns: U64) -> U8:
        return self._frames.types(pfns)

    def pages(self, pfns: U64) -> U8:
        pages, page_types = self._frames.pages_and_types(pfns)
        if (row := first_bad(~IS_TABLE[page_types])) is not None:
            pfn = int(pfns[row])
            raise Fault(
                f"pfn {pfn:#x} is no page table (any more): try again, or pause the domain",
                space="pfn",
                address=pfn,
            )
        return pages
