"""Fuzz the verifier. The invariant: any file gives a report or a StreamError; never another exception.

A report names places within the file: offsets, and pfns that the format can hold.

python -m tests.fuzz.verify [--seconds N] [--seed N] [--only N]
"""

from __future__ import annotations

import json
import sys
import tempfile

from tests.fuzz.run import main
from tests.support.verifying import verify_or_error, verify_pipe
from xenpv.errors import StreamError
from xenpv.verify.stream import Report

PIPED = 4  # every fourth case comes through a pipe too: other code, which must find the same


def target(data: bytes, n: int) -> None:
    """Try one input, now and then without looking into memory."""
    deep = n % 7 != 0
    with tempfile.NamedTemporaryFile(prefix="fuzz-") as file:
        file.write(data)
        file.flush()
        result = verify_or_error(file.name, deep=deep)
    if isinstance(result, StreamError):
        assert 0 <= result.offset <= len(data)
    else:
        check(result, len(data))
    if n % PIPED == 0:
        assert comparable(verify_pipe(data, deep=deep)) == comparable(result)


def check(report: Report, size: int) -> None:
    """Assert that a report's numbers can be true of a file of that size."""
    # In a truncated file or a record of the wrong size, a page's offset is where it would have been.
    offsets_may_exceed = {rule.name for rule in report.findings.count} & {"truncated", "page-data-size"}
    for finding in report.findings:
        assert str(finding)
        assert finding.offset is None or finding.offset >= 0
        assert finding.offset is None or finding.offset <= size or offsets_may_exceed
        assert finding.level is None or 1 <= finding.level <= 4
        assert finding.entry is None or 0 <= finding.entry < (512 if finding.level else 1 << 24)
    json.dumps(report.to_json())


def comparable(result: Report | StreamError) -> object:
    """Return the parts of a result that must be equal for a file and a pipe."""
    if isinstance(result, StreamError):
        return repr(result)
    if {rule.name for rule in result.findings.count} & {"page-data-size", "truncated", "record-order"}:
        return "pages are missing or come before what explains them: a pipe keeps fewer of them than a file"
    return [str(finding) for finding in result.findings], result.pages, str(result.error)


if __name__ == "__main__":
    sys.exit(main(target, "tests.fuzz.verify"))
