"""A domain comes from another host: ``take`` is the side that will have it, domain/migrate.py the other."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from xenpv import __version__
from xenpv.errors import HostError, RequestError, XenPVError
from xenpv.frames import PAGE_SIZE, DomId
from xenpv.host.domain_names import INCOMING
from xenpv.host.protocol import DomainInfo, Mover
from xenpv.io.progress import ProgressCallback
from xenpv.io.signals import undisturbed
from xenpv.memory.anchors import P2MForm
from xenpv.migrate.channel import Conversation, Tell, Undecided, nobody
from xenpv.migrate.protocol import RECEIVER, VERSIONS, Offer, Stage, Word
from xenpv.migrate.transport import Link
from xenpv.restore.restore import restore_domain

_FORMS = {str(form) for form in P2MForm}
_SPARE = 256  # pages that a domain takes beside its own: vcpus, grant table, shared info


@dataclass(frozen=True)
class Taken:
    """A domain that is ours now."""

    domid: DomId
    name: str | None
    running: bool


def take(host: Mover, link: Link, *, tell: Tell = nobody, progress: ProgressCallback | None = None) -> Taken | None:
    """Take the domain that the other side offers; or answer what has become of one: None.

    Raises RequestError for a domain that cannot be taken, whatever restore_domain() raises, OSError and StreamError for
    the link: nothing of it is left then. Undecided, when it is ours, and can be neither started nor destroyed.
    """
    talk = Conversation(link, RECEIVER)
    version = host.version()
    xen = f"{version.major}.{version.minor}{version.extra}"
    talk.say(Word.HELLO, protocol=[VERSIONS[0], VERSIONS[-1]], xen=xen, xenpv=__version__)
    body = talk.hear()
    if talk.side.stage is Stage.ASKED:
        _answer(host, talk, body, tell)
        return None
    domid: DomId | None = None
    try:
        offer = Offer.of(body)
        refuse(host, offer)
        tell("offered", name=offer.name, pages=offer.pages, xen=offer.xen, live=offer.live)
        talk.say(Word.ACCEPT)
        source = link.input()
        try:
            name = None if offer.name is None else offer.name + INCOMING
            domid = restore_domain(host, source, name=name, paused=True, progress=progress).domid
        finally:
            source.close()
        tell("whole", domid=domid)
        talk.say(Word.READY, domid=domid)
        talk.hear()
    except BaseException as e:
        with undisturbed():
            _dropped(host, talk, domid, e)
        raise
    return _run(host, talk, domid, offer, tell)


def refuse(host: Mover, offer: Offer) -> None:
    """RequestError for a domain that cannot come to this host, before anything of it is sent."""
    if offer.protocol not in VERSIONS:
        raise RequestError(f"protocol {offer.protocol} is not spoken here")
    if offer.forms and not _FORMS & set(offer.forms):
        raise RequestError(f"its p2m is a {' and a '.join(offer.forms)}, which is not known here")
    for other in host.domains():
        if _is(other, offer.name, offer.uuid) or (offer.name is not None and other.name == offer.name + INCOMING):
            what = f"there is a domain of this name or uuid here already: dom{other.domid} ({other.name})"
            raise RequestError(f"{what}; end it, or rename it, first")
    free, needed = host.free_pages(), offer.pages + _SPARE
    if needed > free:
        what = f"it needs {needed * PAGE_SIZE >> 20} MiB, and {free * PAGE_SIZE >> 20} MiB are free"
        raise RequestError(f"{what}; end a domain, or give dom0 less", needed=needed, available=free)


def _is(info: DomainInfo, name: str | None, uuid: str | None) -> bool:
    return (uuid is not None and info.uuid == uuid) or (name is not None and info.name == name)


def _dropped(host: Mover, talk: Conversation, domid: DomId | None, e: BaseException) -> None:
    """Destroy what has come, and say why: the other side may run it."""
    try:
        if domid is not None:
            host.destroy(domid)
    finally:  # nobody will start it, destroyed or not
        if talk.side.may_say(Word.NO):
            with contextlib.suppress(OSError):
                talk.say(Word.NO, why=_words(e))
        talk.link.drain()


def _words(e: BaseException) -> str:
    return str(e) if isinstance(e, XenPVError | OSError) else f"it was interrupted there ({type(e).__name__})"


def _run(host: Mover, talk: Conversation, domid: DomId, offer: Offer, tell: Tell) -> Taken:
    """It is ours: nobody else will ever run it."""
    with undisturbed():
        try:
            if offer.name is not None:
                host.rename(domid, offer.name)
            if not offer.paused:
                host.unpause(domid)
        except HostError as e:
            try:
                host.destroy(domid)
            except HostError as other:
                what = f"it arrived, can be neither started ({e}) nor destroyed ({other})"
                with contextlib.suppress(OSError):
                    talk.say(Word.UNSURE, why=what)
                raise Undecided(what, op="receive", domid=domid) from e
            with contextlib.suppress(OSError):
                talk.say(Word.NO, why=str(e))
            raise
        try:
            talk.say(Word.RUNNING, domid=domid)
        except OSError as e:
            tell("unheard", domid=domid, why=str(e))
    tell("running", domid=domid, name=offer.name, paused=offer.paused)
    return Taken(domid, offer.name, not offer.paused)


def _answer(host: Mover, talk: Conversation, body: dict[str, Any], tell: Tell) -> None:
    """What has become of a domain: with its temporary name it is not ours, and never will be from now on."""
    name, uuid = body.get("name"), body.get("uuid")
    there = [info for info in host.domains() if info.domid and _is(info, name, uuid)]
    coming = [info for info in host.domains() if name is not None and info.name == f"{name}{INCOMING}"]
    for info in coming:
        try:
            host.destroy(info.domid)
        except HostError as e:
            talk.say(Word.UNSURE, why=f"dom{info.domid} ({info.name}) cannot be destroyed: {e}")
            raise
    ours = [info for info in there if info not in coming]
    if ours:
        talk.say(Word.RUNNING, domid=ours[0].domid)
    elif coming:
        talk.say(Word.NO, why="it was here under its temporary name, and is destroyed")
    else:
        talk.say(Word.UNSURE, why="nothing of it is here: it has not arrived, or has ended or gone on since")
    tell("answered", name=name, here=[info.domid for info in ours], destroyed=[info.domid for info in coming])
