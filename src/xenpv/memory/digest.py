"""What a domain's memory comes to, whatever its mfns are: of two domains with one digest, one is the other's copy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from xenpv.frames import HAS_DATA, IS_TABLE, U64, Frames

_AT_ONCE = 1024  # pages


@dataclass(frozen=True, slots=True)
class Digest:
    """``pages`` were there, ``written`` of them hold anything but zeroes; ``value`` is 32 hexadecimal digits."""

    pages: int
    written: int
    value: str


def digest(frames: Frames, pfns: Iterable[U64], aside: U64) -> Digest:
    """The digest of the pages at ``pfns``, which come in pieces, ascending; of those in ``aside`` only that they are
    there: pages that hold mfns.

    Pages without content count as zeroes. Page tables are those whose type says so, so that it matters whether frames
    say the same types. Raises Fault for a page that cannot be read.
    """
    there, places, content = (blake2b(digest_size=16) for _ in range(3))
    pages = written = 0
    for piece in pfns:
        pages += len(piece)
        there.update(piece.astype("<u8", copy=False))
        kinds = frames.types(piece)
        readable = HAS_DATA[kinds] & ~np.isin(piece, aside)
        some = piece[readable]
        tables = IS_TABLE[kinds[readable]]
        for at in range(0, len(some), _AT_ONCE):
            now = slice(at, at + _AT_ONCE)
            read = frames.pages(some[now])
            held = read.any(axis=1)
            written += int(np.count_nonzero(held))
            places.update((some[now][held] << np.uint64(1) | tables[now][held]).astype("<u8", copy=False))
            content.update(np.ascontiguousarray(read[held]))
    whole = blake2b(digest_size=16)
    for part in (there, places, content):
        whole.update(part.digest())
    return Digest(pages, written, whole.hexdigest())
