"""The hypervisor as xenpv needs it: protocols that hosts in process and on real Xen both keep (tests/contract).

Host is the read side: no call changes a domain, but for pause and unpause, which only ``--pause`` asks for. Toolstack
adds what builds a domain, Mover what saves, restores and migrates one.
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

DOM0 = DomId(0)


class XenVersion(NamedTuple):
    """Which Xen this is: 4 and 17 of "4.17.5", and the rest as Xen says it (".5")."""

    major: int
    minor: int
    extra: str


@dataclass(frozen=True, slots=True)
class DomainInfo:
    """A domain as the hypervisor and xenstore know it. ``name`` and ``uuid`` are None where nobody gave one.

    ``pages`` is what it holds, ``max_pages`` what it may; ``shared_info_mfn`` the frame of its shared info;
    ``max_vcpu`` its highest vcpu's number.
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
        """For people: "dom5 (web)"."""
        return f"dom{self.domid}" + (f" ({self.name})" if self.name else "")

    @property
    def is_stopped(self) -> bool:
        """Whether none of its vcpus runs: the domain is paused or has shut down."""
        return self.paused or self.shutdown


class Host(Protocol):
    """A hypervisor. Every call raises HostError, with the operation, domain and errno, when Xen says no."""

    def version(self) -> XenVersion:
        """Which Xen it is."""

    def domains(self) -> list[DomainInfo]:
        """All domains, ascending by domid, dom0 included."""

    def info(self, domid: DomId) -> DomainInfo:
        """One domain. HostError (ESRCH) when it is not there, or has gone meanwhile."""

    def max_mfn(self) -> int:
        """The highest machine frame of the host: no mfn above it is anybody's."""

    def map_frames(self, domid: DomId, mfns: U64) -> tuple[U8, U8]:
        """Content of a domain's machine frames, read-only: uint8 (n, 4096), and for each whether it could be mapped
        (0 or 1).

        Frames that cannot be mapped (not the domain's, beyond the host) read as zeroes. The array may be a live
        mapping, which shows what the domain writes, and lasts as long as anything refers to it: copy what to keep.
        """

    def m2p(self, mfns: U64) -> U64:
        """The pfn that Xen's machine-to-phys table has for each mfn.

        All ones beyond max_mfn. Whose pfn, it does not say.
        """

    def page_types(self, domid: DomId, mfns: U64) -> U8:
        """The page type (abi.domctl.PageType) of each frame, as getpageframeinfo3 gives it.

        XTAB for frames not the domain's. Xen 4.14 names a table's type also for a frame that was one, and is none now.
        """

    def vcpu_context(self, domid: DomId, vcpu: int) -> bytes:
        """The vcpu_guest_context of a vcpu; cr3 and gdt_frames hold mfns."""

    def shared_info(self, domid: DomId) -> bytes:
        """The 4096 bytes of its shared info page, now."""

    def pause(self, domid: DomId) -> None:
        """Stop all its vcpus, counted: as many unpauses start it again."""

    def unpause(self, domid: DomId) -> None:
        """Take one pause back."""


class Ring(NamedTuple):
    """A page that a domain shares with a daemon: its mfn, and the domain's event channel that rings the bell."""

    mfn: int
    port: int


class Daemons(NamedTuple):
    """The domains in which xenconsoled and xenstored run: dom0, unless a host gives them domains of their own."""

    console: DomId = DOM0
    xenstore: DomId = DOM0


class VcpuState(NamedTuple):
    """What a vcpu has beyond its vcpu_guest_context, each as the bytes of its stream record; empty where it has none.

    ``extended`` is struct xen_domctl_ext_vcpucontext, ``xsave`` what getvcpuextstate gives, ``msrs`` an array of
    struct xen_domctl_vcpu_msr.
    """

    extended: bytes = b""
    xsave: bytes = b""
    msrs: bytes = b""


class TscInfo(NamedTuple):
    """How a domain sees the TSC, as XEN_DOMCTL_gettscinfo has it. ``nsec`` is what has elapsed on its clock."""

    mode: int = 0
    khz: int = 0
    nsec: int = 0
    incarnation: int = 0


class CpuPolicy(NamedTuple):
    """What a domain is told of its CPU: arrays of struct xen_cpuid_leaf and of struct xen_msr_entry."""

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
        """A PV domain without memory, paused once, with the nodes that libxl gives a new domain in xenstore.

        HostError: EINVAL for fewer vcpus than 1 or more than Xen has for PV, EOPNOTSUPP where width is 4 and this Xen
        runs no 32-bit PV domains, ENOMEM. There is no new domain, then.
        """

    def set_width(self, domid: DomId, width: Width) -> None:
        """Make a domain that has no memory yet one for 32-bit guests. One that is of that width already stays so.

        HostError: EINVAL for 64 bit where it was made 32, EACCES when it has memory, EOPNOTSUPP where this Xen runs no
        32-bit PV domains.
        """

    def destroy(self, domid: DomId) -> None:
        """End a domain, free what it has, and remove its nodes from xenstore.

        To be called as often as it takes: one that was interrupted goes on where it was. HostError: ESRCH when there
        is no such domain, EINVAL for the domain that asks.
        """

    def rename(self, domid: DomId, name: str) -> None:
        """What it is called from now on. HostError: ESRCH."""

    def set_max_mem(self, domid: DomId, pages: int) -> None:
        """How many pages it may have. Fewer than it has is no error: it just gets no more."""

    def set_memory_map(self, domid: DomId, pages: int) -> None:
        """What a guest is told that asks for its memory map: memory from pfn 0 on, so many pages, and nothing else.

        Without, Linux leaves 8 MiB of pfns at the end for memory that it may get later.
        """

    def free_pages(self) -> int:
        """How many pages the host has left for domains, as far as anybody can tell before asking for them."""

    def populate_physmap(self, domid: DomId, pfns: U64, order: int = 0) -> U64:
        """Give it memory: at each of ``pfns`` a frame, or with order 9 an extent of 512. The (first) mfns.

        As many as fit, from the first on: fewer mfns than pfns when max_mem or the host is exhausted. m2p has the pfns
        of what was given. The content is whatever it was.
        """

    def map_writable(self, domid: DomId, mfns: U64) -> AbstractContextManager[U8]:
        """Frames to write to, uint8 (n, 4096), each named once: what they hold, until the block ends.

        Until then they are in use as writable pages, and cannot become page tables. HostError, before the block is
        entered: EINVAL for a frame not the domain's, EBUSY for one that is a page table.
        """

    def write_frames(self, domid: DomId, mfns: U64, pages: U8) -> None:
        """Write whole frames. All or none; errors are those of map_writable."""

    def init_hypercall_page(self, domid: DomId, mfn: int) -> None:
        """Fill a frame with the code that makes hypercalls, 32 bytes for each.

        HostError: EINVAL for a frame not the domain's, EPERM for a page table.
        """

    def pin_tables(self, domid: DomId, mfns: U64, levels: U8) -> None:
        """Make each frame a table of its level (1 to 4), for good, and validate all below it; up to the first refused.

        HostError, which names that one: EINVAL for a frame not the domain's, pinned before, in use as a table of
        another level, or with an entry that may not be; EBUSY where a table would be writable.
        """

    def set_vcpu_context(self, domid: DomId, vcpu: int, context: bytes) -> None:
        """Set a vcpu's vcpu_guest_context; cr3 and gdt_frames hold mfns, and are validated.

        HostError: EINVAL for no such vcpu, a context of another size, or frames that are not what they have to be.
        """

    def write_shared_info(self, domid: DomId, data: bytes, offset: int = 0) -> None:
        """Write into the shared info page. EINVAL beyond its end."""

    def daemons(self) -> Daemons:
        """Whom a domain's event channels and grants for console and xenstore are for."""

    def alloc_event_channel(self, domid: DomId, remote: DomId = DOM0) -> int:
        """A port of the domain, from 1 on, to which ``remote`` may bind (EVTCHNOP_alloc_unbound)."""

    def seed_grants(self, domid: DomId, *, console: int, xenstore: int) -> None:
        """Let the daemons map these two mfns: the grant table's entries 0 and 1, which are kept for them.

        HostError: EINVAL for a frame not the domain's.
        """

    def introduce(self, domid: DomId, *, console: Ring, xenstore: Ring) -> None:
        """Make xenstored and xenconsoled serve the domain's rings, and tell xl and the guest about them.

        Its grants must be seeded. Memory and vcpus are those that it has now.
        """

    def set_configuration(self, domid: DomId, config: bytes) -> None:
        """Keep what it is made by, as libxl_domain_config_to_json() has it: without, xl does not save it (xl save) nor
        list it in full (xl list -l). It goes with the domain. HostError: ESRCH.
        """

    def configuration(self, domid: DomId) -> bytes | None:
        """Return the configuration that ``set_configuration`` or xl stored; None if there is none."""


class Mover(Toolstack, Protocol):
    """A host from which domains can be moved, and to which."""

    def vcpu_state(self, domid: DomId, vcpu: int) -> VcpuState:
        """What the vcpu has beyond its context. HostError: EINVAL for no such vcpu."""

    def set_vcpu_state(self, domid: DomId, vcpu: int, state: VcpuState) -> None:
        """Set what is not empty, once the context is set. HostError: EINVAL for what Xen does not take."""

    def tsc_info(self, domid: DomId) -> TscInfo:
        """How the domain sees the TSC."""

    def set_tsc_info(self, domid: DomId, info: TscInfo) -> None:
        """Set it, before the domain runs."""

    def cpu_policy(self, domid: DomId) -> CpuPolicy:
        """What the domain is told of its CPU."""

    def set_cpu_policy(self, domid: DomId, policy: CpuPolicy) -> None:
        """Set it, before the domain runs. HostError names the leaf or MSR that this host cannot give."""

    def log_dirty(self, domid: DomId, *, on: bool) -> None:
        """Begin or end keeping which pages are written.

        HostError: EINVAL when it is on, or off, already, EOPNOTSUPP where this Xen cannot (no shadow paging for PV).
        """

    def dirty_pfns(self, domid: DomId, pages: int, *, clean: bool) -> U64:
        """The pfns below ``pages`` that were written, ascending; with ``clean``, and begin anew.

        HostError: EINVAL when log-dirty is off.
        """

    def request_shutdown(self, domid: DomId, value: str) -> None:
        """Ask the guest for something, by control/shutdown in xenstore: "suspend". Empty: take back what was asked."""

    def shutdown_request(self, domid: DomId) -> str:
        """What is asked of the guest still; a guest that has seen it makes it empty."""

    def resume(self, domid: DomId) -> None:
        """Let a domain that shut down run on, as after a suspend that was cancelled."""


def find_domain(host: Host, text: str) -> DomainInfo:
    """The domain that people mean by its id, uuid or name: digits are an id, as xl has it. HostError if there is none.

    A name that looks like a uuid is found when no domain has that uuid.
    """
    if text.isascii() and text.isdigit():
        return host.info(DomId(int(text)))
    domains = host.domains()
    try:
        wanted = str(UUID(text))
    except ValueError:
        wanted = ""
    found = [d for d in domains if wanted and d.uuid == wanted] or [d for d in domains if d.name == text]
    if not found:
        raise HostError(f"no domain is called {text!r}, by id, uuid or name", op="find", errno=errno.ESRCH)
    if len(found) > 1:
        which = ", ".join(f"dom{d.domid}" for d in found)
        raise HostError(f"{text!r} may be any of {which}; say its id", op="find")
    return found[0]
