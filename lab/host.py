"""A Xen host for as long as a `with` block lasts, and the jobs that run in its dom0."""

from __future__ import annotations

import contextlib
import itertools
import json
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from . import guests, programs, trees, versions
from .errors import LabError, LostVM
from .result import JobTimeout, Result
from .vm import Hardware, Machine
from .workspace import Workspace

BOOT_TIMEOUT = 240.0
LOST_AFTER = 30.0  # seconds beyond a job's own timeout in which dom0 must have answered
DEFAULT_TIMEOUT = 300.0
POLL_INTERVAL = 0.25  # seconds between two checks that the VM still runs


class Job:
    """A command that has been started in dom0."""

    def __init__(self, host: Host, number: int, command: str, timeout: float) -> None:
        self._host = host
        self.number = number
        self.command = command
        self.timeout = timeout
        self.folder = host.share / "jobs" / f"{number:04}"
        self.stdout = self.folder.with_suffix(".stdout")
        self.stderr = self.folder.with_suffix(".stderr")
        self._started = time.monotonic()

    def done(self) -> bool:
        """Whether it has ended; LostVM if it cannot end any more."""
        return self._host._wait_for_answer(self.number, 0.0)

    def output_so_far(self) -> str:
        """What it has written so far, to standard output and then to standard error."""
        output = (path.read_bytes() for path in (self.stdout, self.stderr) if path.exists())
        return b"".join(output).decode(errors="replace")

    def wait(self) -> Result:
        """The result; JobTimeout if it had to be killed, LostVM if the machine went away under it."""
        if not self._host._wait_for_answer(self.number, self.timeout + LOST_AFTER):
            self._host._give_up(f"dom0 has not answered for {LOST_AFTER:g} s after {self.command!r} timed out")
        return self._result(self._host._answers[self.number])

    def _result(self, answer: dict[str, Any]) -> Result:
        if "error" in answer:
            raise LabError(f"dom0 could not run {self.command!r}: {answer['error']}")
        stdout, stderr = self.stdout.read_bytes(), self.stderr.read_bytes()
        status = -1 if answer["status"] is None else answer["status"]
        result = Result(self.command, status, stdout, stderr, self.folder, answer["seconds"])
        if answer["timed_out"]:
            raise JobTimeout(result, self.timeout)
        return result


class Host:
    """Real Xen of one version under QEMU.

    with lab.Host("4.17") as host:
        host.run("xl info").check()

    In dom0, /xenpv is the checkout (what is written there stays in dom0), /share the folder `host.share`, /guests the
    Debian guest, /tmp a file system in memory. A job starts in an empty folder of its own under /share.
    """

    def __init__(self, xen: str = versions.DEFAULT, **hardware: Any) -> None:
        self.xen = versions.find(xen).xen
        self.hardware = Hardware(**hardware)
        self.boot_seconds = 0.0
        self._numbers = itertools.count(1)
        self._answers: dict[int, dict[str, Any]] = {}
        self._pending = b""
        self._workspace: Workspace | None = None
        self._machine: Machine | None = None

    def __enter__(self) -> Self:
        _prepare(self.xen)
        started = time.monotonic()
        self._workspace = Workspace()
        try:
            for folder in (self.share / "jobs", self.share / "consoles"):
                folder.mkdir(parents=True)
            self._machine = Machine(self.xen, self.hardware, self._workspace.path, self.share)
            if not self._wait_for_answer(0, BOOT_TIMEOUT):
                self._give_up(f"Xen {self.xen} was not up after {BOOT_TIMEOUT:g} s")
        except BaseException:
            self.close()
            raise
        self.boot_seconds = time.monotonic() - started
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._machine:
            self._machine.kill()
        if self._workspace:
            self._workspace.remove()
            self._workspace = None

    @property
    def share(self) -> Path:
        """The folder that dom0 sees as /share."""
        if self._workspace is None:
            raise LabError("the host is not running: use it in a with statement")
        return self._workspace.path / "share"

    def alive(self) -> bool:
        """Whether it runs, as far as is known; a run() says for sure."""
        return self._machine is not None and self._machine.process.poll() is None

    @property
    def pid(self) -> int:
        """The process id of QEMU."""
        return self._running().process.pid

    @property
    def console(self) -> str:
        """What Xen and dom0's kernel have printed."""
        return self._running().console()

    def start(self, command: str, *, timeout: float = DEFAULT_TIMEOUT, env: dict[str, str] | None = None) -> Job:
        """Start a command of bash in dom0 and return at once; several may run side by side."""
        machine = self._running()
        machine.check()
        job = Job(self, next(self._numbers), command, timeout)
        job.folder.mkdir()
        order = {
            "id": job.number,
            "command": command,
            "folder": str(job.folder.relative_to(self.share)),
            "timeout": timeout,
            "env": env or {},
        }
        try:
            machine.agent.sendall(json.dumps(order).encode() + b"\n")
        except OSError:
            self._give_up("the channel to dom0 is closed")
        return job

    def run(self, command: str, *, timeout: float = DEFAULT_TIMEOUT, env: dict[str, str] | None = None) -> Result:
        """Run a command of bash in dom0. Its status is in the result: any status is an answer."""
        return self.start(command, timeout=timeout, env=env).wait()

    def put(self, source: Path, name: str = "") -> str:
        """Copy a file into the share; returns its path in dom0."""
        target = self.share / (name or source.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        return f"/share/{target.relative_to(self.share)}"

    def write(self, name: str, text: str) -> str:
        """Write a text file into the share; returns its path in dom0."""
        target = self.share / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return f"/share/{name}"

    def get(self, path: str) -> Path:
        """Where a file of dom0's /share is on this machine; it goes away with the host."""
        return self.share / path.removeprefix("/share/")

    def guest_console(self, name: str) -> str:
        """What the guest has printed since its first boot; it goes on after a restore under the same name."""
        log = self.share / "consoles" / f"guest-{name}.log"
        return log.read_text(errors="replace").replace("\r", "") if log.exists() else ""

    def wait_for_guest(self, name: str, text: str, *, after: int = 0, timeout: float = 120.0) -> int:
        """Wait until `text` stands in the guest's console beyond the offset `after`; the offset where it ends."""
        deadline = time.monotonic() + timeout
        while True:
            console = self.guest_console(name)
            position = console.find(text, after)
            if position >= 0:
                return position + len(text)
            self._running().check()
            if time.monotonic() > deadline:
                tail = "\n".join(f"  | {line}" for line in console[after:].splitlines()[-15:])
                raise LabError(
                    f"guest {name} has not printed {text!r} in {timeout:g} s; the end of its console:\n{tail}"
                )
            time.sleep(0.05)

    def _running(self) -> Machine:
        if self._machine is None or self._workspace is None:
            raise LabError("the host is not running: use it in a with statement")
        return self._machine

    def _wait_for_answer(self, number: int, timeout: float) -> bool:
        """Receive answers until dom0 has answered job `number`, or return False after `timeout` seconds.

        The message that the agent sends when it is ready counts as the answer to job 0.
        """
        machine = self._running()
        deadline = time.monotonic() + timeout
        while number not in self._answers:
            left = max(0.0, deadline - time.monotonic())
            readable, _, _ = select.select([machine.agent], [], [], min(left, POLL_INTERVAL))
            if readable:
                self._receive(machine)
            else:
                machine.check()
                if not left:
                    return False
        return True

    def _receive(self, machine: Machine) -> None:
        try:
            data = machine.agent.recv(65536)
        except ConnectionResetError:  # QEMU ended before it had read all that was sent to it
            data = b""
        if not data:
            with contextlib.suppress(subprocess.TimeoutExpired):
                machine.process.wait(10)  # its end of the channel closes while QEMU ends
            self._give_up("the channel to dom0 is closed")
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            answer = json.loads(line)
            self._answers[answer.get("id", 0)] = answer

    def _give_up(self, reason: str) -> None:
        machine = self._running()
        machine.check()
        machine.kill()
        raise LostVM(reason, machine.console())


def run(xen: str, command: str, *, timeout: float = DEFAULT_TIMEOUT, **hardware: Any) -> Result:
    """Boot, run one command in dom0, and end. The files it leaves are gone then: use Host to have them."""
    with Host(xen, **hardware) as host:
        return host.run(command, timeout=timeout)


def shell(xen: str, **hardware: Any) -> int:
    """Boot with this terminal as dom0's console, and a shell on it."""
    _prepare(xen)
    size = shutil.get_terminal_size()
    workspace = Workspace()
    try:
        share = workspace.path / "share"
        (share / "consoles").mkdir(parents=True)
        machine = Machine(xen, Hardware(**hardware), workspace.path, share, terminal=(size.lines, size.columns))
        try:
            return machine.process.wait()
        finally:
            machine.kill()
    finally:
        workspace.remove()


def _prepare(xen: str) -> None:
    programs.require()
    trees.fetch([*trees.of_version(xen), *guests.trees_needed()])
