"""Fuzz the stream layer. One invariant: any bytes either parse or raise StreamError, in bounded memory and time.

python -m tests.fuzz.stream [--seconds N] [--seed N] [--only N]
"""

from __future__ import annotations

import sys
from random import Random

import numpy as np

from tests.fuzz.run import MIB, bounded, main
from tests.support.stream_reading import random_chunks
from xenpv.errors import StreamError
from xenpv.findings import Rule
from xenpv.frames import IS_TABLE
from xenpv.stream.contents import Contents
from xenpv.stream.reader import Reader

# A P2M_FRAMES record of a few bytes can be for the last pfn there is: 2^32 / 512 frames of 8 bytes, and the same again
# while it is put in its place.
MEMORY = 136 * MIB
LOOK_AT = np.array([0, 1, 35, 1 << 31, (1 << 32) - 1, (1 << 52) - 1], np.uint64)


def parse(data: bytes, rng: Random) -> None:
    """Read it in one of all the ways in which a stream can be read."""
    faults: list[tuple[Rule, str, int, str | None]] = []
    collect, pages = rng.random() < 0.6, rng.random() < 0.5
    reader = Reader(on_breach=(lambda *fault: faults.append(fault)) if collect else None, pages=pages)
    contents = Contents()
    events = 0
    error: StreamError | None = None
    pieces = random_chunks(data, rng.randrange(1 << 30)) if rng.random() < 0.5 else [data]
    try:
        for piece in (*pieces, None):
            if piece is None:
                reader.feed_eof()
            else:
                reader.feed(piece)
            while (event := reader.next_event()) is not None:
                events += 1
                contents.add(event)
                assert 0 <= event.offset <= len(data)
    except StreamError as e:
        error = e
    if error is None:
        assert reader.done
        assert reader.offset + reader.trailing == len(data)
    else:
        assert 0 <= error.offset <= len(data)
        assert error.reason
        assert "\n" not in str(error)
    assert events <= len(data) // 8 + 8, "every event takes bytes"
    assert len(faults) <= len(data) // 2 + 64, "every fault takes bytes"
    for rule, message, offset, _ in faults:
        assert rule.name
        assert message
        assert 0 <= offset <= len(data)
    contents.index.types(LOOK_AT)
    contents.index.pfns(IS_TABLE)
    assert contents.index.sent >= contents.index.repeated


def target(data: bytes, n: int) -> None:
    """Try one input."""
    with bounded(n, len(data), memory=MEMORY + 8 * len(data)):
        parse(data, Random(n))


if __name__ == "__main__":
    sys.exit(main(target, "tests.fuzz.stream"))
