"""Conversion of a saved domain to version 3 of the stream, in any envelope.

The input may have any version of the stream and any envelope.

A Reader takes the input apart and a Writer makes the output. file.py has the files, and verifies what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from xenpv.convert.remus import DeltaStore
from xenpv.convert.repack import BATCH_MAX, Batch, PageRepacker
from xenpv.errors import RequestError, Truncated, Unsupported
from xenpv.findings import Finding
from xenpv.frames import PAGE_SIZE
from xenpv.io.checkpoint_buffer import CheckpointBuffer
from xenpv.io.progress import ProgressCallback
from xenpv.io.stream_input import Input
from xenpv.stream import envelope, framing, libxl, records
from xenpv.stream.envelope import Envelope, Kind, Section
from xenpv.stream.events import DomainHeader, Event, ImageHeader, LibxlHeader, PageDeltas, SectionHeader
from xenpv.stream.fields import Buffer
from xenpv.stream.page_data import PageData, ReadInto
from xenpv.stream.reader import Reader
from xenpv.stream.record_order import Guest
from xenpv.stream.seal import Sealer
from xenpv.stream.writer import Writer

Buffers = list[Buffer]

_EMULATORS = {Section.QEMU_TRAD, Section.QEMU_XEN, Section.DEMU, Section.VARSTORED, Section.SWTPM0, Section.SWTPM}
# A converted stream has one checkpoint, its end, and no receiver that compares.
_OMITTED = (
    records.Checkpoint
    | records.Verify
    | records.Seal
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
        config_format: the format of ``config``: "json", "xl", "xml" or "sexp".
        batch: pages per PAGE_DATA record; None keeps the input's records.
        drop_zero: send pages of zeros without content.
        drop_emulator: leave out a device model's state that the result cannot carry, instead of refusing.
        seal: seals the output; the input's own seal is left out.
    """

    kind: Kind | None = None
    config: bytes | None = None
    config_format: str = "json"
    batch: int | None = None
    drop_zero: bool = False
    drop_emulator: bool = False
    seal: Sealer | None = None

    def __post_init__(self) -> None:
        if self.batch is not None and not 0 < self.batch <= BATCH_MAX:
            raise RequestError(f"a record has 1 to {BATCH_MAX} pages, not {self.batch}", available=BATCH_MAX)


@dataclass
class ConversionResult:
    """The result of a conversion: its input and output.

    Attributes:
        name: the name of the input.
        source_kind: the envelope of the input.
        version: of the input's libxc stream, 1 (legacy) to 3.
        guest: the type of the domain; None before its header was read.
        kind: the envelope of the output.
        pages: pages with content in the output.
        zero_pages: pages of zeros that are now without content.
        bytes_in: bytes of the input's stream.
        bytes_out: bytes of the output.
        checkpoints: checkpoints of the input. The output has the content of the last whole one.
        truncated: why the input ended after the last checkpoint, if it did.
        has_config: whether the output carries a configuration.
        omitted: what the output does not have: names of records and of emulators.
        findings: what ``verify`` finds in the output.
    """

    name: str
    source_kind: Kind = Kind.LIBXC
    version: int = 3
    guest: Guest | None = None
    kind: Kind = Kind.LIBXC
    pages: int = 0
    zero_pages: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    checkpoints: int = 0
    truncated: str | None = None
    has_config: bool = False
    omitted: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def bytes_saved(self) -> int:
        """Bytes of page content that ``drop_zero`` left out."""
        return self.zero_pages * PAGE_SIZE


class Conversion:
    """One stream that is being converted.

    ``output`` is read once, to its end; ``close`` frees temporary files.

    Args:
        source: the input.
        reader: reads it; with a LegacyFormat, if it may be a legacy stream.
        options: how to convert it.
        progress: called with the progress.
        on_event: called with each event of the reader.

    Attributes:
        result: filled in on the way, complete at the end of ``output``.
        config: the configuration in the input's envelope, of the format ``config_format``.
        emulators: the device model's state, of each kind and index the last record, in the order of the last ones.
    """

    def __init__(
        self,
        source: Input,
        reader: Reader,
        options: ConvertOptions,
        progress: ProgressCallback | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.result = ConversionResult(source.name)
        self.config, self.config_format = b"", ""
        self.emulators: dict[tuple[type, int], libxl.EmulatorRecord] = {}
        self._on_event = on_event
        self._source = source
        self._reader = reader
        self._options = options
        self._progress = progress
        self._started_writer: Writer | None = None
        self._version = 0  # of the input's image header
        self._has_envelope = False
        self._static_data_ended = False
        self._repacker = PageRepacker(options.batch, drop_zero=options.drop_zero)
        self._deltas = DeltaStore(source.fd if source.seekable else None, source.start)
        self._checkpoint: CheckpointBuffer | None = None  # events since the last checkpoint

    def output(self) -> Iterator[Buffers]:
        """Yield the buffers of the output, in order.

        Raises:
            StreamError: the input cannot be read, or its records cannot be written as they are.
            RequestError: the output cannot carry the configuration.
            Unsupported: the output cannot carry the device model's state.
        """
        try:
            ended = False
            for event in self._events():
                if self._on_event is not None:
                    self._on_event(event)
                if isinstance(event, records.Checkpoint | records.End):
                    yield from self._convert_checkpoint(event)
                    ended |= isinstance(event, records.End)
                if self._checkpoint is None or ended:
                    yield from self._convert(event, self._source.read_into)
                else:
                    self._checkpoint.add(event, self._source.read_into)
            yield from self._finish()
        finally:
            self.close()

    def _events(self) -> Iterator[Event]:
        """Yield the reader's events; a truncated input ends at its last checkpoint."""
        try:
            yield from self._source.events(self._reader, self._progress, reads_pages=True)
        except Truncated as e:
            if self._checkpoint is None:
                raise
            self.result.truncated = str(e)
            self._checkpoint.close()
            self._checkpoint = None
            yield records.End(offset=e.offset)

    def _convert_checkpoint(self, event: Event) -> Iterator[Buffers]:
        """Convert the events since the last checkpoint, now that it is complete."""
        if self._checkpoint is not None:
            for buffered_event, read_into in self._checkpoint.events():
                yield from self._convert(buffered_event, read_into)
            self._checkpoint.clear()
        if isinstance(event, records.Checkpoint):
            self.result.checkpoints += 1
            self._checkpoint = self._checkpoint or CheckpointBuffer()

    def _convert(self, event: Event, read_into: ReadInto) -> Iterator[Buffers]:
        """Convert one event; ``read_into`` gives the page content of a PAGE_DATA record."""
        match event:
            case Envelope():
                self._has_envelope = True
                self.result.source_kind = event.kind
                self.config, self.config_format = event.config, event.config_format
            case LibxlHeader() if not self._has_envelope:
                self.result.source_kind = Kind.LIBXL
            case SectionHeader():
                self._convert_section(event)
            case libxl.EmulatorRecord():
                # A checkpoint has all emulator records, so the last one of each kind counts.
                self.emulators.pop((type(event), event.index), None)
                self.emulators[type(event), event.index] = event
            case ImageHeader():
                self._version = event.version
            case DomainHeader():
                yield self._start(event)
            case PageDeltas():
                self._deltas.apply(event)
            case PageData() if self._deltas.has_deltas:  # without content: compression stays on once it is
                self._deltas.set_types(event.entries)
            case PageData():
                if self._reader.is_legacy:
                    self._deltas.add_base(event)
                yield from self._end_static_data(event)
                yield from self._write_pages(self._repacker.add(event.entries, read_into))
            case framing.Unknown():
                self.result.omitted.append(event.name)
            case records.HvmParams() if not event.params:
                pass  # a writer of version 2 may leave it empty
            case framing.Record() if not isinstance(event, _OMITTED):
                if isinstance(event, records.End):
                    for entries, read_content in self._deltas.pages():
                        yield from self._write_pages(self._repacker.add(entries, read_content))
                yield from self._write_pages(self._repacker.flush())
                yield from self._end_static_data(event)
                if isinstance(event, records.X86PVP2MFrames | records.P2MLeaves):
                    leaves = event.p2m_pfns if isinstance(event, records.X86PVP2MFrames) else event.runs[2]
                    self._repacker.keep_content(leaves)
                yield self._writer.send(event)

    @property
    def _output_kind(self) -> Kind:
        """The envelope of the output.

        That of the input, but xl's for a file of xend.
        """
        return self._options.kind or (Kind.XL if self.result.source_kind is Kind.XEND else self.result.source_kind)

    @property
    def _writer(self) -> Writer:
        assert self._started_writer is not None, "a domain header comes before all records"
        return self._started_writer

    def _start(self, header: DomainHeader) -> Buffers:
        """Start the output with the headers of its envelope and streams."""
        result, options = self.result, self._options
        result.version, result.guest = self._version or 1, header.guest
        result.kind = self._output_kind
        if options.config is not None:
            config, config_format = options.config, options.config_format
        elif self.config_format in envelope.CONFIG_FORMATS[result.kind]:
            config, config_format = self.config, self.config_format
        else:
            config, config_format = b"", ""
        result.has_config = bool(config)
        head = envelope.envelope_header(result.kind, config, config_format)
        if options.seal is not None:
            options.seal.add(head)
        self._started_writer = Writer(
            envelope.INNER_KIND[result.kind],
            guest=header.guest,
            xen=(header.xen_major, header.xen_minor),
            legacy=self._reader.is_legacy,
            seal=options.seal,
        )
        self._static_data_ended = self._version == 3
        return [*head, *self._started_writer.start()]

    def _end_static_data(self, event: Event) -> Iterator[Buffers]:
        """Write the STATIC_DATA_END that a stream of version 2 lacks.

        record_order.py infers where it belongs.
        """
        if isinstance(event, records.StaticDataEnd):
            self._static_data_ended = True
        first = PageData if self.result.guest is Guest.HVM else records.X86PVP2MFrames
        if not self._static_data_ended and isinstance(event, first):
            self._static_data_ended = True
            yield self._writer.send(records.StaticDataEnd())

    def _write_pages(self, batches: Iterator[Batch]) -> Iterator[Buffers]:
        for entries, contents in batches:
            yield self._writer.pages(entries.tobytes(), [content.reshape(-1).data for content in contents])

    def _convert_section(self, event: SectionHeader) -> None:
        if event.section is Section.XENOPS:
            self.config, self.config_format = event.data, "sexp"
        elif event.section in _EMULATORS:
            self._omit_emulator(str(event.section), event.offset)

    def _omit_emulator(self, name: str, offset: int) -> None:
        """Leave out a device model's state, if the options allow it.

        Raises:
            Unsupported: the options do not allow it.
        """
        if not self._options.drop_emulator:
            kind = self._output_kind
            message = (
                f"a {kind} file cannot carry the device model's state ({name}), which an HVM domain needs to resume"
            )
            raise Unsupported(message, offset=offset)
        self.result.omitted.append(name)

    def _finish(self) -> Iterator[Buffers]:
        """Write the records after libxc's stream, and complete the result."""
        result = self.result
        if envelope.INNER_KIND[result.kind] is Kind.LIBXL:
            for record in self.emulators.values():
                yield self._writer.send(record)
            yield self._writer.send(libxl.LibxlEnd())
        else:
            for record in self.emulators.values():
                self._omit_emulator(record.name, record.offset)
        if trailer := envelope.envelope_trailer(result.kind):
            yield trailer
        result.pages, result.zero_pages = self._repacker.pages, self._repacker.zero_pages
        result.bytes_in = self._reader.offset
        if self._source.trailing:
            result.omitted.append(f"{self._source.trailing} bytes after the stream")

    def close(self) -> None:
        """Free temporary files; calling it again does no harm."""
        self._deltas.close()
        if self._checkpoint is not None:
            self._checkpoint.close()
            self._checkpoint = None
