"""Fuzz the verifier and the restorer against each other.

The invariant: what the restorer refuses, on the model of Xen, verify reports as an error. A file of which verify says
"should restore" restores.

python -m tests.fuzz.differential [--seconds N] [--seed N] [--only N]
"""

from __future__ import annotations

import sys
import tempfile

from tests.fuzz.mutate import case, domain_case
from tests.fuzz.run import main
from tests.support.restoring import host_state, stream_input
from tests.support.verifying import verify_or_error
from xenpv.errors import GuestError, HostError, RequestError, StreamError
from xenpv.host.model.host import ModelHost
from xenpv.restore.restore import restore_domain
from xenpv.stream.record_order import Guest


def mixed_case(seed: int, n: int) -> bytes:
    """A stream that is broken anywhere, and three times as often a broken domain in a sound stream."""
    return domain_case(seed, n) if n % 4 else case(seed, n)


class Disagreement(AssertionError):
    """The restorer refused a stream in which verify found no error."""


class Both:
    """A host on which streams are restored that were verified before; the domains are destroyed again."""

    def __init__(self) -> None:
        self.host = ModelHost(96 << 20, seed=1)
        self.before = host_state(self.host)

    def restore_error(self, data: bytes) -> Exception | None:
        """Return why the stream cannot be restored; None if it can."""
        with stream_input(data) as source:
            try:
                restored = restore_domain(self.host, source)
            except (StreamError, GuestError, HostError, RequestError) as e:
                return e
        self.host.destroy(restored.domid)
        return None

    def target(self, data: bytes, _n: int) -> None:
        """Try one input."""
        with tempfile.NamedTemporaryFile(prefix="fuzz-") as file:
            file.write(data)
            file.flush()
            report = verify_or_error(file.name, deep=True)
        if isinstance(report, StreamError) or not report.ok or report.guest is not Guest.PV:
            return
        error = self.restore_error(data)
        if error is not None:
            raise Disagreement(f"verify: {report.verdict}; restore: {type(error).__name__}: {error}")
        assert host_state(self.host) == self.before


if __name__ == "__main__":
    sys.exit(main(Both().target, "tests.fuzz.differential", mixed_case))
