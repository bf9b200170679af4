"""Any saved domain, of any version of the stream and in any envelope, as one of version 3 in another.

Reader in, writer out; convert_file.py has the files, and the check of what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from xenpv.convert.remus import DeltaStore
from xenpv.convert.repack import BATCH_MAX, Batch, PageRepacker
from xenpv.errors import RequestError, Truncated, Unsupported
from xenpv.findings import Finding
from xenpv.frames import PAGE_SIZE
from xenpv.io.checkpoint_buffer import Checkpoints
from xenpv.io.progress import ProgressCallback
from xenpv.io.stream_input import Input
from xenpv.stream import envelope, framing, libxl, records
from xenpv.stream.envelope import Envelope, Kind, Section
from xenpv.stream.events import DomainHeader, Event, ImageHeader, LibxlHeader, PageDeltas, SectionHeader
from xenpv.stream.fields import Buffer
from xenpv.stream.order import Guest
from xenpv.stream.pagedata import PageData, ReadInto
from xenpv.stream.reader import Reader
from xenpv.stream.writer import Writer

Buffers = list[Buffer]

_EMULATORS = {Section.QEMU_TRAD, Section.QEMU_XEN, Section.DEMU, Section.VARSTORED, Section.SWTPM0, Section.SWTPM}
# What no target needs: a converted stream has one checkpoint, its end, and no receiver that compares.
_LEFT_OUT = (
    records.Checkpoint
    | records.Verify
    | libxl.LibxcContext
    | libxl.LibxlEnd
    | libxl.CheckpointState
    | libxl.CheckpointEnd
)


@dataclass
class ConvertOptions:
    """How to convert a stream.

    Attributes:
        kind: the envelope of the result; None keeps the input's.
        config: the domain's configuration to carry; None keeps the input's.
        style: the format of ``config``: "json", "xl", "xml" or "sexp".
        batch: pages of each PAGE_DATA record; None keeps the input's records.
        drop_zero: send pages of zeros without content.
        drop_emulator: leave out a device model's state that the result has no place for, instead of refusing.
    """

    kind: Kind | None = None
    config: bytes | None = None
    style: str = "json"
    batch: int | None = None
    drop_zero: bool = False
    drop_emulator: bool = False

    def __post_init__(self) -> None:
        if self.batch is not None and not 0 < self.batch <= BATCH_MAX:
            raise RequestError(f"a record has 1 to {BATCH_MAX} pages, not {self.batch}", available=BATCH_MAX)


@dataclass
class Converted:
    """What was made of what. ``version``: 1 to 3; sizes in bytes; ``dropped``: pages of zeros, now without content.

    ``checkpoints``: how many the input had, all of them in the result; ``cut_off``: why the input ended behind the last
    one, if it did. ``findings`` are those of `verify`.
    """

    name: str
    source: Kind = Kind.LIBXC
    version: int = 3
    guest: Guest | None = None
    kind: Kind = Kind.LIBXC
    pages: int = 0
    dropped: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    checkpoints: int = 0
    cut_off: str | None = None
    config: bool = False
    left_out: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def saved(self) -> int:
        """Bytes of page content that were left out."""
        return self.dropped * PAGE_SIZE


class Conversion:
    """One stream on its way. ``pieces`` gives what is to be written, in order. ``seen`` is told each event.

    What its envelope carried is in ``config``, of the format ``style``; a device model's state in ``emulators``.
    """

    def __init__(
        self,
        source: Input,
        reader: Reader,
        wish: ConvertOptions,
        progress: ProgressCallback | None = None,
        seen: Callable[[Event], None] | None = None,
    ) -> None:
        self.done = Converted(source.name)
        self.config, self.style = b"", ""  # of the input's envelope
        self.emulators: list[libxl.EmulatorRecord] = []
        self._seen = seen
        self._source = source
        self._reader = reader
        self._wish = wish
        self._progress = progress
        self._writer: Writer | None = None
        self._version = 0  # of the input
        self._bare = True  # nothing wraps it
        self._static = False  # static data has ended
        self._cutter = PageRepacker(wish.batch, drop_zero=wish.drop_zero)
        self._changed = DeltaStore(source.fd if source.seekable else None, source.start)
        self._kept: Checkpoints | None = None

    def pieces(self) -> Iterator[Buffers]:
        """All of it. Raises what the reader and the writer raise, RequestError for what the target has no place for."""
        try:
            ended = False
            for event in self._events():
                if self._seen is not None:
                    self._seen(event)
                if isinstance(event, records.Checkpoint | records.End):
                    yield from self._checkpoint(event)
                    ended |= isinstance(event, records.End)
                if self._kept is None or ended:
                    yield from self._see(event, self._source.take)
                else:
                    self._kept.keep(event, self._source.take)
            yield from self._end()
        finally:
            self.close()

    def _events(self) -> Iterator[Event]:
        """The reader's; one that breaks off behind a checkpoint ends there."""
        try:
            yield from self._source.events(self._reader, self._progress, taking=True)
        except Truncated as e:
            if self._kept is None:
                raise
            self.done.cut_off = str(e)
            self._kept.close()
            self._kept = None
            yield records.End(offset=e.offset)

    def _checkpoint(self, event: Event) -> Iterator[Buffers]:
        """What came behind the last checkpoint counts."""
        if self._kept is not None:
            for kept, take in self._kept.release():
                yield from self._see(kept, take)
        if isinstance(event, records.Checkpoint):
            self.done.checkpoints += 1
            self._kept = self._kept or Checkpoints()

    def _see(self, event: Event, take: ReadInto) -> Iterator[Buffers]:
        match event:
            case Envelope():
                self._bare = False
                self.done.source, self.config, self.style = event.kind, event.config, event.config_format
            case LibxlHeader() if self._bare:
                self.done.source = Kind.LIBXL
            case SectionHeader():
                self._section(event)
            case libxl.EmulatorRecord():
                # Of each kind the last one counts: a checkpoint has them all.
                same = [e for e in self.emulators if (type(e), e.index) == (type(event), event.index)]
                self.emulators = [e for e in self.emulators if e not in same] + [event]
            case ImageHeader():
                self._version = event.version
            case DomainHeader():
                yield self._start(event)
            case PageDeltas():
                self._changed.change(event)
            case PageData() if self._changed.begun:
                self._changed.name(event.entries)
            case PageData():
                if self._reader.is_legacy:
                    self._changed.plain(event)
                yield from self._end_static_data(event)
                yield from self._write(self._cutter.put(event.entries, take))
            case framing.Unknown():
                self.done.left_out.append(event.name)
            case records.HvmParams() if not event.params:
                pass  # a writer of version 2 could leave it so
            case framing.Record() if not isinstance(event, _LEFT_OUT):
                if isinstance(event, records.End):
                    for entries, taken in self._changed.pages():
                        yield from self._write(self._cutter.put(entries, taken))
                yield from self._write(self._cutter.flush())
                yield from self._end_static_data(event)
                if isinstance(event, records.X86PVP2MFrames | records.P2MLeaves):
                    leaves = event.p2m_pfns if isinstance(event, records.X86PVP2MFrames) else event.runs[2]
                    self._cutter.keep = np.union1d(self._cutter.keep, leaves)
                yield self._to.send(event)

    @property
    def _to(self) -> Writer:
        assert self._writer is not None, "a domain header comes before all records"
        return self._writer

    def _start(self, header: DomainHeader) -> Buffers:
        done, wish = self.done, self._wish
        legacy = self._reader.is_legacy
        done.version, done.guest = self._version or 1, header.guest
        done.kind = wish.kind or done.source
        config, style = (self.config, self.style) if wish.config is None else (wish.config, wish.style)
        if wish.config is None and style not in envelope.CONFIG_FORMATS[done.kind]:
            config = b""
        done.config = bool(config)
        head = envelope.envelope_header(done.kind, config, style)
        xen = (header.xen_major, header.xen_minor)
        self._writer = Writer(envelope.INNER_KIND[done.kind], guest=header.guest, xen=xen, legacy=legacy)
        self._static = self._version == 3
        return [*head, *self._writer.start()]

    def _end_static_data(self, event: Event) -> Iterator[Buffers]:
        """Where a stream of version 2 does not say it, as readers infer it (order.py)."""
        if isinstance(event, records.StaticDataEnd):
            self._static = True
        first = PageData if self.done.guest is Guest.HVM else records.X86PVP2MFrames
        if not self._static and isinstance(event, first):
            self._static = True
            yield self._to.send(records.StaticDataEnd())

    def _write(self, batches: Iterator[Batch]) -> Iterator[Buffers]:
        for entries, contents in batches:
            yield self._to.pages(entries.tobytes(), [content.reshape(-1).data for content in contents])

    def _section(self, event: SectionHeader) -> None:
        if event.section is Section.XENOPS:
            self.config, self.style = event.data, "sexp"
        elif event.section in _EMULATORS:
            self._no_place(str(event.section), event.offset)

    def _no_place(self, what: str, offset: int) -> None:
        if not self._wish.drop_emulator:
            why = f"the device model's state ({what}) has no place in the result"
            raise Unsupported(f"{why}, and without it an HVM domain does not start as it was", offset=offset)
        self.done.left_out.append(what)

    def _end(self) -> Iterator[Buffers]:
        """What follows libxc's stream."""
        if envelope.INNER_KIND[self.done.kind] is Kind.LIBXL:
            for record in self.emulators:
                yield self._to.send(record)
            yield self._to.send(libxl.LibxlEnd())
        else:
            for record in self.emulators:
                self._no_place(record.name, record.offset)
        if tail := envelope.envelope_trailer(self.done.kind):
            yield tail
        self.done.pages, self.done.dropped = self._cutter.pages, self._cutter.dropped
        self.done.bytes_in = self._reader.offset
        if self._source.trailing:
            self.done.left_out.append(f"{self._source.trailing} bytes behind the stream")

    def close(self) -> None:
        """Give temporary files back."""
        self._changed.close()
        if self._kept is not None:
            self._kept.close()
            self._kept = None
