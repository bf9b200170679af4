"""Saves a domain as the stream that xl save and xl migrate write.

The cost follows its populated pages.

What differs from xen.git:tools/libs/guest/xg_sr_save.c and xg_sr_save_x86_pv.c:

- Pfns without a page are left out; libxenguest sends them as XTAB, 8 bytes each up to max_pfn.
- The end of the p2m is cut off where all leaves are one; libxenguest does so for whole tables only.
- P2m trees of more than three levels are walked.
- The p2m of a running guest may change, in any form; its changes are sent.
- What a restorer would refuse is refused here, before the first byte wherever it shows then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from xenpv.errors import GuestError, HostError, RequestError
from xenpv.frames import DomId
from xenpv.host.protocol import Mover
from xenpv.io.progress import Phase, ProgressCallback
from xenpv.io.sink import Sink
from xenpv.save.meter import TransferMeter
from xenpv.save.p2m_tracker import P2MTracker
from xenpv.save.pages import PageSender, SentPages
from xenpv.save.precopy import LiveCopy, PrecopyPolicy, log_dirty
from xenpv.save.state_records import state_records, static_records
from xenpv.save.stream_output import StreamOutput
from xenpv.save.suspend import has_suspended
from xenpv.stream.envelope import Kind
from xenpv.stream.framing import Record
from xenpv.stream.records import Verify
from xenpv.stream.seal import Sealer
from xenpv.stream.writer import Writer


@dataclass
class Summary:
    """What was saved. A live save counts a page as often as it was sent.

    Attributes:
        name: The domain, for people: "dom5 (web)".
        entries: P2m entries up to the last page.
        pages: Pages with content.
        page_tables: Those among them that are page tables.
        foreign: P2m entries that the guest marked as frames of other domains.
        identity: P2m entries that the guest marked as identity-mapped.
        not_owned: P2m entries that claim a frame which is not the domain's; verify reports them.
        without_content: Pages of which Xen gives no content (broken, or not allocated).
        bytes: Bytes of the whole stream.
        iterations: Iterations over memory; 1 without pre-copy.
        seconds: How long the save took.
        downtime: Seconds of it in which the domain was suspended.
    """

    name: str
    entries: int = 0
    pages: int = 0
    page_tables: int = 0
    foreign: int = 0
    identity: int = 0
    not_owned: int = 0
    without_content: int = 0
    bytes: int = 0
    iterations: int = 1
    seconds: float = 0.0
    downtime: float = 0.0


def save(
    host: Mover,
    domid: DomId,
    sink: Sink,
    *,
    config: bytes = b"",
    envelope: Kind = Kind.XL,
    suspend: Callable[[], None] | None = None,
    live: PrecopyPolicy | None = None,
    progress: ProgressCallback | None = None,
    libxc_compatible: bool = True,
    verify: bool = False,
    seal: Sealer | None = None,
) -> Summary:
    """Write a domain to a sink.

    It is suspended or paused, or ``suspend`` suspends it.

    The domain does not run again afterwards: the caller, who knows what became of the copy, resumes or destroys it.
    Log-dirty mode is off afterwards, whatever happens.

    Args:
        host: The host that has the domain.
        domid: The domain.
        sink: Where the stream goes.
        config: The configuration in xl's envelope, as libxl_domain_config_to_json() writes it. A file without it
            restores with xl restore CONFIG FILE.
        envelope: xl's file, or a bare libxl or libxc stream.
        suspend: Suspends the domain, and returns once it has suspended. Called before the first byte or, with
            ``live``, when all but the last of it is written. What it raises ends the save.
        live: Send memory while the domain runs, by this policy.
        progress: Receives the progress.
        libxc_compatible: Write only what every restorer understands. Otherwise the stream may have a record of
            xenpv's own, where that is shorter and for pfns from 2^32 on.
        verify: Finally send all pages once more, for the receiver to compare.
        seal: Seals the stream. Not with ``live``: a page could change between its digest and its copy.

    Raises:
        RequestError: The request is invalid; nothing was written.
        GuestError: The guest's memory cannot be saved. Nothing was written, unless a page table turned out invalid
            or only the suspended guest of a live save showed it.
        HostError: Xen refused something.
        OSError: The sink could not be written.
    """
    if live is not None and suspend is None:
        raise RequestError("a live save needs to know how to suspend the domain")
    if live is not None and seal is not None:
        raise RequestError("a live save cannot be sealed: the guest changes pages while they are sent")
    if suspend is None and not (info := host.info(domid)).is_stopped:
        raise RequestError(f"{info.label} is running: suspend it first")
    version = host.version()
    writer = Writer(envelope, xen=(version.major, version.minor), config=config, seal=seal)
    meter = TransferMeter(progress, live.bandwidth if live is not None else None)
    p2m = inspect_p2m(host, domid, track_changes=live is not None, libxc_compatible=libxc_compatible)
    with StreamOutput(sink, writer, meter) as output:
        return _Save(p2m, output, suspend, verify=verify).run(live)


def inspect_p2m(host: Mover, domid: DomId, *, track_changes: bool = False, libxc_compatible: bool = True) -> P2MTracker:
    """Return the inspected p2m of a domain, which may be running.

    Raises as save() if it shows that it cannot be saved.

    ``track_changes`` and ``libxc_compatible`` are P2MTracker's.
    """
    info = host.info(domid)
    for refused, why in ((info.hvm, "is an HVM domain; PV domains are saved"), (info.dying, "is dying")):
        if refused:
            raise RequestError(f"{info.label} {why}")
    return P2MTracker(host, domid, track_changes=track_changes, libxc_compatible=libxc_compatible)


class _Save:
    """One save of a domain whose p2m was inspected."""

    def __init__(
        self, p2m: P2MTracker, output: StreamOutput, suspend: Callable[[], None] | None, *, verify: bool
    ) -> None:
        self._host = p2m.host
        self._domid = p2m.domid
        self._p2m = p2m
        self._output = output
        self._meter = output.meter
        self._sent = SentPages()
        self._suspend = suspend
        self._verify = verify
        self._start = self._suspended_at = time.monotonic()

    def run(self, live: PrecopyPolicy | None) -> Summary:
        if live is None:
            self._send_memory_nonlive()
        else:
            self._send_memory_live(live)
        self._output.finish()
        self._meter.enter(Phase.DONE)
        return self._summary()

    def _send_memory_nonlive(self) -> None:
        """Send everything once, of a domain that is stopped."""
        if self._suspend is not None:
            self._suspend_domain(self._suspend)
            self._p2m = P2MTracker(self._host, self._domid, libxc_compatible=self._p2m.libxc_compatible)
        state = state_records(self._host, self._p2m.live)
        self._send_headers()
        self._send_all_pages(Phase.COPYING)
        self._send_state(state)

    def _send_memory_live(self, policy: PrecopyPolicy) -> None:
        """Send memory while the domain runs, then suspend it and send the rest."""
        assert self._suspend is not None
        with log_dirty(self._host, self._domid):
            self._send_headers()
            copy = LiveCopy(self._p2m, self._output, self._sent, policy)
            copy.precopy()
            self._meter.enter(Phase.SUSPENDING)
            self._suspend_domain(self._suspend)
            state = copy.stop_and_copy()
            self._send_state(state)

    def _suspend_domain(self, suspend: Callable[[], None]) -> None:
        suspend()
        self._suspended_at = time.monotonic()
        info = self._host.info(self._domid)
        if not has_suspended(info):
            how = f"shut down for reason {info.shutdown_reason}" if info.shutdown else "runs"
            raise GuestError(f"{self._p2m.live.name} has not suspended: it {how}")

    def _send_headers(self) -> None:
        """Send what comes before all pages."""
        records = static_records(self._host, self._p2m.live)  # may raise: before the first byte
        self._output.start()
        for record in records:
            self._output.send(record)
        if (record_of_leaves := self._p2m.next_record()) is not None:
            self._output.send(record_of_leaves)

    def _send_all_pages(self, phase: Phase) -> None:
        self._meter.begin_iteration(phase, self._p2m.counts.populated)
        sender = PageSender(self._p2m, self._output, self._sent, guest_runs=False)
        for pfns, mfns in self._p2m.iter_populated():
            sender.add(pfns, mfns)
        sender.flush()

    def _send_state(self, state: list[Record]) -> None:
        """Send what follows the pages.

        HostError if somebody resumed the domain: its pages are of several moments.
        """
        if self._verify:
            self._output.send(Verify())
            self._send_all_pages(Phase.VERIFYING)
        if not self._host.info(self._domid).is_stopped:
            name = self._p2m.live.name
            raise HostError(f"{name} was resumed during the save", op="save", domid=self._domid)
        for record in state:
            self._output.send(record)

    def _summary(self) -> Summary:
        now, p2m, sent = time.monotonic(), self._p2m, self._sent
        return Summary(
            name=p2m.live.name,
            entries=p2m.sent_entries,
            pages=sent.pages,
            page_tables=sent.page_tables,
            foreign=p2m.counts.foreign,
            identity=p2m.counts.identity,
            not_owned=sent.not_owned,
            without_content=sent.without_content,
            bytes=self._meter.bytes,
            iterations=self._meter.iteration + 1,
            seconds=now - self._start,
            downtime=now - self._suspended_at,
        )
