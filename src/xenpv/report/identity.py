"""Who a domain is, and which of its pages have a part to play."""

from __future__ import annotations

from dataclasses import dataclass, field

from xenpv.abi.xen import START_INFO, START_INFO_MAGIC
from xenpv.errors import Fault, GuestError, HostError
from xenpv.source.domain import Domain

_NAMES_MAX = 256  # characters of a name or a command line that are shown as such


@dataclass
class Identity:
    """``name`` as people call it; ``facts``, label and text each, all there is to say in a line; ``config`` in full."""

    name: str
    source: str
    kind: str  # "saved", "running", "dumped"
    domain_type: str  # "PV", "HVM"
    bits: int
    facts: dict[str, str] = field(default_factory=dict)
    config: str | None = None
    config_format: str | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """A page with a part to play."""

    pfn: int
    what: str


def identity_of(domain: Domain) -> Identity:
    """Return who a domain is, as far as its source tells."""
    kind = "HVM" if domain.hvm else "PV"
    out = Identity(domain.title[:_NAMES_MAX], domain.name, domain.origin, kind, domain.width * 8, domain.facts())
    if domain.config is not None:
        out.config, out.config_format = domain.config.text, domain.config.format
    return out


def places_of(domain: Domain) -> tuple[list[Place], dict[str, str]]:
    """The pages that have a part to play, and what start info says; of a domain that did not suspend, what is known."""
    places: list[Place] = []
    told: dict[str, str] = {}
    for vcpu in domain.vcpus:
        for user in (False, True):
            pfn = _cr3(domain, vcpu, user=user)
            if pfn is not None:
                places.append(Place(pfn, f"cr3 of vcpu {vcpu}" + (", user half" if user else "")))
    places += [Place(int(pfn), "GDT") for pfn in domain.gdt_pfns().tolist()]
    pfn = domain.start_info_pfn
    if pfn is None:
        return places, told
    places.append(Place(pfn, "start info"))
    try:
        page = domain.memory.page(pfn)
    except Fault:
        return places, told
    if page.startswith(START_INFO_MAGIC[domain.width]):
        info = START_INFO.read(page, domain.width)
        places.append(Place(int(info["store_mfn"]), "xenstore ring"))
        places.append(Place(int(info["console"]["domU"]["mfn"]), "console ring"))
        line = bytes(info["cmd_line"]).split(b"\0")[0].decode("utf-8", "replace")
        told = {"Command line": line, "Pages at start": f"{int(info['nr_pages']):,}"}
    return places, told


def _cr3(domain: Domain, vcpu: int, *, user: bool) -> int | None:
    try:
        return domain.cr3(vcpu, user=user)
    except (GuestError, HostError):
        return None  # what is wrong with it is a finding
