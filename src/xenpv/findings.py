"""The reports of a verifier: a Finding for each violation of a Rule.

Readers raise at the first violation; verifiers collect all of them. Both name the same rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Protocol


class Severity(StrEnum):
    """How serious a finding is.

    ERROR: the domain would not restore, or differ from what was saved. WARNING: it restores, but something is not as
    it should be. NOTE: nothing is wrong.
    """

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule that a stream or a domain must keep.

    Attributes:
        name: its unique name.
        text: what must hold.
        source: who demands it: a specification, or a function of a program.
        severity: how serious a violation is.
    """

    name: str
    text: str
    source: str
    severity: Severity = Severity.ERROR

    def __post_init__(self) -> None:
        if RULES.setdefault(self.name, self) is not self:
            raise ValueError(f"two rules are named {self.name}")


RULES: dict[str, Rule] = {}


class SupportsIndexing(Protocol):
    """A list, or a one-dimensional array."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> Iterable[Any]: ...


@dataclass(frozen=True, slots=True)
class Finding:
    """One violation of a rule. Everything about its place that is not known is None.

    Attributes:
        rule: the rule.
        message: what is wrong, with the values.
        offset: the byte offset in the file or pipe.
        record: the name of the record there.
        pfn: the page.
        level: the level of a page table, 1 to 4.
        entry: the index of an entry in that table; without a level, a place in the p2m's frame list.
        vcpu: the number of the vcpu.
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
        """Return a dictionary of plain values for --json.

        The rule is given by name. Unknown places are left out.
        """
        known = {k: v for k, v in asdict(self).items() if k != "rule" and v is not None}
        return {"rule": self.rule.name, "severity": str(self.severity)} | known

    def __str__(self) -> str:
        parts = []
        if self.offset is not None:
            parts.append(f"offset {self.offset:#x}")
        if self.record:
            parts.append(self.record)
        if self.vcpu is not None:
            parts.append(f"vcpu{self.vcpu}")
        if self.pfn is not None:
            parts.append(f"pfn {self.pfn:#x}")
        if self.level is not None:
            parts.append(f"L{self.level}" + ("" if self.entry is None else f"[{self.entry}]"))
        place = f" ({', '.join(parts)})" if parts else ""
        return f"{self.message}{place} [{self.rule.name}]"


class Findings:
    """The findings of one verification.

    A hostile input can break one rule a million times: all violations are counted, the first ``keep`` of each rule
    are kept.
    """

    def __init__(self, keep: int = 20) -> None:
        self.keep = keep
        self.count: Counter[Rule] = Counter()
        self._kept: list[Finding] = []

    def add(self, rule: Rule, message: str, **place: Any) -> None:
        """Add a finding; ``place`` are the fields of Finding."""
        self.count[rule] += 1
        if self.count[rule] <= self.keep:
            self._kept.append(Finding(rule, message, **place))

    def add_breach(self, rule: Rule, message: str, offset: int, record: str | None) -> None:
        """Keep a breach that a reader reports (a BreachHandler)."""
        self.add(rule, message, offset=offset, record=record)

    def add_each(
        self, rule: Rule, items: SupportsIndexing, describe: Callable[[Any], tuple[str, dict[str, Any]]]
    ) -> None:
        """Add a finding for each item; only those that are kept are described.

        Args:
            rule: the rule that all of them break.
            items: a list or a one-dimensional array.
            describe: ``describe(item)`` returns the message and the fields of Finding.
        """
        room = max(0, self.keep - self.count[rule])
        for item in items[:room]:
            message, place = describe(item)
            self.add(rule, message, **place)
        if len(items) > room:
            self.count[rule] += len(items) - room

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

    def omitted(self) -> dict[Rule, int]:
        """Return how many findings of each rule were counted but not kept.

        Rules whose findings were all kept are left out.
        """
        return {rule: n - self.keep for rule, n in self.count.items() if n > self.keep}
