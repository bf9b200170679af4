"""Verification of a stream from a file or from a pipe, with a StreamError as a result."""

from __future__ import annotations

import os
import threading

from xenpv.errors import StreamError
from xenpv.io.stream_input import Input
from xenpv.verify.stream import Report, verify


def verify_or_error(source: str | Input, *, deep: bool) -> Report | StreamError:
    """Return the report on a stream, or the error that verify() raised."""
    try:
        return verify(source, deep=deep)
    except StreamError as e:
        return e


def verify_pipe(data: bytes, *, deep: bool) -> Report | StreamError:
    """Verify bytes that arrive through a pipe."""
    read_end, write_end = os.pipe()

    def write() -> None:
        try:
            with os.fdopen(write_end, "wb") as pipe:
                pipe.write(data)
        except BrokenPipeError:
            pass  # verify() stopped at an error

    writer = threading.Thread(target=write)
    writer.start()
    try:
        return verify_or_error(Input(read_end, "pipe"), deep=deep)
    finally:
        writer.join()
