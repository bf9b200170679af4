"""What a domain's memory comes to, whatever its mfns are: of two domains with one digest, one is the other's copy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from xenpv.frames import HAS_DATA, IS_TABLE, PAGES_PER_BATCH, U8, U64, Frames, filled


@dataclass(frozen=True, slots=True)
class Digest:
    """``pages`` were there, ``written`` of them hold anything but zeroes; ``value`` is 32 hexadecimal digits."""

    pages: int
    written: int
    value: str


def digest(frames: Frames, pieces: Iterable[tuple[U64, U8]], aside: U64) -> Digest:
    """The digest of a memory. ``pieces``: pfns, ascending, and the type of each. Of the pages in ``aside`` it only
    matters that they are there: pages that hold mfns.

    Pages without content count as zeroes. Raises Fault for a page that cannot be read.
    """
    there, places, content = (blake2b(digest_size=16) for _ in range(3))
    pages = written = 0
    for pfns, kinds in pieces:
        pages += len(pfns)
        there.update(pfns.astype("<u8").data)
        readable = np.flatnonzero(HAS_DATA[kinds])
        readable = readable[~np.isin(pfns[readable], aside)]
        some, tables = pfns[readable], IS_TABLE[kinds[readable]]
        for at in range(0, len(some), PAGES_PER_BATCH):
            now = slice(at, at + PAGES_PER_BATCH)
            read = frames.pages(some[now])
            held = filled(read)
            written += int(np.count_nonzero(held))
            places.update((some[now][held] << np.uint64(1) | tables[now][held]).astype("<u8").data)
            content.update(read[held].data)
    whole = blake2b(digest_size=16)
    for part in (there, places, content):
        whole.update(part.digest())
    return Digest(pages, written, whole.hexdigest())
