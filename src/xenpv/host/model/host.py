"""ModelHost: Xen's memory rules in process, so that what needs a hypervisor can be tried and tested without one.

It keeps the Host, Toolstack and Mover protocols, and has the calls that a guest needs to live in what was made. The
rules are xen.git:xen/arch/x86/mm.c's and xen/common/memory.c's, and so are the errnos; where it and Xen differ, it is
wrong.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from xenpv.abi.x86 import VCPU_GUEST_CONTEXT
from xenpv.errors import HostError
from xenpv.frames import I64, U8, U64, DomId, PageType
from xenpv.host.model.domain import Domain, get_context, load_top, load_user_top, set_context
from xenpv.host.model.frame_table import ALLOCATED, ORDER, PER_EXTENT, PINNED, SPECIAL, VALIDATED
from xenpv.host.model.guest_view import GuestView, Stopped
from xenpv.host.model.move import ModelMove
from xenpv.host.protocol import DomainInfo, XenVersion

T = TypeVar("T")

SHUTDOWN_SUSPEND = 2
DOM0_PAGES = 64 << 8  # 64 MiB


class ModelHost(ModelMove):
    """A host of ``size`` bytes, up to 16 TiB, with a dom0 on it. The same ``seed`` hands out the same frames.

    ``sparse``: it says of pages nobody wrote that they have no content, which Xen does not know: who saves a domain
    then has little to write.

    >>> host = ModelHost(8 << 30)
    >>> domid = host.create(max_pages=1024)
    >>> mfns = host.populate_physmap(domid, np.arange(1024, dtype=np.uint64))
    >>> host.m2p(mfns[:3]).tolist(), host.info(domid).pages
    ([0, 1, 2], 1024)
    """

    def __init__(
        self, size: int = 16 << 30, *, version: XenVersion | None = None, seed: int = 0, sparse: bool = False
    ) -> None:
        super().__init__(size, version or XenVersion(4, 17, ".5"), seed)
        self._sparse = sparse
        dom0 = self.create(8, max_pages=DOM0_PAGES, name="Domain-0")
        self.populate_physmap(dom0, np.arange(0, DOM0_PAGES, PER_EXTENT, dtype=np.uint64), order=ORDER)
        self._domains[dom0].pauses = 0

    # the Host protocol

    def version(self) -> XenVersion:
        """Which Xen it passes for."""
        return self._version

    def domains(self) -> list[DomainInfo]:
        """All domains, ascending by domid, dom0 included."""
        return [self.info(DomId(domid)) for domid in sorted(self._domains)]

    def info(self, domid: DomId) -> DomainInfo:
        """One domain. HostError (ESRCH) when it is not there."""
        domain = self._domain("getdomaininfo", domid)
        return domain.info(self.frames.pages[domain.number])

    def max_mfn(self) -> int:
        """The highest machine frame."""
        return self.frames.max_mfn

    def map_frames(self, domid: DomId, mfns: U64) -> tuple[U8, U8]:
        """Content of a domain's frames, and for each whether it could be mapped."""
        ours = self._ours("map_frames", domid, mfns)
        pages = self.frames.read(mfns)
        pages[~ours] = 0
        return pages, ours.astype(np.uint8)

    def m2p(self, mfns: U64) -> U64:
        """The pfn that the machine-to-phys table has for each mfn, all ones where none."""
        return self.frames.m2p(mfns)

    def page_types(self, domid: DomId, mfns: U64) -> U8:
        """As getpageframeinfo3: XTAB for what is not the domain's or Xen's own, a table only while validated."""
        domain = self._domain("getpageframeinfo3", domid)
        out = np.full(len(mfns), PageType.XALLOC if self._sparse else PageType.NOTAB, np.uint8)
        touched = ~self.frames.untouched(mfns, domain.number)  # few of a large domain are
        out[touched] = self._types_of_touched(domid, mfns[touched])
        return out

    def _types_of_touched(self, domid: DomId, mfns: U64) -> U8:
        ours = self._ours("getpageframeinfo3", domid, mfns)
        kind, flags = self.frames.types(mfns)
        out = np.where((kind >= 1) & (kind <= 4), kind, 0).astype(np.uint8)
        pinned = (flags & PINNED) != 0
        out[pinned] |= np.uint8(8)
        out[~pinned & ((flags & VALIDATED) == 0)] = PageType.NOTAB
        if self._sparse:
            out[(out == PageType.NOTAB) & ~self.frames.written(mfns)] = PageType.XALLOC
        out[~ours | ((flags & SPECIAL) != 0)] = PageType.XTAB
        return out

    def vcpu_context(self, domid: DomId, vcpu: int) -> bytes:
        """The vcpu_guest_context. HostError: EINVAL for no such vcpu, ENODATA for one that was never set."""
        domain, v = self._vcpu("getvcpucontext", domid, vcpu)
        if v.context is None:
            raise self._refusal("getvcpucontext", domid, errno.ENODATA, f"vcpu {vcpu} is not initialised")
        return get_context(domain, v)

    def shared_info(self, domid: DomId) -> bytes:
        """The 4096 bytes of the shared info page."""
        mfn = self._domain("shared_info", domid).shared_info_mfn
        return self.frames.read(np.array([mfn], np.uint64)).tobytes()

    def pause(self, domid: DomId) -> None:
        """Stop it, counted. Not dom0, where the asker runs."""
        domain = self._domain("pausedomain", domid)
        if domid == 0:
            raise self._refusal("pausedomain", domid, errno.EINVAL, "the domain that asks")
        domain.pauses += 1

    def unpause(self, domid: DomId) -> None:
        """Take one pause back."""
        domain = self._domain("unpausedomain", domid)
        if not domain.pauses:
            raise self._refusal("unpausedomain", domid, errno.EINVAL, "not paused")
        domain.pauses -= 1
        domain.has_run = True

    # what a toolstack does, and guests do too

    def set_max_mem(self, domid: DomId, pages: int) -> None:
        """How many pages it may have. Fewer than it has is no error: it just gets no more."""
        self._domain("max_mem", domid).max_pages = pages

    def populate_physmap(self, domid: DomId, pfns: U64, order: int = 0) -> U64:
        """Give it memory: at each of ``pfns`` a frame, or with order 9 an extent of 512. The (first) mfns.

        As in Xen, as many as fit: fewer mfns than pfns when max_mem or the host is exhausted.
        """
        domain = self._domain("populate_physmap", domid)
        self._order("populate_physmap", domid, order)
        room = max(domain.max_pages - self.frames.pages[domain.number], 0) >> order
        take = self.frames.take_extents if order else self.frames.take_frames
        return take(domain.number, pfns[:room].astype(np.uint64), compat=domain.width == 4)

    def decrease_reservation(self, domid: DomId, mfns: U64, order: int = 0) -> int:
        """Take memory away. How many extents were: as in Xen, up to the first that is not the domain's.

        A frame that something still refers to (a mapping, a pin) stays the domain's until nothing does.
        """
        domain = self._domain("decrease_reservation", domid)
        self._order("decrease_reservation", domid, order)
        mfns = mfns.astype(np.uint64)
        if order:
            return self._decrease_extents(domain, mfns)
        if len(np.unique(mfns)) < len(mfns):
            return next((i for i, m in enumerate(mfns) if not self._decrease(domain, mfns[i : i + 1])), len(mfns))
        return self._decrease(domain, mfns)

    def machphys_update(self, domid: DomId, mfns: U64, pfns: U64) -> None:
        """Say which pfn each of the domain's frames is (MMU_MACHPHYS_UPDATE)."""
        domain = self._domain("mmu_update", domid)
        bad = ~self._ours("mmu_update", domid, mfns)
        n = int(np.argmax(bad)) if bad.any() else len(mfns)
        rows = self.frames.row(mfns[:n])  # may make the arrays longer, so it comes first
        self.frames.rows.m2p[rows] = pfns[:n]
        self._mark(domain, pfns[:n])
        if n < len(mfns):
            raise self._refusal("mmu_update", domid, errno.EINVAL, f"mfn {int(mfns[n]):#x} is not the domain's")

    def mmu_update(self, domid: DomId, updates: Sequence[tuple[int, int, int]]) -> None:
        """Write page-table entries: (mfn of the table, slot, entry) each, up to the first that Xen refuses."""
        domain = self._domain("mmu_update", domid)
        with self._refusing("mmu_update", domid):
            for mfn, slot, pte in updates:
                self.types.update(domain.owner, mfn, slot, pte)

    def update_l1(self, domid: DomId, mfn: int, slots: I64, ptes: U64) -> None:
        """Write entries of one L1 table, one after another up to the first that Xen refuses; the same as mmu_update."""
        domain = self._domain("mmu_update", domid)
        with self._refusing("mmu_update", domid):
            self.types.update_l1(domain.owner, mfn, slots, ptes)

    def pin(self, domid: DomId, mfn: int, level: int) -> None:
        """Make a frame a table of that level, for good, and validate all below it."""
        domain = self._domain("mmuext_op", domid)
        with self._refusing("mmuext_op", domid):
            self.types.pin(domain.owner, mfn, level)

    def unpin(self, domid: DomId, mfn: int) -> None:
        """Take a pin back."""
        domain = self._domain("mmuext_op", domid)
        with self._refusing("mmuext_op", domid):
            self.types.unpin(domain.owner, mfn)

    def load_top(self, domid: DomId, mfn: int, *, vcpu: int = 0, user: bool = False) -> None:
        """Load a vcpu's top table, or its user half's: MMUEXT_NEW_BASEPTR and NEW_USER_BASEPTR, which guests do."""
        domain, v = self._vcpu("mmuext_op", domid, vcpu)
        with self._refusing("mmuext_op", domid):
            (load_user_top if user else load_top)(domain, self.types, v, mfn)

    def set_vcpu_context(self, domid: DomId, vcpu: int, context: bytes) -> None:
        """Set a vcpu's context; cr3 and gdt_frames hold mfns, and are validated."""
        domain, v = self._vcpu("setvcpucontext", domid, vcpu)
        if len(context) != VCPU_GUEST_CONTEXT.size(domain.width):
            raise self._refusal("setvcpucontext", domid, errno.EINVAL, f"a context of {len(context)} bytes")
        with self._refusing("setvcpucontext", domid):
            set_context(domain, self.types, v, bytes(context))

    # shutdown, events

    def shutdown(self, domid: DomId, reason: int) -> None:
        """Shut a domain down (SCHEDOP_remote_shutdown); the first reason stays."""
        domain = self._domain("shutdown", domid)
        if domain.shutdown_reason is None:
            domain.shutdown_reason = reason

    def alloc_event_channel(self, domid: DomId, remote: int = 0) -> int:
        """A port of the domain, from 1 on, to which ``remote`` may bind (EVTCHNOP_alloc_unbound)."""
        ports = self._domain("evtchn_alloc_unbound", domid).ports
        ports.append(remote)
        return len(ports)

    def notify(self, domid: DomId, port: int) -> None:
        """Send an event."""
        self._domain("evtchn_send", domid).events[port] += 1

    def run(self, domid: DomId, guest: Callable[[GuestView], T]) -> T | None:
        """Run a guest's program on vcpu 0 until it returns, or shuts down: then None.

        HostError when the domain cannot run: paused, shut down, or its vcpu never set.
        """
        domain = self._domain("run", domid)
        for no, why in (
            (domain.pauses, "is paused"),
            (domain.shutdown_reason is not None, "has shut down"),
            (domain.vcpus[0].context is None, "has no vcpu context"),
        ):
            if no:
                raise HostError(f"dom{domid} {why}", op="run", domid=domid)
        try:
            return guest(GuestView(self, domid))
        except Stopped:
            return None

    def guest_wrote(self, domid: DomId, mfns: U64) -> None:
        """A guest wrote these frames through its own mappings; GuestView says so."""
        self._mark(self._domain("run", domid), self.frames.m2p(mfns))

    def take_event(self, domid: DomId, port: int) -> bool:
        """Whether an event is pending; it is not any longer, then. GuestView asks."""
        events = self._domain("run", domid).events
        pending, events[port] = events[port] > 0, 0
        return pending

    def held_by_vcpu(self, domid: DomId, vcpu: int = 0) -> tuple[int, ...]:
        """The mfns that Xen holds for a vcpu: its top table, its user half's (0: none), its GDT."""
        v = self._vcpu("getvcpucontext", domid, vcpu)[1]
        return (v.top, v.user_top, *v.gdt)

    # our own

    def _order(self, op: str, domid: DomId, order: int) -> None:
        if order not in {0, ORDER}:
            raise self._refusal(op, domid, errno.EINVAL, f"order {order}: the model has 0 and {ORDER}")

    def _decrease(self, domain: Domain, mfns: U64) -> int:
        bad = ~self._ours("decrease_reservation", domain.domid, mfns)
        bad |= (self.frames.types(mfns)[1] & SPECIAL) != 0
        n = int(np.argmax(bad)) if bad.any() else len(mfns)
        rows = self.frames.row(mfns[:n])
        rows = rows[(self.frames.rows.flags[rows] & ALLOCATED) != 0]
        self.frames.rows.flags[rows] &= np.uint8(~ALLOCATED & 0xFF)
        self.frames.drop(rows)
        return n

    def _decrease_extents(self, domain: Domain, mfns: U64) -> int:
        for i, mfn in enumerate(mfns):
            frames = mfn + np.arange(PER_EXTENT, dtype=np.uint64)
            aligned = int(mfn) % PER_EXTENT == 0 and self._ours("decrease_reservation", domain.domid, mfns[i : i + 1])
            whole = aligned and self.frames.drop_extents(mfns[i : i + 1]).all()
            if not whole and self._decrease(domain, frames) < PER_EXTENT:
                return i
        return len(mfns)
