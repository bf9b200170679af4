"""Comparison of two domains, page by page and field by field.

Fields have the names of abi/.

Any two domains have pages and registers to compare; two streams have all their records. Pages are read in batches, so
that memory follows the number of extents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xenpv.diff.fields import FieldDifference, compare_values, differing_ranges
from xenpv.diff.records import compare_records
from xenpv.errors import Fault, RequestError
from xenpv.frames import HAS_DATA, IS_TABLE, PAGE_SIZE, PAGES_PER_BATCH, U8, U64, Frames, type_name
from xenpv.io.progress import Progress, ProgressCallback
from xenpv.runs import Extents, align
from xenpv.source.domain import Domain


@dataclass(frozen=True)
class PageDifference:
    """A page whose content differs.

    Attributes:
        pfn: its pfn.
        type: its page type in the first domain.
        kind: "page table", "p2m" or "data".
        ranges: the bytes that differ: offset of the first, and offset after the last.
    """

    pfn: int
    type: str
    kind: str
    ranges: list[tuple[int, int]]


@dataclass
class TypeDifference:
    """Pages that do not have the same type in both domains.

    Type ``a`` in the first, ``b`` in the second; "absent" where there is no page.

    ``first``: the first pfns.
    """

    a: str
    b: str
    pages: int = 0
    first: list[int] = field(default_factory=list)


@dataclass
class Difference:
    """The differences between two domains.

    Attributes:
        a: name of the first domain.
        b: name of the second domain.
        compared: pages that have content in both.
        differ: pages whose content differs.
        first: the first of those.
        kinds: how many pages differ, by PageDifference.kind.
        types: pages that do not have the same type in both.
        fields: fields of records and registers.
    """

    a: str
    b: str
    compared: int = 0
    differ: int = 0
    first: list[PageDifference] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    types: list[TypeDifference] = field(default_factory=list)
    fields: list[FieldDifference] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.differ or self.types or self.fields)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for --json."""
        first = [{"pfn": page.pfn, "type": page.type, "what": page.kind, "ranges": page.ranges} for page in self.first]
        return {
            "a": self.a,
            "b": self.b,
            "same": self.same,
            "pages": {
                "compared": self.compared,
                "differ": self.differ,
                "kinds": self.kinds,
                "first": first,
                "types": [vars(types) for types in self.types],
            },
            "fields": [vars(difference) for difference in self.fields],
        }


def diff(a: Domain, b: Domain, *, keep: int = 20, progress: ProgressCallback | None = None) -> Difference:
    """Compare two domains.

    Args:
        a: the first domain.
        b: the second domain.
        keep: describe so many pages of each kind of difference; all are counted.
        progress: called with the progress.

    Raises:
        RequestError: a domain is a stream from a pipe, which is read only once.
        Fault: a running domain gave up a page meanwhile.
    """
    for domain in (a, b):
        if not domain.seekable:
            raise RequestError(f"{domain.name}: a pipe can be read only once; compare files")
    difference = Difference(a.name, b.name)
    _compare_pages(a, b, difference, keep, progress)
    if a.hvm != b.hvm or a.width != b.width:
        kinds = [f"{'HVM' if domain.hvm else 'PV'}, {domain.width * 8} bits" for domain in (a, b)]
        difference.fields.append(FieldDifference("domain", "type", *kinds))
    elif a.saved is not None and b.saved is not None:
        difference.fields += compare_records(a.saved, b.saved)
    else:
        difference.fields += _compare_registers(a, b)
    return difference


def _compare_registers(a: Domain, b: Domain) -> Iterator[FieldDifference]:
    for vcpu in sorted({*a.vcpus, *b.vcpus}):
        yield from compare_values(f"vcpu{vcpu}", *(_registers(domain, vcpu) for domain in (a, b)))


def _registers(domain: Domain, vcpu: int) -> dict[str, int | None] | None:
    """Return a vcpu's registers by name.

    cr3 is given as the table's pfn, because a running domain's register holds an mfn.
    """
    registers = domain.registers(vcpu)
    if registers is None:
        return None
    values = {**registers.general, **registers.segments, **registers.control}
    return {**values, "fs_base": registers.fs_base, "gs_base": registers.gs_base, "cr3": domain.cr3(vcpu)}


# --- pages -----------------------------------------------------------------------------------------------------------


def _compare_pages(a: Domain, b: Domain, difference: Difference, keep: int, progress: ProgressCallback | None) -> None:
    extents_a, extents_b = align(*(Extents.concatenate(domain.extents()) for domain in (a, b)))
    _compare_types(extents_a, extents_b, difference, keep)
    both = extents_a[HAS_DATA[extents_a.type] & HAS_DATA[extents_b.type]]
    p2m_pfns = _p2m_pfns(a, b)
    for pfns in both.batches(PAGES_PER_BATCH):
        pages = [_read_pages(domain.frames, pfns, domain.name) for domain in (a, b)]
        rows = np.flatnonzero((pages[0].view(np.uint64) != pages[1].view(np.uint64)).any(axis=1))
        difference.compared += len(pfns)
        difference.differ += len(rows)
        if len(rows):
            types = a.frames.types(pfns[rows])
            kinds = np.where(IS_TABLE[types], "page table", np.where(np.isin(pfns[rows], p2m_pfns), "p2m", "data"))
            for kind, count in zip(*np.unique(kinds, return_counts=True), strict=True):
                difference.kinds[str(kind)] = difference.kinds.get(str(kind), 0) + int(count)
            for i, row in enumerate(rows[: max(0, keep - len(difference.first))].tolist()):
                ranges = differing_ranges(pages[0][row].tobytes(), pages[1][row].tobytes())
                page = PageDifference(int(pfns[row]), type_name(int(types[i])), str(kinds[i]), ranges)
                difference.first.append(page)
        if progress is not None:
            progress(Progress(difference.compared * PAGE_SIZE, both.total * PAGE_SIZE, unit="bytes"))


def _compare_types(a: Extents, b: Extents, difference: Difference, keep: int) -> None:
    """Count the pages of each pair of types that differ.

    The extents of both have the same pfns.
    """
    rows = np.flatnonzero(a.type != b.type)
    pairs = a.type[rows].astype(np.uint16) << np.uint16(8) | b.type[rows]
    for pair in np.unique(pairs).tolist():
        runs = a[rows[pairs == pair]]
        first = [pfn for pfns in runs[:keep].batches(PAGES_PER_BATCH, keep) for pfn in pfns.tolist()]
        difference.types.append(TypeDifference(type_name(pair >> 8), type_name(pair & 0xFF), runs.total, first))


def _read_pages(frames: Frames, pfns: U64, name: str) -> U8:
    """Return the content of pages, uint8 of shape (n, 4096).

    Raises:
        Fault: a page cannot be read; the error has the domain's name.
    """
    try:
        return frames.pages(pfns)
    except Fault as e:
        raise Fault(f"{name}: {e}", space=e.space, address=e.address) from e


def _p2m_pfns(a: Domain, b: Domain) -> U64:
    """Return the pfns of the p2m's frames that streams name.

    Their content is the old hosts' mfns.
    """
    frames = [domain.saved.contents.p2m_leaf_runs.frame for domain in (a, b) if domain.saved is not None]
    return np.unique(np.concatenate([*frames, np.empty(0, np.uint64)]))
