"""The receiving side of a migration; sender.py is the other."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from xenpv import __version__
from xenpv.errors import HostError, RequestError, XenPVError
from xenpv.frames import PAGE_SIZE, DomId
from xenpv.host.domain_names import INCOMING, check_name
from xenpv.host.protocol import DomainInfo, Mover, destroy_unfinished
from xenpv.io.progress import ProgressCallback
from xenpv.io.signals import uninterruptible
from xenpv.memory.p2m_anchors import P2MForm
from xenpv.migrate.channel import EventCallback, MigrationChannel, OutcomeUnknown, ignore_event
from xenpv.migrate.handover import RECEIVER, VERSIONS, Message, Offer, Stage, identity_in
from xenpv.migrate.transport import Link
from xenpv.restore.new_domain import OfferedDomain
from xenpv.restore.restore import restore_domain
from xenpv.text import printable

_FORMS = {str(form) for form in P2MForm}
_OVERHEAD = 256  # pages that a domain takes beside its own: vcpus, grant table, shared info


@dataclass(frozen=True)
class ReceivedDomain:
    """A domain that belongs to this host now."""

    domid: DomId
    name: str | None
    running: bool


def receive_domain(
    host: Mover, link: Link, *, on_event: EventCallback = ignore_event, progress: ProgressCallback | None = None
) -> ReceivedDomain | None:
    """Receive the domain that the sender offers, or answer its query.

    A query asks for the outcome of an earlier migration.

    Returns:
        The domain; None after a query.

    Raises:
        XenPVError: The domain was refused, or as restore_domain(); nothing of it is left.
        OSError: The connection failed; nothing of the domain is left.
        OutcomeUnknown: The domain belongs to this host, but can be neither started nor destroyed.
    """
    channel = MigrationChannel(link, RECEIVER)
    version = host.version()
    xen = f"{version.major}.{version.minor}{version.extra}"
    channel.send(Message.HELLO, protocol=[VERSIONS[0], VERSIONS[-1]], xen=xen, xenpv=__version__)
    body = channel.receive()
    if channel.handover.stage is Stage.QUERIED:
        _answer_query(host, channel, body, on_event)
        return None
    domid: DomId | None = None
    try:
        offer = Offer.of(body)
        refuse(host, offer)
        on_event("offered", name=offer.name, pages=offer.pages, xen=printable(offer.xen)[:40], live=offer.live)
        channel.send(Message.ACCEPT)
        source = link.input()
        try:
            name = f"{offer.name}{INCOMING}"
            offered = OfferedDomain(offer.uuid, offer.vcpus, max(offer.pages, offer.max_pages))
            domid = restore_domain(host, source, name=name, offered=offered, paused=True, progress=progress).domid
        finally:
            source.close()
        on_event("whole", domid=domid)
        channel.send(Message.READY, domid=domid)
        channel.receive()
    except BaseException as e:
        with uninterruptible():
            _abort(host, channel, domid, e)
        raise
    return _start(host, channel, domid, offer, on_event)


def refuse(host: Mover, offer: Offer) -> None:
    """Raise RequestError if a domain cannot come to this host.

    Nothing of it has been sent yet.
    """
    if offer.protocol not in VERSIONS:
        raise RequestError(f"this side does not speak protocol {offer.protocol}")
    if offer.forms and not _FORMS & set(offer.forms):
        raise RequestError(f"its p2m is a {printable(' and a '.join(offer.forms)):.200}, which this side does not know")
    if offer.name is None:
        raise RequestError("it has no name, by which its copies could be told apart; give it one with xl rename")
    check_name(check_name(offer.name) + INCOMING)
    for existing in host.domains():
        same_uuid = offer.uuid is not None and existing.uuid == offer.uuid
        if same_uuid or existing.name in (offer.name, offer.name + INCOMING):
            problem = f"this host has a domain of this name or uuid already: dom{existing.domid} ({existing.name})"
            raise RequestError(f"{problem}; destroy or rename it first")
    free, needed = host.free_pages(), offer.pages + _OVERHEAD
    if needed > free:
        problem = f"it needs {needed * PAGE_SIZE >> 20} MiB, and {free * PAGE_SIZE >> 20} MiB are free"
        raise RequestError(f"{problem}; destroy a domain, or give dom0 less", needed=needed, available=free)


def _abort(host: Mover, channel: MigrationChannel, domid: DomId | None, error: BaseException) -> None:
    """Destroy what has arrived, and tell the sender why: it may run its copy.

    Nobody will start the copy here, destroyed or not. A failure to destroy it becomes a note of the error.
    """
    if domid is not None:
        destroy_unfinished(host, domid, error)
    if channel.handover.may_send(Message.ABORT):
        with contextlib.suppress(OSError):  # the sender also runs its copy on if the connection drops
            channel.send(Message.ABORT, why=_reason(error))
    channel.link.drain()


def _reason(error: BaseException) -> str:
    if isinstance(error, XenPVError | OSError):
        return str(error)
    return f"the receiver was interrupted ({type(error).__name__})"


def _start(
    host: Mover, channel: MigrationChannel, domid: DomId, offer: Offer, on_event: EventCallback
) -> ReceivedDomain:
    """Start a domain that was committed: the sender will never run it again."""
    with uninterruptible():
        try:
            assert offer.name is not None, "refuse() lets none come without"
            host.rename(domid, offer.name)
            if not offer.paused:
                host.unpause(domid)
        except HostError as e:
            try:
                host.destroy(domid)
            except HostError as destroy_error:
                problem = f"it arrived, and can be neither started ({e}) nor destroyed ({destroy_error})"
                with contextlib.suppress(OSError):  # without an answer the outcome is as unknown to the sender
                    channel.send(Message.INDETERMINATE, why=problem)
                raise OutcomeUnknown(problem, op="receive", domid=domid) from e
            with contextlib.suppress(OSError):  # the sender's --settle asks again
                channel.send(Message.ABORT, why=str(e))
            raise
        try:
            channel.send(Message.RUNNING, domid=domid)
        except OSError as e:
            on_event("unheard", domid=domid, why=str(e))
    on_event("running", domid=domid, name=offer.name, paused=offer.paused)
    return ReceivedDomain(domid, offer.name, not offer.paused)


def _answer_query(host: Mover, channel: MigrationChannel, query: dict[str, Any], on_event: EventCallback) -> None:
    """Answer what became of a domain.

    Its uuid tells which domain is meant: another one may have its name by now. Only a domain without a uuid is known
    by its name. A copy that still has its temporary name was never started, and is destroyed: it is the sender's.
    """
    name, uuid = identity_in(query, Message.QUERY)

    def is_meant(info: DomainInfo) -> bool:
        if uuid is not None:
            return info.uuid == uuid
        return name is not None and info.uuid is None and info.name in (name, name + INCOMING)

    matching = [info for info in host.domains() if info.domid and is_meant(info)]
    incoming = [info for info in matching if (info.name or "").endswith(INCOMING)]
    if running := [info for info in incoming if not info.paused]:
        problem = f"{running[0].label} was started here by hand, under its temporary name: rename it, and ask again"
        channel.send(Message.INDETERMINATE, why=problem)
        on_event("answered", name=name, here=[info.domid for info in running], destroyed=[])
        return
    for info in incoming:
        try:
            host.destroy(info.domid)
        except HostError as e:
            channel.send(Message.INDETERMINATE, why=f"dom{info.domid} ({info.name}) cannot be destroyed: {e}")
            raise
    received = [info for info in matching if info not in incoming]
    if received:
        channel.send(Message.RUNNING, domid=received[0].domid)
    elif incoming:
        channel.send(Message.ABORT, why="its copy here was never started, and has been destroyed")
    else:
        reason = "there is no such domain here: it has not arrived, or was destroyed or migrated since"
        channel.send(Message.INDETERMINATE, why=reason)
    on_event("answered", name=name, here=[info.domid for info in received], destroyed=[info.domid for info in incoming])
