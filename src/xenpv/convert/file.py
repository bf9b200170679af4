"""Conversion of a saved domain into a file or pipe, verified during the write.

The last buffers of the output are written only after ``verify`` found no error. No receiver starts a domain without
them, so an output that verify refuses is never complete, in a pipe either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from xenpv.convert.convert import Buffers, Conversion, ConversionResult, ConvertOptions
from xenpv.errors import StreamError
from xenpv.findings import Finding, Severity
from xenpv.io.atomic_output import Output
from xenpv.io.file_kind import FileKind
from xenpv.io.progress import ProgressCallback
from xenpv.io.stream_input import Input
from xenpv.stream.events import Event
from xenpv.stream.legacy import LegacyFormat
from xenpv.stream.reader import Reader
from xenpv.verify.stream import verify


class NotRestorable(StreamError):
    """The output of a conversion would not restore. ``findings``: why."""

    def __init__(self, findings: list[Finding], offset: int) -> None:
        more = f", and {len(findings) - 1} more" if len(findings) > 1 else ""
        super().__init__(f"the result would not restore: {findings[0]}{more}", offset=offset)
        self.findings = findings


def convert(
    source: Input,
    path: str,
    options: ConvertOptions,
    *,
    reader: Reader | None = None,
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> ConversionResult:
    """Convert a saved domain into a file, which appears only when it is complete.

    After an error there is no file, and what came out of a pipe has no end.

    Args:
        source: the input.
        path: the output; "-" is standard output.
        options: how to convert.
        reader: reads the input; the default detects all kinds of stream.
        force: write the output even if verify finds errors in it, or it replaces a file of another kind.
        progress: called with the progress.

    Raises:
        StreamError: the input cannot be read.
        NotRestorable: ``verify`` finds errors in the output.
        RequestError: the output cannot carry what it should, is the input, or is a file of another kind.
        OSError: the output cannot be written.
    """
    conversion = Conversion(source, reader or Reader(legacy=LegacyFormat()), options, progress)
    with Output.open(path, replaces={FileKind.SAVED_DOMAIN}, inputs=[source.fd], force=force) as out:
        return write_verified(conversion, out.write, force=force)


def write_verified(
    conversion: Conversion, write: Callable[[Buffers], None], *, force: bool = False
) -> ConversionResult:
    """Write the output of a conversion as ``convert`` does; return the result."""
    result, output = conversion.result, _ConvertedStream(conversion, write)
    try:
        report = verify(output)
    except _ConversionFailed as e:
        raise e.error from None
    finally:
        conversion.close()
    result.findings = list(report.findings)
    if report.error is not None or not (report.ok or force):
        errors = [finding for finding in report.findings if finding.severity is Severity.ERROR]
        raise NotRestorable(errors, errors[0].offset or 0)
    write(output.unwritten)
    result.bytes_out = output.size
    return result


class _ConversionFailed(Exception):
    """Carries a StreamError of the input past verify.

    verify takes plain StreamErrors for those of the output.
    """

    def __init__(self, error: StreamError) -> None:
        super().__init__(str(error))
        self.error = error


class _ConvertedStream:
    """The output of a conversion, as a StreamSource for verify.

    It is written while verify reads it.

    ``unwritten``: the last buffers; they are written when the next ones come.
    """

    def __init__(self, conversion: Conversion, write: Callable[[Buffers], None]) -> None:
        self.name = conversion.result.name
        self.fd, self.seekable, self.start, self.size, self.trailing = -1, False, 0, 0, 0
        self.unwritten: Buffers = []
        self._output = conversion.output()
        self._write = write

    def close(self) -> None:
        """There is nothing to close."""

    def events(
        self,
        reader: Reader,
        progress: ProgressCallback | None = None,  # noqa: ARG002  the conversion reports it
    ) -> Iterator[Event]:
        """Feed the output to the reader and yield its events.

        Buffers are written when the next ones come.
        """
        while (buffers := self._next_buffers()) is not None:
            self._write(self.unwritten)
            self.unwritten = buffers
            for buffer in buffers:
                reader.feed(buffer)
                self.size += len(buffer)
            yield from _available_events(reader)
        reader.feed_eof()
        yield from _available_events(reader)
        self.trailing = reader.trailing

    def _next_buffers(self) -> Buffers | None:
        try:
            return next(self._output, None)
        except StreamError as e:
            raise _ConversionFailed(e) from e


def _available_events(reader: Reader) -> Iterator[Event]:
    while (event := reader.next_event()) is not None:
        yield event
