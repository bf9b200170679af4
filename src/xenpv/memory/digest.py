"""A digest of a domain's memory that does not depend on its mfns.

Equal digests mean equal memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from xenpv.frames import HAS_DATA, IS_TABLE, PAGES_PER_BATCH, U8, U64, Frames, nonzero_pages


@dataclass(frozen=True, slots=True)
class Digest:
    """A digest of a domain's memory.

    Attributes:
        pages: how many pages there are.
        nonzero: how many of them hold anything but zeros.
        value: 32 hexadecimal digits.
    """

    pages: int
    nonzero: int
    value: str


def digest(frames: Frames, pieces: Iterable[tuple[U64, U8]], presence_only: U64) -> Digest:
    """Compute the digest of a domain's memory. Pages without content count as zeros.

    Args:
        frames: the memory.
        pieces: pfns, ascending over all pieces, and the page type of each.
        presence_only: pfns of pages that hold mfns; their content does not count.

    Raises:
        Fault: a page cannot be read.
    """
    all_pfns, nonzero_pfns, content = (blake2b(digest_size=16) for _ in range(3))
    pages = nonzero = 0
    for pfns, types in pieces:
        pages += len(pfns)
        all_pfns.update(pfns.astype("<u8").data)
        readable = HAS_DATA[types] & ~np.isin(pfns, presence_only)
        readable_pfns, is_table = pfns[readable], IS_TABLE[types[readable]]
        for i in range(0, len(readable_pfns), PAGES_PER_BATCH):
            batch = slice(i, i + PAGES_PER_BATCH)
            data = frames.pages(readable_pfns[batch])
            is_filled = nonzero_pages(data)
            nonzero += int(np.count_nonzero(is_filled))
            words = readable_pfns[batch][is_filled] << np.uint64(1) | is_table[batch][is_filled]
            nonzero_pfns.update(words.astype("<u8").data)
            content.update(data[is_filled].data)
    combined = blake2b(digest_size=16)
    for part in (all_pfns, nonzero_pfns, content):
        combined.update(part.digest())
    return Digest(pages, nonzero, combined.hexdigest())
