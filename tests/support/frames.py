"""Frames in a dictionary: the memory of a written domain, or the few pages that a test lays out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

import numpy as np
import numpy.typing as npt

from tests.support.writers.domain import Domain
from xenpv.errors import Fault
from xenpv.frames import ABSENT, PAGE_SIZE, U8, U64, Mask
from xenpv.runs import Extents


@dataclass
class DictFrames:
    """Frames by pfn. ``reads`` counts how often each was read."""

    content: Mapping[int, bytes | bytearray]
    kinds: Mapping[int, int] = field(default_factory=dict)
    reads: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, domain: Domain) -> DictFrames:
        return cls(domain.pages, domain.types)

    def types(self, pfns: U64) -> U8:
        return np.array([self.kinds.get(int(pfn), ABSENT) for pfn in pfns.reshape(-1)], np.uint8).reshape(pfns.shape)

    def pages(self, pfns: U64) -> U8:
        out = np.empty((len(pfns), PAGE_SIZE), np.uint8)
        for row, pfn in zip(out, pfns.tolist(), strict=True):
            if pfn not in self.content:
                raise Fault(f"pfn {pfn:#x} is not there", space="pfn", address=pfn)
            self.reads[pfn] = self.reads.get(pfn, 0) + 1
            row[:] = np.frombuffer(self.content[pfn], np.uint8)
        return out


def words(values: Mapping[int, int], width: int = 8, fill: int = 0) -> bytes:
    """Return a page of words: ``values`` by index, ``fill`` for all others."""
    page = np.full(PAGE_SIZE // width, fill, f"<u{width}")
    for i, value in values.items():
        page[i] = value
    return page.tobytes()


def array(*pfns: int) -> npt.NDArray[np.uint64]:
    return np.array(pfns, np.uint64)


class Machine:
    """Machine frames below ``limit``, allocated in random order: a StorePages and a ReadFrames."""

    def __init__(self, limit: int = 1 << 40, seed: int = 0) -> None:
        self.content: dict[int, U8] = {}
        self.reads = 0
        self._numbers = Random(seed)
        self._limit = limit

    def put(self, pages: U8) -> U64:
        mfns = []
        for page in pages:
            mfn = self._numbers.randrange(1, self._limit)
            while mfn in self.content:
                mfn = self._numbers.randrange(1, self._limit)
            self.content[mfn] = page.copy()
            mfns.append(mfn)
        return np.array(mfns, np.uint64)

    def read(self, mfns: U64) -> tuple[U8, Mask]:
        pages, there = np.zeros((len(mfns), PAGE_SIZE), np.uint8), np.zeros(len(mfns), np.bool_)
        self.reads += len(mfns)
        for i, mfn in enumerate(mfns.tolist()):
            if mfn in self.content:
                pages[i], there[i] = self.content[mfn], True
        return pages, there


def columns(extents: Extents) -> list[tuple[int, int, int]]:
    """Return first pfn, pages and type of each extent."""
    return list(zip(extents.first.tolist(), extents.pages.tolist(), extents.type.tolist(), strict=True))
