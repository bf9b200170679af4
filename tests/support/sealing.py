"""Sealed files, and flips of bits in their pages. ``python -m tests.support.sealing 10000`` flips as many.

Each flip changes one random bit of one random page; the reader has to name the batch, and the pfn among its own.
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import dataclass
from typing import Any

from tests.support.restoring import stream_input
from tests.support.writers.build import pv_domain
from xenpv.convert.convert import Conversion, ConvertOptions
from xenpv.convert.file import write_verified
from xenpv.errors import SealBroken
from xenpv.stream.page_data import PageData
from xenpv.stream.reader import Reader
from xenpv.stream.seal import Sealer

PAGE = 4096


def plain_file(pages: int = 300) -> bytes:
    """An xl save file of a domain that verifies, without a seal."""
    return pv_domain(pfns=range(pages), vcpus=2).to_bytes()


def sealed_file(
    data: bytes | None = None, *, key: bytes | None = None, sealer: Sealer | None = None, **options: Any
) -> bytes:
    """That file with a seal, 16 pages to a batch."""
    out = bytearray()
    options.setdefault("batch", 16)

    def write(buffers: Any) -> None:
        for buffer in buffers:
            out.extend(buffer)

    with stream_input(plain_file() if data is None else data) as source:
        conversion = Conversion(source, Reader(), ConvertOptions(seal=sealer or Sealer(key), **options))
        write_verified(conversion, write, force=True)
    return bytes(out)


@dataclass
class Batches:
    """Where the pages of a file lie: offset of each page, its batch, and its pfn."""

    pages: list[tuple[int, int, int]]

    @classmethod
    def of(cls, data: bytes) -> Batches:
        pages, number = [], 0
        for event in read_events(data, check_seal=False):
            if isinstance(event, PageData):
                pfns = event.pfns[event.has_data].tolist()
                pages += [(event.pages_offset + i * PAGE, number, pfn) for i, pfn in enumerate(pfns)]
                number += 1
        return cls(pages)


def read_events(data: bytes | bytearray, **options: Any) -> list[Any]:
    """All events of a reader that is fed the data at once."""
    reader = Reader(**options)
    reader.feed(bytes(data))
    reader.feed_eof()
    return list(iter(reader.next_event, None))


def count_unnoticed_flips(data: bytes, flips: int, seed: int = 1, key: bytes | None = None) -> int:
    """Flip random bits of page content, one at a time; return how many were not named with batch and pfn."""
    chance, changed, unnoticed = random.Random(seed), bytearray(data), 0
    pages = Batches.of(data).pages
    for _ in range(flips):
        offset, batch, pfn = chance.choice(pages)
        at, bit = offset + chance.randrange(PAGE), 1 << chance.randrange(8)
        changed[at] ^= bit
        try:
            read_events(changed, seal_key=key)
            unnoticed += 1
        except SealBroken as e:
            unnoticed += e.batch != batch or pfn not in e.pfns
        changed[at] ^= bit
    return unnoticed


def main() -> None:
    """Flip as many bits as the first argument says, keyed and not; print the result."""
    flips = int(sys.argv[1])
    for key in (None, b"0123456789abcdef"):
        start = time.monotonic()
        data = sealed_file(key=key)
        unnoticed = count_unnoticed_flips(data, flips, key=key)
        seconds = time.monotonic() - start
        print(f"{'keyed' if key else 'unkeyed'}: {flips} flips, {unnoticed} not named, {seconds:.0f} s")


if __name__ == "__main__":
    main()
