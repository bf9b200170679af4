"""Guests that live on while they are copied, and what a stream of such a copy comes to: each page as it came last."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.support.kernel_guest import Guest
from tests.support.saving import MemorySink, PatchedHost, of_host
from xenpv.abi.x86 import PAGE_SIZE
from xenpv.frames import DomId
from xenpv.save.precopy import PrecopyPolicy
from xenpv.save.save import Summary, save
from xenpv.save.suspend import suspend
from xenpv.stream.envelope import Kind

Step = Callable[[], object]
WITH_CONTENT = {0, 1, 2, 3, 4, 9, 10, 11, 12}
XTAB = 15


@dataclass
class Copied:
    """What a restorer has in the end, by a reader that knows nothing of ours."""

    names: list[int] = field(default_factory=list)  # types of record
    pages: dict[int, tuple[int, bytes]] = field(default_factory=dict)  # pfn: the type and content that came last
    frames: dict[int, int] = field(default_factory=dict)  # place: the leaf of the p2m
    end_pfn: int = -1

    @classmethod
    def of(cls, data: bytes, width: int) -> Copied:
        made, at = cls(), 40
        while at < len(data):
            kind, length = struct.unpack_from("<II", data, at)
            made.names.append(kind)
            body, at = data[at + 8 : at + 8 + length], at + 8 + length + -length % 8
            if kind == 1:
                made._take_pages(body)
            elif kind == 3:
                start, end = struct.unpack_from("<II", body)
                made.end_pfn = max(made.end_pfn, end)
                leaves = struct.unpack_from(f"<{len(body) // 8 - 1}Q", body, 8)
                made.frames |= dict(enumerate(leaves, start * width // PAGE_SIZE))
        return made

    def _take_pages(self, body: bytes) -> None:
        count = struct.unpack_from("<I", body)[0]
        at = 8 + 8 * count
        for entry in struct.unpack_from(f"<{count}Q", body, 8):
            kind, pfn = entry >> 60, entry & (1 << 52) - 1
            assert pfn <= self.end_pfn, "outside domain maximum"
            content = body[at : at + PAGE_SIZE] if kind in WITH_CONTENT else b""
            at += len(content)
            self.pages[pfn] = kind, content
        assert at == len(body)


def attend(guest: Guest, steps: Iterable[Step | None] = ()) -> None:
    """Let the guest live: one step for every moment that passes, and it suspends when it is asked to."""
    todo = iter(steps)

    def passes() -> None:
        step = next(todo, None)
        if step is not None:
            step()
        if guest.host.info(guest.domid).shutdown_reason is None:
            guest.do("poll")

    guest.host.set_time_slice(guest.domid, passes)


def copied(guest: Guest, host: Any = None, **how: Any) -> tuple[Copied, Summary]:
    """A live copy of a guest, held against what the host has of it once it has suspended."""
    host, heap = host or guest.host, MemorySink()
    how.setdefault("live", PrecopyPolicy())
    summary = save(host, guest.domid, heap, envelope=Kind.LIBXC, suspend=lambda: suspend(host, guest.domid), **how)
    is_off(guest)
    made = Copied.of(bytes(heap.data), guest.layout.width)
    pfns, kinds, pages = of_host(guest)
    came = {pfn for pfn, (kind, _) in made.pages.items() if kind != XTAB}
    assert came == set(pfns.tolist()), "what has a frame, and nothing else"
    for pfn, kind, page in zip(pfns.tolist(), kinds.tolist(), pages, strict=True):
        assert made.pages[pfn] == (kind, page.tobytes()), f"pfn {pfn:#x}"
    p2m = guest.live.p2m
    leaves = guest.host.m2p(p2m.leaves.frame_of(np.arange(-(-p2m.used_entries // p2m.entries_per_leaf))))
    assert [made.frames[place] for place in range(len(leaves))] == leaves.tolist()
    assert summary.bytes == len(heap.data)
    return made, summary


def is_off(guest: Guest) -> None:
    """Log-dirty mode is off: it can be put on."""
    guest.host.log_dirty(guest.domid, on=True)
    guest.host.log_dirty(guest.domid, on=False)


def meddling(guest: Guest, steps: Iterable[Step | None]) -> PatchedHost:
    """A host on which the guest lives on between any two calls that read its memory."""
    todo = iter(steps)

    def call(name: str) -> Callable[..., Any]:
        def answer(domid: DomId, *arguments: Any) -> Any:
            if guest.host.info(domid).shutdown_reason is None:
                step = next(todo, None)
                if step is not None:
                    step()
            return getattr(guest.host, name)(domid, *arguments)

        return answer

    return PatchedHost(guest, **{name: call(name) for name in ("map_frames", "page_types", "shared_info")})


def times(n: int, step: Step) -> Iterator[Step]:
    for _ in range(n):
        yield step
