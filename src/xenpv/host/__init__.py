"""The hypervisor as xenpv needs it: the Host protocol, which ModelHost and XenHost both keep (tests/contract).

Everything here is the read side: no call changes a domain, but for pause and unpause, which only ``--pause`` asks for.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from xenpv.abi.declare import Width
from xenpv.errors import HostError
from xenpv.frames import U8, U64, DomId


@dataclass(frozen=True, slots=True)
class XenVersion:
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
        mapping: it is gone when the next call of map_frames on this host returns, so copy what is to be kept.
        """

    def m2p(self, mfns: U64) -> U64:
        """The pfn that Xen's machine-to-phys table has for each mfn.

        All ones beyond max_mfn. Whose pfn, it does not say.
        """

    def page_types(self, domid: DomId, mfns: U64) -> U8:
        """The page type (abi.domctl.PageType) of each frame, as getpageframeinfo3 gives it.

        XTAB for frames not the domain's.
        """

    def vcpu_context(self, domid: DomId, vcpu: int) -> bytes:
        """The vcpu_guest_context of a vcpu; cr3 and gdt_frames hold mfns."""

    def shared_info(self, domid: DomId) -> bytes:
        """The 4096 bytes of its shared info page, now."""

    def pause(self, domid: DomId) -> None:
        """Stop all its vcpus, counted: as many unpauses start it again."""

    def unpause(self, domid: DomId) -> None:
        """Take one pause back."""


def find(host: Host, text: str) -> DomainInfo:
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
