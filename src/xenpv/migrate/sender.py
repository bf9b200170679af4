"""The sending side of a migration; receiver.py is the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from xenpv.errors import HostError, RequestError, Unsupported
from xenpv.frames import DomId
from xenpv.host.domain_names import AWAY
from xenpv.host.protocol import Host, Mover
from xenpv.io.progress import ProgressCallback
from xenpv.io.signals import uninterruptible
from xenpv.migrate.channel import EventCallback, MigrationChannel, OutcomeUnknown, ignore_event
from xenpv.migrate.handover import SENDER, VERSIONS, Message, Offer, OnDisconnect, common_version
from xenpv.migrate.transport import Link
from xenpv.save.precopy import PrecopyPolicy
from xenpv.save.save import Summary, save
from xenpv.save.source_domain import DepartingDomain
from xenpv.save.suspend import resume
from xenpv.source.live import LiveDomain
from xenpv.stream.envelope import Kind
from xenpv.text import printable

_FIRST_RESERVED_DOMID = 0x7FF0  # xen.git:xen/include/public/xen.h DOMID_FIRST_RESERVED


@dataclass(frozen=True)
class SentDomain:
    """A domain that belongs to the receiver now.

    Attributes:
        label: The domain on this host, for people: "dom5 (web)".
        domid: Its domid on the receiver; None if the receiver did not say.
        summary: What was sent.
        downtime: Seconds for which nobody ran it.
    """

    label: str
    domid: DomId | None
    summary: Summary
    downtime: float


class Owner(Enum):
    """The host that has a domain after a migration is settled."""

    RECEIVER = "receiver"
    SENDER = "sender"


@dataclass(frozen=True)
class Settlement:
    """The outcome of a migration whose commit was not answered.

    Attributes:
        owner: The host that runs the domain; the other has no copy any more.
        label: The domain on this host, for people: "dom5 (web)".
        domid: Its domid on the owner; None if the receiver did not say.
    """

    owner: Owner
    label: str
    domid: DomId | None


def send_domain(
    host: Mover,
    domid: DomId,
    link: Link,
    *,
    config: bytes = b"",
    live: PrecopyPolicy | None = None,
    paused: bool = False,
    suspend_timeout: float = 60.0,
    on_event: EventCallback = ignore_event,
    progress: ProgressCallback | None = None,
) -> SentDomain:
    """Migrate a domain: it is sent, started on the receiver and destroyed here.

    If that fails before the commit, the domain is rolled back; the event "kept" has the Rollback.

    Args:
        host: The host that has the domain.
        domid: The domain.
        link: The connection to the receiver.
        config: As save() has it.
        live: Send memory while the domain runs, by this policy. None: suspend it at once.
        paused: Leave it paused on the receiver.
        suspend_timeout: Seconds that the guest has to suspend.
        on_event: Receives what happens.
        progress: Receives the progress.

    Raises:
        RequestError: The domain has no name; the receiver refused, for the reason in the message; or as save() and
            suspend().
        XenPVError: As save() and suspend().
        OSError: The connection failed.
        OutcomeUnknown: The receiver has not answered the commit.
        RollbackError: The migration failed, and the domain could not be rolled back.
    """
    domain = DepartingDomain(host, domid, suspend_timeout=suspend_timeout)
    domain.check()
    if not domain.info.name:
        raise RequestError(
            f"{domain.label} has no name, by which its copies could be told apart: give it one, xl rename"
        )
    live = None if domain.was_suspended else live
    channel = MigrationChannel(link, SENDER)
    try:
        version = _receive_hello(channel, on_event)
        offer = _offer(host, domain, version, live=live is not None, paused=paused)
        channel.send(Message.OFFER, **offer.body())
        channel.receive()
        on_event("accepted", pages=offer.pages)
        summary = save(
            host,
            domid,
            channel,
            config=config,
            envelope=Kind.XL,
            suspend=None if domain.was_suspended else domain.suspend,
            live=live,
            libxc_compatible=False,
            progress=progress,
        )
        on_event("sent", bytes=summary.bytes, pages=summary.pages)
        channel.receive()
        on_event("ready")
        with uninterruptible():
            domain.mark_away()
            channel.send(Message.COMMIT)
            answer = channel.receive()
            host.destroy(domid)
    except BaseException as e:
        _handle_failure(channel, domain, e, on_event)
        raise
    downtime = domain.downtime
    there = _domid_in(answer)
    on_event("running", domid=there, downtime=downtime)
    return SentDomain(domain.label, there, summary, downtime)


def _domid_in(answer: dict[str, object]) -> DomId | None:
    """Return the domid in a RUNNING; None if it has none that Xen gives out."""
    domid = answer.get("domid")
    return DomId(domid) if type(domid) is int and 0 < domid < _FIRST_RESERVED_DOMID else None


def _receive_hello(channel: MigrationChannel, on_event: EventCallback) -> int:
    """Return the version of the protocol that both sides speak.

    Unsupported if there is none.
    """
    hello = channel.receive()
    version = common_version(hello.get("protocol"))
    if version is None:
        problem = f"{channel.link.name} speaks protocol {hello.get('protocol')!a:.40}"
        raise Unsupported(f"{problem}, not {VERSIONS[0]} to {VERSIONS[-1]}", offset=0)
    versions = {key: printable(str(hello.get(key)))[:40] for key in ("xen", "xenpv")}
    on_event("connected", host=channel.link.name, **versions)
    return version


def _offer(host: Host, domain: DepartingDomain, version: int, *, live: bool, paused: bool) -> Offer:
    info, xen = domain.info, host.version()
    anchors = LiveDomain(host, info).anchors
    return Offer(
        protocol=version,
        name=info.name,
        uuid=info.uuid,
        width=info.width,
        vcpus=info.max_vcpu + 1,
        pages=info.pages,
        max_pages=info.max_pages,
        entries=anchors.max_pfn,
        forms=[str(root.form) for root in anchors.roots],
        xen=f"{xen.major}.{xen.minor}{xen.extra}",
        live=live,
        paused=paused,
    )


def _handle_failure(
    channel: MigrationChannel, domain: DepartingDomain, error: BaseException, on_event: EventCallback
) -> None:
    """Roll the domain back if the receiver cannot run it.

    Otherwise raise HostError or OutcomeUnknown.
    """
    peer, domid = channel.link.name, domain.domid
    if channel.on_disconnect is OnDisconnect.RESUME:
        with uninterruptible():
            domain.rollback_after(error, lambda rollback: on_event("kept", rollback=rollback))
    elif channel.on_disconnect is OnDisconnect.DESTROY:
        problem = f"{domain.label} runs on {peer}, and its copy here could not be destroyed: {error}"
        raise HostError(f"{problem}; destroy it: xl destroy {domid}", op="migrate", domid=domid) from error
    else:
        name = domain.info.name or str(domid)
        problem = f"{error}; {domain.label} was committed to {peer}, which has not answered that it runs."
        problem += f" It stays here, suspended, as {name}{AWAY}. Settle it by: xenpv migrate --settle {domid} {peer}"
        raise OutcomeUnknown(problem, op="migrate", domid=domid) from error


def settle(host: Mover, domid: DomId, link: Link, on_event: EventCallback = ignore_event) -> Settlement:
    """Ask the receiver what became of a committed domain, and act on the answer.

    The copy here is destroyed or resumed accordingly.

    Raises:
        RequestError: The domain is not suspended.
        OutcomeUnknown: The receiver has no such domain: it never arrived, or ran and ended. Nothing was done.
        HostError: The copy could not be destroyed or resumed.
        OSError: The connection failed.
    """
    domain = DepartingDomain(host, domid)
    if not domain.was_suspended:
        raise RequestError(f"{domain.label} is not suspended: there is nothing to settle")
    channel = MigrationChannel(link, SENDER)
    _receive_hello(channel, on_event)
    name = (domain.info.name or "").removesuffix(AWAY) or None
    channel.send(Message.QUERY, name=name, uuid=domain.info.uuid)
    try:
        answer = channel.receive()
    except OutcomeUnknown as e:
        raise OutcomeUnknown(f"{e}; if it never ran there: xenpv migrate --take-back {domid}", op="migrate") from e
    except RequestError:
        if channel.on_disconnect is not OnDisconnect.RESUME:
            raise
        return take_back(host, domid)
    host.destroy(domid)
    return Settlement(Owner.RECEIVER, domain.label, _domid_in(answer))


def take_back(host: Mover, domid: DomId) -> Settlement:
    """Resume a committed domain here, whatever became of it elsewhere.

    The caller knows that it does not run there.

    Raises:
        RequestError: The domain is not suspended.
        HostError: It could not be resumed.
    """
    domain = DepartingDomain(host, domid)
    if not domain.was_suspended:
        raise RequestError(f"{domain.label} is not suspended: there is nothing to take back")
    info, name = domain.info, (domain.info.name or "").removesuffix(AWAY)
    resume(host, domid)  # first: as long as it is suspended, its name has to show why
    if name != (info.name or ""):
        host.rename(domid, name)
    return Settlement(Owner.SENDER, replace(info, name=name).label, domid)  # it may have ended already
