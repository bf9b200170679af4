"""What can go wrong in the lab, told apart by what the reader must do about it."""

from __future__ import annotations


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

    def __init__(self, reason: str, console: str = "") -> None:
        self.reason = reason
        self.console = console
        tail = "\n".join(f"  | {line}" for line in console.splitlines()[-40:])
        super().__init__(f"{reason}; the end of its console:\n{tail}" if tail else f"{reason}; its console is empty")
