"""Breaks one thing in a domain, and says which finding verify must report for it."""

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
UNMAPPED = {"vcpu-resume", "vcpu-handler"}  # rules that break too if a vcpu's page tables map nothing
WIDTHS: tuple[Width, ...] = (8, 4)
BASIC = "X86_PV_VCPU_BASIC"


@dataclass(frozen=True)
class Where:
    """Where a finding must point.

    Attributes:
        fields: Fields of the finding.
        span: Its offset, and the length of the bytes there that were broken; 0 if these are elsewhere, or missing.
    """

    fields: Mapping[str, int | str | None] = field(default_factory=dict)
    span: Callable[[Stream], tuple[int, int]] | None = None

    def without_bytes(self) -> Where:
        """Return the same place; but the bytes there are not those that were broken."""
        if self.span is None:
            return self
        span = self.span
        return Where(self.fields, lambda stream: (span(stream)[0], 0))


def at_entry(pfn: int, level: int, entry: int) -> Where:
    """Return the place of a page-table entry."""
    place = {"pfn": pfn, "level": level, "entry": entry}
    return Where(place, lambda stream: (page_offsets(stream)[pfn] + entry * 8, 8))


def at_p2m_entry(domain: Domain, pfn: int) -> Where:
    """Return the place of a pfn's p2m entry."""
    place, entry = divmod(pfn, PAGE // domain.width)
    leaf = int(domain.p2m_pfns[place])
    return Where({"pfn": pfn}, lambda stream: (page_offsets(stream)[leaf] + entry * domain.width, domain.width))


def at_page(page: int, *, at: int = 0, extent: int = 0, **fields: int | str | None) -> Where:
    """Return the place of ``extent`` bytes of a page from byte ``at`` on; ``fields`` may name another pfn."""
    return Where({"pfn": page} | fields, lambda stream: (page_offsets(stream)[page] + at, extent))


def at_record(name: str, nth: int = 0, *, at: int = 0, extent: int | None = None, **fields: int | str | None) -> Where:
    """Return the place of the nth record of a name, or of ``extent`` bytes of it from byte ``at`` on."""

    def span(stream: Stream) -> tuple[int, int]:
        whole = len(stream[stream.find(name, nth)].data)
        return stream.offset(name, nth) + at, whole if extent is None else extent

    return Where({"record": name} | fields, span)


def nowhere(**fields: int | str | None) -> Where:
    """Return no place in the stream: something is missing."""
    return Where({"offset": None} | fields)


@dataclass(frozen=True)
class Case:
    """One way to break one rule.

    Attributes:
        rule: The rule.
        name: What is broken.
        spoil: Breaks a sound domain, and returns where the finding must point.
        prepare: Changes the domain before, so that it stays sound.
        make: Arguments of pv_domain().
        config: Values of the broken domain's configuration; the sound one's fits the domain.
        also: Rules that break as well.
        may: Rules that may break as well.
        rewrite: Breaks the stream, and not the domain.
    """

    rule: Rule
    name: str
    spoil: Callable[[Domain], Where]
    prepare: Callable[[Domain], object] | None = None
    make: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    also: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    rewrite: Callable[[Stream], object] | None = None

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
    """Register the decorated function as a way to break a rule; see Case."""

    def register(spoil: Callable[[Domain], Where]) -> Callable[[Domain], Where]:
        also_names = frozenset(r.name for r in also)
        CASES.extend(
            Case(rule, name, spoil, prepare, {"width": width} | make, config, also_names, frozenset(may), rewrite)
            for width in widths
        )
        return spoil

    return register


def as_stream(domain: Domain, config: Mapping[str, Any] | None = None) -> Stream:
    """Return the domain in an xl envelope; ``config`` overrides values of its configuration."""
    if config is None:
        return domain.to_stream()
    values = {"vcpus": len(domain.vcpus), "memory_kib": len(domain.pages) * 4} | dict(config)
    return domain.to_stream(config=config_json(**values) + b"\0")


# --- helpers of several cases --------------------------------------------------------------------------------------


def make_table(domain: Domain, pfn: int, level: int, pin: int = 0) -> int:
    """Turn a page into an empty page table, and map it read-only."""
    domain.pages[pfn][:] = bytes(PAGE)
    domain.types[pfn] = L1TAB - 1 + level | pin
    leaf = domain.walk(domain.vaddrs[pfn])[-1]
    domain.table(leaf.table)[leaf.entry] &= KEEP - RW
    return pfn


def unmap(domain: Domain, pfn: int) -> None:
    """Remove a page from the kernel's mapping of all memory."""
    domain.set_pte(domain.vaddrs[pfn], 0)


def lose(domain: Domain, pfn: int, kind: int | None = None) -> None:
    """Remove a page and its mapping; ``kind`` is the type that the stream still names, None for none."""
    unmap(domain, pfn)
    del domain.pages[pfn]
    if kind is None:
        del domain.types[pfn]
    else:
        domain.types[pfn] = kind


def free_entry(domain: Domain, table: int, *, above: int = 0) -> int:
    """Return the number of an empty entry of a table, outside Xen's slots."""
    entries = domain.table(table)
    return next(i for i in range(above, 512) if not entries[i])


def page_of(finding: Finding) -> int:
    return -1 if finding.pfn is None else finding.pfn
