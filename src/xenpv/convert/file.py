"""A saved domain converted into a file or a pipe, and checked on its way.

What comes out goes through `verify` and is held back by one piece: the last one, without which no receiver starts a
domain, is written when nothing was found. So what verify refuses is never whole, in a pipe either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from xenpv.convert.convert import Buffers, Conversion, Converted, ConvertOptions
from xenpv.errors import StreamError
from xenpv.findings import Finding, Severity
from xenpv.io.atomic_output import Output
from xenpv.io.progress import ProgressCallback
from xenpv.io.stream_input import Input
from xenpv.stream.events import Event
from xenpv.stream.legacy import LegacyFormat
from xenpv.stream.reader import Reader
from xenpv.verify.stream import verify


class Refused(StreamError):
    """What would come out does not restore. ``findings``: why."""

    def __init__(self, findings: list[Finding], offset: int) -> None:
        more = f", and {len(findings) - 1} more" if len(findings) > 1 else ""
        super().__init__(f"the result would not restore as it was saved: {findings[0]}{more}", offset=offset)
        self.findings = findings


def convert(
    source: Input,
    path: str,
    wish: ConvertOptions,
    *,
    reader: Reader | None = None,
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> Converted:
    """Convert a saved domain into the file at ``path`` ("-": standard output), which has its name when it is whole.

    Raises StreamError for an input that cannot be read, Refused for what `verify` finds an error in, unless ``force``;
    RequestError for what the target has no place for; OSError for the output. Then there is no file, and what came out
    of a pipe has no end.
    """
    conversion = Conversion(source, reader or Reader(legacy=LegacyFormat()), wish, progress)
    with Output.open(path) as out:
        return write(conversion, out.write, force=force)


def write(conversion: Conversion, sink: Callable[[Buffers], None], *, force: bool = False) -> Converted:
    """As ``convert``, to whatever takes buffers."""
    done, on_its_way = conversion.done, _OnItsWay(conversion, sink)
    try:
        report = verify(on_its_way)
    except _Raised as e:
        raise e.error from None
    finally:
        conversion.close()
    done.findings = list(report.findings)
    if report.error is not None or not (report.ok or force):
        errors = [finding for finding in report.findings if finding.severity is Severity.ERROR]
        raise Refused(errors, errors[0].offset or 0)
    sink(on_its_way.held)
    done.bytes_out = on_its_way.size
    return done


class _Raised(Exception):
    """The conversion ended with an error: of the input, where verify would take it for one of the output."""

    def __init__(self, error: StreamError) -> None:
        super().__init__(str(error))
        self.error = error


class _OnItsWay(Input):
    """What comes out of a conversion, as an input of verify's. ``held`` is the piece that is not written yet."""

    def __init__(self, conversion: Conversion, sink: Callable[[Buffers], None]) -> None:
        self.name = conversion.done.name
        self.fd, self.exact, self.seekable, self.start, self.size, self.trailing = -1, False, False, 0, 0, 0
        self.held: Buffers = []
        self._pieces = conversion.pieces()
        self._sink = sink

    def close(self) -> None:
        """There is nothing to close."""

    def events(
        self,
        reader: Reader,
        progress: ProgressCallback | None = None,  # noqa: ARG002
        *,
        taking: bool = False,  # noqa: ARG002
    ) -> Iterator[Event]:
        """All events of the reader, fed with each piece, behind which the one before is written."""
        while (piece := self._piece()) is not None:
            self._sink(self.held)
            self.held = piece
            for buffer in piece:
                reader.feed(buffer)
                self.size += len(buffer)
            yield from _events_of(reader)
        reader.feed_eof()
        yield from _events_of(reader)
        self.trailing = reader.trailing

    def _piece(self) -> Buffers | None:
        try:
            return next(self._pieces, None)
        except StreamError as e:
            raise _Raised(e) from e


def _events_of(reader: Reader) -> Iterator[Event]:
    while (event := reader.next_event()) is not None:
        yield event
