"""Fuzz the verifier. One invariant: any file gets a report, or a StreamError; never another exception.

And a report names what it found within the file: offsets, and pfns that the format can hold.

python -m tests.fuzz.verify [--seconds N] [--seed N] [--only N]
"""

from __future__ import annotations

import json
import sys
import tempfile

from tests.fuzz.run import main
from xenpv.domain.verify import verify
from xenpv.errors import StreamError


def target(data: bytes, n: int) -> None:
    """Try one input, now and then without looking into memory."""
    with tempfile.NamedTemporaryFile(prefix="fuzz-") as file:
        file.write(data)
        file.flush()
        try:
            report = verify(file.name, deep=n % 8 != 0)
        except StreamError as error:
            held_up: StreamError | None = error
        else:
            held_up = None
            report.close()
    if held_up is not None:
        assert 0 <= held_up.offset <= len(data)
        return
    # In a file that ends early, or a record of the wrong size, the place of a page is where it would have been.
    some_pages_are_elsewhere = {rule.name for rule in report.findings.count} & {"truncated", "page-data-size"}
    for finding in report.findings:
        assert str(finding)
        assert finding.offset is None or finding.offset >= 0
        assert finding.offset is None or finding.offset <= len(data) or some_pages_are_elsewhere
        assert finding.level is None or 1 <= finding.level <= 4
        assert finding.entry is None or 0 <= finding.entry < (512 if finding.level else 1 << 24)
    json.dumps(report.to_json())


if __name__ == "__main__":
    sys.exit(main(target, "tests.fuzz.verify"))
