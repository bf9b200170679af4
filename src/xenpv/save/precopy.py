"""Live saves: pre-copy sends memory in iterations while the guest runs.

Stop-and-copy sends the rest.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from xenpv.errors import GuestError, HostError, RequestError
from xenpv.frames import PAGE_SIZE, U64, DomId
from xenpv.host.protocol import Mover
from xenpv.io.progress import Phase
from xenpv.save.p2m_tracker import P2MTracker
from xenpv.save.pages import PageSender, SentPages, send_unmapped
from xenpv.save.state_records import state_records
from xenpv.save.stream_output import StreamOutput
from xenpv.stream.framing import Record

_BITMAP_PAGE = 1 << 15  # pfns in a page of Xen's dirty bitmap, which is cleaned as a whole
_NAP = 0.01  # seconds to wait for a guest that is changing its p2m


@dataclass(frozen=True, slots=True)
class PrecopyPolicy:
    """When to stop the guest. The defaults are libxenguest's.

    Attributes:
        max_iterations: Stop after so many iterations, however much is dirty.
        target_dirty: Stop when fewer pages than this are dirty.
        max_downtime: Stop when the dirty pages can be sent in so many seconds; None for no such limit.
        bandwidth: Bytes per second while the guest runs; the stop-and-copy is not limited. None for no limit.

    Raises:
        RequestError: A value is out of range.

    Source:
        xen.git:tools/libs/guest/xg_sr_save.c simple_precopy_policy()
    """

    max_iterations: int = 5
    target_dirty: int = 50
    max_downtime: float | None = None
    bandwidth: int | None = None

    def __post_init__(self) -> None:
        if self.max_iterations < 1:
            raise RequestError(f"a live save takes at least 1 iteration, not {self.max_iterations}")
        if self.target_dirty < 0:
            raise RequestError(f"the number of dirty pages to stop at cannot be {self.target_dirty}")
        if self.max_downtime is not None and not self.max_downtime > 0:
            raise RequestError(f"a downtime of {self.max_downtime:g} s is not possible; allow more than 0")
        if self.bandwidth is not None and self.bandwidth < PAGE_SIZE:
            raise RequestError(f"a bandwidth of {self.bandwidth} bytes per second is less than a page",
                               needed=PAGE_SIZE)  # fmt: skip

    def continues(self, iteration: int, sent: int, dirty: int, rate: float) -> bool:
        """Return whether another iteration pays.

        Otherwise stop the guest and send the rest.

        Args:
            iteration: Iterations so far.
            sent: Pages sent so far.
            dirty: Pages that the guest has written since they were sent.
            rate: Bytes per second; 0 if unknown.
        """
        if iteration >= self.max_iterations or dirty < self.target_dirty:
            return False
        if iteration * dirty >= sent:  # the guest writes as fast as an iteration sends
            return False
        return self.max_downtime is None or not rate or dirty * PAGE_SIZE > self.max_downtime * rate


class LiveCopy:
    """Copies the memory of a running domain: ``precopy``, then ``stop_and_copy``.

    The domain suspends between the two.

    Log-dirty mode must be on throughout.
    """

    def __init__(self, p2m: P2MTracker, output: StreamOutput, sent: SentPages, policy: PrecopyPolicy) -> None:
        self._host = p2m.host
        self._domid = p2m.domid
        self._p2m = p2m
        self._output = output
        self._meter = output.meter
        self._sent = sent
        self._policy = policy
        self._dirty = np.empty(0, np.uint64)  # pfns to send again

    def precopy(self) -> None:
        """Send all memory, then what the guest wrote meanwhile, again and again.

        It ends when the policy does not continue.
        """
        self._send_all()
        for iteration in range(1, self._policy.max_iterations + 1):
            self._dirty = np.union1d(self._dirty, self._read_dirty_bitmap())
            if not self._policy.continues(iteration, self._sent.pages, len(self._dirty), self._meter.unlimited_rate):
                break
            if self._follow_p2m():
                self._send_dirty()

    def stop_and_copy(self) -> list[Record]:
        """Send what is left, of a domain that has suspended.

        Return its state records, which were read before that.
        """
        self._meter.lift_bandwidth_limit()
        self._p2m.inspect()
        state = state_records(self._host, self._p2m.live)
        written = np.union1d(self._dirty, self._read_dirty_bitmap())
        self._send_p2m_record()
        pfns = self._pfns_to_resend(np.union1d(written, self._sent.take_deferred()))
        self._meter.begin_iteration(Phase.FINISHING, len(pfns), dirty=len(pfns))
        self._send(pfns, guest_runs=False)
        unmapped = self._p2m.unmapped_pfns
        populated_again = [batch for batch, _ in self._p2m.lookup(unmapped)]
        send_unmapped(np.setdiff1d(unmapped, np.concatenate([unmapped[:0], *populated_again])), self._output)
        return state

    def _send_all(self) -> None:
        self._meter.begin_iteration(Phase.COPYING, self._p2m.counts.populated)
        sender = PageSender(self._p2m, self._output, self._sent, guest_runs=True)
        for leaves in self._p2m.iter_leaves():
            sender.add(*self._p2m.record_leaves(leaves))
        sender.flush()

    def _send_dirty(self) -> None:
        """Send the dirty pages and what else has changed.

        All of it stays dirty if the p2m turned out stale.
        """
        pfns = self._pfns_to_resend(self._dirty)
        self._meter.begin_iteration(Phase.COPYING, len(pfns), dirty=len(self._dirty))
        self._send(pfns, guest_runs=True)
        # What was looked up in a p2m that was gone by then may be anything: send it once more.
        self._dirty = pfns if self._p2m.is_stale() else pfns[:0]

    def _send(self, pfns: U64, *, guest_runs: bool) -> None:
        sender = PageSender(self._p2m, self._output, self._sent, guest_runs=guest_runs)
        for batch, mfns in self._p2m.lookup(pfns):
            sender.add(batch, mfns)
        sender.flush()

    def _follow_p2m(self) -> bool:
        """Inspect and send the p2m if the guest replaced parts of it.

        False while it is still being changed.
        """
        try:
            if self._p2m.is_stale():
                self._p2m.inspect()
        except GuestError:  # the next iteration tries again, and stop_and_copy raises
            time.sleep(_NAP)
            return False
        self._send_p2m_record()
        return True

    def _send_p2m_record(self) -> None:
        record = self._p2m.next_record()
        if record is not None:
            self._output.send(record)

    def _pfns_to_resend(self, dirty: U64) -> U64:
        """Return pfns to resend: dirty, remapped, and affected page tables."""
        changes = self._p2m.changes(dirty)
        pfns = np.union1d(dirty, changes.remapped)
        return np.union1d(pfns, self._sent.all_page_tables()) if changes.page_tables_stale else pfns

    def _read_dirty_bitmap(self) -> U64:
        """Return the pfns written since the last call, and clean Xen's bitmap."""
        pages = -(-self._p2m.live.anchors.max_pfn // _BITMAP_PAGE) * _BITMAP_PAGE
        return self._host.dirty_pfns(self._domid, pages, clean=True)


@contextmanager
def log_dirty(host: Mover, domid: DomId) -> Iterator[None]:
    """Have Xen log which pages are written while the body runs.

    Off afterwards, however the body ends.
    """
    enabled = False
    try:
        _enable_log_dirty(host, domid)
        enabled = True
        yield
    except BaseException as failure:
        try:
            host.log_dirty(domid, on=False)
        except HostError as e:  # the first error counts
            if enabled and e.errno != errno.ESRCH:  # otherwise it was not on, or the domain is gone
                failure.add_note(f"log-dirty mode stays on: {e}")
        raise
    host.log_dirty(domid, on=False)


def _enable_log_dirty(host: Mover, domid: DomId) -> None:
    try:
        host.log_dirty(domid, on=True)
    except HostError as e:
        if e.errno != errno.EINVAL:
            raise
        try:
            host.log_dirty(domid, on=False)  # a save that was killed has left it on
        except HostError as off_error:
            e.add_note(f"log-dirty mode stays as it is: {off_error}")
            raise e from None
        host.log_dirty(domid, on=True)
