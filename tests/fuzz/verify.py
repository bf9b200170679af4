"""Fuzz the verifier. One invariant: any file gets a report, or a StreamError; never another exception.

And a report names what it found within the file: offsets, and pfns that the format can hold.

python -m tests.fuzz.verify [--seconds N] [--seed N] [--only N]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading

from tests.fuzz.run import main
from xenpv.errors import StreamError
from xenpv.io.stream_input import Input
from xenpv.verify.stream import Report, verify

PIPED = 4  # every so many cases come through a pipe too, which takes other ways and has to find the same


def target(data: bytes, n: int) -> None:
    """Try one input, now and then without looking into memory."""
    deep = n % 7 != 0
    with tempfile.NamedTemporaryFile(prefix="fuzz-") as file:
        file.write(data)
        file.flush()
        found = judge(file.name, deep)
    if isinstance(found, StreamError):
        assert 0 <= found.offset <= len(data)
    else:
        check(found, len(data))
    if n % PIPED == 0:
        assert said(from_pipe(data, deep)) == said(found)


def judge(source: str | Input, deep: bool) -> Report | StreamError:
    try:
        report = verify(source, deep=deep)
    except StreamError as e:
        return e
    return report


def check(report: Report, size: int) -> None:
    # In a file that ends early, or a record of the wrong size, the place of a page is where it would have been.
    some_pages_are_elsewhere = {rule.name for rule in report.findings.count} & {"truncated", "page-data-size"}
    for finding in report.findings:
        assert str(finding)
        assert finding.offset is None or finding.offset >= 0
        assert finding.offset is None or finding.offset <= size or some_pages_are_elsewhere
        assert finding.level is None or 1 <= finding.level <= 4
        assert finding.entry is None or 0 <= finding.entry < (512 if finding.level else 1 << 24)
    json.dumps(report.to_json())


def from_pipe(data: bytes, deep: bool) -> Report | StreamError:
    read_end, write_end = os.pipe()

    def write() -> None:
        try:
            with os.fdopen(write_end, "wb") as pipe:
                pipe.write(data)
        except BrokenPipeError:
            pass  # it had seen enough

    writer = threading.Thread(target=write)
    writer.start()
    try:
        return judge(Input(read_end, "pipe"), deep)
    finally:
        writer.join()


def said(found: Report | StreamError) -> object:
    """What matters of an answer, apart from where the input came from."""
    if isinstance(found, StreamError):
        return repr(found)
    if {rule.name for rule in found.findings.count} & {"page-data-size", "truncated", "record-order"}:
        return "not all pages are there, or are told for what they are only behind them: of a pipe fewer are had"
    return [str(finding) for finding in found.findings], found.pages, str(found.error)


if __name__ == "__main__":
    sys.exit(main(target, "tests.fuzz.verify"))
