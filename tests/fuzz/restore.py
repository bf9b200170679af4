"""Fuzz the restorer. One invariant: any stream becomes a domain that can be, or an error in words; and of what became
none nothing is left.

python -m tests.fuzz.restore [--seconds N] [--seed N] [--only N]
"""

from __future__ import annotations

import os
import sys

from tests.fuzz.run import main
from tests.support.model_invariants import check_invariants
from tests.support.restoring import host_state, stream_input
from tests.support.saved_files import piped
from xenpv.errors import GuestError, HostError, RequestError, StreamError
from xenpv.host.model.host import ModelHost
from xenpv.io.stream_input import Input
from xenpv.restore.restore import restore_domain

PIPED = 3  # every so many cases come through a pipe
CHECKED = 20  # and after so many all counts of the host are reckoned anew


class Fuzzed:
    """A host on which one stream after another is restored; the domains that come of it are ended."""

    def __init__(self) -> None:
        self.host = ModelHost(96 << 20, seed=1)
        self.before = host_state(self.host)

    def restore(self, source: Input) -> None:
        try:
            restored = restore_domain(self.host, source)
        except (StreamError, GuestError, HostError, RequestError) as e:
            assert str(e)  # noqa: PT017
        else:
            self.host.destroy(restored.domid)

    def target(self, data: bytes, n: int) -> None:
        """Try one input."""
        if n % PIPED:
            with stream_input(data) as source:
                self.restore(source)
        else:
            with piped(data) as fd:
                source = Input(os.dup(fd), "pipe")
                self.restore(source)
                source.close()
        assert host_state(self.host) == self.before
        if n % CHECKED == 0:
            check_invariants(self.host)


if __name__ == "__main__":
    sys.exit(main(Fuzzed().target, "tests.fuzz.restore"))
