"""Input: descriptors that others share, and pipes that others made non-blocking."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from tests.support.writers.build import pv_domain
from xenpv.io.stream_input import Input
from xenpv.stream.reader import Reader


def test_read_of_a_nonblocking_pipe_waits_for_data() -> None:
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)
    source = Input(ours, "pipe")

    def write_late() -> None:
        time.sleep(0.05)
        os.write(theirs, b"late")
        os.close(theirs)

    thread = threading.Thread(target=write_late)
    thread.start()
    assert source.read(9) == b"late"
    thread.join()
    source.close()


def test_events_given_up_after_close_raise_nothing(tmp_path: Path) -> None:
    path = tmp_path / "web.save"
    path.write_bytes(pv_domain(pfns=range(64)).to_bytes())
    source = Input(os.open(path, os.O_RDONLY), "web.save", exact=True)
    events = source.events(Reader())
    next(events)
    source.close()
    events.close()  # type: ignore[attr-defined]  # a generator
