"""Debian packages without touching the machine's own package state.

apt does the resolving and downloading and checks the signatures, under a configuration of our own: own sources, own
lists, and an empty status file, so that it believes nothing is installed. Of the machine's configuration only the way
to the network (Acquire::http*, such as a proxy) and the mirror's address are taken over.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .errors import LabError

KEYRINGS = (
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
)


def command(*words: str, cwd: Path | None = None, config: Path | None = None) -> str:
    """Run a program to its end and return its output; its complaints become a LabError."""
    env = {**os.environ, "LC_ALL": "C"}
    if config is not None:
        env["APT_CONFIG"] = str(config)
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        complaint = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise LabError(f"{' '.join(words[:4])} … ended with {done.returncode}:\n{complaint}")
    return done.stdout


def mirror(suite: str) -> str:
    """Where this machine takes Debian packages from, unless the environment says otherwise.

    An old suite leaves the mirrors for Debian's archive one day; XENPV_DEBIAN_MIRROR_BULLSEYE redirects only that one.
    """
    for variable in (f"XENPV_DEBIAN_MIRROR_{suite.upper()}", "XENPV_DEBIAN_MIRROR"):
        if os.environ.get(variable):
            return os.environ[variable]
    targets = command("apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)", "Created-By: Packages")
    for line in targets.splitlines():
        origin, label, uri = line.split("|", 2)
        if origin == label == "Debian":
            return uri
    raise LabError("apt on this machine knows no Debian mirror: run `apt-get update`, or set XENPV_DEBIAN_MIRROR=URL")


def keyring() -> str:
    for path in KEYRINGS:
        if Path(path).exists():
            return path
    raise LabError("Debian's archive keys are missing: install the package debian-archive-keyring")


@dataclass(frozen=True, slots=True)
class Deb:
    name: str
    version: str
    size: int


class Suite:
    """One suite of Debian, seen by an apt that has nothing installed."""

    def __init__(self, name: str, state: Path) -> None:
        self.name = name
        self._state = state / name
        self._config = self._state / "apt.conf"

    def update(self) -> None:
        for folder in ("lists/partial", "archives/partial"):
            (self._state / folder).mkdir(parents=True, exist_ok=True)
        (self._state / "status").touch()
        (self._state / "sources.list").write_text(f"deb [signed-by={keyring()}] {mirror(self.name)} {self.name} main\n")
        self._config.write_text(self._configuration())
        # Without --error-on=any a mirror that cannot be reached is only a warning, and the failure shows up later as
        # "unable to locate package".
        command("apt-get", "update", "-qq", "--error-on=any", config=self._config)

    def _configuration(self) -> str:
        settings = {
            "Dir::State": self._state,
            "Dir::State::status": self._state / "status",
            "Dir::Cache": self._state,
            "Dir::Etc::sourcelist": self._state / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::parts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "",  # the state is this user's; apt's own user could not write there
            "Acquire::Languages": "none",
            "Debug::NoLocking": "true",
        }
        dump = command("apt-config", "dump", "--no-empty", "--format", '%f "%v";%n', "Acquire")
        network = [line for line in dump.splitlines(keepends=True) if line.lower().startswith("acquire::http")]
        return "".join(network) + "".join(f'{name} "{value}";\n' for name, value in settings.items())

    def resolve(self, packages: tuple[str, ...]) -> list[Deb]:
        """The packages and all that they depend on."""
        listing = command("apt-get", "install", "-qq", "--print-uris", *packages, config=self._config)
        debs = []
        for line in listing.splitlines():
            _uri, file_name, size, *_ = line.split()
            name, version, _arch = file_name.split("_", 2)
            debs.append(Deb(name, version.replace("%3a", ":"), int(size)))
        return sorted(debs, key=lambda deb: deb.name)

    def download(self, debs: list[Deb], into: Path) -> list[Path]:
        """Fetch the packages; apt checks each against the signed index."""
        into.mkdir(parents=True, exist_ok=True)
        if debs:
            wanted = [f"{deb.name}={deb.version}" for deb in debs]
            command("apt-get", "download", "-qq", *wanted, cwd=into, config=self._config)
        return sorted(into.glob("*.deb"))
