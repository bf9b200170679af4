"""Fuzz the command line. One invariant: whatever the file, a verb does its work or says in a sentence why it cannot.

python -m tests.fuzz.cli [--seconds N] [--seed N] [--only N]
"""

from __future__ import annotations

import sys
import tempfile

from click.testing import CliRunner

from tests.fuzz.run import main
from xenpv.cli.main import main as xenpv
from xenpv.errors import XenPVError

VERBS = (
    ("show", "FILE"),
    ("show", "-v", "FILE"),
    ("show", "--json", "FILE"),
    ("p2m", "FILE"),
    ("p2m", "--json", "FILE"),
    ("walk", "FILE", "0xffffffff80000000"),
    ("walk", "FILE", "0xd0000000"),
    ("read", "FILE", "0xffffffff80001000", "64"),
    ("read", "FILE", "0xc0000ff8", "5000"),
    ("verify", "FILE"),
    ("verify", "--json", "FILE"),
    ("report", "FILE", "-o", "/dev/null", "--json"),
)


def target(data: bytes, n: int) -> None:
    """Try one verb on one input."""
    with tempfile.NamedTemporaryFile(prefix="fuzz-") as file:
        file.write(data)
        file.flush()
        words = [file.name if word == "FILE" else word for word in VERBS[n % len(VERBS)]]
        result = CliRunner().invoke(xenpv, words)
    if isinstance(result.exception, XenPVError):  # what main.run() turns into one line and an exit status of 1
        assert "\n" not in str(result.exception)
    elif not isinstance(result.exception, SystemExit | None):
        raise result.exception
    else:
        assert result.exit_code in {0, 1}


if __name__ == "__main__":
    sys.exit(main(target, "tests.fuzz.cli"))
