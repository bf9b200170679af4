"""What a verifier reports: a Finding for each fault, a Rule for what was broken.

Readers stop at the first fault and raise; verifiers go on and collect. Both name the same rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Protocol


class Severity(StrEnum):
    """ERROR: would not restore, or not what was saved. WARNING: restores, yet is not as it should be.

    NOTE: is as it may be, and good to know.
    """

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Rule:
    """Something that must hold. ``source`` says who demands it: a specification, or a function of a program."""

    name: str
    text: str
    source: str
    severity: Severity = Severity.ERROR

    def __post_init__(self) -> None:
        if RULES.setdefault(self.name, self) is not self:
            raise ValueError(f"two rules are named {self.name}")


RULES: dict[str, Rule] = {}


class SupportsIndexing(Protocol):
    """A list, or an array of one dimension."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> Iterable[Any]: ...


@dataclass(frozen=True, slots=True)
class Finding:
    """One place where a rule does not hold.

    ``offset`` is a byte offset in the file or pipe; ``pfn``, ``level`` (1 to 4) and ``entry`` (0 to 511) name a
    page-table entry, ``entry`` without a level a place in the p2m's frame list, ``vcpu`` a vcpu. Whatever is not
    known is None.
    """

    rule: Rule
    message: str
    offset: int | None = None
    record: str | None = None
    pfn: int | None = None
    level: int | None = None
    entry: int | None = None
    vcpu: int | None = None

    @property
    def severity(self) -> Severity:
        """The severity of its rule."""
        return self.rule.severity

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain values, for --json: the rule by name, unknown places left out."""
        found = {k: v for k, v in asdict(self).items() if k != "rule" and v is not None}
        return {"rule": self.rule.name, "severity": str(self.severity)} | found

    def __str__(self) -> str:
        where = []
        if self.offset is not None:
            where.append(f"offset {self.offset:#x}")
        if self.record:
            where.append(self.record)
        if self.vcpu is not None:
            where.append(f"vcpu{self.vcpu}")
        if self.pfn is not None:
            where.append(f"pfn {self.pfn:#x}")
        if self.level is not None:
            where.append(f"L{self.level}" + ("" if self.entry is None else f"[{self.entry}]"))
        place = f" ({', '.join(where)})" if where else ""
        return f"{self.message}{place} [{self.rule.name}]"


class Findings:
    """All findings of one pass.

    A hostile input can break one rule a million times: all are counted, the first few of each rule are kept.
    """

    def __init__(self, keep: int = 20) -> None:
        self.keep = keep
        self.count: Counter[Rule] = Counter()
        self._kept: list[Finding] = []

    def add(self, rule: Rule, message: str, **place: Any) -> None:
        """Keep a finding, or only count it when ``keep`` of its rule are held. ``place``: the fields of Finding."""
        self.count[rule] += 1
        if self.count[rule] <= self.keep:
            self._kept.append(Finding(rule, message, **place))

    def add_breach(self, rule: Rule, message: str, offset: int, record: str | None) -> None:
        """Keep a breach that a reader reports (a BreachHandler)."""
        self.add(rule, message, offset=offset, record=record)

    def add_each(self, rule: Rule, at: SupportsIndexing, describe: Callable[[Any], tuple[str, dict[str, Any]]]) -> None:
        """A finding for each of ``at`` (a list or an array); only what is kept is described.

        ``describe(one)`` gives the message and the fields of Finding.
        """
        room = max(0, self.keep - self.count[rule])
        for one in at[:room]:
            message, place = describe(one)
            self.add(rule, message, **place)
        if len(at) > room:
            self.count[rule] += len(at) - room

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._kept)

    def __len__(self) -> int:
        return self.count.total()

    @property
    def errors(self) -> int:
        """The number of errors, including those that were only counted."""
        return sum(n for rule, n in self.count.items() if rule.severity is Severity.ERROR)

    @property
    def warnings(self) -> int:
        """The number of warnings, including those that were only counted."""
        return sum(n for rule, n in self.count.items() if rule.severity is Severity.WARNING)

    @property
    def notes(self) -> int:
        """The number of notes, including those that were only counted."""
        return sum(n for rule, n in self.count.items() if rule.severity is Severity.NOTE)

    def left_out(self) -> dict[Rule, int]:
        """For each rule with more findings than were kept, how many were only counted."""
        return {rule: n - self.keep for rule, n in self.count.items() if n > self.keep}
