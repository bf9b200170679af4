"""How a command in dom0 ended, and the errors that say it ended otherwise than its caller wanted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from .errors import LabError


@dataclass(frozen=True, slots=True)
class Result:
    """How a job ended. `outputs` is the folder that was its working folder; it goes away with the host."""

    command: str
    status: int
    stdout: bytes
    stderr: bytes
    outputs: Path
    seconds: float

    @property
    def text(self) -> str:
        return self.stdout.decode(errors="replace")

    def check(self) -> Self:
        """Itself if the status was 0, else JobFailed with the end of its output."""
        if self.status:
            raise JobFailed(self)
        return self

    def tails(self) -> str:
        parts = []
        for name, data in (("stdout", self.stdout), ("stderr", self.stderr)):
            lines = data.decode(errors="replace").splitlines()[-15:]
            parts += [f"\n{name}:"] * bool(lines) + [f"\n  | {line}" for line in lines]
        return "".join(parts)


class JobFailed(LabError):
    """A command in dom0 ended with a status other than 0, and the caller had asked for 0."""

    def __init__(self, result: Result) -> None:
        self.result = result
        super().__init__(f"{result.command!r} ended with {result.status} after {result.seconds:.1f} s{result.tails()}")


class JobTimeout(LabError):
    """A command in dom0 ran too long and was killed; the VM lives on."""

    def __init__(self, result: Result, timeout: float) -> None:
        self.result = result
        super().__init__(f"{result.command!r} was killed after {timeout:g} s{result.tails()}")
