"""A domain as a stream: what xl save and xl migrate write, at the cost of what the domain has.

What goes into it is made elsewhere: the p2m and where its leaves are by save_p2m.py, pages by save_pages.py, the rest
by save_vcpus.py. Here is their order, for a domain that stands still, and for one that runs on until nearly all of it
has been sent.

What differs from xen.git:tools/libs/guest/xg_sr_save.c and xg_sr_save_x86_pv.c: pfns without a page are left out rather
than sent as XTAB, 8 bytes each up to max_pfn, which comes to the same at restore; the end of the p2m is cut off where
its leaves are all one, not only where whole tables are; p2m trees of more than three levels are walked; a p2m that a
running guest changes is followed, in whatever form; and what a restorer would stumble over is refused here, before the
first byte wherever it can be seen then.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np

from xenpv.errors import GuestError, HostError, RequestError
from xenpv.frames import U64, DomId
from xenpv.host.protocol import Mover
from xenpv.io.background import BackgroundWorker
from xenpv.io.progress import Phase, ProgressCallback
from xenpv.io.sink import Sink
from xenpv.save.meter import TransferMeter
from xenpv.save.p2m_tracker import Named, SavedP2M
from xenpv.save.pages import BATCH, ENTRIES_MAX, Batch, SavedPages
from xenpv.save.precopy import Precopy
from xenpv.save.state_records import last_records, static_records
from xenpv.save.suspend import has_suspended
from xenpv.stream.envelope import Kind
from xenpv.stream.fields import Buffer
from xenpv.stream.framing import Record
from xenpv.stream.libxl import LibxlEnd
from xenpv.stream.records import End, Verify
from xenpv.stream.writer import Writer

_NODE = 1 << 15  # pfns: a page of Xen's bitmap of dirty ones, which is cleaned whole
_NAP = 0.01  # seconds for which a guest is let be that changes its p2m


@dataclass
class Summary:
    """What was saved. ``entries`` are those of the p2m up to its last page, ``bytes`` of the whole stream.

    ``pages`` have content, ``tables`` of them are page tables. The others are p2m entries without any: ``foreign`` and
    ``identity`` are marked so by the guest, ``lost`` claim a frame that is not the domain's (a verifier will say so),
    ``empty`` have one of which Xen gives no content (broken, or not allocated). A live save counts a page as often as
    it was sent, in ``rounds`` passes; of the seconds that it ``took``, the domain stood still for ``downtime``.
    """

    name: str
    entries: int = 0
    pages: int = 0
    tables: int = 0
    foreign: int = 0
    identity: int = 0
    lost: int = 0
    empty: int = 0
    bytes: int = 0
    rounds: int = 1
    took: float = 0.0
    downtime: float = 0.0


def save(
    host: Mover,
    domid: DomId,
    sink: Sink,
    *,
    config: bytes = b"",
    envelope: Kind = Kind.XL,
    suspend: Callable[[], None] | None = None,
    live: Precopy | None = None,
    progress: ProgressCallback | None = None,
    stock: bool = True,
    verify: bool = False,
) -> Summary:
    """Write a domain to ``sink``: one that has suspended, and whatever it is does not run; or, with ``suspend``, one
    that is made to.

    ``suspend`` is called when the domain has to stop: before the first byte, or, with ``live``, when all but the last
    of it is written; what it raises ends the save. It returns once the domain has shut down to be saved. Nothing here
    lets it run again: the caller does, who knows what became of the copy. ``envelope``: xl's file with ``config`` in
    it, JSON as libxl_domain_config_to_json() makes it (a file without it restores with xl restore CONFIG FILE), or a
    bare libxl or libxc stream. ``stock``: that any restorer is to understand it; without, the stream has a record of
    xenpv's own where that is shorter, and where nothing else will do: for pfns from 2^32 on (records.md).
    ``verify``: when all is sent and the domain stands still, all pages are sent once more behind a VERIFY record, for
    whoever restores to say which of them are not as they came before.

    Raises, before the sink has anything, RequestError for what cannot be asked for, GuestError for what the guest has
    that cannot be saved, HostError when Xen says no; and, when it has had something, GuestError for a page table that
    cannot be translated or, live, for what only the suspended guest shows, HostError, and whatever the sink raises. Log
    dirty mode is off then, as always when this returns.
    """
    if live is not None and suspend is None:
        raise RequestError("a live save has to be told how the domain is suspended")
    if suspend is None and not (info := host.info(domid)).is_stopped:
        raise RequestError(f"{info.label} is running: suspend it first")
    version = host.version()
    writer = Writer(envelope, xen=(version.major, version.minor), config=config)
    meter = TransferMeter(progress, live.bandwidth if live is not None else None)
    p2m = look(host, domid, follows=live is not None, stock=stock)
    return _Save(p2m, sink, writer, meter, suspend, verify=verify).run(live)


def look(host: Mover, domid: DomId, *, follows: bool = False, stock: bool = True) -> SavedP2M:
    """What would be saved of a domain, which may run: its p2m, looked at and counted. Raises as save() does if it
    cannot be saved, as far as that is seen without stopping it.
    """
    info = host.info(domid)
    for cannot, why in ((info.hvm, "is an HVM domain; PV domains are saved"), (info.dying, "is dying")):
        if cannot:
            raise RequestError(f"{info.label} {why}")
    p2m = SavedP2M(host, domid, follows=follows, stock=stock)
    p2m.look()
    p2m.count()
    return p2m


class _Save:
    """One save of a domain, whose p2m was looked at."""

    def __init__(
        self,
        p2m: SavedP2M,
        sink: Sink,
        writer: Writer,
        meter: TransferMeter,
        suspend: Callable[[], None] | None,
        *,
        verify: bool,
    ) -> None:
        self.host = p2m.host
        self.domid = p2m.domid
        self.sink = sink
        self.writer = writer
        self.p2m = p2m
        self.pages = SavedPages(p2m, running=p2m.follows)
        self.meter = meter
        self._suspend = suspend
        self._verify = verify
        self._began = self._stopped = time.monotonic()

    def run(self, live: Precopy | None) -> Summary:
        if live is None:
            self._standing()
        else:
            self._running(live)
        self._send(End())
        if not self.writer.done:
            self._send(LibxlEnd())
        self.meter.enter(Phase.DONE)
        return self._summary()

    def _standing(self) -> None:
        """All of it, once."""
        if self._suspend is not None:
            self._stop()
            self.p2m.look()
            self.p2m.count()
        last = last_records(self.host, self.p2m.live)
        self._begin()
        self.meter.begin_iteration(Phase.COPYING, self.p2m.total)
        self._send_pages(self.pages.batches(self.p2m.named()))
        self._end(last)

    # --- a domain that runs ------------------------------------------------------------------------------------------

    def _running(self, policy: Precopy) -> None:
        """All of it, then what was written meanwhile, as long as that is worth it; then stop it, and send the rest."""
        with _log_dirty(self.host, self.domid):
            self._begin()
            self.meter.begin_iteration(Phase.COPYING, self.p2m.total)
            self._send_pages(self.pages.batches(self.p2m.changes()))
            dirty = self._passes(policy)
            self.meter.enter(Phase.SUSPENDING)
            self._stop()
            self.pages.running = False
            self.meter.lift_bandwidth_limit()
            self.p2m.look()
            last = last_records(self.host, self.p2m.live)
            dirty = np.union1d(dirty, np.union1d(self._dirtied(), self.pages.take_deferred()))
            self._send_frames()
            wanted = self._with_changes(dirty)
            self.meter.begin_iteration(Phase.FINISHING, len(wanted), dirty=len(wanted))
            self._send_pages(self.pages.batches(self.p2m.lookup(wanted)))
            gone = self.p2m.gone
            back = [pfns for pfns, _ in self.p2m.lookup(gone)]
            self._send_pages(self.pages.without_frames(np.setdiff1d(gone, np.concatenate([gone[:0], *back]))))
            self._end(last)

    def _passes(self, policy: Precopy) -> U64:
        """Passes over what the guest has written since it was sent. What is left of it when they end."""
        left = np.empty(0, np.uint64)
        for done in range(1, policy.max_iterations + 1):
            left = np.union1d(left, self._dirtied())
            if not policy.goes_on(done, self.pages.pages, len(left), self.meter.unlimited_rate):
                break
            if not self._follow():
                continue
            wanted = self._with_changes(left)
            self.meter.begin_iteration(Phase.COPYING, len(wanted), dirty=len(left))
            self._send_pages(self.pages.batches(self.p2m.lookup(wanted)))
            # What was looked up in a p2m that had gone by then may be anything: once more.
            left = wanted if self.p2m.changed() else wanted[:0]
        return left

    def _follow(self) -> bool:
        """See to it that the p2m is the guest's. False if that is being changed still, and can be used by nobody."""
        try:
            if self.p2m.changed():
                self.p2m.look()
            self._send_frames()
        except GuestError:
            time.sleep(_NAP)
            return False
        return True

    def _with_changes(self, dirty: U64) -> U64:
        """These pfns, those whose frame is another than when they were sent, and what names a frame by another pfn."""
        changed: Iterable[Named] = self.p2m.changes(dirty)
        wanted = np.union1d(dirty, np.concatenate([dirty[:0], *(pfns for pfns, _ in changed)]))
        if self.p2m.frames_moved:
            self.p2m.frames_moved = False
            wanted = np.union1d(wanted, self.pages.all_tables())
        return wanted

    def _dirtied(self) -> U64:
        pages = -(-self.p2m.live.anchors.max_pfn // _NODE) * _NODE
        return self.host.dirty_pfns(self.domid, pages, clean=True)

    # --- stopping ----------------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        assert self._suspend is not None
        self._suspend()
        self._stopped = time.monotonic()
        info = self.host.info(self.domid)
        if not has_suspended(info):
            how = f"shut down for reason {info.shutdown_reason}" if info.shutdown else "runs"
            raise GuestError(f"{self.p2m.live.name} has not suspended: it {how}")

    def _end(self, last: Sequence[Record]) -> None:
        """All pages are sent, and the domain stands still: what follows them."""
        if self._verify:
            self._send(Verify())
            self.meter.begin_iteration(Phase.VERIFYING, self.p2m.total)
            self._send_pages(self.pages.batches(self.p2m.named()))
        self._check_stands()
        for record in last:
            self._send(record)

    def _check_stands(self) -> None:
        """HostError if somebody let the domain run meanwhile: what was saved would be of no one moment."""
        if not self.host.info(self.domid).is_stopped:
            raise HostError(f"{self.p2m.live.name} was let run while it was saved", op="save", domid=self.domid)

    # --- writing -----------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        records = static_records(self.host, self.p2m.live)
        self._write(self.writer.start())
        for record in records:
            self._send(record)
        self._send_frames()

    def _send_frames(self) -> None:
        record = self.p2m.record()
        if record is not None:
            self._send(record)

    def _send(self, record: Record) -> None:
        self._write(self.writer.send(record))

    def _send_pages(self, batches: Iterator[Batch]) -> None:
        with BackgroundWorker() as worker:
            for batch in batches:
                if not batch.entries:
                    continue
                buffers = self.writer.pages(batch.entries, batch.contents)
                if self.sink.is_regular_file:
                    worker.submit(partial(self.sink.write, buffers))
                else:  # where a write may hang, only the main thread is interrupted
                    self.sink.write(buffers)
                self._wrote(batch.pages)

    def _write(self, buffers: Sequence[Buffer]) -> None:
        self.sink.write(buffers)
        self._wrote()

    def _wrote(self, pages: int = 0) -> None:
        self.meter.count(self.writer.offset - self.meter.bytes, pages)

    def _summary(self) -> Summary:
        now, p2m, pages = time.monotonic(), self.p2m, self.pages
        return Summary(
            name=p2m.live.name,
            entries=p2m.told,
            pages=pages.pages,
            tables=pages.tables,
            foreign=p2m.foreign,
            identity=p2m.identity,
            lost=pages.lost,
            empty=pages.empty,
            bytes=self.writer.offset,
            rounds=self.meter.iteration + 1,
            took=now - self._began,
            downtime=now - self._stopped,
        )


@contextmanager
def _log_dirty(host: Mover, domid: DomId) -> Iterator[None]:
    """Keep which pages are written while the body runs. Off afterwards, however it ends."""
    on = True
    try:
        try:
            _begin_log(host, domid)
        except HostError:
            on = False
            raise
        yield
    except BaseException:
        if on:
            with contextlib.suppress(HostError):  # the domain may have gone
                host.log_dirty(domid, on=False)
        raise
    host.log_dirty(domid, on=False)


def _begin_log(host: Mover, domid: DomId) -> None:
    try:
        host.log_dirty(domid, on=True)
    except HostError as e:
        if e.errno != errno.EINVAL:
            raise
        host.log_dirty(domid, on=False)  # who was killed has left it on
        host.log_dirty(domid, on=True)


__all__ = ["BATCH", "ENTRIES_MAX", "Summary", "look", "save"]
