"""Frames out of a dictionary: the memory of a made domain, or a handful of pages that a test lays out itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tests.writers.domain import Domain
from xenpv.errors import Fault
from xenpv.frames import ABSENT, PAGE_SIZE, U8, U64


@dataclass
class DictFrames:
    """Pages by pfn. ``reads`` counts how often each was asked for."""

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
    """A page of words, those given by index and ``fill`` for all others."""
    page = np.full(PAGE_SIZE // width, fill, f"<u{width}")
    for i, value in values.items():
        page[i] = value
    return page.tobytes()


def array(*pfns: int) -> npt.NDArray[np.uint64]:
    return np.array(pfns, np.uint64)
