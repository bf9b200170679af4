"""How a test breaks one thing in a domain, and where verify then has to point."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.support.saved_files import page_offsets
from tests.support.writers.domain import RW, Domain
from tests.support.writers.envelopes import config_json
from tests.support.writers.stream import L1TAB, PAGE, Stream
from xenpv.abi.declare import Width
from xenpv.findings import Finding, Rule

KEEP = (1 << 64) - 1
UNMAPPED = {"vcpu-resume", "vcpu-handler"}  # what follows when a vcpu's page tables lead nowhere


@dataclass(frozen=True)
class Where:
    """What a finding has to name: ``fields`` of it, and a ``span`` of bytes, offset and length.

    The offset is the finding's; the bytes hold all that broke. No length: what broke is elsewhere, or is missing.
    """

    fields: Mapping[str, int | str | None] = field(default_factory=dict)
    span: Callable[[Stream], tuple[int, int]] | None = None

    def no_longer(self) -> Where:
        """The same place; but the bytes there are not what broke."""
        if self.span is None:
            return self
        span = self.span
        return Where(self.fields, lambda stream: (span(stream)[0], 0))


def at_entry(pfn: int, level: int, entry: int) -> Where:
    """An entry of a page table."""
    place = {"pfn": pfn, "level": level, "entry": entry}
    return Where(place, lambda stream: (page_offsets(stream)[pfn] + entry * 8, 8))


def at_p2m_entry(domain: Domain, pfn: int) -> Where:
    """The p2m's entry of a pfn."""
    part, entry = divmod(pfn, PAGE // domain.width)
    frame = int(domain.p2m_pfns[part])
    return Where({"pfn": pfn}, lambda stream: (page_offsets(stream)[frame] + entry * domain.width, domain.width))


def at_page(page: int, *, at: int = 0, extent: int = 0, **fields: int | str | None) -> Where:
    """The content of a page, or ``extent`` bytes of it from byte ``at`` on; ``fields`` may tell another pfn."""
    return Where({"pfn": page} | fields, lambda stream: (page_offsets(stream)[page] + at, extent))


def at_record(name: str, nth: int = 0, *, at: int = 0, extent: int | None = None, **fields: int | str | None) -> Where:
    """A record, the nth of its name, or ``extent`` bytes of it from byte ``at`` on."""

    def span(stream: Stream) -> tuple[int, int]:
        whole = len(stream[stream.find(name, nth)].data)
        return stream.offset(name, nth) + at, whole if extent is None else extent

    return Where({"record": name} | fields, span)


def nowhere(**fields: int | str | None) -> Where:
    """No byte of the stream: something is missing."""
    return Where({"offset": None} | fields)


@dataclass(frozen=True)
class Case:
    """One thing broken: ``spoil`` changes a good domain and says where that has to show.

    ``prepare`` comes before, and leaves the domain good. ``also`` are the rules that cannot but break with it, ``may``
    those that may: a vcpu whose page tables are no good is not mapped either.
    """

    rule: Rule
    name: str
    spoil: Callable[[Domain], Where]
    prepare: Callable[[Domain], object] | None = None
    make: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None  # of the broken one; the good one's fits the domain
    also: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    rewrite: Callable[[Stream], object] | None = None  # what is broken in the stream rather than in the domain

    @property
    def id(self) -> str:
        return f"{self.rule.name}: {self.name}, {8 * int(self.make.get('width', 8))} bit"


CASES: list[Case] = []


def case(
    rule: Rule,
    name: str,
    *,
    widths: Iterable[Width] = (8,),
    prepare: Callable[[Domain], object] | None = None,
    config: Mapping[str, Any] | None = None,
    also: Iterable[Rule] = (),
    may: Iterable[str] = (),
    rewrite: Callable[[Stream], object] | None = None,
    **make: Any,
) -> Callable[[Callable[[Domain], Where]], Callable[[Domain], Where]]:
    """Register the function below as a way to break that rule."""

    def register(spoil: Callable[[Domain], Where]) -> Callable[[Domain], Where]:
        follows = frozenset(r.name for r in also)
        CASES.extend(
            Case(rule, name, spoil, prepare, {"width": width} | make, config, follows, frozenset(may), rewrite)
            for width in widths
        )
        return spoil

    return register


def as_stream(domain: Domain, config: Mapping[str, Any] | None = None) -> Stream:
    """The domain in an xl envelope, whose configuration may tell something else."""
    if config is None:
        return domain.to_stream()
    facts = {"vcpus": len(domain.vcpus), "memory_kib": len(domain.pages) * 4} | dict(config)
    return domain.to_stream(config=config_json(**facts) + b"\0")


# --- what several cases do -------------------------------------------------------------------------------------------


def make_table(domain: Domain, pfn: int, level: int, pin: int = 0) -> int:
    """Make an empty page table out of a page, mapped read-only as it must be."""
    domain.pages[pfn][:] = bytes(PAGE)
    domain.types[pfn] = L1TAB - 1 + level | pin
    leaf = domain.walk(domain.vaddrs[pfn])[-1]
    domain.table(leaf.table)[leaf.entry] &= KEEP - RW
    return pfn


def unmap(domain: Domain, pfn: int) -> None:
    """Take a page out of the kernel's mapping of all its memory."""
    domain.set_pte(domain.vaddrs[pfn], 0)


def lose(domain: Domain, pfn: int, kind: int | None = None) -> None:
    """Take a page and its mapping away; ``kind`` is what the stream says of it instead, None for nothing at all."""
    unmap(domain, pfn)
    del domain.pages[pfn]
    if kind is None:
        del domain.types[pfn]
    else:
        domain.types[pfn] = kind


def free_entry(domain: Domain, table: int, *, above: int = 0) -> int:
    """An entry of a table that is empty, and not Xen's."""
    entries = domain.table(table)
    return next(i for i in range(above, 512) if not entries[i])


def page_of(finding: Finding) -> int:
    return -1 if finding.pfn is None else finding.pfn
