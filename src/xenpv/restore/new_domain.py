"""Decides name, uuid, vcpus and memory of a domain to be restored.

A stream comes from elsewhere. Nothing that it says reaches the host before it was checked here.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import uuid4

from xenpv.errors import RequestError
from xenpv.findings import Rule, Severity
from xenpv.frames import IS_POPULATED
from xenpv.host.domain_names import check_name
from xenpv.host.protocol import Host
from xenpv.host.xenstore_nodes import MAX_MEM_SLACK
from xenpv.io.stream_input import Input
from xenpv.source.config import Config
from xenpv.stream import rules
from xenpv.stream.contents import Contents
from xenpv.stream.reader import Reader


@dataclass(frozen=True)
class OfferedDomain:
    """A domain as its sender described it before the stream.

    Attributes:
        uuid: Its uuid; None if it has none.
        vcpus: The number of its vcpus.
        max_pages: How many pages it may have, with Xen's own slack.
    """

    uuid: str | None
    vcpus: int
    max_pages: int


@dataclass(frozen=True)
class DomainPlan:
    """The domain to be created.

    Attributes:
        name: Its name; None if nothing names it.
        uuid: Its uuid; None if nothing gives one.
        vcpus: The number of its vcpus.
        pages: Its memory, of which its memory map tells.
        max_pages: How many pages Xen lets it have.
    """

    name: str | None
    uuid: str | None
    vcpus: int
    pages: int
    max_pages: int


def plan_domain(
    host: Host,
    contents: Contents,
    source: Input,
    *,
    name: str | None = None,
    new_uuid: bool = False,
    offered: OfferedDomain | None = None,
) -> DomainPlan:
    """Return the domain for a stream of which all but the pages was read so far.

    Args:
        host: The host that gets the domain.
        contents: The stream up to X86_PV_INFO.
        source: The stream; a file is read once more if its envelope does not say how large the domain is.
        name: Name of the domain (default: the configuration's).
        new_uuid: Give it a uuid that no domain has had.
        offered: What the sender has said of the domain, or None.

    Raises:
        RequestError: The name or uuid is taken, no domain can have them, the sender has offered another domain, or
            nothing says how large the domain is.
        StreamError: The stream breaks a rule.
    """
    config = _usable_config(contents)
    if name is None and config is not None:
        name = config.name
    if name is not None:
        check_name(name)
    uuid = config.uuid if config is not None else None
    if offered is not None:
        if uuid not in (None, offered.uuid):
            raise RequestError(f"the stream is that of a domain with uuid {uuid}, and {offered.uuid} was offered")
        uuid = offered.uuid
    if new_uuid:
        uuid = str(uuid4())
    _check_unique(host, name, uuid)
    vcpus, pages = _vcpus_and_pages(config, source, offered)
    return DomainPlan(name, uuid, vcpus, pages, pages + MAX_MEM_SLACK if offered is None else offered.max_pages)


def _usable_config(contents: Contents) -> Config | None:
    """Return the configuration; StreamError if no toolstack could use it."""
    config, envelope, domain = Config.from_contents(contents), contents.envelope, contents.domain
    if config is not None and envelope is not None:
        for rule, problem in config.iter_problems(domain.guest if domain else None):
            raise_breach(rule, problem, envelope.offset, envelope.name)
    return config


def _check_unique(host: Host, name: str | None, uuid: str | None) -> None:
    """Raise RequestError if a domain of the host has the name or the uuid.

    Two domains of one uuid share their nodes below /vm in xenstore.
    """
    for existing in host.domains():
        if name is not None and existing.name == name:
            raise RequestError(f"dom{existing.domid} is called {name!a} already: give another name")
        if uuid is not None and existing.uuid == uuid:
            raise RequestError(f"{existing.label} has the uuid {uuid} already: give another uuid, or destroy it first")


def _vcpus_and_pages(config: Config | None, source: Input, offered: OfferedDomain | None) -> tuple[int, int]:
    """Return how many vcpus and pages the domain needs.

    A sender's offer says it, otherwise the configuration, otherwise the whole stream, which is read for it.
    """
    vcpus, kib = (config.max_vcpus, config.max_memkb) if config else (None, None)
    if offered is not None:
        vcpus = offered.vcpus
        kib = 4 * max(offered.max_pages - MAX_MEM_SLACK, 0) if kib is None else kib
    if vcpus is None or kib is None:
        if not source.seekable:
            problem = f"{source.name} has no configuration with the number of vcpus and the size of memory"
            raise RequestError(f"{problem}: restore it from a file, which can be read twice")
        stream = Contents()
        for event in source.events(Reader(on_breach=raise_breach, check_seal=False)):
            stream.add(event)
        page_count = stream.index.count()
        vcpus = max(stream.vcpus, default=0) + 1 if vcpus is None else vcpus
        kib = 4 * sum(n for page_type, n in page_count.items() if IS_POPULATED[page_type]) if kib is None else kib
    return vcpus, -(-kib // 4)


def raise_breach(rule: Rule, message: str, offset: int, record: str | None) -> None:
    """End the stream at a broken rule, except at checkpoints."""
    if rule.severity is Severity.ERROR and rule is not rules.CHECKPOINT:
        raise rules.breach(rule, message, offset=offset, record=record)
