"""The programs of this machine that the lab runs, and how to get those that are missing."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess

from .apt import KEYRINGS
from .errors import LabError, MissingPrograms

# Program, and the Debian package that brings it.
FETCH = {"apt-get": "apt", "apt-config": "apt", "dpkg-deb": "dpkg", "tar": "tar", "depmod": "kmod"}
BOOT = {"qemu-system-x86_64": "qemu-system-x86", "setpriv": "util-linux"}
# The tests' oracles, the litmus guest's compiler, and what a report is looked at with.
TESTS = {"cpio": "cpio", "gcc": "gcc", "make": "make", "chromium": "chromium"}
KEYRING = {"debian-archive-keyring.gpg": "debian-archive-keyring"}
# depmod is in /usr/sbin, which an ordinary user's PATH often lacks.
SEARCH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


def find(program: str) -> str | None:
    """The path of a program, or of Debian's keys."""
    if program in KEYRING:
        return next((path for path in KEYRINGS if os.path.exists(path)), None)
    return shutil.which(program, path=SEARCH)


def missing(wanted: dict[str, str] | None = None) -> dict[str, str]:
    """Those that are not there, with their packages."""
    every = {**FETCH, **BOOT, **KEYRING} if wanted is None else wanted
    return {program: package for program, package in every.items() if not find(program)}


def require(wanted: dict[str, str] | None = None) -> None:
    """Raise MissingPrograms unless all are there."""
    lacking = missing(wanted)
    if lacking:
        raise MissingPrograms(lacking)


def install(lacking: dict[str, str]) -> None:
    """Install the packages of missing programs, as root or by sudo; the hypervisor and kernels are never among them.

    Raises LabError with the line to type where this user may not install packages without being asked for a password.
    """
    if not find("apt-get"):
        raise LabError(
            "there is no apt-get here: the lab's packages come from Debian, so run it on Debian or a derivative"
        )
    packages = sorted(set(lacking.values()))
    commands = [["apt-get", "update"], ["apt-get", "install", "--no-install-recommends", "-y", *packages]]
    if os.geteuid() != 0:
        commands = [["sudo", *words] for words in commands]
        if not _sudo_asks_nothing():
            line = " && ".join(shlex.join(words) for words in commands)
            raise LabError(f"installing needs root; type this, then try again:\n  {line}")
    for words in commands:
        print(f"running: {shlex.join(words)}", flush=True)
        status = subprocess.run(words, check=False).returncode
        if status:
            raise LabError(f"{shlex.join(words)} ended with {status}")


def _sudo_asks_nothing() -> bool:
    if not find("sudo"):
        return False
    return subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False).returncode == 0
