"""Faults on real Xen, in dom0, many in one process: what is refused, cut off or damaged leaves what was there.

    python3 -m tests.support.lab.faults build KERNEL           each call of a build refused, at its first and last time
    python3 -m tests.support.lab.faults restore FILE           the same of a restore
    python3 -m tests.support.lab.faults streams FILE SEED COUNT       restores of a file cut off and with bits flipped

COUNT is how many points there are of each kind; of where records begin all, if there are no more. Prints JSON: what
came of it, counted, and what was left, which should be nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.lab.leftovers import Left, Tally
from tests.support.refused_calls import BUILDING, RESTORING, refuse_each_call
from xenpv.build.build import build
from xenpv.errors import XenPVError
from xenpv.frames import HAS_DATA, IS_TABLE, PAGE_SIZE, DomId
from xenpv.host.xen.host import XenHost
from xenpv.image.kernel import KernelImage
from xenpv.image.layout import plan
from xenpv.image.request import Request
from xenpv.io.stream_input import Input
from xenpv.restore.restore import restore_domain
from xenpv.stream.page_data import PageData
from xenpv.stream.reader import Reader

# --- calls that are refused ------------------------------------------------------------------------------------------


def builds(host: XenHost, kernel: str) -> dict[str, Any]:
    image = KernelImage.parse(Path(kernel).read_bytes())
    layout = plan(image, Request(32 << 20))
    host.destroy(build(host, image, layout, name="first").domid)  # what the first domain leaves is libxl's own roots
    left = Left(host)
    messages = refuse_each_call(host, BUILDING, lambda: build(host, image, layout, name="broken", config=b"{}").domid)
    return {"messages": messages, "left": left.over()}


def restores(host: XenHost, path: str) -> dict[str, Any]:
    data = Path(path).read_bytes()
    host.destroy(restore_bytes(host, data))
    left = Left(host)
    messages = refuse_each_call(host, RESTORING, lambda: restore_bytes(host, data, paused=False))
    return {"messages": messages, "left": left.over()}


# --- streams that end, and lie ---------------------------------------------------------------------------------------


def restore_bytes(host: XenHost, data: bytes, *, pipe: bool = False, paused: bool = True) -> DomId:
    """A domain out of a file or a pipe of these bytes."""
    with _piped(data) if pipe else _filed(data) as fd:
        source = Input(os.dup(fd), "the stream")
        try:
            return restore_domain(host, source, name="broken", paused=paused).domid
        finally:
            source.close()


@contextlib.contextmanager
def _filed(data: bytes) -> Iterator[int]:
    with open(os.memfd_create("stream"), "w+b") as file:
        file.write(data)
        file.seek(0)
        yield file.fileno()


@contextlib.contextmanager
def _piped(data: bytes) -> Iterator[int]:
    out, into = os.pipe()

    def write() -> None:
        with open(into, "wb", buffering=0) as pipe, contextlib.suppress(BrokenPipeError):
            rest = memoryview(data)
            while rest:
                rest = rest[pipe.write(rest) :]

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield out
    finally:
        os.close(out)
        writer.join()


@dataclass(frozen=True)
class Parts:
    """Where in a stream everything begins, headers and records of all layers; where a record's bytes are that are no
    page content; and where its page tables are.
    """

    begins: list[int]
    records: list[range]
    tables: list[range]

    @classmethod
    def of(cls, path: str) -> Parts:
        source, begins, tables, ends = Input.open(path), list[int](), list[range](), dict[int, int]()
        with contextlib.closing(source):
            for event in source.events(Reader()):
                begins.append(event.offset)
                if isinstance(event, PageData):
                    ends[event.offset] = event.pages_offset
                    for row in np.flatnonzero(IS_TABLE[event.types[HAS_DATA[event.types]]]).tolist():
                        at = event.pages_offset + row * PAGE_SIZE
                        tables.append(range(at, at + PAGE_SIZE))
        begins = sorted(set(begins))
        records = [range(at, ends.get(at, end)) for at, end in pairwise([*begins, source.size])]
        return cls(begins, records, tables)

    def some_begins(self, count: int, chance: random.Random) -> list[int]:
        return sorted(chance.sample(self.begins, min(count, len(self.begins))))


def streams(host: XenHost, path: str, seed: int, count: int) -> dict[str, Any]:
    """Cut off at each record's begin and anywhere, in files and in pipes; bits flipped in each part."""
    data, parts, chance, tally = Path(path).read_bytes(), Parts.of(path), random.Random(seed), Tally()
    host.destroy(restore_bytes(host, data))
    left = Left(host)

    def some(ranges: Sequence[range]) -> list[int]:
        return [chance.choice(chance.choice(ranges)) for _ in range(count)]

    faults = {
        "cut where a record begins": parts.some_begins(count, chance),
        "cut anywhere": some([range(len(data))]),
        "bit flipped anywhere": some([range(len(data))]),
        "bit flipped in a record": some(parts.records),
        "bit flipped in a page table": some(parts.tables),
    }
    for kind, places in faults.items():
        for n, place in enumerate(places):
            broken, pipe = bytearray(data[:place] if kind.startswith("cut") else data), n % 2 == 1
            if kind.startswith("bit"):
                broken[place] ^= 1 << chance.randrange(8)
            try:
                domid = restore_bytes(host, bytes(broken), pipe=pipe)
            except XenPVError as e:
                outcome, words = type(e).__name__, str(e)
            else:
                outcome, words = "restored", ""
                host.destroy(domid)
            tally.add(kind, outcome, words, f"{place:#x} of a {'pipe' if pipe else 'file'}", left.over())
    return tally.to_json() | {"begins": len(parts.begins), "bytes": len(data)}


def main(what: str, *arguments: str) -> None:
    ways: dict[str, Callable[..., dict[str, Any]]] = {"build": builds, "restore": restores, "streams": streams}
    with XenHost() as host:
        print(json.dumps(ways[what](host, arguments[0], *map(int, arguments[1:]))))


if __name__ == "__main__":
    main(*sys.argv[1:])
