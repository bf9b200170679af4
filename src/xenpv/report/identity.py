"""The identity of a domain for a report, and its pages with a special role."""

from __future__ import annotations

from dataclasses import dataclass, field

from xenpv.abi.xen import START_INFO, START_INFO_MAGIC
from xenpv.errors import Fault, GuestError
from xenpv.source.domain import Domain

_NAMES_MAX = 256  # characters of a name or a command line that are shown as such


@dataclass
class Identity:
    """The identity of a domain.

    Attributes:
        name: The name for people.
        source: The name in messages.
        kind: "saved", "running" or "dumped".
        domain_type: "PV" or "HVM".
        bits: 64 or 32.
        facts: Text by label, one line each.
        config: The whole configuration, or None.
        config_format: Its format.
    """

    name: str
    source: str
    kind: str
    domain_type: str
    bits: int
    facts: dict[str, str] = field(default_factory=dict)
    config: str | None = None
    config_format: str | None = None


@dataclass(frozen=True, slots=True)
class NotablePage:
    """A page with a special role. ``what`` names the role."""

    pfn: int
    what: str


def identify(domain: Domain) -> Identity:
    """Return the identity of a domain, as far as its source knows it."""
    kind = "HVM" if domain.hvm else "PV"
    out = Identity(domain.title[:_NAMES_MAX], domain.name, domain.origin, kind, domain.width * 8, domain.facts())
    if domain.config is not None:
        out.config, out.config_format = domain.config.text, domain.config.format
    return out


def find_notable_pages(domain: Domain) -> tuple[list[NotablePage], dict[str, str]]:
    """Return the pages with a special role, and facts of start info.

    The facts are texts by label. Both have only what is known.
    """
    notable_pages: list[NotablePage] = []
    start_info: dict[str, str] = {}
    for vcpu in domain.vcpus:
        for user in (False, True):
            pfn = _cr3(domain, vcpu, user=user)
            if pfn is not None:
                notable_pages.append(NotablePage(pfn, f"cr3 of vcpu {vcpu}" + (", user half" if user else "")))
    notable_pages += [NotablePage(int(pfn), "GDT") for pfn in domain.gdt_pfns().tolist()]
    pfn = domain.start_info_pfn
    if pfn is None:
        return notable_pages, start_info
    notable_pages.append(NotablePage(pfn, "start info"))
    try:
        page = domain.memory.page(pfn)
    except Fault as e:
        return notable_pages, {"Start info": f"it cannot be read: {e}"}
    if page.startswith(START_INFO_MAGIC[domain.width]):
        info = START_INFO.read(page, domain.width)
        notable_pages.append(NotablePage(int(info["store_mfn"]), "xenstore ring"))
        notable_pages.append(NotablePage(int(info["console"]["domU"]["mfn"]), "console ring"))
        line = bytes(info["cmd_line"]).split(b"\0")[0].decode("utf-8", "replace")
        start_info = {"Command line": line, "Pages at start": f"{int(info['nr_pages']):,}"}
    else:
        start_info = {"Start info": f"pfn {pfn:#x} is no start info page"}
    return notable_pages, start_info


def _cr3(domain: Domain, vcpu: int, *, user: bool) -> int | None:
    try:
        return domain.cr3(vcpu, user=user)
    except GuestError:
        return None  # verify reports it as a finding
