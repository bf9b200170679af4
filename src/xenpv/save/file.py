"""A domain saved to a file, and what becomes of it: gone once the file is whole, or as it was before."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from xenpv.errors import HostError
from xenpv.frames import PAGE_SIZE, DomId
from xenpv.host.protocol import Mover
from xenpv.io.atomic_output import Output
from xenpv.io.progress import ProgressCallback
from xenpv.io.signals import undisturbed
from xenpv.save.save import Summary, look, save
from xenpv.save.source_domain import Leaving
from xenpv.source.config import as_libxl

_RECORDS = 16 << 10  # bytes of a file that are neither of pages nor of vcpus, about
_VCPU = 8 << 10  # bytes of one, about


@dataclass(frozen=True)
class Seen:
    """What would be saved. ``bytes`` is what the file would have, about."""

    name: str
    form: str
    entries: int
    pages: int
    foreign: int
    identity: int
    bytes: int


@dataclass(frozen=True)
class Ended:
    """What was saved, for how long it stood, in seconds, and what the domain does now, in words."""

    summary: Summary
    downtime: float
    now: str


def preflight(host: Mover, domid: DomId, *, stock: bool = True) -> Seen:
    """Whether a domain can be saved: all that is seen of that without stopping it. Raises as save() does if it cannot.

    Of a domain that runs, what is seen may be different a moment later.
    """
    seen = look(host, domid, stock=stock)
    info, p2m = host.info(domid), seen.p2m
    size = seen.total * (8 + PAGE_SIZE) + p2m.places * 8 + (info.max_vcpu + 1) * _VCPU + _RECORDS
    return Seen(
        seen.live.name, seen.live.anchors.form_names, p2m.entries, seen.total, seen.foreign, seen.identity, size
    )


def configuration(host: Mover, domid: DomId) -> bytes:
    """What xl made it by, or, if xl does not know it, what can be told of it: JSON as libxl has it."""
    info = host.info(domid)
    kept = host.configuration(domid)
    if kept is not None:
        return kept
    vcpus = info.max_vcpu + 1
    name, uuid = info.name or f"domain-{domid}", info.uuid or "00000000-0000-0000-0000-000000000000"
    return as_libxl(name, uuid, pages=info.pages, vcpus=vcpus)


def save_file(
    host: Mover,
    domid: DomId,
    path: str,
    *,
    timeout: float = 60.0,
    keep: bool = False,
    paused: bool = False,
    stock: bool = True,
    say: Callable[[str], None],
    progress: ProgressCallback | None = None,
) -> Ended:
    """Suspend it, save it to ``path`` ("-" is standard output), and destroy it; or, with ``keep``, let it run on then,
    ``paused`` or not. ``stock`` as save() has it.

    Whatever save() and suspend() raise, OSError for the file: it runs on, as ``say`` was told, and there is no file.
    """
    leaving = Leaving(host, domid, timeout=timeout)
    leaving.check()
    config = configuration(host, domid)
    out = Output.open(path)
    try:
        suspend = None if leaving.stands else leaving.suspend
        summary = save(host, domid, out, config=config, suspend=suspend, stock=stock, progress=progress)
        with undisturbed():
            out.finish()
    except BaseException:
        with undisturbed():
            out.abandon()
            say(leaving.take_back())
        raise
    with undisturbed():
        if keep:
            if paused:
                host.pause(domid)
            now = leaving.take_back().removeprefix(leaving.label).strip()
        else:
            _destroy(host, leaving, path)
            now = "is gone from here"
    stood = leaving.stood_at
    return Ended(summary, time.monotonic() - stood if stood is not None else 0.0, now)


def _destroy(host: Mover, leaving: Leaving, path: str) -> None:
    try:
        host.destroy(leaving.domid)
    except HostError as e:
        what = f"{path} is whole, and {leaving.label} could not be destroyed: {e}"
        raise HostError(f"{what}; destroy it before you restore it: xl destroy {leaving.domid}", op="save") from e
