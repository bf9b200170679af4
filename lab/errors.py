"""What can go wrong in the lab, told apart by what the reader must do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .host import Result


class LabError(Exception):
    """The lab cannot do what was asked: something is missing, or a fetch failed."""


class MissingPrograms(LabError):
    """Programs of this machine that the lab needs are not installed."""

    def __init__(self, programs: dict[str, str]) -> None:
        self.programs = programs
        names = ", ".join(f"{program} (package {package})" for program, package in programs.items())
        super().__init__(f"the lab needs {names}; install with: make lab-deps")


class LostVM(LabError):
    """The virtual machine died, panicked or stopped answering; says nothing about the command that ran in it."""

    def __init__(self, why: str, console: str = "") -> None:
        self.why = why
        self.console = console
        tail = "\n".join(f"  | {line}" for line in console.splitlines()[-40:])
        super().__init__(f"{why}; the end of its console:\n{tail}" if tail else f"{why}; its console is empty")


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
