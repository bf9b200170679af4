"""ModelHost: a host with Xen's memory rules, in process."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from struct import pack
from typing import TypeVar

import numpy as np

from xenpv.abi.declare import Width
from xenpv.errors import HostError
from xenpv.frames import PAGE_SIZE, U8, U64, DomId, PageType, first_bad
from xenpv.host import xenstore_nodes
from xenpv.host.errors import host_error
from xenpv.host.model.cpu_state import updated_cpu_policy, updated_tsc_info, updated_vcpu_state
from xenpv.host.model.dirty_log import DirtyLog
from xenpv.host.model.domain import ModelDomain, Vcpu
from xenpv.host.model.frame_table import EXTENT_FRAMES, EXTENT_ORDER, PINNED, SPECIAL, VALIDATED
from xenpv.host.model.guest_view import GuestShutDown, GuestView
from xenpv.host.model.hypervisor import Hypervisor
from xenpv.host.model.xenstore import ModelXenStore
from xenpv.host.protocol import DOM0, CpuPolicy, Daemons, DomainInfo, Ring, TscInfo, VcpuState, XenVersion

T = TypeVar("T")

SHUTDOWN_SUSPEND = 2
MAX_VCPUS = 8192  # MAX_VIRT_CPUS of xen.git:xen/arch/x86/include/asm/config.h
_DOM0_PAGES = 64 << 8  # 64 MiB
_HYPERCALLS = PAGE_SIZE // 32
_IRET = 23  # the one hypercall that does not return, and whose code differs


class ModelHost:
    """A host with a dom0, as the Mover protocol has it.

    What guests call is in ``hypervisor``.

    Args:
        size: Bytes of memory, up to 16 TiB. Memory that is never touched costs nothing.
        version: The Xen that it passes for.
        seed: The same seed allocates the same frames.
        sparse: Report pages that were never written as having no content (XALLOC). Xen cannot tell them, but a save
            has little to write then.

    >>> host = ModelHost(8 << 30)
    >>> domid = host.create(max_pages=1024)
    >>> mfns = host.populate_physmap(domid, np.arange(1024, dtype=np.uint64))
    >>> host.m2p(mfns[:3]).tolist(), host.info(domid).pages
    ([0, 1, 2], 1024)
    """

    def __init__(
        self, size: int = 16 << 30, *, version: XenVersion | None = None, seed: int = 0, sparse: bool = False
    ) -> None:
        self.hypervisor = Hypervisor(size, seed)
        self.frames, self.types = self.hypervisor.frames, self.hypervisor.types
        self.store = ModelXenStore()
        self._version = version or XenVersion(4, 17, ".5")
        self._sparse = sparse
        self._next_domid = 0
        dom0 = self.create(8, max_pages=_DOM0_PAGES, name="Domain-0")
        self.populate_physmap(dom0, np.arange(0, _DOM0_PAGES, EXTENT_FRAMES, dtype=np.uint64), order=EXTENT_ORDER)
        self.hypervisor.domains[dom0].pauses = 0

    # -- the Host protocol

    def version(self) -> XenVersion:
        """See Host."""
        return self._version

    def domains(self) -> list[DomainInfo]:
        """See Host."""
        return [self.info(DomId(domid)) for domid in sorted(self.hypervisor.domains)]

    def info(self, domid: DomId) -> DomainInfo:
        """See Host."""
        domain = self.hypervisor.domain("getdomaininfo", domid)
        return domain.info(self.frames.pages[domain.owner_id])

    def max_mfn(self) -> int:
        """See Host."""
        return self.frames.max_mfn

    def map_frames(self, domid: DomId, mfns: U64) -> tuple[U8, U8]:
        """See Host. The content is a copy."""
        owned = self.hypervisor.is_owned("map_frames", domid, mfns)
        pages = self.frames.read(mfns)
        pages[~owned] = 0
        return pages, owned.astype(np.uint8)

    def m2p(self, mfns: U64) -> U64:
        """See Host."""
        return self.hypervisor.m2p(mfns)

    def page_types(self, domid: DomId, mfns: U64) -> U8:
        """See Host. Only a validated table has a table's type; Xen's own pages are XTAB."""
        domain = self.hypervisor.domain("getpageframeinfo3", domid)
        out = np.full(len(mfns), PageType.XALLOC if self._sparse else PageType.NOTAB, np.uint8)
        touched = ~self.frames.is_untouched(mfns, domain.owner_id)  # few pages of a large domain are touched
        out[touched] = self._types_of_touched(domid, mfns[touched])
        return out

    def _types_of_touched(self, domid: DomId, mfns: U64) -> U8:
        owned = self.hypervisor.is_owned("getpageframeinfo3", domid, mfns)
        types, flags = self.frames.types(mfns)
        out = np.where((types >= 1) & (types <= 4), types, 0).astype(np.uint8)
        pinned = (flags & PINNED) != 0
        out[pinned] |= np.uint8(8)
        out[~pinned & ((flags & VALIDATED) == 0)] = PageType.NOTAB
        if self._sparse:
            out[(out == PageType.NOTAB) & ~self.frames.was_written(mfns)] = PageType.XALLOC
        out[~owned | ((flags & SPECIAL) != 0)] = PageType.XTAB
        return out

    def vcpu_context(self, domid: DomId, vcpu: int) -> bytes:
        """See Host. HostError: ENODATA for a vcpu whose context was never set."""
        return self.hypervisor.vcpu_context(domid, vcpu)

    def shared_info(self, domid: DomId) -> bytes:
        """See Host."""
        return self.hypervisor.shared_info(domid)

    def pause(self, domid: DomId) -> None:
        """See Host."""
        domain = self.hypervisor.domain("pausedomain", domid)
        if domid == DOM0:
            raise host_error("pausedomain", errno.EINVAL, domid, "dom0 cannot pause itself")
        domain.pauses += 1

    def unpause(self, domid: DomId) -> None:
        """See Host."""
        domain = self.hypervisor.domain("unpausedomain", domid)
        if not domain.pauses:
            raise host_error("unpausedomain", errno.EINVAL, domid, "not paused")
        domain.pauses -= 1
        domain.has_run = True

    # -- the Toolstack protocol

    def create(
        self,
        width: Width = 8,
        *,
        vcpus: int = 1,
        max_pages: int = 0,
        name: str | None = None,
        uuid: str | None = None,
    ) -> DomId:
        """See Toolstack."""
        if not 1 <= vcpus <= MAX_VCPUS:
            raise host_error("createdomain", errno.EINVAL, None, f"{vcpus} vcpus")
        domid = DomId(self._next_domid)
        domain = ModelDomain(domid, width, name, uuid, [Vcpu() for _ in range(vcpus)], max_pages)
        with self.hypervisor.raising_host_errors("createdomain", None):
            domain.shared_info_mfn = self.frames.alloc_special(domain.owner_id)
        self._next_domid += 1
        self.hypervisor.domains[domid] = domain
        self._write_nodes(xenstore_nodes.creation_nodes(domid, name, uuid))
        return domid

    def set_width(self, domid: DomId, width: Width) -> None:
        """See Toolstack."""
        domain = self.hypervisor.domain("set_address_size", domid)
        if width == domain.width:
            return
        if width == 8:
            raise host_error("set_address_size", errno.EINVAL, domid, "a 32-bit domain stays one")
        if self.frames.pages[domain.owner_id]:
            raise host_error("set_address_size", errno.EACCES, domid, "the domain has memory")
        domain.width = width

    def destroy(self, domid: DomId) -> None:
        """See Toolstack."""
        domain = self.hypervisor.domain("destroydomain", domid)
        if domid == DOM0:
            raise host_error("destroydomain", errno.EINVAL, domid, "dom0 cannot destroy itself")
        self.types.forget_owner(domain.owner_id)
        self.frames.free_all(domain.owner_id)
        del self.hypervisor.domains[domid]
        uuid_is_shared = any(candidate.uuid == domain.uuid for candidate in self.hypervisor.domains.values())
        for path in xenstore_nodes.root_paths(domid, self.daemons(), None if uuid_is_shared else domain.uuid):
            self.store.remove(path)
            parent = path.rpartition("/")[0]
            while parent.startswith(f"{xenstore_nodes.home(DOM0)}/") and not self.store.list(parent):
                self.store.remove(parent)
                parent = parent.rpartition("/")[0]

    def rename(self, domid: DomId, name: str) -> None:
        """See Toolstack."""
        domain = self.hypervisor.domain("rename", domid)
        domain.name = name
        self._write_nodes(xenstore_nodes.name_nodes(domid, name, domain.uuid))

    def set_max_mem(self, domid: DomId, pages: int) -> None:
        """See Toolstack."""
        self.hypervisor.domain("max_mem", domid).max_pages = pages

    def set_memory_map(self, domid: DomId, pages: int) -> None:
        """See Toolstack."""
        self.hypervisor.domain("set_memory_map", domid).memory_map_pages = pages

    def free_pages(self) -> int:
        """See Toolstack."""
        return self.frames.free_count

    def populate_physmap(self, domid: DomId, pfns: U64, order: int = 0) -> U64:
        """See Toolstack."""
        return self.hypervisor.populate_physmap(domid, pfns, order)

    @contextlib.contextmanager
    def map_writable(self, domid: DomId, mfns: U64) -> Iterator[U8]:
        """See Toolstack. The array is a copy, which is written back when the block ends.

        As on Xen, log-dirty does not see these writes: it logs what guests write, and what Xen writes for them.
        """
        domain = self._check_writable("map_writable", domid, mfns)
        pages = self.frames.read(mfns)
        rows = self.types.get_writable(mfns)
        try:
            yield pages
        finally:
            if self.hypervisor.domains.get(domid) is domain:
                self.frames.write(mfns, pages)
                self.types.put_writable(rows)

    def write_frames(self, domid: DomId, mfns: U64, pages: U8) -> None:
        """See Toolstack."""
        self._check_writable("write_frames", domid, mfns)
        self.frames.write(mfns, pages)

    def init_hypercall_page(self, domid: DomId, mfn: int) -> None:
        """See Toolstack."""
        op, frame = "hypercall_init", np.array([mfn], np.uint64)
        domain = self.hypervisor.domain(op, domid)
        self._check_ownership(op, domid, frame)
        if not self.types.can_map_writable(domain.owner, frame)[0]:
            raise host_error(op, errno.EPERM, domid, f"mfn {mfn:#x} is not writable")
        self.frames.write(frame, _hypercall_page(domain.width))

    def pin_tables(self, domid: DomId, mfns: U64, levels: U8) -> None:
        """See Toolstack."""
        domain = self.hypervisor.domain("mmuext_op", domid)
        with self.hypervisor.raising_host_errors("mmuext_op", domid):
            for mfn, level in zip(mfns.tolist(), levels.tolist(), strict=True):
                self.types.pin(domain.owner, mfn, level)

    def set_vcpu_context(self, domid: DomId, vcpu: int, context: bytes) -> None:
        """See Toolstack."""
        self.hypervisor.set_vcpu_context(domid, vcpu, context)

    def write_shared_info(self, domid: DomId, data: bytes, offset: int = 0) -> None:
        """See Toolstack."""
        self.hypervisor.write_shared_info(domid, data, offset)

    def daemons(self) -> Daemons:
        """See Toolstack. Both are in dom0."""
        return Daemons()

    def alloc_event_channel(self, domid: DomId, remote: DomId = DOM0) -> int:
        """See Toolstack."""
        return self.hypervisor.alloc_event_channel(domid, remote)

    def seed_grants(self, domid: DomId, *, console: int, xenstore: int) -> None:
        """See Toolstack."""
        self._check_ownership("seed_grants", domid, np.array([console, xenstore], np.uint64))
        self.hypervisor.domain("seed_grants", domid).grants.update({0: console, 1: xenstore})

    def introduce(self, domid: DomId, *, console: Ring, xenstore: Ring) -> None:
        """See Toolstack. Writes the nodes of the rings; no daemon looks at them."""
        domain = self.hypervisor.domain("introduce", domid)
        if 1 not in domain.grants:
            raise host_error("introduce", errno.EINVAL, domid, "xenstored has no grant for its ring")
        info = domain.info(self.frames.pages[domain.owner_id])
        self._write_nodes(xenstore_nodes.introduction_nodes(info, self.daemons(), console, xenstore))

    def set_configuration(self, domid: DomId, config: bytes) -> None:
        """See Toolstack."""
        self.hypervisor.domain("userdata", domid).config = config

    def configuration(self, domid: DomId) -> bytes | None:
        """See Toolstack."""
        return self.hypervisor.domain("userdata", domid).config or None

    def _write_nodes(self, nodes: list[xenstore_nodes.Node]) -> None:
        for node in nodes:
            self.store.write(node.path, node.value.encode())

    def _check_writable(self, op: str, domid: DomId, mfns: U64) -> ModelDomain:
        """Return the domain.

        HostError unless all frames are its own and can be mapped writable.
        """
        domain = self.hypervisor.domain(op, domid)
        self._check_ownership(op, domid, mfns)
        first = first_bad(~self.types.can_map_writable(domain.owner, mfns))
        if first is not None:
            reason = f"mfn {int(mfns[first]):#x} cannot be mapped writable"
            raise host_error(op, errno.EBUSY, domid, reason)
        return domain

    def _check_ownership(self, op: str, domid: DomId, mfns: U64) -> None:
        """Raise HostError (EINVAL) unless all frames are the domain's memory.

        Xen's pages for it are not.
        """
        owned = self.hypervisor.is_owned(op, domid, mfns) & ((self.frames.types(mfns)[1] & SPECIAL) == 0)
        if (first := first_bad(~owned)) is not None:
            raise host_error(op, errno.EINVAL, domid, f"mfn {int(mfns[first]):#x} is not the domain's")

    # -- the Mover protocol

    def vcpu_state(self, domid: DomId, vcpu: int) -> VcpuState:
        """See Mover."""
        state = self.hypervisor.vcpu("get_ext_vcpucontext", domid, vcpu)[1].state
        return state._replace(extended=pack("<I", vcpu) + state.extended[4:])

    def set_vcpu_state(self, domid: DomId, vcpu: int, state: VcpuState) -> None:
        """See Mover."""
        domain, v = self.hypervisor.vcpu("set_ext_vcpucontext", domid, vcpu)
        with self.hypervisor.raising_host_errors("set_ext_vcpucontext", domid):
            v.state = updated_vcpu_state(v.state, state, domain.width)

    def tsc_info(self, domid: DomId) -> TscInfo:
        """See Mover. The domain's clock does not advance."""
        return self.hypervisor.domain("gettscinfo", domid).tsc

    def set_tsc_info(self, domid: DomId, info: TscInfo) -> None:
        """See Mover."""
        domain = self.hypervisor.domain("settscinfo", domid)
        with self.hypervisor.raising_host_errors("settscinfo", domid):
            domain.tsc = updated_tsc_info(info)

    def cpu_policy(self, domid: DomId) -> CpuPolicy:
        """See Mover."""
        return self.hypervisor.domain("get_cpu_policy", domid).policy

    def set_cpu_policy(self, domid: DomId, policy: CpuPolicy) -> None:
        """See Mover."""
        domain = self.hypervisor.domain("set_cpu_policy", domid)
        if domain.has_run:
            raise host_error("set_cpu_policy", errno.EEXIST, domid, "the domain runs or has run already")
        with self.hypervisor.raising_host_errors("set_cpu_policy", domid):
            domain.policy = updated_cpu_policy(domain.policy, policy)

    def log_dirty(self, domid: DomId, *, on: bool) -> None:
        """See Mover."""
        domain = self.hypervisor.domain("shadow_op", domid)
        if on == (domain.dirty_log is not None):
            reason = f"log-dirty is {'enabled' if on else 'disabled'} already"
            raise host_error("shadow_op", errno.EINVAL, domid, reason)
        domain.dirty_log = DirtyLog() if on else None

    def dirty_pfns(self, domid: DomId, pages: int, *, clean: bool) -> U64:
        """See Mover. The guest gets a time slice first (see set_time_slice)."""
        self._run_time_slice(domid)
        domain = self.hypervisor.domain("shadow_op", domid)
        if domain.dirty_log is None:
            raise host_error("shadow_op", errno.EINVAL, domid, "log-dirty is disabled")
        return domain.dirty_log.clean(pages) if clean else domain.dirty_log.peek(pages)

    def request_shutdown(self, domid: DomId, value: str) -> None:
        """See Mover. The guest gets a time slice after it (see set_time_slice)."""
        pending = self.shutdown_request(domid)
        if value or pending:
            self.store.write(f"{xenstore_nodes.home(domid)}/{xenstore_nodes.CONTROL_SHUTDOWN}", value.encode())
        self._run_time_slice(domid)

    def shutdown_request(self, domid: DomId) -> str:
        """See Mover."""
        self.hypervisor.domain("xenstore", domid)
        return (self.store.read(f"{xenstore_nodes.home(domid)}/{xenstore_nodes.CONTROL_SHUTDOWN}") or b"").decode()

    def devices(self, domid: DomId) -> list[str]:
        """See Mover."""
        self.hypervisor.domain("xenstore", domid)
        return xenstore_nodes.find_devices(domid, self.store.list)

    def resume(self, domid: DomId) -> None:
        """See Mover."""
        self.hypervisor.domain("resumedomain", domid).shutdown_reason = None

    # -- running guests

    def guest_view(self, domid: DomId) -> GuestView:
        """Return the view that a guest program has of this host."""
        return GuestView(self.hypervisor, self.store, domid)

    def run(self, domid: DomId, program: Callable[[GuestView], T]) -> T | None:
        """Run a guest's program on vcpu 0.

        Returns:
            What the program returns; None if it shuts the domain down.

        Raises:
            HostError: The domain cannot run: it is paused, has shut down, or has no vcpu context.
        """
        domain = self.hypervisor.domain("run", domid)
        for cannot_run, reason in (
            (domain.pauses, "is paused"),
            (domain.shutdown_reason is not None, "has shut down"),
            (domain.vcpus[0].context is None, "has no vcpu context"),
        ):
            if cannot_run:
                raise HostError(f"dom{domid} {reason}", op="run", domid=domid)
        try:
            return program(self.guest_view(domid))
        except GuestShutDown:
            return None

    def set_time_slice(self, domid: DomId, time_slice: Callable[[], None] | None) -> None:
        """Set the guest program that runs while time passes.

        The model has no threads. It calls ``time_slice`` each time its dirty pfns are read or its shutdown request
        changes, unless the domain is paused or has shut down.
        """
        self.hypervisor.domain("run", domid).time_slice = time_slice

    def _run_time_slice(self, domid: DomId) -> None:
        domain = self.hypervisor.domain("run", domid)
        if domain.time_slice is not None and not domain.pauses and domain.shutdown_reason is None:
            domain.time_slice()


def _hypercall_page(width: Width) -> U8:
    """Return the code that Xen writes to a hypercall page, uint8 (1, 4096).

    Source: xen.git:xen/arch/x86/pv/hypercall.c
    """
    prologue, epilogue = ("51 41 53", "0f 05 41 5b 59 c3") if width == 8 else ("", "cd 82 c3")
    page = np.zeros((_HYPERCALLS, 32), np.uint8)
    for number in range(_HYPERCALLS):
        end = epilogue[:5] if number == _IRET else epilogue
        push = "50" if number == _IRET else ""
        code = bytes.fromhex(f"{prologue} {push} b8 {number:02x} 00 00 00 {end}")
        page[number, : len(code)] = np.frombuffer(code, np.uint8)
    return page.reshape(1, PAGE_SIZE)
