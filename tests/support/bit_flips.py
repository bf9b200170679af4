"""Flips single bits in a saved domain, and counts how many of them verify finds.

    python -m tests.support.bit_flips FILE [SAMPLES]      FILE is copied, and never changed

Kinds of place are: entries of page tables, the P2M_FRAMES record, vcpu contexts, headers (of envelope, image, domain
and records), and the list of pfns in PAGE_DATA. Missed flips are counted by reason: what the bit means to a restorer.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.saved_files import VerifyResult, verify_file
from xenpv.abi.declare import Width
from xenpv.abi.x86 import VCPU_GUEST_CONTEXT
from xenpv.errors import StreamError
from xenpv.findings import Finding
from xenpv.frames import ABSENT, IS_TABLE, PAGE_SIZE, type_name
from xenpv.io.stream_input import Input
from xenpv.source.saved import SavedDomain
from xenpv.stream.envelope import XL_HEADER_SIZE
from xenpv.stream.page_data import PageData
from xenpv.stream.reader import Reader

KINDS = ("page tables", "p2m frame list", "vcpu context", "headers", "page list")
_FRAME = range(12, 52)
_FLAGS = {0: "present", 1: "writable", 2: "user", 5: "accessed", 6: "dirty", 8: "global", 63: "no-execute"}


@dataclass
class Tally:
    """Counts of flips of one kind.

    Attributes:
        total: All flips.
        errors: Flips that gave an error.
        warnings: Flips that gave only a warning.
        placed: Flips whose place a finding names: the entry, the table or the record.
        missed: Flips without a finding, by reason.
        examples: One missed flip for each reason.
    """

    total: int = 0
    errors: int = 0
    warnings: int = 0
    placed: int = 0
    missed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def found(self) -> int:
        return self.errors + self.warnings

    @property
    def share(self) -> float:
        return self.found / self.total if self.total else 1.0


@dataclass(frozen=True)
class Span:
    """Consecutive bytes of one kind.

    Attributes:
        offset: Byte offset in the file.
        length: Number of bytes.
        name: What they are.
        why: why(byte, bit): what a flip of this bit means.
        framing: Whether a check of framing alone may find a flip.
        unit: Findings point at a multiple of so many bytes; 0: at the begin of the span.
    """

    offset: int
    length: int
    name: str
    why: Callable[[int, int], str]
    framing: bool = False
    unit: int = 0


def flip_survey(path: Path, kinds: Iterable[str], samples: int, seed: int) -> dict[str, Tally]:
    """Flip up to ``samples`` bits of each kind in a copy of the file, one at a time, and verify each copy."""
    rng = random.Random(seed)
    with tempfile.NamedTemporaryFile(suffix=".save") as copy:
        shutil.copyfile(path, copy.name)
        if verify_file(copy.name).findings:
            raise ValueError(f"{path} is not sound")
        spans = _spans(Path(copy.name))
        fd = os.open(copy.name, os.O_RDWR)
        try:
            return {kind: _survey(fd, Path(copy.name), spans[kind], samples, rng) for kind in kinds}
        finally:
            os.close(fd)


def _survey(fd: int, path: Path, spans: list[Span], samples: int, rng: random.Random) -> Tally:
    tally = Tally()
    bits = sum(span.length for span in spans) * 8
    for n in sorted(rng.sample(range(bits), min(samples, bits))):
        at, bit = divmod(n, 8)
        for span in spans:
            if at < span.length:
                break
            at -= span.length
        _flip(fd, span.offset + at, bit)
        try:
            _count(tally, path, span, at, bit)
        finally:
            _flip(fd, span.offset + at, bit)
    return tally


def _flip(fd: int, offset: int, bit: int) -> None:
    (byte,) = os.pread(fd, 1, offset)
    os.pwrite(fd, bytes([byte ^ 1 << bit]), offset)


def _count(tally: Tally, path: Path, span: Span, at: int, bit: int) -> None:
    tally.total += 1
    try:
        result = _verify(path, span, at)
    except StreamError as e:
        tally.errors += 1
        tally.placed += span.offset <= e.offset <= span.offset + span.length
        return
    if result.report.findings.errors:
        tally.errors += 1
    elif result.findings:
        tally.warnings += 1
    else:
        why = span.why(at, bit)
        tally.missed[why] += 1
        tally.examples.setdefault(why, f"{span.name} at {span.offset:#x}, byte {at:#x}, bit {bit}")
        return
    tally.placed += any(_points_at(finding, span, at) for finding in result.findings)


def _verify(path: Path, span: Span, at: int) -> VerifyResult:
    """Verify a copy; framing alone, which takes a tenth of the time, if that finds the flip."""
    if span.framing:
        result = verify_file(path, deep=False)
        if result.report.findings.errors and any(_points_at(finding, span, at) for finding in result.findings):
            return result
    return verify_file(path)


def _points_at(finding: Finding, span: Span, at: int) -> bool:
    if finding.offset is None:
        return False
    if not span.unit:
        return span.offset - 16 <= finding.offset <= span.offset + span.length
    return finding.offset in {span.offset + at // span.unit * span.unit, span.offset, span.offset - 8}


# --- kinds of bytes --------------------------------------------------------------------------------------------------


def _spans(path: Path) -> dict[str, list[Span]]:
    spans: dict[str, list[Span]] = {kind: [] for kind in KINDS}
    source = Input.open(str(path))
    records: dict[str, list[tuple[int, int]]] = {}
    for event in source.events(Reader()):
        name, at = event.name, event.offset
        length = getattr(event, "length", 0)
        records.setdefault(name, []).append((at, length))
        if isinstance(event, PageData):
            spans["headers"].append(Span(at, 16, name, _header_bit(name), framing=True))
            entries = len(event.raw)
            spans["page list"].append(Span(at + 16, entries, name, _page_list_bit(event.raw), framing=True))
        else:
            size = {"image header": 24, "domain header": 16, "libxl header": 16, "xl envelope": XL_HEADER_SIZE}
            spans["headers"].append(Span(at, size.get(name, 8), name, _header_bit(name), framing=True))
    source.close()
    for at, length in records["X86_PV_P2M_FRAMES"]:
        spans["p2m frame list"].append(Span(at + 8, length, "X86_PV_P2M_FRAMES", _p2m_bit, unit=8))
    with SavedDomain.open(str(path)) as saved:
        for at, length in records["X86_PV_VCPU_BASIC"]:
            why = _context_bit(saved.contents.width)
            spans["vcpu context"].append(Span(at + 8, length, "X86_PV_VCPU_BASIC", why))
        tables = saved.contents.index.pfns(IS_TABLE)
        offsets = saved.contents.index.offsets(tables).tolist()
        pages = saved.frames.pages(tables)
        for pfn, offset, page, kind in zip(tables.tolist(), offsets, pages, saved.frames.types(tables), strict=True):
            what = _entry_bit(page.tobytes(), int(kind) & 7)
            spans["page tables"].append(Span(offset, PAGE_SIZE, f"L{int(kind) & 7} at pfn {pfn:#x}", what, unit=8))
    return spans


def _entry_bit(table: bytes, level: int) -> Callable[[int, int], str]:
    def why(at: int, bit: int) -> str:
        pte = int.from_bytes(table[at // 8 * 8 : at // 8 * 8 + 8], "little")
        n = at % 8 * 8 + bit
        where = "leaf" if level == 1 else "upper entry"
        if not pte & 1:
            if n == 0:
                return f"{where}: becomes present, and names an ordinary page" if level == 1 else "becomes present"
            return "entry that is not present: nobody reads it"
        if n in _FRAME:
            return f"{where}: names another page of the same type"
        if n in _FLAGS:
            return f"{where}: {_FLAGS[n]}"
        return f"{where}: a bit that is software's own"

    return why


def _p2m_bit(at: int, bit: int) -> str:
    del bit
    return "start or end pfn" if at < 8 else "a frame's pfn"


def _context_bit(width: Width) -> Callable[[int, int], str]:
    layout = {name: VCPU_GUEST_CONTEXT.offset(width, name) for name in VCPU_GUEST_CONTEXT[width].names or ()}

    def why(at: int, bit: int) -> str:
        del bit
        if at < 8:
            return "vcpu id"
        name = max((offset, name) for name, offset in layout.items() if offset <= at - 8)[1]
        return "a register" if name == "user_regs" else name

    return why


def _header_bit(name: str) -> Callable[[int, int], str]:
    def why(at: int, bit: int) -> str:
        if name == "domain header":
            return "domain header: the version of Xen" if at >= 8 else f"domain header: byte {at}"
        if name in {"image header", "libxl header", "xl envelope"}:
            return f"{name}: byte {at}"
        if at < 4:
            optional = at == 3 and bit == 7
            return f"{name} becomes an optional record" if optional else f"{name} becomes another record"
        return f"{name}: length"

    return why


def _page_list_bit(entries: bytes) -> Callable[[int, int], str]:
    def why(at: int, bit: int) -> str:
        kind = entries[at // 8 * 8 + 7] >> 4
        what = type_name(kind) if kind != ABSENT else "?"
        return f"type of a page ({what})" if at % 8 == 7 and bit >= 4 else f"pfn of a page ({what})"

    return why


# --- output ----------------------------------------------------------------------------------------------------------


def as_table(result: dict[str, Tally]) -> str:
    """Return a table of what was found of each kind, and of the reasons why the rest was not."""
    lines = [f"{'flipped in':<18}{'bits':>6}{'error':>7}{'warning':>9}{'missed':>8}{'found':>8}{'placed':>8}"]
    for kind, tally in result.items():
        missed = tally.total - tally.found
        counts = f"{tally.total:>6}{tally.errors:>7}{tally.warnings:>9}{missed:>8}{tally.share:>8.1%}"
        lines.append(f"{kind:<18}{counts}{tally.placed / max(1, tally.found):>8.1%}")
        lines += [f"    {n:>5}  {why} ({tally.examples[why]})" for why, n in tally.missed.most_common()]
    return "\n".join(lines)


if __name__ == "__main__":
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 500
    print(as_table(flip_survey(Path(sys.argv[1]), KINDS, count, seed=1)))
