"""Protocols of a hypervisor, and the values that they pass.

Host only inspects domains, except that it can pause them. Toolstack builds domains, Mover saves, restores and migrates
them. ModelHost and XenHost keep all three, which tests/contract proves. Every call raises HostError, with the
operation, the domain and the errno, if Xen refuses it.
"""

from __future__ import annotations

import errno
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol
from uuid import UUID

from xenpv.abi.declare import Width
from xenpv.errors import HostError
from xenpv.frames import U8, U64, DomId
from xenpv.text import printable

DOM0 = DomId(0)


class XenVersion(NamedTuple):
    """The version of a Xen: 4, 17 and ".5" for "4.17.5"."""

    major: int
    minor: int
    extra: str


@dataclass(frozen=True, slots=True)
class DomainInfo:
    """A domain as hypervisor and xenstore describe it.

    Attributes:
        domid: Its number.
        name: Its name in xenstore; None if it has none.
        uuid: Its handle; None if it has none.
        hvm: Whether it is HVM or PVH, not PV.
        width: Bytes of a word of its guest.
        pages: How many pages it has.
        max_pages: How many pages it may have.
        shared_info_mfn: The frame of its shared info.
        max_vcpu: Its highest vcpu number; -1 if it has no vcpu.
        paused: Whether a toolstack has paused it.
        shutdown: Whether it has shut down.
        shutdown_reason: SHUTDOWN_*; None while it has not shut down.
        dying: Whether it is being destroyed.
    """

    domid: DomId
    name: str | None
    uuid: str | None
    hvm: bool
    width: Width
    pages: int
    max_pages: int
    shared_info_mfn: int
    max_vcpu: int
    paused: bool
    shutdown: bool
    shutdown_reason: int | None
    dying: bool

    @property
    def label(self) -> str:
        """The domain for people: "dom5 (web)"."""
        return f"dom{self.domid}" + (f" ({printable(self.name)})" if self.name else "")

    @property
    def is_stopped(self) -> bool:
        """Whether none of its vcpus runs: the domain is paused or has shut down."""
        return self.paused or self.shutdown


class Host(Protocol):
    """A hypervisor whose domains can be inspected."""

    def version(self) -> XenVersion:
        """Return the version of Xen."""

    def domains(self) -> list[DomainInfo]:
        """Return all domains, ascending by domid, including dom0."""

    def info(self, domid: DomId) -> DomainInfo:
        """Return one domain. HostError (ESRCH) if it does not exist, or not any more."""

    def max_mfn(self) -> int:
        """Return the highest machine frame number of the host."""

    def map_frames(self, domid: DomId, mfns: U64) -> tuple[U8, U8]:
        """Return the content of a domain's machine frames, read-only.

        Args:
            domid: The domain.
            mfns: Its frames, in any order; a frame may appear several times.

        Returns:
            The frames, uint8 (n, 4096), and whether each could be mapped, uint8 (n,), 0 or 1. A frame that is not the
            domain's, or beyond the host, is 0 and all zeroes. The first array may be a mapping that shows what the
            domain writes, and lasts as long as anything refers to it: copy what must not change.
        """

    def m2p(self, mfns: U64) -> U64:
        """Return the pfn of each frame by Xen's m2p, in whatever domain.

        It is all ones for a frame beyond max_mfn.
        """

    def page_types(self, domid: DomId, mfns: U64) -> U8:
        """Return the abi.domctl.PageType of each frame, as getpageframeinfo3 does.

        It is XTAB for a frame that is not the domain's. Xen 4.14 reports the type of a former page table, too.
        """

    def vcpu_context(self, domid: DomId, vcpu: int) -> bytes:
        """Return the vcpu_guest_context of a vcpu; cr3 and gdt_frames hold mfns.

        HostError (EINVAL): no such vcpu.
        """

    def shared_info(self, domid: DomId) -> bytes:
        """Return the current content of the shared info page, 4096 bytes."""

    def pause(self, domid: DomId) -> None:
        """Pause a domain.

        Pauses are counted: it takes as many unpauses to let it run again.
        """

    def unpause(self, domid: DomId) -> None:
        """Undo one pause."""


class Ring(NamedTuple):
    """A page that a domain shares with a daemon, and its event channel."""

    mfn: int
    port: int


class Daemons(NamedTuple):
    """The domains in which xenconsoled and xenstored run; dom0 by default."""

    console: DomId = DOM0
    xenstore: DomId = DOM0


class VcpuState(NamedTuple):
    """The state of a vcpu beyond its context, as bytes of stream records.

    A part that the vcpu does not have is empty.

    Attributes:
        extended: struct xen_domctl_ext_vcpucontext.
        xsave: The xsave area, as XEN_DOMCTL_getvcpuextstate returns it.
        msrs: Array of struct xen_domctl_vcpu_msr.
    """

    extended: bytes = b""
    xsave: bytes = b""
    msrs: bytes = b""


class TscInfo(NamedTuple):
    """How a domain sees the TSC, as XEN_DOMCTL_gettscinfo returns it.

    ``nsec`` is the time elapsed on its clock.
    """

    mode: int = 0
    khz: int = 0
    nsec: int = 0
    incarnation: int = 0


class CpuPolicy(NamedTuple):
    """The CPU policy of a domain: what it learns about its CPU.

    Attributes:
        leaves: Array of struct xen_cpuid_leaf.
        msrs: Array of struct xen_msr_entry.
    """

    leaves: bytes = b""
    msrs: bytes = b""


class Toolstack(Host, Protocol):
    """A host on which PV domains can be built.

    A builder calls, in this order: create, set_memory_map, populate_physmap, alloc_event_channel twice, map_writable or
    write_frames, init_hypercall_page, pin_tables, write_shared_info, set_vcpu_context, seed_grants, introduce,
    set_configuration, unpause. ``destroy`` undoes all of them, at whatever step a build failed or was interrupted.
    """

    def create(
        self,
        width: Width = 8,
        *,
        vcpus: int = 1,
        max_pages: int = 0,
        name: str | None = None,
        uuid: str | None = None,
    ) -> DomId:
        """Create a PV domain without memory, paused once.

        It has the xenstore nodes of a new domain of libxl.

        Raises:
            HostError: No domain was created. EINVAL: no vcpu, or more than Xen allows a PV domain; EOPNOTSUPP: this
                Xen runs no 32-bit PV domains; ENOMEM.
        """

    def set_width(self, domid: DomId, width: Width) -> None:
        """Make a domain without memory a domain for 32-bit guests.

        Setting its own width again does nothing.

        Raises:
            HostError: EINVAL: a 32-bit domain cannot become 64-bit; EACCES: it has memory; EOPNOTSUPP: this Xen runs
                no 32-bit PV domains.
        """

    def destroy(self, domid: DomId) -> None:
        """Destroy a domain, free its memory, and remove its nodes from xenstore.

        If it is interrupted, call it again: it continues where it stopped.

        Raises:
            HostError: ESRCH: no such domain; EINVAL: dom0.
        """

    def rename(self, domid: DomId, name: str) -> None:
        """Change a domain's name in xenstore.

        Raises:
            HostError: ESRCH: no such domain.
        """

    def set_max_mem(self, domid: DomId, pages: int) -> None:
        """Limit how many pages a domain may have. It keeps what it has already."""

    def set_memory_map(self, domid: DomId, pages: int) -> None:
        """Set the memory map of a domain to RAM from pfn 0 on, ``pages`` pages.

        Without a memory map, Linux reserves 8 MiB of pfns at the end for memory that it may get later.
        """

    def free_pages(self) -> int:
        """Return how many pages are free for domains.

        Another toolstack may take them at any moment.
        """

    def populate_physmap(self, domid: DomId, pfns: U64, order: int = 0) -> U64:
        """Allocate memory for a domain. Its content is undefined.

        Args:
            domid: The domain.
            pfns: The pfn of each frame; with ``order`` 9 the first pfn of each extent of 512 frames.
            order: 0 or 9.

        Returns:
            The (first) mfns, uint64. There are fewer than ``pfns`` if set_max_mem or the host does not allow more; then
            only the first extents were populated. The m2p has the pfns of all.
        """

    def map_writable(self, domid: DomId, mfns: U64) -> AbstractContextManager[U8]:
        """Map frames writable until the block ends: their content, uint8 (n, 4096).

        No frame may appear twice. Until the block ends the frames are in use as writable pages, and cannot become page
        tables.

        Raises:
            HostError: Before the block starts. EINVAL: a frame is not the domain's; EBUSY: it is a page table.
        """

    def write_frames(self, domid: DomId, mfns: U64, pages: U8) -> None:
        """Write whole frames, all or none. HostError as map_writable."""

    def init_hypercall_page(self, domid: DomId, mfn: int) -> None:
        """Fill a frame with the code of hypercalls, 32 bytes each.

        Raises:
            HostError: EINVAL: the frame is not the domain's; EPERM: it is a page table.
        """

    def pin_tables(self, domid: DomId, mfns: U64, levels: U8) -> None:
        """Pin page tables, one after another up to the first that Xen refuses.

        This validates all below each.

        Args:
            domid: The domain.
            mfns: The tables.
            levels: The level of each, 1 to 4.

        Raises:
            HostError: Names the refused table. EINVAL: it is not the domain's, already pinned, in use as another type,
                or has a bad entry; EBUSY: a table would be writable.
        """

    def set_vcpu_context(self, domid: DomId, vcpu: int, context: bytes) -> None:
        """Set the vcpu_guest_context of a vcpu.

        Cr3 and gdt_frames hold mfns, which Xen validates.

        Raises:
            HostError: EINVAL: no such vcpu, a wrong size, or frames that cannot be of the types required.
        """

    def write_shared_info(self, domid: DomId, data: bytes, offset: int = 0) -> None:
        """Write into the shared info page. HostError (EINVAL) beyond its end."""

    def daemons(self) -> Daemons:
        """Return the domains of xenconsoled and xenstored, for event channels and grants."""

    def alloc_event_channel(self, domid: DomId, remote: DomId = DOM0) -> int:
        """Allocate a port, from 1 on, to which ``remote`` may bind."""

    def seed_grants(self, domid: DomId, *, console: int, xenstore: int) -> None:
        """Grant the daemons two frames, by entries 0 and 1 of the grant table.

        Raises:
            HostError: EINVAL: a frame is not the domain's.
        """

    def introduce(self, domid: DomId, *, console: Ring, xenstore: Ring) -> None:
        """Introduce a domain to xenstored and xenconsoled.

        Write the nodes that xl and the guest look for.

        Seed its grants, and give it its memory and its vcpus, before: the nodes describe it as it is now.
        """

    def set_configuration(self, domid: DomId, config: bytes) -> None:
        """Store a domain's configuration for xl, in the JSON of libxl.

        Without one, xl does not save a domain (xl save) and does not list it in full (xl list -l). ``destroy`` removes
        it. HostError (ESRCH): no such domain.
        """

    def configuration(self, domid: DomId) -> bytes | None:
        """Return the configuration that ``set_configuration`` or xl stored.

        None if there is none.
        """


class Mover(Toolstack, Protocol):
    """A host whose domains can be saved and migrated, or restored on it."""

    def vcpu_state(self, domid: DomId, vcpu: int) -> VcpuState:
        """Return the state of a vcpu beyond its context. HostError (EINVAL): no such vcpu."""

    def set_vcpu_state(self, domid: DomId, vcpu: int, state: VcpuState) -> None:
        """Set the parts of a vcpu's state that are not empty. Set its context before.

        Raises:
            HostError: EINVAL: no such vcpu, or Xen refuses the state.
        """

    def tsc_info(self, domid: DomId) -> TscInfo:
        """Return how the domain sees the TSC."""

    def set_tsc_info(self, domid: DomId, info: TscInfo) -> None:
        """Set how the domain sees the TSC, before it first runs."""

    def cpu_policy(self, domid: DomId) -> CpuPolicy:
        """Return the CPU policy of the domain."""

    def set_cpu_policy(self, domid: DomId, policy: CpuPolicy) -> None:
        """Set the CPU policy of the domain before it first runs.

        Raises:
            HostError: Names a leaf or MSR whose value this host cannot provide. EEXIST: the domain has run.
        """

    def log_dirty(self, domid: DomId, *, on: bool) -> None:
        """Enable or disable log-dirty mode: Xen logs the pages that a domain writes.

        Raises:
            HostError: EINVAL: it is enabled, or disabled, already; EOPNOTSUPP: this Xen has no log-dirty mode for PV
                domains (no shadow paging).
        """

    def dirty_pfns(self, domid: DomId, pages: int, *, clean: bool) -> U64:
        """Return the pfns below ``pages`` that were written, ascending.

        With ``clean``, clear the log.

        Raises:
            HostError: EINVAL: log-dirty is disabled; ENOMEM: Xen had too little memory for the log.
        """

    def request_shutdown(self, domid: DomId, value: str) -> None:
        """Ask the guest to suspend, by writing "suspend" to control/shutdown in xenstore.

        An empty ``value`` withdraws a request that the guest has not seen yet.
        """

    def shutdown_request(self, domid: DomId) -> str:
        """Return the pending request in control/shutdown.

        A guest that sees one makes it empty.
        """

    def devices(self, domid: DomId) -> list[str]:
        """Return the domain's devices besides its console.

        They are named by class and number: "vbd 51712", "vif 0".
        """

    def resume(self, domid: DomId) -> None:
        """Let a domain that has shut down run on, as after a cancelled suspend."""


def destroy_unfinished(host: Toolstack, domid: DomId, failure: BaseException) -> None:
    """Destroy a domain after the failure that kept it from being finished.

    If that fails, too, the failure gets a note: what went wrong first is what counts.
    """
    try:
        host.destroy(domid)
    except HostError as e:
        failure.add_note(f"the unfinished dom{domid} could not be destroyed ({e}): `xl destroy {domid}` does it")


def find_domain(host: Host, text: str) -> DomainInfo:
    """Return the domain with this id, uuid or name. Digits are an id, as for xl.

    A name that looks like a uuid is found only if no domain has that uuid.

    Raises:
        HostError: There is no such domain, or several have this name.
    """
    if text.isascii() and text.isdigit():
        return host.info(DomId(int(text)))
    domains = host.domains()
    try:
        uuid = str(UUID(text))
    except ValueError:
        uuid = ""
    matches = [d for d in domains if uuid and d.uuid == uuid] or [d for d in domains if d.name == text]
    if not matches:
        raise HostError(f"no domain has the id, uuid or name {text!r}", op="find", errno=errno.ESRCH)
    if len(matches) > 1:
        ids = ", ".join(f"dom{d.domid}" for d in matches)
        raise HostError(f"{text!r} may be any of {ids}; use the id", op="find")
    return matches[0]
