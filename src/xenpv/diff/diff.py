"""What differs between two domains: page by page, and field by field by the names of abi/.

Pages of any two domains, wherever they are; records only where both are streams. Both are read in batches: memory
follows the number of extents, not of pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xenpv.diff.fields import Field, differing, ranges
from xenpv.diff.records import records_differ
from xenpv.errors import Fault, RequestError
from xenpv.frames import HAS_DATA, IS_TABLE, PAGE_SIZE, PAGES_PER_BATCH, U8, U64, Frames, type_name
from xenpv.io.progress import Progress, ProgressCallback
from xenpv.runs import Extents, align
from xenpv.source.domain import Domain


@dataclass(frozen=True)
class Page:
    """A page whose content differs: ``ranges`` of bytes, first and behind the last. ``what`` it is, in a word."""

    pfn: int
    type: str
    what: str
    ranges: list[tuple[int, int]]


@dataclass
class Types:
    """Pages that are of one type in the first domain and of another in the second; ``absent`` where there are none."""

    a: str
    b: str
    pages: int = 0
    first: list[int] = field(default_factory=list)


@dataclass
class Difference:
    """``compared``: pages whose content was; ``differ``: of those; ``first``: the first of them, ``kinds``: how many by
    what they are. ``types``: pages that are not of one type in both. ``fields``: everything else.
    """

    a: str
    b: str
    compared: int = 0
    differ: int = 0
    first: list[Page] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    types: list[Types] = field(default_factory=list)
    fields: list[Field] = field(default_factory=list)

    @property
    def same(self) -> bool:
        return not (self.differ or self.types or self.fields)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for --json."""
        return {
            "a": self.a,
            "b": self.b,
            "same": self.same,
            "pages": {
                "compared": self.compared,
                "differ": self.differ,
                "kinds": self.kinds,
                "first": [vars(page) for page in self.first],
                "types": [vars(types) for types in self.types],
            },
            "fields": [vars(one) for one in self.fields],
        }


def diff(a: Domain, b: Domain, *, keep: int = 20, progress: ProgressCallback | None = None) -> Difference:
    """Compare two domains. ``keep``: of how many pages the bytes are told; all are counted.

    Raises RequestError for a stream out of a pipe, whose pages are gone, Fault for a page that goes meanwhile.
    """
    for one in (a, b):
        if not one.seekable:
            raise RequestError(f"{one.name}: is a pipe, which passes once; compare files")
    out = Difference(a.name, b.name)
    _compare_pages(a, b, out, keep, progress)
    if a.hvm != b.hvm or a.width != b.width:
        kinds = [f"{'HVM' if one.hvm else 'PV'}, {one.width * 8} bits" for one in (a, b)]
        out.fields.append(Field("domain", "type", *kinds))
        return out
    if a.saved is not None and b.saved is not None:
        out.fields += records_differ(a.saved, b.saved)
    else:
        out.fields += _registers(a, b)
    return out


def _registers(a: Domain, b: Domain) -> Iterator[Field]:
    """What any domain tells of its vcpus."""
    for vcpu in sorted({*a.vcpus, *b.vcpus}):
        yield from differing(f"vcpu{vcpu}", *(_of_vcpu(one, vcpu) for one in (a, b)))


def _of_vcpu(domain: Domain, vcpu: int) -> dict[str, int | None] | None:
    """Registers by name, flat; of cr3 the table's pfn, since a running domain's register has an mfn."""
    registers = domain.registers(vcpu)
    if registers is None:
        return None
    named = {**registers.general, **registers.segments, **registers.control}
    return {**named, "fs_base": registers.fs_base, "gs_base": registers.gs_base, "cr3": domain.cr3(vcpu)}


# --- pages -----------------------------------------------------------------------------------------------------------


def _compare_pages(a: Domain, b: Domain, out: Difference, keep: int, progress: ProgressCallback | None) -> None:
    of_a, of_b = align(*(Extents.concatenate(one.extents()) for one in (a, b)))
    _count_types(of_a, of_b, out, keep)
    both = of_a[HAS_DATA[of_a.type] & HAS_DATA[of_b.type]]
    p2m = _p2m_pages(a, b)
    for pfns in both.batches(PAGES_PER_BATCH):
        pages = [_pages(one.frames, pfns, one.name) for one in (a, b)]
        apart = np.flatnonzero((pages[0].view(np.uint64) != pages[1].view(np.uint64)).any(axis=1))
        out.compared += len(pfns)
        out.differ += len(apart)
        if len(apart):
            types = a.frames.types(pfns[apart])
            what = np.where(IS_TABLE[types], "page table", np.where(np.isin(pfns[apart], p2m), "p2m", "data"))
            for name, count in zip(*np.unique(what, return_counts=True), strict=True):
                out.kinds[str(name)] = out.kinds.get(str(name), 0) + int(count)
            for i, at in enumerate(apart[: max(0, keep - len(out.first))].tolist()):
                where = ranges(pages[0][at].tobytes(), pages[1][at].tobytes())
                out.first.append(Page(int(pfns[at]), type_name(int(types[i])), str(what[i]), where))
        if progress is not None:
            progress(Progress(out.compared * PAGE_SIZE, both.total * PAGE_SIZE, unit="bytes"))


def _count_types(of_a: Extents, of_b: Extents, out: Difference, keep: int) -> None:
    apart = np.flatnonzero(of_a.type != of_b.type)
    pairs = of_a.type[apart].astype(np.uint16) << np.uint16(8) | of_b.type[apart]
    for pair in np.unique(pairs).tolist():
        of = apart[pairs == pair]
        runs = of_a[of]
        first = [pfn for pfns in runs[:keep].batches(PAGES_PER_BATCH, keep) for pfn in pfns.tolist()]
        out.types.append(Types(type_name(pair >> 8), type_name(pair & 0xFF), runs.total, first))


def _pages(frames: Frames, pfns: U64, name: str) -> U8:
    try:
        return frames.pages(pfns)
    except Fault as e:
        raise Fault(f"{name}: {e}", space=e.space, address=e.address) from e


def _p2m_pages(a: Domain, b: Domain) -> U64:
    """The pfns of the p2m's frames, as far as they are known; their content is the old hosts' mfns."""
    found = [one.saved.contents.p2m_leaf_runs.frame for one in (a, b) if one.saved is not None]
    return np.unique(np.concatenate([*found, np.empty(0, np.uint64)]))
