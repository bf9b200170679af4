"""The modelled hypervisor: frames, page types, domains, and hypercalls.

Rules and errnos are those of Xen. Where the model and Xen differ, the model is wrong.

Source: xen.git:xen/arch/x86/mm.c, xen/common/memory.c
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from xenpv.abi.x86 import VCPU_GUEST_CONTEXT
from xenpv.frames import I64, PAGE_SIZE, U64, DomId, Mask, first_bad
from xenpv.host.errors import host_error
from xenpv.host.model.domain import ModelDomain, Vcpu
from xenpv.host.model.frame_table import ALLOCATED, EXTENT_FRAMES, EXTENT_ORDER, SPECIAL, FrameTable, NoMemoryError
from xenpv.host.model.page_types import HypercallError, PageTypes


class Hypervisor:
    """Frames, their types, and domains.

    Every call raises HostError, with the errno that Xen gives.

    Args:
        size: Bytes of memory.
        seed: The same seed allocates the same frames.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.frames = FrameTable(size, seed)
        self.types = PageTypes(self.frames, self._mark_table_dirty)
        self.domains: dict[int, ModelDomain] = {}

    # -- looking up what a call is about

    def domain(self, op: str, domid: DomId) -> ModelDomain:
        """Return a domain; HostError (ESRCH) if it does not exist.

        ``op`` names the call in errors.
        """
        if domid not in self.domains:
            raise host_error(op, errno.ESRCH, domid)
        return self.domains[domid]

    def vcpu(self, op: str, domid: DomId, vcpu: int) -> tuple[ModelDomain, Vcpu]:
        """Return a domain and one of its vcpus.

        HostError (ESRCH, EINVAL) if there is none of that number.
        """
        domain = self.domain(op, domid)
        if not 0 <= vcpu < len(domain.vcpus):
            raise host_error(op, errno.EINVAL, domid, f"no vcpu {vcpu}")
        return domain, domain.vcpus[vcpu]

    def is_owned(self, op: str, domid: DomId, mfns: U64) -> Mask:
        """Return which frames are the domain's."""
        owned: Mask = self.frames.owners(mfns) == self.domain(op, domid).owner_id
        return owned

    @contextmanager
    def raising_host_errors(self, op: str, domid: DomId | None) -> Iterator[None]:
        """Turn HypercallError and NoMemoryError inside the block into HostError."""
        try:
            yield
        except HypercallError as error:
            raise host_error(op, error.errno, domid, str(error)) from None
        except NoMemoryError:
            raise host_error(op, errno.ENOMEM, domid, "no free frames") from None

    # -- log-dirty

    def mark_dirty(self, domid: DomId, mfns: U64) -> None:
        """Log that a guest wrote these frames through its own mappings."""
        self._mark_pfns_dirty(self.domain("mark_dirty", domid), self.frames.m2p(mfns))

    @staticmethod
    def _mark_pfns_dirty(domain: ModelDomain, pfns: U64) -> None:
        if domain.dirty_log is not None:
            domain.dirty_log.mark(pfns)

    def _mark_table_dirty(self, owner_id: int, mfn: int) -> None:
        domain = self.domains.get(owner_id - 1)
        if domain is not None:
            self._mark_pfns_dirty(domain, self.frames.m2p(np.array([mfn], np.uint64)))

    # -- memory

    def populate_physmap(self, domid: DomId, pfns: U64, order: int = 0) -> U64:
        """XENMEM_populate_physmap. See Toolstack.populate_physmap."""
        domain = self.domain("populate_physmap", domid)
        self._check_order("populate_physmap", domid, order)
        allowed = max(domain.max_pages - self.frames.pages[domain.owner_id], 0) >> order
        allocate = self.frames.alloc_extents if order else self.frames.alloc_frames
        return allocate(domain.owner_id, pfns[:allowed].astype(np.uint64), compat=domain.width == 4)

    def decrease_reservation(self, domid: DomId, mfns: U64, order: int = 0) -> int:
        """XENMEM_decrease_reservation, up to the first extent of somebody else.

        A frame that something still refers to (a mapping, a pin) stays the domain's until nothing does.

        Returns:
            How many extents were returned.
        """
        domain = self.domain("decrease_reservation", domid)
        self._check_order("decrease_reservation", domid, order)
        mfns = mfns.astype(np.uint64)
        if order:
            return self._decrease_extents(domain, mfns)
        if len(np.unique(mfns)) < len(mfns):
            return next((i for i in range(len(mfns)) if not self._decrease_frames(domain, mfns[i : i + 1])), len(mfns))
        return self._decrease_frames(domain, mfns)

    def _check_order(self, op: str, domid: DomId, order: int) -> None:
        if order not in {0, EXTENT_ORDER}:
            raise host_error(op, errno.EINVAL, domid, f"order {order}: the model supports 0 and {EXTENT_ORDER}")

    def _decrease_frames(self, domain: ModelDomain, mfns: U64) -> int:
        bad = ~self.is_owned("decrease_reservation", domain.domid, mfns)
        bad |= (self.frames.types(mfns)[1] & SPECIAL) != 0
        first = first_bad(bad)
        count = len(mfns) if first is None else first
        rows = self.frames.rows_of(mfns[:count])
        rows = rows[(self.frames.rows.flags[rows] & ALLOCATED) != 0]
        self.frames.rows.flags[rows] &= np.uint8(~ALLOCATED & 0xFF)
        self.frames.put_refs(rows)
        return count

    def _decrease_extents(self, domain: ModelDomain, mfns: U64) -> int:
        for i, mfn in enumerate(mfns):
            extent = mfns[i : i + 1]
            owned = int(mfn) % EXTENT_FRAMES == 0 and self.is_owned("decrease_reservation", domain.domid, extent)
            freed = owned and self.frames.free_uniform_extents(extent).all()
            if (
                not freed
                and self._decrease_frames(domain, mfn + np.arange(EXTENT_FRAMES, dtype=np.uint64)) < EXTENT_FRAMES
            ):
                return i
        return len(mfns)

    def m2p(self, mfns: U64) -> U64:
        """Return the pfn of each mfn by the m2p, all ones for none."""
        return self.frames.m2p(mfns)

    def machphys_update(self, domid: DomId, mfns: U64, pfns: U64) -> None:
        """MMU_MACHPHYS_UPDATE, up to the first frame that is not the domain's."""
        domain = self.domain("mmu_update", domid)
        bad = ~self.is_owned("mmu_update", domid, mfns)
        foreign = first_bad(bad)
        count = len(mfns) if foreign is None else foreign
        rows = self.frames.rows_of(mfns[:count])  # first: it may replace the columns by longer ones
        self.frames.rows.m2p[rows] = pfns[:count]
        self._mark_pfns_dirty(domain, pfns[:count])
        if foreign is not None:
            raise host_error("mmu_update", errno.EINVAL, domid, f"mfn {int(mfns[foreign]):#x} is not the domain's")

    # -- page tables

    def mmu_update(self, domid: DomId, updates: Sequence[tuple[int, int, int]]) -> None:
        """MMU_NORMAL_PT_UPDATE, up to the first refused entry.

        Args:
            domid: The domain.
            updates: The mfn of the table, the slot and the entry of each.
        """
        domain = self.domain("mmu_update", domid)
        with self.raising_host_errors("mmu_update", domid):
            for mfn, slot, pte in updates:
                self.types.update_entry(domain.owner, mfn, slot, pte)

    def update_l1_entries(self, domid: DomId, mfn: int, slots: I64, ptes: U64) -> None:
        """Write entries of one L1 table, up to the first refused one.

        Equal to as many mmu_updates.
        """
        domain = self.domain("mmu_update", domid)
        with self.raising_host_errors("mmu_update", domid):
            self.types.update_l1_entries(domain.owner, mfn, slots, ptes)

    def pin(self, domid: DomId, mfn: int, level: int) -> None:
        """MMUEXT_PIN_L1_TABLE to L4: validate a table and all below, and pin it."""
        domain = self.domain("mmuext_op", domid)
        with self.raising_host_errors("mmuext_op", domid):
            self.types.pin(domain.owner, mfn, level)

    def unpin(self, domid: DomId, mfn: int) -> None:
        """MMUEXT_UNPIN_TABLE."""
        domain = self.domain("mmuext_op", domid)
        with self.raising_host_errors("mmuext_op", domid):
            self.types.unpin(domain.owner, mfn)

    def load_cr3(self, domid: DomId, mfn: int, *, vcpu: int = 0, user: bool = False) -> None:
        """MMUEXT_NEW_BASEPTR.

        With ``user`` MMUEXT_NEW_USER_BASEPTR, where mfn 0 means none.
        """
        domain, v = self.vcpu("mmuext_op", domid, vcpu)
        load = v.load_guest_table_user if user else v.load_guest_table
        with self.raising_host_errors("mmuext_op", domid):
            load(self.types, domain.owner, mfn)

    # -- vcpus and shared info

    def vcpu_context(self, domid: DomId, vcpu: int) -> bytes:
        """Return the vcpu_guest_context.

        HostError: EINVAL for no such vcpu, ENODATA for one that was never set.
        """
        domain, v = self.vcpu("getvcpucontext", domid, vcpu)
        if v.context is None:
            raise host_error("getvcpucontext", errno.ENODATA, domid, f"vcpu {vcpu} is not initialised")
        return v.get_context(domain.width)

    def set_vcpu_context(self, domid: DomId, vcpu: int, context: bytes) -> None:
        """See Toolstack.set_vcpu_context."""
        domain, v = self.vcpu("setvcpucontext", domid, vcpu)
        if len(context) != VCPU_GUEST_CONTEXT.size(domain.width):
            raise host_error("setvcpucontext", errno.EINVAL, domid, f"a context of {len(context)} bytes")
        with self.raising_host_errors("setvcpucontext", domid):
            v.set_context(self.types, domain.owner, bytes(context), vcpu=vcpu)

    def vcpu_frames(self, domid: DomId, vcpu: int = 0) -> tuple[int, ...]:
        """Return the mfns that Xen holds for a vcpu.

        They are guest_table, guest_table_user (0: none), and those of its GDT.
        """
        v = self.vcpu("getvcpucontext", domid, vcpu)[1]
        return (v.guest_table, v.guest_table_user, *v.gdt_frames)

    def shared_info(self, domid: DomId) -> bytes:
        """Return the 4096 bytes of the shared info page."""
        mfn = self.domain("shared_info", domid).shared_info_mfn
        return self.frames.read(np.array([mfn], np.uint64)).tobytes()

    def write_shared_info(self, domid: DomId, data: bytes, offset: int = 0) -> None:
        """Write into the shared info page. HostError (EINVAL) beyond its end."""
        mfn = self.domain("shared_info", domid).shared_info_mfn
        if offset < 0 or offset + len(data) > PAGE_SIZE:
            raise host_error("shared_info", errno.EINVAL, domid, f"{len(data)} bytes at {offset:#x}")
        self.frames.page(mfn)[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    # -- events and scheduling

    def alloc_event_channel(self, domid: DomId, remote: int = 0) -> int:
        """EVTCHNOP_alloc_unbound: return a port, from 1 on, for ``remote``."""
        ports = self.domain("evtchn_alloc_unbound", domid).ports
        ports.append(remote)
        return len(ports)

    def send_event(self, domid: DomId, port: int) -> None:
        """EVTCHNOP_send to a port of the domain."""
        self.domain("evtchn_send", domid).pending_events.add(port)

    def consume_event(self, domid: DomId, port: int) -> bool:
        """Return whether an event is pending on a port, and clear it."""
        pending_events = self.domain("evtchn_pending", domid).pending_events
        pending = port in pending_events
        pending_events.discard(port)
        return pending

    def shutdown(self, domid: DomId, reason: int) -> None:
        """SCHEDOP_remote_shutdown: shut a domain down. The first reason stays."""
        domain = self.domain("shutdown", domid)
        if domain.shutdown_reason is None:
            domain.shutdown_reason = reason
