"""Who a domain is, and which of its pages have a part to play."""

from __future__ import annotations

from dataclasses import dataclass, field

from xenpv.abi.xen import START_INFO, START_INFO_MAGIC
from xenpv.errors import Fault, GuestError, HostError
from xenpv.frames import PAGE_SIZE
from xenpv.memory.domain import Domain
from xenpv.source.config import config_of
from xenpv.source.core import CoreDomain
from xenpv.source.live import LiveDomain
from xenpv.source.saved import SavedDomain
from xenpv.text import size
from xenpv.verify.page_tables import gdt_frames

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
    """Who a domain is, by what it came in."""
    kind = "HVM" if domain.hvm else "PV"
    out = Identity(domain.name, domain.name, "saved", kind, domain.width * 8)
    if isinstance(domain, SavedDomain):
        _saved(domain, out)
    elif isinstance(domain, LiveDomain):
        _running(domain, out)
    elif isinstance(domain, CoreDomain):
        out.name, out.kind = domain.name.rpartition("/")[2], "dumped"
        out.facts |= {"vCPUs": str(len(domain.vcpus)), "File": f"{domain.name}, {size(domain.source.size)}"}
    return out


def _saved(saved: SavedDomain, out: Identity) -> None:
    contents, facts = saved.contents, out.facts
    out.name = saved.name.rpartition("/")[2]
    config = config_of(contents)
    if config is not None:
        out.config, out.config_format = config.text, config.format
        out.name = (config.name or out.name)[:_NAMES_MAX]
        facts |= {"UUID": (config.uuid or "")[:_NAMES_MAX]}
        facts["Memory"] = " of ".join(size(kib << 10) for kib in (config.target_memkb, config.max_memkb) if kib)
        facts["vCPUs"] = f"{len(saved.vcpus)} saved" + (f", {config.max_vcpus} at most" if config.max_vcpus else "")
    if contents.domain is not None:
        major, minor = contents.domain.xen_major, contents.domain.xen_minor
        facts["Saved by"] = f"Xen {major}.{minor}" if major else "a converter from a legacy stream"
    envelope = str(contents.envelope.kind) if contents.envelope else ("libxl" if contents.libxl_header else "libxc")
    version = f", libxc stream version {contents.image.version}" if contents.image else ""
    facts["Envelope"] = envelope + version
    facts["File"] = f"{saved.name}, {size(saved.source.size)}" if saved.source.size else saved.name
    facts["Stream"] = "complete" if contents.complete else "cut off"
    if contents.index.repeated:
        facts["Pages sent"] = f"{contents.index.sent:,}, {contents.index.repeated:,} of them again later"
    if contents.checkpoints:
        facts["Checkpoints"] = str(contents.checkpoints)
    if contents.tsc is not None:
        facts["TSC"] = f"{contents.tsc.khz:,} kHz, {contents.tsc.nsec / 1e9:.3f} s"
    policy, msrs = contents.cpuid_policy, contents.msr_policy
    if policy is not None:
        leaves, values = policy.length // policy.ENTRY, msrs.length // msrs.ENTRY if msrs is not None else 0
        facts["CPU policy"] = f"{leaves} CPUID leaves, {values} MSRs"


def _running(live: LiveDomain, out: Identity) -> None:
    info, version = live.info, live.host.version()
    out.name, out.kind = (info.name or live.name)[:_NAMES_MAX], "running"
    state = "shut down" if info.shutdown else "paused" if info.paused else "running"
    out.facts |= {
        "UUID": info.uuid or "",
        "Memory": f"{size(info.pages * PAGE_SIZE)} of {size(info.max_pages * PAGE_SIZE)}",
        "vCPUs": str(info.max_vcpu + 1),
        "Domain": f"dom{info.domid}, {state}",
        "Xen": f"{version.major}.{version.minor}",
    }


def places_of(domain: Domain) -> tuple[list[Place], dict[str, str]]:
    """The pages that have a part to play, and what start info says; of a domain that did not suspend, what is known."""
    places: list[Place] = []
    told: dict[str, str] = {}
    for vcpu in domain.vcpus:
        for user in (False, True):
            pfn = _cr3(domain, vcpu, user=user)
            if pfn is not None:
                places.append(Place(pfn, f"cr3 of vcpu {vcpu}" + (", user half" if user else "")))
    if isinstance(domain, SavedDomain):
        places += [Place(int(pfn), "GDT") for pfn in gdt_frames(domain).tolist()]
        pfn = domain.start_info_pfn
        if pfn is not None:
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
