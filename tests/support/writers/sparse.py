"""A huge saved domain as a file that takes next to no disk: page contents are holes.

For measuring what must not depend on them, such as `xenpv show`. By hand:

    python -m tests.support.writers.sparse 100 huge.save     # GiB, file
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np

from tests.support.writers.build import pv_domain
from tests.support.writers.envelopes import config_json
from tests.support.writers.stream import PAGE, RECORDS

BATCH = 1024  # MAX_BATCH_SIZE of libxenguest


def write_sparse(path: Path, size: int = 100 << 30, *, envelope: str = "xl") -> int:
    """Write a 64-bit PV domain with ``size`` bytes of memory, and return how many pages that are.

    Some 64 pages are those of a real small domain, with page tables, start info and vcpu; all others are ordinary pages
    of zeroes. The p2m's frames are among these: it is there in size, and empty.
    """
    pages = size // PAGE
    domain = pv_domain(pfns=range(64), ballooned=(), linear=False)
    frames = -(-pages // 512)
    if pages < 64 + frames:
        raise ValueError(f"{size:#x} bytes are too few for this domain")
    domain.entries = pages
    domain.p2m_pfns = np.arange(64, 64 + frames, dtype=np.uint64)
    domain.shared_info["arch"]["max_pfn"] = domain.start_info["nr_pages"] = pages
    config = config_json(memory_kib=size >> 10) + b"\0" if envelope == "xl" else None
    stream = domain.to_stream(envelope, batch=BATCH, config=config)
    behind = stream.find("PAGE_DATA", -1) + 1
    with path.open("wb") as file:
        file.writelines(piece.data for piece in stream[:behind])
        for first in range(64, pages, BATCH):
            pfns = np.arange(first, min(first + BATCH, pages), dtype="<u8")
            n = len(pfns)
            file.write(struct.pack("<IIII", RECORDS.index("PAGE_DATA"), 8 + n * (8 + PAGE), n, 0) + pfns.tobytes())
            file.seek(n * PAGE, 1)
        file.writelines(piece.data for piece in stream[behind:])
    return pages


if __name__ == "__main__":
    print(write_sparse(Path(sys.argv[2]), int(sys.argv[1]) << 30), "pages")
