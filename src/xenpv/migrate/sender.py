"""A domain goes to another host: ``give`` is the side that has it, domain/receive.py the other."""

from __future__ import annotations

import time
from dataclasses import dataclass

from xenpv.errors import HostError, RequestError, Unsupported
from xenpv.frames import DomId
from xenpv.host.domain_names import AWAY
from xenpv.host.protocol import Host, Mover
from xenpv.io.progress import ProgressCallback
from xenpv.io.signals import undisturbed
from xenpv.migrate.channel import Conversation, Tell, Undecided, nobody
from xenpv.migrate.protocol import SENDER, VERSIONS, Fate, Offer, Word, common_version
from xenpv.migrate.transport import Link
from xenpv.save.precopy import Precopy
from xenpv.save.save import Summary, save
from xenpv.save.source_domain import Leaving
from xenpv.save.suspend import resume
from xenpv.source.live import LiveDomain
from xenpv.stream.envelope import Kind


@dataclass(frozen=True)
class Given:
    """A domain that is another host's. ``downtime``: seconds for which nobody ran it."""

    name: str
    domid: int
    summary: Summary
    downtime: float


def give(
    host: Mover,
    domid: DomId,
    link: Link,
    *,
    config: bytes = b"",
    live: Precopy | None = None,
    paused: bool = False,
    timeout: float = 60.0,
    tell: Tell = nobody,
    progress: ProgressCallback | None = None,
) -> Given:
    """Hand a domain over: sent, started there, and destroyed here. ``paused``: not started there.

    ``live``: it runs while it is sent, but for the end; without, it is suspended at once. ``timeout``: seconds that it
    has to suspend. ``config`` as save() has it.

    Raises RequestError, with the receiver's reason, when it was refused; whatever save() and suspend() raise; OSError
    and StreamError for the link: it goes on here then, and ``tell`` has said so. Undecided, when the receiver was told
    that the domain is its own, and nothing was heard since.
    """
    leaving = Leaving(host, domid, timeout=timeout)
    leaving.check()
    talk = Conversation(link, SENDER)
    try:
        protocol = _greeted(talk, tell)
        offer = _offer(host, leaving, protocol, live=live is not None and not leaving.stands, paused=paused)
        talk.say(Word.OFFER, **offer.body())
        talk.hear()
        tell("accepted", pages=offer.pages)
        summary = save(
            host,
            domid,
            talk,
            config=config,
            envelope=Kind.XL,
            suspend=None if leaving.stands else leaving.suspend,
            live=None if leaving.stands else live,
            stock=False,
            progress=progress,
        )
        tell("sent", bytes=summary.bytes, pages=summary.pages)
        talk.hear()
        tell("ready")
        with undisturbed():
            leaving.mark_away()
            talk.say(Word.YOURS)
            there = talk.hear()
            host.destroy(domid)
    except BaseException as e:
        _not_given(talk, leaving, e, tell)
        raise
    downtime = time.monotonic() - leaving.stood_at if leaving.stood_at is not None else 0.0
    tell("running", domid=there.get("domid"), downtime=downtime)
    number = there.get("domid")
    return Given(leaving.label, number if isinstance(number, int) else -1, summary, downtime)


def _greeted(talk: Conversation, tell: Tell) -> int:
    hello = talk.hear()
    protocol = common_version(hello.get("protocol"))
    if protocol is None:
        what = f"{talk.link.name} hands over by protocol {hello.get('protocol')!r:.40}"
        raise Unsupported(f"{what}, not {VERSIONS[0]} to {VERSIONS[-1]}", offset=0)
    tell("connected", host=talk.link.name, xen=str(hello.get("xen"))[:40], xenpv=str(hello.get("xenpv"))[:40])
    return protocol


def _offer(host: Host, leaving: Leaving, protocol: int, *, live: bool, paused: bool) -> Offer:
    info, version = leaving.info, host.version()
    anchors = LiveDomain(host, info).anchors
    return Offer(
        protocol=protocol,
        name=info.name,
        uuid=info.uuid,
        width=info.width,
        vcpus=info.max_vcpu + 1,
        pages=info.pages,
        max_pages=info.max_pages,
        entries=anchors.max_pfn,
        forms=[str(root.form) for root in anchors.roots],
        xen=f"{version.major}.{version.minor}{version.extra}",
        live=live,
        paused=paused,
    )


def _not_given(talk: Conversation, leaving: Leaving, e: BaseException, tell: Tell) -> None:
    """It has failed: take the domain back, if nobody else may run it."""
    if talk.fate is Fate.RUN_ON:
        with undisturbed():
            tell("kept", state=leaving.take_back())
    elif talk.fate is Fate.DROP:
        what = f"{leaving.label} runs on {talk.link.name}, and its copy here could not be destroyed: {e}"
        raise HostError(f"{what}; destroy it: xl destroy {leaving.domid}", op="migrate", domid=leaving.domid) from e
    else:
        name = leaving.info.name or str(leaving.domid)
        what = f"{e}; {leaving.label} was given to {talk.link.name}, which has not said that it runs: it stays here,"
        what += f" suspended, as {name}{AWAY}. Settle it by: xenpv migrate --settle {leaving.domid} {talk.link.name}"
        raise Undecided(what, op="migrate", domid=leaving.domid) from e


def settle(host: Mover, domid: DomId, link: Link, tell: Tell = nobody) -> str:
    """Ask the receiver what has become of a domain that was given away, and do what follows. What was done, in words.

    If it is there, the copy here is destroyed. If the receiver has it still under its temporary name, it destroys that,
    and the domain goes on here. Where there is nothing of it, Undecided: it may never have arrived, or have run and
    ended; who knows which can take it back.
    """
    leaving = Leaving(host, domid)
    if not leaving.stands:
        raise RequestError(f"{leaving.label} is not suspended: there is nothing to settle")
    talk = Conversation(link, SENDER)
    _greeted(talk, tell)
    name = (leaving.info.name or "").removesuffix(AWAY) or None
    talk.say(Word.ASK, name=name, uuid=leaving.info.uuid)
    try:
        there = talk.hear().get("domid")
    except Undecided as e:
        raise Undecided(f"{e}; if it never ran there: xenpv migrate --take-back {domid}", op="migrate") from e
    except RequestError:
        if talk.fate is not Fate.RUN_ON:
            raise
        return take_back(host, domid)
    host.destroy(domid)
    return f"{leaving.label} is on {link.name}, as dom{there}; its copy here is destroyed"


def take_back(host: Mover, domid: DomId) -> str:
    """Let a suspended domain go on here, whatever has become of it elsewhere: whoever says so knows. In words."""
    leaving = Leaving(host, domid)
    if not leaving.stands:
        raise RequestError(f"{leaving.label} is not suspended: there is nothing to take back")
    name = leaving.info.name
    if name is not None and name.endswith(AWAY):
        host.rename(domid, name.removesuffix(AWAY))
    resume(host, domid)
    return f"dom{domid} ({(name or '').removesuffix(AWAY)}) runs on here"
