"""Runs the command line in this process, with standard input from a pipe, and captures its output."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn
from unittest.mock import patch

from tests.support.saved_files import piped
from xenpv.cli import main, verify_stream_v2


@dataclass
class Ran:
    """A finished command: its exit status, the bytes of standard output, and standard error."""

    code: int
    raw: bytes
    err: str

    @property
    def error(self) -> str:
        """The error message of a command that failed with status 1, one line on stderr, and printed nothing else."""
        assert (self.code, self.raw) == (1, b""), self
        message = self.err.removeprefix("xenpv: error: ")
        assert message != self.err, self.err
        assert message.endswith("\n"), message
        assert message.count("\n") == 1, message
        return message.rstrip("\n")

    @property
    def usage_error(self) -> str:
        """The message of a command that was used wrongly."""
        assert (self.code, self.raw) == (64, b""), self
        assert "Traceback" not in self.err
        return self.err

    @property
    def out(self) -> str:
        return self.raw.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.raw)


def lines(ran: Ran) -> str:
    """The printed lines, each run of blanks as one blank."""
    return "\n".join(" ".join(line.split()) for line in ran.out.splitlines())


def xenpv(*args: object, stdin: bytes | None = None) -> Ran:
    """``xenpv ARGS``."""
    return _run(main.run, "xenpv", args, stdin)


def shim(*args: object, stdin: bytes | None = None) -> Ran:
    """``verify-stream-v2 ARGS``."""
    return _run(verify_stream_v2.run, "verify-stream-v2", args, stdin)


def _run(run: Callable[[], NoReturn], program: str, args: tuple[object, ...], stdin: bytes | None) -> Ran:
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    before = sys.argv, sys.stdout, sys.stderr
    sys.argv, sys.stdout, sys.stderr = [program, *map(str, args)], out, err
    code: Any = None
    try:
        # click takes who was started with `python -m PACKAGE` for a part of it, as pytest may have been.
        with _standard_input(stdin), patch.object(sys.modules["__main__"], "__package__", None):
            run()
    except SystemExit as e:
        code = e.code
    finally:
        sys.argv, sys.stdout, sys.stderr = before
    out.flush()
    err.flush()
    assert isinstance(out.buffer, io.BytesIO)
    assert isinstance(err.buffer, io.BytesIO)
    return Ran(int(code or 0), out.buffer.getvalue(), err.buffer.getvalue().decode())


@contextmanager
def _standard_input(data: bytes | None) -> Iterator[None]:
    if data is None:
        yield
        return
    kept = os.dup(0)
    with piped(data) as fd:
        os.dup2(fd, 0)
        try:
            yield
        finally:  # before the pipe is closed, whose writer else would wait for us
            os.dup2(kept, 0)
            os.close(kept)
